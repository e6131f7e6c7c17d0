"""A migration through a pipe: what arrives, and that exactly one side runs wherever the pipe is cut."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import Client, DeviceState
from vfio_user.devices import edu
from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError, UsageError
from vfio_user.fds import OwnedFd
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Offer, Status, Step, UnconfirmedError
from vfio_user.live.destination import nothing
from vfio_user.live.link import Activity, Link
from vfio_user.live.offer import DeviceOffer
from vfio_user.live.pipes import FdPipe, Pipe, SocketPipe, TlsPipe
from vfio_user.live.remote import Arrival, RemoteDestination, receive
from vfio_user.live.stream import HEADER_SIZE, PREAMBLE_SIZE, Kind
from vfio_user.testing.leaks import no_fd_leaks

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


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Guest, Guest]]:
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


# ---------------------------------------------------------------- what arrives


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("pipes", [socket_pipes, fd_pipes])
def test_device_and_memory_arrive(sides: tuple[Guest, Guest], pipes: Any, compress: bool) -> None:
    if compress:
        pytest.importorskip("zstandard")
    source, destination = sides
    destination.memory[:] = b"\xff" * MEMORY  # what is zero at the source must become so here
    fill(source)
    with pipes() as (here, there), no_fd_leaks():
        receiver = Receiver(there, local(destination))
        job = migration(source, RemoteDestination(here, compress=compress, timeout=TIMEOUT))
        list(job.run())
        arrival = receiver.ended()
    assert job.report.status is Status.COMPLETED
    assert arrival is not None
    assert (arrival.devices, arrival.confirmed, arrival.memory_bytes) == (1, True, MEMORY)
    assert arrival.zero_bytes == MEMORY - 2 * PAGE
    assert arrival.device_bytes == job.report.device_state_bytes
    assert arrival.compression == ("zstd" if compress else None)
    assert here.sent < 2 * PAGE + arrival.device_bytes + 2000
    expect_moved(source, destination)


def test_both_go_on_without_a_compression_that_one_does_not_have(
    sides: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard")
    source, destination = sides
    fill(source)
    monkeypatch.setattr("vfio_user.live.stream.compressions", list)
    with socket_pipes() as (here, there):
        receiver = Receiver(there, local(destination))
        list(migration(source, RemoteDestination(here, compress=True)).run())
        arrival = receiver.ended()
    assert arrival is not None
    assert arrival.compression is None
    expect_moved(source, destination)


# ---------------------------------------------------------------- refused


def test_what_does_not_fit_is_refused_before_anything_changes(sides: tuple[Guest, Guest]) -> None:
    source, destination = sides
    fill(source)
    destination.liveness = 7
    with socket_pipes() as (here, there):
        receiver = Receiver(there, LocalDestination([destination.client], [MemoryRegion(0, destination.memory[:PAGE])]))
        job = migration(source, RemoteDestination(here))
        with pytest.raises(MigrationError, match="check failed: guest memory differs: 0x10000 bytes at 0x0 and 0x1000"):
            list(job.run())
        assert receiver.ended() is None
        assert here.closed
        assert there.closed
    assert isinstance(receiver.error, MigrationError)
    assert destination.liveness == 7


def refuse() -> None:
    raise OSError(5, "not today")


def test_a_destination_that_cannot_start_says_so_and_the_source_goes_on(sides: tuple[Guest, Guest]) -> None:
    source, destination = sides
    fill(source)
    with socket_pipes() as (here, there):
        receiver = Receiver(there, local(destination, resume=refuse))
        job = migration(source, RemoteDestination(here))
        with pytest.raises(MigrationError, match=r"start failed: .*not today"):
            list(job.run())
        assert receiver.ended() is None
    assert (job.report.status, job.report.step) == (Status.FAILED, Step.START)
    expect_not_moved(source, destination)


@pytest.mark.parametrize("step", [Step.LOGGING, Step.PRE_COPY, Step.PAUSE])
def test_a_source_that_gives_up_says_so(
    sides: tuple[Guest, Guest], step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = sides
    fill(source)
    options: dict[str, Any] = {}
    if step is Step.PAUSE:
        options["pause"] = refuse
    if step is Step.LOGGING:
        monkeypatch.setattr(source.client, "dma_logging_start", lambda *arguments: refuse())
    with socket_pipes() as (here, there):
        receiver = Receiver(there, local(destination))
        job = migration(source, RemoteDestination(here), **options)
        running = job.run()
        if step is Step.PRE_COPY:
            next(running)
            running.close()
        else:
            with pytest.raises(MigrationError):
                list(running)
        assert receiver.ended() is None
    assert str(receiver.error) == "the source gave the migration up"
    assert (job.report.status, job.report.step) == (Status.FAILED, step)
    assert "rolling back" not in str(job.report.error)
    expect_not_moved(source, destination)


def test_a_destination_that_was_not_reset_says_that_too(
    sides: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = sides
    monkeypatch.setattr(destination.client, "reset", refuse)
    with socket_pipes() as (here, there):
        receiver = Receiver(there, local(destination))
        job = migration(source, RemoteDestination(here), pause=refuse)
        with pytest.raises(MigrationError, match="pause failed"):
            list(job.run())
        assert receiver.ended() is None
    assert "cannot be reset" in str(job.report.error)
    assert "cannot be reset" in str(receiver.error)
    assert source.state == DeviceState.RUNNING


# ---------------------------------------------------------------- cut anywhere


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


@pytest.mark.timeout(180)
def test_exactly_one_side_runs_wherever_the_pipe_is_cut(sides: tuple[Guest, Guest]) -> None:
    source, destination = sides

    def prepare() -> None:
        for side in sides:
            side.client.migration_set_state(DeviceState.RUNNING)
            side.client.reset()
        fill(source)

    prepare()
    whole = Cut()
    assert run_cut(source, destination, whole) == Outcome(Status.COMPLETED, True)
    said = {name: bytes(data) for name, data in whole.said.items()}
    assert set(kinds_of(said["there"])) == {1, 2, 3, 4, 5, 6, 7, 8, 9}
    assert set(kinds_of(said["back"])) == {0x101, 0x102, 0x106, 0x107, 0x108}
    start_begins, start_ends = record_starts(said["there"])[-2:]
    started_begins = record_starts(said["back"])[-1]
    with no_fd_leaks():
        for direction in ("there", "back"):
            for after in points(said[direction]):
                prepare()
                outcome = run_cut(source, destination, Cut(direction, after))
                where = (direction, after, outcome)
                if outcome.status is Status.COMPLETED:
                    assert outcome.arrived, where
                    expect_moved(source, destination)
                    assert direction == "there", where
                    assert after >= start_ends, where
                elif outcome.status is Status.FAILED:
                    assert not outcome.arrived, where
                    expect_not_moved(source, destination)
                    assert after < start_ends if direction == "there" else after <= started_begins, where
                else:  # nothing runs at the source; the destination runs if START has come whole
                    assert source.state != DeviceState.RUNNING, where
                    if direction == "there":
                        assert start_begins <= after, where
                        assert outcome.arrived is (after >= start_ends), where
                    else:
                        assert after >= started_begins, where
                        assert outcome.arrived or after == started_begins, where


# ---------------------------------------------------------------- a hostile or a stopped peer


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


@pytest.fixture(scope="module")
def recorded() -> bytes:
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


def without_bytes_behind_start(said: bytes) -> bytes:
    """START is the last that a source says before it has an answer."""
    return said[: record_starts(said)[-1]]


def expect_refused(recorder: Recorder, arrival: Arrival | None, error: BaseException | None, where: object) -> None:
    assert arrival is None, where
    assert isinstance(error, MigrationError), where
    assert str(error), where
    assert "start" not in recorder.calls, where
    assert recorder.calls.count("abort") == recorder.calls.count("begin"), where


def test_every_flipped_byte_is_refused(recorded: bytes) -> None:
    said = without_bytes_behind_start(recorded)
    recorder, arrival, _ = told(said)
    assert arrival is not None
    assert not arrival.confirmed
    assert recorder.calls[-1] == "start"
    for at in range(len(said)):
        flipped = bytearray(said)
        flipped[at] ^= 1 << at % 8
        expect_refused(*told(bytes(flipped)), at)


def test_every_truncation_is_refused(recorded: bytes) -> None:
    said = without_bytes_behind_start(recorded)
    for end in range(len(said)):
        recorder, arrival, error = told(said[:end])
        expect_refused(recorder, arrival, error, end)
        assert "the pipe ends" in str(error), end


def test_what_comes_behind_start_before_its_answer_is_refused(recorded: bytes) -> None:
    for more in (b"x", recorded[-HEADER_SIZE:]):
        recorder, arrival, error = told(without_bytes_behind_start(recorded) + more)
        expect_refused(recorder, arrival, error, more)
        assert "behind START" in str(error)


def raw_record(kind: int, payload: bytes = b"", *, number: int = 0, address: int = 0, size: int = 0) -> bytes:
    fields = struct.pack("<HHIQIII", kind, 0, number, address, size or len(payload), len(payload), zlib.crc32(payload))
    return fields + struct.pack("<I", zlib.crc32(fields)) + payload


def parts(recorded: bytes) -> list[bytes]:
    """The preamble, and the records."""
    starts = record_starts(recorded)
    return [recorded[start:end] for start, end in itertools.pairwise([0, *starts, len(recorded)])]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (raw_record(Kind.MEMORY, b"x", address=2 * PAGE), "0x1 bytes at 0x2000 are not inside the guest's memory"),
        (raw_record(Kind.MEMORY, b"xy", address=2 * PAGE - 1), "not inside"),
        (raw_record(Kind.MEMORY, b"x", address=(1 << 20) - 1), "not inside"),
        (raw_record(Kind.ZERO, address=PAGE, size=2 * PAGE), "not inside"),
        (raw_record(Kind.ZERO, address=2**64 - 1, size=1), "not inside"),
        (raw_record(Kind.DEVICE, b"x", number=1), "there is no device 1"),
        (raw_record(Kind.START), "START record does not belong here: the migration is under way"),
        (raw_record(Kind.BEGIN), "BEGIN record does not belong here"),
        (raw_record(Kind.OFFER, b"{}"), "OFFER record does not belong here"),
        (raw_record(Kind.END), "END record does not belong here"),
        (raw_record(Kind.STARTED), "STARTED record does not belong here"),
        (raw_record(0x77), "unknown kind 0x77"),
    ],
)
def test_a_record_that_does_not_belong_there_is_refused(recorded: bytes, record: bytes, reason: str) -> None:
    preamble, offer, begin, *rest = parts(recorded)
    recorder, arrival, error = told(b"".join([preamble, offer, begin, record, *rest]))
    expect_refused(recorder, arrival, error, record)
    assert reason in str(error)
    assert recorder.memory == {}
    assert recorder.calls == ["check", "begin", "abort"]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "OFFER record"),
        (b"[" * 60_000, "OFFER record"),
        (b'{"offer": {"devices": [], "memory": [], "more": 1}}', "more"),
        (b'{"offer": {"devices": 1, "memory": []}}', "devices"),
        (b'{"offer": {"devices": [], "memory": [[0, 1e400]]}}', "OFFER record"),
        (b'{"offer": {"devices": [], "memory": [%s]}}' % b",".join([b"[0,0]"] * 1025), "too many"),
        (b'{"offer": {"devices": [], "memory": []}}', "0 devices are to move, the destination has 1"),
        (b"\xff\xfe", "OFFER record"),
    ],
)
def test_an_offer_that_is_none_is_refused(recorded: bytes, payload: bytes, reason: str) -> None:
    recorder, arrival, error = told(parts(recorded)[0] + raw_record(Kind.OFFER, payload))
    expect_refused(recorder, arrival, error, payload)
    assert reason in str(error)
    assert recorder.calls == []


@settings(deadline=None, max_examples=50)
@given(order=st.lists(st.integers(0, 9), max_size=12))
def test_in_no_other_order_does_it_start(recorded: bytes, order: list[int]) -> None:
    preamble, *records = parts(recorded)
    said = [records[number % len(records)] for number in order]
    recorder, arrival, error = told(preamble + b"".join(said))
    if arrival is None:
        expect_refused(recorder, arrival, error, order)
    else:
        kinds = [kinds_of(bytes(PREAMBLE_SIZE) + one)[0] for one in said]
        assert [kind for kind in kinds if kind not in (3, 4, 5, 6)] == [1, 2, 7, 8]


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


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda token: b"bash: vfio-user: command not found\n", "not a migration.*bash: vfio-user"),
        (lambda token: b"", "the pipe ends"),
        (lambda token: preamble(token)[:-1], "the pipe ends within a record"),
        (lambda token: preamble(bytes(16)) + ACCEPT, "another migration"),
        (lambda token: preamble(token) + raw_record(Kind.STARTED), "answers STARTED out of turn"),
        (lambda token: preamble(token) + raw_record(Kind.OFFER, b"{}"), "answers OFFER out of turn"),
        (lambda token: preamble(token) + raw_record(Kind.ACCEPT, b"?"), "ACCEPT record"),
        (lambda token: preamble(token) + raw_record(Kind.ACCEPT, b'{"compression": "zstd"}'), "was not offered"),
        (lambda token: preamble(token) + raw_record(Kind.REFUSED, b"no \x1b[31mroom"), "no \ufffd\\[31mroom"),
        (lambda token: preamble(token) + ACCEPT + raw_record(Kind.LOADED), None),
    ],
)
def test_a_hostile_destination_is_refused(answer: Callable[[bytes], bytes], reason: str | None) -> None:
    one = Tellable()
    with one.peer, no_fd_leaks():
        to = RemoteDestination(one.pipe, timeout=TIMEOUT)

        def say() -> None:
            one.peer.sendall(answer(one.read_token()))
            one.peer.shutdown(socket.SHUT_WR)

        speaker = threading.Thread(target=say)
        speaker.start()
        try:
            if reason is None:
                to.check(OFFER)
                speaker.join()
                with pytest.raises(MigrationError, match="answers LOADED out of turn"):
                    to.write_memory(0, memoryview(bytes(PAGE)))
            else:
                with pytest.raises((MigrationError, ConnectionError), match=reason):
                    to.check(OFFER)
        finally:
            speaker.join()
        assert one.pipe.closed


def accepted(one: Tellable, timeout: float) -> RemoteDestination:
    """A source whose offer was accepted; after that its destination says nothing."""
    to = RemoteDestination(one.pipe, timeout=TIMEOUT)
    speaker = threading.Thread(target=lambda: one.peer.sendall(preamble(one.read_token()) + ACCEPT))
    speaker.start()
    to.check(OFFER)
    speaker.join()
    to._link._timeout = timeout
    return to


def test_a_destination_that_takes_nothing_is_given_up() -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, SOON)
        with pytest.raises(TimeoutError, match="takes nothing"):
            to.write_memory(0, memoryview(b"x" * (64 << 20)))
        with pytest.raises(MigrationError, match="left to reset itself"):
            to.abort()


@pytest.mark.parametrize("ask", ["begin", "settle", "load"])
def test_a_destination_that_does_not_answer_is_given_up(ask: str) -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, SOON)
        with pytest.raises(TimeoutError, match="nothing comes"):
            getattr(to, ask)()
        with pytest.raises(ConnectionError, match="closed"):
            to.load()


def test_a_start_without_an_answer_is_unconfirmed() -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, SOON)
        with pytest.raises(UnconfirmedError, match="whether it did is not known"):
            to.start()
        with pytest.raises(UnconfirmedError):
            to.abort()


def test_a_start_that_cannot_leave_is_a_failure_like_any_other() -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, TIMEOUT)
        one.peer.close()
        with pytest.raises(ConnectionError) as caught:
            to.start()
        assert not isinstance(caught.value, UnconfirmedError)


def test_a_start_that_is_interrupted_is_unconfirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, TIMEOUT)

        def interrupted(*arguments: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(one.pipe, "receive", interrupted)
        with pytest.raises(UnconfirmedError, match="KeyboardInterrupt"):
            to.start()


@pytest.mark.parametrize("records", range(8))
def test_a_source_that_falls_silent_is_given_up(recorded: bytes, records: int) -> None:
    recorder = Recorder()
    here, there = socket.socketpair()
    with here:
        here.sendall(b"".join(parts(recorded)[:records]) + parts(recorded)[records][:-1])
        receiver = Receiver(SocketPipe(there), recorder, SOON)
        receiver.ended()
        expect_refused(recorder, receiver.arrival, receiver.error, records)
        assert "nothing comes from the other side: timed out" in str(receiver.error)


def test_an_interrupt_makes_the_destination_as_before(recorded: bytes) -> None:
    class Interrupted(Recorder):
        def load(self) -> None:
            raise KeyboardInterrupt

    recorder = Interrupted()
    here, there = socket.socketpair()
    with here:
        receiver = Receiver(SocketPipe(there), recorder)
        here.sendall(without_bytes_behind_start(recorded))
        here.shutdown(socket.SHUT_WR)
        receiver.ended()
    assert isinstance(receiver.error, KeyboardInterrupt)
    assert recorder.calls == ["check", "begin", "settle", "abort"]


def test_a_destination_that_is_remote_itself_passes_on_that_nothing_is_known(recorded: bytes) -> None:
    class Doubtful(Recorder):
        def start(self) -> None:
            raise UnconfirmedError("who knows")

    cut = Cut()
    here, there = cut.pipes
    receiver = Receiver(there, recorder := Doubtful())
    to = RemoteDestination(here, timeout=TIMEOUT)
    to.check(OFFER)
    to.begin()
    to.load()
    with pytest.raises(UnconfirmedError):
        to.start()
    receiver.ended()
    cut.join(TIMEOUT)
    assert isinstance(receiver.error, UnconfirmedError)
    assert recorder.calls == ["check", "begin", "load"]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return here, server.accept()[0]


@pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair])
def test_why_a_destination_fails_is_heard_while_much_is_on_its_way(pair: Any) -> None:
    class Full(Memory):
        def write_memory(self, address: int, data: memoryview) -> None:
            raise OSError(28, "no room for it")

    here, there = pair()
    with SocketPipe(here) as pipe:
        receiver = Receiver(SocketPipe(there), Full())
        to = RemoteDestination(pipe, timeout=TIMEOUT)
        to.check(Offer([], [(0, 64 << 20)]))
        to.begin()
        with pytest.raises(MigrationError, match="no room for it"):
            to.write_memory(0, memoryview(b"x" * (64 << 20)))
        to.abort()  # it said that it failed: there is nothing to undo, and nothing to complain of
        assert receiver.ended() is None


def test_the_last_words_of_a_destination_that_is_gone_are_heard() -> None:
    one = Tellable()
    to = accepted(one, TIMEOUT)

    def fail() -> None:
        with one.peer:
            one.peer.recv(1)  # a record is on its way, and will not get through
            one.peer.sendall(raw_record(Kind.FAILED, b"the end"))

    speaker = threading.Thread(target=fail)
    speaker.start()
    with pytest.raises(MigrationError, match="the end"):
        to.write_memory(0, memoryview(b"x" * (64 << 20)))
    speaker.join()


# ---------------------------------------------------------------- pipes of memory alone


def many_pipes(stack: ExitStack, count: int) -> tuple[list[Pipe], list[Pipe]]:
    pairs = [stack.enter_context(socket_pipes()) for _ in range(count)]
    return [here for here, _ in pairs], [there for _, there in pairs]


@pytest.mark.parametrize("compress", [False, True])
def test_memory_takes_several_pipes(sides: tuple[Guest, Guest], compress: bool) -> None:
    if compress:
        pytest.importorskip("zstandard")
    source, destination = sides
    fill(source)
    with ExitStack() as stack, no_fd_leaks():
        (here, *ours), (there, *theirs) = many_pipes(stack, 4)
        receiver = Receiver(there, local(destination), lanes=theirs[::-1])
        to = RemoteDestination(here, memory_pipes=ours, compress=compress, timeout=TIMEOUT)
        list(migration(source, to).run())
        arrival = receiver.ended()
        assert arrival is not None
        assert (arrival.memory_bytes, arrival.zero_bytes) == (MEMORY, MEMORY - 2 * PAGE)
        assert ours[0].sent > 0
    expect_moved(source, destination)


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


@settings(deadline=None, max_examples=50)
@given(
    writes=st.lists(
        st.tuples(st.integers(0, LARGE // PAGE - 1), st.integers(1, 600), st.integers(0, 255)), min_size=1, max_size=8
    ),
    count=st.integers(1, 3),
)
def test_the_last_contents_of_a_page_arrive_last(writes: list[tuple[int, int, int]], count: int) -> None:
    expected = bytearray(LARGE)
    with ExitStack() as stack:
        (here, *ours), (there, *theirs) = many_pipes(stack, 1 + count)
        receiver = Receiver(there, memory := Memory(), lanes=theirs)
        to = stack.enter_context(RemoteDestination(here, memory_pipes=ours, timeout=TIMEOUT))
        to.check(Offer([], [(0, LARGE)]))
        to.begin()
        for page, pages, value in writes:
            data = bytes([value]) * min(pages * PAGE, LARGE - page * PAGE)
            expected[page * PAGE : page * PAGE + len(data)] = data
            to.write_memory(page * PAGE, memoryview(data))
        to.settle()
        assert memory.contents == expected
        to.load()
        to.start()
        assert receiver.ended() is not None


def test_another_number_of_pipes_is_refused() -> None:
    with ExitStack() as stack:
        (here, *ours), (there, *theirs) = many_pipes(stack, 3)
        receiver = Receiver(there, Memory(), lanes=theirs[:1])
        to = stack.enter_context(RemoteDestination(here, memory_pipes=ours, timeout=TIMEOUT))
        with pytest.raises(MigrationError, match="the source has 2 more pipes, here are 1"):
            to.check(Offer([], []))
        assert receiver.ended() is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (lambda token: b"x" * 100, "not a migration"),
        (lambda token: preamble(token) + raw_record(Kind.SETTLE), "pipe 0 of a migration"),
        (lambda token: preamble(bytes(16), 1) + raw_record(Kind.SETTLE), "another migration"),
        (lambda token: preamble(token, 1) + raw_record(Kind.DEVICE, b"x"), "DEVICE record does not belong here"),
        (lambda token: preamble(token, 1) + raw_record(Kind.START), "START record does not belong here"),
        (lambda token: preamble(token, 1) + raw_record(Kind.MEMORY, b"x", address=LARGE), "not inside"),
        (lambda token: preamble(token, 1) + raw_record(Kind.MEMORY, b"x" * 9)[:-1], "the pipe ends within a record"),
        (lambda token: b"", "the pipe ends"),
    ],
)
def test_what_is_wrong_with_a_pipe_of_memory_ends_the_migration(said: Callable[[bytes], bytes], reason: str) -> None:
    here, there = socket.socketpair()
    ours, theirs = socket.socketpair()
    token = bytes(range(16))
    offer = b'{"offer": {"devices": [], "memory": [[0, %d]]}, "memory_pipes": 1}' % LARGE
    with here, ours:
        receiver = Receiver(SocketPipe(there), memory := Memory(), lanes=[SocketPipe(theirs)])
        here.sendall(preamble(token) + raw_record(Kind.OFFER, offer) + raw_record(Kind.BEGIN))
        ours.sendall(said(token))
        ours.shutdown(socket.SHUT_WR)
        here.sendall(raw_record(Kind.LOAD) + raw_record(Kind.START))
        here.shutdown(socket.SHUT_WR)
        assert receiver.ended() is None
    assert reason in str(receiver.error)
    assert memory.calls == ["check", "begin", "abort"]


@pytest.mark.parametrize("after", [0, 31, 40, PREAMBLE_SIZE + HEADER_SIZE, 2 * PAGE])
def test_a_pipe_of_memory_that_is_cut_leaves_the_source_running(sides: tuple[Guest, Guest], after: int) -> None:
    source, destination = sides
    fill(source)
    cut = Cut("there", after)
    with socket_pipes() as (here, there):
        receiver = Receiver(there, local(destination), lanes=[cut.pipes[1]])
        job = migration(source, RemoteDestination(here, memory_pipes=[cut.pipes[0]], timeout=TIMEOUT))
        with pytest.raises(MigrationError):
            list(job.run())
        assert receiver.ended() is None
    cut.join(TIMEOUT)
    assert job.report.status is Status.FAILED
    assert "rolling back" not in str(
        job.report.error
    )  # the first pipe is sound: the destination was reset, and said so
    expect_not_moved(source, destination)


def test_a_pipe_may_be_silent_while_another_is_not() -> None:
    activity = Activity()
    activity.at = time.monotonic() + 2 * SOON
    with socket_pipes() as (here, _):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            Link(here, SOON, activity=activity).receive()
        assert time.monotonic() - started > 2.9 * SOON


# ---------------------------------------------------------------- another process


RECEIVE = """
import os, sys
from mmap import mmap
from vfio_user import Client
from vfio_user.live import LocalDestination, MemoryRegion
from vfio_user.live.pipes import FdPipe
from vfio_user.live.remote import receive

