"""A network block device: whatever serves NBD, by its URI (qemu-nbd, nbdkit, a cluster's block store).

The server decides who else may use the export: there is no lock in NBD.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from vfio_user.devices.nvme.storage.base import SECTOR, Views
from vfio_user.devices.nvme.storage.connections import Connections
from vfio_user.devices.nvme.storage.libnbd import FAST_ZERO, LONGEST, NO_HOLE, Connection

TIMEOUT = 20.0
"""Seconds for a command, reconnecting included: less than the 30 after which Linux gives one up."""
ZEROS = memoryview(bytearray(1 << 20))
GRANULE = 64 << 10
"""Bytes of a qcow2 image's cluster, unless asked for another: of less it gives no room back."""
CHANGES = {Connection.write, Connection.zero}

logger = logging.getLogger(__name__)
P = ParamSpec("P")


class NbdStorage:
    """The export that ``uri`` names (nbd_connect_uri(3): ``nbd://host/export``, ``nbd+unix:///export?socket=...``).

    Several commands are under way at once, each on a connection of its own, where the server says that a flush on
    one holds for all; else one. A connection that is lost is made again by the next call. What was written and not
    flushed before that may be lost with it: then flushes fail. A command takes ``timeout`` seconds at most.

    Raises OSError, which names the URI (ELIBACC: there is no libnbd on this machine), and ValueError for an export
    that is no disk or has another size than ``size``.
    """

    def __init__(self, uri: str, *, size: int | None = None, read_only: bool = False, timeout: float = TIMEOUT) -> None:
        self.name = uri
        self._timeout = timeout
        first = Connection(uri, self._deadline())
        self._export = first.export
        self.size, self.block_size = first.export.size, max(first.export.block_size, SECTOR)
        self.read_only = read_only or first.export.read_only
        self._connections = Connections(uri, self._reconnect, first)
        self._acquired = False
        self._flushing = threading.Lock()
        try:
            self._check_size(size)
        except ValueError:
            self.close()
            raise

    def _check_size(self, wanted: int | None) -> None:
        if wanted not in (None, self.size):
            raise ValueError(f"{self.name} has {self.size} bytes, not {wanted}: leave the size out")
        if not self.size or self.size % self.block_size:
            raise ValueError(f"{self.name}: {self.size} bytes are no disk: it must be a multiple of {self.block_size}")

    def _reconnect(self, deadline: float) -> Connection:
        connection = Connection(self.name, deadline)
        if (connection.export.size, connection.export.block_size) != (self._export.size, self._export.block_size):
            connection.close()
            raise OSError(errno.ESTALE, "is another export now than when it was opened", self.name)
        self._export = connection.export
        return connection

    def acquire(self) -> None:
        with self._flushing:
            if not self._acquired:
                with self._connections.one(self._deadline()):  # the server is there
                    pass
                if not (self._export.can_flush or self.read_only):
                    logger.warning("%s: its server cannot flush: how durable it is, is the server's affair", self.name)
            # What a flush that failed was to make durable is there still, perhaps; it waits for the next.
            self._acquired, self._connections.lost = True, 0

    def release(self) -> None:
        if self._acquired:
            self.flush()  # Connected it stays: qemu-nbd ends with its last client, unless told otherwise.
            self._acquired = False

    def read_now(self, offset: int, views: Views) -> bool:
        return False

    def read(self, offset: int, views: Views) -> None:
        if len(views) == 1:
            self._move(Connection.read, offset, views[0])
        else:  # one command and a copy cost less than a command each
            data = memoryview(bytearray(sum(map(len, views))))
            self._move(Connection.read, offset, data)
            for view in views:
                view[:], data = data[: len(view)], data[len(view) :]

    def write_now(self, offset: int, views: Views) -> bool:
        return False

    def write(self, offset: int, views: Views) -> None:
        self._check_writable()
        data = views[0] if len(views) == 1 else memoryview(bytearray().join(views))
        self._move(Connection.write, offset, data)

    def flush(self) -> None:
        # One at a time: what fails for one must not look like a success to another.
        with self._flushing:
            self._check_lost()
            if self._connections.unflushed and self._export.can_flush:
                try:
                    self._do(Connection.flush)
                except OSError as error:
                    self._connections.lost = error.errno or errno.EIO
                    raise
                self._connections.flushed()
                self._check_lost()  # it may have been a new connection's, after the one that had the writes was lost

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._check_writable()
        if self._export.can_zero:
            self._zero(offset, length, 0 if unmap else NO_HOLE)
        else:
            for start in range(0, length, len(ZEROS)):
                self._move(Connection.write, offset + start, ZEROS[: length - start])

    def discard(self, offset: int, length: int) -> None:
        # Not by NBD_CMD_TRIM: nobody knows what is read there afterwards, nor whether it stays the same.
        self._check_writable()
        if self._export.can_fast_zero and not self._zero_fast(offset, length):
            first, last = -(-offset // GRANULE) * GRANULE, (offset + length) // GRANULE * GRANULE
            self._zero_fast(first, last - first)

    def _zero_fast(self, offset: int, length: int) -> bool:
        """Whether the server could do it, all of it, faster than by writing."""
        try:
            self._zero(offset, length, FAST_ZERO)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    def _zero(self, offset: int, length: int, flags: int) -> None:
        for start in range(0, length, LONGEST):
            self._do(Connection.zero, offset + start, min(length - start, LONGEST), flags)

    def _move(
        self, command: Callable[[Connection, float, int, memoryview], None], offset: int, data: memoryview
    ) -> None:
        """Read or write ``data``, in as many commands as it takes."""
        longest = self._export.longest_data
        for start in range(0, len(data), longest):
            self._do(command, offset + start, data[start : start + longest])

    def _do(
        self, command: Callable[Concatenate[Connection, float, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Do it on a connection; if that was lost, once more on another: a server that was restarted is no error."""
        deadline = self._deadline()
        lend = self._connections.one_to_flush if command is Connection.flush else self._connections.one
        for last in (False, True):
            with lend(deadline) as connection:
                begun = time.monotonic()
                try:
                    command(connection, deadline, *args, **kwargs)
                except OSError as error:
                    if connection.alive:  # the server said so
                        raise
                    # Its server may be, too, with what that had not made durable.
                    self._connections.distrust(connection, error.errno or errno.ENOTCONN)
                    if last or isinstance(error, TimeoutError):
                        raise
                else:
                    if self._connections.believe(connection, begun if command in CHANGES else None):
                        return
        raise OSError(errno.ENOTCONN, "the connection was lost", self.name)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.name)

    def _check_lost(self) -> None:
        lost = self._connections.lost
        if lost:
            raise OSError(lost, "what was written may be lost: a flush failed, or the connection", self.name)

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def close(self) -> None:
        self._acquired = False
        self._connections.close()
