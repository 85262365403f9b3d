"""Ranks that train a small model in many layouts, beside the same training in one process, and say where they differ.

`python parallel_ranks.py PART RANK RANKS PORT`: rank 0 prints a JSON object, case -> what was found. One process group
serves all cases of a part.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.data.sampler import SampleLoader
from megatron.distributed.parallelize import place
from megatron.distributed.world import ALONE, World
from megatron.layout import layout_of
from megatron.model.initialisation import initialise
from megatron.optimizer.moment_statistics import moment_statistics
from megatron.pacing.plan import StepPlan
from megatron.training.evaluation import evaluate
from megatron.training.setup import build_state
from megatron.training.state import TrainState
from megatron.training.step import StepResult, TrainStep
from pretrain_gpt2 import forward_step, model_provider

VOCAB, LENGTH, SEQUENCES, EOD = 200, 48, 16, 7
LENGTHS = (8, 16, 15, 3, 32, 48)
"""Of the steps: a warmup, and lengths at which neither tokens nor sequences divide by the ranks."""


class Case(NamedTuple):
    """One way to train."""

    tp: int = 1
    zero: int = 2
    sequence_parallel: bool = False
    recompute: str = "none"
    shard: int | None = None
    masks: bool = False
    bf16_reduction: bool = False

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


class Samples:
    """A data set of 64 samples, whose first token is the sample's number."""

    seq_length = LENGTH
    num_samples_per_epoch = 64

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        rows = [np.random.default_rng(int(n)).integers(0, VOCAB, LENGTH + 1) for n in numbers]
        result = np.stack(rows)
        result[:, 0] = numbers
        return result


def config_of(case: Case, **training: Any) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=LENGTH,
            hidden_dropout=0.0, attention_dropout=0.0,
        ),
        training=TrainingConfig(
            **{"train_iters": 9, "global_batch_size": SEQUENCES, "micro_batch_tokens": 2 * LENGTH,
               "recompute_granularity": case.recompute} | training
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=case.tp, zero_stage=case.zero, sequence_parallel=case.sequence_parallel,
            data_parallel_shard_size=case.shard, grad_reduce_in_bf16=case.bf16_reduction,
        ),
        optimizer=OptimizerConfig(clip_grad=0.5),
    )  # fmt: skip


def world_of(config: Config, rank: int, ranks: int) -> World:
    layout = layout_of(config, ranks)
    sizes = (layout.replicate, layout.shard, layout.tp)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard", "tp"))
    return World(rank=rank, layout=layout, mesh=mesh)


def batch_of(samples: np.ndarray, masks: bool) -> Batch:
    return Batch.from_samples(
        samples, eod=EOD, eod_mask_loss=masks, reset_position_ids=masks, reset_attention_mask=masks
    )


