"""Messages between two processes over TCP: JSON objects, a line each."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

SEND_SECONDS = 5.0
CALL_SECONDS = 15.0
"""How long one address is tried."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
"""A node without power is noticed after 30 seconds; a shorter break of its network is survived."""
LONGEST_MESSAGE = 2**16


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Never raises: that the other end is gone is for `receive` to tell."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come whole.

        Raises EOFError where the other end has closed, OSError where it is lost, ValueError on anything else than
        messages.
        """
        data = self.socket.recv(LONGEST_MESSAGE)
        if not data:
            raise EOFError("closed by the other end")
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if len(self._rest) > LONGEST_MESSAGE or not all(isinstance(message, dict) for message in messages):
            raise ValueError("expected JSON objects, a line each")
        return messages

    def drain(self, deadline: float) -> None:
        """Say nothing more and wait for the other end to close, until `deadline` (of the monotonic clock).

        To close over unread data would take back what was said last.
        """
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(max(0.0, deadline - time.monotonic()))
            while self.socket.recv(LONGEST_MESSAGE):
                pass


def listen(callers: int) -> socket.socket:
    """A free port on all of this machine's addresses."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=callers)


def own_addresses() -> list[str]:
    """Where others may reach this machine: the address that faces the rendezvous, and two names that may be its own."""
    names = [os.environ.get("MASTER_ADDR") or "localhost", socket.gethostname()]
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(names[0], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: chooses the way, sends nothing
            names.insert(0, probe.getsockname()[0])
    return list(dict.fromkeys(names))


def call(addresses: list[str], port: int, greeting: str) -> Channel:
    """A channel to whoever sends `greeting` first at one of `addresses`. Raises OSError that says how each failed."""
    faults = []
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), CALL_SECONDS)
            channel = Channel(connection)
            connection.settimeout(CALL_SECONDS)
            if {"greeting": greeting} not in channel.receive():
                raise ValueError("another program answers")
        except (OSError, EOFError, ValueError) as error:
            faults.append(f"{address}: {error}")
        else:
            connection.settimeout(SEND_SECONDS)
            return channel
    raise OSError("; ".join(faults))
