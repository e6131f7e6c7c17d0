"""A running QEMU guest moves with its vfio-user devices, though QEMU's ``migrate`` knows nothing of these.

QEMU moves its machine and its memory; the devices' states go from server to server, by their control sockets; and what
QEMU would lose on the way is put right while both guests stand still. The order is what makes it safe; the steps are
those of :class:`vfio_user.live.report.Step`::

    CHECK      do both machines and all devices fit?
    LOGGING    the servers log what they write to guest memory, which QEMU cannot see
    PRE_COPY   QEMU sends memory, and the devices what they can send ahead, while the guest runs
    PAUSE      the guest is stopped; QEMU waits before it switches over
    STOP_COPY  the devices stop; QEMU is made to see what they wrote; their states and what QEMU would lose are taken
    LOAD       QEMU switches over; the devices take their states; the destination's QEMU is told what it lost
    START      the devices run, the guest goes on at the destination

Until START whatever fails lets the source run on; the destination's QEMU, which never ran the guest, ends then. From
there on the source must never run: what fails where the guest may run leaves it stopped (UnconfirmedError).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vfio_user.errors import MigrationError, VfioUserError
from vfio_user.live.destination import UnconfirmedError, nothing
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.handover import Handover
from vfio_user.live.qemu.incoming import Incoming
from vfio_user.live.qemu.job import Job
from vfio_user.live.qemu.machine import Machine
from vfio_user.live.qemu.monitor import POLL, ClosedError, Monitor
from vfio_user.live.qemu.outgoing import Outgoing, do_all
from vfio_user.live.qemu.passes import Passes
from vfio_user.live.qemu.places import PlacedDevice
from vfio_user.live.qemu.plan import DevicePair, MovingDevice, Plan
from vfio_user.live.report import Report, Round, Status, Step
from vfio_user.wire.constants import DeviceState

_FOLDER, _SOCKET = "vfio-user-", "memory.sock"
_SCHEMES = ("tcp", "unix", "vsock", "rdma")
"""Of URIs that mean the same to both QEMUs."""
_LONGEST = 107
"""Bytes in the name of a UNIX socket."""


class QemuMigration(Job):
    """Moves the guest of the ``source`` QEMU, with its ``devices``, to the ``destination`` QEMU, which waits for it.

    ``uri`` is where the memory goes, as both QEMUs reach it: by default a UNIX socket of this host. ``gdb`` is a path
    for a socket that the destination's QEMU makes and this process reaches, where a device uses MSI-X. The guest is
    stopped when what is left takes less than ``downtime`` seconds; when it is not so after ``max_passes`` over the
    memory, the migration fails, or with ``force`` goes on all the same. ``bandwidth``: bytes per second at most.

    ``shared_memory``: both have it in the same files, and it is not sent. ``cold``: the guest stands still from the
    beginning, and nothing needs to be logged: for a guest with an IOMMU, whose maps may be gone when QEMU is to see
    what was written there. ``keep_source``: the source's QEMU does not end when all is done; its guest must never run
    again. ``timeout`` in seconds bounds each step while the guest stands still, with ``force`` or ``cold`` but that for
    memory. ``check`` is called often, before each step too, until the devices start at the destination, and may raise.
    """

    def __init__(
        self,
        source: Monitor,
        destination: Monitor,
        devices: Sequence[DevicePair],
        *,
        uri: str | None = None,
        gdb: str | None = None,
        downtime: float = 0.3,
        max_passes: int = 30,
        force: bool = False,
        bandwidth: int | None = None,
        shared_memory: bool = False,
        cold: bool = False,
        keep_source: bool = False,
        timeout: float = 30.0,
        check: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(Report(), check)
        self.source, self.destination = Machine(source), Machine(destination)
        self._pairs = devices
        self._outgoing = Outgoing(self.source, [pair.here for pair in devices], timeout, check)
        self._debugger = Debugger(destination, timeout, gdb)
        self._incoming = Incoming(self.destination, [pair.there for pair in devices], self._debugger)
        self._uri = uri
        self.downtime, self.max_passes, self.force = downtime, max_passes, force
        self._bandwidth = bandwidth
        self.shared_memory = shared_memory
        self.cold = cold
        self._logs = not (cold or shared_memory)
        self._keep_source = keep_source
        self._moving: list[MovingDevice] = []
        self._paused_at: float | None = None

    def plan(self) -> Plan:
        """What would move, and what stands against it. Nothing changes."""
        plan = Plan(
            self.source,
            self.destination,
            self._pairs,
            self._debugger,
            shared_memory=self.shared_memory,
            logs=self._logs,
        )
        if self._uri is not None and self._uri.partition(":")[0] not in _SCHEMES:
            plan.obstacles.append(
                f"{self._uri} is no way from one QEMU to another: {', '.join(_SCHEMES)}, as tcp:HOST:PORT"
            )
        if self._uri is None and _too_long(tempfile.gettempdir()):
            plan.obstacles.append(f"{tempfile.gettempdir()}: too long for a socket: name another folder with TMPDIR")
        return plan

    def run(self) -> Generator[Round, None, None]:
        """Migrate; yields each pass over the memory, and leaves the outcome in ``report``. Raises MigrationError.

        Giving up the iteration is a failure like any other: it is rolled back.
        """
        started = time.monotonic()
        try:
            with _folder() as folder:
                yield from self._steps(folder)
        except BaseException as error:
            self._give_up(error)
            if isinstance(error, (VfioUserError, OSError)):
                kind = UnconfirmedError if self.report.status is Status.UNCONFIRMED else MigrationError
                raise kind(f"{self.report.step} failed: {error}") from error
            raise
        finally:
            if self.report.status is Status.COMPLETED:
                self._leave()
            self.report.total = time.monotonic() - started

    def recover(self) -> Status:
        """After a controller that died on the way: one of the two guests runs then. Raises MigrationError.

        COMPLETED where the guest is at the destination: the devices there ran, or the guest itself. Else it runs on at
        the source, and the status is FAILED.
        """
        if self._is_at_destination():
            self.report.step = Step.START
            self._incoming.suspect()
            self._incoming.start(guest=True)
            self.report.status = Status.COMPLETED
            self._leave()
        else:
            self.source.monitor.status()  # where it has ended, nothing is to be undone
            self.report.step, self._outgoing.servers.logging = Step.PRE_COPY, True
            self._outgoing.suspect()
            self._roll_back()
            runs = self.source.monitor.status().running
            if self.report.error or not runs:
                raise MigrationError(
                    f"the source's guest {'runs' if runs else 'does not run'} on{self.report.error or ''}"
                )
        return self.report.status

    def _is_at_destination(self) -> bool:
        """From the moment that one device runs there: all wait for their states until then."""
        monitor = self.destination.monitor
        try:
            status = monitor.status()
        except ClosedError:
            self._check_destination_ended()
            return False
        ran = any(pair.destination.migration_get_state() is DeviceState.RUNNING for pair in self._pairs)
        at_source = any(pair.source.migration_get_state() is DeviceState.RUNNING for pair in self._pairs)
        if at_source and status.running:
            raise MigrationError("both guests may run: see what vfio-user info says of the devices of each")
        return status.running or (status.status == "paused" and ran and not at_source)

    def _check_destination_ended(self) -> None:
        """Its monitor cannot be reached: that may be a wrong name. Its devices know whether a QEMU has them."""
        for pair in self._pairs:
            if pair.destination.status().connected:
                raise MigrationError(
                    f"the destination QEMU cannot be asked, but may run the guest: a QEMU is connected to the server of"
                    f" {pair.name} at the destination: name its QMP socket, or end it"
                )

    def _steps(self, folder: Path) -> Iterator[Round]:
        plan = self.plan()
        plan.check()
        self._moving = plan.devices
        self._outgoing.see_guest()
        self._prepare()
        if self.cold:
            yield from self._stop_first(folder)
        else:
            self._enter(Step.PRE_COPY)
            self._begin(folder)
            yield from self._pre_copy()
            self._enter(Step.PAUSE)
            self._paused_at = time.monotonic()
            with self._timed("stop"):
                self._pause()
                self._stop_devices()
        handovers = self._take()
        self._enter(Step.LOAD)
        guest_address = self.source.config_address()
        with self._timed("switch"):
            self._switch()
        with self._timed("load"):
            self._incoming.load()
        with self._timed("programming"):
            arrived = [PlacedDevice(moving.pair.there, moving.function) for moving in self._moving]
            self._incoming.program(arrived, handovers, guest_address)
        self._enter(Step.START)
        with self._timed("start"):
            self._incoming.start(guest=self._outgoing.guest_runs)
        self.report.status = Status.COMPLETED
        self.report.downtime = time.monotonic() - (self._paused_at or 0.0)

    # While the guest runs

    def _prepare(self) -> None:
        """The destination's devices wait for their states; the source's log what they write."""
        self._enter(Step.LOGGING)
        self._incoming.prepare()
        if self._logs:
            self._outgoing.servers.start_logging([])

    def _begin(self, folder: Path) -> None:
        """QEMU begins to send memory, and is to wait before it switches over."""
        both = {"events": True, "x-ignore-shared": self.shared_memory}
        parameters: dict[str, object] = {"downtime-limit": 0}  # or it would not wait until the guest has stopped
        if self._bandwidth is not None:
            parameters["max-bandwidth"] = self._bandwidth
        uri = self._uri or f"unix:{folder / _SOCKET}"
        self._outgoing.set_up({"pause-before-switchover": True, **both}, parameters)
        self._incoming.listen(uri, both)
        self.source.monitor.execute("migrate", uri=uri)

    def _pre_copy(self) -> Iterator[Round]:
        """Until what is left goes in the downtime that is allowed."""
        self._outgoing.servers.start_ahead()
        passes = Passes()
        while True:
            info = self._outgoing.look()
            self._outgoing.see_guest()
            passes.device_bytes += self._send_ahead()
            done = passes.see(info)
            if done is not None:
                self.report.rounds.append(done)
                yield done
            if info.status == "pre-switchover" or passes.time_for_the_rest <= self.downtime:
                return
            if len(self.report.rounds) >= self.max_passes:
                if self.force:
                    return
                raise MigrationError(
                    f"it does not converge: after {self.max_passes} passes the rest would take"
                    f" {passes.time_for_the_rest:.1f} s, {self.downtime:.1f} s are allowed"
                )
            self.source.monitor.wait_event(POLL)

    def _send_ahead(self) -> int:
        return self._carry(self._outgoing.servers.read_ahead())

    def _carry(self, data: Iterator[tuple[int, memoryview]]) -> int:
        """Device data from source to destination; bytes."""
        count = 0
        for number, piece in data:
            self._interrupt()
            self._incoming.write(number, piece)
            count += len(piece)
        self.report.device_state_bytes += count
        return count

    # While it stands still

    def _pause(self) -> None:
        """Stop the guest first: so a failure leaves it stopped until its devices run again."""
        self._outgoing.see_guest()
        self.source.monitor.execute("stop")
        self._outgoing.wait("it comes to the switch-over", self._waits, forever=self.force)

    def _waits(self) -> bool:
        return self._outgoing.look().status == "pre-switchover"

    def _stop_first(self, folder: Path) -> Iterator[Round]:
        """Cold: nothing is written any more when the memory goes, in one pass, and nothing needs to be logged."""
        self._enter(Step.PAUSE)
        self._paused_at = time.monotonic()
        with self._timed("stop"):
            self._outgoing.see_guest()
            self.source.monitor.execute("stop")
            self._stop_devices()
        with self._timed("memory"):
            passes = Passes()
            self._begin(folder)
            self._outgoing.wait("it comes to the switch-over", self._waits, forever=True)
            done = passes.see(self._outgoing.look(), stopped=True)
        if done is not None:
            self.report.rounds.append(done)
            yield done

    def _stop_devices(self) -> None:
        self._enter(Step.STOP_COPY)
        self._outgoing.stop_devices([PlacedDevice(moving.pair.here, moving.function) for moving in self._moving])

    def _take(self) -> list[Handover]:
        if self._logs:
            with self._timed("push"):
                self._outgoing.push()
        with self._timed("save"):
            self._carry(self._outgoing.servers.read_rest())
            return self._outgoing.take()

    def _switch(self) -> None:
        """QEMU's own state goes; afterwards the guest is there, and nowhere runs."""
        self.source.monitor.execute("migrate-continue", state="pre-switchover")
        self._outgoing.wait("the guest arrives", self._arrived)
        self._incoming.check_arrived()

    def _arrived(self) -> bool:
        info = self._incoming.look()
        try:
            sent = self._outgoing.look().status == "completed"
        except ClosedError:  # a source that is gone is no loss, once all is at the destination
            sent = True
        return sent and info.status == "completed"

    # Afterwards

    def _leave(self) -> None:
        """The guest is at the destination, whatever fails now."""
        self._incoming.put_settings_back()
        self._outgoing.release(quit_it=not self._keep_source)

    def _give_up(self, error: BaseException) -> None:
        """Roll back, unless the destination has the guest, or may have it: then the source must not have it, too."""
        if self.report.status is Status.COMPLETED:
            return
        self.report.error = str(error) or type(error).__name__
        if isinstance(error, UnconfirmedError):
            self.report.status = Status.UNCONFIRMED
        elif self.report.step is not Step.CHECK:
            self._roll_back()

    def _roll_back(self) -> None:
        """Let the source run on as if nothing had been; whatever one part raises, the others are done.

        The settings come last. Where devices run at the destination already, that ends first.
        """
        devices_ran = self.report.step is Step.START
        parts = list(self._outgoing.way_back())
        parts.insert(0 if devices_ran else len(parts), partial(self._incoming.end, devices_ran=devices_ran))
        for failure in do_all([*parts, self._outgoing.put_settings_back]):
            self.report.error = f"{self.report.error or ''}; while rolling back: {failure}"


def _too_long(parent: str) -> bool:
    """For a socket in a folder there, as mkdtemp names it."""
    return len(os.fsencode(os.path.join(parent, f"{_FOLDER}{'x' * 8}", _SOCKET))) > _LONGEST


@contextmanager
def _folder() -> Iterator[Path]:
    """Only for this user, and for as long as it takes; that it cannot be removed is no fault. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
