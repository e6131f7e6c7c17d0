"""The calls that only a control socket serves (docs/control.md), without I/O: see :mod:`vfio_user.client.core`."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec import UNSET

from vfio_user.client.core import PROPOSAL, Call, Request
from vfio_user.errors import MessageError
from vfio_user.protocol import Message
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import ControlCapability
from vfio_user.wire.constants import CONTROL_VERSION, AccessMode, ControlCommand, DeviceState

CONTROL_PROPOSAL = msgspec.structs.replace(
    PROPOSAL, twin_socket=UNSET, x_control=ControlCapability(version=CONTROL_VERSION)
)
"""What a client of a control socket proposes."""


@dataclass(frozen=True, slots=True)
class ControlStatus:
    """How the device stands towards its primary client.

    ``held``: accesses that wait; with the recipe for QEMU, which stops the guest first, more than 0 means that the
    guest runs again. ``page_size`` of the DMA log in bytes, 0: it is off; ``dirty_pages``: of that size.
    ``state``: None where the device cannot migrate. ``connected``: whether the primary client is there.
    """

    access: AccessMode
    held: int
    page_size: int
    dirty_pages: int
    state: DeviceState | None
    connected: bool

    @property
    def dirty_bytes(self) -> int:
        return self.page_size * self.dirty_pages


def _one(command: ControlCommand, payload: bytes = b"") -> Call[Message]:
    replies = yield (Request(command, (payload,)),)
    return replies[0]


def push() -> Call[int]:
    reply = yield from _one(ControlCommand.CONTROL_PUSH)
    return m.ControlPushed.parse(reply.payload).pages


def set_access(mode: AccessMode) -> Call[None]:
    yield from _one(ControlCommand.CONTROL_ACCESS, m.ControlAccess(mode).pack())


def status() -> Call[ControlStatus]:
    reply = yield from _one(ControlCommand.CONTROL_STATUS)
    status = m.ControlStatus.parse(reply.payload)
    try:
        access = AccessMode(status.access)
        state = None if status.state == status.NO_STATE else DeviceState(status.state)
    except ValueError as error:
        raise MessageError(f"CONTROL_STATUS answered with {error}") from error
    return ControlStatus(access, status.held, status.page_size, status.dirty_pages, state, bool(status.connected))
