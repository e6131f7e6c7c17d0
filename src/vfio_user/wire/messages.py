"""One type per payload, its layout beside it.

A payload is a fixed part, described by ``LAYOUT``, and for some messages a tail of bytes behind it. ``parse`` checks
syntax only (is the fixed part there?); what the fields mean is the business of whoever handles the message. All
integers are little-endian, all structs packed, as in libvfio-user's ``vfio-user.h`` and the kernel's ``vfio.h``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct, error
from typing import ClassVar, Self

from vfio_user.errors import MessageError, UsageError
from vfio_user.wire.constants import FEATURE_MASK, REGION_INFO_CAP_SPARSE_MMAP, IoFdType

Buffer = bytes | bytearray | memoryview


class Payload:
    """A fixed-size structure; subclasses are frozen dataclasses whose fields stand in the order of LAYOUT."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]]
    LAYOUT: ClassVar[Struct]

    @classmethod
    def parse(cls, data: Buffer, offset: int = 0) -> Self:
        """Read the structure at ``offset``. Raises MessageError when ``data`` is too short for it."""
        if len(data) - offset < cls.LAYOUT.size:
            raise MessageError(f"{cls.__name__} takes {cls.LAYOUT.size} bytes, {max(0, len(data) - offset)} came")
        return cls(*cls.LAYOUT.unpack_from(data, offset))

    def pack(self) -> bytes:
        """The bytes of the structure. Raises UsageError when a field does not fit."""
        try:
            return self.LAYOUT.pack(*[getattr(self, name) for name in self.__match_args__])
        except error as why:
            raise UsageError(f"{self}: {why}") from why


@dataclass(frozen=True, slots=True)
class Header(Payload):
    """The 16 bytes that every message begins with."""

    LAYOUT: ClassVar[Struct] = Struct("<HHIII")
    msg_id: int
    command: int
    msg_size: int
    flags: int
    error_no: int


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    """No payload."""

    LAYOUT: ClassVar[Struct] = Struct("<")


@dataclass(frozen=True, slots=True)
class Version(Payload):
    """VERSION, both ways; tail: the capabilities, JSON and a NUL, or nothing."""

    LAYOUT: ClassVar[Struct] = Struct("<HH")
    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class DmaMap(Payload):
    LAYOUT: ClassVar[Struct] = Struct("<IIQQQ")
    argsz: int
    flags: int
    offset: int
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class DmaUnmap(Payload):
    """DMA_UNMAP, both ways; tail with GET_DIRTY_BITMAP: DirtyBitmapInfo, and in the reply the bitmap."""

    LAYOUT: ClassVar[Struct] = Struct("<IIQQ")
    argsz: int
    flags: int
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class DirtyBitmapInfo(Payload):
    """struct vfio_user_bitmap: page size and size of the bitmap that follows, both in bytes."""

    LAYOUT: ClassVar[Struct] = Struct("<QQ")
    page_size: int
    size: int


@dataclass(frozen=True, slots=True)
class DeviceInfo(Payload):
    """struct vfio_device_info, both ways."""

    LAYOUT: ClassVar[Struct] = Struct("<IIII")
    argsz: int
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0


@dataclass(frozen=True, slots=True)
class RegionInfo(Payload):
    """struct vfio_region_info, both ways; tail of the reply: the capability chain."""

    LAYOUT: ClassVar[Struct] = Struct("<IIIIQQ")
    argsz: int
    flags: int
    index: int
    cap_offset: int = 0
    size: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class CapabilityHeader(Payload):
    """struct vfio_info_cap_header; ``next`` counts from the start of the payload, 0 ends the chain."""

    LAYOUT: ClassVar[Struct] = Struct("<HHI")
    id: int
    version: int
    next: int


@dataclass(frozen=True, slots=True)
class SparseAreas(Payload):
    """What follows the header of the sparse-mmap capability; tail: ``nr_areas`` pairs of (offset, size)."""

    LAYOUT: ClassVar[Struct] = Struct("<II")
    nr_areas: int
    reserved: int = 0


AREA = Struct("<QQ")
"""One sparse area: offset and size."""


