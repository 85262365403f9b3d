"""Attention by blocks on the CPU, against PyTorch's own and against the formula in double precision."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron.config import ModelConfig
from megatron.model import cpu
from megatron.model.gpt2 import Attention

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


def test_it_is_about_as_exact_in_bf16_as_pytorchs_own():
    qkv = projection(2, 256, 4, 64, torch.bfloat16)
    exact = with_gradient(by_the_formula, qkv.detach().double().requires_grad_())
    pairs = (
        with_gradient(f, qkv)
        for f in (cpu.causal_attention, lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))
    )
    for ours, theirs, want in zip(*pairs, exact, strict=True):
        assert (ours - want).norm() < 2 * (theirs - want).norm()


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
