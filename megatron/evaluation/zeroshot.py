"""One zero-shot task from a model to a result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import ModelConfig
from megatron.console import ProgressLine
from megatron.distributed.world import ALONE, World
from megatron.errors import UserError
from megatron.evaluation.lambada import accuracies, piece_of, read_lambada
from megatron.evaluation.loading import Loaded
from megatron.evaluation.scoring import MICRO_BATCH_TOKENS, Piece, Scores, score
from megatron.evaluation.wikitext import perplexities, read_wikitext, windows
from megatron.instability.zeroshot_results import LAMBADA, STRICT_LAMBADA, STRIDE, WIKITEXT
from megatron.metrics import json_safe
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class ZeroShotConfig:
    """How a task is evaluated."""

    task: str
    """WIKITEXT or LAMBADA."""
    valid_data: Path
    overlapping_eval: int = STRIDE
    """By how many tokens WikiText's windows move on."""
    strict_lambada: bool = False
    truncate_context: bool = False
    seq_length: int | None = None
    """None: the model's own."""
    micro_batch_tokens: int = MICRO_BATCH_TOKENS

    @property
    def name(self) -> str:
        """What the task's result is called."""
        return STRICT_LAMBADA if self.task == LAMBADA and self.strict_lambada else self.task


def evaluate(loaded: Loaded, config: ZeroShotConfig, world: World = ALONE, task: Task | None = None) -> dict[str, Any]:
    """The task's result, values that JSON can hold: its metrics, counts, seconds, and what they were measured on.

    `task` is what `prepare` made for this model; else it is made here. Progress goes to stderr. Raises UserError for a
    flag, a file or a model that does not fit.
    """
    started = time.monotonic()
    # Every rank reads the file, and one of them says what is wrong with it.
    task = task or world.everywhere(lambda: prepare(config, loaded.config, loaded.require_tokenizer()))
    pieces = task.pieces
    tokens = sum(len(piece.tokens) - 1 for piece in pieces)
    passes = done = 0
    with ProgressLine(
        config.name, target_tokens=-(-tokens // world.size), silent=not world.is_main, stream=sys.stderr
    ) as line:

        def advance(more: int) -> None:
            nonlocal passes, done
            passes, done = passes + 1, done + more
            line.update({"iteration": passes, "consumed_tokens": done})

        scores = score(loaded.model, pieces, micro_batch_tokens=config.micro_batch_tokens, world=world, advance=advance)
    result = {"task": config.name, **task.metrics(scores), **task.counts}
    result |= {"forward_tokens": tokens, "seconds": time.monotonic() - started, "ranks": world.size}
    return dict(json_safe(result | _model_of(loaded) | {"valid_data": str(config.valid_data)}))


def evaluate_harness(
    loaded: Loaded,
    tasks: str,
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    world: World = ALONE,
) -> dict[str, Any]:
    """The same of tasks of lm-eval, names with commas between; see `harness.run_harness`."""
    from megatron.evaluation.harness import run_harness  # noqa: PLC0415  (the package that it needs is optional)

    started = time.monotonic()
    outcome = run_harness(loaded, tasks.split(","), limit, include_path, micro_batch_tokens, world)
    result = {"task": tasks} | outcome
    result |= {"limit": limit, "seconds": time.monotonic() - started, "ranks": world.size}
    return dict(json_safe(result | _model_of(loaded)))


def _model_of(loaded: Loaded) -> dict[str, str]:
    dtype = str(loaded.model.word_embeddings.weight.dtype).removeprefix("torch.")
    return {"dtype": dtype, "model": str(loaded.source)}


@dataclass(frozen=True)
class Task:
    """A file cut into what a model is to be asked."""

    pieces: list[Piece]
    metrics: Callable[[Scores], dict[str, Any]]
    """What the scores come to."""
    counts: dict[str, Any]
    """What else belongs into the result."""


def prepare(config: ZeroShotConfig, model: ModelConfig, tokenizer: Tokenizer) -> Task:
    """The task for a model, whose weights it takes none of. Raises UserError for a flag or a file that does not fit."""
    positions = model.positions
    seq_length = model.seq_length if config.seq_length is None else config.seq_length
    if not 1 <= seq_length <= positions:
        raise UserError(f"--seq-length {seq_length} must be from 1 to the model's {positions} positions")
    if config.micro_batch_tokens < 1:
        raise UserError(f"--micro-batch-tokens {config.micro_batch_tokens} must be at least 1")
    task = (_wikitext if config.task == WIKITEXT else _lambada)(config, tokenizer, seq_length)
    task.counts["seq_length"] = seq_length
    return task


def _wikitext(config: ZeroShotConfig, tokenizer: Tokenizer, seq_length: int) -> Task:
    stride = config.overlapping_eval
    if not 1 <= stride <= seq_length:
        raise UserError(
            f"--overlapping-eval {stride} must be from 1 to the sequence length {seq_length} (windows that do not "
            "overlap), else tokens would be left out"
        )
    tokens, words = read_wikitext(config.valid_data, tokenizer)
    pieces = windows(tokens, seq_length, stride)
    counts = {"windows": len(pieces), "overlapping_eval": stride}
    return Task(pieces, lambda scores: perplexities(scores, len(tokens), words), counts)


def _lambada(config: ZeroShotConfig, tokenizer: Tokenizer, seq_length: int) -> Task:
    pieces, truncated = [], 0
    for example in read_lambada(config.valid_data):
        piece, cut = piece_of(
            example, tokenizer, seq_length, strict=config.strict_lambada, truncate=config.truncate_context
        )
        pieces.append(piece)
        truncated += cut
    return Task(pieces, accuracies, {"truncated": truncated})
