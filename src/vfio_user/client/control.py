"""The client of a control socket: who manages a device beside the VMM that uses it (docs/control.md)."""

from __future__ import annotations

import os
import socket
from typing import Self

from vfio_user.client import control_core as calls
from vfio_user.client.client import Client
from vfio_user.client.control_core import CONTROL_PROPOSAL, ControlStatus
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.constants import AccessMode

__all__ = ["AccessMode", "ControlClient", "ControlStatus"]


class ControlClient(Client):
    """A connection to the control socket of a device server.

    A Client, of which the calls work that look, save and load: what is the VMM's own (``dma_map``, ``dma_unmap``,
    ``region_write``, ``reset``, eventfds) is refused with EPERM. Leaving changes nothing in the device.

    Raises NegotiationError where the socket is no control socket.
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
    def connect(
        cls,
        path: str | os.PathLike[str],
        timeout: float = 5.0,
        *,
        proposal: Capabilities = CONTROL_PROPOSAL,
        max_write: int | None = None,
    ) -> Self:
        """As :meth:`Client.connect`."""
        return super().connect(path, timeout, proposal=proposal, max_write=max_write)

    def push(self, timeout: float | None = None) -> int:
        """Have the VMM see as dirty what the device dirtied, by its own DMA log, which is clean then: pages of 4 KiB.

        Returns when the VMM has taken them all, within ``timeout`` seconds. Refused with EBUSY while the device runs,
        ENOTCONN without a primary client, ENODATA while nothing is logged, ENOTRECOVERABLE where the device wrote to
        memory that is not mapped any more, and with what the VMM answers: QEMU's ENODEV says that the guest has
        switched bus mastering off. The log is as before then.
        """
        return self._run(calls.push(), timeout)

    def set_access(self, mode: AccessMode) -> None:
        """What becomes of the VMM's accesses to BARs while the device does not run.

        PASS, as a server starts: the device serves them, except in STOP_COPY, where they are refused. DUMMY: reads give
        0 and writes are ignored. HOLD: no answer, until the device runs again (or the mode is another one). What
        is held already follows the new mode.
        """
        self._run(calls.set_access(mode))

    def status(self) -> ControlStatus:
        """How the device stands: see :class:`ControlStatus`."""
        return self._run(calls.status())
