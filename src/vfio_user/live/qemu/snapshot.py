"""A QEMU guest in a folder: saved with its vfio-user devices, and restored, as often as one likes.

Saving is a migration into a file, of a guest that stands still from the beginning: nothing needs to be logged, and QEMU
sends all that the devices wrote. The order is what makes it safe: the devices' states, and what QEMU would lose, are
taken before QEMU sends its machine, which then has no interrupt of theirs asserted. The source runs on when all is in
the folder, which gets its name only then.

QEMU is given the file for its memory open (:meth:`vfio_user.live.qemu.monitor.Monitor.lent`): it may be another user's,
in another folder, and confined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from vfio_user import __version__
from vfio_user.errors import MigrationError, StreamError, VfioUserError, reason_of
from vfio_user.live.destination import UnconfirmedError, nothing
from vfio_user.live.files import Header
from vfio_user.live.files import Writer as StateWriter
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.handover import Handover
from vfio_user.live.qemu.incoming import Incoming
from vfio_user.live.qemu.job import Job
from vfio_user.live.qemu.machine import Machine
from vfio_user.live.qemu.monitor import POLL, Monitor
from vfio_user.live.qemu.outgoing import Outgoing, do_all
from vfio_user.live.qemu.places import ServedDevice
from vfio_user.live.qemu.snapshot_files import (
    CONFIG,
    FORMAT_VERSION,
    MEMORY,
    MSIX,
    STATE,
    Manifest,
    SavedDevice,
    Snapshot,
    SnapshotWriter,
    check_target,
    opened,
    written,
)
from vfio_user.live.qemu.snapshot_plans import RestorePlan, SavePlan
from vfio_user.live.report import Report, Status, Step
from vfio_user.wire.constants import DeviceState

_PLAIN: dict[str, object] = {"max-bandwidth": 0, "tls-creds": "", "mode": "normal"}
"""Parameters of a stream that any QEMU reads from a file; as fast as it goes."""


@dataclass(slots=True)
class SnapshotReport(Report):
    """How it went. COMPLETED: it is saved, or restored. ``memory_bytes``: what QEMU sent or read."""

    memory_bytes: int = 0

    def as_json(self) -> dict[str, object]:
        """As ``--json`` prints it; times in milliseconds."""
        told = Report.as_json(self)
        del told["rounds"], told["dirty_pages"]
        return {**told, "memory_bytes": self.memory_bytes}


class QemuSave(Job):
    """Saves the guest of the ``source`` QEMU with its ``devices``, which are all that it has, to a new ``folder``.

    The guest stands still meanwhile, and runs on, whatever fails. With ``end`` its QEMU ends instead, once all is
    saved. ``timeout`` in seconds bounds each step but the writing of memory. ``check`` is called often and may raise.
    """

    report: SnapshotReport

    def __init__(
        self,
        source: Monitor,
        devices: Sequence[ServedDevice],
        folder: Path,
        *,
        end: bool = False,
        timeout: float = 30.0,
        check: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(SnapshotReport(), check)
        self.source = Machine(source)
        self.folder = folder
        self._served = devices
        self._end = end
        self._outgoing = Outgoing(self.source, devices, timeout, check)

    @property
    def guest_runs(self) -> bool:
        """Whether it goes on, after :meth:`run`: it does if it ran before, and its QEMU has not ended."""
        return self._outgoing.guest_runs and not self._end

    def plan(self) -> SavePlan:
        """What would be saved, and what stands against it. Nothing changes."""
        plan = SavePlan(self.source, self._served)
        try:
            check_target(self.folder)
        except OSError as error:
            plan.obstacles.append(reason_of(error))
        return plan

    def run(self) -> None:
        """Save. Raises MigrationError; unless it says that the guest is saved all the same, no folder is left."""
        started = time.monotonic()
        try:
            plan = self.plan()
            plan.check()
            with written(self.folder, self._interrupt) as writer:
                try:
                    self._save(plan, writer)
                except BaseException as error:
                    self._give_up(error)
                    raise
        except (VfioUserError, OSError) as error:
            self.report.error = self.report.error or reason_of(error)
            raise MigrationError(f"not saved: {self.report.error}") from error
        finally:
            self.report.total = time.monotonic() - started
        if self.report.error:
            raise MigrationError(f"saved to {self.folder}, but the source does not go on: {self.report.error}")

    def recover(self) -> None:
        """After one that was killed: the guest runs on then. Raises MigrationError."""
        for one in self._served:
            if one.control.migration_get_state() is DeviceState.STOP:
                raise MigrationError(f"{one.name} is in state STOP: its guest has moved away, or was saved and ended")
        self._outgoing.suspect()
        failures = self._go_on()
        if failures or not self.source.monitor.status().running:
            raise MigrationError("; ".join(["the guest does not run on", *failures]))

    def _save(self, plan: SavePlan, writer: SnapshotWriter) -> None:
        self._outgoing.see_guest()
        self._enter(Step.PAUSE)
        paused_at = time.monotonic()
        with self._timed("stop"):
            self.source.monitor.execute("stop")
            self._outgoing.stop_devices(plan.devices)
        self._enter(Step.STOP_COPY)
        with self._timed("save"):
            self._write_states(plan, writer)
            handovers = self._outgoing.take()
            config_address = self.source.config_address()
        with self._timed("memory"):
            self._write_memory(writer)
        if not self._end:
            with self._timed("start"):
                self.report.step = Step.START
                self.report.error = "; ".join(self._go_on()) or None
        self.report.downtime = time.monotonic() - paused_at
        writer.publish(self._manifest(plan, handovers, config_address, writer))
        self.report.status = Status.COMPLETED
        if self._end:
            self.report.step = Step.START
            self._outgoing.release(quit_it=True)

    def _write_states(self, plan: SavePlan, writer: SnapshotWriter) -> None:
        with ExitStack() as stack:
            states = [
                StateWriter(stack.enter_context(writer.create(STATE.format(number))), Header(__version__, offer))
                for number, offer in enumerate(plan.offers)
            ]
            for number, data in self._outgoing.servers.read_rest():
                self._interrupt()
                states[number].add(data)
            for state in states:
                state.end()
                self.report.device_state_bytes += state.size

    def _write_memory(self, writer: SnapshotWriter) -> None:
        monitor = self.source.monitor
        self._outgoing.set_up({"events": True}, _PLAIN, others=False)
        with writer.create(MEMORY) as file, monitor.lent(file.fileno()) as uri:
            monitor.execute("migrate", uri=uri)
            self._outgoing.wait("memory", lambda: self._outgoing.look().status == "completed", forever=True)

    def _manifest(
        self, plan: SavePlan, handovers: Sequence[Handover], config_address: int, writer: SnapshotWriter
    ) -> Manifest:
        """What was saved, all of which is on disk then."""
        assert plan.shape is not None  # else it would have obstacles
        memory = writer.entry(MEMORY)
        self.report.memory_bytes = memory.size
        return Manifest(
            format=FORMAT_VERSION,
            package=__version__,
            qemu=plan.qemu,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=plan.shape,
            guest_ran=self._outgoing.guest_runs,
            config_address=config_address,
            memory=memory,
            devices=[
                SavedDevice(
                    name=placed.function.name,
                    path=list(placed.function.path),
                    offer=offer,
                    state=writer.entry(STATE.format(number)),
                    config=writer.write(CONFIG.format(number), handover.config.data),
                    msix=writer.write(MSIX.format(number), handover.table),
                )
                for number, (placed, offer, handover) in enumerate(
                    zip(plan.devices, plan.offers, handovers, strict=True)
                )
            ],
        )

    def _go_on(self) -> list[str]:
        return do_all([*self._outgoing.way_back(), self._outgoing.put_settings_back])

    def _give_up(self, error: BaseException) -> None:
        # What is there already, is that the guest does not go on.
        self.report.error = "; ".join(filter(None, (self.report.error, reason_of(error))))
        if self.report.step in (Step.PAUSE, Step.STOP_COPY):
            for failure in self._go_on():
                self.report.error += f"; while rolling back: {failure}"


class QemuRestore(Job):
    """Gives the guest in ``folder`` to the ``destination`` QEMU, which waits for one, and to its ``devices``.

    With ``paused`` it does not run, as if it had been paused when it was saved. ``gdb`` and ``timeout`` are those of
    :class:`vfio_user.live.qemu.QemuMigration`. ``check`` is called often and may raise.
    """

    report: SnapshotReport

    def __init__(
        self,
        destination: Monitor,
        devices: Sequence[ServedDevice],
        folder: Path,
        *,
        gdb: str | None = None,
        paused: bool = False,
        timeout: float = 30.0,
        check: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(SnapshotReport(), check)
        self.destination = Machine(destination)
        self.folder = folder
        self._served = devices
        self._paused = paused
        self._debugger = Debugger(destination, timeout, gdb)
        self.guest_runs = False
        """Whether it goes on, after :meth:`run`."""

    def plan(self) -> RestorePlan:
        """What would be restored, and what stands against it. Raises MigrationError for no snapshot that is sound."""
        with self._opened() as snapshot:
            return self._plan(snapshot)

    def run(self) -> None:
        """Restore. Raises MigrationError; once anything has changed, the destination's QEMU ends with that."""
        started = time.monotonic()
        try:
            with self._opened() as snapshot:
                plan = self._plan(snapshot)
                plan.check()
                incoming = Incoming(self.destination, [placed.served for placed in plan.devices], self._debugger)
                try:
                    self._restore(plan, snapshot, incoming)
                except BaseException as error:
                    self._give_up(error, incoming)
                    raise
        except (VfioUserError, OSError) as error:
            self.report.error = self.report.error or reason_of(error)
            unconfirmed = self.report.status is Status.UNCONFIRMED
            kind, verdict = (UnconfirmedError, "unconfirmed") if unconfirmed else (MigrationError, "not restored")
            raise kind(f"{verdict}: {self.report.error}") from error
        finally:
            self.report.total = time.monotonic() - started

    @contextmanager
    def _opened(self) -> Iterator[Snapshot]:
        try:
            with opened(self.folder, self._interrupt) as snapshot:
                yield snapshot
        except StreamError as error:
            raise MigrationError(f"{self.folder}: {error}") from error

    def _plan(self, snapshot: Snapshot) -> RestorePlan:
        return RestorePlan(snapshot.manifest, self.destination, self._served, self._debugger)

    def _restore(self, plan: RestorePlan, snapshot: Snapshot, incoming: Incoming) -> None:
        self._enter(Step.LOAD)
        with self._timed("memory"):
            incoming.prepare()
            self._read_states(snapshot, incoming)
            self._read_memory(snapshot, incoming)
        with self._timed("load"):
            incoming.load()
        with self._timed("programming"):
            incoming.program(plan.devices, snapshot.handovers(), snapshot.manifest.config_address)
        self._enter(Step.START)
        with self._timed("start"):
            self.guest_runs = snapshot.manifest.guest_ran and not self._paused
            incoming.start(guest=self.guest_runs)
        self.report.status = Status.COMPLETED
        incoming.put_settings_back()

    def _read_states(self, snapshot: Snapshot, incoming: Incoming) -> None:
        for number, state in enumerate(snapshot.states):
            for data in state.records():
                self._interrupt()
                incoming.write(number, memoryview(data))
            self.report.device_state_bytes += state.size

    def _read_memory(self, snapshot: Snapshot, incoming: Incoming) -> None:
        with self.destination.monitor.lent(snapshot.memory()) as uri:
            incoming.listen(uri, {"events": True})
            while incoming.look().status != "completed":
                self._interrupt()
                self.destination.monitor.wait_event(POLL)
        incoming.check_arrived()
        self.report.memory_bytes = snapshot.manifest.memory.size

    def _give_up(self, error: BaseException, incoming: Incoming) -> None:
        if self.report.status is Status.COMPLETED:
            return
        self.report.error = reason_of(error)
        if isinstance(error, UnconfirmedError):
            self.report.status = Status.UNCONFIRMED
        elif self.report.step is not Step.CHECK:
            for failure in do_all([partial(incoming.end, devices_ran=self.report.step is Step.START)]):
                self.report.error += f"; while ending the destination: {failure}"
