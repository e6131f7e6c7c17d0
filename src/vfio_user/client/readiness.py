"""How an event loop learns that a client which nobody calls has something to do."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable

from vfio_user.fds import OwnedFd


class Readiness:
    """A descriptor that is readable when one of several sockets is, or when something was left over.

    A call ends with its reply. A request for DMA that was received with the reply is in no socket any more, so that
    none of them would ever tell.
    """

    def __init__(self, sockets: Iterable[int]) -> None:
        self._left_over = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._epoll = select.epoll()
        for fd in (self._left_over.fileno(), *sockets):
            self._epoll.register(fd, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def leave_over(self) -> None:
        """Something was received that must be looked at."""
        os.eventfd_write(self._left_over.fileno(), 1)

    def take_over(self) -> None:
        """It is looked at now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._left_over.fileno())

    def close(self) -> None:
        self._epoll.close()
        self._left_over.close()
