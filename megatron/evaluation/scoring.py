"""The loss on the last tokens of many pieces of text: what a zero-shot task comes down to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from megatron.distributed.world import ALONE, World
from megatron.model.gpt2 import GPT2Model
from megatron.tokenizer.base import TokenIds

MICRO_BATCH_TOKENS = 8192
HEAD_ROWS = 1024
"""Rows of logits at a time: 200 MB in fp32 over GPT-2's vocabulary."""


@dataclass(frozen=True)
class Piece:
    """Tokens of which the last ones are to be predicted, each from all that stand before it."""

    tokens: TokenIds
    """[n], at most one more than the model has positions."""
    targets: int
    """How many: 1 to n - 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.targets < len(self.tokens):
            raise ValueError(f"{self.targets} targets of {len(self.tokens)} tokens: expected 1 to tokens - 1")


@dataclass(frozen=True)
class Scores:
    """What came of each piece, in their order."""

    losses: npt.NDArray[np.float64]
    """[pieces]: cross entropy summed over a piece's targets, nats."""
    greedy: npt.NDArray[np.bool_]
    """[pieces]: whether each of its targets is the likeliest token."""


@torch.inference_mode()
def score(
    model: GPT2Model,
    pieces: Sequence[Piece],
    *,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    world: World = ALONE,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Score every piece once; pieces of about the same length share a forward pass.

    Args:
        model: in evaluation mode, whole on every rank.
        micro_batch_tokens: of a forward pass, padding included; a longer piece goes by itself.
        world: each rank takes its share of the forward passes, and all get all scores.
        advance: called with the tokens of each forward pass of this rank, padding left out.

    Raises:
        UserError: where a loss is not finite.
    """
    losses, misses = np.zeros(len(pieces)), np.zeros(len(pieces))
    passes = list(batches([len(piece.tokens) - 1 for piece in pieces], micro_batch_tokens))
    for batch in passes[world.rank :: world.size]:
        chosen = [pieces[index] for index in batch]
        losses[batch], misses[batch] = _forward(model, chosen)
        advance(sum(len(piece.tokens) - 1 for piece in chosen))
    totals = world.sum(torch.from_numpy(np.stack([losses, misses]))).numpy()
    if not np.isfinite(totals).all():
        raise world.fault(
            "the model's loss is not finite: its weights are damaged, or too large for --dtype (fp32 holds the most)"
        )
    return Scores(totals[0], totals[1] == 0)


def batches(lengths: Sequence[int], micro_batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the pieces of each forward pass, the longest first: what does not fit shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    first = 0
    while first < len(order):
        last = first + max(1, micro_batch_tokens // lengths[order[first]])
        yield order[first:last]
        first = last


def _forward(model: GPT2Model, pieces: Sequence[Piece]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Summed loss and number of targets missed, [pieces] each. Only rows that predict a target go to the head."""
    width = max(len(piece.tokens) for piece in pieces) - 1
    inputs = np.zeros((len(pieces), width), dtype=np.int64)  # padded on the right, where no causal row looks
    ends = np.array([len(piece.tokens) - 1 for piece in pieces])
    for row, piece in enumerate(pieces):
        inputs[row, : ends[row]] = piece.tokens[:-1]
    counts = np.array([piece.targets for piece in pieces])
    owners = np.repeat(np.arange(len(pieces)), counts)
    rows = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    rows += owners * width
    labels = np.concatenate([piece.tokens[-piece.targets :] for piece in pieces]).astype(np.int64)

    device = model.device
    hidden = model(torch.from_numpy(inputs).to(device))[torch.from_numpy(rows).to(device)]
    losses, missed = [], []
    for some, target in zip(hidden.split(HEAD_ROWS), torch.from_numpy(labels).to(device).split(HEAD_ROWS), strict=True):
        logits = model.logits(some).float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        missed.append(logits.argmax(-1) != target)
    sums = [np.bincount(owners, torch.cat(values).cpu().numpy(), len(pieces)) for values in (losses, missed)]
    return sums[0].astype(np.float64), sums[1].astype(np.float64)
