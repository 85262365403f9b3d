"""Ranks that save and load a model spread over them in many ways, and meet faults.

`python checkpoint_ranks.py PART DIRECTORY RANK RANKS`: each rank prints one JSON object, case -> what it saw.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_training import newest_whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron.checkpointing import checkpoint as checkpoints
from megatron.checkpointing import tensors as shards
from megatron.checkpointing.checkpoint import load_checkpoint, save_checkpoint
from megatron.checkpointing.manifest import read_manifest
from megatron.checkpointing.saver import Saver
from megatron.checkpointing.state import collect, restore
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.layout import Layout

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "columns": ((8, 6), 0),
    "odd_columns": ((14, 3), 0),
    "rows": ((5, 8), 1),
    "uneven": ((7, 3), None),
    "short": ((3,), None),
    "single": ((1,), None),
}
"""Name -> whole shape, and the dimension that tensor parallel ranks share."""
LAYOUTS = {
    1: {"alone": Layout()},
    2: {"dp2": Layout(shard=2), "tp2": Layout(tp=2)},
    4: {
        "dp4": Layout(shard=4),
        "copies4": Layout(replicate=4),
        "hybrid": Layout(replicate=2, shard=2),
        "dp2-tp2": Layout(shard=2, tp=2),
        "copies2-tp2": Layout(replicate=2, tp=2),
    },
}
"""Number of ranks -> ways to lay them out."""
ALL = [name for layouts in LAYOUTS.values() for name in layouts]


class Odd(nn.Module):
    """Parameters of awkward shapes, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (shape, _) in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.seen: Tensor
        self.register_buffer("seen", torch.tensor(seed))


