"""Interrupts from the client's side: eventfds for vectors, and waiting for them."""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from vfio_user.client import Client
from vfio_user.errors import UsageError
from vfio_user.fds import OwnedFd
from vfio_user.tools.info import name_of
from vfio_user.tools.location import number
from vfio_user.wire.constants import IrqInfoFlags, IrqSetFlags, PciIrq

_INDEXES = {irq.name.lower(): int(irq) for irq in PciIrq}
_VECTORS = re.compile(r"(?P<index>\w+)(?::(?P<first>\w+)(?:-(?P<last>\w+))?)?")
_MOST = 2048
"""Vectors that are watched at once: those of MSI-X."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """``count`` vectors of an interrupt index from ``start`` on; None: all from there on."""

    index: int
    start: int = 0
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Vectors:
        """``INDEX[:FIRST[-LAST]]``: intx, msi, msix, err, req or a number. Raises UsageError."""
        match = _VECTORS.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is no interrupt: write it like msix:3, msix:0-7 or intx")
        index, first, last = match.groups()
        start = number(first) if first else 0
        end = number(last) if last else start
        if end < start:
            raise UsageError(f"{text!r} ends before it begins")
        return cls(_index(index), start, end - start + 1 if first else None)

    def of(self, client: Client) -> range:
        """The vectors that are meant, of a device. Raises UsageError if it does not have them."""
        there = client.irqs[self.index].count if self.index < len(client.irqs) else 0
        end = there if self.count is None else self.start + self.count
        if not self.start < end <= there:
            raise UsageError(f"the device has {there} vectors of {name_of(PciIrq, self.index)}")
        if end - self.start > _MOST:
            raise UsageError(f"{end - self.start} vectors at once: at most {_MOST}")
        return range(self.start, end)


def _index(name: str) -> int:
    if name.lower() in _INDEXES:
        return _INDEXES[name.lower()]
    if not name.isdecimal():
        raise UsageError(f"{name!r} is no interrupt: {', '.join(_INDEXES)} or an index")
    return number(name)


@dataclass(frozen=True, slots=True)
class Signal:
    """What an eventfd said: ``times`` signals since it was last looked at; ``seconds`` since the wait began."""

    index: int
    vector: int
    times: int
    seconds: float

    def __str__(self) -> str:
        return f"{name_of(PciIrq, self.index)}:{self.vector}"


class Watch:
    """Eventfds for vectors of a device, for as long as a ``with`` block lasts.

    Raises what set_irqs does: CommandError where the server takes no eventfds for them.
    """

    def __init__(self, client: Client, wanted: Sequence[Vectors]) -> None:
        self._client = client
        self._wanted = [(one.index, one.of(client)) for one in wanted]
        self._fds: dict[int, tuple[int, int]] = {}
        self._owned: list[OwnedFd] = []
        self._begin = 0.0

    def __enter__(self) -> Watch:
        try:
            for index, vectors in self._wanted:
                self._assign(index, vectors)
        except BaseException:
            self._close()
            raise
        self._begin = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A server that is gone, or refuses, has forgotten them anyway when the client leaves."""
        with contextlib.suppress(OSError):
            for index in {index for index, _ in self._wanted}:
                self._client.set_irqs(index, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0)
        self._close()

    def _assign(self, index: int, vectors: range) -> None:
        fds = [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in vectors]
        self._owned += fds
        self._fds |= {fd.fileno(): (index, vector) for fd, vector in zip(fds, vectors, strict=True)}
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        self._client.set_irqs(index, flags, vectors.start, len(vectors), [fd.fileno() for fd in fds])

    def _close(self) -> None:
        for fd in self._owned:
            fd.close()

    def trigger(self) -> None:
        """Have the server signal each of them, as if the device had."""
        for index, vectors in self._wanted:
            act(self._client, IrqSetFlags.ACTION_TRIGGER, index, vectors)

    def signals(self, seconds: float) -> Iterator[Signal]:
        """Signals as they come, for so long. Meanwhile the server's requests for DMA are answered.

        A vector that is masked by its own signal, as INTx is, is unmasked after each.
        """
        deadline = time.monotonic() + seconds
        poll = select.poll()
        for fd in (self._client.fileno(), *self._fds):
            poll.register(fd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                if fd not in self._fds:
                    self._client.serve_dma()
                elif signal := self._take(fd):
                    yield signal

    def until(self, count: int, seconds: float) -> Iterator[Signal]:
        """As :meth:`signals`, until there were ``count`` of them, all vectors together."""
        missing = count
        for signal in self.signals(seconds):
            yield signal
            missing -= signal.times
            if missing <= 0:
                return

    def _take(self, fd: int) -> Signal | None:
        index, vector = self._fds[fd]
        try:
            signal = Signal(index, vector, os.eventfd_read(fd), time.monotonic() - self._begin)
        except BlockingIOError:  # the server has the eventfd, too, and has emptied it
            return None
        if self._client.irqs[index].flags & IrqInfoFlags.AUTOMASKED:
            act(self._client, IrqSetFlags.ACTION_UNMASK, index, range(vector, vector + 1))
        return signal

    def vectors(self) -> set[tuple[int, int]]:
        """(index, vector) of each one that is watched."""
        return set(self._fds.values())


def act(client: Client, action: IrqSetFlags, index: int, vectors: range) -> None:
    """Mask, unmask or trigger vectors."""
    client.set_irqs(index, IrqSetFlags.DATA_NONE | action, vectors.start, len(vectors))
