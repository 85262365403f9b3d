"""What makes a CPU faster: attention in bf16 by blocks that stay in its cache, and memory that is not given back.

The blocks are batched products of matrices. `scaled_dot_product_attention` is made for long sequences: at 32 tokens it
takes 2.5 times as long; docs/benchmarks.md has what each saves. Scores and weights are rounded to bf16 on their way, as
where attention is written out under autocast: for scores of the size of 1 the error is twice that of PyTorch's own, for
scores of the size of 10 up to seven times, a hundredth of the output.
"""

from __future__ import annotations

import ctypes
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""Queries of a block. It attends to the keys up to its end, so that little is computed above the diagonal."""
ELEMENTS = 1 << 21
"""Scores held at a time."""


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what is freed for the next step, up to the most that was ever in use.

    Else it unmaps large tensors, and every step takes hundreds of thousands of page faults to get them again.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    # Older versions refuse to keep more than 32 MB a tensor. The one without the other would be worse than neither.
    if any(library.mallopt(mmap_threshold, most) for most in (2**31 - 1, 2**25)):
        library.mallopt(trim_threshold, 2**31 - 1)


@torch.library.custom_op("megatron::causal_attention", mutates_args=())
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of the scaled scores up to each position, times the values: [n, heads, seqlen, dim] each -> the same.

    A custom operator: torch.compile takes it as it is, for every length.
    """
    shape = q.shape
    q, k, v = _flat(q) * shape[-1] ** -0.5, _flat(k), _flat(v)
    out = torch.empty_like(q)
    for heads, start, end in _blocks(q):
        weights = _weights(q[heads, start:end], k[heads, :end])
        out[heads, start:end] = torch.bmm(weights, v[heads, :end])
    # Laid out as what comes next reads it, which then need not keep a copy.
    return out.view(shape).transpose(1, 2).contiguous().transpose(1, 2)


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.custom_op("megatron::causal_attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values. The softmax is computed again; sums over blocks are in fp32."""
    shape, scale = q.shape, q.shape[-1] ** -0.5
    grad, q, k, v, out = _flat(grad), _flat(q) * scale, _flat(k), _flat(v), _flat(out)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(2))
    means = (grad * out).sum(-1, keepdim=True, dtype=grad_k.dtype).to(q.dtype)  # of the weights' gradients
    for heads, start, end in _blocks(q):
        queries, keys, grads = q[heads, start:end].contiguous(), k[heads, :end].contiguous(), grad[heads, start:end]
        weights = _weights(queries, keys)
        grad_v[heads, :end] += torch.bmm(weights.transpose(1, 2), grads)
        grad_scores = torch.bmm(grads, v[heads, :end].transpose(1, 2))
        grad_scores -= means[heads, start:end]
        grad_scores *= weights
        grad_q[heads, start:end] = torch.bmm(grad_scores, keys)
        grad_k[heads, :end] += torch.bmm(grad_scores.transpose(1, 2), queries)
    return (grad_q * scale).view(shape), grad_k.to(q.dtype).view(shape), grad_v.to(q.dtype).view(shape)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(grad, *ctx.saved_tensors)


causal_attention.register_autograd(_differentiate, setup_context=_keep)


def _flat(x: Tensor) -> Tensor:
    """[n, heads, seqlen, dim] -> contiguous [n * heads, seqlen, dim]."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _blocks(q: Tensor) -> list[tuple[slice, int, int]]:
    """Which heads, and which of their queries, make a block of at most about ELEMENTS scores."""
    heads, seqlen = q.shape[:2]
    groups = -(-heads * min(BLOCK, seqlen) * seqlen // ELEMENTS)
    group = -(-heads // groups)
    edges = [*range(0, seqlen, BLOCK), seqlen]
    return [(slice(g, g + group), start, end) for g in range(0, heads, group) for start, end in pairwise(edges)]


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax of the scores of the last queries, which see the keys up to themselves: [heads, queries, keys]."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    rows = queries.shape[1]
    scores[:, :, -rows:] += torch.full((rows, rows), float("-inf"), dtype=scores.dtype).triu_(1)
    return torch.softmax(scores, -1)
