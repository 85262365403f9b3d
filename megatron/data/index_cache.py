"""Sample indices kept in files, so that a corpus of billions of documents is sorted once, not at every start.

A file's name is the digest of everything that its content follows from, the range of documents included, so a
changed corpus, split, length or seed never finds a stale one. A file comes to its name by a rename after its
content is on the disk; one that is damaged all the same is found by its size and shape, and built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.sample_index import IndexArray, SampleIndex, count_samples, order_version
from megatron.errors import UserError
from megatron.files import explain

FORMAT_VERSION = 2
CACHE_FROM = 2**20
"""Documents + samples from which an index is cached unasked. Below, building takes under 0.2 s, as reading does."""
LOCK_SECONDS = 600.0
"""How long a process waits, unless told otherwise, for another one that builds an index in the same directory."""
NOTICE_SECONDS = 5.0
"""After how long it says so."""
POLL_SECONDS = 0.1
_TEMPORARY = f".index-{socket.gethostname()}-"
"""With the host's name: on some shared disks a lock holds on one machine only."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexKey:
    """Everything that an epoch's index follows from."""

    fingerprint: str
    """`IndexedDataset.fingerprint` of the corpus."""
    documents: range
    """Documents of the split."""
    seq_length: int
    seed: int
    epoch: int

    def digest(self) -> str:
        """64 hexadecimal digits."""
        parts = [FORMAT_VERSION, order_version(), self.fingerprint, self.documents.start, self.documents.stop]
        parts += [self.seq_length, self.seed, self.epoch]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_or_build(
    directory: Path,
    key: IndexKey,
    num_tokens: int,
    build: Callable[[], SampleIndex],
    name: str,
    *,
    timeout: float = LOCK_SECONDS,
) -> SampleIndex:
    """The index of `key` out of `directory`, mapped read-only; built and saved first where it is not there.

    `num_tokens` are the tokens of the split: with the key they give the size of the file. `name` goes into the
    file's name, for people who look into the directory. Of several processes on a machine one builds, the others
    wait for it, `timeout` seconds at most. Raises UserError that names the lock where it takes longer, and
    --data-cache-path where the directory cannot be written.
    """
    path = directory / f"{name}-{key.digest()}.npy"
    sizes = (len(key.documents), count_samples(num_tokens, key.seq_length))
    found = _load(path, *sizes)
    if found is not None:
        return found
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory, timeout) as alone:
            found = _load(path, *sizes)
            if found is not None:
                return found
            if alone:
                _reap(directory)
            index = build()
            _save(path, index)
    except OSError as error:
        fault = explain(error, "write the sample index", path)
        raise UserError(f"{fault}; --data-cache-path names another directory") from error
    return _load(path, *sizes) or index


def _load(path: Path, documents: int, samples: int) -> SampleIndex | None:
    """The index in `path`; None where there is none, and with a warning where it is not what it should be."""
    expected = (documents + 2 * (samples + 1) + samples,)
    try:
        flat = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s: damaged sample index (%s), building it again", path, error)
        return None
    if flat.shape != expected or flat.dtype not in (np.int32, np.int64):
        logger.warning(
            "%s: damaged sample index, expected %s int32 or int64, found %s %s, building it again",
            path,
            expected,
            flat.shape,
            flat.dtype,
        )
        return None
    flat = flat.view(np.ndarray)  # slices of a memmap are slow; the plain view keeps the map alive
    return SampleIndex(
        documents=flat[:documents],
        starts=flat[documents : documents + 2 * (samples + 1)].reshape(samples + 1, 2),
        shuffle=flat[documents + 2 * (samples + 1) :],
    )


def _save(path: Path, index: SampleIndex) -> None:
    """Write `index` beside `path`, flush it to the disk, then rename it to `path`."""
    parts: list[IndexArray] = [index.documents, index.starts.reshape(-1), index.shuffle]
    descr = np.lib.format.dtype_to_descr(index.documents.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (sum(len(part) for part in parts),)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).data)  # tofile does not notice that the disk is full
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _reap(directory: Path) -> None:
    """Delete what killed processes of this machine have left in `directory`, of which this one holds the lock."""
    for left in directory.glob(f"{_TEMPORARY}*.tmp"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path, timeout: float) -> Iterator[bool]:
    """Hold the directory's lock, which the system gives back when its holder dies; raises UserError after `timeout`.

    Yields False where the file system has no locks: there everyone builds, slower, and as right, since files come by
    renames.
    """
    with (directory / ".lock").open("a") as file:
        start, said, alone = time.monotonic(), False, True
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            except OSError:
                alone = False
                break
            waited = time.monotonic() - start
            if waited > timeout:
                raise UserError(
                    f"{file.name}: another process has been building a sample index for over {timeout:.0f} s: if it is "
                    "at work, raise --distributed-timeout-minutes; delete nothing, the lock goes when its holder does"
                )
            if waited > NOTICE_SECONDS and not said:
                logger.warning("%s: waiting for another process that builds a sample index there", directory)
                said = True
            time.sleep(POLL_SECONDS)
        yield alone
