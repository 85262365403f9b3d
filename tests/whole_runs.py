"""What tests of whole runs share: a corpus, the environment of their processes, and their logs."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np

from megatron.data.indexed_writer import IndexedDatasetWriter

TIMES = {"seconds", "step_seconds", "elapsed_seconds", "tokens_per_second"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def toy_corpus(directory: Path, *, documents: int, tokens: int, vocabulary: int) -> str:
    """The prefix of a dataset of `documents` documents of `tokens` random tokens each."""
    rng = np.random.default_rng(0)
    prefix = directory / "toy_text_document"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(rng.integers(0, vocabulary, tokens))
    return str(prefix)


def log_of(home: Path, number: type = str) -> list[dict]:
    """metrics.jsonl without wall times; floats as they are written, which is exact, or as `number`."""
    entries = [json.loads(line, parse_float=number) for line in (home / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMES} for e in entries]


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
