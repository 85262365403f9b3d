"""What strace says of the system calls by which a program changes its files, and whether their order is safe."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

CHANGING = ("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate", "openat")
NAMING = ("rename", "renameat", "renameat2", "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "link", "linkat")
TRACE = ("-e", "trace=" + ",".join(f"?{name}" for name in CHANGING + NAMING))  # ?: where the machine has it
NEVER_FULL = ("unlink", "unlinkat", "rmdir")
_RANDOM = re.compile(
    r"(?<=\.tmp-)[0-9a-f]+|(?<=\.old-)[0-9a-f]+|(?<=\.gone-)[0-9a-f]+|(?<=\.tmp)\w{6}$|\w{8}(?=\.tmp$)"
)


@dataclass(frozen=True)
class Call:
    """A system call that changes something below the directory under test."""

    name: str
    number: int
    """Among all calls of that name in the thread, from 1."""
    paths: tuple[str, ...]
    """What it was given: two for a rename."""

    @property
    def place(self) -> tuple[str, ...]:
        """Name and paths without what is random in them."""
        return (self.name, *(_RANDOM.sub("*", path) for path in self.paths))


def calls_in(log: Path, directory: Path) -> list[Call]:
    """The calls in the log of one thread that change something below `directory`, in their order."""
    counts: dict[str, int] = {}
    found = []
    for line in log.read_text().splitlines():
        match = re.match(r"(\w+)\((.*)", line)
        if match is None:
            continue
        name, given = match[1], match[2]
        counts[name] = counts.get(name, 0) + 1
        in_vain = " = -1 " in given and "(INJECTED)" not in given
        if in_vain or (name == "openat" and "O_CREAT" not in given):
            continue
        folder = re.match(r"(?:AT_FDCWD|\d+)<([^>]*)>", given)
        if name in NAMING or name == "openat":
            base = folder[1] if folder else "/"
            paths = tuple(os.path.join(base, path) for path in re.findall(r'"([^"]*)"', given))
        else:
            paths = (folder[1],) if folder else ()
        if paths and all(path == str(directory) or path.startswith(f"{directory}/") for path in paths):
            found.append(Call(name, counts[name], paths))
    return found


def order_faults(calls: list[Call]) -> list[str]:
    """Where a file or directory gets its final name before all of it is on the disk, or another change comes before
    that name is. These are the orders that a power cut could reverse; a kill cannot show them."""
    faults = []
    unsynced: set[str] = set()
    parent: str | None = None
    for call in calls:
        path, last = call.paths[0], call.paths[-1]
        if call.name in ("fsync", "fdatasync"):
            unsynced.discard(path)
            parent = None if path == parent else parent
            continue
        if parent is not None:
            faults.append(f"{call.name} {last} comes before the name given in {parent} is on the disk")
            parent = None
        if not call.name.startswith("rename"):
            if call.name in ("write", "pwrite64", "ftruncate", "fallocate"):
                unsynced.add(path)
            if call.name in ("openat", "mkdir", "mkdirat"):
                unsynced |= {path, os.path.dirname(path)} if call.name == "openat" else {path}
            if call.name in NEVER_FULL:
                unsynced.discard(path)
            continue
        inside = {old for old in unsynced if old == path or old.startswith(f"{path}/")}
        unsynced = (unsynced - inside) | {last + old.removeprefix(path) for old in inside}
        parent = os.path.dirname(last) if is_final(Path(last)) or ".gone-" in last else None
        if is_final(Path(last)):
            faults += [f"{last} gets its name before {old} is on the disk" for old in sorted(inside)]
    if parent is not None:
        faults.append(f"the name given last in {parent} is not brought to the disk")
    return faults


def is_final(path: Path) -> bool:
    """Whether `path` is one that somebody reads: neither temporary nor aside nor going nor a lock."""
    return not any(re.search(r"\.tmp|\.old-|\.gone-|^\.lock$", part) for part in path.parts[-2:])
