"""What IDENTIFY gives: the controller, a namespace, lists of namespaces (5.15.2)."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from vfio_user import __version__
from vfio_user.devices.nvme.constants import CQE_SIZE, SQE_SIZE, VERSION
from vfio_user.devices.nvme.features import CRITICAL_TEMPERATURE, WARNING_TEMPERATURE
from vfio_user.devices.nvme.namespaces import BLOCK_SIZES, MAX_NAMESPACES, Namespace

SIZE = 4096

MAX_DATA_SHIFT = 8
"""MDTS: a command moves at most 2**8 pages of 4 KiB."""
MAX_DATA = 4096 << MAX_DATA_SHIFT

ERROR_LOG_ENTRIES = 64
ASYNC_EVENTS = 8
"""Asynchronous event requests that may wait."""
ABORTS = 4
"""Aborts that may be under way."""
COMPARE_WRITE_BLOCKS = 128
"""Blocks that a fused compare and write has at most: it is done at one go."""

ONCS_COMPARE, ONCS_DATASET, ONCS_ZEROES, ONCS_TIMESTAMP, ONCS_VERIFY = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 7
OACS_FORMAT, OACS_DOORBELLS = 1 << 1, 1 << 8
LPA_COMMANDS, LPA_EXTENDED = 1 << 1, 1 << 2
VWC_PRESENT, VWC_FLUSH_ALL = 1 << 0, 3 << 1
FRMW_ONE_SLOT_READ_ONLY = 0b11
DLFEAT_ZEROS, DLFEAT_WRITE_ZEROES = 1 << 0, 1 << 3
OAES_NAMESPACE_NOTICES = 1 << 8
IO_CONTROLLER = 1
FUSES_COMPARE_AND_WRITE = 1
NIDT_NGUID, NIDT_UUID = 2, 3
KEEP_ALIVE_GRANULARITY = 1
"""In units of 100 ms."""
POWER_IN_CENTIWATT = 2500
SHUTDOWN_MICROSECONDS = 20_000_000
"""RTD3E: how long a host waits for a shutdown, whose flush may take its time."""
SGL_SUPPORTED, SGL_BIT_BUCKET, SGL_LONGER = 1 << 0, 1 << 16, 1 << 18


SERIAL_LENGTH, MODEL_LENGTH = 20, 40
"""Bytes of ASCII."""


@dataclass(frozen=True, slots=True)
class ControllerIdentity:
    """What tells this controller from others."""

    vendor: int
    subsystem_vendor: int
    serial: str
    model: str

    @property
    def qualified_name(self) -> str:
        """SUBNQN (7.9): that of a subsystem of its own."""
        return f"nqn.2014-08.org.nvmexpress:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, self.serial)}"


def text(value: str, length: int) -> bytes:
    """ASCII, padded with blanks (1.5)."""
    return value.encode("ascii", "replace")[:length].ljust(length)


def controller(identity: ControllerIdentity) -> bytes:
    """The controller data structure (figure 247); what is not named here is 0."""
    commands = ONCS_COMPARE | ONCS_DATASET | ONCS_ZEROES | ONCS_TIMESTAMP | ONCS_VERIFY
    return _structure(
        (0, "H", identity.vendor),
        (2, "H", identity.subsystem_vendor),
        (4, "20s", text(identity.serial, SERIAL_LENGTH)),
        (24, "40s", text(identity.model, MODEL_LENGTH)),
        (64, "8s", text(__version__, 8)),
        (77, "B", MAX_DATA_SHIFT),
        (80, "I", VERSION),
        (88, "I", SHUTDOWN_MICROSECONDS),
        (92, "I", OAES_NAMESPACE_NOTICES),
        (111, "B", IO_CONTROLLER),
        (256, "H", OACS_FORMAT | OACS_DOORBELLS),
        (258, "B", ABORTS - 1),
        (259, "B", ASYNC_EVENTS - 1),
        (260, "B", FRMW_ONE_SLOT_READ_ONLY),
        (261, "B", LPA_COMMANDS | LPA_EXTENDED),
        (262, "B", ERROR_LOG_ENTRIES - 1),
        (266, "H", WARNING_TEMPERATURE),
        (268, "H", CRITICAL_TEMPERATURE),
        (320, "H", KEEP_ALIVE_GRANULARITY),
        (512, "B", 0x11 * (SQE_SIZE.bit_length() - 1)),
        (513, "B", 0x11 * (CQE_SIZE.bit_length() - 1)),
        (516, "I", MAX_NAMESPACES),
        (520, "H", commands),
        (522, "H", FUSES_COMPARE_AND_WRITE),
        (525, "B", VWC_PRESENT | VWC_FLUSH_ALL),
        (532, "H", COMPARE_WRITE_BLOCKS - 1),
        (536, "I", SGL_SUPPORTED | SGL_BIT_BUCKET | SGL_LONGER),
        (540, "I", MAX_NAMESPACES),
        (768, "256s", identity.qualified_name.encode("ascii", "replace")),
        (2048, "H", POWER_IN_CENTIWATT),
    )


def namespace(one: Namespace | None) -> bytes:
    """The namespace data structure (figure 245): all 0 for an NSID that is not active."""
    if one is None:
        return bytes(SIZE)
    return _structure(
        (0, "Q", one.blocks),
        (8, "Q", one.blocks),
        (16, "Q", one.blocks),
        (25, "B", len(BLOCK_SIZES) - 1),
        (26, "B", BLOCK_SIZES.index(one.block_size)),
        (33, "B", DLFEAT_ZEROS | DLFEAT_WRITE_ZEROES),
        (99, "B", one.storage.read_only),
        (104, "16s", one.identity.bytes),
        *((128 + 4 * number, "I", _data_size(one, size) << 16) for number, size in enumerate(BLOCK_SIZES)),
    )


def _data_size(one: Namespace, block_size: int) -> int:
    """LBADS of a format: 0 for one that this namespace cannot have."""
    return block_size.bit_length() - 1 if one.fits(block_size) else 0


def descriptors(one: Namespace) -> bytes:
    """The namespace identification descriptor list (figure 249): its UUID, which is its NGUID, too."""
    entries = ((kind, one.identity.bytes) for kind in (NIDT_NGUID, NIDT_UUID))
    return b"".join(struct.pack("<BBH", kind, len(value), 0) + value for kind, value in entries).ljust(SIZE, b"\0")


def active_list(numbers: Iterable[int], above: int) -> bytes:
    """The NSIDs greater than ``above``, rising (5.15.2.3)."""
    listed = sorted(number for number in numbers if number > above)[: SIZE // 4]
    return struct.pack(f"<{len(listed)}I", *listed).ljust(SIZE, b"\0")


def _structure(*fields: tuple[int, str, object]) -> bytes:
    """A data structure of 4096 bytes from (offset, format, value)."""
    data = bytearray(SIZE)
    for offset, layout, value in fields:
        struct.pack_into("<" + layout, data, offset, value)
    return bytes(data)