class Training:
    """A training, and what it saw."""

    def __init__(self, config: Config, world: World, forward: Any = forward_step) -> None:
        self.world = world
        self.state: TrainState = build_state(config, VOCAB, world, model_provider, print)
        initialise(self.state.model, 1, place)
        state = self.state
        self.step = TrainStep(
            state.model, state.optimizer, state.scaler, forward, config.training, config.optimizer, config.parallel,
            world,
        )  # fmt: skip
        self.loader = SampleLoader(Samples(), 1)
        self.gradients: dict[str, Tensor] = {}
        state.optimizer.register_step_pre_hook(self._catch)

    def _catch(self, *_: Any) -> None:
        for name, parameter in self.state.model.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = whole(parameter.grad).clone()

    def run(self, number: int, seqlen: int, masks: bool) -> tuple[StepResult, list[int]]:
        """One step, and the numbers of the samples that all ranks together took."""
        share = (self.world.dp_rank, self.world.layout.dp)
        samples = self.loader.batch(number * SEQUENCES, SEQUENCES, *share)
        self.loader.prefetch((number + 1) * SEQUENCES, SEQUENCES, *share)
        taken = self.world.gather(samples[:, 0].tolist())[:: self.world.layout.tp]
        result = self.step(batch_of(samples, masks), StepPlan(seqlen, SEQUENCES, 1e-2))
        return result, [number for part in taken for number in part]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(case: Case, rank: int, ranks: int) -> dict[str, float]:
    """The largest relative difference of each kind over all steps."""
    config = config_of(case)
    world = world_of(config, rank, ranks)
    many, one = Training(config, world), Training(config_of(Case()), ALONE)
    worst: dict[str, float] = {}

    def note(kind: str, found: float, expected: float, unit: float | None = None) -> None:
        error = abs(found - expected) / max(abs(expected) if unit is None else unit, 1e-30)
        worst[kind] = max(worst.get(kind, 0.0), error)

    for number, seqlen in enumerate(LENGTHS):
        result, samples = many.run(number, seqlen, case.masks)
        expected, expected_samples = one.run(number, seqlen, case.masks)
        note("samples", float(samples != expected_samples), 0.0, 1.0)
        for kind in ("loss", "grad_norm"):
            note(kind, getattr(result, kind), getattr(expected, kind))
        for found, want in zip(result.bucket_losses, expected.bucket_losses, strict=True):
            note("bucket_losses", found, want)
        note("bucket_tokens", float(result.bucket_tokens != expected.bucket_tokens), 0.0, 1.0)
        note("clipped", float(result.clipped != expected.clipped), 0.0, 1.0)
        largest = max(float(gradient.abs().max()) for gradient in one.gradients.values())
        for name, gradient in one.gradients.items():
            note("gradients", float((many.gradients[name] - gradient).abs().max()), 0.0, largest)
        found_moments = moment_statistics(many.state.optimizer, world)
        moments = moment_statistics(one.state.optimizer, ALONE)
        for kind in ("adam_variance_norm", "adam_variance_max", "adam_momentum_norm"):
            note(kind, getattr(found_moments, kind), getattr(moments, kind))
    for samples_asked in (13, 64):
        results = [
            evaluate(
                training.state.model, forward_step, Samples(), lambda s: batch_of(s, case.masks),
                samples=samples_asked, training=config.training, world=training.world,
            )
            for training in (many, one)
        ]  # fmt: skip
        note("validation", results[0].loss, results[1].loss)
        note("validation_tokens", float(results[0].tokens != results[1].tokens), 0.0, 1.0)
    one_result = many.run(9, 8, case.masks)[0].loss  # a step after the evaluation
    note("loss", one_result, one.run(9, 8, case.masks)[0].loss)
    return worst


