"""What a client knows of a server's regions, and how it maps them."""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass
from typing import NamedTuple

from vfio_user.fds import OwnedFd
from vfio_user.wire.constants import IoFdType, RegionFlags


class MappedArea(NamedTuple):
    """A part of a region that is mapped: ``offset`` and ``size`` in bytes relative to the region."""

    offset: int
    size: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class RegionDescription:
    """DEVICE_GET_REGION_INFO's answer. ``offset`` is where the region begins in ``fd``, if it can be mapped."""

    index: int
    size: int
    flags: RegionFlags
    offset: int = 0
    sparse_areas: tuple[tuple[int, int], ...] = ()
    fd: OwnedFd | None = None

    @property
    def mmap_areas(self) -> tuple[tuple[int, int], ...]:
        """(offset, size) of what can be mapped: the sparse areas, or the whole; nothing of what cannot be read.

        Memory without any permission would be a memoryview that crashes whoever looks at it.
        """
        if self.fd is None or not self.flags & RegionFlags.MMAP or not self.flags & RegionFlags.READ:
            return ()
        return self.sparse_areas or ((0, self.size),)

    def map(self) -> tuple[MappedArea, ...]:
        """Map all that can be mapped, shared and writable as the flags allow.

        Raises OSError, EINVAL also where an area leaves the region or its file: touching that would be SIGBUS.
        """
        return tuple(self._map_area(offset, size) for offset, size in self.mmap_areas)

    def _map_area(self, offset: int, size: int) -> MappedArea:
        assert self.fd is not None
        number = self.fd.fileno()
        start = self.offset + offset
        if not size or offset + size > self.size:
            raise OSError(errno.EINVAL, f"region {self.index}: area {offset:#x}+{size:#x} is not in it")
        skip = start % mmap.ALLOCATIONGRANULARITY
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.flags & RegionFlags.WRITE else 0)
        try:
            mapping = mmap.mmap(number, skip + size, mmap.MAP_SHARED, protection, offset=start - skip)
        except (ValueError, OverflowError) as error:  # ValueError: it leaves the file
            raise OSError(errno.EINVAL, f"region {self.index}: {error}") from error
        return MappedArea(offset, size, memoryview(mapping)[skip:])


@dataclass(frozen=True, slots=True)
class IoFdDescription:
    """A sub-region of DEVICE_GET_REGION_IO_FDS; the descriptors are the caller's. Fields as in RegionIoFd."""

    type: IoFdType
    offset: int
    size: int
    fd: OwnedFd | None
    flags: int = 0
    datamatch: int = 0
    user_data: int = 0
    shadow_fd: OwnedFd | None = None
    shadow_offset: int = 0