class Training:
    """`Odd` and its AdamW in a layout."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.model = Odd(seed)
        layout = world.layout
        if world.size > 1:
            mesh = init_device_mesh(
                "cpu", (layout.replicate, layout.shard, layout.tp), mesh_dim_names=("replicate", "shard", "tp")
            )
            if layout.tp > 1:
                for name, (_, dim) in SHAPES.items():
                    placement = Replicate() if dim is None else Shard(dim)
                    whole = getattr(self.model, name).detach()
                    setattr(self.model, name, nn.Parameter(distribute_tensor(whole, mesh["tp"], [placement])))
            fully_shard(self.model, mesh=mesh["shard"] if layout.replicate == 1 else mesh["replicate", "shard"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def steps(self, count: int) -> None:
        for _ in range(count):
            for parameter in self.model.parameters():
                parameter.grad = parameter.detach().clone() * 0.3
            self.optimizer.step()

    def table(self) -> dict[str, Tensor]:
        return collect(self.model, self.optimizer)

    def whole(self) -> dict[str, Tensor]:
        """Every tensor, whole, on every rank."""
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
            for name, tensor in self.table().items()
        }

    def save(self, directory: Path, iteration: int = 2) -> Path:
        return save_checkpoint(
            directory,
            iteration=iteration,
            tensors=self.table(),
            state={"iteration": iteration},
            config_text="seed: 1\n",
            world=self.world,
        )


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].numpy().tobytes() == right[name].numpy().tobytes()
        for name in left
    )


def save_all(directory: Path, worlds: dict[str, World]) -> None:
    """A checkpoint of two steps in each layout, and beside it what it is to hold."""
    for name, world in worlds.items():
        training = Training(world, seed=ALL.index(name))
        training.steps(2)
        training.save(directory / name)
        whole = training.whole()
        if world.is_main:
            save_file(whole, directory / f"{name}.expected")


def load_all(directory: Path, worlds: dict[str, World]) -> dict[str, bool]:
    """Load each checkpoint into each layout; whether each tensor has the bits that were saved, on this rank."""
    seen = {}
    for saved in ALL:
        expected = load_file(directory / f"{saved}.expected")
        for name, world in worlds.items():
            training = Training(world, seed=99)
            path = directory / saved / "iter_0000002"
            assert load_checkpoint(path, world=world).state == {"iteration": 2}
            restore(training.model, training.optimizer, path, world=world)
            seen[f"{saved} to {name}"] = same(training.whole(), expected)
    return seen


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """`module.name` is `value` for a while."""
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


def fault(action: Callable[[], object]) -> list[str]:
    """The kind and the text of the UserError that `action` ends with."""
    try:
        action()
    except UserError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def full_disk(*args: object, **named: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def faults(directory: Path, worlds: dict[str, World]) -> dict[str, Any]:
    """One case after the other, on one training of four ranks; every case leaves the checkpoint of step 1 whole."""
    world = worlds["dp2-tp2"]
    training = Training(world, seed=7)
    training.steps(1)
    first = training.save(directory, 1)
    expected = training.whole()
    seen: dict[str, Any] = {}

    def intact() -> bool:
        dist.barrier()
        other = Training(world, seed=3)
        restore(other.model, other.optimizer, first, world=world)
        clean = not any(".tmp-" in path.name for path in directory.iterdir())
        return clean and newest_whole(directory) == first and same(other.whole(), expected)

    with replaced(shards, "save_file", full_disk if world.rank == 2 else shards.save_file):
        seen["write"] = [*fault(lambda: training.save(directory, 2)), intact()]
    with replaced(checkpoints, "publish", full_disk_named):
        seen["commit"] = [*fault(lambda: training.save(directory, 2)), intact()]

    for path in (first / name for name in read_manifest(first).files):
        for _ in range(2):  # damage it, then mend it
            dist.barrier()
            if world.is_main:
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)
            dist.barrier()
            seen.setdefault(f"damaged {path.name}", fault(lambda: load_checkpoint(first, world=world)))
    seen["mended"] = [*fault(lambda: load_checkpoint(first, world=world)), intact()]

    other = Training(world, seed=3)
    if world.rank == 3:
        other.model.register_buffer("seen", torch.zeros(2))
    before = other.whole()
    seen["unfit"] = [*fault(lambda: restore(other.model, other.optimizer, first, world=world)), True]
    seen["unfit"][2] = same(other.whole(), before)

    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    try:
        shards.own_pieces({"x": distribute_tensor(torch.ones(4), half, [Shard(0)])}, world)
    except ValueError as error:
        seen["half a mesh"] = str(error)

    seen |= background(directory / "background", world)
    return seen


def full_disk_named(*args: object) -> None:
    raise UserError("cannot write: disk full")


def background(directory: Path, world: World) -> dict[str, Any]:
    """Saves in the background."""
    seen: dict[str, Any] = {}
    reports: list[str] = []
    training = Training(world, seed=11)
    training.steps(1)
    expected = training.whole()
    changed = threading.Event()
    real = checkpoints.write_pieces

    def write_later(*args: Any) -> list[str]:
        assert changed.wait(60)
        return real(*args)

    def save(saver: Saver, iteration: int) -> None:
        saver.save(iteration=iteration, tensors=training.table(), state={}, config_text="")

    with Saver(directory, world, background=True, report=reports.append) as saver:
        with replaced(checkpoints, "write_pieces", write_later):
            save(saver, 1)
            training.steps(1)
            for tensor in training.table().values():
                tensor.zero_()
            for _ in range(20):
                dist.all_reduce(torch.ones(3))
            seen["not before it is written"] = [list(reports), newest_whole(directory) is None]
            changed.set()
            saver.wait()
        seen["reports"] = list(reports)
        other = Training(world, seed=3)
        restore(other.model, other.optimizer, directory / "iter_0000001", world=world)
        seen["as it was when save returned"] = same(other.whole(), expected)

        with replaced(shards, "save_file", full_disk if world.rank == 1 else shards.save_file):
            save(saver, 2)
            saver._under_way.exception()
        seen["failed in the thread"] = fault(lambda: save(saver, 3))
        dist.barrier()
        seen["left"] = sorted(path.name for path in directory.iterdir())
        dist.barrier()
        save(saver, 3)

    other.steps(2)
    try:
        with Saver(directory, world, background=True, report=reports.append) as saver:
            saver.save(iteration=4, tensors=other.table(), state={}, config_text="")
            raise KeyError("training")
    except KeyError:
        seen["saved although training failed"] = reports[-1:]
    dist.barrier()
    again = Training(world, seed=3)
    restore(again.model, again.optimizer, directory / "iter_0000004", world=world)
    seen["whole although training failed"] = same(again.whole(), other.whole())
    return seen


def killed(directory: Path, worlds: dict[str, World]) -> dict[str, Any]:
    """The last rank dies in the middle of a background save of step 2."""
    world = next(iter(worlds.values()))
    training = Training(world, seed=1)
    training.save(directory, 1)

    def die(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == world.size - 1:
        shards.save_file = die
    saver = Saver(directory, world, background=True, report=lambda line: None)
    saver.save(iteration=2, tensors=training.table(), state={}, config_text="")
    return {"close": fault(saver.close)}


PARTS: dict[str, Callable[[Path, dict[str, World]], dict[str, Any] | None]] = {
    "save": save_all,
    "load": load_all,
    "faults": faults,
    "killed": killed,
}


def main(parts: str, directory: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    control = second = None
    if ranks > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/ranks-{parts}-{ranks}",
            rank=rank,
            world_size=ranks,
            timeout=timeout,
        )
        control, second = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout)
    worlds = {name: World(rank, layout, control=control, background=second) for name, layout in LAYOUTS[ranks].items()}
    seen: dict[str, Any] = {}
    for part in parts.split("+"):
        seen |= PARTS[part](directory, worlds) or {}
    print(json.dumps(seen))
    if ranks > 1:
        if parts != "killed":
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # as megatron.errors.run: a thread of gloo may abort an orderly exit


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
