"""Time and memory to build the sample index of one epoch: python benchmarks/bench_sample_index.py --documents 10M

In turn with NumPy copying as many bytes as the index has: the speed of memory. The lengths of the documents are made up
(lognormal, sigma 1), no tokens are read. Each way runs in a process of its own, so that its peak memory is its own;
`peak` leaves out what the process held before, the lengths among it.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
from flags import make_parser
from processes import run_command

from megatron.data.sample_index import (
    DOCUMENT_ORDER,
    build_sample_index,
    count_samples,
    generator,
    index_dtype,
    locate_samples,
    shuffled,
)
from megatron.errors import run
from megatron.flags import positive

CHUNK = 1 << 22
MIB = 2**20
OURS, COPYING = "ours", "copying"
SECONDS = ("seconds", "shuffle documents", "locate samples")


def make_lengths(documents: int, mean: float) -> np.ndarray:
    """[documents] int64 lognormal lengths of that mean (sigma 1), made piece by piece to need no more memory."""
    random = np.random.default_rng(0)
    lengths = np.empty(documents, dtype=np.int64)
    for start in range(0, documents, CHUNK):
        part = lengths[start : start + CHUNK]
        part[:] = random.lognormal(np.log(mean) - 0.5, 1.0, len(part))
    return lengths


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_build(documents: int, mean: float, seq_length: int) -> dict[str, Any]:
    """Build the index once, then its parts once more each, to see where the time goes."""
    lengths = make_lengths(documents, mean)
    before = peak_memory()
    started = time.perf_counter()
    index = build_sample_index(lengths, seq_length, 1, 0)
    total = time.perf_counter() - started
    peak = peak_memory() - before
    samples, order, result = len(index.shuffle), index.documents, sum(array.nbytes for array in vars(index).values())
    del index
    parts = {
        "shuffle documents": lambda: shuffled(documents, order.dtype.type, generator(1, 0, DOCUMENT_ORDER)),
        "locate samples": lambda: locate_samples(lengths, order, seq_length, samples),
    }
    return {
        "tokens": int(lengths.sum()),
        "samples": samples,
        "seconds": total,
        **{name: measure.timed(part) for name, part in parts.items()},
        "peak_mib": peak // MIB,
        "index_mib": result // MIB,
    }


def measure_copying(documents: int, mean: float, seq_length: int) -> dict[str, Any]:
    """Copy an array of the size of the index into memory that is as fresh as the index's."""
    tokens = int(make_lengths(documents, mean).sum())
    samples = count_samples(tokens, seq_length)
    array = np.ones(documents + 2 * (samples + 1) + samples, dtype=index_dtype(documents, samples, 0))
    before = peak_memory()
    seconds = measure.timed(array.copy)
    result = {"tokens": tokens, "samples": samples, "seconds": seconds, **dict.fromkeys(SECONDS[1:])}
    return {**result, "peak_mib": (peak_memory() - before) // MIB, "index_mib": array.nbytes // MIB}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--documents", type=positive, default=10_000_000, help="of the corpus")
    parser.add_argument("--mean-length", type=positive, default=500, help="tokens a document")
    parser.add_argument("--seq-length", type=positive, default=1024)
    parser.add_argument("--way", choices=[OURS, COPYING], help="measure one way once, and print a line of JSON")
    arguments = parser.parse_args()
    data = (arguments.documents, arguments.mean_length, arguments.seq_length)
    if arguments.way:
        print(json.dumps((measure_copying if arguments.way == COPYING else measure_build)(*data)))
        return 0
    ways = [OURS, COPYING]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}

    def once(way: str) -> float:
        done = run_command([sys.executable, __file__, *_flags(*data), "--way", way])
        found[way].append(json.loads(done.lines[-1][1]))
        return float(found[way][-1]["seconds"])

    medians = measure.medians(measure.in_turn({way: partial(once, way) for way in ways}, arguments.repeats, warmups=0))
    rows = []
    for way, runs in found.items():
        row = {"way": way, "ratio to copying": medians[way] / medians[COPYING], **runs[-1]}
        parts = {name: statistics.median(one[name] for one in runs) for name in SECONDS if runs[0][name] is not None}
        rows.append(row | parts)
    print(f"{arguments.documents:,} documents, medians of {arguments.repeats}")
    measure.print_table([*rows[0]], [["" if value is None else value for value in row.values()] for row in rows])
    measure.finish(arguments.output, {"arguments": vars(arguments), "rows": rows})
    return 0


def _flags(documents: int, mean: int, seq_length: int) -> list[str]:
    return ["--documents", f"{documents}", "--mean-length", f"{mean}", "--seq-length", f"{seq_length}"]


if __name__ == "__main__":
    run(main)
