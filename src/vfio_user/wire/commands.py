"""The table of commands: what each carries, who may send it. Decoder, checks and documentation read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from vfio_user.wire import messages as m
from vfio_user.wire.constants import MAX_MSG_FDS, Command, ControlCommand


class Role(Enum):
    CLIENT = "client"
    SERVER = "server"

    @property
    def peer(self) -> Role:
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


class Tail(Enum):
    """What may follow the fixed part of a payload."""

    NONE = "nothing"
    EXTENSIBLE = "bytes of a later version, ignored (the structure has argsz)"
    DATA = "as many bytes as the fixed part announces"
    VARIABLE = "a structure of its own"


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """One row of the table.

    ``request`` and ``reply`` are the fixed parts, the tails say what follows them. ``request_fds`` and
    ``reply_fds`` are the most file descriptors that travel with each. ``posted`` says whether NO_REPLY makes sense:
    elsewhere a peer that sets it goes without the answer that it asked for.
    """

    command: Command | ControlCommand
    sender: Role
    request: type[m.Payload]
    request_tail: Tail = Tail.NONE
    reply: type[m.Payload] = m.Empty
    reply_tail: Tail = Tail.NONE
    request_fds: int = 0
    reply_fds: int = 0
    posted: bool = False
    quiesces: bool = False


_C, _S = Role.CLIENT, Role.SERVER
_EXT, _DATA, _VAR = Tail.EXTENSIBLE, Tail.DATA, Tail.VARIABLE

_ROWS = (
    CommandSpec(Command.VERSION, _C, m.Version, _VAR, m.Version, _VAR, reply_fds=1),
    CommandSpec(Command.DMA_MAP, _C, m.DmaMap, _EXT, request_fds=1, posted=True),
    CommandSpec(Command.DMA_UNMAP, _C, m.DmaUnmap, _VAR, m.DmaUnmap, _VAR, posted=True, quiesces=True),
    CommandSpec(Command.DEVICE_GET_INFO, _C, m.DeviceInfo, _EXT, m.DeviceInfo),
    CommandSpec(Command.DEVICE_GET_REGION_INFO, _C, m.RegionInfo, _EXT, m.RegionInfo, _VAR, reply_fds=1),
    CommandSpec(Command.DEVICE_GET_REGION_IO_FDS, _C, m.RegionIoFds, _EXT, m.RegionIoFds, _VAR, reply_fds=MAX_MSG_FDS),
    CommandSpec(Command.DEVICE_GET_IRQ_INFO, _C, m.IrqInfo, _EXT, m.IrqInfo),
    CommandSpec(Command.DEVICE_SET_IRQS, _C, m.IrqSet, _VAR, request_fds=MAX_MSG_FDS, posted=True),
    CommandSpec(Command.REGION_READ, _C, m.RegionAccess, reply=m.RegionAccess, reply_tail=_DATA),
    CommandSpec(Command.REGION_WRITE, _C, m.RegionAccess, _DATA, m.RegionAccess, posted=True),
    CommandSpec(Command.DMA_READ, _S, m.DmaAccess, reply=m.DmaAccess, reply_tail=_DATA),
    CommandSpec(Command.DMA_WRITE, _S, m.DmaAccess, _DATA, m.DmaAccess, posted=True),
    CommandSpec(Command.DEVICE_RESET, _C, m.Empty, _EXT, posted=True, quiesces=True),
    CommandSpec(Command.REGION_WRITE_MULTI, _C, m.WriteMulti, _VAR, m.WriteMulti, posted=True),
    CommandSpec(Command.DEVICE_FEATURE, _C, m.Feature, _VAR, m.Feature, _VAR, posted=True),
    CommandSpec(Command.MIG_DATA_READ, _C, m.MigData, _EXT, m.MigData, _DATA),
    CommandSpec(Command.MIG_DATA_WRITE, _C, m.MigData, _DATA, posted=True),
)

COMMANDS: Final[dict[int, CommandSpec]] = {int(row.command): row for row in _ROWS}

_TAKEN_OVER = (
    Command.VERSION,
    Command.DEVICE_GET_INFO,
    Command.DEVICE_GET_REGION_INFO,
    Command.DEVICE_GET_IRQ_INFO,
    Command.DEVICE_SET_IRQS,
    Command.REGION_READ,
    Command.DEVICE_FEATURE,
    Command.MIG_DATA_READ,
    Command.MIG_DATA_WRITE,
)
_CONTROL_ROWS = (
    *(replace(COMMANDS[command], request_fds=0, reply_fds=0) for command in _TAKEN_OVER),
    CommandSpec(ControlCommand.CONTROL_PUSH, _C, m.Empty, _EXT, m.ControlPushed),
    CommandSpec(ControlCommand.CONTROL_ACCESS, _C, m.ControlAccess, _EXT, m.ControlAccess),
    CommandSpec(ControlCommand.CONTROL_STATUS, _C, m.Empty, _EXT, m.ControlStatus),
)

CONTROL_COMMANDS: Final[dict[int, CommandSpec]] = {int(row.command): row for row in _CONTROL_ROWS}
"""What a control socket takes instead (docs/control.md): no descriptors, nothing that changes what is the VMM's."""


def command_name(command: int) -> str:
    """The specification's name of a command, or the extension's; its number where it has none."""
    row = COMMANDS.get(command) or CONTROL_COMMANDS.get(command)
    return row.command.name if row else f"command {command}"
