"""Loss on held-out samples: always at full length, always the same samples, drawing nothing at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron.config import TrainingConfig
from megatron.data.batch import Batch
from megatron.data.gpt2_dataset import Dataset
from megatron.data.sampler import share
from megatron.distributed.parallelize import reshard
from megatron.distributed.world import World
from megatron.instability.loss_ratio import bucket_name, position_buckets
from megatron.model.gpt2 import GPT2Model
from megatron.training.step import ForwardStep, PositionLosses, autocast

MakeBatch = Callable[[np.ndarray], Batch]
"""Samples [n, seq_length + 1] -> the batch with the masks that the run asks for."""


@dataclass(frozen=True)
class EvaluationResult:
    """Loss over a fixed set of samples."""

    loss: float
    samples: int
    tokens: int
    loss_by_position: dict[str, float]

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, object]:
        """The fields of metrics.jsonl."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "samples": self.samples,
            "tokens": self.tokens,
            "loss_by_position": self.loss_by_position,
        }


def evaluate(
    model: GPT2Model,
    forward_step: ForwardStep,
    dataset: Dataset,
    make_batch: MakeBatch,
    *,
    samples: int,
    training: TrainingConfig,
    world: World,
    interrupted: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:
    """Mean loss over the first `samples` samples of `dataset` (all of it where it holds fewer), at full length.

    Each sample is read by one data parallel rank; all run equally many forward passes, the last perhaps for nothing.

    Returns:
        None where `interrupted` on some rank, asked before every forward pass, says so: a stop need not wait for the
        rest.
    """
    samples = min(samples, dataset.num_samples_per_epoch)
    seq_length = dataset.seq_length
    # No more at a time than training holds.
    chunk = min(training.micro_batch_sequences(seq_length, seq_length), training.global_batch_size // world.layout.dp)
    own = share(samples, world.dp_rank, world.layout.dp)
    passes = math.ceil(math.ceil(samples / world.layout.dp) / chunk)
    position_losses = PositionLosses(seq_length, world.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(training, world.device):
            for number in range(passes):
                if world.any(interrupted()):
                    return None
                numbers = np.array(own[number * chunk : (number + 1) * chunk], dtype=np.int64)
                samples_read = dataset.samples(numbers if len(numbers) else np.zeros(1, dtype=np.int64))
                losses, mask = forward_step(model, make_batch(samples_read), seq_length)
                if len(numbers):
                    position_losses.add(losses, mask)
    finally:
        model.train(was_training)
        reshard(model)
    sums, counts, _ = position_losses.by_bucket(position_losses.totals(world).cpu())
    names = [bucket_name(bucket) for bucket in position_buckets(seq_length)]
    tokens = sum(counts)
    return EvaluationResult(
        loss=sum(sums) / max(tokens, 1),
        samples=samples,
        tokens=int(tokens),
        loss_by_position={n: s / c for n, s, c in zip(names, sums, counts, strict=False) if c},
    )
