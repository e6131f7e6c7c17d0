"""The other end of a device's interrupts, for tests that need no client."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from vfio_user.fds import OwnedFd, close_all, take_signals
from vfio_user.server import ServerBackend
from vfio_user.wire.constants import IrqSetFlags

_ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
_DISABLE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER


class RecordedInterrupts:
    """Listens to every vector of one interrupt index of a device (PciIrq).

    ``take()`` tells what was signalled since the last look::

        with recorded_interrupts(device, PciIrq.MSIX) as interrupts:
            device.irq.trigger(2)
            assert interrupts.take() == {2: 1}
    """

    def __init__(self, device: ServerBackend, index: int) -> None:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._device, self._index = device, index
        self._fds = [OwnedFd(os.eventfd(0, flags)) for _ in range(device.irqs[index].count)]
        device.set_irqs(index, _ASSIGN, 0, len(self._fds), [OwnedFd.duplicate(fd.fileno()) for fd in self._fds])

    def take(self) -> dict[int, int]:
        """By vector, how often it was signalled; those that were not are not there."""
        counts = {vector: take_signals(fd.fileno()) for vector, fd in enumerate(self._fds)}
        return {vector: count for vector, count in counts.items() if count}

    def close(self) -> None:
        """Listen no longer: what the device triggers is pending from now on."""
        if self._fds:
            self._device.set_irqs(self._index, _DISABLE, 0, 0, [])
        close_all(self._fds)
        self._fds = []


@contextlib.contextmanager
def recorded_interrupts(device: ServerBackend, index: int) -> Iterator[RecordedInterrupts]:
    """A :class:`RecordedInterrupts` that is closed at the end."""
    recorded = RecordedInterrupts(device, index)
    try:
        yield recorded
    finally:
        recorded.close()
