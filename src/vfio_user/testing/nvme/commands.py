"""Commands and completions, as they are in the queues.

Source: NVM Express Base Specification 1.4, sections 4.2 and 4.6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from vfio_user.devices.nvme.constants import STATUS_DO_NOT_RETRY, AdminOpcode, IoOpcode, Status
from vfio_user.errors import VfioUserError

ENTRY = struct.Struct("<BBHIIIQ16s6I")
"""A submission queue entry: opcode, flags, command identifier, NSID, CDW2, CDW3, MPTR, DPTR, CDW10 to CDW15."""
COMPLETION = struct.Struct("<IIHHHH")
"""A completion queue entry: DW0, DW1, SQ head, SQ identifier, command identifier, status << 1 | phase tag."""
COMMAND_ID = 2
"""Where in an entry the command identifier is."""

NO_DATA = bytes(16)

FUSED_FIRST, FUSED_SECOND = 1, 2
"""``flags``: FUSE, the first or the second of two fused commands."""
SGL = 1 << 6
"""``flags``: PSDT, the data pointer is an SGL."""

_STATUS_CODE = 0x7FF
_NAMES = {int(code): code.name for code in Status}


@dataclass(frozen=True, slots=True)
class Command:
    """A submission queue entry without its identifier, which the queue gives."""

    opcode: int
    nsid: int = 0
    cdw10: int = 0
    cdw11: int = 0
    cdw12: int = 0
    cdw13: int = 0
    cdw14: int = 0
    cdw15: int = 0
    flags: int = 0
    """Bits 15:8 of the first dword."""
    pointer: bytes = NO_DATA
    """The data pointer, 16 bytes: PRP1 and PRP2, or an SGL descriptor."""
    metadata: int = 0
    cdw2: int = 0
    cdw3: int = 0

    def pack(self, identifier: int = 0) -> bytes:
        """The entry, 64 bytes."""
        return ENTRY.pack(
            *(self.opcode, self.flags, identifier, self.nsid, self.cdw2, self.cdw3, self.metadata, self.pointer),
            *(self.cdw10, self.cdw11, self.cdw12, self.cdw13, self.cdw14, self.cdw15),
        )

    def name(self, admin: bool) -> str:
        """What people call it."""
        opcodes = AdminOpcode if admin else IoOpcode
        return opcodes(self.opcode).name if self.opcode in list(opcodes) else f"opcode {self.opcode:#04x}"


class Completion(NamedTuple):
    """A completion queue entry."""

    result: int
    """DW0, whose meaning is the command's."""
    dw1: int
    sq_head: int
    sq_id: int
    command_id: int
    tagged: int
    """Status and phase tag."""

    @property
    def code(self) -> int:
        """Status code type << 8 | status code: a :class:`Status`, if it is one that this package knows."""
        return self.tagged >> 1 & _STATUS_CODE

    @property
    def interrupted(self) -> bool:
        """Whether the command is to be sent again, as if nothing had been."""
        return self.tagged >> 1 == Status.COMMAND_INTERRUPTED

    @property
    def do_not_retry(self) -> bool:
        return bool(self.tagged >> 1 & STATUS_DO_NOT_RETRY)

    @property
    def status(self) -> str:
        """The name of the status."""
        return status_name(self.code)

    def check(self, what: str) -> Completion:
        """Itself. Raises :class:`NvmeError` unless the command, ``what``, succeeded."""
        if self.tagged >> 1:
            raise NvmeError(what, self)
        return self


def status_name(code: int) -> str:
    """A status code type and code, in words."""
    return _NAMES.get(code, f"status {code:#05x}")


class NvmeError(VfioUserError):
    """The controller completed a command with an error: ``status`` is its code, ``completion`` all that it said."""

    def __init__(self, what: str, completion: Completion) -> None:
        hint = ", do not retry" if completion.do_not_retry else ""
        super().__init__(f"{what}: {completion.status} ({completion.code:#05x}{hint})")
        self.completion = completion
        self.status = completion.code


class NvmeProtocolError(VfioUserError):
    """The controller did what no controller may do: ended a command twice, for example, or failed as a whole."""


class NvmeTimeoutError(NvmeProtocolError, TimeoutError):
    """What was waited for did not come."""
