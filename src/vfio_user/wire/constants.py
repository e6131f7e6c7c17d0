"""Numbers of the wire.

Sources: vfio-user specification (QEMU's docs/interop/vfio-user.rst), libvfio-user's ``vfio-user.h``, and the
kernel's ``linux/vfio.h``, whose values the protocol borrows.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

PAGE_SIZE = 4096

VERSION_MAJOR = 0
VERSION_MINOR = 2

HEADER_SIZE = 16
MAX_MSG_FDS = 253
"""The kernel's SCM_MAX_FD: no single sendmsg carries more."""
NEGOTIABLE_MSG_FDS = 1024
"""The largest ``max_msg_fds`` that may be proposed (libvfio-user's limit)."""
DEFAULT_MSG_FDS = 1
DEFAULT_DATA_XFER_SIZE = 1 << 20
DEFAULT_DMA_MAPS = 65535
MAX_DMA_REGION_SIZE = 8 << 40
"""8 TiB, libvfio-user's limit for one DMA region."""
MAX_BITMAP_SIZE = 256 << 20
"""The largest dirty bitmap in one reply, in bytes: that of 8 TiB in pages of 4 KiB, QEMU's limit too."""
MAX_LOGGING_RANGES = 16384
"""Ranges in one DMA_LOGGING_START; the kernel bounds them by one page of ``struct iova_range`` per call."""
SERVER_DMA_CHUNK = 128 << 10
"""Most bytes in one server-initiated DMA request: above its socket's send buffer QEMU hangs (measured)."""


class Command(IntEnum):
    """Commands, specification section "Commands". 14 was DIRTY_PAGES and is gone."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class ControlCommand(IntEnum):
    """Commands of a control socket: this project's extension (docs/control.md), far from the standard's numbers."""

    CONTROL_PUSH = 0x8001
    CONTROL_ACCESS = 0x8002
    CONTROL_STATUS = 0x8003


CONTROL_VERSION = 1
"""Of the extension, as both sides state it in the capabilities of VERSION."""


class AccessMode(IntEnum):
    """What becomes of the primary connection's accesses to BARs while the device does not run."""

    PASS = 0
    DUMMY = 1
    HOLD = 2


class HeaderFlags(IntFlag):
    """``flags`` of the header: bits 0-3 are the type."""

    COMMAND = 0
    REPLY = 1
    NO_REPLY = 0x10
    ERROR = 0x20


TYPE_MASK = 0xF


class DmaFlags(IntFlag):
    """``flags`` of DMA_MAP. MMAP and FILE_IO are libvfio-user's, not the specification's."""

    READ = 1
    WRITE = 2
    MMAP = 4
    FILE_IO = 8


class DmaUnmapFlags(IntFlag):
    GET_DIRTY_BITMAP = 1
    ALL = 2


class DeviceFlags(IntFlag):
    """``flags`` of struct vfio_device_info."""

    RESET = 1
    PCI = 2


class RegionFlags(IntFlag):
    """``flags`` of struct vfio_region_info."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


REGION_INFO_CAP_SPARSE_MMAP = 1


class IoFdType(IntEnum):
    """``type`` of a sub-region in GET_REGION_IO_FDS."""

    IOEVENTFD = 0
    IOREGIONFD = 1
    IOEVENTFD_SHADOW = 2


class PciRegion(IntEnum):
    """Region indexes of a PCI device (VFIO_PCI_*_REGION_INDEX)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


PCI_NUM_REGIONS = 9


class PciIrq(IntEnum):
    """IRQ indexes of a PCI device (VFIO_PCI_*_IRQ_INDEX)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


PCI_NUM_IRQS = 5


class IrqInfoFlags(IntFlag):
    """``flags`` of struct vfio_irq_info."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqSetFlags(IntFlag):
    """``flags`` of struct vfio_irq_set: one of DATA_*, one of ACTION_*."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    ACTION_MASK = 8
    ACTION_UNMASK = 16
    ACTION_TRIGGER = 32


IRQ_DATA_MASK = 0x07
IRQ_ACTION_MASK = 0x38


class DeviceFeature(IntEnum):
    """Feature indexes of VFIO_DEVICE_FEATURE that the protocol knows."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9


FEATURE_MASK = 0xFFFF


class FeatureFlags(IntFlag):
    """Operations in ``flags`` of struct vfio_device_feature; the low 16 bits are the feature's index."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class MigrationFlags(IntFlag):
    """``flags`` of struct vfio_device_feature_migration: which arcs the device has."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


class DeviceState(IntEnum):
    """enum vfio_device_mig_state."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7
