"""The engine of a live migration: what arrives, and what is undone when a step fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import Client, Device, DeviceState, Server
from vfio_user.devices import edu
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.errors import ConnectionClosedError, MigrationError
from vfio_user.fds import OwnedFd
from vfio_user.live import DirtyMemory, LocalDestination, MemoryRegion, Migration, Round, Status, Step
from vfio_user.live.destination import nothing
from vfio_user.wire.constants import MigrationFlags

PAGE = 4096
MEMORY = 16 * PAGE


@contextmanager
def served(device: Device, path: Path) -> Iterator[Client]:
    with Server(device, path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Client.connect(path, 10.0) as client:
                yield client
        finally:
            server.shutdown()
            thread.join(10)
            assert not thread.is_alive()


class Side:
    """A device, its client, and guest memory that the device can reach."""

    def __init__(self, device: Device, client: Client, fd: OwnedFd) -> None:
        self.device, self.client = device, client
        self.memory = memoryview(mmap(fd.fileno(), MEMORY))
        client.dma_map(0, MEMORY, fd.fileno())

    def write(self, register: int, value: int) -> None:
        self.client.region_write(0, register, value.to_bytes(4, "little"))

    def read(self, register: int) -> int:
        return int.from_bytes(self.client.region_read(0, register, 4), "little")

    def dma(self, source: int, destination: int, count: int, command: int) -> None:
        for register, value in zip(
            (edu.DMA_SOURCE, edu.DMA_DESTINATION, edu.DMA_COUNT, edu.DMA_COMMAND),
            (source, destination, count, command),
            strict=True,
        ):
            self.write(register, value)
        while self.read(edu.DMA_COMMAND) & edu.DMA_START:
            pass


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    with ExitStack() as stack:
        both = []
        for name in ("source", "destination"):
            device = Edu()
            client = stack.enter_context(served(device, tmp_path / name))
            fd = stack.enter_context(OwnedFd(os.memfd_create(name)))
            os.ftruncate(fd.fileno(), MEMORY)
            both.append(Side(device, client, fd))
        yield both[0], both[1]


def migration(source: Side, destination: Side, *, resumed: Callable[[], None] = nothing, **options: Any) -> Migration:
    """``resumed``: called when the guest goes on at the destination."""
    to = LocalDestination([destination.client], [MemoryRegion(0, destination.memory)], resume=resumed)
    return Migration([source.client], to, memory=[MemoryRegion(0, source.memory)], **options)


def test_device_and_memory_arrive_with_what_changed_on_the_way(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    source.memory[:5] = b"hello"
    source.dma(0, edu.BUFFER_ADDRESS, 5, edu.DMA_START)
    source.write(edu.LIVENESS, 0x1234)

    def pause() -> None:
        """The last thing that the guest has its device do: it is in no round before."""
        source.dma(edu.BUFFER_ADDRESS, 3 * PAGE, 5, edu.DMA_START | edu.DMA_TO_GUEST)

    job = migration(source, destination, pause=pause)
    rounds = list(job.run())
    assert rounds[-1].stopped
    assert rounds == job.report.rounds
    assert [done.number for done in rounds] == list(range(1, len(rounds) + 1))
    assert (job.report.status, job.report.dirty_pages) == (Status.COMPLETED, 1)
    assert bytes(destination.memory[3 * PAGE : 3 * PAGE + 5]) == b"hello"
    assert destination.memory == source.memory
    assert destination.read(edu.LIVENESS) == ~0x1234 & 0xFFFFFFFF
    assert bytes(destination.device.buffer[:5]) == b"hello"  # type: ignore[attr-defined]
    assert source.client.migration_get_state() == DeviceState.STOP
    assert destination.client.migration_get_state() == DeviceState.RUNNING
    assert job.report.device_state_bytes == sum(done.device_bytes for done in rounds) > edu.BUFFER_SIZE


def test_what_the_guest_itself_writes_is_copied_too(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    wrote: list[tuple[int, int]] = []

    def pause() -> None:
        source.memory[5 * PAGE + 17] = 7
        wrote.append((5 * PAGE + 17, 1))

    job = migration(source, destination, pause=pause, guest_dirty=lambda: [wrote.pop()] if wrote else [])
    assert [done.pages for done in job.run()] == [16, 1]
    assert destination.memory == source.memory


def test_a_few_bytes_over_a_slow_pipe_do_not_pass_for_a_slow_link(tmp_path: Path) -> None:
    """All that goes ahead is the head of a stream, and each round waits for an answer: that tells nothing of a rate."""

    class Distant(LocalDestination):
        def settle(self) -> None:
            time.sleep(0.02)
            super().settle()

    class Terse(Gpio):
        migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY

    with served(Terse(), tmp_path / "a") as here, served(Terse(), tmp_path / "b") as there:
        job = Migration([here], Distant([there]), downtime=0.01, max_rounds=3)
        assert len(list(job.run())) == 2
        assert there.migration_get_state() == DeviceState.RUNNING


class TroubleError(Exception):
    pass


def trouble() -> None:
    raise TroubleError


def expect_source_runs_on(source: Side, destination: Side) -> None:
    assert source.client.migration_get_state() == DeviceState.RUNNING
    assert not source.device.dma.log.active
    source.write(edu.LIVENESS, 1)
    assert source.read(edu.LIVENESS) == 0xFFFFFFFE
    assert destination.client.migration_get_state() == DeviceState.RUNNING
    assert destination.read(edu.LIVENESS) == 0


@pytest.mark.parametrize(
    ("options", "step"),
    [({"pause": trouble}, Step.PAUSE), ({"resumed": trouble}, Step.START)],
)
def test_a_callback_that_fails_is_rolled_back(
    sides: tuple[Side, Side], options: dict[str, Callable[[], None]], step: Step
) -> None:
    source, destination = sides
    source.write(edu.LIVENESS, 5)
    resumed: list[bool] = []
    job = migration(source, destination, resume=lambda: resumed.append(True), **options)
    with pytest.raises(TroubleError):
        list(job.run())
    assert (job.report.status, job.report.step, resumed) == (Status.FAILED, step, [True])
    expect_source_runs_on(source, destination)


def test_a_failure_before_the_destination_is_asked_for_anything_leaves_it_as_it_was(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = sides
    destination.write(edu.LIVENESS, 0x77)

    def refuse(*arguments: object) -> int:
        raise OSError(28, "no room")

    monkeypatch.setattr(source.device, "dma_logging_start", refuse)
    with pytest.raises(MigrationError, match="logging failed"):
        list(migration(source, destination).run())
    assert destination.read(edu.LIVENESS) == ~0x77 & 0xFFFFFFFF
    assert source.client.migration_get_state() == DeviceState.RUNNING


def test_giving_up_between_rounds_is_rolled_back(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    job = migration(source, destination)
    running = job.run()
    assert isinstance(next(running), Round)
    assert source.client.migration_get_state() == DeviceState.PRE_COPY
    running.close()
    assert (job.report.status, job.report.step) == (Status.FAILED, Step.PRE_COPY)
    expect_source_runs_on(source, destination)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("dma_logging_start", Step.LOGGING),
        ("migration_write_data", Step.PRE_COPY),
        ("dma_logging_report", Step.PRE_COPY),
    ],
)
def test_a_refusing_device_is_rolled_back_and_named(
    sides: tuple[Side, Side], hook: str, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = sides

    def refuse(*arguments: object) -> int:
        raise OSError(28, "no room")

    for side in sides:
        monkeypatch.setattr(side.device, hook, refuse)
    job = migration(source, destination)
    with pytest.raises(MigrationError, match=f"{step} failed"):
        list(job.run())
    assert (job.report.status, job.report.step) == (Status.FAILED, step)
    monkeypatch.undo()
    expect_source_runs_on(source, destination)


def test_a_destination_that_refuses_the_stream_leaves_the_source_running(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = sides

    def load(saved: object, pre_copy: object) -> None:
        raise ValueError("not for me")

    monkeypatch.setattr(destination.device, "load", load)
    job = migration(source, destination)
    with pytest.raises(MigrationError, match="load failed"):
        list(job.run())
    monkeypatch.undo()
    expect_source_runs_on(source, destination)


def test_devices_that_do_not_fit_are_refused_before_anything_changes(tmp_path: Path) -> None:
    class OtherEdu(Edu):
        revision = 0x11

    with served(Edu(), tmp_path / "a") as here:
        with served(OtherEdu(), tmp_path / "b") as there, pytest.raises(MigrationError, match="identity"):
            list(Migration([here], LocalDestination([there])).run())
        with served(Gpio(), tmp_path / "c") as there, pytest.raises(MigrationError, match="check failed"):
            list(Migration([here], LocalDestination([there])).run())
        assert here.migration_get_state() == DeviceState.RUNNING


def test_a_destination_that_is_gone_leaves_the_source_running(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    resumed: list[bool] = []
    job = migration(source, destination, pause=destination.client.close, resume=lambda: resumed.append(True))
    with pytest.raises(MigrationError):
        list(job.run())
    assert resumed == [True]
    assert source.client.migration_get_state() == DeviceState.RUNNING
    assert not source.device.dma.log.active


def test_a_destination_that_cannot_be_reset_is_left(sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = sides

    def refuse() -> None:
        raise OSError(5, "no")

    monkeypatch.setattr(destination.device, "reset", refuse)
    job = migration(source, destination, pause=trouble)
    with pytest.raises(TroubleError):
        list(job.run())
    assert source.client.migration_get_state() == DeviceState.RUNNING
    with pytest.raises(ConnectionClosedError):
        destination.client.migration_get_state()


def test_a_guest_that_does_not_go_on_is_in_the_report(sides: tuple[Side, Side]) -> None:
    source, destination = sides

    def refuse() -> None:
        raise OSError(5, "the guest stays where it is")

    job = migration(source, destination, pause=destination.client.close, resume=refuse)
    with pytest.raises(MigrationError):
        list(job.run())
    assert job.report.error is not None
    assert "the guest stays where it is" in job.report.error


def test_a_source_that_dies_after_the_switch_over_does_not_matter(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    job = migration(source, destination, resumed=source.client.close)
    list(job.run())
    assert job.report.status is Status.COMPLETED
    assert destination.client.migration_get_state() == DeviceState.RUNNING


@given(
    marks=st.lists(st.tuples(st.integers(0, 20 * PAGE), st.integers(1, 3 * PAGE)), max_size=8),
    page_size=st.sampled_from([PAGE, 2 * PAGE]),
)
def test_exactly_the_dirty_pages_are_taken(marks: list[tuple[int, int]], page_size: int) -> None:
    base, pages = 2 * PAGE, 10
    memory = DirtyMemory([MemoryRegion(base, memoryview(bytearray(b"\1" * pages * PAGE)))], page_size)
    assert sum(len(piece) for _, piece in memory.take()) == pages * PAGE
    for address, length in marks:
        memory.mark(address, length)
    dirty = {
        page
        for page in range(pages * PAGE // page_size)
        for address, length in marks
        if address < base + (page + 1) * page_size and base + page * page_size < address + length
    }
    assert memory.pages == len(dirty)
    taken = [
        (address + at - base) // page_size for address, piece in memory.take() for at in range(0, len(piece), page_size)
    ]
    assert taken == sorted(dirty)
    assert memory.pages == 0


def test_memory_of_two_sizes_does_not_fit(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    to = LocalDestination([destination.client], [MemoryRegion(0, destination.memory[:PAGE])])
    with pytest.raises(MigrationError, match=r"guest memory differs: 0x10000 bytes at 0x0 and 0x1000 bytes"):
        list(Migration([source.client], to, memory=[MemoryRegion(0, source.memory)]).run())
    expect_source_runs_on(source, destination)


def test_a_guest_that_dirties_faster_than_the_link_gets_a_verdict(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    everything = [(0, MEMORY)]
    options: dict[str, Any] = {
        "guest_dirty": lambda: everything,
        "bandwidth": 16 << 20,
        "max_rounds": 3,
        "downtime": 1e-3,
    }
    job = migration(source, destination, **options)
    with pytest.raises(MigrationError, match="does not converge: after 3 rounds 16 pages are dirty again"):
        list(job.run())
    assert (job.report.status, job.report.step, len(job.report.rounds)) == (Status.FAILED, Step.PRE_COPY, 3)
    expect_source_runs_on(source, destination)
    forced = migration(source, destination, force=True, **options)
    list(forced.run())
    assert forced.report.status is Status.COMPLETED


def test_a_migration_without_rounds_is_refused(sides: tuple[Side, Side]) -> None:
    with pytest.raises(ValueError, match="once at least"):
        migration(*sides, max_rounds=0)
