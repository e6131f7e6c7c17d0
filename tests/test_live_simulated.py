"""Guests that never rest are moved, and nothing is lost: every byte has an expected value."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfio_user import DeviceState, MigrationFlags
from vfio_user.errors import MigrationError
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Status, Step, memory, source
from vfio_user.live.pipes import SocketPipe
from vfio_user.live.remote import Arrival, RemoteDestination, receive
from vfio_user.testing.simulator import (
    COUNT,
    MAX_BLOCKS,
    RING_ADDRESS,
    Flooder,
    GuestSimulator,
    Host,
    RandomWriter,
    ScatterGather,
    SequentialWriter,
    Workload,
    Writer,
    last_writes,
)
from vfio_user.wire.constants import PAGE_SIZE

from .live_support import watch

pytest_plugins = ["vfio_user.testing.pytest_plugin"]
pytestmark = [pytest.mark.usefixtures("fd_leak_check"), pytest.mark.timeout(240)]

KINDS = (SequentialWriter, RandomWriter, ScatterGather, Flooder)
ALWAYS: dict[str, Any] = {"downtime": 0.0, "max_rounds": 4, "force": True}
"""A guest that never rests never converges: four rounds, and over."""


def moved(guest: GuestSimulator, **options: Any) -> Migration:
    job = guest.migration(**ALWAYS | options)
    list(job.run())
    assert (job.report.status, job.report.error) == (Status.COMPLETED, None)
    assert guest.verify_moved() == []
    return job


# Workloads that run on their own


@pytest.mark.parametrize("ahead", [False, True], ids=["stop-copy", "pre-copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_device_at_work_is_lost(kind: type[Writer], ahead: bool) -> None:
    with GuestSimulator([Workload(kind, {"ahead": ahead})], pages=32) as guest:
        for _ in range(3):
            guest.start()
            job = moved(guest)
            assert job.report.dirty_pages


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_nothing_of_several_devices_on_one_memory_is_lost(processes: bool) -> None:
    workloads = [
        *map(Workload, KINDS),
        Workload(RandomWriter, {"seed": 5, "blocks": MAX_BLOCKS}),
        Workload(ScatterGather, {"ahead": False}),
        Workload(SequentialWriter, {"burst": 64, "pace": 0.0}),
    ]
    with GuestSimulator(workloads, pages=48, processes=processes) as guest:
        for _ in range(3 if processes else 1):  # eight busy threads share one interpreter
            guest.start()
            moved(guest)


def test_a_guest_that_dirties_faster_than_the_link_stays_and_hears_why() -> None:
    with GuestSimulator([Workload(Flooder)], pages=64) as guest:
        guest.start()
        job = guest.migration(bandwidth=4 << 20, downtime=0.001, max_rounds=3)
        with pytest.raises(MigrationError, match=r"does not converge: after 3 rounds 6[45] pages are dirty again"):
            list(job.run())
        assert (job.report.status, job.report.step) == (Status.FAILED, Step.PRE_COPY)
        assert guest.running
        before = guest.here.read(0, COUNT)
        guest.kick(0, 1)
        assert guest.here.read(0, COUNT) > before
        assert guest.verify() == []


# Groups


def recorded_states(options: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, int, DeviceState]], GuestSimulator]:
    """The states that a migration asks for, in order: (side, device, state)."""
    states: list[tuple[str, int, DeviceState]] = []

    def asked(side: str, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "migration_set_state":
            states.append((side, number, arguments[0]))

    with GuestSimulator([Workload(SequentialWriter, one) for one in options], pages=8) as guest:
        watch(guest, asked)
        guest.start()
        moved(guest)
    return states, guest


@pytest.mark.parametrize("ahead", [(True, True), (False, False), (True, False)])
def test_a_group_that_has_p2p_stops_and_starts_together(ahead: tuple[bool, bool]) -> None:
    states, _ = recorded_states([{"p2p": True, "ahead": one} for one in ahead])
    quiet = [DeviceState.PRE_COPY_P2P if one else DeviceState.RUNNING_P2P for one in ahead]
    assert states == [
        ("destination", 0, DeviceState.RESUMING),
        ("destination", 1, DeviceState.RESUMING),
        *(("source", number, DeviceState.PRE_COPY) for number, one in enumerate(ahead) if one),
        ("source", 0, quiet[0]),
        ("source", 1, quiet[1]),
        ("source", 0, DeviceState.STOP_COPY),
        ("source", 1, DeviceState.STOP_COPY),
        ("destination", 0, DeviceState.STOP),
        ("destination", 1, DeviceState.STOP),
        ("destination", 0, DeviceState.RUNNING_P2P),
        ("destination", 1, DeviceState.RUNNING_P2P),
        ("destination", 0, DeviceState.RUNNING),
        ("destination", 1, DeviceState.RUNNING),
        ("source", 0, DeviceState.STOP),
        ("source", 1, DeviceState.STOP),
    ]


def test_a_group_of_which_one_lacks_p2p_does_without() -> None:
    states, _ = recorded_states([{"p2p": True}, {"p2p": False}])
    assert not {state for _, _, state in states} & {DeviceState.PRE_COPY_P2P, DeviceState.RUNNING_P2P}


def test_a_group_that_has_p2p_goes_on_together_after_a_failure() -> None:
    """None does DMA to another before that one answers."""
    states: list[tuple[int, DeviceState]] = []

    def asked(side: str, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "migration_set_state" and side == "source":
            states.append((number, arguments[0]))

    def refuse() -> None:
        raise OSError(5, "no")

    with GuestSimulator([Workload(SequentialWriter, {"p2p": True})] * 2, pages=8) as guest:
        watch(guest, asked)
        guest.start()
        with pytest.raises(MigrationError, match="load failed"):
            list(guest.migration(connect=refuse, **ALWAYS).run())
        assert guest.verify() == []
    assert states[-4:] == [
        (0, DeviceState.RUNNING_P2P),
        (1, DeviceState.RUNNING_P2P),
        (0, DeviceState.RUNNING),
        (1, DeviceState.RUNNING),
    ]


# Through a pipe


def move_through_pipes(guest: GuestSimulator, lanes: int) -> None:
    ours, theirs = zip(*(map(SocketPipe, socket.socketpair()) for _ in range(1 + lanes)), strict=True)
    there = guest.destination(resume=guest.moved)
    arrivals: list[Arrival] = []

    def other_host() -> None:
        arrivals.append(receive(theirs[0], there, memory_pipes=theirs[1:], timeout=Host.TIMEOUT))

    thread = threading.Thread(target=other_host, name="other host")
    thread.start()
    try:
        with RemoteDestination(ours[0], memory_pipes=ours[1:], timeout=Host.TIMEOUT) as destination:
            job = guest.migration(destination=destination, **ALWAYS)
            list(job.run())
    finally:
        thread.join(Host.TIMEOUT)
    assert (job.report.status, job.report.error) == (Status.COMPLETED, None)
    assert guest.verify_moved() == []
    assert arrivals[0].memory_bytes == sum(done.memory_bytes for done in job.report.rounds)


@pytest.mark.parametrize("lanes", [0, 2], ids=["one pipe", "more pipes"])
def test_nothing_is_lost_on_the_way_to_another_host(lanes: int) -> None:
    with GuestSimulator([*map(Workload, KINDS)], pages=32) as guest:
        for _ in range(3):
            guest.start()
            move_through_pipes(guest, lanes)


# Schedules


@dataclass(frozen=True)
class Work:
    """What the guest does at some point of the migration: a writer's ``times`` operations."""

    writer: int
    times: int

    def do(self, guest: GuestSimulator) -> None:
        if self.writer:
            guest.kick(self.writer - 1, self.times)
        else:
            guest.compute(self.times)


