"""What Linux does with files and Python's os does not offer: fallocate with a mode, locks of an open file."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
"""FALLOC_FL_* of linux/falloc.h."""

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate  # the first takes 64-bit offsets wherever it is
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""asm-generic/mman-common.h; newer Pythons have it, too."""

_FLOCK = "hhqqi0q"
"""struct flock of fcntl.h: type, whence, start, length, pid."""


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), of a file or a block device. Raises OSError: EOPNOTSUPP where ``mode`` is not known there."""
    while _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


class Residence:
    """Which pages of a file are in memory, by mincore(2): of a mapping that is never read, so nothing can happen to it.

    Of another user's file that may not be written the kernel says that all of it is. Raises OSError for a file that
    cannot be mapped.
    """

    def __init__(self, fd: int, size: int) -> None:
        # Writable in name, or ctypes would not take it; without a claim to memory, which a large disk would not get.
        self._mapping = mmap.mmap(fd, size, mmap.MAP_PRIVATE | _MAP_NORESERVE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def all_there(self, offset: int, length: int) -> bool:
        """Whether reading this would take no waiting."""
        start = offset & -mmap.PAGESIZE
        pages = -(-(offset + length - start) // mmap.PAGESIZE)
        states = ctypes.create_string_buffer(pages)
        return _mincore(self._address + start, offset + length - start, states) == 0 and b"\0" not in states.raw


def lock(fd: int, *, exclusive: bool) -> None:
    """Lock a whole file, for as long as this opening of it lives. Raises OSError: EAGAIN where another one holds it.

    An open file description's own lock (fcntl_locking(2), "F_OFD_SETLK"): unlike flock's it is seen by other hosts
    of a network file system, and conflicts with the ones that QEMU takes of its images; unlike POSIX's plain ones it
    holds between two openings in one process, too.
    """
    _set_lock(fd, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK)


def unlock(fd: int) -> None:
    _set_lock(fd, fcntl.F_UNLCK)


def _set_lock(fd: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
