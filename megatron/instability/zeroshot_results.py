"""Zero-shot results as files and in words. No torch."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron.checkpointing.commit import CHECKPOINTS
from megatron.errors import UserError
from megatron.files import file_errors, make_parent, write_atomic

WIKITEXT, LAMBADA = "WIKITEXT103", "LAMBADA"
STRICT_LAMBADA = "LAMBADA-strict"
"""What a run's results call LAMBADA of whole words; it is another number than LAMBADA's."""
STRIDE = 32
"""The paper's, and the default of --overlapping-eval."""
RESULTS_FILE = "zeroshot.json"
"""In a run's directory: {task: result}, of each task the last evaluation."""
PAPER_LENGTH = 1024
TEST_WORDS, VALIDATION_WORDS = 245_566, 217_642
"""Of WikiText-103's wiki.test.tokens (Shoeybi et al. 2019, appendix E) and wiki.valid.tokens, as `original_tokens`."""
LAMBADA_EXAMPLES = 5153
"""Of OpenAI's lambada_test.jsonl."""
_CHECKPOINT = re.compile(r"iter_(\d+)")


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The results in a zeroshot.json; none where there is no such file. Raises UserError where it is not one."""
    with file_errors("read", path):
        if not path.exists():
            return {}
        content = path.read_bytes()
    try:
        results = json.loads(content)
    except (ValueError, RecursionError):
        results = None
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise UserError(f"{path}: expected an object with a result a task, found {content[:60]!r}; delete the file")
    return results


def write_result(result: dict[str, Any], *, load: Path, output: Path | None) -> list[Path]:
    """Write a result to the file `output`, and into the zeroshot.json of `load` where that is a run; what was written.

    There it takes the place of the one that its task had; evaluations that end together keep both results. Raises
    UserError.
    """
    written = []
    if output is not None:
        make_parent(output)
        write_atomic(output, _text(result))
        written.append(output)
    if (kept := kept_results(load)) is not None:
        with _locked(load):
            write_atomic(kept, _text(read_results(kept) | {result["task"]: result}))
        written.append(kept)
    return written


def kept_results(load: Path) -> Path | None:
    """The zeroshot.json of the run that `load` is, whether there is one yet or not; None where it is no run."""
    return load / RESULTS_FILE if (load / CHECKPOINTS).is_dir() else None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock; where it cannot, as on some network's, without."""
    with file_errors("read", directory):
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def describe(result: dict[str, Any]) -> str:
    """A result in a line; of lm-eval a line a task, with its metrics."""
    if "results" in result:
        lines = [f"{task}: {_metrics(metrics)}" for task, metrics in result["results"].items()]
        average = "" if result["average"] is None else f"\naverage: {result['average']:.2%}"
        return "\n".join(lines) + average
    if result["task"] == WIKITEXT:
        return (
            f"{WIKITEXT}: adjusted perplexity {float(result['adjusted_perplexity']):,.4f} "
            f"(per token {float(result['perplexity']):,.4f}; {result['tokens']:,} tokens for "
            f"{result['original_tokens']:,} words, stride {result['overlapping_eval']}, length {result['seq_length']})"
        )
    cut = f", {result['truncated']:,} of them cut to the context" if result["truncated"] else ""
    return (
        f"{result['task']}: accuracy {result['accuracy']:.2%} ({result['correct']:,} of {result['examples']:,} "
        f"examples{cut}; perplexity {float(result['perplexity']):,.4f}, length {result['seq_length']})"
    )


def differences(task: str, result: Mapping[str, Any], steps: int | None = None) -> str:
    """In what a result was measured otherwise than the paper's; "" where in nothing.

    The paper's are of WikiText-103's test text in windows that move on by STRIDE tokens, and of all of LAMBADA, 1,024
    tokens at a time, after a run's last step; ours are in fp32 unless asked for otherwise.

    Args:
        task: WIKITEXT or one of the LAMBADAs.
        steps: of the whole run, where they are known.
    """
    needed = ("original_tokens", "overlapping_eval") if task == WIKITEXT else ("examples", "truncated")
    missing = [name for name in ("seq_length", *needed) if not isinstance(result.get(name), int)]
    if not isinstance(result.get("dtype"), str):
        missing.append("dtype")
    if missing:
        return f"{', '.join(missing)} not recorded: evaluate it again"
    length, dtype, cut = result["seq_length"], result.get("dtype"), result.get("truncated")
    at = _CHECKPOINT.fullmatch(Path(str(result.get("model"))).name)
    differ = [
        _wikitext_part(result["original_tokens"]) if task == WIKITEXT else _lambada_part(result["examples"]),
        "" if length == PAPER_LENGTH else f"context {length:,}",
        "" if task != WIKITEXT or result["overlapping_eval"] == STRIDE else f"stride {result['overlapping_eval']:,}",
        f"{cut:,} cut to the context" if cut else "",
        "" if dtype == "float32" else f"in {dtype}",
        "" if at is None or steps is None or int(at[1]) == steps else f"at step {int(at[1]):,} of {steps:,}",
    ]
    return ", ".join(filter(None, differ))


def _wikitext_part(words: int) -> str:
    for whole, name in ((TEST_WORDS, ""), (VALIDATION_WORDS, "on the validation text")):
        if abs(words - whole) < 10:  # copies differ in white space at their ends
            return name
    return f"on {words:,} words, not the test text's {TEST_WORDS:,}"


def _lambada_part(examples: int) -> str:
    return "" if examples == LAMBADA_EXAMPLES else f"on {examples:,} of {LAMBADA_EXAMPLES:,} examples"


def _metrics(metrics: dict[str, Any]) -> str:
    """The numbers among lm-eval's "metric,filter": value."""
    numbers = {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
    return ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
