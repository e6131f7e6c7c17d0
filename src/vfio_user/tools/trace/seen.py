"""What a tracer sees of one message, and of a file descriptor that travels with it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from vfio_user.wire.commands import Role
from vfio_user.wire.constants import TYPE_MASK, HeaderFlags
from vfio_user.wire.messages import Buffer, Header

_ERROR, _NO_REPLY = int(HeaderFlags.ERROR), int(HeaderFlags.NO_REPLY)


class FdKind(IntEnum):
    """What a descriptor is. The numbers stand in captures: append, never change."""

    UNKNOWN = 0
    MEMFD = 1
    EVENTFD = 2
    SOCKET = 3
    FILE = 4
    PIPE = 5
    DEVICE = 6


class SeenFd(NamedTuple):
    """A descriptor: its kind, and for a memfd or a file its size in bytes, else 0."""

    kind: FdKind
    size: int = 0

    def __str__(self) -> str:
        return f"{self.kind.name.lower()}({self.size:#x})" if self.size else self.kind.name.lower()


_EVENTFD, _MEMFD = "anon_inode:[eventfd]", "/memfd:"
"""How the names of such files in /proc begin."""

_KINDS: tuple[tuple[Callable[[int], bool], FdKind], ...] = (
    (stat.S_ISSOCK, FdKind.SOCKET),
    (stat.S_ISFIFO, FdKind.PIPE),
    (stat.S_ISCHR, FdKind.DEVICE),
    (stat.S_ISBLK, FdKind.DEVICE),
)


def describe_fd(fd: int) -> SeenFd:
    """What ``fd`` is; one that cannot be looked at is UNKNOWN."""
    try:
        status, name = os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return SeenFd(FdKind.UNKNOWN)
    if stat.S_ISREG(status.st_mode):
        return SeenFd(FdKind.MEMFD if name.startswith(_MEMFD) else FdKind.FILE, status.st_size)
    if name.startswith(_EVENTFD):
        return SeenFd(FdKind.EVENTFD)
    return SeenFd(next((kind for holds, kind in _KINDS if holds(status.st_mode)), FdKind.UNKNOWN))


class Place(NamedTuple):
    """Where a message was seen: the connection, counted from 1, its twin socket or not, and who sent it."""

    connection: int
    twin: bool
    sender: Role

    def __str__(self) -> str:
        return f"the {self.sender.value} of connection {self.connection}{', twin socket' if self.twin else ''}"


class Seen(NamedTuple):
    """One message. ``time`` is nanoseconds since the epoch; ``payload`` is valid until the observer returns.

    ``fault``: why the payload is not there, or not whole; None where it is.
    """

    time: int
    place: Place
    header: Header
    payload: Buffer
    fds: tuple[SeenFd, ...] = ()
    fault: str | None = None

    @property
    def is_command(self) -> bool:
        return not self.header.flags & TYPE_MASK

    @property
    def is_error(self) -> bool:
        return bool(self.header.flags & _ERROR)

    @property
    def posted(self) -> bool:
        """Whether nobody answers it."""
        return bool(self.header.flags & _NO_REPLY)

    def kept(self, limit: int) -> Seen:
        """The same with a payload of its own, of which at most ``limit`` bytes are there."""
        fault = self.fault if len(self.payload) <= limit else f"the first {limit} bytes were kept"
        return Seen(self.time, self.place, self.header, bytes(self.payload[:limit]), self.fds, fault)


class Observer:
    """Whoever looks on while messages pass. What is not overridden does nothing.

    What it raises ends the looking on, never the passing.
    """

    def connected(self, connection: int) -> None:
        """A client came, and was connected to the server."""

    def seen(self, message: Seen) -> None:
        """A whole message has passed."""

    def unclear(self, place: Place, reason: str) -> None:
        """What is sent there makes no sense, or ended in mid-message. Nothing more is seen of it."""

    def left(self, connection: int) -> None:
        """Both sides of a connection are gone."""
