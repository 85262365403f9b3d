"""LAMBADA (Paperno et al. 2016): the last word of a passage, counted right where the model would have written it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.errors import UserError
from megatron.evaluation.scoring import Piece, Scores
from megatron.instability.summary import perplexity_of
from megatron.tokenizer.base import Tokenizer, read_definition


@dataclass(frozen=True)
class Example:
    """A passage with its last word."""

    where: str
    """FILE:LINE"""
    text: str


def read_lambada(path: Path) -> list[Example]:
    """The examples of a lambada_test.jsonl, one object with a "text" a line; blank lines are passed over.

    Raises:
        UserError: with file:line, for a line that is no such object; for a file that cannot be read or has none.
    """
    lines = read_definition(path, "--valid-data").split(b"\n")
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            text = json.loads(line)["text"]
        except (KeyError, TypeError):
            text = None
        except (ValueError, RecursionError) as error:
            raise UserError(f"--valid-data {where}: is not valid JSON ({error}); repair or remove the line") from None
        if not isinstance(text, str):
            found = line.decode(errors="replace").strip()[:60]
            raise UserError(f'--valid-data {where}: expected {{"text": "..."}}, found {found!r}')
        examples.append(Example(where, text))
    if not examples:
        raise UserError(f"--valid-data {path}: is empty; expected a lambada_test.jsonl")
    return examples


def piece_of(
    example: Example, tokenizer: Tokenizer, seq_length: int, *, strict: bool, truncate: bool
) -> tuple[Piece, bool]:
    """The example's tokens, the last of which are to be predicted; and whether tokens were left out.

    Args:
        strict: the last word is the target, all tokens of it, encoded apart from what stands before it; else the last
            token of the whole text.
        truncate: keep the last tokens of a text that is longer than `seq_length`, instead of refusing it.

    Raises:
        UserError: with file:line, for a text of one word, or one that is too long.
    """
    words = example.text.split()
    try:
        if strict and len(words) > 1:
            before = example.text[: example.text.rfind(words[-1])].strip()
            context, labels = tokenizer.encode(before), tokenizer.encode(f" {words[-1]}")
        else:
            tokens = tokenizer.encode(example.text)
            context, labels = tokens[:-1], tokens[-1:]
    except UserError as error:
        raise UserError(f"--valid-data {example.where}: {error}") from None
    if len(words) < 2 or not context:
        raise UserError(
            f"--valid-data {example.where}: expected a text of at least two words, found {example.text[:60]!r}"
        )
    piece = np.array(context + labels, dtype=np.int32)
    too_long = len(piece) > seq_length + 1
    if too_long:
        if not truncate or len(labels) > seq_length:
            raise UserError(
                f"--valid-data {example.where}: has {len(piece):,} tokens, but the model reads {seq_length:,} and "
                "predicts one more; give --truncate-context to keep the last ones, or remove the line"
            )
        piece = piece[-(seq_length + 1) :]
    return Piece(piece, len(labels)), too_long


def accuracies(scores: Scores) -> dict[str, float | int | None]:
    """Share of the examples whose targets were all the likeliest; perplexity of a target as a whole."""
    return {
        "accuracy": float(scores.greedy.mean()),
        "correct": int(scores.greedy.sum()),
        "examples": len(scores.greedy),
        "perplexity": perplexity_of(float(scores.losses.mean())),
    }
