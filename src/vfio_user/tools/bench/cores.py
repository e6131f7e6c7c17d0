"""Processes on cores of their own, for as long as a measurement lasts."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence

from vfio_user.errors import UsageError


@contextlib.contextmanager
def pinned(client_core: int | None, server_core: int | None, servers: Sequence[int]) -> Iterator[None]:
    """Within, this thread runs on ``client_core`` only, all threads of the processes ``servers`` on ``server_core``.

    None: wherever they like. Afterwards they may run where they could before, and a thread that was started meanwhile
    where its process could. Raises UsageError for a core that is not there, OSError for a process of somebody else.
    """
    with contextlib.ExitStack() as stack:
        if client_core is not None:
            stack.enter_context(_moved(threading.get_native_id(), client_core))
        if server_core is not None:
            for pid in servers:
                stack.enter_context(_moved_whole(pid, server_core))
        yield


@contextlib.contextmanager
def _moved(thread: int, core: int) -> Iterator[None]:
    before = os.sched_getaffinity(thread)
    _pin(thread, {core})
    try:
        yield
    finally:
        _pin(thread, before)


@contextlib.contextmanager
def _moved_whole(pid: int, core: int) -> Iterator[None]:
    before = {thread: os.sched_getaffinity(thread) for thread in _threads(pid)}
    try:
        for thread in before:
            _pin(thread, {core})
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has ended
            for thread in _threads(pid):
                _pin(thread, before.get(thread, before[pid]))


def _pin(thread: int, cores: set[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:  # it has ended
        pass
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UsageError(f"core {min(cores)} is not there, or not for us") from error
        raise OSError(error.errno, error.strerror, f"thread {thread} on core {min(cores)}") from error


def _threads(pid: int) -> list[int]:
    """Of a process; one of another namespace, whose number here is 0, cannot be told what to do."""
    if pid <= 0:
        raise UsageError("the server's process cannot be seen from here: pin it where it runs")
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
