"""Several corpora mixed by weight, in an order that is a pure function of the sample's number.

Think of time running at one sample a unit. Corpus d, of weight w_d (the weights sum to 1), gives its k-th
sample at time (k + 1/2) / w_d. Sample i of the blend is the i-th of all these events, ordered by time, then by
corpus. Nothing is counted from the start of the run: the events around any sample number are found directly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.data.gpt2_dataset import Dataset, Piece
from megatron.data.sample_index import Int64Array
from megatron.errors import UserError

WINDOW_GAP = 4096
"""Sample numbers further apart than this are looked up in windows of their own."""


def parse_data_path(data_path: Sequence[str]) -> list[tuple[float, str]]:
    """(weight, prefix) of each corpus: one prefix alone, or weights and prefixes in turn (0.3 wiki 0.7 web).

    The weights need not sum to 1. Raises UserError that names --data-path.
    """
    form = "give one prefix, or weights and prefixes in turn such as 0.3 wiki 0.7 web"
    if not data_path:
        raise UserError(f"--data-path is missing: {form}")
    if len(data_path) == 1:
        return [(1.0, data_path[0])]
    if len(data_path) % 2:
        raise UserError(f"--data-path has {len(data_path)} parts: {form}")
    corpora: list[tuple[float, str]] = []
    for text, prefix in zip(data_path[::2], data_path[1::2], strict=True):
        try:
            weight = float(text)
        except ValueError:
            raise UserError(f"--data-path: expected the weight of {prefix!r}, found {text!r}: {form}") from None
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"--data-path: the weight of {prefix!r} must be positive and finite, found {text!r}")
        corpora.append((weight, prefix))
    prefixes = [prefix for _, prefix in corpora]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(f"--data-path: {prefix!r} is given twice: give it once, with the sum of its weights")
    if not math.isfinite(sum(weight for weight, _ in corpora)):
        raise UserError("--data-path: the weights are too large to be added")
    return corpora


class BlendedDataset:
    """`datasets` mixed in the proportion of `weights`; each goes on with its own next epoch when one ends."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        """Weights are positive and need not sum to 1 (`parse_data_path` checks what users give)."""
        if len(datasets) != len(weights) or not datasets or min(weights) <= 0:
            raise ValueError(f"expected a positive weight for each of {len(datasets)} datasets, found {list(weights)}")
        self.datasets = tuple(datasets)
        self.weights: NDArray[np.float64] = np.asarray(weights, dtype=np.float64) / float(sum(weights))
        """[datasets] shares of the samples, summing to 1."""
        self.seq_length = datasets[0].seq_length
        ends = np.array([dataset.num_samples_per_epoch for dataset in datasets], dtype=np.int64)
        times = self._times(np.arange(len(ends)), ends)
        first = int(np.argmin(times))  # of equal times the lowest number, as in the order of events
        self.num_samples_per_epoch = int(
            self._count_before(float(times[first])).sum() + self._count_ties(float(times[first]), first)
        )
        """Samples before any corpus repeats one."""

    def locate(self, begin: int, end: int) -> tuple[NDArray[np.intp], Int64Array]:
        """Which corpus, and which sample of it, the samples begin .. end of the blend are: two arrays [end - begin].

        Takes O(end - begin + datasets): by time t corpus d has given t * w_d samples, rounded, so all of them
        together differ from t by at most half their number.
        """
        slack = len(self.datasets) / 2 + 1
        low = self._count_before(begin - slack)
        high = self._count_before(end + slack)
        counts = high - low
        heads = np.cumsum(counts) - counts
        corpora = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(low - heads, counts)
        order = np.lexsort((corpora, self._times(corpora, numbers)))
        skip = begin - int(low.sum())
        chosen = order[skip : skip + end - begin]
        return corpora[chosen], numbers[chosen]

    def samples(self, indices: Int64Array) -> Int64Array:
        """Tokens [n, seq_length + 1] int64 of the samples numbered `indices` [n], in any order, repeats allowed."""
        indices = np.asarray(indices, dtype=np.int64)
        corpora, numbers = self._locate_all(indices)
        out = np.empty((len(indices), self.seq_length + 1), dtype=np.int64)
        for corpus in np.unique(corpora).tolist():
            rows = np.flatnonzero(corpora == corpus)
            out[rows] = self.datasets[corpus].samples(numbers[rows])
        return out

    def documents_of(self, index: int) -> list[Piece]:
        """What sample `index` is made of: `GPT2Dataset.documents_of` of the corpus that it comes from."""
        corpora, numbers = self.locate(index, index + 1)
        return self.datasets[int(corpora[0])].documents_of(int(numbers[0]))

    def _locate_all(self, indices: Int64Array) -> tuple[NDArray[np.intp], Int64Array]:
        """`locate` for sample numbers in any order: near ones share a window."""
        unique, inverse = np.unique(indices, return_inverse=True)
        corpora = np.empty(len(unique), dtype=np.intp)
        numbers = np.empty(len(unique), dtype=np.int64)
        for rows in np.split(np.arange(len(unique)), np.flatnonzero(np.diff(unique) > WINDOW_GAP) + 1):
            if len(rows):
                begin = int(unique[rows[0]])
                found = self.locate(begin, int(unique[rows[-1]]) + 1)
                corpora[rows], numbers[rows] = (values[unique[rows] - begin] for values in found)
        return corpora[inverse], numbers[inverse]

    def _times(self, corpora: NDArray[np.intp], numbers: Int64Array) -> NDArray[np.float64]:
        """The one formula for the time of a sample: everything that compares times goes through it."""
        return (numbers + 0.5) / self.weights[corpora]

    def _count_before(self, time: float) -> Int64Array:
        """Samples that each corpus gives strictly before `time`, [datasets].

        The rounding of t * w may be off by one against the times themselves; the loops put it right.
        """
        corpora = np.arange(len(self.datasets))
        counts = np.maximum(np.ceil(time * self.weights - 0.5), 0).astype(np.int64)
        while (late := (counts > 0) & (self._times(corpora, counts - 1) >= time)).any():
            counts -= late
        while (early := self._times(corpora, counts) < time).any():
            counts += early
        return counts

    def _count_ties(self, time: float, corpus: int) -> int:
        """Samples at exactly `time` of corpora that come before `corpus`."""
        before = np.arange(corpus)
        return int((self._times(before, self._count_before(time)[:corpus]) == time).sum())
