"""The class :class:`Device`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from vfio_user.device.access import AccessTable, BarMemory
from vfio_user.device.declarations import Option, State, check_options, check_states, declared_in
from vfio_user.device.doorbells import Doorbells
from vfio_user.device.flr import FunctionLevelReset
from vfio_user.device.layout import NO_ID, config_space, irq_counts, msix_of
from vfio_user.device.posted import PostedWork
from vfio_user.device.registers import BarRegister, check_hooks, register_files
from vfio_user.device.saving import Migrator
from vfio_user.dma.memory import GuestMemory
from vfio_user.errors import DeclarationError, StreamError, TransitionError
from vfio_user.fds import OwnedFd, take_signals
from vfio_user.migration import StreamIdentity
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.pci import Bar, Capability, Interrupts, MsixTable
from vfio_user.server.backend import Irq, Link, Region, RegionIoFd, ServerBackend
from vfio_user.wire.constants import (
    PCI_NUM_REGIONS,
    DeviceState,
    IrqSetFlags,
    MigrationFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)

logger = logging.getLogger("vfio_user.device")

_ALL = -1
"""As bits: all vectors."""
_PARTS = frozenset({"irq", "dma", "config", "memory", "msix", "registers", "regions", "irqs"})
"""Attributes that every device has."""


@contextmanager
def _declaring(cls: type) -> Iterator[None]:
    """What a class declares is carried out within: what cannot be, is the fault of that class."""
    try:
        yield
    except ValueError as error:
        raise DeclarationError(f"{cls.__name__}: {error}") from error


class Device(ServerBackend):
    """A PCI device. Subclass it, declare what it is, and write what it does.

    What a class declares wrongly raises DeclarationError when the class is built, or, where ``configure`` lets
    options decide, when a device is made. ``abstract=True`` makes a class that is only a base of others. Options are
    given to the constructor by keyword: TypeError for one that does not exist.

    The parts that a subclass works with, besides what it declares by ``register``, ``state`` and ``option``:

    ``irq``     :class:`~vfio_user.pci.Interrupts`: ``trigger(vector)``, ``assert_()``, ``deassert()``
    ``dma``     :class:`~vfio_user.dma.memory.GuestMemory`: ``read``, ``write``, ``view``; writes are logged
    ``config``  :class:`~vfio_user.pci.ConfigSpace`
    ``memory``  by BAR, the memory of those declared with ``Bar(..., memory=True)``
    """

    vendor_id: ClassVar[int] = NO_ID
    device_id: ClassVar[int] = NO_ID
    subsystem_vendor_id: ClassVar[int] = 0
    subsystem_id: ClassVar[int] = 0
    revision: ClassVar[int] = 0
    class_code: ClassVar[int] = 0xFF0000
    bars: Mapping[int, Bar] = {}
    rom: bytes = b""
    """What the expansion ROM holds."""
    capabilities: Sequence[Capability] = ()
    """Capabilities of config space besides MSI and MSI-X, which the vectors bring."""
    intx: ClassVar[bool] = False
    """Whether the device has an interrupt pin."""
    msi_vectors: ClassVar[int] = 0
    msi_masking: ClassVar[bool] = False
    """Whether a guest can mask the vectors of MSI one by one."""
    msix_vectors: int = 0
    msix_bar: ClassVar[int | None] = None
    """Where table and pending bits of MSI-X are; None: in a BAR of their own, the first that is free."""
    migration: MigrationFlags = MigrationFlags.STOP_COPY
    """MigrationFlags(0): the device cannot migrate."""
    workers: ClassVar[bool] = False
    """Whether other threads :meth:`post` work; without, a connection waits for its client only, which is faster."""
    pre_copy_limit: int = 1 << 20
    """Bytes of the stream after which ``pre_copy`` is asked no more; bounds what a device takes while resuming."""
    state_version: ClassVar[int] = 1
    """Raise it when state is added: streams of older versions load, those of newer ones are refused."""
    resettable = True

    declared_state: ClassVar[dict[str, State]] = {}
    declared_options: ClassVar[dict[str, Option]] = {}
    declared_registers: ClassVar[dict[str, BarRegister]] = {}

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = declared_in(cls, State), declared_in(cls, Option), declared_in(cls, BarRegister)
        cls.declared_state, cls.declared_options, cls.declared_registers = declared
        with _declaring(cls):
            cls.__check_names()
            check_states(cls.declared_state)
            check_options(cls.declared_options)
            check_hooks(cls, cls.declared_registers.values())
            if not abstract and cls.configure is Device.configure:
                config = config_space(cls)
                Interrupts(irq_counts(cls))
                register_files(cls.declared_registers.values(), config.bars, msix_of(config.capabilities), None)

    @classmethod
    def __check_names(cls) -> None:
        taken = {*_PARTS, *dir(Device)}
        declared = {
            "register": {*cls.declared_registers},
            "state": {*cls.declared_state},
            "option": {*cls.declared_options},
        }
        for kind, names in declared.items():
            for name in names & taken:
                raise ValueError(f"{kind} {name!r}: every device has an attribute of that name: choose another")

    def __init__(self, **options: object) -> None:
        self.__link: Link | None = None
        self.__irq_watches: dict[tuple[int, int, int], int] = {}
        self.__set_options(options)
        self.configure()
        self.__reset_state()
        with _declaring(type(self)):
            self.__build()
        self.dma: GuestMemory = GuestMemory()
        self.__migrator = Migrator(self, self.migration, self.__run_or_stop)
        self.__posted = PostedWork(lambda: self.__migrator.running) if self.workers else None
        self.follow_config()

    def __build(self) -> None:
        counts = irq_counts(self)
        self.irq = Interrupts(counts, self.__watch_irq, self.__show_level)
        self.config = config_space(self, msi_pending=self.__msi_pending, on_flr=lambda: self.__flr.request())
        self.bars = self.config.bars
        msix = msix_of(self.config.capabilities)
        self.msix = MsixTable(msix, self.irq.pba) if msix else None
        self.registers = register_files(self.declared_registers.values(), self.bars, msix, self)
        """By BAR, the declared registers."""
        self.__flr = FunctionLevelReset(self)
        self.__doorbells = Doorbells(self.declared_registers.values(), self.region_write)
        self.__bar_memory = BarMemory(self.bars, self.bar_file)
        self.memory = self.__bar_memory.views
        own = (self.bar_read, self.bar_write)
        self.__accesses = AccessTable(
            self.config, self.msix, self.registers, self.memory, self.rom, own, self.__write_config
        )
        self.regions = [self.__region(index) for index in range(PCI_NUM_REGIONS)]
        self.irqs = [Irq(count) for count in counts]

    # What a subclass overrides

    def configure(self) -> None:
        """Options are set, nothing is built: the place to set ``bars`` and vectors that depend on options."""

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        """Fill ``data`` from ``offset`` of a BAR. By default it reads 0."""
        data[:] = bytes(len(data))

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        """Take ``data``, valid during the call only, at ``offset`` of a BAR. By default it is ignored."""

    def on_reset(self) -> None:
        """After a reset: declared state, config space and interrupts are as in a new device already."""

    def save(self) -> dict[str, object]:
        """State besides what is declared, of the types that :func:`state` names, by name."""
        return {}

    def save_parts(self) -> Iterable[bytes]:
        """State that is too large for :meth:`save`, in parts of a MiB at most: :meth:`load` gets them behind what was
        sent ahead. Asked for when the device has stopped.
        """
        return ()

    def parts_size(self) -> int:
        """About how many bytes :meth:`save_parts` would give now."""
        return 0

    def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
        """Take over what :meth:`save`, :meth:`pre_copy` and :meth:`save_parts` of the source gave; declared state is
        there already.

        Raises ValueError for what it cannot be: then everything is as it was before. For that it is called once more,
        with what :meth:`save` gave then and no ``pre_copy``: :meth:`save` alone must be enough, and what comes in parts
        be checked before it is taken over.
        """
        if saved:
            raise ValueError(f"{', '.join(sorted(saved))}: not known to this device")

    def pre_copy(self) -> bytes:
        """With PRE_COPY: what can be sent ahead while the device runs; b"" when there is nothing (more) for now.

        Asked no more after ``pre_copy_limit`` bytes, and never to return more than that at once.
        """
        return b""

    def pre_copy_start(self) -> None:
        """A new stream begins: whatever was sent ahead before went into another one, which came to nothing."""

    def on_config_write(self, offset: int, length: int) -> None:
        """After a guest wrote config space: for a device whose own capabilities have an effect."""

    def bar_file(self, bar: int) -> OwnedFd | None:
        """The file behind a memory BAR, of at least its size, where it is not to be the device's alone.

        The device keeps it. A client that has it must not be able to shrink it (seal a memfd): that would end this
        process with SIGBUS.
        """
        return None

    def io_fds(self, bar: int) -> Sequence[RegionIoFd]:
        """The parts of a BAR that file descriptors serve; watch them in :meth:`connected`. By default the doorbells."""
        return self.__doorbells.io_fds(bar)

    def register_names(self, region: int, offset: int, length: int) -> Sequence[str]:
        """The registers that an access to these bytes touches, for people who read a log."""
        if region == PciRegion.CONFIG:
            return self.config.names(offset, length)
        registers = self.registers.get(region)
        return [register.name for register in registers.touched(offset, length)] if registers else ()

    def activity(self) -> str:
        """How busy the device was since the last call, as a line for people: ``serve --filter stats`` shows one every
        second on a terminal. Called from any thread. By default there is nothing to say.
        """
        return ""

    # What a subclass may use

    def defer(self, work: Callable[[], None]) -> None:
        """Do ``work`` after the reply to the current access: the place for DMA that may need the client's help."""
        if self.__link is None:
            work()
        else:
            self.__link.defer(work)

    def post(self, work: Callable[[], object]) -> None:
        """From any thread: have ``work`` done in the thread that serves the client, as hooks are.

        While there is no client, or a migration has the device stopped, it waits. Raises RuntimeError for a device that
        does not declare ``workers``.
        """
        if self.__posted is None:
            raise RuntimeError(f"{type(self).__name__} has no workers: declare workers = True")
        self.__posted.post(work)

    @property
    def link(self) -> Link | None:
        """What the server offers while a client is connected."""
        return self.__link

    def raise_interrupt(self, vector: int = 0) -> None:
        """Signal a cause: by a message if the client listens for MSI or MSI-X, else by INTx until ``deassert``."""
        if self.irq.message_signalled or not self.intx:
            self.irq.trigger(vector)
        else:
            self.irq.assert_()

    # Construction

    def __set_options(self, given: Mapping[str, object]) -> None:
        unknown = sorted(set(given) - set(self.declared_options))
        if unknown:
            known = ", ".join(sorted(self.declared_options)) or "none"
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}; there are: {known}")
        for name, declared in self.declared_options.items():
            setattr(self, name, given[name] if name in given else declared.new())

    def __reset_state(self) -> None:
        for name, declared in self.declared_state.items():
            setattr(self, name, declared.new())

    def __region(self, index: int) -> Region:
        if index == PciRegion.CONFIG:
            return Region(len(self.config))
        if index == PciRegion.ROM:
            return Region(self.config.rom_size, RegionFlags.READ if self.rom else 0)
        bar = self.bars.get(index)
        if bar is None:
            return Region(0, 0)
        fd = self.__bar_memory.fileno(index)
        return Region(bar.size, fd=fd, sparse_areas=bar.sparse_areas, io_fds=tuple(self.io_fds(index)))

    # Hooks of the server

    def connected(self, link: Link) -> None:
        self.__link = self.dma.messages = link
        self.__doorbells.watch(link)
        if self.__posted:
            self.__posted.watch(link)

    def disconnected(self) -> None:
        self.irq.release_fds()
        self.__link = self.dma.messages = None
        self.__flr.settle()

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        self.__readers[region](region, offset, data)

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        self.__writers[region](region, offset, data)

    def region_view(self, region: int, offset: int, count: int) -> memoryview | None:
        return None if self.config.asleep else self.__accesses.view(region, offset, count)

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        self.dma.map(address, size, flags, fd, offset)

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self.dma.unmap(address, size)
        self.__flr.settle()  # the server had us quiesce

    def reset(self) -> None:
        self.__flr.forget()
        self.reset_function()
        self.__migrator.reset()  # at last: it lets out the interrupts that wait

    def reset_function(self) -> None:
        """All but where a migration stands, which a guest that resets its device does not know of."""
        self.__doorbells.forget()
        self.__reset_state()
        self.config.reset()
        for registers in self.registers.values():
            registers.reset()
        self.irq.reset()
        if self.msix:
            self.msix.reset()
        self.follow_config()
        self.on_reset()

    def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[OwnedFd]) -> None:
        self.irq.set_irqs(index, flags, start, count, fds)

    def __watch_irq(self, fd: OwnedFd | None, index: int, vector: int, action: int) -> None:
        """Do ``action`` whenever the client signals ``fd``; None: no longer."""
        key = index, vector, action
        link = self.__link
        if link is None:
            return
        previous = self.__irq_watches.pop(key, None)
        if previous is not None:
            link.unwatch(previous)
        if fd is None:
            return
        number = self.__irq_watches[key] = fd.fileno()

        def signalled() -> None:
            if take_signals(number):
                self.irq.set_irqs(index, action | IrqSetFlags.DATA_NONE, vector, 1, ())

        link.watch(number, signalled)

    def __show_level(self, asserted: bool) -> None:
        self.config.interrupt_status = asserted

    def __msi_pending(self) -> int:
        return int.from_bytes(self.irq.pba(PciIrq.MSI), "little")

    def __write_config(self, region: int, offset: int, data: memoryview) -> None:
        self.config.write(offset, data)
        self.follow_config()
        self.on_config_write(offset, len(data))

    def follow_config(self) -> None:
        """Do what config space means for the rest of the device."""
        self.__choose_accesses()
        self.irq.hold(self.__held_interrupts())

    def load_interrupts(self, saved: object) -> None:
        """Take over interrupts, and config space that was loaded with them. Raises ValueError."""
        self.__choose_accesses()
        self.irq.load(saved, self.__held_interrupts())

    def __choose_accesses(self) -> None:
        self.__readers, self.__writers = self.__accesses.asleep if self.config.asleep else self.__accesses.awake

    def __held_interrupts(self) -> dict[int, int]:
        config = self.config
        if config.asleep:
            return dict.fromkeys((PciIrq.INTX, PciIrq.MSI, PciIrq.MSIX), _ALL)
        return {
            PciIrq.INTX: _ALL * config.intx_disabled,
            PciIrq.MSI: config.msi_mask,
            PciIrq.MSIX: _ALL * config.msix_masked,
        }

    # Migration

    def migration_flags(self) -> MigrationFlags:
        return self.migration or super().migration_flags()

    def migration_get_state(self) -> DeviceState:
        self.migration_flags()
        return self.__migrator.state

    def migration_set_state(self, state: DeviceState) -> None:
        self.migration_flags()
        if self.__migrator.running and state not in RUNNING_STATES:
            self.__come_to_rest()
        try:
            self.__migrator.set(state)
        except TransitionError as error:
            logger.warning("%s: %s", type(self).__name__, str(error))  # the client is told an errno only
            raise

    def __run_or_stop(self, running: bool) -> None:
        """A device that stands still keeps its interrupts and its workers' results to itself until it runs again."""
        if not running:
            self.irq.stop()
            return
        self.irq.run()
        if self.__posted:
            self.__posted.run()

    def __come_to_rest(self) -> None:
        """Do what the guest asked for before the device stops; also what that defers: it would come after the stop."""
        link, self.__link = self.__link, None
        try:
            if self.__posted:
                self.__posted.run()  # it does not travel
            self.__doorbells.settle()
        finally:
            self.__link = link
        self.__flr.settle()

    def migration_read_data(self, data: memoryview) -> int:
        return self.__migrator.read(data)

    def migration_write_data(self, data: memoryview) -> None:
        try:
            self.__migrator.write(data)
        except StreamError as error:
            logger.warning("%s: %s", type(self).__name__, str(error))
            raise

    def migration_data_size(self) -> int:
        self.migration_flags()
        return self.__migrator.data_size()

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        self.migration_flags()
        return self.dma.log.start(page_size, ranges)

    def dma_logging_stop(self) -> None:
        self.migration_flags()
        self.dma.log.stop()

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        self.migration_flags()
        self.dma.log.report(iova, length, page_size, bitmap)

    @property
    def stream_identity(self) -> StreamIdentity:
        """What the migration stream of this device begins with: only a device of the same kind loads it."""
        return StreamIdentity(self.vendor_id, self.device_id, self.state_version)
