"""The memory estimate against what autograd really keeps, what a step really takes, and sums by hand."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.arguments import build_parser, parse_config
from megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron.distributed.parallelize import before_backward, place, recompute, shard
from megatron.distributed.tensor_parallel import Region, split_model
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.layout import Layout, layout_of
from megatron.model.flops import parameter_count
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import initialise
from megatron.model.memory import estimate_memory, largest_micro_batch
from megatron.model.plan import memory_table, plan_memory

ROOT = Path(__file__).parents[1]
SEQUENCES, LENGTH = 8, 128


def config_of(*flags: str) -> Config:
    return parse_config(build_parser(), ["--train-iters", "1", *flags])[0]


def small(*, precision: str = "fp32", dropout: float = 0.0, masked: bool = False, **training) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=LENGTH, hidden_dropout=dropout,
            attention_dropout=0.0,
        ),
        training=TrainingConfig(
            **{"train_iters": 1, "global_batch_size": 2 * SEQUENCES, "micro_batch_size": SEQUENCES, "compile": "off",
               "bf16": precision == "bf16"} | training
        ),
        data=DataConfig(reset_attention_mask=masked),
    )  # fmt: skip


def model_of(config: Config, vocab: int) -> GPT2Model:
    model = GPT2Model(config.model, vocab)
    initialise(model, 1)
    recompute(model, config.training.recompute_granularity, compiled=False)
    return model


def autocast(config: Config):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.training.bf16)


@pytest.fixture
def masks_of_a_gpu(monkeypatch):
    """Dropout that keeps one byte an element, as on a GPU; the CPU's own keeps numbers."""
    monkeypatch.setattr(
        nn.Dropout, "forward", lambda self, x: torch.native_dropout(x, self.p, True)[0] if self.p else x
    )


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd saves but parameters and indices: each storage once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def __enter__(self):
        super().__enter__()
        return self

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters and tensor.dtype != torch.int64:
            self._storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_activations_are_what_autograd_saves(masks_of_a_gpu, precision, dropout, masked):
    vocab = 512
    config = small(precision=precision, dropout=dropout, masked=masked)
    model = model_of(config, vocab)
    tokens = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    with autocast(config), Saved(model) as saved:
        model.loss(model(tokens, segment_ids=tokens if masked else None), tokens.flatten())
    log_softmax = SEQUENCES * LENGTH * vocab * 4
    estimate = estimate_memory(config, Layout(), vocab)
    assert estimate.activations + estimate.copies == pytest.approx(saved.bytes - log_softmax, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_keeps_as_much_and_of_the_logits_one_copy(precision):
    """The compiler's choice of what to keep, without its code."""
    vocab = 4096
    config = small(precision=precision, compile="on")
    model = model_of(config, vocab)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, backend="aot_eager_decomp_partition")
    model.head.loss = torch.compile(model.head.loss, dynamic=True, backend="aot_eager_decomp_partition")
    tokens = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    with autocast(config), Saved(model) as saved:
        model.loss(model(tokens), tokens.flatten())
    estimate = estimate_memory(config, Layout(), vocab)
    assert estimate.loss == SEQUENCES * LENGTH * vocab * (2 if config.training.bf16 else 4)
    assert estimate.activations + estimate.copies + estimate.loss == pytest.approx(saved.bytes, rel=0.1)


