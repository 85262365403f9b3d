"""How ranks notice that another is dead or hangs: TCP connections beside the collectives, which would wait for it.

Every rank holds a connection to rank 0, served by a thread of its own. The system closes a dead process's connections
at once, so an end without a farewell is a death, however busy the process was; a process that hangs keeps its
connection, but answers no ping or gets no further. Messages are JSON objects, a line each:

    greeting, token, free   rank 0 is who the store says; the other belongs to the run; it may fail by itself
    at, moves, patient      where the rank's training thread is, at most about once a second
    ping, where, pong       does your thread answer, and what is the training thread doing
    bye, failed             the rank leaves; if failed, after it has heard `free` or `end`
    end                     rank 0 says why the run ends: leave, without a word

A failure is looked into before it is told: its cause may be a rank whose death or silence is about to be noticed.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from megatron.distributed.channel import Channel, call, listen, own_addresses
from megatron.errors import EXIT_FAILURE, UserError

if TYPE_CHECKING:
    import torch.distributed as dist

TICK_SECONDS = 1.0
"""How often a rank tells where it is, and rank 0 looks for ranks that hang."""
ANSWER_SECONDS = 5.0
"""A rank that has not answered for so long does not answer."""
FAILURE_SECONDS = 1.0
"""How long a failure waits for news of its cause, and for the failures of the others, who then speak for themselves."""
FLUSH_SECONDS = 2.0
"""How long the end of the run waits for a terminal, a pipe or a rank that takes nothing more."""
SILENT = "does not answer (stopped, or its node is gone)"


def _stands() -> str:
    return "its last checkpoint stands"


@dataclass(eq=False)
class _Rank:
    """What is known of a rank."""

    rank: int
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    channel: Channel | None = None
    """To it; None for this rank itself, and where the connection is closed."""
    what: str = "the start"
    moves: int = 0
    """Calls of `Watch.at`."""
    moved: float = field(default_factory=time.monotonic)
    """When the last of them was heard of."""
    patient: int = 0
    """Phases without a time limit that it is in."""
    where: str = ""
    """What its training thread was doing when asked; empty until it answers."""
    finished: bool = False
    failure: str | None = None
    what_next: Callable[[], str] = _stands

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def present(self) -> bool:
        """Whether it has neither finished nor failed."""
        return not self.finished and self.failure is None


class Watch:
    """This rank's part in the watch, from entering to leaving it. By itself (size 1) a process watches nothing.

    All ranks call `at` at the same points: who has called it less often is behind.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, *, timeout: float) -> None:
        """`store` belongs to this start of the run alone: rank 0 leaves word there under the key `watch`.

        `timeout`: seconds that a rank may take from one call of `at` to the next, and all ranks to come together.
        """
        self._own = _Rank(rank)
        self._size = size
        self._store = store
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._wake: socket.socket | None = None

    def at(self, what: str) -> None:
        """Note that training has come to `what`, such as "step 17"; costs nothing, the thread passes it on."""
        self._own.what = what
        self._own.moves += 1

    def ends_with(self, what_next: Callable[[], str]) -> None:
        """Say `what_next()` after whatever ends the run; called at that moment, from the watch's thread."""
        self._own.what_next = what_next

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """For a phase that may take long on this rank: no rank is held to hang meanwhile. Deaths are noticed still."""
        self._own.patient += 1
        try:
            yield
        finally:
            self._own.patient -= 1

    def failed(self, message: str) -> None:
        """Leave the watch because of `message`, one line: ranks that do not fail on their own say it and end.

        Returns after about a second, for this rank to say it too; does not return where a dead or silent rank is
        the cause.
        """
        self._leave(failure=message)

    def __enter__(self) -> Watch:
        """Raises UserError where rank 0 cannot be reached."""
        if self._size > 1:
            self._wake, woken = socket.socketpair()
            part: _Main | _Other
            if self._own.rank == 0:
                part = _Main(self._own, self._size, self._store, self._timeout, woken)
            else:
                main, channel = _join(self._own, self._store, self._timeout)
                part = _Other(self._own, main, channel, self._timeout, woken)
            self._own.moved = time.monotonic()
            self._thread = threading.Thread(target=part.run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rank 0 stays until all others have left, so that there is someone to notice how they do."""
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._leave(failure=None)
        else:
            self.failed(_line_of(error))

    def _leave(self, failure: str | None) -> None:
        if self._thread is None or self._wake is None or not self._own.present:
            return
        self._own.failure = failure
        self._own.finished = failure is None
        self._wake.send(b"!")
        stays = self._own.rank == 0 and failure is None
        self._thread.join(None if stays else 2 * ANSWER_SECONDS)
        self._wake.close()


class _Main:
    """Rank 0's thread: hears all others and judges."""

    def __init__(self, own: _Rank, size: int, store: dist.Store, timeout: float, woken: socket.socket) -> None:
        self._own, self._size, self._timeout = own, size, timeout
        self._ranks = {0: own}
        self._own_moves = 0
        self._began = self._looked = time.monotonic()
        self._asked: float | None = None
        """When all were pinged, while an inquiry runs."""
        self._over = False
        self._greeting, self._token = secrets.token_hex(16), secrets.token_hex(16)
        self._listener = listen(size)
        self._selector = selectors.DefaultSelector()
        self._listen(self._listener, self._accept)
        self._listen(woken, partial(woken.recv, 1))
        port = self._listener.getsockname()[1]
        invitation = [own.host, own.pid, own_addresses(), port, self._greeting, self._token]
        store.set("watch", json.dumps(invitation))

    def run(self) -> None:
        while not self._over:
            for key, _ in self._selector.select(TICK_SECONDS):
                key.data()
            self._judge(time.monotonic())
            self._over |= len(self._ranks) == self._size and all(rank.finished for rank in self._ranks.values())
        for key in list(self._selector.get_map().values()):
            self._close(key.fileobj)  # type: ignore[arg-type]

    def _listen(self, connection: socket.socket, react: Callable[[], object]) -> None:
        self._selector.register(connection, selectors.EVENT_READ, react)

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # a caller that has gone again
            channel = Channel(self._listener.accept()[0])
            channel.send(greeting=self._greeting)
            self._listen(channel.socket, partial(self._admit, channel))

    def _admit(self, channel: Channel) -> None:
        """Hear a caller's first message, and drop who does not know the token."""
        try:
            messages = channel.receive()
            if not messages:
                return
            if not hmac.compare_digest(str(messages[0].get("token")).encode(), self._token.encode()):
                raise ValueError("a stranger")
        except (OSError, EOFError, ValueError):
            self._close(channel.socket)
            return
        hello = messages[0]
        rank = _Rank(hello["rank"], hello["host"], hello["pid"], channel)
        self._ranks[rank.rank] = rank
        self._selector.modify(channel.socket, selectors.EVENT_READ, partial(self._hear, rank, channel))
        for message in messages[1:]:
            self._note(rank, channel, message)
        if len(self._ranks) == self._size:
            self._close(self._listener)

    def _hear(self, rank: _Rank, channel: Channel) -> None:
        try:
            for message in channel.receive():
                self._note(rank, channel, message)
        except (EOFError, ConnectionResetError):
            rank.channel = None
            if rank.failure is not None:  # waited for no answer, and has said why
                self._close(channel.socket)
                return
            self._end(f"{rank} died, last seen at {rank.what}: killed or crashed (dmesg there tells if memory ran out)")
        except (OSError, ValueError) as error:
            rank.channel = None
            self._end(f"{rank} cannot be reached ({error}), last seen at {rank.what}")

    def _note(self, rank: _Rank, channel: Channel, message: dict[str, Any]) -> None:
        if "at" in message:
            rank.what, rank.moves, rank.patient = message["at"], message["moves"], message["patient"]
            rank.moved = time.monotonic()
        elif "ping" in message:
            channel.send(pong=True)
        elif "where" in message:
            rank.where = message["where"]
        elif "failed" in message:
            rank.failure = message["failed"]
        elif "bye" in message:
            rank.finished, rank.channel = True, None
            self._close(channel.socket)

    def _judge(self, now: float) -> None:
        """End the run if it is time to, after a ping that shows who is there."""
        ranks = self._ranks.values()
        if self._own.moves != self._own_moves:
            self._own_moves, self._own.moved = self._own.moves, now
        if any(rank.patient for rank in ranks) or now - self._looked > TICK_SECONDS + ANSWER_SECONDS:
            for rank in ranks:  # what passed was allowed, or this process itself was stopped
                rank.moved = now
        self._looked = now
        missing = [f"rank {rank}" for rank in range(self._size) if rank not in self._ranks]
        if missing and now - self._began > self._timeout:
            self._end(f"{_some(missing)} did not come within {self._timeout:.0f} s: see why it has not started")
        present = [rank for rank in ranks if rank.present]
        failed = [rank for rank in ranks if rank.failure is not None]
        stuck = [rank for rank in present if now - rank.moved > self._timeout]
        if not failed and not stuck:
            self._asked = None
            return
        if self._asked is None:
            self._asked = now
            for rank in present:
                rank.where = "" if rank.channel else _where()
                if rank.channel:
                    rank.channel.send(ping=True)
        silent = [rank for rank in present if not rank.where]
        enough = FAILURE_SECONDS if failed and not silent else ANSWER_SECONDS
        if present and now - self._asked < enough:
            return
        causes = [f"{rank} {SILENT}, last seen at {rank.what}" for rank in silent]
        causes += [f"{rank} failed at {rank.what}: {rank.failure}" for rank in failed]
        self._end(_some(causes) if causes else self._standstill(stuck, now), [] if silent else failed)

    def _standstill(self, stuck: list[_Rank], now: float) -> str:
        """Who holds up the others, in words, where all answer."""
        fewest = min(rank.moves for rank in stuck)
        behind = [rank for rank in stuck if rank.moves == fewest]
        others = [rank for rank in self._ranks.values() if rank not in behind]
        seconds = now - min(rank.moved for rank in behind)
        if others:
            ahead = max(others, key=lambda rank: (rank.finished, rank.moves))
            there = "have finished" if ahead.finished else f"are at {ahead.what}"
            late = [f"{rank} is still at {rank.what} after {seconds:.0f} s, in {rank.where}" for rank in behind]
            return f"{_some(late)}; others {there}"
        groups: dict[str, list[_Rank]] = {}
        for rank in behind:
            groups.setdefault(rank.where, []).append(rank)
        doing = [
            f"{len(group)} ranks in {where}" if len(group) > 1 else f"{group[0]} in {where}"
            for where, group in sorted(groups.items(), key=lambda item: len(item[1]))
        ]
        return (
            f"all ranks are still at {behind[0].what} after {seconds:.0f} s ({_some(doing)}): where a collective does "
            "not complete, check the network between the nodes or raise --distributed-timeout-minutes"
        )

    def _end(self, why: str, failed: Sequence[_Rank] = ()) -> None:
        """Send all ranks away, those that `failed` by themselves to say so; this one too, unless it is one of them."""
        self._over = True
        channels = []
        for rank in self._ranks.values():
            if rank.channel is not None:
                rank.channel.send(**{"free" if rank in failed else "end": True})
                channels.append(rank.channel)
        deadline = time.monotonic() + FLUSH_SECONDS
        for channel in channels:
            channel.drain(deadline)
        if self._own not in failed:
            leave(why, self._own.what_next)


class _Other:
    """The thread of a rank other than 0: tells rank 0 where this rank is, and leaves when told to."""

    def __init__(self, own: _Rank, main: _Rank, channel: Channel, timeout: float, woken: socket.socket) -> None:
        self._own, self._main, self._channel, self._timeout = own, main, channel, timeout
        self._sockets = (channel.socket, woken)
        self._told: tuple[str, int, int] | None = None
        self._left = False
        self._asked: float | None = None
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel.socket, selectors.EVENT_READ, self._hear)
        self._selector.register(woken, selectors.EVENT_READ, partial(woken.recv, 1))

    def run(self) -> None:
        while not self._over:
            self._tell(time.monotonic())
            for key, _ in self._selector.select(TICK_SECONDS):
                key.data()
        for connection in self._sockets:
            connection.close()

    def _tell(self, now: float) -> None:
        own = self._own
        if self._left:
            return
        state = (own.what, own.moves, own.patient)
        if state != self._told:
            self._channel.send(at=own.what, moves=own.moves, patient=own.patient)
            self._told, own.moved = state, now
        if not own.present:
            self._channel.send(**({"bye": True} if own.failure is None else {"failed": own.failure}))
            self._left = True
        elif own.patient or now - own.moved <= self._timeout:
            self._asked = None
        elif self._asked is None:
            self._channel.send(ping=True)
            self._asked = now
        elif now - self._asked > ANSWER_SECONDS:
            leave(f"{self._main} {SILENT}", self._own.what_next)

    def _hear(self) -> None:
        try:
            messages = self._channel.receive()
        except (OSError, EOFError) as error:
            self._over = True
            if not self._own.finished:
                closed = isinstance(error, EOFError | ConnectionResetError)
                how = "died: killed or crashed" if closed else f"cannot be reached ({error})"
                leave(f"{self._main} {how}", self._own.what_next)
            return
        for message in messages:
            if "end" in message:
                leave()
            elif "free" in message:
                self._over = True
            elif "ping" in message and not self._left:
                self._channel.send(where=_where())
            elif "pong" in message:
                self._asked = None


