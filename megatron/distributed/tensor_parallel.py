"""Tensor parallelism (Megatron-LM): each layer's matrices are split over the ranks of the mesh's tp axis.

Parameters are stored as DTensors, so that sharding over data parallel ranks, the optimizer and checkpoints handle them
as any other; the arithmetic is on local tensors with four explicit collectives, which torch.compile traces whole:

    forward                                          backward
    copy     nothing                                 all-reduce        before a column-parallel layer
    reduce   all-reduce                              nothing           after a row-parallel layer
    gather   all-gather of rows                      reduce-scatter    copy's counterpart under sequence parallelism
    scatter  reduce-scatter of rows                  all-gather        reduce's counterpart under sequence parallelism

Under sequence parallelism a rank holds an equal share of the rows (tokens of all sequences) between the parallel
layers, where their number is rounded up to a multiple of the ranks; rows beyond the last token get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from megatron.model.gpt2 import Attention, GPT2Model, Head, PositionEmbedding, padding_bias


@dataclass(frozen=True)
class Region:
    """The ranks that share a layer, and what passes between them."""

    mesh: DeviceMesh
    sequence_parallel: bool

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks' process group."""
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        """Place among them."""
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        """Their number."""
        return self.mesh.size()

    def enter(self, x: Tensor) -> Tensor:
        """Before a layer of which each rank computes some columns: every rank gets all rows."""
        return (_Gather if self.sequence_parallel else _Copy).apply(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """After a layer of which each rank computed a summand: the sum, or this rank's rows of it."""
        if not self.sequence_parallel:
            return _Reduce.apply(x, self.group)
        return _Scatter.apply(F.pad(x, (0, 0, 0, -x.shape[0] % self.size)), self.group)

    def split(self, parameter: Tensor, dim: int) -> nn.Parameter:
        """Storage for this rank's share of `parameter` along `dim`, without values."""
        return self._stored(parameter, Shard(dim))

    def whole(self, parameter: Tensor) -> nn.Parameter:
        """Storage for `parameter`, which all ranks hold, without values."""
        return self._stored(parameter, Replicate())

    def _stored(self, parameter: Tensor, placement: Placement) -> nn.Parameter:
        shape = list(parameter.shape)
        if isinstance(placement, Shard):
            shape[placement.dim] //= self.size
        local = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        return nn.Parameter(
            DTensor.from_local(
                local, self.mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
        )

    def replicated(self, parameter: Tensor) -> Tensor:
        """The local tensor of a parameter that all ranks hold and apply to their own rows."""
        return local(parameter, Partial() if self.sequence_parallel else Replicate())


def local(parameter: Tensor, gradient: Placement | None = None) -> Tensor:
    """A DTensor's local tensor; its gradient lies as the parameter does, unless `gradient` says otherwise."""
    if not isinstance(parameter, DTensor):
        raise TypeError(f"expected a DTensor, found {type(parameter).__name__}")
    return parameter.to_local(grad_placements=None if gradient is None else [gradient])


def split_model(model: GPT2Model, region: Region) -> None:
    """Replace what ranks share in `model`, which has no values yet, by its parallel counterpart."""
    model.word_embeddings = VocabParallelEmbedding(model.word_embeddings, region)
    model.position_embeddings = ParallelPositionEmbedding(model.position_embeddings, region)
    block: Any  # its parts change their classes
    for block in model.blocks:
        block.attention_norm = ParallelLayerNorm(block.attention_norm, region)
        block.attention.qkv = ColumnParallelLinear(block.attention.qkv, region)
        block.attention.output = RowParallelLinear(block.attention.output, region)
        if block.attention.dropout and not region.sequence_parallel:
            block.attention.attend = _with_own_dropout(block.attention, region.rank)
        block.mlp_norm = ParallelLayerNorm(block.mlp_norm, region)
        block.mlp.up = ColumnParallelLinear(block.mlp.up, region)
        block.mlp.down = RowParallelLinear(block.mlp.down, region)
    model.final_norm = ParallelLayerNorm(model.final_norm, region, enters=True)
    model.head = VocabParallelHead(model.vocab_size, region)


class ColumnParallelLinear(nn.Module):
    """A linear layer of which each rank has some outputs."""

    def __init__(self, linear: nn.Linear, region: Region) -> None:
        super().__init__()
        self.region = region
        self.weight = region.split(linear.weight, 0)
        self.bias = region.split(linear.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [all rows, outputs / tp]."""
        return F.linear(self.region.enter(x), local(self.weight), local(self.bias))


class RowParallelLinear(nn.Module):
    """A linear layer of which each rank has some inputs."""

    def __init__(self, linear: nn.Linear, region: Region) -> None:
        super().__init__()
        self.region = region
        self.weight = region.split(linear.weight, 1)
        self.bias = region.whole(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[all rows, inputs / tp] -> [rows, outputs]."""
        return self.region.leave(F.linear(x, local(self.weight))) + self.region.replicated(self.bias)


class ParallelLayerNorm(nn.LayerNorm):
    """A layer norm over this rank's rows. The last one `enters`: it gives all rows to the vocabulary-parallel head."""

    def __init__(self, norm: nn.LayerNorm, region: Region, *, enters: bool = False) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device=norm.weight.device)
        self.region = region
        self.enters = enters
        self.weight = region.whole(norm.weight)
        self.bias = region.whole(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows or all rows, hidden]."""
        weight, bias = self.region.replicated(self.weight), self.region.replicated(self.bias)
        x = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return self.region.enter(x).clone() if self.enters else x  # FSDP2 wants no view for the model's output


class VocabParallelEmbedding(nn.Embedding):
    """Word embeddings of which each rank has an equal range of the padded vocabulary."""

    def __init__(self, embedding: nn.Embedding, region: Region) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight)
        self.region = region
        self.weight = region.split(embedding.weight, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens] -> [rows, hidden]."""
        weight = local(self.weight)
        rows, mine = own_rows(tokens, weight.shape[0], self.region.rank)
        return self.region.leave(F.embedding(rows, weight) * mine[:, None])


class ParallelPositionEmbedding(PositionEmbedding):
    """Positions of this rank's rows."""

    def __init__(self, embedding: PositionEmbedding, region: Region) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight)
        self.region = region
        self.weight = region.whole(embedding.weight)

    def forward(self, words: Tensor, sequences: int, seqlen: int, position_ids: Tensor | None) -> Tensor:  # type: ignore[override]
        """[rows, hidden] -> [rows, hidden]."""
        weight, rows = self.region.replicated(self.weight), words.shape[0]
        if position_ids is None and not self.region.sequence_parallel:
            return words + weight[:seqlen].repeat(sequences, 1)
        first = self.region.rank * rows if self.region.sequence_parallel else 0
        if position_ids is None:
            positions = torch.arange(first, first + rows, device=words.device) % seqlen
        else:
            flat = position_ids.flatten()
            positions = F.pad(flat, (0, rows * self.region.size))[first : first + rows]
        return words + F.embedding(positions, weight)


class VocabParallelHead(Head):
    """Logits and losses where each rank has a range of the padded vocabulary."""

    def __init__(self, vocab_size: int, region: Region) -> None:
        super().__init__(vocab_size)
        self.region = region

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, padded vocabulary], whole on every rank. No gradient passes."""
        own = self._own_logits(hidden, weight).detach()
        parts = [torch.empty_like(own) for _ in range(self.region.size)]
        dist.all_gather(parts, own.contiguous(), group=self.region.group)
        return torch.cat(parts, 1)

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """[tokens, hidden], [tokens] -> [tokens], fp32."""
        logits = self._own_logits(hidden, weight)
        return _CrossEntropy.apply(logits.float(), labels, self.region.rank, self.region.group)

    def _own_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        own = local(weight)
        bias = padding_bias(own, self.vocab_size, first=self.region.rank * own.shape[0])
        return F.linear(hidden, own, bias)


def own_rows(tokens: Tensor, rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Where in rank `rank`'s `rows` rows of the vocabulary each token stands (0 for those of others), and whether it is
    its own: int64 and bool, shaped as `tokens`."""
    shifted = tokens - rank * rows
    mine = (shifted >= 0) & (shifted < rows)
    return shifted.where(mine, 0), mine


