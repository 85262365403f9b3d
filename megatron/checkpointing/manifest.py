"""The manifest: size and digest of every file of a checkpoint. Written last, read first.

The digest is CRC-32: it finds every flipped bit and every burst of up to 32 of them, and misses other damage once
in 4 billion. It guards against accidents, not against forgery. It reads several times faster than SHA-256, which
counts when 18 GB (a model of 1.5B parameters) stand between a restart and its first step.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import crc32_of, file_errors, write_durable

MANIFEST = "manifest.json"
FORMAT = 1
_LARGEST_MANIFEST = 64 << 20
_THREADS = 8


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    size: int
    """Bytes."""
    crc32: str
    """CRC-32 of the content, 8 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """What belongs to a checkpoint."""

    iteration: int
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        """The one way to write this manifest: any other bytes are damaged ones. Ends with its own digest."""
        body = {
            "format": FORMAT,
            "iteration": self.iteration,
            "files": {name: asdict(self.files[name]) for name in sorted(self.files)},
        }
        digest = f"{zlib.crc32(json.dumps(body).encode()):08x}"
        return (json.dumps({**body, "crc32": digest}, indent=1) + "\n").encode()


def describe(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and digest of the files `names` of `directory`, as they are now. Raises UserError."""
    digests = _digests(directory, list(names))
    with file_errors("read", directory):
        return {name: FileEntry(os.stat(directory / name).st_size, digest) for name, digest in digests.items()}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Bring `manifest` to the disk as `directory`'s manifest.json."""
    with file_errors("write", directory / MANIFEST):
        write_durable(directory / MANIFEST, manifest.to_bytes())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint `directory`. Raises UserError where it is missing, damaged or unsafe."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: not found, so {directory} is not a whole checkpoint; use another one")
    with file_errors("read", path), open(path, "rb") as stream:
        data = stream.read(_LARGEST_MANIFEST)
    try:
        parsed = json.loads(data)
        if isinstance(parsed, dict) and isinstance(parsed.get("format"), int) and parsed["format"] > FORMAT:
            raise UserError(f"{path}: expected format {FORMAT}, found {parsed['format']}; use a newer version")
        manifest = _from_json(parsed)
        whole = manifest.to_bytes() == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged manifest ({type(error).__name__}: {error})") from error
    if not whole:
        raise UserError(f"{path}: damaged manifest (its content does not match its digest)")
    for name in manifest.files:
        _require_plain(path, name)
    return manifest


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Raise UserError unless every file of the manifest is in `directory` with its size, and no other shard is."""
    for fault in size_faults(directory, manifest).values():
        raise UserError(fault)


def size_faults(directory: Path, manifest: Manifest) -> dict[str, str]:
    """File -> what is wrong with it, in words: missing, of another size, not in the manifest.

    Files are plain names in the directory; a link that leads out of it is refused.
    """
    root = directory.resolve()
    faults = {}
    for name, entry in manifest.files.items():
        path = directory / name
        if path.resolve().parent != root:
            faults[name] = f"{path}: leads outside the checkpoint, to {path.resolve()}; put the file itself there"
            continue
        try:
            found = os.stat(path)
        except FileNotFoundError:
            faults[name] = f"{path}: missing, expected a file of {entry.size:,} bytes"
        except OSError as error:
            faults[name] = f"{path}: cannot be read ({error.strerror})"
        else:
            if not stat.S_ISREG(found.st_mode):
                faults[name] = f"{path}: expected a regular file"
            elif found.st_size != entry.size:
                faults[name] = f"{path}: damaged, expected {entry.size:,} bytes, found {found.st_size:,}"
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in manifest.files:
            faults[path.name] = f"{path}: not in the checkpoint's manifest; take it away"
    return faults


def check_digests(directory: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise UserError unless the content of each of `files` is what was written. Reads all of them."""
    digests = _digests(directory, list(files))
    for name, entry in files.items():
        if digests[name] != entry.crc32:
            raise UserError(
                f"{directory / name}: damaged, expected crc32 {entry.crc32} over {entry.size:,} bytes, "
                f"found {digests[name]}"
            )


def drop_cached(directory: Path, names: Iterable[str]) -> None:
    """Let the system forget, where it can, what it holds of files on the disk: they are read from there next."""
    if not hasattr(os, "posix_fadvise"):
        return
    for name in names:
        with file_errors("read", directory / name), open(directory / name, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digests(directory: Path, names: list[str]) -> dict[str, str]:
    """Name -> CRC-32, in several threads (zlib lets go of the interpreter lock)."""
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: crc32_of(directory / name), names), strict=True))


def _from_json(parsed: Any) -> Manifest:
    files = {}
    for name, entry in parsed["files"].items():
        size, crc32 = entry["size"], entry["crc32"]
        if not isinstance(size, int) or not isinstance(crc32, str):
            raise TypeError(f"the entry of {name!r} is not a size and a digest")
        files[name] = FileEntry(size, crc32)
    if not isinstance(parsed["iteration"], int):
        raise TypeError("iteration is not a number")
    return Manifest(parsed["iteration"], files)


def _require_plain(path: Path, name: str) -> None:
    """Refuse a name that could point anywhere but at a file beside the manifest."""
    if name in ("", ".", "..", MANIFEST) or any(c in name for c in "/\\\0"):
        raise UserError(f"{path}: {name!r} is not a plain file name: it may not leave the checkpoint's directory")