path, fd, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Client.connect(path, 10.0) as client:
    client.dma_map(0, size, fd)
    memory = memoryview(mmap(fd, size))
    arrival = receive(FdPipe.standard(), LocalDestination([client], [MemoryRegion(0, memory)]), timeout=10.0)
    print(arrival.confirmed, client.migration_get_state().name, file=sys.stderr)
    sys.stdin.close()
"""


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Starts a process that receives on its stdin and stdout, for a server here; gives it and its memory."""
    from vfio_user import Server

    with ExitStack() as stack:
        server = stack.enter_context(Server(Edu(), tmp_path / "remote"))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stack.callback(thread.join, TIMEOUT)
        stack.callback(server.shutdown)
        fd = stack.enter_context(OwnedFd(os.memfd_create("remote")))
        os.ftruncate(fd.fileno(), MEMORY)

        def start() -> tuple[subprocess.Popen[bytes], FdPipe, memoryview]:
            process = subprocess.Popen(
                [sys.executable, "-c", RECEIVE, tmp_path / "remote", str(fd.fileno()), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[fd.fileno()],
            )
            stack.callback(process.wait, TIMEOUT)
            stack.callback(process.kill)
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            stack.callback(process.stderr.close)
            pipe = FdPipe(OwnedFd.duplicate(process.stdout.fileno()), OwnedFd.duplicate(process.stdin.fileno()))
            process.stdin.close()
            process.stdout.close()
            stack.callback(pipe.close)
            return process, pipe, memoryview(mmap(fd.fileno(), MEMORY))

        yield start


def test_a_process_receives_on_its_standard_streams(tmp_path: Path, remote: Callable[[], Any]) -> None:
    with guest(tmp_path / "source") as source:
        fill(source)
        process, pipe, memory = remote()
        list(migration(source, RemoteDestination(pipe, timeout=TIMEOUT)).run())
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == b"True RUNNING\n"
        assert memory == source.memory
        assert source.state == DeviceState.STOP


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, TIMEOUT), (signal.SIGSTOP, 0.5)])
def test_a_process_that_ends_or_stops_leaves_the_source_running(
    tmp_path: Path, remote: Callable[[], Any], number: int, timeout: float
) -> None:
    with guest(tmp_path / "source") as source:
        fill(source)
        process, pipe, _ = remote()
        to = RemoteDestination(pipe, timeout=TIMEOUT)
        job = migration(source, to, pause=lambda: process.send_signal(number))
        running = job.run()
        next(running)
        to._link._timeout = timeout  # the process takes its time to begin; from here on it does not
        with pytest.raises(MigrationError):
            list(running)
        assert job.report.status is Status.FAILED
        assert source.state == DeviceState.RUNNING
        assert source.liveness == 0x1234


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and self-signed certificates of two hosts, and of a stranger."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    where = tmp_path_factory.mktemp("certificates")
    for name in ("source", "destination", "stranger"):
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
            f" -addext subjectAltName=DNS:{name} -keyout {name}.key -out {name}.crt".split(),
            cwd=where,
            check=True,
            capture_output=True,
            timeout=60,
        )
    return where


