"""The files behind a guest's memory: each is mapped once, and kept open once, for all regions that lie in it.

Behind an emulated IOMMU, QEMU maps the guest's memory page by page, and sends a descriptor of the same file with each
page: with a mapping and a descriptor per region a process would soon have all that it may have of either.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import stat
from contextlib import suppress
from weakref import WeakValueDictionary

from vfio_user.fds import OwnedFd

_MAX_WHOLE = 8 << 40
"""Bytes of the largest file that is mapped as a whole: as much as one region may have. So no region takes more of our
address space than its client could ask for at any rate."""

_Key = tuple[int, ...]


class _SharedFd(OwnedFd):
    """A descriptor that is closed when the last of those who share it lets go of it."""

    __slots__ = ("__weakref__",)


class SharedFiles:
    """What the regions of one guest hold of its files.

    Nothing is counted and nothing has to be given back: a mapping goes with the last ``memoryview`` of it, be it a
    region's or one that a device still uses, and a descriptor with the last region that keeps it.

    Descriptors are of the same file if they lead to the same inode and were opened alike: what was opened for reading
    only, or as a mere path, gains nothing from another one that is writable. Devices are never shared: each mapping of
    one may be memory of its own, as that of ``/dev/zero`` is.
    """

    def __init__(self) -> None:
        self._mappings: WeakValueDictionary[_Key, mmap.mmap] = WeakValueDictionary()
        self._fds: WeakValueDictionary[_Key, _SharedFd] = WeakValueDictionary()

    def map(self, fd: int, offset: int, size: int, prot: int) -> memoryview:
        """The ``size`` bytes of ``fd`` from ``offset`` on, as memory with the protection ``prot`` (mmap.PROT_*).

        The view has exactly these bytes; more of the file may be mapped. ``fd`` stays the caller's. A file that is cut
        off later takes its memory along: to access that is a SIGBUS, until the file has grown again.

        Raises OSError: EINVAL for a range that ends beyond the file or that cannot be mapped, and what mmap(2) fails
        with.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return _map_part(fd, status, offset, size, prot)
        if offset + size > status.st_size:
            # A mapping beyond the end would be a SIGBUS at the first access.
            raise OSError(errno.EINVAL, f"{offset:#x} + {size:#x} is beyond the file's {status.st_size:#x} bytes")
        key = (*_key(fd, status), prot)
        mapping = self._mappings.get(key)
        if mapping is None or len(mapping) < offset + size:  # or the file has grown since
            mapping = _map_whole(fd, status, prot)
            if mapping is None:
                return _map_part(fd, status, offset, size, prot)
            self._mappings[key] = mapping
        return memoryview(mapping)[offset : offset + size]

    def keep(self, fd: OwnedFd) -> OwnedFd:
        """A descriptor of the same file, for as long as somebody holds it: ``fd``, taken, or one that is kept already.

        It may be shared: let go of it, and do not close it. Raises OSError where ``fd`` cannot be looked at.
        """
        status = os.fstat(fd.fileno())
        if not stat.S_ISREG(status.st_mode):
            return OwnedFd(fd.take())
        key = _key(fd.fileno(), status)
        kept = self._fds.get(key)
        if kept is None:
            kept = self._fds[key] = _SharedFd(fd.take())
        return kept


def _key(fd: int, status: os.stat_result) -> _Key:
    """What descriptors of the same file have in common. As long as one is in use, no other file gets its inode."""
    return status.st_dev, status.st_ino, fcntl.fcntl(fd, fcntl.F_GETFL)


def _map_whole(fd: int, status: os.stat_result, prot: int) -> mmap.mmap | None:
    """Map a file from its begin to its end, or return None: a part of it may still fit, or say what is wrong."""
    if status.st_size <= _MAX_WHOLE:
        with suppress(OSError, ValueError):  # ValueError: it has just been cut off
            return mmap.mmap(fd, status.st_size, flags=mmap.MAP_SHARED, prot=prot)
    return None


def _map_part(fd: int, status: os.stat_result, offset: int, size: int, prot: int) -> memoryview:
    """Map as little around ``size`` bytes from ``offset`` on as can be mapped."""
    # Huge pages map, and unmap, only as a whole: their size is st_blksize.
    unit = math.lcm(mmap.ALLOCATIONGRANULARITY, status.st_blksize or 1)
    start = offset // unit * unit
    end = -(-(offset + size) // unit) * unit
    if stat.S_ISREG(status.st_mode):
        end = min(end, status.st_size)
    try:
        mapping = mmap.mmap(fd, end - start, flags=mmap.MAP_SHARED, prot=prot, offset=start)
    except (ValueError, OverflowError) as error:
        raise OSError(errno.EINVAL, f"{offset:#x}, {size:#x} bytes, cannot be mapped: {error}") from error
    return memoryview(mapping)[offset - start : offset - start + size]
