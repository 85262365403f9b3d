"""Ranks that save with --keep-last, meet a damaged checkpoint and fall back.

`python retention_ranks.py retention DIRECTORY RANK RANKS`: each rank prints one JSON object, as checkpoint_ranks.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from checkpoint_ranks import PARTS, Training, fault, main, replaced

from megatron.checkpointing import checkpoint as checkpoints
from megatron.checkpointing.checkpoint import find_whole
from megatron.checkpointing.saver import Saver
from megatron.distributed.world import World


def retention(directory: Path, worlds: dict[str, World]) -> dict[str, Any]:
    """Five saves in the background and five in the foreground, the fourth watched; a sixth that is spoilt."""
    world = worlds["dp2"]
    training = Training(world, seed=1)
    training.steps(1)
    seen: dict[str, Any] = {}

    def save(saver: Saver, iteration: int) -> None:
        saver.save(iteration=iteration, tensors=training.table(), state={}, config_text="")
        saver.wait()

    def saver(name: str, reports: list[str]) -> Saver:
        return Saver(
            directory / name, world, background=name == "background", report=reports.append, keep_last=2, keep_every=3
        )

    def left(name: str) -> list[str]:
        dist.barrier()
        names = sorted(path.name for path in (directory / name).glob("iter_*"))
        dist.barrier()
        return names

    for name in ("background", "foreground"):
        reports: list[str] = []
        with saver(name, reports) as keeper:
            for iteration in range(1, 6):
                read: list[str] = []
                with replaced(checkpoints, "drop_cached", lambda path, files, read=read: read.extend(files)):
                    save(keeper, iteration)
                if iteration == 4:
                    shares = read
        seen[name] = {"reports": reports, "left": left(name), "read back": shares}

    def spoil(path: Path, files: Any) -> None:
        """Change a shard between its commit and the reading back: in place, since rank 0 may be looking at its size."""
        if world.rank == 1:
            with (path / next(file for file in files if file.startswith("shard-"))).open("r+b") as shard:
                shard.seek(-1, os.SEEK_END)
                (last,) = shard.read(1)
                shard.seek(-1, os.SEEK_END)
                shard.write(bytes([last ^ 1]))

    with replaced(checkpoints, "drop_cached", spoil):
        seen["spoilt"] = fault(lambda: save(saver("foreground", []), 6))
    seen["left with a spoilt one"] = left("foreground")

    behind: list[str] = []
    seen["refused"] = fault(lambda: find_whole(directory / "foreground", fallback=False, world=world))
    found = find_whole(directory / "foreground", fallback=True, world=world, report=behind.append)
    return seen | {"left behind": behind, "fallen back": found and found.iteration}


PARTS["retention"] = retention

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
