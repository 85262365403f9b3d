"""Files that are there whole or not at all: atomic writes, committed directories, digests.

The order is always the same, and it is what a crash or a power cut must not be able to reverse:

1. write under a temporary name in the same directory,
2. fsync the file (a directory's files, then the directory itself): the content is on the disk,
3. rename to the final name: the only step that others see, and the system does it whole or not at all,
4. fsync the parent directory: the new name is on the disk.
"""

from __future__ import annotations

import errno
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron.errors import UserError

CHUNK_BYTES = 4 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def file_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that says what failed on which file, and the fix.

    `action` is a verb, such as "write".
    """
    try:
        yield
    except OSError as error:
        raise explain(error, action, path) from error


def explain(error: OSError, action: str, path: Path) -> UserError:
    """The UserError for `error`, met when trying to `action` the file or directory `path`."""
    reason = error.strerror or str(error)
    if error.errno in _DISK_FULL:
        return UserError(f"cannot {action} {path}: disk full ({reason}); free some space there or choose another disk")
    if error.errno in _NOT_ALLOWED:
        return UserError(f"cannot {action} {path}: {reason}; change its permissions or choose another directory")
    return UserError(f"cannot {action} {path}: {reason}")


def make_parent(path: Path) -> None:
    """Make the directory that the file `path` is to stand in. Raises UserError that names it."""
    with file_errors("create", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace the file `path` with `data` (str as UTF-8): readers see the old content or the new, never a part.

    Raises UserError that names `path` where the disk is full or the directory cannot be written.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():  # a pipe or a device is written to, and stays
        with file_errors("write", path):
            path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with file_errors("write", path):
        try:
            write_durable(temporary, content)
            os.replace(temporary, path)
            fsync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def write_durable(path: Path, content: bytes) -> None:
    """Create the file `path`, which must not exist, and bring `content` to the disk. Raises OSError."""
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_file(path: Path) -> None:
    """Bring the content of the file `path` to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Bring the names in the directory `path` to the disk, where its file system can. Raises OSError."""
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise


def commit_directory(temporary: Path, final: Path) -> None:
    """Give the finished directory `temporary` its name `final`, in the same parent: whole or not at all.

    `final` must not exist, or be empty. Raises UserError that names `final`; `temporary` is then left
    to the caller, and `final` may stand only if every file of it is on the disk.
    """
    with file_errors("write", final):
        fsync_tree(temporary)
        os.rename(temporary, final)
        fsync_directory(final.parent)


def fsync_tree(directory: Path) -> None:
    """Bring every file below `directory`, and then the names, to the disk. Raises OSError."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in sorted(names):
            fsync_file(Path(folder, name))
        fsync_directory(Path(folder))


def crc32_of(path: Path) -> str:
    """CRC-32 of the file's content, 8 hexadecimal digits. Raises UserError where it cannot be read."""
    value = 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file_errors("read", path), open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"
