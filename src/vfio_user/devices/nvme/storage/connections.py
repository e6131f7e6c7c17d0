"""The connections to one NBD server, shared by threads."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vfio_user.devices.nvme.storage.libnbd import Connection

MOST = 4
"""Connections, to a server that allows several."""
EXTRA_TIMEOUT = 1.0
"""Seconds to wait for a further one: qemu-nbd, for one, may have promised more than it then serves."""
GOODBYE_TIMEOUT = 1.0


class Connections:
    """Lends connections, and makes more with ``connect(deadline)`` when all are lent.

    ``first`` is one of them. Deadlines are of time.monotonic(). Raises OSError: what ``connect`` raises; ETIMEDOUT
    where all are lent until the deadline; EBADF once it is closed.
    """

    def __init__(self, connect: Callable[[float], Connection], first: Connection) -> None:
        self._connect = connect
        self._changed = threading.Condition()
        self._idle = [first]
        self._open = 1  # those that are lent, and those being made, too
        self._most = _most(first)
        self._closed = False

    @contextmanager
    def one(self, deadline: float) -> Iterator[Connection]:
        """A connection for as long as it lasts. One that is dead afterwards is forgotten."""
        connection = self._take(deadline)
        try:
            yield connection
        finally:
            self._give_back(connection)

    def _take(self, deadline: float) -> Connection:
        while True:
            with self._changed:
                left = deadline - time.monotonic()
                if not self._changed.wait_for(self._can_take, left):
                    raise TimeoutError(errno.ETIMEDOUT, "the server is still at what it was asked before")
                if self._closed:
                    raise OSError(errno.EBADF, "the storage was closed")
                if self._idle:
                    return self._idle.pop()
                self._open += 1
                others = self._open - 1
            connection = self._further(deadline, others)
            if connection is not None:
                return connection

    def _can_take(self) -> bool:
        return self._closed or bool(self._idle) or self._open < self._most

    def _further(self, deadline: float, others: int) -> Connection | None:
        """A new one; None where the server gives no more than there are."""
        try:
            connection = self._connect(min(deadline, time.monotonic() + EXTRA_TIMEOUT) if others else deadline)
        except BaseException as error:
            with self._changed:
                self._open -= 1
                self._most = max(self._open, 1)
                self._changed.notify_all()
            if others and isinstance(error, OSError):
                return None
            raise
        if not others:
            self._most = _most(connection)
        return connection

    def _give_back(self, connection: Connection) -> None:
        with self._changed:
            alive = connection.alive
            self._idle.append(connection)
            if self._closed or not alive:  # a server that is gone for one is gone for all
                self._close_idle()
            self._changed.notify_all()

    def _close_idle(self) -> None:
        for connection in self._forget_idle():
            connection.close()

    def _forget_idle(self) -> list[Connection]:
        idle, self._idle = self._idle, []
        self._open -= len(idle)
        return idle

    def disconnect(self, deadline: float) -> None:
        """Take leave of the server."""
        with self._changed:
            idle = self._forget_idle()
        for connection in idle:
            connection.disconnect(min(deadline, time.monotonic() + GOODBYE_TIMEOUT))

    def close(self) -> None:
        """End, without waiting for anyone: those that are lent end when they come back."""
        with self._changed:
            self._closed = True
            self._close_idle()
            self._changed.notify_all()


def _most(connection: Connection) -> int:
    return MOST if connection.export.can_multi_conn else 1
