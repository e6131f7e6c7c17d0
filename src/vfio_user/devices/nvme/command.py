"""A command as it stands in a submission queue, and how it is refused."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from vfio_user.devices.nvme.constants import SQE_SIZE, AdminOpcode, IoOpcode, Status

ENTRY = Struct("<BBHIQQQQ6I")
"""A submission queue entry (4.2, figure 105)."""
assert ENTRY.size == SQE_SIZE

Entry = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int]
"""A submission queue entry as it is unpacked: the fields of a :class:`Command`."""

FUSED_FIRST, FUSED_SECOND, FUSE_MASK = 1, 2, 3
SGL_SHIFT = 6


class Command(NamedTuple):
    """A submission queue entry, field by field. What it says was not checked.

    ``data1`` and ``data2`` are the data pointer: PRP entry 1 and 2, or together one SGL descriptor.
    """

    opcode: int
    flags: int
    cid: int
    nsid: int
    reserved: int
    metadata: int
    data1: int
    data2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int

    @property
    def fuse(self) -> int:
        return self.flags & FUSE_MASK

    def name_in(self, queue: int) -> str:
        """What the specification calls the command, in a queue of that number; 0 is the admin queue."""
        opcodes = IoOpcode if queue else AdminOpcode
        return opcodes(self.opcode).name if self.opcode in [*opcodes] else f"opcode {self.opcode:#04x}"

    @property
    def sgl(self) -> int:
        """PSDT: 0 for PRPs, 1 and 2 for an SGL."""
        return self.flags >> SGL_SHIFT


class CommandError(Exception):
    """A command ends with ``status`` other than success. ``retry``: the same command may succeed later."""

    def __init__(self, status: Status, *, retry: bool = False, result: int = 0) -> None:
        super().__init__(status.name)
        self.status = status
        self.retry = retry
        self.result = result


def check(sound: bool, status: Status = Status.INVALID_FIELD) -> None:
    """Raise CommandError unless it is sound."""
    if not sound:
        raise CommandError(status)
