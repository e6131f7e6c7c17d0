"""QEMU's inter-VM shared memory device (docs/specs/ivshmem-spec.rst, revision 1), with one peer: itself.

BAR0 has the registers, BAR1 the MSI-X table, BAR2 the shared memory, which clients map. With ``trapped`` the first
bytes of it come as messages, and the rest is a sparse area; the doorbell is offered as ioeventfds, one for each of
as many vectors as one message carries descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from vfio_user.device import Bar, Device, option
from vfio_user.fds import OwnedFd, take_signals
from vfio_user.pci.msi import MAX_MSIX_VECTORS
from vfio_user.server.backend import Link, RegionIoFd
from vfio_user.wire.constants import MAX_MSG_FDS, IoFdType

REGISTERS, TABLE, MEMORY = 0, 1, 2
"""BARs."""
POSITION, DOORBELL = 8, 12
"""IVPosition (the peer's own id) and Doorbell; interrupt mask and status, at 0 and 4, have no use without INTx."""
OWN_ID = 0
DATAMATCH = 1
"""KVM_IOEVENTFD_FLAG_DATAMATCH: the eventfd is meant for one value."""


def parse_size(text: str) -> int:
    """Bytes, with K, M or G for the powers of 1024."""
    units = {"K": 10, "M": 20, "G": 30}
    shift = units.get(text[-1:].upper(), 0)
    return int(text[:-1] if shift else text, 0) << shift


class Ivshmem(Device):
    """1af4:1110. Ringing the own doorbell raises the own interrupt."""

    vendor_id, device_id, revision, class_code = 0x1AF4, 0x1110, 1, 0x050000
    msix_bar = TABLE

    size = option(4 << 20, "bytes of shared memory, a power of two; K, M, G are understood", parse_size)
    trapped = option(0, "bytes at its start that clients reach by messages only", parse_size)
    vectors = option(1, "MSI-X vectors, 1 to 2048")

    def __init__(self, **options: object) -> None:
        self._doorbells: list[OwnedFd] = []
        super().__init__(**options)

    def configure(self) -> None:
        if not 1 <= self.vectors <= MAX_MSIX_VECTORS:
            raise ValueError(f"{self.vectors} vectors: 1 to {MAX_MSIX_VECTORS} are possible")
        self.msix_vectors = self.vectors
        trapped = ((0, self.trapped),) if self.trapped else ()
        shared = Bar(self.size, memory=True, bits64=True, prefetchable=True, trapped=trapped)
        self.bars = {REGISTERS: Bar(0x100), MEMORY: shared}

    def io_fds(self, bar: int) -> Sequence[RegionIoFd]:
        if bar != REGISTERS:
            return ()
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._doorbells = [OwnedFd(os.eventfd(0, flags)) for _ in range(min(self.vectors, MAX_MSG_FDS))]
        return [
            RegionIoFd(IoFdType.IOEVENTFD, DOORBELL, 4, fd.fileno(), DATAMATCH, OWN_ID << 16 | vector)
            for vector, fd in enumerate(self._doorbells)
        ]

    def connected(self, link: Link) -> None:
        super().connected(link)
        for vector, fd in enumerate(self._doorbells):
            link.watch(fd.fileno(), partial(self._rung, vector, fd))

    def _rung(self, vector: int, fd: OwnedFd) -> None:
        if take_signals(fd.fileno()):
            self.irq.trigger(vector)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        if bar == MEMORY:
            data[:] = self.memory[MEMORY][offset : offset + len(data)]
        elif bar == REGISTERS and offset == POSITION:
            data[:] = OWN_ID.to_bytes(len(data), "little")
        else:
            data[:] = bytes(len(data))

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        if bar == MEMORY:
            self.memory[MEMORY][offset : offset + len(data)] = data
        elif bar == REGISTERS and offset == DOORBELL and len(data) == 4:
            self._ring(int.from_bytes(data, "little"))

    def _ring(self, value: int) -> None:
        """Peer in the upper, vector in the lower 16 bits; what does not exist is ignored."""
        peer, vector = value >> 16, value & 0xFFFF
        if peer == OWN_ID and vector < self.vectors:
            self.irq.trigger(vector)
