"""owner.json in a run's directory: the entry of the process that trains there, and what it tells those who only look.

training/owner.py keeps it. A process that leaves, in order or by a fault, empties it; one that is killed does not.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

OWNER_FILE = "owner.json"


def own_entry() -> dict[str, Any]:
    """This process, as others know it; without what the system does not tell."""
    entry: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with suppress(OSError):
        entry |= {"system": _system(), "started": _process(os.getpid())[1]}
    return entry


def parse_entry(content: bytes) -> dict[str, Any]:
    """The entry in an owner.json; empty where nobody has left one, or only part of one."""
    try:
        entry = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def name_of(entry: dict[str, Any]) -> str:
    """The process of an entry in words."""
    return f"process {entry.get('pid', '?')} on {entry.get('host', 'another machine')}"


def how_ended(directory: Path) -> str | None:
    """How the last owner of `directory` has ended, in words; None where it lives, as far as can be seen from here."""
    try:
        content = (directory / OWNER_FILE).read_bytes()
    except OSError:
        return None
    if not content:
        return "it ended by a fault or an interrupt; its output says which"
    entry = parse_entry(content)
    return f"{name_of(entry)} was killed or crashed" if _is_gone(entry) else None


def _is_gone(entry: dict[str, Any]) -> bool:
    """Whether the process of an entry no longer lives, for certain: it ran on this system, under the same numbers."""
    pid = entry.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        if entry.get("system") != _system():
            return False
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's, or /proc is not there
        pass
    try:
        status, started = _process(pid)
    except OSError:  # hidden from other users
        return False
    return status in "ZX" or started != entry.get("started")  # another process may have got its number


def _system() -> str:
    """This system since it was started, and the numbering of processes that this one sees (a container has its own)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _process(pid: int) -> tuple[str, int]:
    """(status letter, ticks from the system's start to its own) of a process. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])
