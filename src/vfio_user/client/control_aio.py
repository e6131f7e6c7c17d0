"""The asyncio client of a control socket: the names of the blocking one, with ``await``."""

from __future__ import annotations

import os
import socket
from typing import Self

from vfio_user.client import control_core as calls
from vfio_user.client.aio import Client
from vfio_user.client.control_core import CONTROL_PROPOSAL, ControlStatus
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.constants import AccessMode

__all__ = ["AccessMode", "ControlClient", "ControlStatus"]


class ControlClient(Client):
    """A connection to the control socket of a device server.

    See the blocking :class:`vfio_user.client.control.ControlClient`.
    """

    def __init__(
        self,
        sock: socket.socket,
        timeout: float = 5.0,
        *,
        proposal: Capabilities = CONTROL_PROPOSAL,
        max_write: int | None = None,
    ) -> None:
        super().__init__(sock, timeout, proposal=proposal, max_write=max_write)

    @classmethod
    async def connect(
        cls,
        path: str | os.PathLike[str],
        timeout: float = 5.0,
        *,
        proposal: Capabilities = CONTROL_PROPOSAL,
        max_write: int | None = None,
    ) -> Self:
        """As :meth:`Client.connect`."""
        return await super().connect(path, timeout, proposal=proposal, max_write=max_write)

    async def push(self, timeout: float | None = None) -> int:
        """As the blocking client's."""
        return await self._run(calls.push(), timeout)

    async def set_access(self, mode: AccessMode) -> None:
        """As the blocking client's."""
        await self._run(calls.set_access(mode))

    async def status(self) -> ControlStatus:
        """How the device stands: see :class:`ControlStatus`."""
        return await self._run(calls.status())
