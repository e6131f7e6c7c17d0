"""Log pages (5.14.1), and what they count."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Annotated

from msgspec import Meta

from vfio_user import __version__
from vfio_user.devices.nvme.command import Command
from vfio_user.devices.nvme.constants import AdminOpcode, IoOpcode
from vfio_user.devices.nvme.features import TEMPERATURE
from vfio_user.devices.nvme.identify import ERROR_LOG_ENTRIES, text

_ERROR = struct.Struct("<QHHHHQIB35x")
"""An error information log entry (figure 197), 64 bytes."""
_DATA_UNIT = 512 * 1000
"""Bytes that SMART counts as one."""
_TEMPERATURE_WARNING = 1 << 1
_SUPPORTED = 1 << 0
_CHANGES_CONTENT, _CHANGES_NAMESPACE = 1 << 1, 1 << 2
_SUBMITTED_ALONE = 1 << 16
"""No other command to the namespace meanwhile (CSE)."""
_ADMIN_EFFECTS: dict[int, int] = {AdminOpcode.FORMAT_NVM: _CHANGES_CONTENT | _CHANGES_NAMESPACE | _SUBMITTED_ALONE}
_IO_EFFECTS: dict[int, int] = dict.fromkeys(
    (IoOpcode.WRITE, IoOpcode.WRITE_ZEROES, IoOpcode.DATASET_MANAGEMENT), _CHANGES_CONTENT
)
MAX_CHANGED = 1024
MANY_CHANGED = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """A command that failed. ``parameter_error`` is unknown: 0xFFFF."""

    count: int
    queue: int
    cid: int
    status: int
    lba: int
    nsid: int

    def pack(self) -> bytes:
        return _ERROR.pack(self.count, self.queue, self.cid, self.status << 1, 0xFFFF, self.lba, self.nsid, 0)


Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


@dataclass(slots=True)
class Health:
    """What SMART counts (figure 198). Bytes, commands."""

    bytes_read: Count = 0
    bytes_written: Count = 0
    reads: Count = 0
    writes: Count = 0
    media_errors: Count = 0

    def take(self, other: Health) -> None:
        """Go on from what another controller has counted."""
        for count in fields(self):
            setattr(self, count.name, getattr(other, count.name))


@dataclass(slots=True)
class Logs:
    """What a controller keeps of what happened to it."""

    health: Health = field(default_factory=Health)
    errors: deque[ErrorEntry] = field(default_factory=lambda: deque(maxlen=ERROR_LOG_ENTRIES))
    error_count: int = 0
    changed: set[int] = field(default_factory=set)
    """NSIDs that changed since the host last asked."""

    def add_error(self, queue: int, command: Command, status: int) -> None:
        self.error_count += 1
        lba = command.cdw10 | command.cdw11 << 32 if queue else 0
        self.errors.appendleft(ErrorEntry(self.error_count, queue, command.cid, status, lba, command.nsid))

    def error_page(self) -> bytes:
        """The newest entry first, and unused ones behind (5.14.1.1)."""
        page = b"".join(entry.pack() for entry in self.errors)
        return page.ljust(ERROR_LOG_ENTRIES * _ERROR.size, b"\0")

    def health_page(self, *, warm: bool) -> bytes:
        """SMART and health information (5.14.1.2). ``warm``: the temperature has passed a threshold."""
        health, page = self.health, bytearray(512)
        struct.pack_into("<BHBBB", page, 0, _TEMPERATURE_WARNING * warm, TEMPERATURE, 100, 10, 0)
        counters = {
            32: -(-health.bytes_read // _DATA_UNIT),
            48: -(-health.bytes_written // _DATA_UNIT),
            64: health.reads,
            80: health.writes,
            112: 1,  # power cycles
            160: health.media_errors,
            176: self.error_count,
        }
        for offset, value in counters.items():
            page[offset : offset + 16] = value.to_bytes(16, "little")
        return bytes(page)

    def changed_page(self) -> bytes:
        """The changed namespace list (5.14.1.4)."""
        numbers = sorted(self.changed) if len(self.changed) <= MAX_CHANGED else [MANY_CHANGED]
        return struct.pack(f"<{len(numbers)}I", *numbers).ljust(4 * MAX_CHANGED, b"\0")

    def told(self, part: bytes) -> None:
        """The host has got this part of that list: of the others it is told still."""
        numbers = {number for (number,) in struct.iter_unpack("<I", part)}
        self.changed -= self.changed if MANY_CHANGED in numbers else numbers


def firmware_page() -> bytes:
    """One slot, active, and what is in it (5.14.1.3)."""
    page = bytearray(512)
    page[0] = 1
    page[8:16] = text(__version__, 8)
    return bytes(page)


def commands_page(admin: Collection[int], io: Collection[int]) -> bytes:
    """Commands supported and effects (5.14.1.5)."""
    page = bytearray(4096)
    for base, opcodes, effects in ((0, admin, _ADMIN_EFFECTS), (1024, io, _IO_EFFECTS)):
        for opcode in opcodes:
            struct.pack_into("<I", page, base + 4 * opcode, _SUPPORTED | effects.get(opcode, 0))
    return bytes(page)
