"""The numbers of metrics.jsonl as TensorBoard scalars, by steps and by tokens, laid out as the paper's figures are."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import file_errors

WRITE = "write the run's log"
"""What cannot be done, in a message."""
BY_TOKENS = "by_tokens"
"""Directory, below TensorBoard's, of the same scalars with tokens in place of iterations on the x-axis. Their tags end
in it: TensorBoard draws what has one tag into one chart, and steps would vanish beside tokens."""
FLUSH_SECONDS = 30.0
"""How long TensorBoard's files may lag behind."""

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Loss (Figures 1, 4, 5)": {
        "training loss": ("loss/training",),
        "validation loss": ("loss/validation",),
        "validation perplexity": ("loss/validation_perplexity",),
    },
    "Loss ratio (Table 1)": {"loss ratio": ("loss/ratio",), "at the same positions": ("loss/ratio_position_matched",)},
    "Adam's variance (Figures 4, 7)": {
        "norm": ("adam/variance_norm",),
        "largest element": ("adam/variance_max",),
        "norm of the momentum": ("adam/momentum_norm",),
    },
    "Schedules": {
        "sequence length": ("slw/seqlen",),
        "learning rate": ("learning-rate/learning-rate",),
        "sequences a step": ("slw/global_batch_size",),
    },
    "Gradient": {"norm": ("gradient/norm",), "clipped, skipped": ("gradient/clipped", "gradient/skipped")},
}
"""The page "Custom scalars": category -> chart -> tags. Each chart stands there by steps and by tokens."""


class TensorBoard:
    """Scalars by iteration, and by tokens in a directory below: one event a step, so a scalar costs little.

    Two directories because a resume hides what lies beyond one x-value of a directory, and tokens are not iterations.
    TensorBoard's own EventFileWriter is not used: its thread prints a traceback where the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        try:  # imported only when asked for: it costs most of a second
            from tensorboard.compat.proto import event_pb2, summary_pb2, types_pb2  # noqa: PLC0415
            from tensorboard.plugins.custom_scalar import layout_pb2, metadata  # noqa: PLC0415
            from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415
        except ImportError as error:
            raise UserError(
                "--tensorboard needs the tensorboard package, which is not installed: "
                "pip install tensorboard, or give --no-tensorboard"
            ) from error
        self._events, self._summaries = event_pb2, summary_pb2
        self._directory = directory
        self._flushed = -math.inf
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        with file_errors(WRITE, directory):
            (directory / BY_TOKENS).mkdir(parents=True, exist_ok=True)
            self._files = [(path / name).open("xb") for path in (directory, directory / BY_TOKENS)]
        self._writers = [RecordWriter(file) for file in self._files]
        self._write(*(event_pb2.Event(file_version="brain.Event:2") for _ in self._files))
        summary = summary_pb2.Summary()
        value = summary.value.add(tag=metadata.CONFIG_SUMMARY_TAG, metadata=metadata.create_summary_metadata())
        value.tensor.dtype = types_pb2.DT_STRING
        value.tensor.string_val.append(_layout(layout_pb2).SerializeToString())
        self._write(event_pb2.Event(step=0, summary=summary))  # one layout serves both

    def log(self, entry: Mapping[str, Any], scalars: Mapping[str, float | None]) -> None:
        """Write the scalars that are not None, at the entry's iteration and at its tokens."""
        known = [(tag, float(x)) for tag, x in scalars.items() if x is not None]
        self._write(
            self._event(int(entry.get("iteration") or 0), known),
            self._event(int(entry.get("consumed_tokens") or 0), [(f"{tag}_{BY_TOKENS}", x) for tag, x in known]),
        )

    def hide_beyond(self, iteration: int, tokens: int) -> None:
        """Tell TensorBoard to drop what an earlier process wrote beyond this point."""
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(*(self._events.Event(step=last + 1, session_log=start) for last in (iteration, tokens)))

    def close(self, *, failed: bool = False) -> None:
        """Write out what is held back. Raises UserError."""
        with file_errors(WRITE, self._directory), ExitStack() as files:
            for file in self._files:
                files.callback(file.close)

    def _event(self, step: int, scalars: list[tuple[str, float]]) -> Any:
        value = self._summaries.Summary.Value
        values = [value(tag=tag, simple_value=x) for tag, x in scalars]
        return self._events.Event(step=step, summary=self._summaries.Summary(value=values))

    def _write(self, *events: Any) -> None:
        """An event to the file by steps and one to that by tokens; every FLUSH_SECONDS others can see them.

        Raises UserError.
        """
        now = time.monotonic()
        with file_errors(WRITE, self._directory):
            for writer, event in zip(self._writers, events, strict=False):
                event.wall_time = time.time()
                writer.write(event.SerializeToString())
            if now - self._flushed >= FLUSH_SECONDS:
                self._flushed = now
                for writer in self._writers:
                    writer.flush()


def _layout(layout_pb2: Any) -> Any:
    """`CHARTS` as TensorBoard's page "Custom scalars" reads it; tags there are regular expressions."""
    layout = layout_pb2.Layout()
    for title, charts in CHARTS.items():
        category = layout.category.add(title=title)
        for name, tags in charts.items():
            for axis, ending in (("steps", ""), ("tokens", f"_{BY_TOKENS}")):
                chart = category.chart.add(title=f"{name} by {axis}")
                chart.multiline.tag.extend(f"^{re.escape(tag + ending)}$" for tag in tags)
    return layout
