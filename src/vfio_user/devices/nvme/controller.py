"""The NVMe controller as a PCI device: its registers, its life, its migration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress

from vfio_user.device import Bar, Device, option, parse_size, register, state
from vfio_user.devices.nvme.admin import AdminCommands
from vfio_user.devices.nvme.command import Command
from vfio_user.devices.nvme.complaints import Complaints
from vfio_user.devices.nvme.constants import (
    CQE_SIZE,
    DOORBELLS,
    NSSR_RESET,
    SQE_SIZE,
    VERSION,
    AsyncEvent,
    Configuration,
    ControllerStatus,
    Feature,
    Register,
    Status,
)
from vfio_user.devices.nvme.doorbells import HEAD, STRIDE
from vfio_user.devices.nvme.events import AsyncEvents
from vfio_user.devices.nvme.execution import MAX_BURST, Executor
from vfio_user.devices.nvme.features import MAX_QUEUES, NAMESPACE_NOTICES, Features
from vfio_user.devices.nvme.identify import MODEL_LENGTH, SERIAL_LENGTH, ControllerIdentity
from vfio_user.devices.nvme.io import IoCommands
from vfio_user.devices.nvme.keep_alive import KeepAlive
from vfio_user.devices.nvme.logs import Logs
from vfio_user.devices.nvme.metering import Meter
from vfio_user.devices.nvme.namespaces import Namespace, Namespaces, check_block_size
from vfio_user.devices.nvme.parts import MemoryParts
from vfio_user.devices.nvme.paths import MEMORY, check_distinct, is_there, open_path, serial_of
from vfio_user.devices.nvme.queues import CompletionQueue, Ring, SubmissionQueue
from vfio_user.devices.nvme.saving import restore, saved
from vfio_user.devices.nvme.standstill import Halt, Standstill
from vfio_user.devices.nvme.storage.base import Storage
from vfio_user.devices.nvme.workers import Landed, Work, Workers
from vfio_user.fds import OwnedFd
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.pci import PcieEndpoint, PowerManagement
from vfio_user.server.backend import Link
from vfio_user.wire.constants import DeviceState, MigrationFlags

logger = logging.getLogger("vfio_user.devices.nvme")

MAX_QUEUE_SIZE = 1024
AT_ONCE = 0.05
"""Seconds that a client does not mind to wait with any access."""
CLOSE_TIMEOUT = 1.0
"""Seconds that the storage may take for what is under way where the controller is given up."""

_READY_TIMEOUT = 60
"""In units of 500 ms: how long a host waits for CSTS.RDY."""
_MAX_PAGE_SHIFT = 4
_MAX_PAGE = 4096 << _MAX_PAGE_SHIFT
"""Bytes of the largest pages that a host may have."""
CAPABILITIES = (MAX_QUEUE_SIZE - 1) | _READY_TIMEOUT << 24 | 1 << 36 | 1 << 37 | _MAX_PAGE_SHIFT << 52
"""Register CAP (3.1.1): resets of the subsystem, the NVM command set; queues need not be contiguous."""

_ALL = 0xFFFF_FFFF
_ADDRESS = (1 << 64) - (1 << 12)
_SHUTDOWN = Configuration.SHN
_UNCHANGEABLE = int(Configuration.CSS | Configuration.AMS)
_FIXED = int(Configuration.CSS | Configuration.AMS | Configuration.MPS)
"""What can be set while the controller is disabled only (3.1.5)."""


class Nvme(Device):
    """An NVMe controller with a namespace for each storage that is given: NVM Express 1.4."""

    vendor_id, device_id, class_code = 0x4E58, 0x0001, 0x010802
    bars = {0: Bar(0x4000, bits64=True)}
    capabilities = (PowerManagement(), PcieEndpoint())
    intx = True
    msi_vectors = 32
    workers = True
    migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    spin = 300e-6

    path = option(
        MEMORY,
        "namespace 1, none if empty: a file, a block device, memory:, nbd://HOST/EXPORT, nbd+unix:///?socket=PATH",
    )
    more = option("", "namespace 2 and on, likewise, separated by commas")
    size = option(0, "bytes of a file that is to be made, or of memory; K, M, G, T are understood", parse_size)
    block_size = option(512, "bytes of a block, 512 or 4096; a host may format it otherwise")
    read_only = option(False, "whether writes are refused")
    shared = option(False, "whether other servers may write the same storage at the same time")
    serial = option("", "what tells this controller from others; by default made of the path")
    model = option("vfio-user NVMe", "what the controller calls itself")
    queues = option(MAX_QUEUES, "I/O queue pairs that a guest may have, at most 64")
    threads = option(8, "commands that may wait for the storage at the same time")

    cap = register(Register.CAP, width=8, reset=CAPABILITIES)
    vs = register(Register.VS, reset=VERSION)
    intms = register(Register.INTMS, strobe=_ALL)
    intmc = register(Register.INTMC, strobe=_ALL)
    cc = register(Register.CC, writable=0x00FF_FFF1)
    csts = register(Register.CSTS, w1c=ControllerStatus.NSSRO)
    nssr = register(Register.NSSR, strobe=_ALL)
    aqa = register(Register.AQA, writable=0x0FFF_0FFF)
    asq = register(Register.ASQ, width=8, writable=_ADDRESS)
    acq = register(Register.ACQ, width=8, writable=_ADDRESS)

    interrupt_mask = state(0)
    """What INTMS and INTMC set and clear (3.1.3)."""

    def configure(self) -> None:
        if not 1 <= self.queues <= MAX_QUEUES:
            raise ValueError(f"queues={self.queues}: 1 to {MAX_QUEUES} are possible")
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}: at least one is needed")
        for name, most in (("serial", SERIAL_LENGTH), ("model", MODEL_LENGTH)):
            if len(getattr(self, name)) > most or not getattr(self, name).isascii():
                raise ValueError(f"{name}={getattr(self, name)}: at most {most} characters of ASCII are possible")
        check_block_size(self.block_size)
        if self.size % self.block_size:
            raise ValueError(f"size={self.size}: no whole blocks of {self.block_size} bytes")
        check_distinct(self._paths)
        self.msix_vectors = self.queues + 1
        serial = self.serial or serial_of(self._paths)
        self.identity = ControllerIdentity(self.vendor_id, self.vendor_id, serial, self.model)

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.max_queue_size = MAX_QUEUE_SIZE
        self.interrupt_vectors = self.msix_vectors
        self.logs = Logs()
        self._complaints = Complaints(logger)
        self.namespaces = Namespaces(self.block_size, self._complaints)
        self.parts = MemoryParts(self.namespaces)
        self.executor = Executor(self, Workers(self.threads, lambda: self.post(self.executor.land)))
        self._standstill = Standstill(self.executor, self.dma, lambda: self.defer(self._go_on))
        self.keep_alive = KeepAlive(lambda: self.post(self._abandoned))
        effects = {Feature.ARBITRATION: self._arbitrate, Feature.KEEP_ALIVE_TIMER: self.keep_alive.set}
        self.features = Features(self.queues, effects)
        self.events = AsyncEvents(self.executor, self.features)
        self.io = IoCommands(self.executor, self.dma, self.namespaces, self.features, self.logs.health)
        self._admin = AdminCommands(self)
        self.executor.handle(self._admin.handlers, self.io.handlers, self.io.compare_and_write, self.io.together)
        self._meter: Meter | None = None
        self._beginning: object = None
        """Which attempt to enable the controller is under way."""
        self._follow_bus_master()
        try:
            for number, path in enumerate(self._paths):
                # Of the others, those that are there have sizes of their own.
                self.add_namespace(path, size=self.size if number == 0 or not is_there(path) else 0)
            self.logs.changed.clear()  # to a host that comes they have always been there
        except BaseException:
            self.close()
            raise

    @property
    def _paths(self) -> list[str]:
        """Of the storages, by NSID from 1 on."""
        return [path for path in (self.path, *self.more.split(",")) if path]

    def close(self) -> None:
        """Give back storages and threads. Storages that do not end what they are at stay open: with its descriptor
        closed under it, a write could go on in another file.
        """
        self.keep_alive.stop()
        self.executor.clear()  # what no worker has begun never will be
        try:
            self.executor.workers.wait(CLOSE_TIMEOUT)
        except OSError as error:
            logger.error("the storage is not closed: %s", error)
        else:
            self.namespaces.close()
        self.executor.workers.close()

    # Namespaces

    def add_namespace(self, storage: Storage | str, *, size: int = 0) -> Namespace:
        """Attach a storage, or what is at a path, as the namespace with the lowest free NSID; a host that asked for
        such notices is told. Call it from the thread that serves the client (``post``). ``size`` in bytes: of a file
        that is to be made, or of memory.

        Raises OSError for a storage that cannot be had, ValueError for one that is no namespace.
        """
        number = self.namespaces.free_number()  # first: to open a path may make a file
        if isinstance(storage, str):
            storage = open_path(storage, size, read_only=self.read_only, shared=self.shared)
        in_use = self.executor.enabled and self._runs
        namespace = self.namespaces.add(number, storage, self.identity.qualified_name, acquire=in_use)
        self.pre_copy_limit = self.parts.limit
        self._changed(number)
        return namespace

    def remove_namespace(self, number: int) -> None:
        """Detach a namespace; the host is told as of one that was added.

        Raises KeyError for one that is not there, OSError where the storage does not end what it is at (then nothing
        has changed) or cannot make it durable.
        """
        if number not in self.namespaces:
            raise KeyError(number)
        self.executor.look_away()
        self._standstill.quiesce(moving=False)
        try:
            self.namespaces.remove(number)
        finally:
            self.features.forget(number)
            self._changed(number)

    def _changed(self, number: int) -> None:
        self.logs.changed.add(number)
        self.events.add_notice(AsyncEvent.NAMESPACE_ATTRIBUTE_CHANGED, NAMESPACE_NOTICES)

    # Registers

    @intms.on_read
    @intmc.on_read
    def _read_mask(self) -> int:
        return self.interrupt_mask

    @intms.on_write
    def _mask(self, old: int, new: int) -> None:
        self.interrupt_mask |= new
        self.follow_pin()

    @intmc.on_write
    def _unmask(self, old: int, new: int) -> None:
        self.interrupt_mask &= ~new
        for queue in self.executor.completions.values():
            if queue.pending and new >> queue.vector & 1:
                self.completed(queue)
        self.follow_pin()

    @cc.on_write
    def _configure(self, old: int, new: int) -> None:
        if old & new & Configuration.EN:
            self.cc = new & ~_FIXED | old & _FIXED
        elif (old ^ new) & Configuration.EN:
            (self._enable if new & Configuration.EN else self._disable)()
        if new & _SHUTDOWN and not old & _SHUTDOWN:
            self._shut_down()

    @nssr.on_write
    def _reset_subsystem(self, old: int, new: int) -> None:
        if new == NSSR_RESET:
            self.cc = self.aqa = self.asq = self.acq = 0  # of which a controller reset keeps all but CC (7.3.2)
            self._disable(ControllerStatus.NSSRO)

    # Doorbells, and what they lead to

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        """A doorbell (3.1.24, 3.1.25): all else of the BAR is registers, or nothing."""
        queue, which = divmod(offset - DOORBELLS, STRIDE)
        if bar or queue < 0 or len(data) != 4 or which not in (0, HEAD) or not self.executor.enabled:
            return
        to_do = self.executor.ring(queue, int.from_bytes(data, "little"), head=which == HEAD)
        if which == HEAD and self.irq.asserted:
            self.follow_pin()
        if self.executor.held:
            self.defer(self._rung)
        elif to_do:
            self.defer(self._work)

    def _rung(self) -> None:
        self._standstill.host_rings()
        self._work()

    def look_for_work(self, last: bool) -> bool:
        """Shadow doorbells, which the host need not ring then."""
        worked = self.executor.look(last)
        if worked:
            self._after_work()
        return worked

    def _work(self) -> None:
        self.executor.work()
        self._after_work()

    def _after_work(self) -> None:
        if self.irq.asserted:  # the host may have said in memory alone that it took what there was
            self.follow_pin()
        self.events.deliver()  # there may be room for a completion now
        self.executor.send_interrupts()

    def _go_on(self) -> None:
        """Nothing has us stand still any more."""
        self.executor.land()
        self._work()

    # What the host and its VMM change around it

    def on_config_write(self, offset: int, length: int) -> None:
        self._follow_bus_master()

    def _follow_bus_master(self) -> None:
        self._standstill.follow_bus_master(self.config.bus_master and not self.config.asleep)

    def connected(self, link: Link) -> None:
        super().connected(link)
        self.executor.watched = link.spin > 0

    def disconnected(self) -> None:
        super().disconnected()
        self._standstill.halt(Halt.CLIENT)

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        self.executor.forget_windows()
        super().dma_map(flags, offset, address, size, fd)
        self._standstill.mapped()

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self.executor.forget_windows()
        super().dma_unmap(flags, address, size)
        self._standstill.unmapped(address, size)

    def quiesce(self) -> None:
        """Let what is under way end; what waits in the queues is carried out after what asked for this is done."""
        self.executor.look_away()  # perhaps for good: the client may have left
        self._standstill.quiesce(moving=True)

    # The life of a controller

    @property
    def page_size(self) -> int:
        """Bytes of the host's pages: CC.MPS."""
        return 4096 << (self.cc >> 7 & 0xF)

    def _enable(self) -> None:
        """CC.EN became 1 (7.6.1): done when a reset before it is, and the storage is ours, which can take its time.
        While a migration has the device stand still the storage is another's: then it is done afterwards.
        """
        if self._runs:
            self._beginning = object()
            self.executor.when(self.executor.idle, self._acquire)

    def _acquire(self) -> None:
        namespaces, beginning = tuple(self.namespaces.values()), self._beginning

        def acquired(result: int, error: BaseException | None) -> None:
            if self._beginning is not beginning:
                return  # the host has thought better of it
            if error is None and namespaces != tuple(self.namespaces.values()):
                self._acquire()
                return
            self._beginning = None
            if error is not None:
                self.fatal(f"its storage cannot be had: {error}")
            else:
                self._begin()

        self.executor.workers.start(self.namespaces.acquire, acquired)
        with suppress(TimeoutError):  # most often there is nothing to wait for
            self.executor.workers.wait(AT_ONCE)
            self.executor.land()

    def _begin(self) -> None:
        submissions, completions = (self.aqa & 0xFFF) + 1, (self.aqa >> 16) + 1
        aligned = not (self.asq | self.acq) & self.page_size - 1
        known = not self.cc & _UNCHANGEABLE and self.page_size <= _MAX_PAGE
        if not aligned or not known or min(submissions, completions) < 2:
            self.fatal("it was enabled with a configuration that it does not have")
            return
        self.io.page_size = self.page_size
        ring = Ring(self.dma, [self.acq], completions, CQE_SIZE, completions)
        queue = CompletionQueue(0, ring, 0, interrupts=True)
        queue.users = 1
        ring = Ring(self.dma, [self.asq], submissions, SQE_SIZE, submissions)
        self.executor.completions[0] = queue
        self.executor.submissions[0] = SubmissionQueue(0, ring, queue)
        self.executor.enabled = True
        self.csts |= ControllerStatus.RDY

    def _disable(self, status: int = 0) -> None:
        """CC.EN became 0, a controller reset (7.3.2): done when nothing is under way any more, and all is durable."""
        self._forget()
        self.interrupt_mask = 0
        self.follow_pin()
        self.csts = status | self.csts & (ControllerStatus.NSSRO | ControllerStatus.RDY)
        self._let_go()

    def _forget(self) -> None:
        """Everything that a host had set up is no more."""
        self._beginning = None
        self.executor.clear()
        self.events.reset()
        self.features.reset()
        self._standstill.host_rings()

    def _let_go(self) -> None:
        """Leave the storage to others when nothing is under way any more: then a reset is done."""
        self._when_idle(self.namespaces.release, self._released)

    def _released(self, result: int, error: BaseException | None) -> None:
        if error is not None:
            logger.error("the storage is not let go of", exc_info=error)
        self.csts &= ~ControllerStatus.RDY

    def _shut_down(self) -> None:
        """The host is about to leave (3.1.5, SHN)."""
        self.csts = self.csts & ~ControllerStatus.SHST | ControllerStatus.SHST_OCCURRING
        self._when_idle(self.namespaces.flush, self._flushed)

    def _flushed(self, result: int, error: BaseException | None) -> None:
        if error is not None:
            self._complaints.about("what was written is not safe", error, logging.ERROR)
        if self.csts & ControllerStatus.SHST_OCCURRING:  # a reset may have come in between
            self.csts = self.csts & ~ControllerStatus.SHST | ControllerStatus.SHST_COMPLETE

    def _when_idle(self, work: Work, landed: Landed) -> None:
        """Have a worker do ``work`` when nothing is under way any more, unless a reset comes before that."""

        def start() -> None:
            self.executor.workers.start(work, landed)

        self.executor.when(self.executor.idle, start)

    def _arbitrate(self, value: int) -> None:
        """4.13: how many commands of one queue before the others have their turn."""
        self.executor.burst = min(1 << (value & 7), MAX_BURST)

    def _abandoned(self) -> None:
        if not self.keep_alive.overdue:
            self.keep_alive.watch()  # there was a word from the host just in time
        elif self.executor.enabled:
            self.fatal("the host did not keep it alive")

    def on_reset(self) -> None:
        self._forget()
        self._follow_migration()

    # What the executor tells

    def completed(self, queue: CompletionQueue) -> None:
        self.executor.pin = not self._sends_messages
        if not queue.interrupts:
            return
        if self.executor.pin:
            self.follow_pin()
        elif not self.interrupt_mask >> queue.vector & 1 or self.config.msix_enabled:
            self.irq.trigger(queue.vector)

    def failed(self, queue: SubmissionQueue, command: Command, status: int) -> None:
        self.logs.add_error(queue.number, command, status)
        logger.debug("%s in queue %d: %s", command.name_in(queue.number), queue.number, Status(status & 0x7FF).name)
        if status & 0x7FF in (Status.WRITE_FAULT, Status.UNRECOVERED_READ_ERROR):
            self.logs.health.media_errors += 1

    def storage_failed(self, number: int, error: OSError) -> None:
        self._complaints.about(f"the storage of namespace {number} failed", error)

    def come_back(self) -> None:
        self.post(self._work)

    def fatal(self, reason: str) -> None:
        """Nothing goes on until the host resets the controller (CSTS.CFS)."""
        self._complaints.about("the controller failed", reason, logging.ERROR)
        self.executor.enabled = False
        self.csts |= ControllerStatus.CFS

    @property
    def _sends_messages(self) -> bool:
        """Whether interrupts are MSI or MSI-X, which a host may have enabled before it listens."""
        return self.irq.message_signalled or self.config.msix_enabled or self.config.msi_enabled

    def invalid_doorbell(self, event: AsyncEvent) -> None:
        """A host rang what is not there, or beyond what is."""
        self.events.add(event)

    def follow_pin(self) -> None:
        """INTx is asserted as long as there is a completion that the host has not taken (7.5.1)."""
        queues = self.executor.completions.values()
        if any(q.pending and q.interrupts and not self.interrupt_mask >> q.vector & 1 for q in queues):
            if not self._sends_messages:
                self.irq.assert_()
        elif self.irq.asserted:
            self.irq.deassert()

    # For people who look on

    def register_names(self, region: int, offset: int, length: int) -> Sequence[str]:
        queue, which = divmod(offset - DOORBELLS, STRIDE)
        if region == 0 and 0 <= queue <= self.queues and which in (0, HEAD):
            return [f"cq{queue}_head" if which else f"sq{queue}_tail"]
        return super().register_names(region, offset, length)

    def activity(self) -> str:
        """Commands and bytes a second, latency and depth since the last call; the first one begins to measure."""
        if self._meter is None:
            self._meter = Meter(self.io.handlers, lambda: self.logs.health)
            self.executor.handle(self._admin.handlers, self._meter.handlers, self.io.compare_and_write)
            self.executor.on_end = self._meter.ended
        return self._meter.line()

    # Migration

    def migration_set_state(self, state: DeviceState) -> None:
        """The storage is ours while the device runs: left to the next when it stops, whole, and taken again."""
        runs, ran = state in RUNNING_STATES, self._runs
        self._standstill.halt(Halt.MIGRATION)  # that nothing begins in between
        try:
            if not runs and (ran or state is DeviceState.STOP_COPY):  # a reset may have come since it was stopped
                self._standstill.end_all()
            if ran and not runs and self.executor.enabled:
                self._standstill.have_done(self.namespaces.flush)
            if runs and not ran:
                self._standstill.have_done(self.namespaces.acquire, undo=self.namespaces.release)
            super().migration_set_state(state)
        finally:
            self._follow_migration()

    def reset(self) -> None:
        super().reset()
        self._follow_migration()  # a reset ends whatever state there was

    @property
    def _runs(self) -> bool:
        return self.migration_get_state() in RUNNING_STATES

    def _follow_migration(self) -> None:
        """Go on, or stand still, as the migration state says, with registers and queues that may be others."""
        self.features.timestamp.run(self._runs)
        if not self._runs:
            self._standstill.halt(Halt.MIGRATION)
            self.keep_alive.stop()
            self.namespaces.release()  # nothing is under way
            return
        self.features.follow(Feature.KEEP_ALIVE_TIMER)
        if not self.executor.enabled and self._beginning is None:
            waits = self.cc & Configuration.EN and not self.csts & ControllerStatus.CFS
            (self._enable if waits else self._let_go)()
        self._follow_bus_master()
        self._standstill.resume(Halt.MIGRATION)

    def pre_copy_start(self) -> None:
        self.parts.begin()

    def pre_copy(self) -> bytes:
        return self.parts.next()

    def save_parts(self) -> Iterator[bytes]:
        """What changed there since."""
        return iter(self.parts.next, b"")

    def parts_size(self) -> int:
        return self.parts.left()

    def save(self) -> dict[str, object]:
        return saved(self)

    def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
        restore(self, saved, pre_copy)
        self._standstill.resume(Halt.CLIENT)  # the guest is that of the stream
        self._standstill.look_for_memory()
