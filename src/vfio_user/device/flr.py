"""The reset that a guest asks for in its device's config space."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vfio_user.fds import OwnedFd

if TYPE_CHECKING:
    from vfio_user.device.device import Device
    from vfio_user.server.backend import Quiescing


class FunctionLevelReset:
    """Resets a device's function once its DMA has stopped, as "transactions pending" tells the guest meanwhile.

    Source: PCI Express base specification 4.0, section 6.6.2.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._requested = False
        self._waiting: tuple[Quiescing, OwnedFd] | None = None

    def request(self) -> None:
        """The guest asks. Asking again before it is done changes nothing.

        A device that gives one Quiescing to two that wait for it answers the later one only: then it is seen here.
        """
        if self._waiting is not None and self._waiting[0].error is not None:
            self.settle()
        if not self._requested:
            self._requested = True
            self._device.config.transactions_pending = True
            self._device.defer(self._begin)

    def settle(self) -> None:
        """DMA has stopped for another reason: what was asked for happens now."""
        if self._requested:
            self.forget()
            self._device.reset_function()

    def forget(self) -> None:
        """Another reset takes the place of what was asked for."""
        self._requested = False
        if self._waiting is not None:
            quiescing, done = self._waiting
            self._waiting = None
            quiescing.on_done(lambda: None)
            if self._device.link is not None:
                self._device.link.unwatch(done.fileno())

    def _begin(self) -> None:
        if not self._requested or self._waiting is not None:  # settled meanwhile, and perhaps asked for again
            return
        link = self._device.link
        try:
            quiescing = self._device.quiesce()
        except Exception:
            self.settle()  # a guest resets what does not work
            raise
        if quiescing is None or link is None:
            self.settle()
            return
        done = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._waiting = quiescing, done
        link.watch(done.fileno(), self.settle)
        # A thread that is in done() may signal it after we have settled: it closes with the last reference.
        quiescing.on_done(lambda: os.eventfd_write(done.fileno(), 1))