class Meter(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once; `known` ones do not count."""

    def __init__(self, known) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}
        self._live: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live:
                    self._live[key] = weakref.ref(storage, lambda _, key=key: self._live.pop(key))
        storages = [ref() for ref in list(self._live.values())]
        self.peak = max(self.peak, sum(s.nbytes() for s in storages if s is not None))
        return out


@pytest.mark.parametrize("vocab", [128, 4096], ids=["block-is-peak", "loss-is-peak"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("granularity", ["none", "selective", "full"])
def test_the_peak_of_a_micro_batch(masks_of_a_gpu, vocab, precision, granularity):
    """With gradients there already, as for every micro-batch but the first."""
    config = small(precision=precision, dropout=0.1, recompute_granularity=granularity)
    model = model_of(config, vocab)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [t for p in model.parameters() for t in (p.data, p.grad)]
    tokens = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    with Meter(known) as meter:
        with autocast(config):
            losses = model.loss(model(tokens), tokens.flatten())
        losses.sum().backward()
    estimate = estimate_memory(config, Layout(), vocab)
    if granularity == "full":
        assert (estimate.block > estimate.loss) == (vocab == 128)
    standing = estimate.weights + estimate.gradients + estimate.optimizer
    assert estimate.total - standing == pytest.approx(meter.peak, rel=0.1)


@pytest.fixture
def eight_ranks():
    """Rank 0 of 8 whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "parallel",
    [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 2, "data_parallel_shard_size": 4}],
)
def test_the_peak_of_a_sharded_step(masks_of_a_gpu, eight_ranks, parallel):
    config = small(dropout=0.1, global_batch_size=8 * 2 * SEQUENCES)
    check_sharded_step(replace(config, parallel=ParallelConfig(**parallel)), 4096, 0.03)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_peak_where_a_block_is_reduced(masks_of_a_gpu, eight_ranks, in_bf16):
    """Of few tokens and wide blocks, whose gradients and FSDP2's copy of them are then the peak."""
    config = small(dropout=0.1, global_batch_size=8 * 2, micro_batch_size=1)
    parallel = ParallelConfig(zero_stage=3, grad_reduce_in_bf16=in_bf16)
    check_sharded_step(replace(config, model=replace(config.model, hidden_size=256), parallel=parallel), 2048, 0.05)


