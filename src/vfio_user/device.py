"""A PCI device as a class.

::

    class Counter(Device):
        vendor_id, device_id, msix_vectors = 0x494F, 0x0DC8, 1
        bars = {0: Bar(0x1000)}
        count = state(0)

        def bar_read(self, bar, offset, data):
            data[:] = self.count.to_bytes(8, "little")[: len(data)].ljust(len(data), b"\\0")

        def bar_write(self, bar, offset, data):
            self.count += 1
            self.irq.trigger(0)

What a class declares, :class:`Device` turns into config space, regions, interrupts and a migration stream. A
subclass says what the device does, and asks for what is special: ``save``, ``load``, ``pre_copy``, ``quiesce``.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from vfio_user.dma.memory import GuestMemory
from vfio_user.errors import StreamError
from vfio_user.fds import OwnedFd, take_signals
from vfio_user.migration import (
    LoadedStream,
    StateMachine,
    StreamIdentity,
    StreamReader,
    StreamWriter,
    decode_state,
    encode_state,
)
from vfio_user.pci import Bar, Capability, ConfigSpace, Interrupts, MsiCapability, MsixCapability, MsixTable
from vfio_user.server.backend import Irq, Link, Region, RegionIoFd, ServerBackend
from vfio_user.wire.constants import (
    PAGE_SIZE,
    PCI_NUM_REGIONS,
    DeviceState,
    IrqSetFlags,
    MigrationFlags,
    PciRegion,
)

__all__ = ["Bar", "Device", "option", "state"]

T = TypeVar("T")
Access = Callable[[int, int, memoryview], None]

LOAD_SLACK = 1 << 20
"""Bytes that a stream may be longer than what this device itself would send, pre-copy aside."""


@dataclass(frozen=True, slots=True)
class _State:
    default: object


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a device class: what it is without being given, what it means, how text becomes its value."""

    default: object
    help: str
    parse: Callable[[str], object]


def state(default: T) -> T:
    """Declare a piece of a device's state: an attribute that a reset sets to ``default`` and a migration carries.

    An int (up to 64 bits), float, bool, str, bytes or bytearray, or a list or dict of those.
    """
    return cast(T, _State(default))


def option(default: T, help: str, parse: Callable[[str], T] | None = None) -> T:
    """Declare an option: a keyword of the constructor, and ``-o NAME=VALUE`` of ``vfio-user serve``.

    ``parse`` turns text into the value and raises ValueError for what it cannot be; by default the type of
    ``default`` does.
    """
    return cast(T, Option(default, help, parse or _parser(default)))


def _parser(default: object) -> Callable[[str], object]:
    if isinstance(default, bool):
        return _parse_bool
    if isinstance(default, int):
        return lambda text: int(text, 0)
    return type(default)


