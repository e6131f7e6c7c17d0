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


class Connections:
    """Lends connections, and makes more with ``connect(deadline)`` when all are lent.

    ``first`` is one of them. Deadlines are of time.monotonic(). Raises OSError: what ``connect`` raises; ETIMEDOUT
    where all are lent until the deadline; EBADF once it is closed.
    """

    def __init__(self, uri: str, connect: Callable[[float], Connection], first: Connection) -> None:
        self._uri = uri
        self._connect = connect
        self._changed = threading.Condition()
        self._idle = [first]
        self._trusted = {first}
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
                    raise TimeoutError(errno.ETIMEDOUT, "the server is still at what it was asked before", self._uri)
                if self._closed:
                    raise OSError(errno.EBADF, "the storage was closed", self._uri)
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
        with self._changed:
            if not self._closed:
                self._trusted.add(connection)
            if not others:
                self._most = _most(connection)
            self._changed.notify_all()
        return connection

    def _give_back(self, connection: Connection) -> None:
        with self._changed:
            if connection in self._trusted and connection.alive:
                self._idle.append(connection)
            else:
                self._end([connection])
            self._changed.notify_all()

    def _end(self, connections: list[Connection]) -> None:
        for connection in connections:
            connection.close()
        self._open -= len(connections)
        self._trusted.difference_update(connections)

    def trusts(self, connection: Connection) -> bool:
        """Whether the server that it goes to is, for all we know, there."""
        with self._changed:
            return connection in self._trusted

    def distrust(self, connection: Connection) -> bool:
        """It is dead, and a server that is gone for one is gone for all there are: lent ones end when they come back.

        Returns whether it was trusted until now: False where somebody else has found out already.
        """
        with self._changed:
            if connection not in self._trusted:
                return False
            self._drop_all()
            return True

    def _drop_all(self) -> None:
        self._trusted.clear()
        idle, self._idle = self._idle, []
        self._end(idle)
        self._changed.notify_all()

    def close(self) -> None:
        """End, without waiting for anyone: those that are lent end when they come back."""
        with self._changed:
            self._closed = True
            self._drop_all()


def _most(connection: Connection) -> int:
    return MOST if connection.export.can_multi_conn else 1
