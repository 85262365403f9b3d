"""Batches: truncation, micro-batches, and the three flags about the end-of-document token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron.data.batch import Batch
from megatron.errors import UserError

EOD = 0
samples_with_eods = st.tuples(st.integers(1, 4), st.integers(2, 14)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 3))
)


def batch_of(samples: np.ndarray, **flags: bool) -> Batch:
    return Batch.from_samples(samples, eod=EOD, **flags)


def everything(samples: np.ndarray) -> Batch:
    return batch_of(samples, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)


def megatron_masks(tokens: list[int]) -> tuple[list[bool], list[int], list[list[bool]]]:
    """Loss mask, positions and attention of one sequence, after `get_ltor_masks_and_position_ids`."""
    size = len(tokens)
    attention = [[key <= query for key in range(size)] for query in range(size)]
    positions = list(range(size))
    previous = 0
    for i in [place for place, token in enumerate(tokens) if token == EOD]:
        for query in range(i + 1, size):
            for key in range(i + 1):
                attention[query][key] = False
            positions[query] -= i + 1 - previous
        previous = i + 1
    return [token != EOD for token in tokens], positions, attention


@given(samples_with_eods)
def test_flags_equal_megatron(samples: np.ndarray) -> None:
    batch = everything(samples)
    assert batch.loss_mask is not None and batch.position_ids is not None and batch.segment_ids is not None
    causal = torch.ones(batch.seqlen, batch.seqlen, dtype=torch.bool).tril()
    for row, tokens in enumerate(samples[:, :-1].tolist()):
        loss_mask, positions, attention = megatron_masks(tokens)
        segments = batch.segment_ids[row]
        assert batch.loss_mask[row].tolist() == loss_mask
        assert batch.position_ids[row].tolist() == positions
        assert (causal & (segments[:, None] == segments[None, :])).tolist() == attention


@given(samples_with_eods)
def test_tokens_and_labels(samples: np.ndarray) -> None:
    batch = batch_of(samples)
    assert batch.tokens.tolist() == samples[:, :-1].tolist()
    assert batch.labels.tolist() == samples[:, 1:].tolist()
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.loss_mask is None and batch.position_ids is None and batch.segment_ids is None


@given(samples_with_eods, st.data())
def test_truncation_keeps_the_first_positions_of_everything(samples: np.ndarray, data: st.DataObject) -> None:
    batch = everything(samples)
    seqlen = data.draw(st.integers(1, batch.seqlen))
    short = batch.truncate(seqlen)
    again = everything(samples[:, : seqlen + 1])
    for name in ("tokens", "labels", "loss_mask", "position_ids", "segment_ids"):
        assert getattr(short, name).equal(getattr(again, name)), name
        assert getattr(short, name).is_contiguous()
    assert batch.loss_tokens(seqlen) == short.loss_tokens(seqlen) == int((samples[:, :seqlen] != EOD).sum())
    assert batch_of(samples).loss_tokens(seqlen) == len(samples) * seqlen


@given(samples_with_eods, st.integers(1, 6))
def test_micro_batches_in_a_row_are_the_batch(samples: np.ndarray, sequences: int) -> None:
    batch = everything(samples)
    parts = list(batch.split(sequences))
    assert all(part.sequences <= sequences for part in parts)
    assert len(parts) == -(-batch.sequences // sequences)
    for name in ("tokens", "labels", "loss_mask", "position_ids", "segment_ids"):
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(batch, name))
    assert parts[0].tokens.data_ptr() == batch.tokens.data_ptr(), "a view, not a copy"


@pytest.mark.parametrize("seqlen", [0, 4])
def test_pieces_that_do_not_fit(seqlen: int) -> None:
    with pytest.raises(ValueError, match=f"sequences of 3 tokens to {seqlen}"):
        batch_of(np.zeros((1, 4), dtype=np.int64)).cut(seqlen, keep_positions=True)


def test_lengths_that_do_not_fit() -> None:
    batch = batch_of(np.ones((2, 9), dtype=np.int64))
    for seqlen in (0, -1, 9):
        with pytest.raises(ValueError, match="8 tokens"):
            batch.truncate(seqlen)
    with pytest.raises(ValueError, match="at least 1"):
        next(batch.split(0))


def test_flags_without_an_end_of_document_token() -> None:
    with pytest.raises(UserError, match=r"--eod-mask-loss, --reset-attention-mask: .* no end-of-document"):
        Batch.from_samples(np.ones((1, 5), dtype=np.int64), eod_mask_loss=True, reset_attention_mask=True)


def test_samples_are_not_aliased() -> None:
    samples = np.ones((1, 5), dtype=np.int64)
    batch = batch_of(samples)
    samples[:] = 7
    assert batch.tokens.tolist() == [[1, 1, 1, 1]]


@given(samples_with_eods, st.data(), st.booleans())
def test_cutting_keeps_every_token_once_with_its_masks(samples: np.ndarray, data: st.DataObject, keep: bool) -> None:
    """Against a loop over tokens: where each stands, and what of its document its piece holds."""
    length = samples.shape[1] - 1
    seqlen = data.draw(st.integers(1, length))
    for batch in (everything(samples), batch_of(samples)):
        pieces = batch.cut(seqlen, keep_positions=keep)
        rest = length % seqlen
        assert [(piece.sequences, piece.seqlen) for piece in pieces] == [
            (len(samples) * (length // seqlen), seqlen),
            *([(len(samples), rest)] if rest else []),
        ]
        for row in range(len(samples)):
            for column in range(length):
                number, place = divmod(column, seqlen)
                piece = pieces[1] if number == length // seqlen else pieces[0]
                at = (row, place) if piece is not pieces[0] else (row * (length // seqlen) + number, place)
                assert piece.tokens[at] == batch.tokens[row, column]
                assert piece.labels[at] == batch.labels[row, column]
                position = column if batch.position_ids is None else int(batch.position_ids[row, column])
                if not keep:
                    position = min(position, place)
                found = place if piece.position_ids is None else int(piece.position_ids[at])
                assert found == position
                if batch.loss_mask is not None and piece.loss_mask is not None:
                    assert piece.loss_mask[at] == batch.loss_mask[row, column]
                if batch.segment_ids is not None and piece.segment_ids is not None:
                    assert piece.segment_ids[at] == batch.segment_ids[row, column]
                assert (batch.segment_ids is None) == (piece.segment_ids is None)
                assert (batch.loss_mask is None) == (piece.loss_mask is None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("non_blocking", [False, True])
def test_to_a_gpu_and_back(non_blocking: bool) -> None:
    batch = everything(np.arange(20).reshape(2, 10) % 4)
    back = batch.to("cuda", non_blocking=non_blocking).to("cpu")
    assert back.tokens.equal(batch.tokens) and back.segment_ids is not None