def _with_own_dropout(attention: Attention, rank: int) -> Callable[..., Tensor]:
    """`attend` with dropout of its own on each rank, whose heads differ, while the generators outside stay equal.

    Its seed is drawn from the outer generator, so that recomputation finds the same one again.
    """
    attend = attention.attend

    @torch.compiler.disable
    def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not attention.training:
            return attend(q, k, v, mask)
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng(devices=[q.device] if q.device.type == "cuda" else []):
            torch.manual_seed(seed + rank)
            return attend(q, k, v, mask)

    return own


# torch 2.13 has new names for them, and warns of the old ones.
_gather_rows = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_scatter_rows = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


def _all_reduce(x: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), op, group))


def _all_gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return collectives.wait_tensor(_gather_rows(x.contiguous(), 0, group))


def _reduce_scatter_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return collectives.wait_tensor(_scatter_rows(x.contiguous(), "sum", 0, group))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter_rows(gradient, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter_rows(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather_rows(gradient, ctx.group), None


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label], the columns of `logits` spread over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rank: int, group: dist.ProcessGroup) -> Tensor:
        largest = _all_reduce(logits.amax(1), group, "max")
        shifted = logits - largest[:, None]
        column, mine = own_rows(labels, logits.shape[1], rank)
        picked = shifted.gather(1, column[:, None])[:, 0].where(mine, 0.0)
        exponentials = shifted.exp()
        total, picked = _all_reduce(torch.stack([exponentials.sum(1), picked]), group)
        ctx.save_for_backward(exponentials / total[:, None], column, mine)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, column, mine = ctx.saved_tensors
        logits = softmax * gradient[:, None]
        logits = logits.scatter_add(1, column[:, None], -(gradient * mine)[:, None])
        return logits, None, None, None
