"""Records through a pipe, as the two ends of a migration exchange them; and the threads of pipes of memory alone."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from vfio_user.errors import CallTimeoutError, ConnectionClosedError, MigrationError, StreamError
from vfio_user.live import stream
from vfio_user.live.pipes import Pipe
from vfio_user.live.stream import LARGE, MAX_PAYLOAD, MAX_TORN, Codec, Kind, Octets, Record

LAST_WORDS = 2.0
"""Seconds for saying, and for hearing, why it ended."""
_QUEUED = 2
"""Pieces of memory that wait for a pipe: one is on its way, the next is there when that has gone."""


class FailedError(MigrationError):
    """The destination says that it does not run, and never will."""


class Activity:
    """When something came through any of the pipes of a migration, by time.monotonic."""

    def __init__(self) -> None:
        self.at = float("-inf")


class Link:
    """Records to and from the other end. ``token``: that of the migration, where this end knows it.

    ``number``: of a pipe of memory alone, from 1 on. ``activity``: that of all pipes; one may be silent between two
    records while another is not.
    """

    def __init__(
        self,
        pipe: Pipe,
        timeout: float,
        token: bytes | None = None,
        number: int = 0,
        activity: Activity | None = None,
    ) -> None:
        self.pipe = pipe
        self.activity = activity or Activity()
        self.reader = stream.RecordReader(beside=number > 0)
        self._number = number
        self._timeout = timeout
        self._token = token
        self._hailed = False
        self._exposed: list[tuple[int, memoryview]] = []  # memory that was sent as it lies there
        self.torn: set[int] = set()
        """What SETTLED will say next."""

    def send(self, *records: list[Octets], within: float | None = None) -> None:
        buffers = [buffer for record in records for buffer in record]
        if not self._hailed:
            buffers.insert(0, stream.pack_preamble(self._token or self.reader.token or bytes(16), self._number))
            self._hailed = True
        self.pipe.send(buffers, self._deadline(within))

    def receive(self, within: float | None = None) -> Record:
        """The next record."""
        deadline = self._deadline(within)
        while (record := self._next()) is None:
            try:
                self._received(self.pipe.receive(self.reader.space(), deadline))
            except CallTimeoutError:
                deadline = self.activity.at + self._timeout
                if self.reader.mid_record or within is not None or deadline <= time.monotonic():
                    raise
        return record

    def receive_now(self) -> Record | None:
        """The next record if it is there."""
        while (record := self._next()) is None:
            if (count := self.pipe.receive_now(self.reader.space())) is None:
                return None
            self._received(count)
        return record

    def _next(self) -> Record | None:
        record = self.reader.next()
        if record is not None and self._token is not None and self.reader.token != self._token:
            raise StreamError("what comes belongs to another migration")
        return record

    def _received(self, count: int) -> None:
        if not count:
            where = " within a record" if self.reader.mid_record else ""
            raise ConnectionClosedError(f"the pipe ends{where}{self.pipe.epilogue()}")
        self.reader.received(count)
        self.activity.at = time.monotonic()

    def _deadline(self, within: float | None) -> float:
        return time.monotonic() + (self._timeout if within is None else within)


class SourceLink(Link):
    """The source's end: it asks, and is answered."""

    def ask(self, kind: Kind, answer: Kind, payload: bytes = b"", *, number: int = 0) -> Record:
        """Send, and wait for the answer. Raises FailedError for the destination's refusal."""
        self.tell(stream.pack(kind, payload, number=number))
        return _answered(self.receive(), answer, number)

    def tell(self, *records: list[Octets]) -> None:
        """Send, unless the destination has something to say, which can only be that it failed."""
        if (record := self.receive_now()) is not None:
            _answered(record, None)
        try:
            self.send(*records)
        except ConnectionClosedError:
            with contextlib.suppress(ConnectionClosedError, TimeoutError, StreamError):
                _answered(self.receive(LAST_WORDS), None)
            raise

    def tell_memory(self, address: int, data: memoryview, codec: Codec | None) -> None:
        """Send guest memory, at most MAX_PAYLOAD of it. The guest may write meanwhile, and until it is settled."""
        if len(self._exposed) > MAX_TORN - MAX_PAYLOAD // LARGE:
            self.settle(0, codec)
        self.tell(*stream.pack_memory(address, data, codec, self._exposed))

    def settle(self, number: int, codec: Codec | None) -> None:
        """Return when all memory has arrived whole: what was written to on its way is sent again, as a copy."""
        torn = self._missing(number)
        sent, self._exposed = self._exposed, []
        if not torn:
            return
        for address, data in sent:
            if address in torn:
                self.tell(stream.pack_bulk(Kind.MEMORY, bytes(data), codec, address=address))
        if damaged := torn.difference(address for address, _ in sent) | self._missing(number):
            raise StreamError(f"memory at {min(damaged):#x} is damaged on its way")

    def _missing(self, number: int) -> frozenset[int]:
        """Where memory came torn since this was asked before."""
        return frozenset(self.ask(Kind.SETTLE, Kind.SETTLED, number=number).addresses)

    def forget(self) -> None:
        """Keep no guest memory any more."""
        self._exposed = []


def _answered(record: Record, expected: Kind | None, number: int = 0) -> Record:
    if record.kind in (Kind.REFUSED, Kind.FAILED):
        raise FailedError(record.text)
    if record.kind is not expected or record.number != number:
        raise StreamError(f"the destination answers {record.kind.name} out of turn")
    return record


class Lane:
    """A pipe of memory alone, and the thread that it has for itself. What fails there is raised by a later call."""

    def __init__(self, link: Link) -> None:
        self._pipe = link.pipe
        self._pool = ThreadPoolExecutor(1, "vfio-user-memory")
        self._pending: deque[Future[object]] = deque()

    def submit(self, work: Callable[..., object], *arguments: object) -> None:
        """Have it done after what was submitted before; waits while there is enough of that."""
        if len(self._pending) == _QUEUED:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work, *arguments))

    def finish(self) -> None:
        """Wait until all is done."""
        while self._pending:
            self._pending.popleft().result()

    @property
    def failure(self) -> BaseException | None:
        """What went wrong so far."""
        done = [future for future in self._pending if future.done() and not future.cancelled()]
        return next(filter(None, (future.exception() for future in done)), None)

    def close(self) -> None:
        """End it, whatever it is at; close the pipe."""
        self._pipe.interrupt()
        self._pool.shutdown(cancel_futures=True)
        self._pipe.close()
