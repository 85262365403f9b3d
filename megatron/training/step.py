"""One optimizer step: forward and backward over micro-batches, clip, update.

Ranks exchange their numbers once a step, and their counts of tokens before it where a mask makes them differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpointing.state import start_moments
from megatron.config import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.distributed.parallelize import before_backward
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.instability.loss_ratio import position_buckets
from megatron.model.gpt2 import GPT2Model
from megatron.optimizer.adamw import gradients, scale_and_clip, set_learning_rate, squared_norm
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.plan import StepPlan

ForwardStep = Callable[[GPT2Model, Batch, int], tuple[Tensor, Tensor | None]]
"""(model, micro-batch on the host, at full length but where it is a piece of one, seqlen) -> losses
[sequences, seqlen] unreduced, and their mask."""


class PositionLosses:
    """Sums of losses by position, on the device, until they are asked for."""

    def __init__(self, seq_length: int, device: torch.device) -> None:
        self._buckets = position_buckets(seq_length)
        self._sums = torch.zeros(2, seq_length, dtype=torch.float32, device=device)  # losses, tokens

    def add(self, losses: Tensor, mask: Tensor | None) -> Tensor:
        """Take in [sequences, seqlen] losses and return their masked sum, which can be differentiated."""
        seqlen = losses.shape[1]
        if mask is not None:
            losses = losses * mask
        by_position = losses.sum(0)
        self._sums[0, :seqlen] += by_position.detach()
        self._sums[1, :seqlen] += losses.shape[0] if mask is None else mask.sum(0)
        return by_position.sum()

    def totals(self, world: World, *extra: Tensor) -> Tensor:
        """Loss sums and token counts by position, then `extra` scalars, summed over all ranks: float64, on the device.

        Ranks that share the layers of one model have the same losses, of which those of one count.
        """
        own = self._sums.flatten().double() * (world.tp_rank == 0)
        return world.sum(torch.cat([own, *(value.reshape(1).double() for value in extra)]))

    def by_bucket(self, totals: Tensor) -> tuple[list[float], list[float], list[float]]:
        """`totals`, on the host, as loss sums and token counts by bucket up to the last that holds a token, and the
        values of `extra`."""
        seq_length = self._sums.shape[1]
        sums, counts = totals[:seq_length], totals[seq_length : 2 * seq_length]
        positions = counts.nonzero()
        end = int(positions[-1]) + 1 if len(positions) else 0
        reached = [(a, b) for a, b in self._buckets if a < end]
        return (
            [float(sums[a:b].sum()) for a, b in reached],
            [float(counts[a:b].sum()) for a, b in reached],
            totals[2 * seq_length :].tolist(),
        )


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, over its whole global batch."""

    loss: float
    """Mean over the tokens that count."""
    bucket_losses: list[float]
    """Loss sums by position bucket."""
    bucket_tokens: list[float]
    """Tokens that count, by position bucket."""
    grad_norm: float
    """Global l2 norm before clipping."""
    clipped: bool
    skipped: bool
    """The gradient overflowed under fp16, or the step is not finite: nothing was updated."""
    loss_scale: float
    stop_asked: bool
    """Some rank has been asked to stop."""


class NonFiniteError(UserError):
    """The loss or the gradient is NaN or infinite where no loss scaling can explain it; nothing was updated."""

    def __init__(self, result: StepResult) -> None:
        super().__init__(f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}")
        self.result = result
        """The step as one that was skipped."""


