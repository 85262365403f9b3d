"""Wall clock of a whole run with sequence length warmup against its baseline: python benchmarks/bench_run.py

Both train the same model on as many tokens, by pretrain_gpt2.py, one after the other, several times over: at full
length throughout; lengthening from --seqlen-start over --seqlen-warmup-iters steps; and the same with micro-batches of
a fixed number of sequences, as the original had them. Where attention is a real share of the work (a long sequence, a
small model), short steps save it. No evaluation; one checkpoint, at the end, which the seconds of training leave out.
The tokens are random unless --data-path names some (all below --vocab-size).
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import contestants as c
import measure
import numpy as np
from flags import make_parser
from processes import run_command

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import UserError, run
from megatron.flags import positive

BASELINE, SLW, FIXED = "baseline", "slw", "slw, fixed micro-batches"


def main() -> int:
    parser = make_parser(__doc__)
    c.model_arguments(parser)
    parser.set_defaults(num_layers=4, hidden_size=128, num_attention_heads=2)
    parser.add_argument("--data-path", help="prefix of a .bin (default: random tokens)")
    parser.add_argument("--global-batch-size", type=positive, default=32, help="of a step")
    parser.add_argument("--micro-batch-size", type=positive, default=4, help="sequences at full length")
    parser.add_argument("--train-tokens", type=positive, default=1_000_000, help="of each run")
    parser.add_argument("--seqlen-start", type=positive, default=64, help="first length")
    parser.add_argument("--seqlen-warmup-iters", type=positive, default=40, help="steps to full length")
    parser.add_argument("--seqlen-multiple", type=positive, default=8, help="lengths are multiples of it")
    arguments = parser.parse_args()
    model, vocab_size = c.model_of(arguments)
    bf16 = c.use_bf16(arguments.precision, measure.machine()["bf16"])
    if arguments.seqlen_start > arguments.seq_length:
        raise UserError(f"--seqlen-start {arguments.seqlen_start} must be at most --seq-length {arguments.seq_length}")

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prefix = arguments.data_path or random_corpus(directory / "corpus", arguments.train_tokens, vocab_size)
        common = {
            "num-layers": model.num_layers,
            "hidden-size": model.hidden_size,
            "num-attention-heads": model.num_attention_heads,
            "seq-length": model.seq_length,
            "attention-dropout": 0,
            "hidden-dropout": 0,
            "vocab-size": vocab_size,
            "global-batch-size": arguments.global_batch_size,
            "micro-batch-size": arguments.micro_batch_size,
            "train-tokens": arguments.train_tokens,
            "lr": 1e-3,
            "data-path": prefix,
            "split": "1,0,0",
            "log-interval": 1_000_000,
        }
        flags = [f"--{key}={value}" for key, value in common.items()] + ["--bf16"] * bf16

        warmup = ["--seqlen-warmup=linear", f"--seqlen-start={arguments.seqlen_start}"]
        warmup += [
            f"--seqlen-warmup-iters={arguments.seqlen_warmup_iters}",
            f"--seqlen-multiple={arguments.seqlen_multiple}",
        ]
        ways = {BASELINE: [], SLW: warmup, FIXED: [*warmup, "--fixed-micro-batch"]}
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        contestants = {way: partial(train, directory, [*flags, *own], found[way]) for way, own in ways.items()}
        wall = measure.medians(measure.in_turn(contestants, arguments.repeats, warmups=0))

    rows = []
    for way, runs in found.items():
        seconds = measure.medians({"": [last["seconds"] for last in runs]})[""]
        tokens = runs[0]["consumed_tokens"]
        rows.append([way, runs[0]["iteration"], tokens, seconds, wall[way], tokens / seconds])
    rows = [[*row, rows[0][5] / row[5]] for row in rows]  # truncated steps end a few tokens later
    print(
        f"GPT-2 of {model.num_layers} layers x {model.hidden_size}, vocabulary {vocab_size:,}, length "
        f"{model.seq_length}; {arguments.global_batch_size} sequences a step, {arguments.micro_batch_size} of full "
        f"length a micro-batch, {'bf16' if bf16 else 'fp32'}; lengths from {arguments.seqlen_start} over "
        f"{arguments.seqlen_warmup_iters} steps; medians of {arguments.repeats}"
    )
    head = ["run", "steps", "tokens", "s of training", "s of the program", "tokens/s", "time a token / baseline"]
    measure.print_table(head, rows)
    measure.finish(
        arguments.output,
        {"arguments": vars(arguments), "rows": rows, "wall": wall, "ratio": {row[0]: row[-1] for row in rows}},
    )
    return 0


def train(directory: Path, flags: list[str], found: list[dict[str, Any]]) -> float:
    """One run from start to end; the last line of its log goes to `found`. Returns the seconds of the whole program."""
    log = Path(tempfile.mkdtemp(dir=directory))
    command = [sys.executable, str(measure.ROOT / "pretrain_gpt2.py"), *flags, f"--save={log}"]
    finished = run_command(command)
    lines = (log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found.append([entry for line in lines if "grad_norm" in (entry := json.loads(line))][-1])
    return finished.seconds


def random_corpus(prefix: Path, tokens: int, vocab_size: int) -> Path:
    """Documents of random tokens, some more than are trained on."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16 if vocab_size <= 2**16 else np.int32) as writer:
        for _ in range(-(-2 * tokens // 1000)):
            writer.add_document(random.integers(0, vocab_size, 1000))
    return prefix


if __name__ == "__main__":
    run(main)
