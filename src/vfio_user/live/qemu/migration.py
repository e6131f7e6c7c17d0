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

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from vfio_user.client.control import AccessMode
from vfio_user.errors import CallTimeoutError, MigrationError, VfioUserError
from vfio_user.live.destination import UnconfirmedError, nothing
from vfio_user.live.qemu.gdbstub import GdbStub
from vfio_user.live.qemu.handover import DestinationDevice, Handover, SourceDevice
from vfio_user.live.qemu.machine import Machine
from vfio_user.live.qemu.monitor import ClosedError, LateError, MigrationInfo, Monitor, MonitorError, RefusedError
from vfio_user.live.qemu.plan import DevicePair, MovingDevice, Plan, find_source
from vfio_user.live.report import Report, Round, Status, Step
from vfio_user.live.source import Source
from vfio_user.wire.constants import DeviceState

POLL = 0.02
"""Seconds between two looks at a migration in which nothing seems to happen."""
_ENDED = ("completed", "failed", "cancelled", "none")
_PAUSE = {"capability": "pause-before-switchover", "state": True}
_EVENTS = {"capability": "events", "state": True}
_SHARED = {"capability": "x-ignore-shared", "state": True}
_USUAL_PARAMETERS = {"downtime_limit": 300}
_USUAL_CAPABILITIES = [{**one, "state": False} for one in (_PAUSE, _EVENTS, _SHARED)]
"""What a QEMU has before anybody asks for something else."""


