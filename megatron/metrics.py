"""metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard and W&B.

A line is a step, or something else that its "event" names (validation, test). None (null) means not computed at that
step. JSON has no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf", which
`float()` reads back and every JSON parser accepts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron.errors import UserError
from megatron.files import file_errors
from megatron.tensorboard_sink import WRITE, TensorBoard

METRICS_FILE = "metrics.jsonl"
EXIT_FILE = "exit.json"
"""Beside it, how a run ended: {"status": "finished", "stopped" (and saved) or "diverged", "iteration", "reason"}.
Launchers read it; a run that died left none."""

TENSORBOARD_SECONDS = 0.02
"""Steps reach TensorBoard at most this often: a step costs 0.4 ms there (its checksums are pure Python), and it shows a
sample of 1000 points a curve anyway. metrics.jsonl has every step."""
WANDB_SECONDS = 0.1
"""The same for W&B, which takes a millisecond and sends every line over the network."""

STEP_TAGS = {
    "loss": "loss/training",
    "loss_ratio": "loss/ratio",
    "position_matched_loss_ratio": "loss/ratio_position_matched",
    "seqlen": "slw/seqlen",
    "global_batch_size": "slw/global_batch_size",
    "lr": "learning-rate/learning-rate",
    "grad_norm": "gradient/norm",
    "clipped": "gradient/clipped",
    "skipped": "gradient/skipped",
    "loss_scale": "gradient/loss_scale",
    "adam_variance_norm": "adam/variance_norm",
    "adam_variance_max": "adam/variance_max",
    "adam_momentum_norm": "adam/momentum_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "seconds": "speed/seconds",
    "consumed_samples": "slw/consumed_samples",
}
"""Field of a step -> its name in TensorBoard and W&B, grouped as the paper's figures are."""


class Sink(Protocol):
    """A place for scalars beside metrics.jsonl."""

    def log(self, entry: Mapping[str, Any], scalars: Mapping[str, float | None]) -> None:
        """Write the scalars that are not None, at the entry's `iteration` and `consumed_tokens`."""

    def hide_beyond(self, iteration: int, tokens: int) -> None:
        """Hear that the run goes on from here, and that what was written beyond is void."""

    def close(self, *, failed: bool = False) -> None:
        """Write out what is held back; `failed`: an exception ends the run."""


@dataclass
class _Paced:
    """A sink, and when it may take the next step."""

    sink: Sink
    seconds: float
    last: float = -math.inf


