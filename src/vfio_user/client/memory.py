"""The memory that a client answers DMA_READ and DMA_WRITE from."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from vfio_user.dma.iova import IovaTable
from vfio_user.fds import OwnedFd
from vfio_user.wire.constants import DmaFlags

MAX_FILE_SIZE = (1 << 63) - 1
"""Where the offset of pread and pwrite ends."""


@dataclass(frozen=True, slots=True)
class _Region:
    flags: int
    memory: memoryview | None = None
    fd: OwnedFd | None = None
    offset: int = 0

    def read(self, start: int, count: int) -> bytes:
        if self.memory is not None:
            return bytes(self.memory[start : start + count])
        assert self.fd is not None
        data = os.pread(self.fd.fileno(), count, self.offset + start)
        return data.ljust(count, b"\0")

    def write(self, start: int, data: memoryview) -> None:
        if self.memory is not None:
            self.memory[start : start + len(data)] = data
            return
        assert self.fd is not None
        while data:
            written = os.pwrite(self.fd.fileno(), data, self.offset + start)
            start, data = start + written, data[written:]


class RegisteredMemory:
    """What the client mapped, as far as it can be reached: through a file, or a buffer of the caller's."""

    def __init__(self) -> None:
        self._regions: IovaTable[_Region] = IovaTable()

    def add(
        self, address: int, size: int, flags: int, *, memory: memoryview | None, fd: OwnedFd | None, offset: int
    ) -> None:
        """Answer for [address, address + size): from ``memory``, from ``fd``, which is owned here then, or not at all.

        The same range again replaces the one before. Raises OSError: EEXIST where it overlaps another one, EINVAL
        where it is no range of the address space, or of a file.
        """
        if fd is not None and offset + size > MAX_FILE_SIZE:
            raise OSError(errno.EINVAL, f"no part of a file: {offset:#x}, {size:#x} bytes")
        self.remove(address, size)
        if memory is not None or fd is not None:
            self._regions.add(address, size, _Region(flags, memory, fd, offset))

    def remove(self, address: int, size: int) -> None:
        if self._regions.get(address, size) is not None:
            region = self._regions.remove(address, size)
            if region.fd is not None:
                region.fd.close()

    def clear(self) -> None:
        for address, size, _ in list(self._regions):
            self.remove(address, size)

    def read(self, address: int, count: int) -> bytes:
        """Raises OSError: EFAULT where nothing is registered, EACCES where the device may not read."""
        spans = list(self._spans(address, count, DmaFlags.READ))
        return b"".join(region.read(start, size) for region, start, size in spans)

    def write(self, address: int, data: memoryview) -> None:
        """As :meth:`read`; nothing is written unless all can be."""
        position = 0
        for region, start, size in list(self._spans(address, len(data), DmaFlags.WRITE)):
            region.write(start, data[position : position + size])
            position += size

    def _spans(self, address: int, count: int, need: int) -> Iterator[tuple[_Region, int, int]]:
        while count:
            found = self._regions.find(address)
            if found is None:
                raise OSError(errno.EFAULT, f"no memory at {address:#x}")
            start, size, region = found
            if not region.flags & need:
                raise OSError(errno.EACCES, f"no access to the memory at {address:#x}")
            part = min(count, start + size - address)
            yield region, address - start, part
            address, count = address + part, count - part