def context(certificates: Path, own: str, peer: str) -> ssl.SSLContext:
    purpose = ssl.Purpose.CLIENT_AUTH if own == "destination" else ssl.Purpose.SERVER_AUTH
    made = ssl.create_default_context(purpose, cafile=certificates / f"{peer}.crt")
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(certificates / f"{own}.crt", certificates / f"{own}.key")
    return made


def shake_hands(certificates: Path, client: str, *, trusting: Sequence[str] = ("source", "destination")) -> Any:
    """Both ends of a TLS connection; an end whose handshake failed is the exception."""
    here, there = socket.socketpair()
    ends: list[Any] = [None, None]

    def accept() -> None:
        there.settimeout(TIMEOUT)
        try:
            ends[1] = context(certificates, "destination", trusting[0]).wrap_socket(there, server_side=True)
        except OSError as error:
            ends[1] = error
            there.close()

    thread = threading.Thread(target=accept)
    thread.start()
    here.settimeout(TIMEOUT)
    try:
        ends[0] = context(certificates, client, trusting[1]).wrap_socket(here, server_hostname="destination")
    except OSError as error:
        ends[0] = error
        here.close()
    thread.join()
    return ends


def test_through_tls_with_both_certificates_checked(sides: tuple[Guest, Guest], certificates: Path) -> None:
    source, destination = sides
    fill(source)
    here, there = shake_hands(certificates, "source")
    with TlsPipe(here) as one, TlsPipe(there) as other:
        receiver = Receiver(other, local(destination))
        list(migration(source, RemoteDestination(one, timeout=TIMEOUT)).run())
        arrival = receiver.ended()
    assert arrival is not None
    assert arrival.confirmed
    expect_moved(source, destination)


