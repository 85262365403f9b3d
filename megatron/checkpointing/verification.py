"""All that can be checked of a checkpoint on the disk without the model that it is of."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from megatron.arguments import read_recipe
from megatron.checkpointing.checkpoint import CONFIG, STATE
from megatron.checkpointing.commit import named_manifest
from megatron.checkpointing.manifest import MANIFEST, check_digests, size_faults
from megatron.checkpointing.tensors import SHARDING_NOTE, SUFFIX, storage_errors
from megatron.errors import UserError
from megatron.files import file_errors

WEIGHTS = "model."


@dataclass(frozen=True)
class Verdict:
    """What was found of one checkpoint."""

    path: str
    faults: list[str]
    """One line each, which names the file; none: the checkpoint is whole."""
    iteration: int | None = None
    tensors: int | None = None
    """Whole ones, over all shards. Like what follows, None where there are faults."""
    bytes: int | None = None
    """Of all files of the manifest."""
    largest_weight: float | None = None
    """Largest absolute value of a floating point tensor of the model."""

    def lines(self) -> list[str]:
        """The verdict as text: one line, or one for each fault."""
        if self.faults:
            return self.faults
        weight = "none" if self.largest_weight is None else f"{self.largest_weight:.4g}"
        return [
            f"{self.path}: ok, iteration {self.iteration:,}, {self.tensors:,} tensors, {self.bytes:,} bytes, "
            f"largest weight {weight}"
        ]


def verify_checkpoint(path: Path) -> Verdict:
    """Check manifest, sizes, digests, what each file holds, and that no tensor has a gap or a value that is not finite.

    Reads every file twice, and maps one shard at a time into memory. Needs no process group.
    """
    try:
        manifest = named_manifest(path)
    except UserError as error:
        return Verdict(str(path), [str(error)])
    unsound = size_faults(path, manifest)
    faults = list(unsound.values())
    faults += [
        f"{path / MANIFEST}: expected a {name}, found none" for name in (STATE, CONFIG) if name not in manifest.files
    ]
    contents = Contents()
    for name, entry in manifest.files.items():
        if name in unsound:
            continue
        try:
            check_digests(path, {name: entry})
            if name == STATE:
                _read_state(path / name)
            elif name == CONFIG:
                read_recipe(path / name)
            elif name.endswith(SUFFIX):
                contents.scan(path / name)
        except UserError as error:
            faults.append(str(error))
    faults += contents.faults
    if not faults:  # a shard that could not be read leaves gaps
        faults = contents.gaps(path)
    if faults:
        return Verdict(str(path), faults, manifest.iteration)
    size = sum(entry.size for entry in manifest.files.values())
    return Verdict(str(path), [], manifest.iteration, len(contents.boxes), size, contents.largest_weight)


@dataclass(frozen=True)
class Box:
    """Where a piece lies in its whole tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Contents:
    """What the shards of a checkpoint hold, read one after the other."""

    def __init__(self) -> None:
        self.boxes: dict[str, list[Box]] = {}
        self.largest_weight: float | None = None
        self.faults: list[str] = []
        """Values that are not finite."""

    def scan(self, shard: Path) -> None:
        """Read each piece in the file `shard`. Raises UserError where that is no shard."""
        with storage_errors("read", shard), safe_open(shard, framework="pt") as file:
            note = json.loads((file.metadata() or {})[SHARDING_NOTE])
            for name in sorted(file.keys()):
                piece = file.get_tensor(name)
                offsets = tuple(int(offset) for offset in note[name]["saved_offsets"])
                if len(offsets) != piece.dim() or min(offsets, default=0) < 0:
                    raise ValueError(f"{name} cannot lie at {offsets}")
                self.boxes.setdefault(name, []).append(Box(offsets, tuple(piece.shape), piece.dtype))
                if piece.is_floating_point() and piece.numel():
                    self._values(shard, name, piece)

    def _values(self, shard: Path, name: str, piece: Tensor) -> None:
        low, high = (float(value) for value in piece.aminmax())  # NaN where there is one, and no copy
        if not np.isfinite([low, high]).all():
            nan = int(piece.isnan().sum())
            self.faults.append(f"{shard}: {name} holds {nan:,} NaN and {int(piece.isinf().sum()):,} infinite values")
        elif name.startswith(WEIGHTS):
            self.largest_weight = max(self.largest_weight or 0.0, -low, high)

    def gaps(self, path: Path) -> list[str]:
        """A line for each tensor that its pieces do not make up, each value once."""
        faults = []
        for name, boxes in self.boxes.items():
            if len({(box.dtype, len(box.shape)) for box in boxes}) > 1 or not covers(boxes):
                faults.append(f"{path}: the {len(boxes)} pieces of {name} in its shards do not make up a whole tensor")
        return faults


def covers(boxes: Sequence[Box]) -> bool:
    """Whether every value of the smallest tensor that holds `boxes`, of equal dimensions, is in exactly one of them."""
    dimensions = range(len(boxes[0].shape))
    edges = [sorted({0} | {e for b in boxes for e in (b.offsets[d], b.offsets[d] + b.shape[d])}) for d in dimensions]
    cells = np.zeros([len(e) - 1 for e in edges], dtype=np.int64)
    for box in boxes:
        spans = zip(edges, box.offsets, box.shape, strict=True)
        cells[tuple(slice(bisect_left(e, start), bisect_left(e, start + n)) for e, start, n in spans)] += 1
    return bool((cells == 1).all())


def _read_state(path: Path) -> None:
    try:
        with file_errors("read", path):
            state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected an object, found a {type(state).__name__}")
