"""The connections to one NBD server, shared by threads, and what was written through them and waits for a flush.

A server's host may die without a word, and another take its address: a connection that is made then goes to the other
server, while the older ones seem to be there still. So two connections are known to go to the same server only where
each has answered something that was asked after the other was made: an address is one server's at a time.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
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

    ``lost`` is the errno of what may have lost something that was written and not flushed; it stays until it is set
    to 0.
    """

    def __init__(self, uri: str, connect: Callable[[float], Connection], first: Connection) -> None:
        self.lost = 0
        self._uri = uri
        self._connect = connect
        self._changed = threading.Condition()
        self._idle = [first]
        self._trusted = {first: time.monotonic()}  # and when each was made
        self._open = 1  # those that are lent, and those being made, too
        self._most = _most(first)
        self._closed = False
        # When the oldest write began that is not flushed, None without any; infinite where any connection may flush.
        self._oldest: float | None = None
        self._later: float | None = None  # the same, of the writes that ended after the last flush began
        self._kept = -math.inf  # connections that were made until then are kept for a flush, which waits for one

    @contextmanager
    def one(self, deadline: float) -> Iterator[Connection]:
        """A connection for as long as it lasts. One that is dead afterwards is forgotten."""
        connection = self._take(deadline)
        try:
            yield connection
        finally:
            self._give_back(connection)

    @contextmanager
    def one_to_flush(self, deadline: float) -> Iterator[Connection]:
        """As :meth:`one`, one where a flush holds for all that was written until now; for one caller at a time.

        It was made before the oldest of these writes began: their answers, and the flush's, show that it goes to the
        server that has them. Raises OSError also where there is no such one any more: ENOTCONN.
        """
        with self._changed:
            oldest, self._later = self._oldest, None
        if oldest is None or oldest == math.inf:
            connection = self._take(deadline)
        else:
            connection = self._take_made_until(oldest, deadline)
        try:
            yield connection
        finally:
            self._give_back(connection)

    def _take(self, deadline: float) -> Connection:
        while True:
            with self._changed:
                self._wait(self._can_take, deadline)
                idle = self._idle_for_anyone()
                if idle is not None:
                    self._idle.remove(idle)
                    return idle
                self._open += 1
                others = self._open - 1
            connection = self._further(deadline, others)
            if connection is not None:
                return connection

    def _take_made_until(self, moment: float, deadline: float) -> Connection:
        """As :meth:`_take`. Nobody else gets such a one first: where all are busy, none might ever be left over."""

        def idle_or_all_gone() -> bool:
            found = _made_until(moment, self._trusted, self._idle) is not None
            return self._closed or found or _made_until(moment, self._trusted, self._trusted) is None

        with self._changed:
            self._kept = moment
            try:
                self._wait(idle_or_all_gone, deadline)
            finally:
                self._kept = -math.inf
                self._changed.notify_all()
            connection = _made_until(moment, self._trusted, self._idle)
            if connection is None:
                raise OSError(errno.ENOTCONN, "the connection was lost", self._uri)
            self._idle.remove(connection)
            return connection

    def _wait(self, happened: Callable[[], bool], deadline: float) -> None:
        if not self._changed.wait_for(happened, deadline - time.monotonic()):
            raise TimeoutError(errno.ETIMEDOUT, "the server is still at what it was asked before", self._uri)
        if self._closed:
            raise OSError(errno.EBADF, "the storage was closed", self._uri)

    def _can_take(self) -> bool:
        return self._closed or self._open < self._most or self._idle_for_anyone() is not None

    def _idle_for_anyone(self) -> Connection | None:
        return next((one for one in reversed(self._idle) if self._trusted[one] > self._kept), None)

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
                self._trusted[connection] = time.monotonic()
            if not others:
                self._most = _most(connection)
            self._changed.notify_all()
        return connection

    def _give_back(self, connection: Connection) -> None:
        with self._changed:
            if not connection.alive:
                self._distrust(connection, errno.ENOTCONN)  # where nobody has said so: whoever had it was interrupted
            if connection in self._trusted:
                self._idle.append(connection)
            else:
                self._end([connection])
            self._changed.notify_all()

    def _end(self, connections: list[Connection]) -> None:
        for connection in connections:
            connection.close()
            self._trusted.pop(connection, None)
        self._open -= len(connections)

    def believe(self, connection: Connection, written: float | None) -> bool:
        """Whether the server that it goes to is, for all we know, there; else what it has done was done in vain.

        Where it is, what it has written waits for a flush from now on: a write that began at ``written``, or None.
        """
        with self._changed:
            if connection not in self._trusted:
                return False
            if written is not None:
                self._oldest, self._later = _earlier(self._oldest, written), _earlier(self._later, written)
            return True

    @property
    def unflushed(self) -> bool:
        return self._oldest is not None

    def flushed(self) -> None:
        """What was written before :meth:`one_to_flush` was asked waits no more, unless something is lost."""
        with self._changed:
            if not self.lost:
                self._oldest = self._later

    def distrust(self, connection: Connection, number: int) -> None:
        """It is dead, and a server that is gone for one is gone for all there are: lent ones end when they come back.

        What waits for a flush may be lost with it, by the error ``number``. No news where somebody else has found out
        already.
        """
        with self._changed:
            self._distrust(connection, number)

    def _distrust(self, connection: Connection, number: int) -> None:
        if connection not in self._trusted:
            return
        if self.unflushed:
            # Once somebody starts anew it waits still, perhaps at a server that is back: for whichever connection.
            self.lost, self._oldest = self.lost or number, math.inf
        self._drop_all()

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


def _made_until(moment: float, made: dict[Connection, float], among: Iterable[Connection]) -> Connection | None:
    return next((one for one in among if made[one] <= moment), None)


def _earlier(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)