def compiled(case: Case, rank: int, ranks: int) -> dict[str, float]:
    """The largest difference of a compiled training from an eager one in one process; graphs, and breaks between."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    config = config_of(case, compile="on")
    world = world_of(config, rank, ranks)
    many, one = Training(config, world), Training(config_of(Case()), ALONE)
    worst = 0.0
    for number, seqlen in enumerate((8, 16, 15, 24, 32, 40, 48)):
        found, expected = many.run(number, seqlen, False)[0].loss, one.run(number, seqlen, False)[0].loss
        worst = max(worst, abs(found - expected) / expected)
    return {
        "loss": worst,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def overflow(case: Case, rank: int, ranks: int) -> list[list[Any]]:
    """Of every rank, for three fp16 steps, in the second of which rank 1's gradient is infinite: skipped, scale, and
    the sum of all weights."""
    config = config_of(case, fp16=True, hysteresis=1, initial_loss_scale=1024.0)
    world = world_of(config, rank, ranks)
    poisoned = False

    def forward(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        losses, mask = forward_step(*arguments)
        return (_Overflow.apply(losses) if poisoned else losses), mask

    training = Training(config, world, forward)
    seen = []
    for number in range(3):
        poisoned = rank == 1 and number == 1
        result = training.run(number, 16, False)[0]
        weights = sum(float(whole(p.detach()).double().sum()) for p in training.state.model.parameters())
        seen.append([result.skipped, training.state.scaler.scale, weights])
    return world.gather(seen)


def _add_size(size: Tensor, gradient: Tensor) -> None:
    size += gradient.abs()


def reduced(case: Case, rank: int, ranks: int) -> dict[str, float]:
    """The gradients of a step of several micro-batches, against the ranks' own, which rank by rank never meet a
    collective, and added up here in fp64.

    `error` is the largest one in units of what `ranks` roundings to bf16 may do to the absolute values that are summed,
    2^-8 of them each, and rounding in fp32. Shares of the values: those `changed` from what a reduction in fp32 gives,
    and those `short` enough for bf16.
    """
    config = config_of(case)
    config = replace(config, optimizer=replace(config.optimizer, clip_grad=0.0))
    exact = replace(config, parallel=replace(config.parallel, grad_reduce_in_bf16=False))
    world = world_of(config, rank, ranks)
    own = Training(exact, replace(world, mesh=None))
    sizes = [torch.zeros_like(parameter) for parameter in own.state.model.parameters()]
    for parameter, size in zip(own.state.model.parameters(), sizes, strict=True):
        parameter.register_hook(partial(_add_size, size))
    trainings = (Training(config, world), Training(exact, world), own)
    for training in trainings:
        training.run(0, LENGTH, case.masks)
    found, in_fp32, parts = (torch.cat([g.flatten() for g in t.gradients.values()]) for t in trainings)
    # Stage 3 rounds every micro-batch, stages 0 and 2 their sum.
    size = torch.cat([s.flatten() for s in sizes]) if case.zero == 3 else parts.abs()
    expected, size = world.sum(parts.double()), world.sum(size.double())
    limit = ranks * 2**-8 * size + 1e-6 * expected.abs().max()
    dtypes = {tensor.dtype for state in trainings[0].state.optimizer.state.values() for tensor in state.values()}
    return {
        "error": float(((found - expected).abs() / limit).max()),
        "changed": float((found != in_fp32).double().mean()),
        "short": float((found == found.bfloat16()).double().mean()),
        "all_fp32": dtypes == {torch.float32} and found.dtype == torch.float32,
    }


def dropout(case: Case, rank: int, ranks: int) -> list[list[Any]]:
    """Of every rank: digests of dropout's masks, as sums over the hidden states of a first block (outside the parallel
    layers) and over its heads (inside); and whether a model that evaluates leaves the generator alone."""
    from megatron.training.setup import seed_generators

    config = config_of(case)
    config = replace(config, model=replace(config.model, hidden_dropout=0.5, attention_dropout=0.5))
    world = world_of(config, rank, ranks)
    training = Training(config, world)
    seed_generators(3, world, config.parallel)
    seen = []
    attention = training.state.model.blocks[0].attention
    inner = attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return seen.append(float(inner(torch.ones_like(q), k * 0, torch.ones_like(v), mask).double().sum())) or inner(
            q, k, v, mask
        )

    attention.attend = attend
    outer = training.state.model.dropout
    outer.register_forward_hook(lambda module, inputs, output: seen.append(float((output == 0).double().mul(
        torch.arange(output.numel()).view_as(output)).sum())))  # fmt: skip
    model = training.state.model
    model.train()
    model(torch.zeros(2, 16, dtype=torch.int64))
    before = torch.get_rng_state()
    model.eval()
    model(torch.zeros(2, 16, dtype=torch.int64))
    return world.gather([*seen[:2], torch.equal(before, torch.get_rng_state())])


def cases(ranks: int, *, every: bool) -> list[Case]:
    """All combinations of a number of ranks, or a few in which every pair of settings that can meet does."""
    if every:
        return [
            Case(tp, zero, sequence_parallel, recompute)
            for tp in (1, 2, 4)
            if ranks % tp == 0
            for zero in (0, 2, 3)
            for sequence_parallel in ((False, True) if tp > 1 else (False,))
            for recompute in ("none", "selective", "full")
        ]
    if ranks == 2:
        return [Case(1, 2), Case(1, 3, False, "full"), Case(2, 0, True, "selective"), Case(2, 3, False, masks=True)]
    return [
        Case(1, 0, False, "none", masks=True), Case(1, 2, False, "selective"), Case(1, 3, False, "full"),
        Case(1, 2, shard=2), Case(1, 3, shard=2), Case(2, 0, True, "full"), Case(2, 2, False, "none", masks=True),
        Case(2, 3, True, "selective"), Case(2, 3, True, masks=True), Case(4, 2, True, "none"),
        Case(4, 3, False, "full"), Case(4, 0, False, "selective"),
    ]  # fmt: skip


REDUCED = {
    2: [Case(zero=0), Case(zero=2), Case(zero=3)],
    4: [Case(zero=0), Case(zero=2, shard=2), Case(zero=3, shard=2)],
}
"""Ranks -> layouts: of two axes at stage 0 and under hybrid sharding, of one else."""

PARTS = {
    "pairs": lambda ranks: [(compare, case) for case in cases(ranks, every=False)],
    "every": lambda ranks: [(compare, case) for case in cases(ranks, every=True)],
    "compiled": lambda ranks: [(compiled, Case(2, 3)), (compiled, Case(2, 2, True, "selective"))],
    "reduced": lambda ranks: [(reduced, case._replace(bf16_reduction=True)) for case in REDUCED[ranks]],
    "faults": lambda ranks: [
        (overflow, Case(2, 2)), (overflow, Case(1, 3)), (overflow, Case(1, 2, bf16_reduction=True)),
        (dropout, Case(2, 2)), (dropout, Case(2, 2, True)),
    ],
}  # fmt: skip


def main(part: str, rank: int, ranks: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=200))
    found = {f"{function.__name__} {case}": function(case, rank, ranks) for function, case in PARTS[part](ranks)}
    if rank == 0:
        print(json.dumps(found))
        sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # process groups of many meshes: nothing is gained by closing each


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
