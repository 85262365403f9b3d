"""Seconds until a program is ready: python benchmarks/bench_startup.py

Imports of the parts, the help of two programs, and a tiny run (2 layers of 64, on a corpus made here) from the start of
its process to the end of step 1: each in a process of its own, in turn, against `import torch`, which every one of them
that trains must pay, and against transformers, imported and taking the same first step. One round before the first
brings the files into the page cache. What is heavy in an import: python -X importtime -c "import pretrain_gpt2".
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
from flags import make_parser
from processes import run_command

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import UserError, run

PARTS = {
    "numpy": "import numpy",
    "torch": "import torch",
    "transformers' GPT-2": "import transformers; transformers.GPT2LMHeadModel",
    "megatron.pacing": "import megatron.pacing.plan",
    "megatron.arguments": "import megatron.arguments",
    "megatron.data": "import megatron.data.datasets",
    "megatron.model": "import megatron.model.gpt2",
    "megatron.checkpointing": "import megatron.checkpointing.saver",
    "pretrain_gpt2": "import pretrain_gpt2",
}
REFERENCE = "import torch"
LAYERS, HIDDEN, HEADS, SEQ_LENGTH, SEQUENCES, VOCAB_SIZE = 2, 64, 2, 64, 4, 512
THEIR_STEP = f"""
import torch, transformers
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size={VOCAB_SIZE}, n_positions={SEQ_LENGTH}, n_embd={HIDDEN}, n_layer={LAYERS}, n_head={HEADS}))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint({VOCAB_SIZE}, ({SEQUENCES}, {SEQ_LENGTH}))
model(tokens, labels=tokens).loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("step 1", flush=True)
"""


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of the table's rows, besides {REFERENCE!r}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        commands = make_commands(make_corpus(Path(directory) / "corpus"))
        if unknown := set(arguments.only or ()) - commands.keys():
            raise UserError(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(commands)}")
        chosen = [name for name in commands if name in (REFERENCE, *(arguments.only or commands))]
        seconds = measure.in_turn({name: partial(ready, commands[name]) for name in chosen}, arguments.repeats)
    medians = measure.medians(seconds)
    rows = [
        {"what": name, "seconds": took, f"ratio to {REFERENCE}": took / medians[REFERENCE]}
        for name, took in medians.items()
    ]
    measure.print_table([*rows[0]], [[*row.values()] for row in rows])
    measure.finish(arguments.output, {"arguments": vars(arguments), "rows": rows, "seconds": seconds})
    return 0


def make_commands(prefix: str) -> dict[str, tuple[list[str], str | None]]:
    """Command, and the beginning of the line that says it is ready (None: when it ends), of each row."""
    commands: dict[str, tuple[list[str], str | None]] = {
        f"import {name}": ([sys.executable, "-c", statement], None) for name, statement in PARTS.items()
    }
    for program in ("pretrain_gpt2.py", "tools/plan_run.py"):
        commands[f"{program} --help"] = ([sys.executable, program, "--help"], None)
    flags = {
        "data-path": prefix, "vocab-size": VOCAB_SIZE, "num-layers": LAYERS, "hidden-size": HIDDEN,
        "num-attention-heads": HEADS, "seq-length": SEQ_LENGTH, "global-batch-size": SEQUENCES,
        "micro-batch-size": SEQUENCES, "train-iters": 1, "lr": 1e-3, "log-interval": 1, "split": "1,0,0",
    }  # fmt: skip
    train = [sys.executable, "-u", "pretrain_gpt2.py", *(text for k, v in flags.items() for text in (f"--{k}", str(v)))]
    commands["first step, transformers"] = ([sys.executable, "-c", THEIR_STEP], "step 1")
    commands["first step, ours"] = (train, "step 1/")
    return commands


def ready(command: tuple[list[str], str | None]) -> float:
    """Seconds from the start of the process until it is ready."""
    finished = run_command(command[0], cwd=measure.ROOT)
    return finished.seconds if command[1] is None else finished.seconds_until(command[1])


def make_corpus(prefix: Path) -> str:
    """A corpus of random tokens, enough for one step and some."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(100):
            writer.add_document(random.integers(0, VOCAB_SIZE, 4 * SEQ_LENGTH))
    return str(prefix)


if __name__ == "__main__":
    run(main)