class QemuMigration:
    """Moves the guest of the ``source`` QEMU, with its ``devices``, to the ``destination`` QEMU, which waits for it.

    ``uri`` is where the memory goes, as both QEMUs reach it: by default a UNIX socket of this host. ``gdb`` is a path
    for a socket that the destination's QEMU makes and this process reaches, where a device uses MSI-X. The guest is
    stopped when what is left takes less than ``downtime`` seconds; when it is not so after ``max_passes`` over the
    memory, the migration fails, or with ``force`` goes on all the same. ``bandwidth``: bytes per second at most.

    ``shared_memory``: both have it in the same files, and it is not sent. ``cold``: the guest stands still from the
    beginning, and nothing needs to be logged: for a guest with an IOMMU, whose maps may be gone when QEMU is to see
    what was written there. ``keep_source``: the source's QEMU does not end when all is done; its guest must never run
    again. ``timeout`` in seconds bounds each step while the guest stands still. ``check`` is called often, before each
    step too, until the devices start at the destination, and may raise.
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
        self.source, self.destination = Machine(source), Machine(destination)
        self._pairs = devices
        self._uri, self._gdb = uri, gdb
        self.downtime, self.max_passes, self.force = downtime, max_passes, force
        self._bandwidth = bandwidth
        self.shared_memory = shared_memory
        self.cold = cold
        self._logs = not (cold or shared_memory)
        self._keep_source = keep_source
        self._timeout = timeout
        self._interrupt = check
        self.report = Report()
        self._servers = Source([pair.source for pair in devices])
        self._moving: list[MovingDevice] = []
        self._devices: list[SourceDevice] = []
        self._undo = ExitStack()
        self._guest_runs = True
        self._paused_at: float | None = None

    def plan(self) -> Plan:
        """What would move, and what stands against it. Nothing changes."""
        return Plan(self.source, self.destination, self._pairs, shared_memory=self.shared_memory, logs=self._logs)

    def run(self) -> Generator[Round, None, None]:
        """Migrate; yields each pass over the memory, and leaves the outcome in ``report``. Raises MigrationError.

        Giving up the iteration is a failure like any other: it is rolled back.
        """
        started = time.monotonic()
        try:
            with TemporaryDirectory(prefix="vfio-user-") as folder:
                yield from self._steps(Path(folder))
        except BaseException as error:
            self._give_up(error)
            if isinstance(error, (VfioUserError, OSError)):
                kind = UnconfirmedError if self.report.status is Status.UNCONFIRMED else MigrationError
                raise kind(f"{self.report.step} failed: {error}") from error
            raise
        finally:
            self.report.total = time.monotonic() - started

    def recover(self) -> Status:
        """After a controller that died on the way: one of the two guests runs then. Raises MigrationError.

        COMPLETED where the guest is at the destination: the devices there ran, or the guest itself. Else it runs on at
        the source, and the status is FAILED.
        """
        if self._is_at_destination():
            self.report.step = Step.START
            self._start()
            self._release_source()
            self.report.status = Status.COMPLETED
        else:
            self.report.step, self._servers.logging = Step.PRE_COPY, True
            self._devices = list(self._suspects())
            monitor = self.source.monitor
            self._undo.callback(monitor.execute, "migrate-set-parameters", **_USUAL_PARAMETERS)
            self._undo.callback(monitor.execute, "migrate-set-capabilities", capabilities=_USUAL_CAPABILITIES)
            self.report.error = ""
            self._roll_back()
            if self.report.error or not monitor.status().running:
                raise MigrationError(f"the source's guest does not run on{self.report.error}")
        return self.report.status

    def _suspects(self) -> Iterator[SourceDevice]:
        """The source's devices, of which it is not known what was done to them."""
        plugged = self.source.plugged()
        for pair in self._pairs:
            for function in find_source(self.source, pair.source, plugged)[:1]:
                device = SourceDevice(self.source, MovingDevice(pair, function))
                device.suspect_lowered()
                yield device

    def _is_at_destination(self) -> bool:
        """From the moment that one device runs there: all wait for their states until then."""
        monitor = self.destination.monitor
        try:
            status = monitor.status()
        except ClosedError:
            return False
        ran = any(pair.destination.migration_get_state() is DeviceState.RUNNING for pair in self._pairs)
        at_source = any(pair.source.migration_get_state() is DeviceState.RUNNING for pair in self._pairs)
        if at_source and status.running:
            raise MigrationError("both guests may run: see what vfio-user info says of the devices of each")
        return status.running or (status.status == "paused" and ran and not at_source)

    def _steps(self, folder: Path) -> Iterator[Round]:
        plan = self.plan()
        plan.check()
        self._moving = plan.devices
        self._guest_runs = self.source.monitor.status().running
        self._prepare()
        if self.cold:
            self._stop_first(folder)
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
            self._load()
        with self._timed("programming"):
            self._program(handovers, guest_address, folder)
        self._enter(Step.START)
        with self._timed("start"):
            self._start()
        self.report.downtime = time.monotonic() - (self._paused_at or 0.0)
        self.report.status = Status.COMPLETED
        self._release_source()

    def _enter(self, step: Step) -> None:
        self._interrupt()
        self.report.step = step

    @contextmanager
    def _timed(self, cause: str) -> Iterator[None]:
        """What the guest stands still for, and how long."""
        self._interrupt()
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.report.causes[cause] = self.report.causes.get(cause, 0.0) + spent

    # While the guest runs

    def _prepare(self) -> None:
        """The destination's devices wait for their states; the source's log what they write."""
        self._enter(Step.LOGGING)
        for pair in self._pairs:
            pair.destination.migration_set_state(DeviceState.RESUMING)
        if self._logs:
            self._servers.start_logging([])

    def _begin(self, folder: Path) -> None:
        """QEMU begins to send memory."""
        here, there = self.source.monitor, self.destination.monitor
        shared = [_SHARED] if self.shared_memory else []
        # A guest that arrives must wait for its devices: this is -S, said late.
        there.execute("stop")
        there.execute("migrate-set-capabilities", capabilities=[_EVENTS, *shared])
        self._set_up_source([_PAUSE, _EVENTS, *shared])
        uri = self._uri or f"unix:{folder / 'memory.sock'}"
        there.execute("migrate-incoming", uri=uri)
        here.execute("migrate", uri=uri)

    def _set_up_source(self, capabilities: list[dict[str, object]]) -> None:
        """Have the source's QEMU wait before it switches over; a failure puts its settings back."""
        monitor = self.source.monitor
        before = monitor.ask(list[dict[str, object]], "query-migrate-capabilities")
        names = {one["capability"] for one in capabilities}
        changed = [one for one in before if one.get("capability") in names]
        parameters = monitor.ask(dict[str, object], "query-migrate-parameters")
        wanted: dict[str, object] = {"downtime-limit": 0}  # it never switches over by itself, unless nothing is left
        if self._bandwidth is not None:
            wanted["max-bandwidth"] = self._bandwidth
        self._undo.callback(
            monitor.execute,
            "migrate-set-parameters",
            **{name: parameters[name] for name in wanted if name in parameters},
        )
        self._undo.callback(monitor.execute, "migrate-set-capabilities", capabilities=changed)
        monitor.execute("migrate-set-capabilities", capabilities=capabilities)
        monitor.execute("migrate-set-parameters", **wanted)

    def _pre_copy(self) -> Iterator[Round]:
        """Until what is left goes in the downtime that is allowed."""
        self._servers.start_ahead()
        passes = _Passes(time.monotonic())
        while True:
            info = self._look()
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
        return self._carry(self._servers.read_ahead())

    def _carry(self, data: Iterator[tuple[int, memoryview]]) -> int:
        """Device data from source to destination; bytes."""
        count = 0
        for number, piece in data:
            self._pairs[number].destination.migration_write_data(piece)
            count += len(piece)
        self.report.device_state_bytes += count
        return count

    def _look(self) -> MigrationInfo:
        """How far QEMU's migration is. Raises MigrationError where it has failed."""
        self._interrupt()
        info = self.source.monitor.migration()
        if info.status in ("failed", "cancelled", "cancelling"):
            raise MigrationError(f"the source QEMU's migration {info.status}: {info.error_desc or 'no reason given'}")
        return info

    # While it stands still

    def _pause(self) -> None:
        """Stop the guest first: so a failure leaves it stopped until its devices run again."""
        self.source.monitor.execute("stop")
        self._wait("it comes to the switch-over", lambda: self._look().status == "pre-switchover")

    def _stop_first(self, folder: Path) -> None:
        """Cold: nothing is written any more when the memory goes, and nothing needs to be logged."""
        self._enter(Step.PAUSE)
        self._paused_at = time.monotonic()
        with self._timed("stop"):
            self.source.monitor.execute("stop")
            self._stop_devices()
        with self._timed("memory"):
            self._begin(folder)
            self._wait("it comes to the switch-over", lambda: self._look().status == "pre-switchover", forever=True)

    def _stop_devices(self) -> None:
        self._enter(Step.STOP_COPY)
        self._devices = [SourceDevice(self.source, moving) for moving in self._moving]
        for device in self._devices:
            device.settle()
            device.control.set_access(AccessMode.HOLD)
        self._servers.stop()

    def _take(self) -> list[Handover]:
        if self._logs:
            with self._timed("push"):
                for device in self._devices:
                    device.push(self._timeout)
        with self._timed("save"):
            self._carry(self._servers.read_rest())
            return [device.take() for device in self._devices]

    def _switch(self) -> None:
        """QEMU's own state goes; afterwards the guest is there, and nowhere runs."""
        self.source.monitor.execute("migrate-continue", state="pre-switchover")
        self._wait("the guest arrives", self._arrived)
        status = self.destination.monitor.status()
        if status.status != "paused":
            raise MigrationError(f"the destination QEMU is {status.status} after it has taken the guest, not paused")

    def _arrived(self) -> bool:
        info = self.destination.monitor.migration()
        if info.status == "failed":
            raise MigrationError(f"the destination QEMU's migration failed: {info.error_desc or 'no reason given'}")
        try:
            sent = self._look().status == "completed"
        except ClosedError:  # a source that is gone is no loss, once all is at the destination
            sent = True
        return sent and info.status == "completed"

    def _load(self) -> None:
        for pair in self._pairs:
            pair.destination.migration_set_state(DeviceState.STOP)

    def _program(self, handovers: Sequence[Handover], guest_address: int, folder: Path) -> None:
        for moving, handover in zip(self._moving, handovers, strict=True):
            device = DestinationDevice(self.destination, moving)
            device.program(handover, guest_address, lambda at, data: self._write_memory(folder, at, data))
            device.verify(handover)
            device.mark_pending(handover)

    def _write_memory(self, folder: Path, address: int, data: bytes) -> None:
        path = self._gdb or str(folder / "gdb.sock")
        monitor = self.destination.monitor
        said = monitor.hmp(f"gdbserver unix:{path},server=on,wait=off")
        try:
            if not said.startswith("Waiting for gdb"):
                raise MonitorError(f"the destination QEMU has no gdbstub, which MSI-X needs: {said}")
            with GdbStub(path, self._timeout) as stub:
                stub.write(address, data)
        finally:
            monitor.hmp("gdbserver none")

    def _start(self) -> None:
        """The point of no return. Raises UnconfirmedError where the guest may run."""
        self.destination.monitor.status()  # it is there, and answers
        for pair in self._pairs:
            try:
                pair.destination.migration_set_state(DeviceState.RUNNING)
            except CallTimeoutError as error:
                raise UnconfirmedError(f"{pair.name} was told to run and did not answer: {error}") from error
        if not self._guest_runs:
            return
        try:
            self.destination.monitor.execute("cont")
        except RefusedError:
            raise
        except MonitorError as error:
            raise UnconfirmedError(f"the guest was told to go on and its QEMU did not answer: {error}") from error

    def _wait(self, what: str, condition: Callable[[], bool], *, forever: bool = False) -> None:
        deadline = float("inf") if forever else time.monotonic() + self._timeout
        while not condition():
            if time.monotonic() > deadline:
                raise MigrationError(f"the source QEMU: {what} not within {self._timeout:g} s")
            with suppress(ClosedError):
                self.source.monitor.wait_event(POLL)

    # Afterwards

    def _release_source(self) -> None:
        """The source is of no use any more, and must not run by mistake; what it answers is only noted."""
        self._undo.pop_all()
        parts: list[Callable[[], object]] = [self._servers.leave]
        if self._servers.logging:
            parts.append(self._servers.stop_logging)
        if not self._keep_source:
            parts.append(lambda: _quit(self.source.monitor))
        for part in parts:
            with suppress(VfioUserError, OSError):
                part()

    def _give_up(self, error: BaseException) -> None:
        """Roll back, unless the destination may have the guest: then the source must not have it, too."""
        self.report.error = str(error) or type(error).__name__
        if isinstance(error, UnconfirmedError):
            self.report.status = Status.UNCONFIRMED
        elif self.report.step is not Step.CHECK:
            self._roll_back()

    def _roll_back(self) -> None:
        """Let the source run on as if nothing had been; whatever one part raises, the others are done.

        The devices run before the guest, which is what their accesses wait for; the settings come last. Where devices
        run at the destination already, that ends first.
        """
        with ExitStack() as parts:
            parts.callback(self._try, self._undo.close)
            if self.report.step is not Step.START:
                parts.callback(self._try, self._end_destination)
            parts.callback(self._try, self._let_guest_run)
            for device in self._devices:
                parts.callback(self._try, device.give_back)
            for pair in self._pairs:
                parts.callback(self._try, partial(pair.source.set_access, AccessMode.PASS))
            if self._servers.logging:
                parts.callback(self._try, self._servers.stop_logging)
            parts.callback(self._try, self._servers.run)
            if self.report.step is Step.START:
                self._try(self._end_destination)

    def _end_destination(self) -> None:
        if self.report.step is Step.START:
            for pair in self._pairs:
                self._try(partial(pair.destination.migration_set_state, DeviceState.STOP))
        _quit(self.destination.monitor)

    def _let_guest_run(self) -> None:
        monitor = self.source.monitor
        if monitor.migration().status not in _ENDED:
            monitor.execute("migrate_cancel")
            deadline = time.monotonic() + self._timeout
            while monitor.migration().status not in _ENDED and time.monotonic() < deadline:
                monitor.wait_event(POLL)
        if self._guest_runs:
            monitor.execute("cont")

    def _try(self, part: Callable[[], object]) -> None:
        try:
            part()
        except (VfioUserError, OSError) as error:
            self.report.error = f"{self.report.error}; while rolling back: {error}"


