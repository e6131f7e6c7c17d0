"""A destination at the other end of a pipe, and that other end.

The source's end is :class:`RemoteDestination`, the destination's is :func:`receive`, which drives a destination of its
own. Whoever of the two starts is settled so: the destination starts when START has come whole, and at no other time;
before that, whatever ends the pipe, or a silence, makes it as it was before. The source may therefore go on after any
failure up to the moment at which all of START has left. From then on only an answer tells; where none comes, the source
must not go on (UnconfirmedError).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from vfio_user.errors import MigrationError, StreamError, VfioUserError
from vfio_user.live import stream
from vfio_user.live.destination import Destination, UnconfirmedError
from vfio_user.live.link import LAST_WORDS, FailedError, Lane, Link, SourceLink
from vfio_user.live.memory import TornMemory
from vfio_user.live.offer import MAX_DEVICES, MAX_MEMORY_REGIONS, Offer
from vfio_user.live.pipes import Pipe
from vfio_user.live.stream import (
    MAX_PAYLOAD,
    MAX_TORN,
    ORDER,
    ORDER_BESIDE,
    Acceptance,
    Codec,
    Kind,
    Octets,
    Proposal,
    Record,
    State,
)

_T = TypeVar("_T")

TIMEOUT = 30.0
"""Seconds in which a record must come or go whole."""
_ZEROS = memoryview(bytes(MAX_PAYLOAD))


class RemoteDestination:
    """A :class:`Destination` at the other end of ``pipe``, where :func:`receive` is at work.

    ``memory_pipes``: more pipes to there, which then carry the guest's memory, all of them at once. The pipes are this
    object's from now on, and closed when the migration is over, well or not. ``timeout``: seconds in which an answer
    must come, and what is sent must be taken. With ``compress``, what moves is compressed if the other side knows how,
    too; raises UsageError where this side does not.

    A context manager: leaving it before the destination was started makes that be as before.
    """

    def __init__(
        self, pipe: Pipe, *, memory_pipes: Sequence[Pipe] = (), compress: bool = False, timeout: float = TIMEOUT
    ) -> None:
        self._compressions = ["zstd"] if compress else []
        for name in self._compressions:
            stream.codec(name)
        token = secrets.token_bytes(16)
        self._link = SourceLink(pipe, timeout, token)
        self._beside = [SourceLink(one, timeout, token, number) for number, one in enumerate(memory_pipes, 1)]
        self._lanes = [Lane(link) for link in self._beside]
        self._codecs: list[Codec | None] = [None] * (1 + len(self._beside))
        self._pipe = pipe
        self._settled = 0
        self._accepted = self._failed = self._may_run = False

    def check(self, offer: Offer) -> None:
        proposal = msgspec.json.encode(Proposal(offer, self._compressions, len(self._lanes)))
        if len(proposal) > stream.MAX_JSON:
            raise MigrationError(f"what is to move takes {len(proposal)} bytes to describe, more than a record holds")
        with self._working():
            answer = _decoded(self._link.ask(Kind.OFFER, Kind.ACCEPT, proposal), Acceptance)
            if answer.compression is not None:
                if answer.compression not in self._compressions:
                    raise StreamError("the destination wants a compression that it was not offered")
                self._codecs = [stream.codec(answer.compression) for _ in self._codecs]  # a thread each
            self._accepted = True

    def begin(self) -> None:
        with self._working():
            self._link.ask(Kind.BEGIN, Kind.BEGUN)

    def write_memory(self, address: int, data: memoryview) -> None:
        while data:
            place, within = divmod(address, MAX_PAYLOAD)
            piece = data[: MAX_PAYLOAD - within]
            self._write_piece(place, address, piece)
            address, data = address + len(piece), data[len(piece) :]

    def _write_piece(self, place: int, address: int, piece: memoryview) -> None:
        """A page goes through the same pipe every time, and so its last contents arrive last."""
        if not self._lanes:
            with self._working():
                self._link.tell_memory(address, piece, self._codecs[0])
            return
        number = place % len(self._lanes)
        self._lanes[number].submit(self._beside[number].tell_memory, address, piece, self._codecs[1 + number])

    def write_device(self, number: int, data: memoryview) -> None:
        with self._working():
            for start in range(0, len(data), MAX_PAYLOAD):
                piece = data[start : start + MAX_PAYLOAD]
                self._link.tell(stream.pack_bulk(Kind.DEVICE, piece, self._codecs[0], number=number))

    def settle(self) -> None:
        self._settled = (self._settled + 1) % (1 << 32)
        for lane, link, codec in zip(self._lanes, self._beside, self._codecs[1:], strict=True):
            lane.submit(link.settle, self._settled, codec)
        with self._working():
            self._link.settle(self._settled, self._codecs[0])
        for lane in self._lanes:
            lane.finish()

    def load(self) -> None:
        for lane, link in zip(self._lanes, self._beside, strict=True):
            lane.submit(link.tell, stream.pack(Kind.END))
            lane.finish()
        with self._working():
            self._link.ask(Kind.LOAD, Kind.LOADED)

    def start(self) -> None:
        begin = self._pipe.sent
        self._may_run = True  # before it is asked: an interrupt may come between any two steps
        with self._working():
            try:
                self._link.ask(Kind.START, Kind.STARTED)
            except FailedError:
                self._may_run = False
                raise
            except (VfioUserError, OSError) as error:
                if self._pipe.sent - begin < stream.HEADER_SIZE:
                    self._may_run = False  # not all of START has left
                    raise
                raise _unconfirmed(error) from error
            except BaseException as error:
                raise _unconfirmed(error) from error
            with contextlib.suppress(VfioUserError, OSError):  # it is good news only
                self._link.send(stream.pack(Kind.END))
        self.close()

    def abort(self) -> None:
        try:
            if self._may_run:
                raise UnconfirmedError("the destination was told to start, and may run")
            if self._failed or not self._accepted:
                return
            if self._pipe.closed:
                raise MigrationError("the pipe is closed: the destination was left to reset itself")
            with self._working():
                self._link.ask(Kind.ABORT, Kind.ABORTED)
        finally:
            self.close()

    def close(self) -> None:
        """Close the pipes; a destination that was not started makes itself be as before."""
        self._pipe.close()
        for lane in self._lanes:
            lane.close()
        for link in (self._link, *self._beside):
            link.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """After any failure nobody knows where in the stream the pipe is: it is closed."""
        try:
            yield
        except BaseException as error:
            self._failed |= isinstance(error, FailedError)
            self.close()
            raise


def _unconfirmed(error: BaseException) -> UnconfirmedError:
    why = str(error) or type(error).__name__
    return UnconfirmedError(f"the destination was told to start, and whether it did is not known: {why}")


@dataclass(slots=True)
class Arrival:
    """What came through a pipe. Sizes in bytes, before compression; ``seconds`` from the offer until it ran."""

    devices: int = 0
    memory_bytes: int = 0
    zero_bytes: int = 0
    """Of these, what was zero and only named."""
    device_bytes: int = 0
    compression: str | None = None
    seconds: float = 0.0
    confirmed: bool = False
    """Whether the source knows that the destination runs."""


def receive(
    pipe: Pipe, destination: Destination, *, memory_pipes: Sequence[Pipe] = (), timeout: float = TIMEOUT
) -> Arrival:
    """Take what a :class:`RemoteDestination` at the other end of ``pipe`` sends, for ``destination``.

    When it returns, the destination runs, and goes on to run whatever becomes of the pipe. Otherwise it raises
    MigrationError, after having the destination be as before. The pipes are closed in the end.

    ``memory_pipes``: as many as the source has, in any order; ``write_memory`` and ``settle`` of the destination are
    called by a thread for each.

    ``timeout``: seconds in which every record must come, and so the longest that the source may be silent, between
    two rounds or in its ``pause``. Nothing of what comes is believed: it is bounded, checked, and taken in the one
    order that there is. Of each pipe at most two records are kept at any time.
    """
    with ExitStack() as stack:
        for one in (pipe, *memory_pipes):
            stack.enter_context(one)
        receiver = _Receiver(pipe, memory_pipes, destination, timeout)
        stack.callback(receiver.close_lanes)
        return receiver.run()


class _GivenUpError(MigrationError):
    """The source does not want to go on."""


class _Receiver:
    def __init__(self, pipe: Pipe, memory_pipes: Sequence[Pipe], destination: Destination, timeout: float) -> None:
        self._link = Link(pipe, timeout)
        self._timeout = timeout
        self._memory_pipes = memory_pipes
        self._lanes: list[Lane] = []
        self._counting = threading.Lock()
        self._torn = TornMemory()
        self._destination = destination
        self._state = State.OPEN
        self._began = False
        self._offer = Offer([], [])
        self._arrival = Arrival()
        self._handlers: dict[Kind, Callable[[Record], None]] = {
            Kind.OFFER: self._check,
            Kind.BEGIN: self._begin,
            Kind.MEMORY: partial(self._memory, self._link),
            Kind.ZERO: self._zero,
            Kind.DEVICE: self._device,
            Kind.SETTLE: partial(self._settle, self._link),
            Kind.LOAD: self._load,
            Kind.START: self._start,
            Kind.ABORT: self._abort,
        }

    def run(self) -> Arrival:
        started = time.monotonic()
        try:
            while self._state is not State.STARTED:
                self._take(self._link.receive())
        except UnconfirmedError:
            raise  # our destination is remote itself: there is no answer for the source either
        except BaseException as error:
            text = self._give_up(error)
            if isinstance(error, (VfioUserError, OSError)):
                raise MigrationError(text) from error
            raise
        self._arrival.seconds = time.monotonic() - started
        # An interrupt ends only the wait for an answer that changes nothing.
        with contextlib.suppress(VfioUserError, OSError, KeyboardInterrupt):
            self._link.send(stream.pack(Kind.STARTED))
            self._arrival.confirmed = self._link.receive().kind is Kind.END
        return self._arrival

    def _take(self, record: Record) -> None:
        following = _following(ORDER, self._state, record)
        self._handlers[record.kind](record)
        self._state = following

    def _check(self, record: Record) -> None:
        proposal = _decoded(record, Proposal)
        offer = proposal.offer
        if len(offer.devices) > MAX_DEVICES or len(offer.memory) > MAX_MEMORY_REGIONS:
            raise StreamError(f"{len(offer.devices)} devices and {len(offer.memory)} pieces of memory are too many")
        if proposal.memory_pipes != len(self._memory_pipes):
            raise MigrationError(
                f"the source has {proposal.memory_pipes} more pipes, here are {len(self._memory_pipes)}"
            )
        self._destination.check(offer)
        self._offer = offer
        self._arrival.devices = len(offer.devices)
        known = stream.compressions()
        compression = next((name for name in proposal.compressions if name in known), None)
        if compression is not None:
            self._link.reader.codec = stream.codec(compression)
            self._arrival.compression = compression
        self._link.send(stream.pack(Kind.ACCEPT, msgspec.json.encode(Acceptance(compression))))

    def _begin(self, record: Record) -> None:
        self._began = True
        self._destination.begin()
        for number, pipe in enumerate(self._memory_pipes, 1):
            link = Link(pipe, self._timeout, self._link.reader.token, number, self._link.activity)
            if self._arrival.compression is not None:
                link.reader.codec = stream.codec(self._arrival.compression)
            self._lanes.append(Lane(link))
            self._lanes[-1].submit(self._receive_memory, link)
        self._link.send(stream.pack(Kind.BEGUN))

    def _receive_memory(self, link: Link) -> None:
        """What a thread does with a pipe of memory alone, until that ends well."""
        handlers: dict[Kind, Callable[[Record], None]] = {
            Kind.MEMORY: partial(self._memory, link),
            Kind.ZERO: self._zero,
            Kind.SETTLE: partial(self._settle, link),
        }
        state = State.FILLING
        try:
            while state is State.FILLING:
                record = link.receive()
                state = _following(ORDER_BESIDE, state, record)
                if record.kind in handlers:
                    handlers[record.kind](record)
        except BaseException as error:
            _say_why(link, error, stream.pack_text(Kind.FAILED, _in_words(error)))
            raise

    def close_lanes(self) -> None:
        for lane in self._lanes:
            lane.close()

    def _memory(self, link: Link, record: Record) -> None:
        if not record.torn:
            self._write_memory(record, record.payload)
            return
        link.torn.add(record.address)
        if len(link.torn) > MAX_TORN:
            raise StreamError(f"more than {MAX_TORN} records of memory came torn")
        with self._counting:
            self._torn.add(self._region(record), record.address, record.size)

    def _zero(self, record: Record) -> None:
        self._write_memory(record, _ZEROS[: record.size])
        with self._counting:
            self._arrival.zero_bytes += record.size

    def _write_memory(self, record: Record, data: memoryview) -> None:
        region = self._region(record)
        self._destination.write_memory(record.address, data)
        with self._counting:
            self._torn.heal(region, record.address, record.size)
            self._arrival.memory_bytes += record.size

    def _region(self, record: Record) -> tuple[int, int]:
        """The (address, size) of the memory that was offered and has that of the record inside."""
        start, end = record.address, record.address + record.size
        for first, size in self._offer.memory:
            if first <= start and end <= first + size:
                return first, size
        raise StreamError(f"{record.size:#x} bytes at {start:#x} are not inside the guest's memory")

    def _device(self, record: Record) -> None:
        if record.number >= len(self._offer.devices):
            raise StreamError(f"there is no device {record.number}")
        self._destination.write_device(record.number, record.payload)
        self._arrival.device_bytes += record.size

    def _settle(self, link: Link, record: Record) -> None:
        self._destination.settle()
        torn, link.torn = link.torn, set()
        link.send(stream.pack_settled(record.number, torn))

    def _load(self, record: Record) -> None:
        for lane in self._lanes:
            lane.finish()
        if (torn := self._torn.first) is not None:
            raise StreamError(f"memory at {torn:#x} came torn, and did not come again")
        self._destination.load()
        self._link.send(stream.pack(Kind.LOADED))

    def _start(self, record: Record) -> None:
        if self._link.reader.pending:
            raise StreamError(f"{self._link.reader.pending} bytes behind START, which the source sends last")
        self._destination.start()

    def _abort(self, record: Record) -> None:
        raise _GivenUpError("the source gave the migration up")

    def _give_up(self, error: BaseException) -> str:
        """Have the destination be as before, and say so to the source; why it ended, in words."""
        failures = [error, *(lane.failure for lane in self._lanes)]
        text = "; ".join(_in_words(failure) for failure in dict.fromkeys(failures) if failure is not None)
        kind = Kind.FAILED if self._began else Kind.REFUSED
        try:
            self.close_lanes()  # nobody writes memory any more
            if self._began:
                self._destination.abort()
            if isinstance(error, _GivenUpError):
                kind = Kind.ABORTED
        except (VfioUserError, OSError) as failure:
            text = f"{text}; {_in_words(failure)}"
        _say_why(self._link, error, stream.pack(kind) if kind is Kind.ABORTED else stream.pack_text(kind, text))
        return text


def _following(order: Mapping[State, Mapping[Kind, State]], state: State, record: Record) -> State:
    if (following := order[state].get(record.kind)) is None:
        raise StreamError(f"a {record.kind.name} record does not belong here: the migration is {state.value}")
    return following


def _in_words(error: BaseException) -> str:
    return stream.printable(str(error)) or type(error).__name__


def _say_why(link: Link, error: BaseException, answer: list[Octets]) -> None:
    """Send the last words, and take what still comes: closed before that, a socket would throw them away."""
    with contextlib.suppress(VfioUserError, OSError):
        link.send(answer, within=LAST_WORDS)
        scrap = memoryview(bytearray(1 << 16))
        deadline = time.monotonic() + LAST_WORDS
        while not isinstance(error, TimeoutError) and time.monotonic() < deadline:
            if not link.pipe.receive(scrap, deadline):
                return


def _decoded(record: Record, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(record.payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StreamError(f"{record.kind.name} record: {error}") from error
