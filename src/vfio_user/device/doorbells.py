"""Registers that a client may write without a message: by an ioeventfd, with the value in shared memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from vfio_user.device.files import memory_file
from vfio_user.device.registers import BarRegister
from vfio_user.fds import OwnedFd, take_signals
from vfio_user.server.backend import Link, RegionIoFd
from vfio_user.wire.constants import PAGE_SIZE, IoFdType

_SLOT = 8
"""Bytes of shared memory for each doorbell: its value, little-endian."""


@dataclass(frozen=True, slots=True)
class _Doorbell:
    bar: int
    offset: int
    width: int
    slot: int
    eventfd: OwnedFd


class Doorbells:
    """The doorbells among a device's registers. ``ring(bar, offset, data)`` is called with what was written.

    A device that declares none costs nothing: there is no file then.
    """

    def __init__(self, registers: Iterable[BarRegister], ring: Callable[[int, int, memoryview], None]) -> None:
        self._ring = ring
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._bells = [
            _Doorbell(one.bar, one.declared["offset"], one.declared["width"], _SLOT * n, OwnedFd(os.eventfd(0, flags)))
            for n, one in enumerate(one for one in registers if one.doorbell)
        ]
        if self._bells:
            size = -(-_SLOT * len(self._bells) // PAGE_SIZE) * PAGE_SIZE
            self._file = memory_file("doorbells", size)
            self._values = memoryview(mmap.mmap(self._file.fileno(), size))

    def io_fds(self, bar: int) -> Sequence[RegionIoFd]:
        """What DEVICE_GET_REGION_IO_FDS says of a BAR."""
        return [
            RegionIoFd(
                IoFdType.IOEVENTFD_SHADOW,
                bell.offset,
                bell.width,
                bell.eventfd.fileno(),
                shadow_fd=self._file.fileno(),
                shadow_offset=bell.slot,
            )
            for bell in self._bells
            if bell.bar == bar
        ]

    def watch(self, link: Link) -> None:
        """Answer rings while a client is connected."""
        for bell in self._bells:
            link.watch(bell.eventfd.fileno(), partial(self._answer, bell))

    def settle(self) -> None:
        """Answer what was rung and not yet seen: before the device stops, and its state is read."""
        for bell in self._bells:
            self._answer(bell)

    def forget(self) -> None:
        """What was rung before a reset is not answered after it."""
        for bell in self._bells:
            take_signals(bell.eventfd.fileno())

    def _answer(self, bell: _Doorbell) -> None:
        if take_signals(bell.eventfd.fileno()):
            value = bytes(self._values[bell.slot : bell.slot + bell.width])  # the client may change it meanwhile
            self._ring(bell.bar, bell.offset, memoryview(value))
