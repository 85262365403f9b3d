"""The samples of a step, a rank's share of them, and reading ahead."""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from megatron.data.gpt2_dataset import Dataset
from megatron.data.sample_index import Int64Array


def share(sequences: int, rank: int, world: int) -> range:
    """Which of a step's `sequences` samples rank `rank` of `world` takes: blocks in the order of the ranks.

    Sizes differ by at most 1, the larger ones first; the blocks of all ranks in a row are the step's order.
    """
    size, larger = divmod(sequences, world)
    begin = rank * size + min(rank, larger)
    return range(begin, begin + size + (rank < larger))


class SampleLoader:
    """Reads samples by number, and ahead of time where it is told what comes next.

    It remembers no position: `batch` gives the same for the same numbers, whatever was asked or prefetched before.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 1) -> None:
        """`num_workers` threads read ahead; 0 reads everything when it is asked for."""
        self.dataset = dataset
        self._workers = num_workers
        self._executor = ThreadPoolExecutor(num_workers, "read-ahead") if num_workers else None
        self._ahead: tuple[tuple[int, int], list[Future[Int64Array]]] | None = None

    def batch(self, first_sample: int, sequences: int, rank: int = 0, world: int = 1) -> Int64Array:
        """This rank's share of samples first_sample .. first_sample + sequences: [n, seq_length + 1] int64.

        An error met in reading ahead is raised here.
        """
        wanted = self._window(first_sample, sequences, rank, world)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == wanted:
            parts = [future.result() for future in ahead[1]]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self.dataset.samples(np.arange(*wanted, dtype=np.int64))

    def prefetch(self, first_sample: int, sequences: int, rank: int = 0, world: int = 1) -> None:
        """Start to read what the next `batch` with the same arguments will return. Does nothing with 0 workers."""
        if self._executor is None:
            return
        self._drop()
        begin, end = window = self._window(first_sample, sequences, rank, world)
        borders = [begin + (end - begin) * part // self._workers for part in range(self._workers + 1)]
        futures = [
            self._executor.submit(self.dataset.samples, np.arange(low, high, dtype=np.int64))
            for low, high in itertools.pairwise(borders)
            if high > low or (low, high) == window
        ]
        self._ahead = (window, futures)

    def close(self) -> None:
        """Stop reading ahead and wait for the threads to end."""
        self._drop()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> SampleLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _drop(self) -> None:
        """Forget what was read ahead."""
        ahead, self._ahead = self._ahead, None
        for future in ahead[1] if ahead else ():
            future.cancel()

    @staticmethod
    def _window(first_sample: int, sequences: int, rank: int, world: int) -> tuple[int, int]:
        part = share(sequences, rank, world)
        return first_sample + part.start, first_sample + part.stop
