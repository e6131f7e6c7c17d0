"""A migration through a pipe: what arrives, what is refused, and that exactly one side runs wherever it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfio_user import DeviceState
from vfio_user.errors import MigrationError
from vfio_user.live import LocalDestination, MemoryRegion, Status, Step
from vfio_user.live.remote import RemoteDestination
from vfio_user.testing.leaks import no_fd_leaks

from .live_remote_support import (
    MEMORY,
    PAGE,
    TIMEOUT,
    Cut,
    Guest,
    Outcome,
    Receiver,
    expect_moved,
    expect_not_moved,
    fd_pipes,
    fill,
    kinds_of,
    local,
    migration,
    points,
    record_starts,
    run_cut,
    socket_pipes,
    two_guests,
)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Guest, Guest]]:
    with two_guests(tmp_path) as both:
        yield both


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
