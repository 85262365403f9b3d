"""The tensors of a batch. Here, and nowhere else, sequences are made shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron.data.sample_index import Int64Array
from megatron.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Sequences to train on or to evaluate. All tensors are contiguous and [sequences, seqlen]."""

    tokens: Tensor
    """[sequences, seqlen] int64: what the model reads."""
    labels: Tensor
    """[sequences, seqlen] int64: the token that follows each."""
    loss_mask: Tensor | None = None
    """[sequences, seqlen] bool: whether the prediction counts. None: all count."""
    position_ids: Tensor | None = None
    """[sequences, seqlen] int64: row of the position embedding. None: 0 .. seqlen - 1."""
    segment_ids: Tensor | None = None
    """[sequences, seqlen] int64: number of the document within the sequence, from 0; a token attends only to its
    own. None: to all before it."""

    @classmethod
    def from_samples(
        cls,
        samples: Int64Array,
        *,
        eod: int | None = None,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
    ) -> Batch:
        """The batch of `samples` [sequences, seq_length + 1] int64; `eod` is the end-of-document token's id.

        As `get_ltor_masks_and_position_ids` of Megatron-LM: the prediction made from an eod does not count,
        positions restart after it, and attention does not cross it (the eod belongs to the document that it ends).
        Raises UserError where a flag asks for this and the tokenizer has no such token.
        """
        flags = {
            "--eod-mask-loss": eod_mask_loss,
            "--reset-position-ids": reset_position_ids,
            "--reset-attention-mask": reset_attention_mask,
        }
        asked = [flag for flag, given in flags.items() if given]
        if asked and eod is None:
            raise UserError(f"{', '.join(asked)}: the tokenizer has no end-of-document token")
        inputs = samples[:, :-1].copy()
        is_eod = inputs == eod if asked else np.empty(0, dtype=np.bool_)
        return cls(
            tokens=torch.from_numpy(inputs),
            labels=torch.from_numpy(samples[:, 1:].copy()),
            loss_mask=torch.from_numpy(~is_eod) if eod_mask_loss else None,
            position_ids=torch.from_numpy(_positions(is_eod)) if reset_position_ids else None,
            segment_ids=torch.from_numpy(_segments(is_eod)) if reset_attention_mask else None,
        )

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens of each sequence."""
        return self.tokens.shape[1]

    def truncate(self, seqlen: int) -> Batch:
        """The first `seqlen` positions of every sequence; the tail is dropped. The one place of truncation.

        Raises ValueError where `seqlen` is not in 1 .. self.seqlen.
        """
        if not 1 <= seqlen <= self.seqlen:
            raise ValueError(f"cannot truncate sequences of {self.seqlen} tokens to {seqlen}")
        if seqlen == self.seqlen:
            return self
        return self._map(lambda tensor: tensor[:, :seqlen].contiguous())

    def cut(self, seqlen: int, *, keep_positions: bool) -> list[Batch]:
        """All tokens of every sequence, as sequences of `seqlen` tokens and, where a rest is left, one of those rests.

        Each piece is a sequence of its own: attention cannot leave it. Its positions start at 0, or with
        `keep_positions` stay those of the whole sequence: then this is full-length training under the block-wise
        causal mask of SkyLadder (arXiv 2503.15450), in which token i attends to floor(i / seqlen) * seqlen .. i.
        Raises ValueError where `seqlen` is not in 1 .. self.seqlen.
        """
        if not 1 <= seqlen <= self.seqlen:
            raise ValueError(f"cannot cut sequences of {self.seqlen} tokens to {seqlen}")
        if seqlen == self.seqlen:
            return [self]
        whole = self
        if keep_positions and self.position_ids is None:
            positions = torch.arange(self.seqlen).expand(self.sequences, -1)
            whole = replace(self, position_ids=positions)
        end = self.seqlen - self.seqlen % seqlen
        pieces = [whole._map(lambda tensor: tensor[:, :end].reshape(-1, seqlen))]
        if end < self.seqlen:
            pieces.append(whole._map(lambda tensor: tensor[:, end:].contiguous()))
        return pieces if keep_positions else [piece._restart_positions() for piece in pieces]

    def _restart_positions(self) -> Batch:
        """Count the positions of documents that began before the sequence from its start."""
        if self.position_ids is None:
            return self
        return replace(self, position_ids=torch.minimum(self.position_ids, torch.arange(self.seqlen)))

    def split(self, sequences: int) -> Iterator[Batch]:
        """Micro-batches of at most `sequences` sequences, in order, as views."""
        if sequences < 1:
            raise ValueError(f"a micro-batch holds at least 1 sequence, found {sequences}")
        for start in range(0, self.sequences, sequences):
            yield self._map(lambda tensor, rows=slice(start, start + sequences): tensor[rows])  # type: ignore[misc]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on `device`. `non_blocking` goes by pinned memory, so that the host need not wait for a GPU."""
        device = torch.device(device)
        if device.type == self.tokens.device.type == "cpu":
            return self
        pin = non_blocking and device.type == "cuda" and self.tokens.device.type == "cpu"
        return self._map(lambda tensor: (tensor.pin_memory() if pin else tensor).to(device, non_blocking=non_blocking))

    def loss_tokens(self, seqlen: int) -> int:
        """Predictions that count among the first `seqlen` positions of each sequence: what the loss is divided by.

        Ask it on the host: on a GPU it waits for the device.
        """
        if self.loss_mask is None:
            return self.sequences * min(seqlen, self.seqlen)
        return int(self.loss_mask[:, :seqlen].sum())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Batch(
            tokens=change(self.tokens),
            labels=change(self.labels),
            loss_mask=changed(self.loss_mask),
            position_ids=changed(self.position_ids),
            segment_ids=changed(self.segment_ids),
        )


def _segments(is_eod: np.ndarray) -> Int64Array:
    """[sequences, seqlen] eods strictly before each position: the number of its document."""
    return np.cumsum(is_eod, axis=1, dtype=np.int64) - is_eod


def _positions(is_eod: np.ndarray) -> Int64Array:
    """[sequences, seqlen] distance from the token after the last eod before each position, or from the start."""
    columns = np.arange(is_eod.shape[1], dtype=np.int64)
    starts = np.zeros(is_eod.shape, dtype=np.int64)
    starts[:, 1:] = np.where(is_eod[:, :-1], columns[1:], 0)
    return columns - np.maximum.accumulate(starts, axis=1)
