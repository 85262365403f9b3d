"""A few steps in every precision, eager and compiled: on the CPU where it can, and on a GPU with `-m gpu`."""

import shutil
import sysconfig

import pytest
import torch

from megatron.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.distributed.parallelize import missing_for_compile, parallelize, place
from megatron.distributed.world import World
from megatron.optimizer.adamw import build_optimizer
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.plan import StepPlan
from megatron.training.step import TrainStep
from pretrain_gpt2 import forward_step, model_provider

LENGTH, VOCAB = 64, 256
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")


def cases():
    for precision in ("fp32", "bf16", "fp16"):
        for compiled in ("off", "on"):
            marks = [pytest.mark.gpu, GPU]
            yield pytest.param("cuda", precision, compiled, marks=marks, id=f"cuda-{precision}-compile-{compiled}")
    yield pytest.param("cpu", "fp32", "on", marks=[NO_COMPILER], id="cpu-fp32-compile-on")
    yield pytest.param("cpu", "bf16", "off", id="cpu-bf16-compile-off")


def losses(device: str, precision: str, compiled: str) -> list[float]:
    """Twelve steps of a warmup from length 8 to 64 on sequences that count upwards."""
    from megatron.model.initialisation import initialise

    training = TrainingConfig(
        train_iters=1, global_batch_size=16, micro_batch_tokens=512, compile=compiled, initial_loss_scale=2.0**10,
        fp16=precision == "fp16", bf16=precision == "bf16", recompute_granularity="full",
    )  # fmt: skip
    shape = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=2, seq_length=LENGTH, hidden_dropout=0, attention_dropout=0
    )
    world, parallel, config = World(device=torch.device(device)), ParallelConfig(), OptimizerConfig()
    with torch.device("meta"):
        model = model_provider(shape, VOCAB)
    parallelize(model, world, parallel, training, print)
    initialise(model, 1, place)
    optimizer = build_optimizer(model, config)
    step = TrainStep(model, optimizer, LossScaler(training), forward_step, training, config, parallel, world)
    starts = torch.randint(0, VOCAB, (12, 16, 1), generator=torch.Generator().manual_seed(0))
    rows = (starts + torch.arange(LENGTH + 1)) % VOCAB
    step.reserve_memory(Batch.from_samples(rows[0].numpy()))
    results = [step(Batch.from_samples(rows[i].numpy()), StepPlan(min(8 + 8 * i, LENGTH), 16, 3e-3)) for i in range(12)]
    assert not any(r.skipped for r in results)
    return [r.loss for r in results]


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return losses("cpu", "fp32", "off")


@pytest.mark.parametrize(("device", "precision", "compiled"), list(cases()))
def test_every_precision_trains_like_fp32_on_the_cpu(reference, device, precision, compiled):
    got = losses(device, precision, compiled)
    assert got == pytest.approx(reference, rel=1e-3 if precision == "fp32" else 3e-2)
    assert got[-1] < got[0] - 0.3


def test_what_the_compiler_needs_is_looked_for(monkeypatch, tmp_path):
    found = {"gcc", "g++"}
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(headers))
    monkeypatch.delenv("CC", raising=False)
    for on_gpu in (False, True):
        assert missing_for_compile(on_gpu=on_gpu) == f"Python.h found in {headers} (python3-dev)"
    (headers / "Python.h").touch()
    for on_gpu in (False, True):
        assert missing_for_compile(on_gpu=on_gpu) is None
    found.clear()
    assert missing_for_compile(on_gpu=False) == "C++ compiler found (g++)"
    assert missing_for_compile(on_gpu=True) == "C compiler found (gcc)"
    monkeypatch.setenv("CC", "icx")
    assert missing_for_compile(on_gpu=True) is None
