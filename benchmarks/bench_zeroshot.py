"""WikiText's perplexity at stride 32 against a plain loop over transformers: python benchmarks/bench_zeroshot.py

The plain loop is what people write: one window at a time, every logit of it, the loss from transformers itself. Both
take the same random weights and the same windows of random tokens, in turn, several times, in fp32 and in bf16; the
losses in fp32 are compared. Ours in bf16 is the tool with --dtype bf16.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
from flags import make_parser

from megatron.checkpointing.huggingface import read_huggingface
from megatron.checkpointing.weights import build_model
from megatron.config import TokenizerConfig
from megatron.errors import UserError, run
from megatron.evaluation.scoring import MICRO_BATCH_TOKENS, Piece, score
from megatron.evaluation.wikitext import windows
from megatron.flags import positive
from megatron.instability.zeroshot_results import STRIDE
from megatron.model.gpt2 import GPT2Model

HEAD_SIZE = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def our_score(model: GPT2Model, pieces: list[Piece], micro_batch_tokens: int) -> float:
    """The summed loss by the tool's own scoring."""
    return float(score(model, pieces, micro_batch_tokens=micro_batch_tokens).losses.sum())


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--num-layers", type=positive, default=12)
    parser.add_argument("--hidden-size", type=positive, default=768)
    parser.add_argument("--seq-length", type=positive, default=1024)
    parser.add_argument("--vocab-size", type=positive, default=50257)
    parser.add_argument("--windows", type=positive, default=16, help="of stride 32")
    parser.add_argument("--micro-batch-tokens", type=positive, default=MICRO_BATCH_TOKENS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    if arguments.hidden_size % HEAD_SIZE:
        raise UserError(f"--hidden-size {arguments.hidden_size} must be a multiple of {HEAD_SIZE}, the size of a head")

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU, or torch is a build without CUDA; give --device cpu")
    try:
        import transformers  # noqa: PLC0415  (an optional dependency)
    except ImportError:
        raise UserError("transformers is not installed: pip install transformers") from None

    device = torch.device(arguments.device)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=arguments.vocab_size,
            n_positions=arguments.seq_length,
            n_embd=arguments.hidden_size,
            n_layer=arguments.num_layers,
            n_head=arguments.hidden_size // HEAD_SIZE,
        )
    )
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        weights = read_huggingface(Path(directory), TokenizerConfig(vocab_size=arguments.vocab_size))
    ours = {name: build_model(weights, dtype).to(device) for name, dtype in DTYPES.items()}
    plain = {name: copy.deepcopy(theirs).eval().to(device, dtype) for name, dtype in DTYPES.items()}
    length = arguments.seq_length + STRIDE * arguments.windows + 1
    tokens = np.random.default_rng(0).integers(0, arguments.vocab_size, length, dtype=np.int32)
    pieces = windows(tokens, arguments.seq_length, STRIDE)[1:]  # of thousands the first, which predicts all, is nothing

    losses: dict[str, float] = {}
    ways: dict[str, Callable[[], float]] = {}
    for name in DTYPES:
        ways[f"plain loop, {name}"] = partial(plain_loop, plain[name], pieces, device)
        ways[f"ours, {name}"] = partial(our_score, ours[name], pieces, arguments.micro_batch_tokens)

    def once(name: str) -> None:
        losses[name] = ways[name]()

    seconds = measure.in_turn({name: partial(once, name) for name in ways}, arguments.repeats)
    medians = measure.medians(seconds)
    difference = abs(losses["ours, fp32"] / losses["plain loop, fp32"] - 1)
    print(
        f"{arguments.num_layers} layers, hidden {arguments.hidden_size}, {len(pieces)} windows of "
        f"{arguments.seq_length} on {device}, medians of {arguments.repeats}; "
        f"losses in fp32 differ by {difference:.1e} of themselves"
    )
    rows = [
        {
            "contestant": name,
            "seconds": took,
            "ms a window": 1000 * took / len(pieces),
            "ratio to the plain loop": medians["plain loop, fp32"] / took,
        }
        for name, took in medians.items()
    ]
    measure.print_table([*rows[0]], [[*row.values()] for row in rows])
    measure.finish(
        arguments.output,
        {"arguments": vars(arguments), "rows": rows, "seconds": seconds, "difference": difference},
    )
    return 0


if __name__ == "__main__":
    run(main)
