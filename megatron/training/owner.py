"""One run at a time in a directory: who owns it, and whether the owner is still alive."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.checkpointing.commit import make_directory
from megatron.distributed.watch import leave
from megatron.errors import UserError
from megatron.files import file_errors
from megatron.owner_file import OWNER_FILE, name_of, own_entry, parse_entry

BEAT_SECONDS = 5.0
"""How often an owner renews its entry."""
SILENCE_SECONDS = 30.0
"""An owner on another machine whose entry does not change for so long is dead."""


class Owner:
    """Holds `directory` from entering to leaving: a lock of the system's, and an entry that is renewed.

    The lock ends with its process, and tells at once whether an owner on this machine, or on any that shares the lock,
    is alive. Where machines share files but not locks, the entry tells, after a while. An owner that finds another's
    entry, as after a long suspension there, ends its process.
    """

    def __init__(self, directory: Path, report: Callable[[str], None]) -> None:
        self._path = directory / OWNER_FILE
        self._report = report
        self._file: int | None = None
        self._entry: dict[str, Any] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Owner:
        """Raises UserError that names the owner, where there is one."""
        with file_errors("write", self._path):
            make_directory(self._path.parent)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take(self._file)
            except BaseException:
                os.close(self._file)
                raise
        self._thread = threading.Thread(target=self._renew, args=(self._file,), name="owner", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None or self._file is None:
            return
        self._done.set()
        self._thread.join()
        if self._read(self._file).get("token") == self._entry["token"]:
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _take(self, file: int) -> None:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken(self._read(file)) from None
        except OSError:  # a file system without locks
            locked = False
        found = self._read(file)
        if found and (not locked or found.get("host") != socket.gethostname()):
            self._report(f"{self._path}: {name_of(found)} did not sign off; waiting to see whether it is alive")
            deadline = time.monotonic() + SILENCE_SECONDS
            while time.monotonic() < deadline:
                time.sleep(min(1.0, SILENCE_SECONDS / 10))
                if self._read(file).get("beat") != found.get("beat"):
                    raise self._taken(found)
        if found:
            self._report(f"{self._path.parent}: taken over from {name_of(found)}, which has died")
        self._entry = own_entry() | {"token": secrets.token_hex(8), "beat": 0}
        self._write(file)

    def _taken(self, found: dict[str, Any]) -> UserError:
        return UserError(
            f"--save {self._path.parent} is in use by {name_of(found)}: stop that run, or choose another directory"
        )

    def _renew(self, file: int) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk is the checkpoints' to report
                if self._read(file).get("token") != self._entry["token"]:
                    # Nothing may be written any more, neither log nor checkpoint: whatever the main thread is doing.
                    leave(f"another run has taken {self._path.parent} over, as this one did not move ({self._path})")
                self._entry["beat"] += 1
                self._write(file)

    def _write(self, file: int) -> None:
        os.pwrite(file, json.dumps(self._entry).ljust(512).encode(), 0)

    def _read(self, file: int) -> dict[str, Any]:
        return parse_entry(os.pread(file, 4096, 0))