def _parse_bool(text: str) -> bool:
    try:
        return {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }[text.lower()]
    except KeyError:
        raise ValueError(f"{text!r} is not true or false") from None


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

    declared_state: ClassVar[dict[str, object]] = {}
    declared_options: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        cls.declared_state = cls.declared_state | {n: v.default for n, v in own.items() if isinstance(v, _State)}
        cls.declared_options = cls.declared_options | {n: v for n, v in own.items() if isinstance(v, Option)}

    def __init__(self, **options: object) -> None:
        self._irq_watches: dict[tuple[int, int, int], int] = {}
        self._set_options(options)
        self.configure()
        self._reset_state()
        self.irq = Interrupts(self.irq_counts, self._watch_irq, self._show_level)
        self._link: Link | None = None
        self.dma = GuestMemory()
        self.bars, capabilities = self._layout()
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
        self._files = {n: _memory_file(f"bar{n}", bar.size) for n, bar in self.bars.items() if bar.memory}
        self.memory = {n: _map_memory(fd, self.bars[n].size) for n, fd in self._files.items()}
        self.regions = [self._region(index) for index in range(PCI_NUM_REGIONS)]
        self.irqs = [Irq(count) for count in self.irq_counts]
        self._region_readers: list[Access] = [self._reader(index) for index in range(PCI_NUM_REGIONS)]
        self._region_writers: list[Access] = [self._writer(index) for index in range(PCI_NUM_REGIONS)]
        self._machine = StateMachine(self.migration, self._step)
        self._save_stream: StreamWriter | None = None
        self._ahead = 0  # bytes of the save stream that are pre-copy
        self._load_stream: StreamReader | None = None

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
        """With PRE_COPY: what can be sent ahead while the device runs; b"" when there is nothing (more) for now."""
        return b""

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
        for name, default in self.declared_state.items():
            setattr(self, name, copy.deepcopy(default))

    @property
    def irq_counts(self) -> tuple[int, int, int, int, int]:
        """Vectors of INTX, MSI, MSIX, ERR and REQ."""
        return (int(self.intx), self.msi_vectors, self.msix_vectors, 1, 1)

    def _layout(self) -> tuple[dict[int, Bar], list[Capability]]:
        """All BARs, the one that MSI-X needs included, and the capabilities."""
        bars = dict(self.bars)
        capabilities: list[Capability] = []
        if self.msi_vectors:
            capabilities.append(MsiCapability(self.msi_vectors))
        if self.msix_vectors:
            pba = _round_up(16 * self.msix_vectors, PAGE_SIZE // 2)
            index = self.msix_bar
            if index is None:
                index = _free_bar(bars)
            if index not in bars:
                bars[index] = Bar(_round_up(pba + self.msix_vectors // 8 + 8, PAGE_SIZE, power_of_two=True))
            capabilities.append(MsixCapability(self.msix_vectors, index, 0, index, pba))
        return bars, capabilities

    def _region(self, index: int) -> Region:
        if index == PciRegion.CONFIG:
            return Region(len(self.config))
        bar = self.bars.get(index)
        if bar is None:
            return Region(0, 0)
        fd = self._files[index].fileno() if index in self._files else None
        return Region(bar.size, fd=fd, sparse_areas=bar.sparse_areas, io_fds=tuple(self.io_fds(index)))

    def _reader(self, index: int) -> Access:
        if index == PciRegion.CONFIG:
            return lambda region, offset, data: self.config.read_into(offset, data)
        return self._access(index, self.bar_read, self._msix.read_into if self._msix else None, _copy_out)

    def _writer(self, index: int) -> Access:
        if index == PciRegion.CONFIG:
            return lambda region, offset, data: self.config.write(offset, data)
        return self._access(index, self.bar_write, self._msix.write if self._msix else None, _copy_in)

    def _access(
        self,
        index: int,
        special: Access,
        table: Callable[[int, int, memoryview], bool] | None,
        copy_memory: Callable[[memoryview, int, memoryview], None],
    ) -> Access:
        """What serves accesses to a BAR: memory where it has some, the MSI-X table where that is, the subclass."""
        bar, memory = self.bars.get(index), self.memory.get(index)
        if bar is None or (memory is None and not (table and self._msix_bar == index)):
            return special

        def access(region: int, offset: int, data: memoryview) -> None:
            if table is not None and table(region, offset, data):
                return
            if memory is not None and not bar.traps(offset, len(data)):
                copy_memory(memory, offset, data)
                return
            special(region, offset, data)

        return access

    @property
    def _msix_bar(self) -> int | None:
        capability = next((c for c in self.config.capabilities if isinstance(c, MsixCapability)), None)
        return capability.table_bar if capability else None

    # Hooks of the server

    def connected(self, link: Link) -> None:
        self._link = self.dma.messages = link

    def disconnected(self) -> None:
        self.irq.release_fds()
        self._link = self.dma.messages = None

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        self._region_readers[region](region, offset, data)

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        self._region_writers[region](region, offset, data)

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
        self._save_stream = self._load_stream = None
        self._machine.reset()
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
        return self._machine.state

    def migration_set_state(self, state: DeviceState) -> None:
        self.migration_flags()
        self._machine.set(state)

    def migration_read_data(self, data: memoryview) -> int:
        stream = self._save_stream
        if stream is None:
            raise OSError(errno.EINVAL, f"no migration data in state {self._machine.state.name}")
        filled = stream.read_into(data)
        if filled < len(data) and self._machine.state != DeviceState.STOP_COPY:
            while filled < len(data) and self._ahead < self.pre_copy_limit and (ahead := self.pre_copy()):
                stream.add_pre_copy(ahead)
                self._ahead += stream.pending
                filled += stream.read_into(data[filled:])
        return filled

    def migration_write_data(self, data: memoryview) -> None:
        if self._load_stream is None:
            raise OSError(errno.EINVAL, f"no migration data in state {self._machine.state.name}")
        self._load_stream.write(data)

    def migration_data_size(self) -> int:
        pending = self._save_stream.pending if self._save_stream else 0
        if self._machine.state == DeviceState.STOP_COPY:
            return pending
        return pending + self._stream_size()

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

    def _step(self, source: DeviceState, target: DeviceState) -> None:
        """The work of one arc."""
        if target == DeviceState.PRE_COPY and source == DeviceState.RUNNING:
            self._save_stream, self._ahead = StreamWriter(self.stream_identity), 0
        elif target == DeviceState.STOP_COPY:
            if source == DeviceState.STOP:
                self._save_stream = StreamWriter(self.stream_identity)
            assert self._save_stream is not None
            self._finish_stream(self._save_stream)
        elif target == DeviceState.RESUMING:
            limit = 4 * self._stream_size() + LOAD_SLACK + 2 * self.pre_copy_limit
            self._load_stream = StreamReader(self.stream_identity, limit)
        elif source == DeviceState.RESUMING:
            assert self._load_stream is not None
            self._load(self._load_stream.finish())
            self._load_stream = None
        elif target in (DeviceState.STOP, DeviceState.RUNNING, DeviceState.RUNNING_P2P):
            self._save_stream = None
        if target == DeviceState.RUNNING and source in (DeviceState.STOP, DeviceState.RUNNING_P2P):
            self.irq.rearm()

    def _collect(self) -> dict[str, object]:
        """All of the device's state but the memory of its BARs."""
        return {
            "config": self.config.save(),
            "interrupts": dict(self.irq.save()),
            "msix": self._msix.save() if self._msix else b"",
            "fields": {name: _saved(getattr(self, name)) for name in self.declared_state},
            "device": self.save(),
        }

    def _finish_stream(self, stream: StreamWriter) -> None:
        stream.add_state(encode_state(self._collect()))
        for index, memory in self.memory.items():
            stream.add_memory(index, 0, memory)
        stream.end()

    def _stream_size(self) -> int:
        """Bytes that a stream of the device as it is now has."""
        stream = StreamWriter(self.stream_identity)
        self._finish_stream(stream)
        return stream.pending

    def _load(self, loaded: LoadedStream) -> None:
        """Become what the stream says, or stay what this device is."""
        before = self._collect()
        try:
            self._check_memory(loaded)
            self._apply(decode_state(loaded.state), loaded)
        except (ValueError, KeyError, TypeError, OSError) as error:
            self._apply(before, LoadedStream([], b"", [], self.state_version))
            raise StreamError(f"the stream does not fit {type(self).__name__}: {error}") from error

    def _apply(self, saved: dict[str, object], loaded: LoadedStream) -> None:
        if saved.keys() != {"config", "interrupts", "msix", "fields", "device"}:
            raise ValueError(f"the state has the parts {', '.join(saved)}")
        config, msix, fields, device = saved["config"], saved["msix"], saved["fields"], saved["device"]
        if not isinstance(config, bytes) or not isinstance(msix, bytes):
            raise ValueError("config and msix are bytes")
        if not isinstance(fields, dict) or not isinstance(device, dict):
            raise ValueError("fields and device are maps")
        values = self._checked_fields(fields, loaded.state_version)
        self.config.load(config)
        self.irq.load(saved["interrupts"], intx_disabled=self.config.intx_disabled)
        if self._msix:
            self._msix.load(msix)
        for name, value in values.items():
            setattr(self, name, value)
        self.load(device, loaded.pre_copy)
        for block in loaded.memory:
            self.memory[block.region][block.offset : block.offset + len(block.data)] = block.data

    def _check_memory(self, loaded: LoadedStream) -> None:
        """The stream has the memory of all BARs, from the first byte to the last."""
        sizes = dict.fromkeys(self.memory, 0)
        for block in loaded.memory:
            if sizes.get(block.region) != block.offset:
                raise ValueError(f"memory at {block.offset:#x} of BAR {block.region} does not belong there")
            sizes[block.region] += len(block.data)
        for index, size in sizes.items():
            if size != len(self.memory[index]):
                raise ValueError(f"BAR {index} has {len(self.memory[index]):#x} bytes of memory, not {size:#x}")

    def _checked_fields(self, fields: dict[object, object], version: int) -> dict[str, object]:
        """Declared state by name; what an older version did not have keeps its default."""
        unknown = [str(name) for name in fields if name not in self.declared_state]
        missing = [name for name in self.declared_state if name not in fields]
        if unknown:
            raise ValueError(f"unknown state: {', '.join(unknown)}")
        if missing and version == self.state_version:
            raise ValueError(f"missing state: {', '.join(missing)}")
        return {
            name: _restored(name, fields.get(name, _saved(default)), default)
            for name, default in self.declared_state.items()
        }


def _saved(value: object) -> object:
    return bytes(value) if isinstance(value, bytearray) else value


def _restored(name: str, value: object, default: object) -> object:
    """A value of a stream as what the attribute holds. Raises ValueError for another type or another length."""
    if isinstance(default, bytearray):
        if not isinstance(value, bytes) or len(value) != len(default):
            raise ValueError(f"{name} is {len(default)} bytes")
        return bytearray(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} is of type {type(default).__name__}, not {type(value).__name__}")
    return copy.deepcopy(value)


def _round_up(size: int, unit: int, *, power_of_two: bool = False) -> int:
    rounded = -(-size // unit) * unit
    return 1 << (rounded - 1).bit_length() if power_of_two else rounded


def _free_bar(bars: Mapping[int, Bar]) -> int:
    taken = {index + part for index, bar in bars.items() for part in range(2 if bar.bits64 else 1)}
    for index in range(6):
        if index not in taken:
            return index
    raise ValueError("no BAR is left for the MSI-X table: set msix_bar to one that has room")


def _memory_file(name: str, size: int) -> OwnedFd:
    """Memory that a client can map, of a size that it cannot change."""
    fd = OwnedFd(os.memfd_create(f"vfio-user-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    _seal_size(fd.fileno())
    return fd


def _seal_size(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _map_memory(fd: OwnedFd, size: int) -> memoryview:
    return memoryview(mmap.mmap(fd.fileno(), size, mmap.MAP_SHARED))


def _copy_out(memory: memoryview, offset: int, data: memoryview) -> None:
    data[:] = memory[offset : offset + len(data)]


def _copy_in(memory: memoryview, offset: int, data: memoryview) -> None:
    memory[offset : offset + len(data)] = data