@dataclass(frozen=True, slots=True)
class RegionIoFds(Payload):
    """VFIO_USER_DEVICE_GET_REGION_IO_FDS, both ways; tail of the reply: ``count`` IoFd."""

    LAYOUT: ClassVar[Struct] = Struct("<IIII")
    argsz: int
    flags: int
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class IoFd(Payload):
    """One sub-region of a region that an fd serves: 48 bytes as in the C header (the specification has 40).

    ``shadow_mem_fd_index`` and ``shadow_offset`` belong to IOEVENTFD_SHADOW. At the place of ``shadow_offset`` an
    ioregionfd carries its user data, and the specification's 40-byte ioeventfd its datamatch.
    """

    LAYOUT: ClassVar[Struct] = Struct("<QQIIIIQQ")
    offset: int
    size: int
    fd_index: int
    type: int
    flags: int = 0
    shadow_mem_fd_index: int = 0
    shadow_offset: int = 0
    datamatch: int = 0

    SHORT_SIZE: ClassVar[int] = 40

    @property
    def user_data(self) -> int:
        """``user_data`` of an ioregionfd."""
        return self.shadow_offset

    @classmethod
    def parse_short(cls, data: Buffer, offset: int = 0) -> IoFd:
        """Read the 40-byte form of the specification. Raises MessageError when ``data`` is too short for it."""
        if len(data) - offset < cls.SHORT_SIZE:
            raise MessageError(f"{cls.__name__} takes {cls.SHORT_SIZE} bytes, {max(0, len(data) - offset)} came")
        padded = bytes(data[offset : offset + cls.SHORT_SIZE]).ljust(cls.LAYOUT.size, b"\0")
        entry = cls.parse(padded)
        if entry.type == IoFdType.IOREGIONFD:
            return entry
        return cls(entry.offset, entry.size, entry.fd_index, entry.type, entry.flags, 0, 0, entry.shadow_offset)


NO_FD_INDEX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class IrqInfo(Payload):
    """struct vfio_irq_info, both ways."""

    LAYOUT: ClassVar[Struct] = Struct("<IIII")
    argsz: int
    flags: int
    index: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class IrqSet(Payload):
    """struct vfio_irq_set; tail with DATA_BOOL: one byte per interrupt."""

    LAYOUT: ClassVar[Struct] = Struct("<IIIII")
    argsz: int
    flags: int
    index: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class RegionAccess(Payload):
    """REGION_READ and REGION_WRITE, both ways; tail: the data, in a read's reply and a write's command."""

    LAYOUT: ClassVar[Struct] = Struct("<QII")
    offset: int
    region: int
    count: int


@dataclass(frozen=True, slots=True)
class DmaAccess(Payload):
    """DMA_READ and DMA_WRITE, both ways; tail: the data, in a read's reply and a write's command."""

    LAYOUT: ClassVar[Struct] = Struct("<QQ")
    address: int
    count: int


@dataclass(frozen=True, slots=True)
class WriteMulti(Payload):
    """REGION_WRITE_MULTI, both ways; tail of the command: ``count`` WriteMultiEntry."""

    LAYOUT: ClassVar[Struct] = Struct("<Q")
    count: int


@dataclass(frozen=True, slots=True)
class WriteMultiEntry(Payload):
    """One write of at most 8 bytes; ``data`` is always 8 bytes long on the wire."""

    LAYOUT: ClassVar[Struct] = Struct("<QII8s")
    offset: int
    region: int
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Feature(Payload):
    """struct vfio_device_feature, both ways; tail: what the feature has."""

    LAYOUT: ClassVar[Struct] = Struct("<II")
    argsz: int
    flags: int

    @property
    def index(self) -> int:
        return self.flags & FEATURE_MASK

    @property
    def operation(self) -> int:
        return self.flags & ~FEATURE_MASK


@dataclass(frozen=True, slots=True)
class FeatureMigration(Payload):
    """struct vfio_device_feature_migration."""

    LAYOUT: ClassVar[Struct] = Struct("<Q")
    flags: int


@dataclass(frozen=True, slots=True)
class FeatureDeviceState(Payload):
    """struct vfio_device_feature_mig_state; ``data_fd`` has no use on a socket and is echoed."""

    LAYOUT: ClassVar[Struct] = Struct("<Ii")
    device_state: int
    data_fd: int = 0


