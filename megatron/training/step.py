"""One optimizer step: forward and backward over micro-batches, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config import OptimizerConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.errors import UserError
from megatron.instability.loss_ratio import position_buckets
from megatron.model.gpt2 import GPT2Model
from megatron.optimizer.adamw import gradients, scale_and_clip, set_learning_rate
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.plan import StepPlan

ForwardStep = Callable[[GPT2Model, Batch, int], tuple[Tensor, Tensor | None]]
"""(model, full-length micro-batch on the host, seqlen) -> losses [sequences, seqlen] unreduced, and their mask."""


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

    def collect(self, extra: Tensor | None = None) -> tuple[list[float], list[float], list[float]]:
        """Loss sums and token counts by bucket, up to the last one that holds a token, and the values of `extra`.

        Waits for the device once.
        """
        flat = self._sums.flatten().double()
        values = flat if extra is None else torch.cat([flat, extra.flatten().double()])
        host = values.cpu()
        seq_length = self._sums.shape[1]
        sums, counts = host[:seq_length], host[seq_length : 2 * seq_length]
        positions = counts.nonzero()
        end = int(positions[-1]) + 1 if len(positions) else 0
        reached = [(a, b) for a, b in self._buckets if a < end]
        return (
            [float(sums[a:b].sum()) for a, b in reached],
            [float(counts[a:b].sum()) for a, b in reached],
            host[2 * seq_length :].tolist(),
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
    """The gradient overflowed under fp16: nothing was updated."""
    loss_scale: float


class NonFiniteError(UserError):
    """The loss or the gradient is NaN or infinite where no loss scaling can explain it."""


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
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self._forward_step = forward_step
        self._training = training
        self._max_norm = optimizer_config.clip_grad

    def __call__(self, batch: Batch, step: StepPlan) -> StepResult:
        """Train on `batch` (full length, on the host) as `step` says.

        The loss of each micro-batch is its sum over tokens divided by the tokens of the whole step, so that the
        gradient does not depend on how the step was cut.

        Raises:
            NonFiniteError: before anything is updated.
        """
        position_losses = self._backward(batch, step.seqlen)
        grads = gradients(self.model.parameters())
        norm = scale_and_clip(grads, loss_scale=self.scaler.scale, max_norm=self._max_norm)
        bucket_losses, bucket_tokens, (grad_norm,) = position_losses.collect(norm)
        if not sum(bucket_tokens):
            raise NonFiniteError("no loss: every prediction of the step is masked")
        loss = sum(bucket_losses) / sum(bucket_tokens)
        finite = math.isfinite(grad_norm)
        loss_scale = self.scaler.scale
        # The loss is not scaled: where it is not finite, no smaller scale will help.
        if not math.isfinite(loss) or not (finite or self.scaler.can_shrink):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}")
        if finite:
            set_learning_rate(self.optimizer, step.lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update(overflow=not finite)
        return StepResult(
            loss=loss,
            bucket_losses=bucket_losses,
            bucket_tokens=bucket_tokens,
            grad_norm=grad_norm,
            clipped=finite and 0 < self._max_norm < grad_norm,
            skipped=not finite,
            loss_scale=loss_scale,
        )

    def _backward(self, batch: Batch, seqlen: int) -> PositionLosses:
        """Accumulate the gradients of all micro-batches."""
        self.model.train()
        total = max(batch.loss_tokens(seqlen), 1)
        position_losses = PositionLosses(batch.seqlen, self.model.device)
        for micro_batch in batch.split(self._training.micro_batch_sequences(seqlen, batch.seqlen)):
            with autocast(self._training, self.model.device):
                losses, mask = self._forward_step(self.model, micro_batch, seqlen)
            loss_sum = position_losses.add(losses, mask)
            (loss_sum * (self.scaler.scale / total)).backward()
        return position_losses

    def reserve_memory(self, batch: Batch) -> None:
        """Run one full-length micro-batch of `batch`, updating nothing, so that the allocator grows before step 1.

        Short steps first would leave the GPU's memory in pieces. Draws nothing from the generators.
        """
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            largest = next(batch.split(self._training.micro_batch_sequences(batch.seqlen, batch.seqlen)))
            self._backward(largest, batch.seqlen)
        self.optimizer.zero_grad(set_to_none=True)


def autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """The precision of matrix products: bf16 or fp16 where asked for, else fp32."""
    if not (training.bf16 or training.fp16):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if training.bf16 else torch.float16)
