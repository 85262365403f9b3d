"""Saves one after the other: at once, or in the background while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from megatron.checkpointing.checkpoint import CONFIG, STATE, to_text, write_checkpoint
from megatron.checkpointing.tensors import Piece, own_pieces
from megatron.distributed.world import World
from megatron.errors import UserError


class Saver:
    """Saves checkpoints into `directory`; every rank of `world` has one, and calls its methods at the same steps.

    In the background a save is a copy to the host, made before `save` returns, and a thread that writes and commits it:
    the host's memory holds this rank's share of one checkpoint more. The thread meets those of other ranks over
    `world.background`, so that its collectives never mix with training's. `report` gets a line, on rank 0, for each
    checkpoint that stands on the disk; in the background it is called from the thread.
    """

    def __init__(self, directory: Path, world: World, *, background: bool, report: Callable[[str], None]) -> None:
        if background and world.size > 1 and world.background is None:
            raise ValueError("saving in the background needs a group of its own")
        self._directory = directory
        self._world = world
        self._report = report
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save") if background else None
        self._under_way: Future[None] | None = None

    def save(
        self, *, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], config_text: str
    ) -> None:
        """Save as `save_checkpoint` does. `tensors` may change when this returns.

        Waits first for the save before. Raises what either has failed with: UserError, or TypeError or ValueError
        for a `state` that JSON cannot hold.
        """
        self.wait()
        texts = {STATE: to_text(state), CONFIG: config_text}
        pieces = own_pieces(tensors, self._world)
        if self._thread is None:
            self._write(iteration, pieces, texts)
        else:
            copies = [replace(piece, values=piece.values.to("cpu", copy=True)) for piece in pieces]
            self._under_way = self._thread.submit(self._write, iteration, copies, texts)

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
        except RuntimeError as error:  # gloo's, for a rank that is gone
            raise UserError(
                f"cannot save step {iteration:,} to {self._directory}: another rank is gone ({error}); "
                "what was saved before is whole, go on from it with --load"
            ) from error
        if world.is_main:
            self._report(f"saved {path}")