@dataclass(frozen=True, slots=True)
class FeatureDataSize(Payload):
    """struct vfio_device_feature_mig_data_size: bytes that STOP_COPY will send."""

    LAYOUT: ClassVar[Struct] = Struct("<Q")
    stop_copy_length: int


@dataclass(frozen=True, slots=True)
class LoggingControl(Payload):
    """struct vfio_device_feature_dma_logging_control; tail: ``num_ranges`` LoggingRange."""

    LAYOUT: ClassVar[Struct] = Struct("<QII")
    page_size: int
    num_ranges: int
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class LoggingRange(Payload):
    """struct vfio_device_feature_dma_logging_range."""

    LAYOUT: ClassVar[Struct] = Struct("<QQ")
    iova: int
    length: int


@dataclass(frozen=True, slots=True)
class LoggingReport(Payload):
    """struct vfio_user_device_feature_dma_logging_report, both ways; tail of the reply: the bitmap."""

    LAYOUT: ClassVar[Struct] = Struct("<QQQ")
    iova: int
    length: int
    page_size: int


@dataclass(frozen=True, slots=True)
class MigData(Payload):
    """MIG_DATA_READ and MIG_DATA_WRITE; tail: ``size`` bytes, in a read's reply and a write's command."""

    LAYOUT: ClassVar[Struct] = Struct("<II")
    argsz: int
    size: int


def pack_sparse_areas(areas: Sequence[tuple[int, int]]) -> bytes:
    """The sparse-mmap capability (vfio_region_info_cap_sparse_mmap) as the only link of a chain."""
    pairs = b"".join(AREA.pack(offset, size) for offset, size in areas)
    head = CapabilityHeader(REGION_INFO_CAP_SPARSE_MMAP, 1, 0).pack() + SparseAreas(len(areas)).pack()
    return head + pairs


def parse_capability_chain(payload: Buffer, first: int) -> Iterable[tuple[CapabilityHeader, int]]:
    """Walk the chain that starts at ``first``: each header with the offset of what follows it.

    Every link must lie behind the one before it: a chain that points back or outside is a MessageError.
    """
    position = first
    last = RegionInfo.LAYOUT.size - 1
    while position:
        if position <= last:
            raise MessageError(f"capability chain goes back from {last} to {position}")
        header = CapabilityHeader.parse(payload, position)
        yield header, position + CapabilityHeader.LAYOUT.size
        last, position = position, header.next


def parse_sparse_areas(payload: Buffer, position: int) -> tuple[tuple[int, int], ...]:
    """The areas of the sparse-mmap capability whose contents start at ``position``, (offset, size) each."""
    areas = SparseAreas.parse(payload, position)
    start = position + SparseAreas.LAYOUT.size
    if areas.nr_areas * AREA.size > len(payload) - start:
        raise MessageError(f"{areas.nr_areas} sparse areas announced, {len(payload) - start} bytes came")
    return tuple(AREA.iter_unpack(payload[start : start + AREA.size * areas.nr_areas]))


@dataclass(frozen=True, slots=True)
class ControlPushed(Payload):
    """Reply of CONTROL_PUSH: how many pages of 4 KiB the primary client was made to see as dirty."""

    LAYOUT: ClassVar[Struct] = Struct("<Q")
    pages: int


@dataclass(frozen=True, slots=True)
class ControlAccess(Payload):
    """CONTROL_ACCESS, both ways: an AccessMode."""

    LAYOUT: ClassVar[Struct] = Struct("<I")
    mode: int


@dataclass(frozen=True, slots=True)
class ControlStatus(Payload):
    """Reply of CONTROL_STATUS.

    ``access`` is an AccessMode, ``held`` how many accesses wait; ``page_size`` of the DMA log in bytes, 0 while it is
    off, ``dirty_pages`` how many of them are dirty; ``state`` a DeviceState, NO_STATE for a device that has none;
    ``connected`` whether a primary client is there, 0 or 1.
    """

    LAYOUT: ClassVar[Struct] = Struct("<IIQQII")
    NO_STATE: ClassVar[int] = 0xFFFFFFFF
    access: int
    held: int
    page_size: int
    dirty_pages: int
    state: int
    connected: int
