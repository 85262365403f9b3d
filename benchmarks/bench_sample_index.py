"""Time and memory to build the sample index of one epoch, by NumPy and by the compiled helper.

    python benchmarks/bench_sample_index.py --documents 10_000_000 --seq-length 1024 --json out.json

The lengths of the documents are made up (lognormal), no tokens are read. Each way runs in a process of its own,
so that its peak memory is its own; `peak` leaves out what the process held before, the lengths among it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.sample_index import (
    DOCUMENT_ORDER,
    SAMPLE_ORDER,
    build_sample_index,
    fastest_locate,
    generator,
    locate_samples,
)

CHUNK = 1 << 22
MIB = 2**20


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


def measure(way: str, documents: int, mean: float, seq_length: int) -> dict[str, float | int | str]:
    """Build the index once by `way`, then its parts once more each, to see where the time goes."""
    locate = locate_samples if way == "numpy" else fastest_locate()
    lengths = make_lengths(documents, mean)
    before = peak_memory()
    started = time.perf_counter()
    index = build_sample_index(lengths, seq_length, 1, 0, locate)
    total = time.perf_counter() - started
    peak = peak_memory() - before
    samples = len(index.shuffle)
    result = index.documents.nbytes + index.starts.nbytes + index.shuffle.nbytes
    documents_in_order = index.documents
    del index
    seconds = {}
    for name, part in {
        "permute_documents": lambda: generator(1, 0, DOCUMENT_ORDER).permutation(np.int64(documents)),
        "locate": lambda: locate(lengths, documents_in_order, seq_length, samples),
        "permute_samples": lambda: generator(1, 0, SAMPLE_ORDER).permutation(np.int64(samples)),
    }.items():
        started = time.perf_counter()
        part()
        seconds[name] = round(time.perf_counter() - started, 3)
    return {
        "way": way,
        "documents": documents,
        "tokens": int(lengths.sum()),
        "samples": samples,
        "seconds": round(total, 3),
        **seconds,
        "peak_mib": round(peak / MIB),
        "index_mib": round(result / MIB),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--mean-length", type=float, default=500.0, help="tokens a document")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--way", choices=["numpy", "compiled"], help="measure one way and print a line of JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.documents, options.mean_length, options.seq_length)))
        return
    ways = ["numpy"] if fastest_locate() is locate_samples else ["numpy", "compiled"]
    if len(ways) == 1:
        print("the compiled helper is not installed: NumPy only (python setup.py build_ext --inplace builds it)")
    rows = []
    for way in ways:
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
    for name in rows[0]:
        values = (f"{row[name]:>16,}" if name != "way" else f"{row[name]:>16}" for row in rows)
        print(f"{name:<18}", *values)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
