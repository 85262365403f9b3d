"""Attention by blocks on the CPU, against PyTorch's own and against the formula in double precision."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron.config import Config, ModelConfig, TrainingConfig
from megatron.distributed.world import ALONE
from megatron.model import cpu
from megatron.model.gpt2 import Attention, GPT2Model
from megatron.training.setup import build_state

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def projection(sequences: int, seqlen: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """What attention gets: queries, keys and values as parts of one tensor."""
    torch.manual_seed(seqlen)
    return torch.randn(sequences, seqlen, heads, 3, dim, dtype=dtype, requires_grad=True)


def with_gradient(attend, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradient of a random sum over it with respect to `qkv`."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
    out = attend(q, k, v)
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(out, qkv, torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return out, gradient


def by_the_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    beyond = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(beyond, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seqlen", [1, 8, 127, 128, 129, 300])
def test_output_and_gradient_are_those_of_the_formula(seqlen, dtype, monkeypatch):
    qkv = projection(2, seqlen, 3, 20, dtype)
    exact = with_gradient(by_the_formula, qkv.detach().double().requires_grad_())
    for elements in (1, 50_000, cpu.ELEMENTS):  # one head at a time, some, all
        monkeypatch.setattr(cpu, "ELEMENTS", elements)
        for got, want in zip(with_gradient(cpu.causal_attention, qkv), exact, strict=True):
            assert (got - want).norm() <= TOLERANCES[dtype] * want.norm()


@pytest.mark.parametrize(("size", "times", "limit"), [(1, 2.5, 0.006), (4, 6, 0.015), (10, 9, 0.03)])
def test_in_bf16_it_is_off_by_no_more_than_is_said(size, times, limit):
    qkv = projection(2, 256, 4, 64, torch.bfloat16).detach()
    qkv[..., 0, :] *= size  # scores of that size
    qkv.requires_grad_()
    exact = with_gradient(by_the_formula, qkv.detach().double().requires_grad_())
    ours = with_gradient(cpu.causal_attention, qkv)
    theirs = with_gradient(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), qkv)
    for one, other, want in zip(ours, theirs, exact, strict=True):
        error = (one - want).norm() / want.norm()
        assert error < limit and error < times * (other - want).norm() / want.norm()


def test_the_operator_is_sound_under_autograd_and_the_compiler():
    x = [torch.randn(2, 3, 130, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(cpu.causal_attention, x)


@pytest.mark.parametrize(
    ("taken", "dtype", "masked", "dropout"),
    [
        (True, torch.bfloat16, False, 0.0),
        (False, torch.float32, False, 0.0),
        (False, torch.bfloat16, True, 0.0),
        (False, torch.bfloat16, False, 0.5),
    ],
)
def test_attention_takes_it_in_bf16_without_mask_and_dropout(taken, dtype, masked, dropout, monkeypatch):
    calls = []
    monkeypatch.setattr("megatron.model.gpt2.causal_attention", lambda q, k, v: calls.append(q) or q)
    attention = Attention(
        ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=4, attention_dropout=dropout)
    )
    x = torch.randn(1, 2, 4, 4, dtype=dtype)
    attention.attend(x, x, x, torch.ones(1, 1, 4, 4, dtype=torch.bool) if masked else None)
    assert bool(calls) == taken


@pytest.mark.parametrize(
    ("most", "calls"),
    [
        (2**31 - 1, [(-3, 2**31 - 1), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**31 - 1), (-3, 2**25), (-1, 2**31 - 1)]),  # glibc before it took more
        (0, [(-3, 2**31 - 1), (-3, 2**25)]),
    ],
)
def test_nothing_is_set_where_the_c_library_refuses(most, calls, monkeypatch):
    seen = []
    library = SimpleNamespace(mallopt=lambda key, value: seen.append((key, value)) or int(key == -1 or value <= most))
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    cpu.keep_freed_memory()
    assert seen == calls


def test_training_on_a_cpu_keeps_freed_memory(monkeypatch):
    calls = []
    monkeypatch.setattr("megatron.training.setup.keep_freed_memory", lambda: calls.append(1))
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=4)
    config = Config(model=model, training=TrainingConfig(train_iters=1))
    build_state(config, 64, ALONE, GPT2Model, print)
    assert calls


def test_freed_memory_is_kept():
    """64 MB, used and freed over and over: without it each time gives page faults, 16,384 of 4 KB."""
    program = """
import resource, sys, torch
from megatron.model.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for round in range(40):
    if round == 20:
        before = faults()
    torch.ones(1 << 24)
print(faults() - before)
"""
    found = {
        mode: int(subprocess.run([sys.executable, "-c", program, mode], check=True, capture_output=True).stdout)
        for mode in ("keep", "return")
    }
    if found["return"] < 10_000:
        pytest.skip("the C library of this machine keeps freed memory anyway")
    assert found["keep"] < 1_000