@dataclass
class Schedule:
    """What happens when: one entry for each time that the migration gives the guest a chance to."""

    guest: GuestSimulator
    entries: list[Work | None]
    running: bool = True
    done: int = field(default=0)

    def step(self) -> None:
        if self.running and self.entries:
            work = self.entries.pop()
            if work is not None:
                work.do(self.guest)
                self.done += 1


class Interrupted(LocalDestination):
    """Before and after each piece of memory and of a stream, the guest gets a chance."""

    schedule: Schedule

    def write_memory(self, address: int, data: memoryview) -> None:
        self.schedule.step()
        super().write_memory(address, data)
        self.schedule.step()

    def write_device(self, number: int, data: memoryview) -> None:
        self.schedule.step()
        super().write_device(number, data)

    def settle(self) -> None:
        self.schedule.step()


WORK = st.builds(Work, st.integers(0, 3), st.integers(1, 9))


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    """Memory goes page by page: more points at which something can happen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "PIECE", PAGE_SIZE)
        yield


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    entries=st.lists(st.none() | WORK, max_size=120),
    last=st.lists(WORK, max_size=3),
    rounds=st.integers(1, 5),
    ahead=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@pytest.mark.timeout(300)
def test_no_schedule_loses_a_page(
    entries: list[Work | None], last: list[Work], rounds: int, ahead: tuple[bool, bool, bool]
) -> None:
    """Writes of devices and of the processor before, between and within the rounds, and up to the last moment."""
    kinds = (SequentialWriter, RandomWriter, ScatterGather)
    workloads = [Workload(kind, {"ahead": one, "blocks": 4}) for kind, one in zip(kinds, ahead, strict=True)]
    with GuestSimulator(workloads, pages=12) as guest:
        schedule = Schedule(guest, list(entries))

        def pause() -> None:
            for work in last:
                work.do(guest)
            schedule.running = False

        def dirty() -> list[tuple[int, int]]:
            found = guest.dirty()
            schedule.step()
            return found

        destination = Interrupted(
            guest.there.clients, [MemoryRegion(RING_ADDRESS, guest.there.memory)], resume=guest.moved
        )
        destination.schedule = schedule
        guest.destination()
        job = Migration(
            guest.here.clients,
            destination,
            memory=[MemoryRegion(RING_ADDRESS, guest.here.memory)],
            guest_dirty=dirty,
            pause=pause,
            downtime=0.0,
            max_rounds=rounds,
            force=True,
        )
        for done in job.run():
            if not done.stopped:
                schedule.step()
        assert guest.verify_moved() == []


# Again and again


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


TIMES = 1000
LEAK = 32 << 20
"""Bytes: a thousand times one page of 4 KiB would be 4 MiB, the memory of one guest more."""


@pytest.mark.timeout(400)
def test_a_thousand_times_back_and_forth() -> None:
    workloads = [Workload(SequentialWriter), Workload(RandomWriter, {"ahead": False})]
    with GuestSimulator(workloads, pages=8) as guest:
        before, fds = 0, 0
        for number in range(TIMES):
            guest.kick(0, 5)
            guest.kick(1, 7)
            guest.compute(3)
            job = guest.migration(pause=lambda: guest.kick(0, 1), resume_there=lambda: swap(guest))
            for done in job.run():
                if not done.stopped:
                    guest.kick(1, 2)
            assert (job.report.status, job.report.error) == (Status.COMPLETED, None), number
            assert guest.verify_moved() == [], number
            if number == TIMES // 10:
                before, fds = resident(), len(os.listdir("/proc/self/fd"))
        assert guest.here.read(0, COUNT) >= TIMES * 6
        assert len(os.listdir("/proc/self/fd")) == fds
        assert resident() - before < LEAK


def swap(guest: GuestSimulator) -> None:
    """The guest goes on at the other side, its processor at rest."""
    guest.here, guest.there = guest.there, guest.here


# The simulator itself: what it says must be able to be bad


@pytest.fixture
def still() -> Iterator[GuestSimulator]:
    with GuestSimulator([Workload(SequentialWriter), Workload(ScatterGather)], pages=8) as guest:
        guest.kick(0, 11)
        guest.kick(1, 3)
        guest.compute(5)
        yield guest


def test_a_guest_at_rest_is_as_it_must_be(still: GuestSimulator) -> None:
    assert still.verify() == []
    assert [still.here.read(number, COUNT) for number in (0, 1)] == [11, 3]


@pytest.mark.parametrize("page", range(9))
def test_a_page_that_is_lost_is_found(still: GuestSimulator, page: int) -> None:
    start = page * PAGE_SIZE
    still.here.memory[start : start + PAGE_SIZE] = bytes(PAGE_SIZE)
    assert still.verify()


@pytest.mark.parametrize("lost", [lambda device: device.own.__setitem__(0, 77), lambda device: device.operate(1)])
def test_what_a_device_lost_is_found(still: GuestSimulator, lost: Callable[[Writer], None]) -> None:
    before = bytes(still.here.memory)
    lost(still.here.devices[0])
    still.here.memory[:] = before
    assert still.verify()


def test_work_that_was_done_after_the_move_on_both_sides_is_found(still: GuestSimulator) -> None:
    list(still.migration().run())
    still.there.devices[0].count += 1
    assert still.verify_moved() == ["device 0 did 12 operations, and went on after 11"]


def test_a_device_without_memory_counts_its_faults(still: GuestSimulator) -> None:
    size = len(still.here.memory)
    still.here.clients[0].dma_unmap(RING_ADDRESS, size)
    still.kick(0, 1)
    assert still.verify() == ["device 0 wrote 1 times where nothing was"]


@given(st.sampled_from(KINDS), st.integers(0, 3), st.integers(1, 20), st.integers(0, 50))
def test_the_last_writes_are_those_of_a_replay(kind: type[Writer], seed: int, pages: int, count: int) -> None:
    replayed = {page: number for number in range(count) for page in kind.targets(seed, pages, number)}
    assert last_writes(lambda number: kind.targets(seed, pages, number), pages, count) == replayed


@pytest.mark.parametrize("options", [{"lane": 0}, {"lane": 8}, {"blocks": 0}, {"blocks": MAX_BLOCKS + 1}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="1 to"):
        SequentialWriter(**options)


@pytest.mark.parametrize("devices", [0, 8])
def test_a_guest_has_one_to_seven_devices(devices: int) -> None:
    with pytest.raises(ValueError, match="1 to 7"):
        GuestSimulator([Workload(SequentialWriter)] * devices)


@pytest.mark.parametrize(("ahead", "p2p"), [(False, False), (True, False), (False, True), (True, True)])
def test_states_are_options(ahead: bool, p2p: bool) -> None:
    flags = SequentialWriter(ahead=ahead, p2p=p2p).migration_flags()
    assert (bool(flags & MigrationFlags.PRE_COPY), bool(flags & MigrationFlags.P2P)) == (ahead, p2p)


def test_states_are_asked_for_in_pairs_of_arcs(still: GuestSimulator) -> None:
    """What a device saw is what the engine asked for: nothing between was left out."""
    list(still.migration().run())
    seen = still.there.devices[0].states
    assert seen[-2:] == [DeviceState.STOP_COPY, DeviceState.STOP]
    assert all(one != other for one, other in pairwise(seen))


# What devices may be like


class CoarseLog(SequentialWriter):
    """Logs in pages of 16 KiB, whatever it is asked for."""

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        return super().dma_logging_start(4 * page_size, ranges)


class Endless(SequentialWriter):
    """Has more to send ahead whenever it is asked."""

    pre_copy_limit = 1 << 40

    def pre_copy(self) -> bytes:
        return bytes(1 << 19)


def test_logs_of_several_page_sizes_are_read_in_the_largest() -> None:
    with GuestSimulator([Workload(CoarseLog), Workload(RandomWriter)], pages=15) as guest:
        guest.start()
        job = moved(guest)
        assert job.page_size == 4 * PAGE_SIZE


def test_a_device_that_always_has_more_to_send_ahead_does_not_hold_a_round_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "AHEAD", 4 << 20)
    with GuestSimulator([Workload(Endless)], pages=8) as guest:
        job = guest.migration(max_rounds=2, force=True)
        with pytest.raises(MigrationError, match="load failed"):  # it is not what the device understands
            list(job.run())
        assert all(4 << 20 <= done.device_bytes < 6 << 20 for done in job.report.rounds if not done.stopped)
        assert guest.verify() == []


def test_a_round_in_which_nothing_moved_does_not_pass_for_a_fast_link() -> None:
    """The memory is clean; what is left is the device's own, and takes longer than is allowed."""
    with GuestSimulator([Workload(SequentialWriter, {"ahead": False, "blocks": MAX_BLOCKS})], pages=8) as guest:
        guest.kick(0, 1)
        job = guest.migration(bandwidth=1 << 20, downtime=0.02, max_rounds=3)
        with pytest.raises(MigrationError, match=r"does not converge: after 3 rounds 0 pages .* [01]\.\d MiB/s"):
            list(job.run())
        assert [done.memory_bytes for done in job.report.rounds] == [
            9 * PAGE_SIZE,
            PAGE_SIZE,
            0,
        ]  # what the guest had written
        assert all(done.downtime > 0.05 for done in job.report.rounds)
        assert guest.verify() == []