class MetricsLogger:
    """Appends to a run's metrics.jsonl, and to its TensorBoard events and its W&B run where it has them.

    A line is one write to a file opened for appending: kill -9 leaves at most a partial last line, which readers pass
    over and `truncate_to` removes. On ranks other than 0 give `directory=None, tensorboard=False`: it then does
    nothing.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        tensorboard: bool = False,
        tensorboard_dir: Path | str | None = None,
        wandb: Sink | None = None,
    ) -> None:
        """Open `directory`/metrics.jsonl for appending (made where missing; None: no file).

        TensorBoard events go to `tensorboard_dir`, by default `directory`/tensorboard; `wandb` is what
        `wandb_sink.open_wandb` returns. Raises UserError if the directory cannot be written or TensorBoard is asked for
        and not installed.
        """
        self._path = None if directory is None else Path(directory) / METRICS_FILE
        self._file: int | None = None
        self._open()
        if tensorboard_dir is None and directory is not None:
            tensorboard_dir = Path(directory) / "tensorboard"
        self._sinks = [] if wandb is None else [_Paced(wandb, WANDB_SECONDS)]
        if tensorboard and tensorboard_dir is not None:
            self._sinks.append(_Paced(TensorBoard(Path(tensorboard_dir)), TENSORBOARD_SECONDS))

    def log_step(self, step: Mapping[str, Any]) -> None:
        """Write one optimizer step; needs at least `iteration`, and `consumed_tokens` for TensorBoard and W&B."""
        self._write(step)
        now = time.monotonic()
        due = [paced for paced in self._sinks if now - paced.last >= paced.seconds]
        if due:
            scalars = {tag: step.get(name) for name, tag in STEP_TAGS.items()}
            scalars |= _by_position("loss_by_position/training", step)
            for paced in due:
                paced.last = now
                paced.sink.log(step, scalars)

    def log_validation(self, entry: Mapping[str, Any], *, event: str = "validation") -> None:
        """Write one evaluation (`loss`, `perplexity`, `loss_by_position`, ...); `event` may also be test."""
        self._write({"event": event, **entry})
        scalars = {f"loss/{event}": entry.get("loss"), f"loss/{event}_perplexity": entry.get("perplexity")}
        scalars |= _by_position(f"loss_by_position/{event}", entry)
        for paced in self._sinks:
            paced.sink.log(entry, scalars)

    def log_event(self, entry: Mapping[str, Any], *, event: str) -> None:
        """Write something that happened (spike, rollback) to metrics.jsonl."""
        self._write({"event": event, **entry})

    def events_at(self, iteration: int) -> set[str]:
        """The events (validation, test) that the log holds for `iteration`."""
        if self._path is None:
            return set()
        return {e["event"] for _, e in read_lines(self._path) if e["iteration"] == iteration and "event" in e}

    def truncate_to(self, iteration: int, *, consumed_tokens: int = 0) -> None:
        """Cut the log back to entries of at most `iteration`, where a run resumes, so that a step stands in it once.

        The log is rewritten beside itself and renamed into place: a crash leaves the old or the new one. -1 empties
        it. TensorBoard, whose files are only appended to, is told to hide what lies beyond (by tokens, beyond
        `consumed_tokens` or the last entry kept).
        """
        tokens = consumed_tokens
        if self._path is not None:
            self.close_file()
            temporary = self._path.with_name(f"{METRICS_FILE}.tmp-{os.getpid()}")
            try:
                with file_errors(WRITE, self._path):
                    with temporary.open("w", encoding="utf-8") as file:
                        for line, entry in read_lines(self._path):
                            if entry["iteration"] <= iteration:
                                file.write(line + "\n")
                                tokens = max(tokens, int(entry.get("consumed_tokens") or 0))
                        file.flush()
                        os.fsync(file.fileno())
                    temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
            self._open()
        for paced in self._sinks:
            paced.sink.hide_beyond(iteration, tokens)

    def close_file(self) -> None:
        """Close metrics.jsonl."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self, *, failed: bool = False) -> None:
        """Close the file and write out what TensorBoard and W&B have not yet; `failed`: an exception ends the run."""
        self.close_file()
        sinks, self._sinks = self._sinks, []
        with ExitStack() as closing:
            for paced in sinks:
                closing.callback(paced.sink.close, failed=failed)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close(failed=error is not None)
        except UserError:
            if error is None:  # what ended the run comes first
                raise

    def _open(self) -> None:
        if self._path is None:
            return
        with file_errors(WRITE, self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is None or self._path is None:
            return
        try:
            text = json.dumps(entry, allow_nan=False, default=_plain)
        except ValueError:  # NaN or infinity somewhere: rare, so only then look for it
            text = json.dumps(json_safe(entry), allow_nan=False, default=_plain)
        data = (text + "\n").encode()
        with file_errors(WRITE, self._path):
            while data:
                data = data[os.write(self._file, data) :]


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry of a metrics.jsonl as (its line, its object), also while the run still writes it.

    A last line without its newline is one that a kill cut off, or that is being written: it is passed over. Raises
    UserError, naming file and line, for any other line that is not an object with an "iteration".
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read the run's log: {error.strerror}") from error
    with file:
        for number, data in enumerate(file, start=1):
            if not data.endswith(b"\n"):
                return
            yield parse_line(data, f"{path}:{number}")


def parse_line(data: bytes, where: str) -> tuple[str, dict[str, Any]]:
    """A whole line of a metrics.jsonl as (its text, its object); `where`, file and line, begins the UserError."""
    try:
        line = data.decode().rstrip("\r\n")
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object ({error}); remove the line to go on") from error
    if not isinstance(entry, dict) or type(entry.get("iteration")) is not int:
        raise UserError(f"{where}: expected an object with an integer iteration, found {line[:60]!r}")
    if not isinstance(entry.get("event", ""), str):
        raise UserError(f"{where}: expected the name of an event, found {line[:60]!r}")
    return line, entry


def json_safe(value: Any) -> Any:
    """`value` with every float that JSON cannot hold replaced by "nan", "inf" or "-inf", at any depth."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """The Python number in a NumPy or torch scalar."""
    return value.item()


def _by_position(prefix: str, entry: Mapping[str, Any]) -> dict[str, float]:
    return {f"{prefix}/{name}": loss for name, loss in (entry.get("loss_by_position") or {}).items()}
