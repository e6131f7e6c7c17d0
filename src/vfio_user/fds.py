"""File descriptors as values: one owner, closed once."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterable
from types import TracebackType


class OwnedFd:
    """A file descriptor that belongs to whoever holds this object.

    It is closed by :meth:`close`, by leaving a ``with`` block, or when the object goes away, whichever comes
    first, and never twice. :meth:`take` ends the ownership without closing.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd

    @classmethod
    def duplicate(cls, fd: int) -> OwnedFd:
        """Own a new close-on-exec duplicate of ``fd``, which stays the caller's."""
        return cls(os.dup(fd))

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def fileno(self) -> int:
        """The number, for as long as this object owns it. Raises ValueError when it no longer does."""
        if self._fd < 0:
            raise ValueError("the file descriptor was closed or given away")
        return self._fd

    def take(self) -> int:
        """Give the number away: from here on the caller must close it."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})" if self._fd >= 0 else "OwnedFd(closed)"


def close_all(fds: Iterable[OwnedFd]) -> None:
    """Close every one of ``fds`` that is still open."""
    for fd in fds:
        fd.close()


def is_eventfd(fd: int) -> bool:
    """Whether ``fd`` is an eventfd. The kernel has no call for it; its name in /proc is stable ABI."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return False


def is_mappable(fd: int) -> bool:
    """Whether ``fd`` can stand behind guest memory: a file (memfd, hugetlbfs, shm) or a device, no pipe or socket."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def signal_eventfd(fd: int) -> None:
    """Add one to an eventfd's counter. A counter that is full is already signalled: nothing is lost."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd, 1)


def take_signals(fd: int) -> int:
    """Take an eventfd's counter. 0: it is not signalled, or whoever shares it took the counter first.

    It never waits, blocking eventfd or not: the client that shares it may take the counter at any time.
    """
    counter = bytearray(8)
    with contextlib.suppress(BlockingIOError):
        os.preadv(fd, [counter], -1, os.RWF_NOWAIT)
    return int.from_bytes(counter, sys.byteorder)