def check_sharded_step(config: Config, vocab: int, rel: float) -> None:
    """Of two micro-batches, with what FSDP2 gathers and reduces."""
    layout = layout_of(config, 8)
    mesh = init_device_mesh("cpu", (layout.replicate, layout.shard, 1), mesh_dim_names=("replicate", "shard", "tp"))
    model = GPT2Model(config.model, vocab)
    shard(model, World(layout=layout, mesh=mesh), mesh, config.parallel)
    initialise(model, 1, place)
    tokens = torch.zeros(config.training.micro_batch_size, LENGTH, dtype=torch.int64)
    with Meter(p.to_local() for p in model.parameters()) as meter:
        for last in (False, True):
            before_backward(model, config.parallel, last=last)
            model.loss(model(tokens), tokens.flatten()).sum().backward()
    estimate = estimate_memory(config, layout, vocab)
    assert estimate.total - estimate.weights - estimate.optimizer == pytest.approx(meter.peak, rel=rel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("granularity", ["none", "selective", "full"])
def test_the_peak_of_a_tensor_parallel_micro_batch(
    masks_of_a_gpu, eight_ranks, sequence_parallel, precision, granularity
):
    config = small(precision=precision, dropout=0.1, recompute_granularity=granularity)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    config = replace(config, parallel=parallel)
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = GPT2Model(config.model, 1024)
    split_model(model, Region(mesh["tp"], sequence_parallel))
    model.to_empty(device="cpu")
    initialise(model, 1, place)
    recompute(model, granularity, compiled=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [t.to_local() for p in model.parameters() for t in (p.data, p.grad)]
    tokens = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    with Meter(known) as meter:
        with autocast(config):
            losses = model.loss(model(tokens), tokens.flatten())
        losses.sum().backward()
    estimate = estimate_memory(config, Layout(tp=2), 1024)
    standing = estimate.weights + estimate.gradients + estimate.optimizer + estimate.gathered  # no FSDP2 here
    assert estimate.total - standing == pytest.approx(meter.peak, rel=0.1)


SHAPE = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --vocab-size 512".split()
VOCAB_ROWS, POSITIONS, HIDDEN, LAYERS = 512, 128, 64, 4


def shares(tp: int) -> tuple[int, int]:
    """Parameters of a block and of the rest on one tensor parallel rank, written out."""
    qkv = 3 * HIDDEN * HIDDEN // tp + 3 * HIDDEN // tp
    output = HIDDEN * HIDDEN // tp + HIDDEN
    up, down = 4 * HIDDEN * HIDDEN // tp + 4 * HIDDEN // tp, 4 * HIDDEN * HIDDEN // tp + HIDDEN
    return qkv + output + up + down + 2 * 2 * HIDDEN, VOCAB_ROWS * HIDDEN // tp + POSITIONS * HIDDEN + 2 * HIDDEN


@pytest.mark.parametrize(
    ("ranks", "flags", "shard", "gathered", "gradients"),
    [  # shard, and gradients there whole: 0 of the model, or 1 (two micro-batches or more, stages 0 and 2)
        (1, "", 1, "none", "whole"),
        (8, "--zero-stage 0", 1, "all", "whole"),
        (8, "--zero-stage 2", 8, "all", "whole"),
        (8, "--zero-stage 2 --micro-batch-size 8", 8, "all", "shard"),
        (8, "--zero-stage 3", 8, "two", "shard"),
        (8, "--zero-stage 2 --data-parallel-shard-size 4 --micro-batch-size 8", 4, "all", "shard"),
        (8, "--zero-stage 3 --data-parallel-shard-size 2", 2, "two", "shard"),
        (8, "--zero-stage 0 --tensor-model-parallel-size 2", 1, "all", "whole"),
        (8, "--zero-stage 2 --tensor-model-parallel-size 2 --micro-batch-size 16", 4, "all", "shard"),
        (8, "--zero-stage 3 --tensor-model-parallel-size 2", 4, "two", "shard"),
    ],
)
def test_what_is_sharded_by_hand(ranks, flags, shard, gathered, gradients):
    config = config_of(*SHAPE, "--global-batch-size", "64", "--micro-batch-size", "2", *flags.split())
    layout = layout_of(config, ranks)
    block, root = shares(layout.tp)
    whole = LAYERS * block + root
    assert layout.shard == shard
    estimate = estimate_memory(config, layout, 512)
    assert estimate.weights == 4 * whole // shard
    assert estimate.optimizer == 8 * whole // shard
    assert estimate.gradients == 4 * whole // (1 if gradients == "whole" else shard)
    assert estimate.gathered == 4 * {"none": 0, "all": whole, "two": root + 2 * block}[gathered]


def test_parameters_are_those_of_the_model():
    config = config_of(*SHAPE)
    model = GPT2Model(config.model, 512)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == parameter_count(config.model, 512)
    assert estimate_memory(config, Layout(), 512).weights == 4 * parameters


def test_the_largest_model_of_the_paper_by_hand():
    config = config_of("--model-size", "1.5B", "--micro-batch-size", "1")
    estimate = estimate_memory(config, Layout(), 50257)
    rounded = [round(part / 1e9, 1) for part in (estimate.weights, estimate.gradients, estimate.optimizer)]
    assert rounded == [6.2, 6.2, 12.5]
    eager = replace(config, training=replace(config.training, compile="off"))
    assert estimate.loss == 1024 * 50304 * 4
    assert estimate_memory(eager, Layout(), 50257).loss == 1024 * 50304 * 12


def test_tensor_and_sequence_parallel_divide_activations():
    def activations(*flags: str) -> int:
        config = config_of(*SHAPE, "--bf16", "--hidden-dropout", "0", "--compile", "off", *flags)
        return estimate_memory(config, layout_of(config, config.parallel.tensor_model_parallel_size), 512).activations

    tokens = 4 * 128
    whole, inputs = 2 * 4 * HIDDEN + 16, 2 * 2 * HIDDEN  # between the layers; what enters them
    inside = 12 * 2 * HIDDEN + 4 * 4
    last_norm, last_output = 4 * HIDDEN + 8, 2 * HIDDEN
    per_token = [
        LAYERS * (whole + inputs + inside) + last_norm + last_output,
        LAYERS * (whole + inputs + inside // 2) + last_norm + last_output,
        LAYERS * (whole // 2 + inputs + inside // 2) + last_norm // 2 + last_output,
    ]
    split = ("--tensor-model-parallel-size", "2")
    got = [activations(), activations(*split), activations(*split, "--sequence-parallel")]
    assert got == [tokens * bytes_ for bytes_ in per_token]


def test_offloaded_state_is_not_on_the_gpu():
    config = config_of(*SHAPE, "--optimizer-cpu-offload", "--zero-stage", "3")
    estimate = estimate_memory(config, layout_of(config, 4), 512)
    block, root = shares(1)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (0, 0, 0)
    assert estimate.gathered == 4 * (root + 2 * block)


@pytest.mark.parametrize(
    ("ranks", "flags", "tokens"),
    [
        (1, "--micro-batch-tokens 1000", 7 * 128),
        (1, "--micro-batch-tokens 1000 --seqlen-warmup linear --seqlen-warmup-iters 5", 1000),
        (1, "--micro-batch-tokens 100", 128),
        (4, "--micro-batch-tokens 4000", 16 * 128),  # the rank's own share of 64 sequences
        (1, "--micro-batch-size 2 --fixed-micro-batch --seqlen-warmup linear --seqlen-warmup-iters 5", 2 * 128),
    ],
)
def test_the_largest_micro_batch(ranks, flags, tokens):
    config = config_of(*SHAPE, "--global-batch-size", "64", *flags.split())
    assert largest_micro_batch(config, layout_of(config, ranks)) == tokens


def test_a_verdict_says_what_to_change():
    config = config_of("--model-size", "1.5B", "--micro-batch-size", "8", "--global-batch-size", "512")
    assert "fits" not in plan_memory(config, 8)
    memory = plan_memory(config, 8, 40)
    assert not memory["fits"]
    assert set(memory["changes"]) == {
        "--micro-batch-tokens 4096",
        "--micro-batch-tokens 2048",
        "--micro-batch-tokens 1024",
        "--bf16",
        "--recompute-granularity full",
        "--zero-stage 3",
        "--optimizer-cpu-offload",
    }  # no more tensor parallel ranks: 25 heads over 5 ranks, and 8 is no multiple of it
    for total in memory["changes"].values():
        assert total < memory["total"]
    table = memory_table(memory)
    assert "does not fit in 40 GB" in table
    assert "--zero-stage 3 would take" in table
    assert f"enough: {memory['enough']}" in table
    assert memory["changes"][memory["enough"]] <= 40e9, "one change is enough, so no two are named"
    hopeless = plan_memory(config, 8, 1)
    assert hopeless["enough"] is None
    assert "no combination of these is enough" in memory_table(hopeless)
    large = plan_memory(config, 8, 1000)
    assert large["fits"]
    assert large["changes"] == {}
    smaller = replace(config, training=replace(config.training, micro_batch_size=None, micro_batch_tokens=4096))
    assert plan_memory(smaller, 8)["total"] == memory["changes"]["--micro-batch-tokens 4096"]


@pytest.mark.parametrize(
    ("world_size", "gpu_memory", "message"),
    [(0, None, "--world-size 0"), (1, 0.0, "--gpu-memory 0"), (1, float("nan"), "--gpu-memory nan"),
     (3, None, "--global-batch-size 512 must be a multiple of the 3 data parallel ranks")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(world_size, gpu_memory, message):
    with pytest.raises(UserError, match=message):
        plan_memory(config_of(*SHAPE), world_size, gpu_memory)


def test_the_tool_prints_memory():
    command = [sys.executable, str(ROOT / "tools" / "plan_run.py"), *SHAPE, "--train-iters", "3"]

    def printed(*flags: str) -> str:
        return subprocess.run([*command, *flags], capture_output=True, text=True, check=True, timeout=60).stdout

    memory = json.loads(printed("--world-size", "4", "--gpu-memory", "80", "--json"))["memory"]
    assert memory["fits"]
    assert memory["data_parallel_size"] == 4
    assert memory["total"] == memory["tensors"] + memory["overhead"]
    table = printed("--tensor-model-parallel-size", "2")
    assert "memory a GPU, GB     dp 1 x tp 2" in table
    assert "fits" not in table


def test_it_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import megatron.model.memory"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