class TrainStep:
    """Runs optimizer steps on one model."""

    def __init__(
        self,
        model: GPT2Model,
        optimizer: torch.optim.AdamW,
        scaler: LossScaler,
        forward_step: ForwardStep,
        training: TrainingConfig,
        optimizer_config: OptimizerConfig,
        parallel: ParallelConfig,
        world: World,
        realisation: str = "truncate",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.world = world
        self._forward_step = forward_step
        self._training = training
        self._parallel = parallel
        self._realisation = realisation
        self._max_norm = optimizer_config.clip_grad

    def __call__(self, batch: Batch, step: StepPlan, *, stop_asked: bool = False) -> StepResult:
        """Train on `batch`, this rank's share of the step (full length, on the host), as `step` says.

        The loss of each micro-batch is its sum over tokens divided by the tokens of the whole step, so that the
        gradient does not depend on how the step was cut or spread over ranks.

        Raises:
            NonFiniteError: before anything is updated, on every rank.
        """
        loss_scale = self.scaler.scale
        position_losses = self._backward(batch, step.seqlen, step.sample_tokens or step.seqlen)
        grads = gradients(self.model.parameters())
        squares = squared_norm(grads).to(self.world.device)
        asked = torch.full_like(squares, float(stop_asked))
        totals = position_losses.totals(self.world, squares, asked)
        norm = totals[-2].sqrt() / loss_scale
        scale_and_clip(grads, norm, loss_scale=loss_scale, max_norm=self._max_norm)
        totals[-2] = norm
        # The only place where the host waits for the device.
        bucket_losses, bucket_tokens, (grad_norm, asking) = position_losses.by_bucket(totals.cpu())
        if not sum(bucket_tokens):
            raise UserError("no loss: every prediction of the step is masked")
        loss = sum(bucket_losses) / sum(bucket_tokens)
        finite = math.isfinite(grad_norm)
        # The loss is not scaled: where it is not finite, no smaller scale will help.
        hopeless = not math.isfinite(loss) or not (finite or self.scaler.can_shrink)
        result = StepResult(
            loss=loss,
            bucket_losses=bucket_losses,
            bucket_tokens=bucket_tokens,
            grad_norm=grad_norm,
            clipped=finite and 0 < self._max_norm < grad_norm,
            skipped=hopeless or not finite,
            loss_scale=loss_scale,
            stop_asked=asking > 0,
        )
        if not result.skipped:
            set_learning_rate(self.optimizer, step.lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if hopeless:
            raise NonFiniteError(result)
        self.scaler.update(overflow=not finite)
        return result

    def _backward(self, batch: Batch, seqlen: int, sample_tokens: int) -> PositionLosses:
        """Accumulate the gradients of all micro-batches."""
        self.model.train()
        total = max(self._loss_tokens(batch, sample_tokens), 1)
        position_losses = PositionLosses(batch.seqlen, self.world.device)
        micro_batches = list(self._micro_batches(batch, seqlen))
        for number, micro_batch in enumerate(micro_batches, start=1):
            before_backward(self.model, self._parallel, last=number == len(micro_batches))
            with autocast(self._training, self.world.device):
                losses, mask = self._forward_step(self.model, micro_batch, min(seqlen, micro_batch.seqlen))
            loss_sum = position_losses.add(losses, mask)
            (loss_sum * (self.scaler.scale / total)).backward()
        return position_losses

    def _micro_batches(self, batch: Batch, seqlen: int) -> Iterator[Batch]:
        """`batch` in parts that each fit the token budget at `seqlen`, which the forward step truncates them to."""
        pieces = [batch]
        if self._realisation != "truncate":
            pieces = batch.cut(seqlen, keep_positions=self._realisation == "window")
        for piece in pieces:
            width = min(seqlen, piece.seqlen)
            yield from piece.split(self._training.micro_batch_sequences(width, batch.seqlen))

    def _loss_tokens(self, batch: Batch, seqlen: int) -> int:
        """Predictions that count in the whole step, of all ranks, which have equal shares of its sequences."""
        own, layout = batch.loss_tokens(seqlen), self.world.layout
        return own * layout.dp if batch.loss_mask is None else self.world.total(own) // layout.tp

    def reserve_memory(self, batch: Batch) -> None:
        """Make Adam's moments and run one full-length micro-batch of `batch`, updating nothing, so that the allocator
        grows before step 1, for what stays before what does not.

        Short steps first would leave the GPU's memory in pieces. Draws nothing from the generators.
        """
        start_moments(self.model, self.optimizer)
        device = self.world.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._backward(next(self._micro_batches(batch, batch.seqlen)), batch.seqlen, batch.seqlen)
        self.optimizer.zero_grad(set_to_none=True)


def autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """The precision of matrix products: bf16 or fp16 where asked for, else fp32."""
    if not (training.bf16 or training.fp16):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if training.bf16 else torch.float16)
