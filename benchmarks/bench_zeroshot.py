"""WikiText's perplexity at stride 32 against a plain loop over transformers: python benchmarks/bench_zeroshot.py

The plain loop is what people write: one window at a time, every logit of it, the loss from transformers itself. Both
take the same random weights and the same windows of random tokens, in turn, several times; prints medians and writes
JSON. The losses are compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpointing.huggingface import read_huggingface
from megatron.checkpointing.weights import build_model
from megatron.config import TokenizerConfig
from megatron.evaluation.scoring import MICRO_BATCH_TOKENS, Piece, score
from megatron.evaluation.wikitext import windows
from megatron.instability.zeroshot_results import STRIDE


def plain_loop(model: Any, pieces: list[Piece], device: torch.device) -> float:
    """The summed loss, as the documentation of transformers has it for texts longer than a model reads."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for piece in pieces:
        ids = torch.from_numpy(piece.tokens.astype(np.int64)).to(device)[None]
        inputs, labels = ids[:, :-1], ids[:, 1:].clone()
        labels[:, : -piece.targets] = -100  # not predicted
        with torch.no_grad():
            total += model(inputs, labels=inputs, shift_labels=labels).loss.double() * piece.targets
    return float(total)


def timed(function: Callable[[], float]) -> tuple[float, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--windows", type=int, default=16, help="of stride 32")
    parser.add_argument("--micro-batch-tokens", type=int, default=MICRO_BATCH_TOKENS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()

    import transformers  # noqa: PLC0415  (an optional dependency)

    device = torch.device(arguments.device)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=arguments.vocab_size,
            n_positions=arguments.seq_length,
            n_embd=arguments.hidden,
            n_layer=arguments.layers,
            n_head=arguments.hidden // 64,
        )
    )
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        weights = read_huggingface(Path(directory), TokenizerConfig(vocab_size=arguments.vocab_size))
    ours = build_model(weights).to(device)
    theirs = theirs.eval().to(device)
    length = arguments.seq_length + STRIDE * arguments.windows + 1
    tokens = np.random.default_rng(0).integers(0, arguments.vocab_size, length, dtype=np.int32)
    pieces = windows(tokens, arguments.seq_length, STRIDE)[1:]  # of thousands the first, which predicts all, is nothing

    runs: dict[str, Callable[[], float]] = {
        "plain loop": lambda: plain_loop(theirs, pieces, device),
        "ours": lambda: float(score(ours, pieces, micro_batch_tokens=arguments.micro_batch_tokens).losses.sum()),
    }
    losses, seconds = {}, {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, function in runs.items():
            losses[name], took = timed(function)
            if repeat:  # the first is a warm-up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["plain loop"] / medians["ours"]
    difference = abs(losses["ours"] / losses["plain loop"] - 1)
    print(f"{arguments.layers} layers, hidden {arguments.hidden}, {len(pieces)} windows of {arguments.seq_length}")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {arguments.repeats}")
    for name, median in medians.items():
        print(f"  {median:8.3f} s  {1000 * median / len(pieces):8.1f} ms a window  {name}")
    print(f"  {ratio:.2f} times as fast; losses differ by {difference:.1e} of themselves")
    if arguments.output:
        report = {"arguments": vars(arguments), "seconds": seconds, "ratio": ratio, "difference": difference}
        Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
