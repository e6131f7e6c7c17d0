"""What the tests of migrations through pipes share."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any, Literal

from vfio_user import Client, DeviceState
from vfio_user.devices import edu
from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError
from vfio_user.fds import OwnedFd
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Offer, Status
from vfio_user.live.destination import nothing
from vfio_user.live.offer import DeviceOffer
from vfio_user.live.pipes import FdPipe, Pipe, SocketPipe
from vfio_user.live.remote import Arrival, RemoteDestination, receive
from vfio_user.live.stream import HEADER_SIZE, PREAMBLE_SIZE, Kind

from .test_live import served

PAGE = 4096
MEMORY = 16 * PAGE
TIMEOUT = 10.0
"""Seconds after which something that must happen has not happened."""
SOON = 0.2
"""Seconds of silence that a test waits for."""


class Guest:
    """A device, its client, and guest memory that the device can reach."""

    def __init__(self, client: Client, fd: OwnedFd) -> None:
        self.client, self.fd = client, fd
        self.memory = memoryview(mmap(fd.fileno(), MEMORY))
        client.dma_map(0, MEMORY, fd.fileno())

    @property
    def regions(self) -> list[MemoryRegion]:
        return [MemoryRegion(0, self.memory)]

    @property
    def state(self) -> DeviceState:
        return self.client.migration_get_state()

    @property
    def liveness(self) -> int:
        return int.from_bytes(self.client.region_read(0, edu.LIVENESS, 4), "little")

    @liveness.setter
    def liveness(self, value: int) -> None:
        self.client.region_write(0, edu.LIVENESS, (~value & 0xFFFFFFFF).to_bytes(4, "little"))


@contextmanager
def guest(path: Path) -> Iterator[Guest]:
    with served(Edu(), path) as client, OwnedFd(os.memfd_create(path.name)) as fd:
        os.ftruncate(fd.fileno(), MEMORY)
        yield Guest(client, fd)


@contextmanager
def two_guests(tmp_path: Path) -> Iterator[tuple[Guest, Guest]]:
    """A source and a destination."""
    with guest(tmp_path / "source") as source, guest(tmp_path / "destination") as destination:
        yield source, destination


class Receiver(threading.Thread):
    """:func:`receive` in a thread; its outcome."""

    def __init__(self, pipe: Pipe, destination: Any, timeout: float = TIMEOUT, lanes: Sequence[Pipe] = ()) -> None:
        super().__init__()
        self._lanes = lanes
        self.arrival: Arrival | None = None
        self.error: BaseException | None = None
        self._pipe, self._destination, self._timeout = pipe, destination, timeout
        self.start()

    def run(self) -> None:
        try:
            self.arrival = receive(self._pipe, self._destination, timeout=self._timeout, memory_pipes=self._lanes)
        except BaseException as error:
            self.error = error

    def ended(self) -> Arrival | None:
        """What arrived, or None if it failed."""
        self.join(TIMEOUT)
        assert not self.is_alive()
        return self.arrival


def local(side: Guest, *, resume: Callable[[], None] = nothing) -> LocalDestination:
    return LocalDestination([side.client], side.regions, resume=resume)


def migration(source: Guest, to: RemoteDestination, **options: Any) -> Migration:
    return Migration([source.client], to, memory=source.regions, **options)


@contextmanager
def socket_pipes() -> Iterator[tuple[Pipe, Pipe]]:
    here, there = socket.socketpair()
    with SocketPipe(here) as one, SocketPipe(there) as other:
        yield one, other


@contextmanager
def fd_pipes() -> Iterator[tuple[Pipe, Pipe]]:
    ours, theirs = [[OwnedFd(fd) for fd in os.pipe()] for _ in range(2)]
    with FdPipe(ours[0], theirs[1]) as one, FdPipe(theirs[0], ours[1]) as other:
        yield one, other


def expect_moved(source: Guest, destination: Guest) -> None:
    assert (source.state, destination.state) == (DeviceState.STOP, DeviceState.RUNNING)
    assert destination.memory == source.memory
    assert destination.liveness == 0x1234


def expect_not_moved(source: Guest, destination: Guest) -> None:
    assert (source.state, destination.state) == (DeviceState.RUNNING, DeviceState.RUNNING)
    assert (source.liveness, destination.liveness) == (0x1234, 0)


def fill(source: Guest) -> None:
    source.memory[:] = bytes(3 * PAGE) + bytes(range(256)) * 16 + bytes(MEMORY - 5 * PAGE) + b"end " * 1024
    source.liveness = 0x1234


class Cut(threading.Thread):
    """Between the two ends: hands on what they say, and cuts both directions after so many bytes of one."""

    def __init__(self, direction: Literal["there", "back"] = "there", after: float = float("inf")) -> None:
        super().__init__()
        self.said: dict[str, bytearray] = {"there": bytearray(), "back": bytearray()}
        self._direction, self._after = direction, after
        self._here, here = socket.socketpair()
        self._there, there = socket.socketpair()
        self.pipes = SocketPipe(here), SocketPipe(there)
        self.start()

    def run(self) -> None:
        with self._here, self._there:
            back = threading.Thread(target=self._hand_on, args=(self._there, self._here, "back"))
            back.start()
            self._hand_on(self._here, self._there, "there")
            back.join()

    def _hand_on(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        left = self._after if name == self._direction else float("inf")
        try:
            while left > 0 and (data := source.recv(1 << 16)):
                data = data[: int(min(left, len(data)))]
                self.said[name] += data
                sink.sendall(data)
                left -= len(data)
        except OSError:
            pass
        if left <= 0:
            for one in (self._here, self._there):
                one.shutdown(socket.SHUT_RDWR)
        else:
            sink.shutdown(socket.SHUT_WR)


def record_starts(said: bytes) -> list[int]:
    """Where the records of one direction begin."""
    starts, at = [], PREAMBLE_SIZE
    while at < len(said):
        starts.append(at)
        (length,) = struct.unpack_from("<I", said, at + 20)
        at += HEADER_SIZE + length
    assert at == len(said)
    return starts


def kinds_of(said: bytes) -> list[int]:
    return [struct.unpack_from("<H", said, at)[0] for at in record_starts(said)]


@dataclass
class Outcome:
    status: Status
    arrived: bool


def run_cut(source: Guest, destination: Guest, cut: Cut) -> Outcome:
    here, there = cut.pipes
    receiver = Receiver(there, local(destination))
    job = migration(source, RemoteDestination(here, timeout=TIMEOUT), downtime=10)
    try:
        list(job.run())
    except MigrationError:
        assert job.report.error
    arrival = receiver.ended()
    cut.join(TIMEOUT)
    assert not cut.is_alive()
    return Outcome(job.report.status, arrival is not None)


def points(said: bytes) -> list[int]:
    """Where to cut: before, at each record's begin, and within its header and payload."""
    starts = record_starts(said)
    ends = [*starts[1:], len(said)]
    found = {0, 1, PREAMBLE_SIZE - 1}
    for start, end in zip(starts, ends, strict=True):
        found |= {start, start + 1, start + HEADER_SIZE - 1, (start + end) // 2, end - 1}
    return sorted(found)


OFFER = Offer([DeviceOffer("1234:5678 class 000000 rev 00", [(4096, 3)], [1], 1)], [(0, 2 * PAGE), (1 << 20, PAGE)])


@dataclass
class Recorder:
    """A destination that only takes notes."""

    calls: list[str] = field(default_factory=list)
    memory: dict[int, bytes] = field(default_factory=dict)
    data: bytes = b""

    def check(self, offer: Offer) -> None:
        offer.check(OFFER)
        self.calls.append("check")

    def begin(self) -> None:
        self.calls.append("begin")

    def write_memory(self, address: int, data: memoryview) -> None:
        self.memory[address] = bytes(data)

    def write_device(self, number: int, data: memoryview) -> None:
        assert number == 0
        self.data += data

    def settle(self) -> None:
        self.calls.append("settle")

    def load(self) -> None:
        self.calls.append("load")

    def start(self) -> None:
        self.calls.append("start")

    def abort(self) -> None:
        self.calls.append("abort")


def told(said: bytes, timeout: float = TIMEOUT) -> tuple[Recorder, Arrival | None, BaseException | None]:
    """What a destination makes of a source that says this, at once, and no more."""
    recorder = Recorder()
    here, there = socket.socketpair()
    with here:
        receiver = Receiver(SocketPipe(there), recorder, timeout)
        here.sendall(said)
        here.shutdown(socket.SHUT_WR)
        receiver.ended()
    return recorder, receiver.arrival, receiver.error


def record() -> bytes:
    """All that the source says in a small migration."""
    cut = Cut()
    here, there = cut.pipes
    receiver = Receiver(there, recorder := Recorder())
    to = RemoteDestination(here, timeout=TIMEOUT)
    to.check(OFFER)
    to.begin()
    to.write_memory(0, memoryview(bytes(PAGE) + b"a page" + bytes(40)))
    to.write_device(0, memoryview(b"state of the device"))
    to.settle()
    to.load()
    to.start()
    assert receiver.ended() is not None
    cut.join(TIMEOUT)
    assert recorder.calls == ["check", "begin", "settle", "load", "start"]
    assert recorder.memory == {0: bytes(PAGE), PAGE: b"a page" + bytes(40)}
    assert recorder.data == b"state of the device"
    return bytes(cut.said["there"])


def raw_record(kind: int, payload: bytes = b"", *, number: int = 0, address: int = 0, size: int = 0) -> bytes:
    fields = struct.pack("<HHIQIII", kind, 0, number, address, size or len(payload), len(payload), zlib.crc32(payload))
    return fields + struct.pack("<I", zlib.crc32(fields)) + payload


def parts(recorded: bytes) -> list[bytes]:
    """The preamble, and the records."""
    starts = record_starts(recorded)
    return [recorded[start:end] for start, end in itertools.pairwise([0, *starts, len(recorded)])]


class Tellable:
    """A destination made of what it says, whatever it is told."""

    def __init__(self, *answers: bytes) -> None:
        here, there = socket.socketpair()
        self.pipe = SocketPipe(here)
        self.peer = there
        self.answers = list(answers)

    def read_token(self) -> bytes:
        self.peer.settimeout(TIMEOUT)
        return self.peer.recv(PREAMBLE_SIZE, socket.MSG_WAITALL)[12:28]


def preamble(token: bytes, pipe: int = 0) -> bytes:
    fields = b"\x89VFLIVE\n" + struct.pack("<HH", 1, pipe) + token
    return fields + struct.pack("<I", zlib.crc32(fields))


ACCEPT = raw_record(Kind.ACCEPT, b"{}")


def accepted(one: Tellable, timeout: float) -> RemoteDestination:
    """A source whose offer was accepted; after that its destination says nothing."""
    to = RemoteDestination(one.pipe, timeout=TIMEOUT)
    speaker = threading.Thread(target=lambda: one.peer.sendall(preamble(one.read_token()) + ACCEPT))
    speaker.start()
    to.check(OFFER)
    speaker.join()
    to._link._timeout = timeout
    return to


LARGE = 8 << 20


class Memory(Recorder):
    """A destination with memory that takes any offer."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = bytearray(LARGE)

    def check(self, offer: Offer) -> None:
        self.calls.append("check")

    def write_memory(self, address: int, data: memoryview) -> None:
        self.contents[address : address + len(data)] = data
