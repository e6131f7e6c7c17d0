"""The class :class:`Device`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from vfio_user.device.declarations import Option, State, restored_values, saved_value
from vfio_user.device.regions import AccessTable, BarMemory, layout
from vfio_user.device.saving import Migrator
from vfio_user.dma.memory import GuestMemory
from vfio_user.fds import OwnedFd, take_signals
from vfio_user.migration import LoadedStream, StreamIdentity
from vfio_user.pci import Bar, ConfigSpace, Interrupts, MsixCapability, MsixTable
from vfio_user.server.backend import Irq, Link, Region, RegionIoFd, ServerBackend
from vfio_user.wire.constants import PCI_NUM_REGIONS, DeviceState, IrqSetFlags, MigrationFlags, PciRegion


class Device(ServerBackend):
    """A PCI device. Subclass it, declare what it is, override :meth:`bar_read` and :meth:`bar_write`.

    Options are given to the constructor by keyword. The parts that a subclass works with:

    ``irq``     :class:`~vfio_user.pci.Interrupts`: ``trigger(vector)``, ``assert_()``, ``deassert()``
    ``dma``     :class:`~vfio_user.dma.memory.GuestMemory`: ``read``, ``write``, ``view``; writes are logged
    ``config``  :class:`~vfio_user.pci.ConfigSpace`
    ``memory``  by BAR, the memory of those declared with ``Bar(..., memory=True)``

    Raises ValueError for a declaration that cannot be carried out, TypeError for an option that does not exist.
    """

    vendor_id: ClassVar[int] = 0xFFFF
    device_id: ClassVar[int] = 0xFFFF
    subsystem_vendor_id: ClassVar[int] = 0
    subsystem_id: ClassVar[int] = 0
    revision: ClassVar[int] = 0
    class_code: ClassVar[int] = 0xFF0000
    bars: Mapping[int, Bar] = {}
    intx: ClassVar[bool] = False
    """Whether the device has an interrupt pin."""
    msi_vectors: ClassVar[int] = 0
    msix_vectors: int = 0
    msix_bar: ClassVar[int | None] = None
    """Where table and pending bits of MSI-X are; None: in a BAR of their own, the first that is free."""
    migration: ClassVar[MigrationFlags] = MigrationFlags.STOP_COPY
    """MigrationFlags(0): the device cannot migrate."""
    pre_copy_limit: ClassVar[int] = 1 << 20
    """Bytes of the stream after which ``pre_copy`` is asked no more; bounds what a device takes while resuming."""
    state_version: ClassVar[int] = 1
    """Raise it when state is added: streams of older versions load, those of newer ones are refused."""
    resettable = True

    declared_state: ClassVar[dict[str, State]] = {}
    declared_options: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        cls.declared_state = cls.declared_state | {n: v for n, v in own.items() if isinstance(v, State)}
        cls.declared_options = cls.declared_options | {n: v for n, v in own.items() if isinstance(v, Option)}

    def __init__(self, **options: object) -> None:
        self._irq_watches: dict[tuple[int, int, int], int] = {}
        self._set_options(options)
        self.configure()
        self._reset_state()
        self.irq = Interrupts(self.irq_counts, self._watch_irq, self._show_level)
        self._link: Link | None = None
        self.dma = GuestMemory()
        self.bars, capabilities = layout(self.bars, self.msi_vectors, self.msix_vectors, self.msix_bar)
        self.config = ConfigSpace(
            self.vendor_id,
            self.device_id,
            revision=self.revision,
            class_code=self.class_code,
            subsystem_vendor_id=self.subsystem_vendor_id,
            subsystem_id=self.subsystem_id,
            interrupt_pin=1 if self.intx else 0,
            bars=self.bars,
            capabilities=capabilities,
            on_command=lambda old, new: self._follow_command(),
        )
        msix = next((c for c in capabilities if isinstance(c, MsixCapability)), None)
        self._msix = MsixTable(msix, self.irq.pba) if msix else None
        self._bar_memory = BarMemory(self.bars)
        self.memory = self._bar_memory.views
        self._accesses = AccessTable(self.config, self._msix, self.memory, self.bar_read, self.bar_write)
        self.regions = [self._region(index) for index in range(PCI_NUM_REGIONS)]
        self.irqs = [Irq(count) for count in self.irq_counts]
        self._migrator = Migrator(self, self.migration, self.irq.rearm)

    # What a subclass overrides

    def configure(self) -> None:
        """Options are set, nothing is built: the place to set ``bars`` and vectors that depend on options."""

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        """Fill ``data`` from ``offset`` of a BAR. By default it reads 0."""

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        """Take ``data``, valid during the call only, at ``offset`` of a BAR. By default it is ignored."""

    def on_reset(self) -> None:
        """After a reset: declared state, config space and interrupts are as in a new device already."""

    def save(self) -> dict[str, object]:
        """State besides what is declared, of the types that :func:`state` names, by name."""
        return {}

    def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
        """Take over what :meth:`save` and :meth:`pre_copy` of the source gave; declared state is there already.

        Raises ValueError for what it cannot be: then everything is as it was before.
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

    def io_fds(self, bar: int) -> Sequence[RegionIoFd]:
        """The parts of a BAR that file descriptors serve; watch them in :meth:`connected`."""
        return ()

    # What a subclass may use

    def defer(self, work: Callable[[], None]) -> None:
        """Do ``work`` after the reply to the current access: the place for DMA that may need the client's help."""
        if self._link is None:
            work()
        else:
            self._link.defer(work)

    @property
    def link(self) -> Link | None:
        """What the server offers while a client is connected."""
        return self._link

    def raise_interrupt(self, vector: int = 0) -> None:
        """Signal a cause: by a message if the client listens for MSI or MSI-X, else by INTx until ``deassert``."""
        if self.irq.message_signalled or not self.intx:
            self.irq.trigger(vector)
        else:
            self.irq.assert_()

    # Construction

    def _set_options(self, given: Mapping[str, object]) -> None:
        unknown = sorted(set(given) - set(self.declared_options))
        if unknown:
            known = ", ".join(sorted(self.declared_options)) or "none"
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}; there are: {known}")
        for name, declared in self.declared_options.items():
            setattr(self, name, given.get(name, declared.default))

    def _reset_state(self) -> None:
        for name, declared in self.declared_state.items():
            setattr(self, name, declared.new())

    @property
    def irq_counts(self) -> tuple[int, int, int, int, int]:
        """Vectors of INTX, MSI, MSIX, ERR and REQ."""
        return (int(self.intx), self.msi_vectors, self.msix_vectors, 1, 1)

    def _region(self, index: int) -> Region:
        if index == PciRegion.CONFIG:
            return Region(len(self.config))
        bar = self.bars.get(index)
        if bar is None:
            return Region(0, 0)
        fd = self._bar_memory.fileno(index)
        return Region(bar.size, fd=fd, sparse_areas=bar.sparse_areas, io_fds=tuple(self.io_fds(index)))

    # Hooks of the server

    def connected(self, link: Link) -> None:
        self._link = self.dma.messages = link

    def disconnected(self) -> None:
        self.irq.release_fds()
        self._link = self.dma.messages = None

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        self._accesses.readers[region](region, offset, data)

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        self._accesses.writers[region](region, offset, data)

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        self.dma.map(address, size, flags, fd, offset)

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self.dma.unmap(address, size)

    def reset(self) -> None:
        self._reset_state()
        self.config.reset()
        self.irq.reset()
        self._follow_command()
        if self._msix:
            self._msix.reset()
        self._migrator.reset()
        self.on_reset()

    def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[OwnedFd]) -> None:
        self.irq.set_irqs(index, flags, start, count, fds)

    def _watch_irq(self, fd: OwnedFd | None, index: int, vector: int, action: int) -> None:
        """Do ``action`` whenever the client signals ``fd``; None: no longer."""
        key = index, vector, action
        link = self._link
        if link is None:
            return
        previous = self._irq_watches.pop(key, None)
        if previous is not None:
            link.unwatch(previous)
        if fd is None:
            return
        number = self._irq_watches[key] = fd.fileno()

        def signalled() -> None:
            if take_signals(number):
                self.irq.set_irqs(index, action | IrqSetFlags.DATA_NONE, vector, 1, ())

        link.watch(number, signalled)

    def _show_level(self, asserted: bool) -> None:
        self.config.interrupt_status = asserted

    def _follow_command(self) -> None:
        self.irq.intx_disabled = self.config.intx_disabled

    # Migration

    def migration_flags(self) -> MigrationFlags:
        return self.migration or super().migration_flags()

    def migration_get_state(self) -> DeviceState:
        self.migration_flags()
        return self._migrator.state

    def migration_set_state(self, state: DeviceState) -> None:
        self.migration_flags()
        self._migrator.set(state)

    def migration_read_data(self, data: memoryview) -> int:
        return self._migrator.read(data)

    def migration_write_data(self, data: memoryview) -> None:
        self._migrator.write(data)

    def migration_data_size(self) -> int:
        self.migration_flags()
        return self._migrator.data_size()

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

    def collect(self) -> dict[str, object]:
        """All of the device's state but the memory of its BARs, as the stream has it."""
        return {
            "config": self.config.save(),
            "interrupts": dict(self.irq.save()),
            "msix": self._msix.save() if self._msix else b"",
            "fields": {name: saved_value(getattr(self, name)) for name in self.declared_state},
            "device": self.save(),
        }

    def apply(self, collected: dict[str, object], loaded: LoadedStream) -> None:
        """Become what :meth:`collect` of such a device gave. Raises ValueError, and may then be half of it."""
        if collected.keys() != {"config", "interrupts", "msix", "fields", "device"}:
            raise ValueError(f"the state has the parts {', '.join(collected)}")
        config, msix, fields, device = (collected[part] for part in ("config", "msix", "fields", "device"))
        if not isinstance(config, bytes) or not isinstance(msix, bytes):
            raise ValueError("config and msix are bytes")
        if not isinstance(fields, dict) or not isinstance(device, dict):
            raise ValueError("fields and device are maps")
        complete = loaded.state_version == self.state_version
        values = restored_values(self.declared_state, fields, complete=complete)
        self.config.load(config)
        self.irq.load(collected["interrupts"], intx_disabled=self.config.intx_disabled)
        if self._msix:
            self._msix.load(msix)
        for name, value in values.items():
            setattr(self, name, value)
        self.load(device, loaded.pre_copy)
