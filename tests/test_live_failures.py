"""A migration fails at each step in every way: exactly one side has the guest, and nothing is lost.

The outcomes are those of the table in :mod:`tests.live_failures`, which the manual shows.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vfio_user import DeviceState
from vfio_user.errors import CommandError, ConnectionClosedError, MigrationError, VfioUserError
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Status, Step, UnconfirmedError
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.testing.simulator import (
    CONTROL,
    COUNT,
    RING_ADDRESS,
    GuestSimulator,
    Host,
    RandomWriter,
    SequentialWriter,
    Workload,
    Writer,
)
from vfio_user.wire.constants import PAGE_SIZE

from .live_failures import (
    FAILURES,
    FIRST,
    LATER_ROUNDS,
    LOAD,
    MOMENTS,
    PAUSE,
    ROUND_1,
    ROUND_2,
    START,
    STOP_COPY,
    Outcome,
)
from .live_support import watch

pytest_plugins = ["vfio_user.testing.pytest_plugin"]

ROOT = Path(__file__).parent.parent
PATIENCE = 10.0
IMPATIENCE = 0.4
"""Seconds that a call waits for a server that is stopped."""
VICTIM = 1
"""The device that the failure concerns: the second of the group, so that the first has gone ahead."""
IN_PROCESSES = {"source killed", "source stopped", "destination killed", "destination stopped"}

HOOKS = {
    "migration_read_data_into": "migration_read_data",
    "region_read": "region_read",
    "reset": "reset",
    **{
        name: name
        for name in (
            "migration_flags",
            "migration_get_state",
            "migration_set_state",
            "migration_write_data",
            "migration_data_size",
            "dma_logging_start",
            "dma_logging_report",
        )
    },
}
"""The hook of a device that a call of the client comes to."""


class TroubleError(Exception):
    """What a callback raises."""


def moment_of(job: Migration) -> str:
    step = job.report.step
    if step is not Step.PRE_COPY:
        return str(step)
    return ROUND_2 if job.report.rounds else ROUND_1


class Scene:
    """A guest at work that is about to migrate, and what is to go wrong."""

    def __init__(self, guest: GuestSimulator, name: str, moment: str) -> None:
        self.guest, self.name, self.moment = guest, name, moment
        self.source, self.destination = guest.here, guest.there
        self.fired = False
        self.repair: Callable[[], None] = lambda: None
        self.job = guest.migration(
            pause=self.pause,
            guest_dirty=self.dirty,
            connect=lambda: self.callback(LOAD),
            resume_there=self.resume_there,
            downtime=0.0,
            max_rounds=3,
            force=True,
        )
        if name == "version":
            self.destination.devices[VICTIM].state_version = 0  # type: ignore[misc]
            self.fired = True
        watch(guest, self.before)

    def now(self) -> bool:
        return not self.fired and moment_of(self.job) == self.moment

    # Callbacks of the migration

    def pause(self) -> None:
        self.guest.pause()
        self.callback(PAUSE)
        if self.now() and self.name != "callback":
            self.before("source", VICTIM, "pause", ())

    def dirty(self) -> list[tuple[int, int]]:
        if self.moment in (FIRST, LATER_ROUNDS, STOP_COPY):
            self.callback(self.moment)
        return self.guest.dirty()

    def callback(self, moment: str) -> None:
        if self.name == "callback" and moment == self.moment and self.now():
            self.fired = True
            raise TroubleError("the VMM is in trouble")

    def resume_there(self) -> None:
        self.callback(START)
        self.guest.moved()
        if self.name == "unconfirmed":
            self.fired = True
            raise UnconfirmedError("the answer was lost")

    # What happens

    def before(self, side: str, number: int, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.now():
            return None
        host = self.source if side == "source" else self.destination
        if self.name == "interrupted":
            self.fired = True
            raise KeyboardInterrupt
        if self.name in IN_PROCESSES:
            self.fired = True
            victim = self.source if self.name.startswith("source") else self.destination
            self.kill(victim) if self.name.endswith("killed") else self.suspend(victim)
        elif self.name == f"{side} refuses" and number == VICTIM and name in HOOKS:
            self.fired = True
            refuse_once(host.devices[number], HOOKS[name])
        elif self.name in ("corrupt", "truncated") and (number, name) == (VICTIM, "migration_write_data"):
            self.fired = True
            return (damaged(arguments[0], cut=self.name == "truncated"),)
        return None

    def kill(self, host: Host) -> None:
        host.processes[VICTIM].kill()
        host.processes[VICTIM].wait(PATIENCE)

    def suspend(self, host: Host) -> None:
        process, client = host.processes[VICTIM], host.clients[VICTIM]
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        real = client._client  # type: ignore[attr-defined]
        before, real.timeout = real.timeout, IMPATIENCE

        def repair() -> None:
            process.send_signal(signal.SIGCONT)
            real.timeout = before

        self.repair = repair

    # Afterwards

    def migrate(self) -> BaseException | None:
        """What it raised."""
        running = self.job.run()
        try:
            for done in running:
                if self.name == "given up" and done.number == 1:
                    self.fired = True
                    running.close()
                    return None
        except (VfioUserError, KeyboardInterrupt, TroubleError, OSError) as error:
            return error
        finally:
            self.repair()
        return None

    def check(self, raised: BaseException | None) -> None:
        """All that the table claims."""
        assert self.fired, "nothing went wrong"
        failure = FAILURES[self.name]
        outcome = failure.outcomes[self.moment]
        report = self.job.report
        succeeded = outcome is Outcome.DESTINATION
        assert (raised is None) == (succeeded or self.name == "given up"), raised
        if not succeeded:
            assert report.error
            assert report.rounds or self.moment != STOP_COPY
            step = Step(self.moment.partition(",")[0])
            noticed = list(Step)[list(Step).index(step) :]
            assert report.step in ([step] if failure.exact else noticed)
            assert report.failed_step is report.step
        OUTCOMES[outcome](self)


def refuse_once(device: Writer, hook: str) -> None:
    def refuse(*arguments: object) -> None:
        delattr(device, hook)
        raise OSError(28, "no room")

    setattr(device, hook, refuse)


def damaged(data: memoryview, *, cut: bool) -> bytes:
    if cut:
        return bytes(data[: len(data) // 2])
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 0x10
    return bytes(changed)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def check_running(host: Host, *, without: int | None = None) -> None:
    """The devices run, are not logged, and work."""
    for number, client in enumerate(host.clients):
        if number == without:
            continue
        assert client.migration_get_state() == DeviceState.RUNNING
        with pytest.raises(CommandError):
            client.dma_logging_report(0, PAGE_SIZE, PAGE_SIZE)
        wait_for(partial(has_worked, host, number, host.read(number, COUNT)), f"device {number} does not work")


def has_worked(host: Host, number: int, before: int) -> bool:
    return host.read(number, COUNT) > before


def check_reset(host: Host) -> None:
    """The devices are as new, or left alone."""
    for number, client in enumerate(host.clients):
        try:
            assert client.migration_get_state() == DeviceState.RUNNING
        except ConnectionClosedError:
            continue
        assert (host.read(number, CONTROL, 4), host.read(number, COUNT)) == (0, 0)


def check_source(scene: Scene) -> None:
    assert scene.job.report.status is Status.FAILED
    assert scene.guest.here is scene.source
    assert scene.guest.running
    check_running(scene.source)
    check_reset(scene.destination)
    written = scene.guest.written
    wait_for(lambda: scene.guest.written > written, "the processor stands still")
    assert scene.guest.verify() == []


def check_destination(scene: Scene) -> None:
    assert scene.job.report.status is Status.COMPLETED
    assert scene.guest.here is scene.destination
    check_running(scene.destination)
    for number, client in enumerate(scene.source.clients):
        if number != VICTIM:
            assert client.migration_get_state() == DeviceState.STOP
    assert scene.guest.verify() == []


def check_lost(scene: Scene) -> None:
    assert scene.job.report.status is Status.FAILED
    assert scene.guest.here is scene.source
    assert scene.guest.running
    check_running(scene.source, without=VICTIM)
    check_reset(scene.destination)


def check_unconfirmed(scene: Scene) -> None:
    assert scene.job.report.status is Status.UNCONFIRMED
    assert scene.guest.here is scene.destination
    for client in scene.source.clients:
        assert client.migration_get_state() not in RUNNING_STATES
    check_running(scene.destination)
    assert scene.guest.verify() == []


OUTCOMES: dict[Outcome, Callable[[Scene], None]] = {
    Outcome.SOURCE: check_source,
    Outcome.LATER: check_source,
    Outcome.DESTINATION: check_destination,
    Outcome.LOST: check_lost,
    Outcome.UNCONFIRMED: check_unconfirmed,
}


def cells() -> Iterator[Any]:
    for name, failure in FAILURES.items():
        for moment in failure.outcomes:
            yield pytest.param(name, moment, id=f"{name} - {moment}".replace(" ", "_").replace(",", ""))


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("fd_leak_check")
@pytest.mark.parametrize(("name", "moment"), list(cells()))
def test_what_a_failure_comes_to(name: str, moment: str) -> None:
    ahead = not (name == "version" and moment == STOP_COPY)  # without pre-copy the stream begins there
    workloads = [Workload(SequentialWriter, {"ahead": ahead}), Workload(RandomWriter, {"ahead": ahead})]
    with GuestSimulator(workloads, pages=16, processes=name in IN_PROCESSES) as guest:
        guest.start()
        scene = Scene(guest, name, moment)
        scene.check(scene.migrate())


def test_the_page_in_the_manual_is_that_table() -> None:
    written = runpy.run_path(str(ROOT / "scripts/make_failures.py"))["text"]()
    assert (ROOT / "docs/migration-failures.md").read_text() == written, "run scripts/make_failures.py"


def test_the_moments_are_the_steps() -> None:
    assert list(dict.fromkeys(moment.partition(",")[0] for moment in MOMENTS)) == list(map(str, Step))
    for failure in FAILURES.values():
        assert set(failure.outcomes) <= set(MOMENTS)


# At each single call


Calls = list[tuple[str, int, str]]


def quiet_guest(p2p: bool = False) -> GuestSimulator:
    """One whose devices work when they are told to only: each of its migrations makes the same calls."""
    return GuestSimulator(
        [Workload(kind, {"p2p": p2p, "blocks": 2}) for kind in (SequentialWriter, RandomWriter)], pages=4
    )


def work(guest: GuestSimulator) -> None:
    for number in range(2):
        guest.kick(number, 3)
    guest.compute(2)


class Sweep:
    """A migration in which ``happen`` is called at the ``at``-th call, before it or when it has been answered."""

    def __init__(
        self,
        guest: GuestSimulator,
        at: int = -1,
        after: bool = False,
        happen: Callable[[Host, int], None] = lambda *_: None,
    ) -> None:
        self.guest, self.at, self.happen = guest, at, happen
        self.source, self.destination = guest.here, guest.there
        work(guest)
        self.job = guest.migration(downtime=-1.0, max_rounds=2, force=True)
        self.watching = False
        self.calls: Calls = []
        watch(guest, *((self.pass_by, self.called) if after else (self.called, self.pass_by)))

    def pass_by(self, *call: Any) -> None:
        pass

    def called(self, side: str, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        self.calls.append((side, number, name))
        if len(self.calls) == self.at + 1:
            self.happen(self.source if side == "source" else self.destination, number)

    def run(self) -> BaseException | None:
        """What it raised."""
        self.watching = True
        try:
            for done in self.job.run():
                self.watching = False
                if not done.stopped:
                    work(self.guest)
                self.watching = True
        except (VfioUserError, KeyboardInterrupt, OSError) as error:
            return error
        finally:
            self.watching = False
        return None

    def check(self, lost: tuple[Host, int] | None = None) -> None:
        """One side has the guest, whole, and the other does nothing. ``lost``: this device is gone."""
        status, guest = self.job.report.status, self.guest
        if status is Status.FAILED:
            assert guest.here is self.source
            assert self.job.report.error
            check_reset(self.destination)
        else:
            assert status is Status.COMPLETED
            assert guest.here is self.destination
            for client in self.source.clients:
                with contextlib.suppress(ConnectionClosedError):
                    assert client.migration_get_state() not in RUNNING_STATES
        for number, client in enumerate(guest.here.clients):
            if lost == (guest.here, number):
                continue
            assert client.migration_get_state() == DeviceState.RUNNING
            with pytest.raises(CommandError):
                client.dma_logging_report(0, PAGE_SIZE, PAGE_SIZE)
        if lost is None or lost[0] is not guest.here:
            work(guest)
            assert guest.verify() == []


def all_calls(p2p: bool) -> Calls:
    with quiet_guest(p2p) as guest:
        sweep = Sweep(guest)
        assert sweep.run() is None
        sweep.check()
        return sweep.calls


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("fd_leak_check")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_ctrl_c_at_each_call(after: bool) -> None:
    def interrupt(host: Host, number: int) -> None:
        raise KeyboardInterrupt

    for at, call in enumerate(all_calls(p2p=True)):
        with quiet_guest(p2p=True) as guest:
            sweep = Sweep(guest, at, after, interrupt)
            raised = sweep.run()
            assert isinstance(raised, KeyboardInterrupt), (at, call)
            sweep.check()


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("fd_leak_check")
def test_a_connection_that_is_lost_at_each_call() -> None:
    for at, (side, number, _) in enumerate(all_calls(p2p=True)):
        with quiet_guest(p2p=True) as guest:
            sweep = Sweep(guest, at, False, lambda host, number: host.clients[number].close())
            sweep.run()
            sweep.check((sweep.source if side == "source" else sweep.destination, number))


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("fd_leak_check")
def test_each_call_refused() -> None:
    for at, (_, _, name) in enumerate(all_calls(p2p=True)):
        if name in HOOKS:
            with quiet_guest(p2p=True) as guest:
                sweep = Sweep(guest, at, False, partial(refuse_at, HOOKS[name]))
                sweep.run()
                sweep.check()


def refuse_at(hook: str, host: Host, number: int) -> None:
    refuse_once(host.devices[number], hook)


# What goes wrong while it is undone


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, TroubleError, OSError])
@pytest.mark.parametrize("at", range(8))
def test_what_goes_wrong_while_it_is_rolled_back_keeps_nothing_else_from_being(
    at: int, trouble: type[BaseException]
) -> None:
    """The operator presses Ctrl-C once more, and again; a callback fails while another failure is dealt with."""

    undone: Calls = []

    def after(side: str, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if guest_is_stopped and name in ("migration_set_state", "reset", "dma_logging_stop"):
            undone.append((side, number, name))
            if len(undone) == at + 1:
                raise trouble("and this")

    guest_is_stopped: list[bool] = []

    def connect() -> None:
        guest_is_stopped.append(True)
        raise OSError(5, "not now")

    with quiet_guest() as guest:
        work(guest)
        job = guest.migration(connect=connect, downtime=0.0, max_rounds=2, force=True)
        watch(guest, after=after)
        with pytest.raises((MigrationError, trouble)):
            list(job.run())
        assert job.report.status is Status.FAILED
        assert "not now" in str(job.report.error)
        guest_is_stopped.clear()
        assert guest.running
        for client in guest.here.clients:
            assert client.migration_get_state() == DeviceState.RUNNING
            with pytest.raises(CommandError):
                client.dma_logging_report(0, PAGE_SIZE, PAGE_SIZE)
        check_reset(guest.there)
        assert guest.verify() == []


def test_an_interrupt_when_the_guest_goes_on_there_already_does_not_start_it_twice() -> None:
    class Late(LocalDestination):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    with quiet_guest() as guest:
        source, destination = guest.here, guest.there
        work(guest)
        there = Late(guest.there.clients, [MemoryRegion(RING_ADDRESS, guest.there.memory)], resume=guest.moved)
        here = [MemoryRegion(RING_ADDRESS, guest.here.memory)]
        job = Migration(guest.here.clients, there, memory=here, guest_dirty=guest.dirty, resume=guest.resume)
        with pytest.raises(KeyboardInterrupt):
            list(job.run())
        assert job.report.status is Status.UNCONFIRMED
        assert guest.here is destination
        for client in source.clients:
            assert client.migration_get_state() not in RUNNING_STATES
        assert guest.verify() == []


def test_the_source_does_not_wait_for_a_destination_that_is_reset() -> None:
    """That may take as long as a timeout; the guest stands still meanwhile. Only where it may run it comes first."""
    events: list[str] = []

    def called(side: str, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "reset" or arguments == (DeviceState.RUNNING,):
            events.append(f"{side} {number} {name}")

    def refuse() -> None:
        raise OSError(5, "no")

    def order(**callbacks: Any) -> list[str]:
        events.clear()
        with quiet_guest() as guest:
            job = guest.migration(**callbacks)
            watch(guest, called)
            with pytest.raises(MigrationError):
                list(job.run())
            return [event.partition(" ")[0] for event in events]

    assert order(connect=refuse) == ["source", "source", "destination", "destination"]
    assert order(resume_there=refuse)[2:] == ["destination", "destination", "source", "source"]