@contextmanager
def tls_pipes(certificates: Path) -> Iterator[tuple[Pipe, Pipe]]:
    here, there = shake_hands(certificates, "source")
    with TlsPipe(here) as one, TlsPipe(there) as other:
        yield one, other


@pytest.mark.parametrize("kind", ["socket", "fds", "tls"])
def test_more_than_a_pipe_holds_goes_through_it(kind: str, request: pytest.FixtureRequest) -> None:
    data = os.urandom(16 << 20)
    with ExitStack() as stack:
        if kind == "tls":
            pipes: Any = tls_pipes(request.getfixturevalue("certificates"))
        else:
            pipes = {"socket": socket_pipes, "fds": fd_pipes}[kind]()
        one, other = stack.enter_context(pipes)
        deadline = time.monotonic() + 50
        got = bytearray()

        def take() -> None:
            space = memoryview(bytearray(1 << 16))
            while count := other.receive(space, deadline):
                got.extend(space[:count])

        thread = threading.Thread(target=take)
        thread.start()
        one.send([data[:100], data[100:5000], data[5000:]], deadline)
        assert one.sent == len(data)
        one.close()
        thread.join(50)
        assert got == data
        with pytest.raises(ConnectionError, match="the pipe is closed"):
            one.send([b"x"], deadline)
        with pytest.raises(ConnectionError, match="the pipe is closed"):
            one.receive(memoryview(bytearray(1)), deadline)


