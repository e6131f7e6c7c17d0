"""SCM_RIGHTS: file descriptors as ancillary data of sendmsg and recvmsg."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterable, Sequence

from vfio_user.fds import OwnedFd
from vfio_user.wire.constants import MAX_MSG_FDS

ANCILLARY_SIZE = socket.CMSG_SPACE(MAX_MSG_FDS * array("i").itemsize)
"""Room for as many descriptors as the kernel lets one sendmsg carry."""

Ancillary = Iterable[tuple[int, int, bytes]]


def pack_fds(fds: Sequence[int]) -> list[tuple[int, int, array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []


def take_fds(ancillary: Ancillary) -> list[OwnedFd]:
    """Own every descriptor that came with a message."""
    fds: list[OwnedFd] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds.extend(map(OwnedFd, numbers))
    return fds


def skip_sent(buffers: Iterable[bytes | bytearray | memoryview], sent: int) -> list[memoryview]:
    """What is left of ``buffers`` after ``sent`` bytes of them."""
    rest = []
    for buffer in buffers:
        view = memoryview(buffer)
        if sent < len(view):
            rest.append(view[sent:])
        sent = max(0, sent - len(view))
    return rest