class _Passes:
    """QEMU's passes over the memory, as rounds."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._number, self._bytes, self._pages = 0, 0, 0
        self.device_bytes = 0
        self.time_for_the_rest = float("inf")
        """Seconds, at the rate of the pass before; infinity as long as nothing tells."""

    def see(self, info: MigrationInfo) -> Round | None:
        """A pass that has ended since the last look."""
        ram = info.ram
        if ram is None or ram.dirty_sync_count <= self._number + 1:
            return None
        now = time.monotonic()
        sent, pages = ram.transferred - self._bytes, ram.normal + ram.duplicate - self._pages
        seconds = max(now - self._since, 1e-6)
        self.time_for_the_rest = ram.remaining * seconds / sent if sent else 0.0
        done = Round(
            number=self._number + 1,
            pages=pages,
            memory_bytes=sent,
            device_bytes=self.device_bytes,
            seconds=seconds,
            left=ram.remaining // ram.page_size,
            downtime=self.time_for_the_rest,
        )
        self._number = ram.dirty_sync_count - 1
        self._bytes, self._pages, self._since, self.device_bytes = ram.transferred, ram.normal + ram.duplicate, now, 0
        return done


def _quit(monitor: Monitor) -> None:
    """End a QEMU, and wait for that."""
    deadline = time.monotonic() + monitor.timeout
    with suppress(ClosedError):
        monitor.execute("quit")
        while time.monotonic() < deadline:
            monitor.wait_event(POLL)
        raise LateError(f"the {monitor.name} QEMU does not end within {monitor.timeout:g} s")
