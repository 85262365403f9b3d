"""Saves one after the other: at once, or in the background while training goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from megatron.checkpointing.checkpoint import CONFIG, STATE, read_back, to_text, write_checkpoint
from megatron.checkpointing.commit import retain
from megatron.checkpointing.tensors import Piece, own_pieces
from megatron.distributed.world import World
from megatron.errors import UserError

_GLOO_SOURCE = re.compile(r"^\[\S+\] ")
"""File and line in gloo, with which its messages begin; advice on reporting bugs follows their first sentence."""


class Saver:
    """Saves checkpoints into `directory`; every rank of `world` has one, and calls its methods at the same steps.

    In the background a save is a copy to the host, made before `save` returns, and a thread that writes and commits it:
    the host's memory holds this rank's share of one checkpoint more. The thread meets those of other ranks over
    `world.background`, so that its collectives never mix with training's. `report` gets a line, on rank 0, for each
    checkpoint that stands on the disk; in the background it is called from the thread.

    With `keep_last` a save also reads the new checkpoint back from the disk, each rank its share, and when it is what
    was written rank 0 deletes old ones as `retain` says.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        background: bool,
        report: Callable[[str], None],
        keep_last: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        if background and world.size > 1 and world.background is None:
            raise ValueError("saving in the background needs a group of its own")
        self._directory = directory
        self._world = world
        self._report = report
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save") if background else None
        self._under_way: Future[None] | None = None

    def save(
        self, *, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], config_text: str
    ) -> None:
        """Save as `save_checkpoint` does. `tensors` may change when this returns.

        Waits first for the save before. Raises what either has failed with: UserError, also for a checkpoint that does
        not read back as it was written, or TypeError or ValueError for a `state` that JSON cannot hold.
        """
        self.wait()
        texts = {STATE: to_text(state), CONFIG: config_text}
        pieces = own_pieces(tensors, self._world)
        if self._thread is None:
            self._write(iteration, pieces, texts)
        else:
            copies = [replace(piece, values=piece.values.to("cpu", copy=True)) for piece in pieces]
            self._under_way = self._thread.submit(self._write, iteration, copies, texts)

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed already: `wait` would raise."""
        save = self._under_way
        return save is not None and save.done() and save.exception() is not None

    def wait(self) -> None:
        """Return when no save is under way. Raises UserError where the last one failed."""
        if self._under_way is not None:
            self._under_way.exception()  # interrupted here, the save is still under way
            finished, self._under_way = self._under_way, None
            finished.result()

    def close(self) -> None:
        """Let the save that is under way finish. Raises UserError where it failed."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as fault:
            if error is None:
                raise
            self._report(str(fault))  # what ended the training comes first

    def _write(self, iteration: int, pieces: list[Piece], texts: Mapping[str, str]) -> None:
        world = self._world
        group = world.control if self._thread is None else world.background
        try:
            path = write_checkpoint(self._directory, iteration, pieces, texts, world, group)
            if world.is_main:
                self._report(f"saved {path}")
            if (keep_last := self._keep_last) is not None:
                read_back(path, world, group)
                keep_every = self._keep_every
                world.on_main(
                    lambda: retain(
                        self._directory, iteration, keep_last=keep_last, keep_every=keep_every, report=self._report
                    ),
                    group,
                )
        except RuntimeError as error:  # gloo's, for a rank that is gone
            why = _GLOO_SOURCE.sub("", str(error)).partition("\n")[0].partition(". ")[0]
            raise UserError(
                f"cannot save step {iteration:,} to {self._directory}: another rank is gone ({why}); "
                "what was saved before is whole"
            ) from error