def _join(own: _Rank, store: dist.Store, timeout: float) -> tuple[_Rank, Channel]:
    """Rank 0 and a connection to it, which knows of this rank."""
    try:
        store.wait(["watch"], timedelta(seconds=timeout))
    except RuntimeError as error:
        raise UserError(
            f"rank 0 did not come within {timeout:.0f} s ({_line_of(error)}): see why it has not"
        ) from error
    host, pid, addresses, port, greeting, token = json.loads(store.get("watch"))
    try:
        channel = call(["127.0.0.1", *addresses] if host == own.host else addresses, port, greeting)
    except OSError as error:
        raise UserError(
            f"rank {own.rank} on {own.host} cannot reach rank 0 on {host} at port {port} ({error}): if it has not "
            "ended, let TCP connections between the nodes pass, and give its node's address as torchrun's --master-addr"
        ) from error
    channel.send(token=token, rank=own.rank, host=own.host, pid=own.pid)
    return _Rank(0, host, pid), channel


def _where() -> str:
    """What the main thread is doing."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _line_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError) and lines:
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")


def leave(why: str = "", what_next: Callable[[], str] = _stands) -> NoReturn:
    """End this process from any thread, whatever its main thread is stuck in; `why`, if any, is said on stderr, then
    `what_next()`, which may look at a disk."""
    # Whatever holds up the rest, such as a pipe that nobody reads or a disk that is gone, must not hold up the end.
    end = threading.Timer(FLUSH_SECONDS, os._exit, (EXIT_FAILURE,))
    end.daemon = True
    end.start()
    with contextlib.suppress(OSError, ValueError):
        if why:
            start = "\n" if sys.stderr.isatty() else ""  # a live progress line may stand there
            sys.stderr.write(f"{start}error: {why}; the run ends here")
            sys.stderr.flush()
            try:
                then = what_next()
            except Exception:  # whatever it is, it is not what ends the run
                then = _stands()
            sys.stderr.write(f"; {then}\n")
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(EXIT_FAILURE)
