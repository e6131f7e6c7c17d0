"""Sockets that a service manager has opened: socket activation, as sd_listen_fds(3) says."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import replace

from vfio_user.errors import UsageError
from vfio_user.tools.serving import DeviceSpec

FIRST = 3
"""The descriptor of the first one: SD_LISTEN_FDS_START."""
_PROCESS, _COUNT, _NAMES = "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"
_DIGITS = 10
"""Digits that a process or a number of descriptors can have at most."""


def inherited_sockets(environ: MutableMapping[str, str] = os.environ) -> list[int]:
    """The descriptors that were passed to this process, in order; none if the variables are not there, or another's.

    The variables are taken away and the descriptors are closed on exec: they are nothing to what is run from here.
    Raises UsageError where the variables make no sense, and for a descriptor that is no UNIX stream socket.
    """
    process, count, _ = (environ.pop(name, None) for name in (_PROCESS, _COUNT, _NAMES))
    if process is None or count is None or _number(_PROCESS, process) != os.getpid():
        return []
    fds = []
    for fd in range(FIRST, FIRST + _number(_COUNT, count)):  # the first that is not there ends a count that is too high
        _check(fd)
        os.set_inheritable(fd, False)
        fds.append(fd)
    return fds


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS and int(text) > 0):
        raise UsageError(f"{name}={text[:40]!r} in the environment is no number from 1 on")
    return int(text)


def _check(fd: int) -> None:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"{_COUNT} in the environment: descriptor {fd}: {error.strerror}") from error
    kind = sock.family, sock.type
    sock.detach()
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM):
        raise UsageError(f"{_COUNT} in the environment: descriptor {fd} is no UNIX stream socket")


def placed(specs: Sequence[DeviceSpec], fds: Collection[int]) -> list[DeviceSpec]:
    """``specs``, where those without a place have one of ``fds`` each, in order, but for those that a spec names.

    Raises UsageError when there are more than that.
    """
    named = {spec.fd for spec in specs}
    free = [fd for fd in fds if fd not in named]
    waiting = [number for number, spec in enumerate(specs) if spec.socket_path is None and spec.fd is None]
    if len(free) > len(waiting):
        raise UsageError(f"{len(free)} sockets were passed for {len(waiting)} devices without --socket-path and --fd")
    result = list(specs)
    for number, fd in zip(waiting, free, strict=False):
        result[number] = replace(result[number], fd=fd)
    return result