def test_a_pair_of_descriptors_is_left_as_it_was() -> None:
    with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as reader, ExitStack() as stack:
        ends = [stack.enter_context(OwnedFd(fd)) for fd in os.pipe()]
        with FdPipe(OwnedFd.duplicate(reader.fileno()), OwnedFd.duplicate(ends[1].fileno())):
            assert not os.get_blocking(ends[1].fileno())
        assert os.get_blocking(ends[1].fileno())


def test_a_stranger_is_not_let_in(sides: tuple[Guest, Guest], certificates: Path) -> None:
    source, destination = sides
    fill(source)
    here, there = shake_hands(certificates, "stranger")
    assert isinstance(there, ssl.SSLError)
    if not isinstance(here, Exception):  # in TLS 1.3 a client learns of it when it reads
        with TlsPipe(here) as pipe, pytest.raises(MigrationError, match="check failed"):
            list(migration(source, RemoteDestination(pipe, timeout=TIMEOUT)).run())
    expect_not_moved(source, destination)
    here, there = shake_hands(certificates, "source", trusting=("source", "stranger"))
    assert isinstance(here, ssl.SSLError)
    if not isinstance(there, Exception):
        there.close()


def test_tls_without_a_checked_certificate_is_refused() -> None:
    unchecked = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    here, there = socket.socketpair()
    with here, there:
        with (
            unchecked.wrap_socket(here, server_side=True, do_handshake_on_connect=False) as sock,
            pytest.raises(UsageError, match="CERT_REQUIRED"),
        ):
            TlsPipe(sock)
        with (
            unchecked.wrap_socket(there, server_side=True, do_handshake_on_connect=False) as sock,
            pytest.raises(UsageError, match="needs a TlsPipe"),
        ):
            SocketPipe(sock)
