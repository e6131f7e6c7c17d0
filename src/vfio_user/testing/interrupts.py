"""The other end of a device's interrupts, for tests: of one that is served, and of one that needs no client."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator

from vfio_user.client import Client
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


class AssignedInterrupts:
    """Listens to the first ``count`` vectors, or to all, of one interrupt index (PciIrq) of a client's device.

    ``timeout`` in seconds, for :meth:`wait`.
    """

    def __init__(self, client: Client, index: int, count: int | None = None, *, timeout: float = 10.0) -> None:
        self._client, self._index, self._timeout = client, index, timeout
        vectors = client.irqs[index].count if count is None else count
        self._fds = [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in range(vectors)]
        try:
            client.set_irqs(index, _ASSIGN, 0, vectors, [fd.fileno() for fd in self._fds])
        except BaseException:
            self.forget()
            raise

    def count(self, vector: int = 0) -> int:
        """How often ``vector`` was signalled since the last look, without waiting."""
        return take_signals(self._fds[vector].fileno())

    def take(self) -> dict[int, int]:
        """By vector, how often it was signalled since the last look; those that were not are not there."""
        counts = {vector: self.count(vector) for vector in range(len(self._fds))}
        return {vector: count for vector, count in counts.items() if count}

    def wait(self, vector: int = 0, timeout: float | None = None) -> int:
        """Wait until ``vector`` is signalled; how often it was. Raises TimeoutError after ``timeout`` seconds.

        Meanwhile the device's DMA by messages is served.
        """
        seconds = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._fds[vector].fileno(), select.POLLIN)
        poll.register(self._client.fileno(), select.POLLIN)
        while not (count := self.count(vector)):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no interrupt on vector {vector} in {seconds} s")
            if self._client.fileno() in dict(poll.poll(left * 1000)):
                self._client.serve_dma()
        return count

    def close(self) -> None:
        """Have the device signal no longer: what it triggers is pending from now on."""
        if self._fds:
            self._client.set_irqs(self._index, _DISABLE, 0, 0)
        self.forget()

    def forget(self) -> None:
        """Let go, without a word to the device, whose client may be gone."""
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
