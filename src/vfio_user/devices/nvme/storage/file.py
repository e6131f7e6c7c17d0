"""A raw image in a file, or a block device.

Data goes from the page cache straight into guest memory and back. There is no mapping of the file, so somebody who
cuts it short under a guest makes reads fail, and kills nobody.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vfio_user.devices.nvme.storage import kernel
from vfio_user.devices.nvme.storage.base import SECTOR, Views
from vfio_user.fds import OwnedFd

MAX_VIEWS = 1024
"""UIO_MAXIOV of linux/uio.h: what preadv and pwritev take at once."""
ZEROS = memoryview(bytes(1 << 20))

UNKNOWN = {errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system says that does not know a flag or a mode."""
NOT_HERE = UNKNOWN | {errno.EINVAL}
"""The same, and a block device whose sectors are larger than what it is asked for."""
PUNCH = kernel.PUNCH_HOLE | kernel.KEEP_SIZE
ZERO = kernel.ZERO_RANGE | kernel.KEEP_SIZE
ZEROING = {True: (PUNCH, ZERO), False: (ZERO,)}
"""How to make zeros, best first, by whether room may be given back."""

SLOW = {16 << 10: 0.02, 128 << 10: 0.005}
"""Bytes that are written at once even where the file system cannot promise that this takes no waiting; and seconds: a
write of so many that took so long was held back by the kernel, and not just by other threads that had the GIL or the
processor.

ext4 and tmpfs cannot promise it. There a write of 4 KiB into the page cache takes 5 us, and with another thread in
fdatasync 0.3 ms at worst; one of 128 KiB takes 20 us, and then may take 8 ms. See :meth:`FileStorage.write_now`.
"""
PAUSE = 1.0
"""Seconds: for how long none of that size is tried then."""

Move = Callable[[int, Views, int], int]
"""os.preadv or os.pwritev."""


class FileStorage:
    """A regular file or block device at ``path``.

    A file that is not there is made, sparse and of ``size`` bytes; one that is there keeps its size, and must have
    ``size`` bytes if that is given. While it is acquired it is locked: against everybody, or with ``read_only`` or
    ``shared`` against those who want it alone.

    Raises OSError, which names the path, and ValueError for what is no disk or has another size.
    """

    block_size = SECTOR

    def __init__(self, path: str, *, size: int | None = None, read_only: bool = False, shared: bool = False) -> None:
        self.name, self.read_only = path, read_only
        self._exclusive = not (read_only or shared)
        self._file = _open(path, size, read_only)
        try:
            self._mode = _checked_mode(path, self._file)
            self.size = _checked_size(path, self._file, size)
        except BaseException:
            self._file.close()
            raise
        self._fd = self._file.fileno()
        self._acquired = False
        self._flushing = threading.Lock()
        self._syncs_begun = self._syncs_done = 0
        self._lost = 0  # the errno of the flush that failed
        self._residence: kernel.Residence | None = None
        self._writes_now = True  # until the file system says that it does not know RWF_NOWAIT
        self._held_back_until = dict.fromkeys(SLOW, 0.0)
        self._unknown_modes: set[int] = set()

    def acquire(self) -> None:
        with self._flushing:
            if not self._acquired:
                self._lock()
            if self._lost or (not self._acquired and stat.S_ISBLK(self._mode)):
                # What the kernel keeps of it is not what is on the disk: a flush failed, or another host wrote there.
                # (A network file system sees to the latter itself when it gives the lock.)
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._acquired, self._lost = True, 0

    def _lock(self) -> None:
        try:
            kernel.lock(self._fd, exclusive=self._exclusive)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", self.name) from error
            raise BlockingIOError(errno.EWOULDBLOCK, "somebody else uses it", self.name) from error
        try:
            self._check_unchanged()
        except OSError:
            kernel.unlock(self._fd)
            raise

    def _check_unchanged(self) -> None:
        size = _size(self._file)
        if size != self.size:
            raise OSError(errno.ESTALE, f"has {size} bytes now, had {self.size} when it was opened", self.name)
        if not os.path.samestat(os.stat(self.name), os.fstat(self._fd)):
            raise OSError(errno.ESTALE, "is another file now than when it was opened", self.name)

    def release(self) -> None:
        if not self._acquired:
            return
        self.flush()
        kernel.unlock(self._fd)
        self._acquired = False

    def read_now(self, offset: int, views: Views) -> bool:
        """As the contract says; tmpfs and overlayfs cannot tell, and are looked at page by page."""
        length = sum(map(len, views))
        try:
            if self._residence is None:
                return os.preadv(self._fd, views, offset, os.RWF_NOWAIT) == length
            return self._residence.all_there(offset, length) and os.preadv(self._fd, views, offset) == length
        except OSError as error:
            if error.errno in UNKNOWN:
                with suppress(OSError):  # it cannot be mapped either: then every read may take waiting
                    self._residence = kernel.Residence(self._fd, self.size)
            return False

    def read(self, offset: int, views: Views) -> None:
        self._move_all(os.preadv, offset, views)

    def write_now(self, offset: int, views: Views) -> bool:
        """As the contract says where the file system can tell; where it cannot, all but large writes are tried all the
        same.

        These only go into the page cache. They wait where a page must be read first, which whole pages avoid, and
        where the kernel holds back who writes faster than the disk: who was, is left alone for a while.
        """
        length = sum(map(len, views))
        if not self._writes_now:
            return self._write_briefly(offset, views, length)
        try:
            return os.pwritev(self._fd, views, offset, os.RWF_NOWAIT) == length
        except OSError as error:
            self._writes_now = error.errno not in UNKNOWN
            return False

    def _write_briefly(self, offset: int, views: Views, length: int) -> bool:
        start, most = time.monotonic(), next((most for most in SLOW if length <= most), 0)
        if not most or (offset | length) % mmap.PAGESIZE or start < self._held_back_until[most]:
            return False
        try:
            written = os.pwritev(self._fd, views, offset)
        except OSError:
            return False
        end = time.monotonic()
        if end - start > SLOW[most]:
            self._held_back_until[most] = end + PAUSE
        return written == length

    def write(self, offset: int, views: Views) -> None:
        self._check_writable()
        self._move_all(os.pwritev, offset, views)

    def flush(self) -> None:
        # One at a time: the kernel tells of a failure once, to whoever asks first, and nobody may miss that.
        begun = self._syncs_begun
        with self._flushing:
            if self._lost:
                raise OSError(self._lost, "what was written before is lost: a flush failed", self.name)
            if self._syncs_done <= begun:  # else one that began after this was asked for has done it
                self._sync()

    def _sync(self) -> None:
        self._syncs_begun += 1
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # The kernel takes the pages that it could not write for clean now: a second try would succeed.
            self._lost = error.errno or errno.EIO
            raise
        self._syncs_done = self._syncs_begun

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._check_writable()
        if not any(self._allocate(mode, offset, length) for mode in ZEROING[unmap]):
            for start in range(0, length, len(ZEROS)):
                self._move_all(os.pwritev, offset + start, [ZEROS[: length - start]])

    def discard(self, offset: int, length: int) -> None:
        self._check_writable()
        self._allocate(PUNCH, offset, length)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """Whether fallocate could do it."""
        if mode in self._unknown_modes:
            return False
        try:
            kernel.fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            if error.errno in UNKNOWN:
                self._unknown_modes.add(mode)
            return False
        return True

    def close(self) -> None:
        self._fd, self._acquired = -1, False
        self._file.close()  # and the lock is gone with it

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.name)

    def _move_all(self, move: Move, offset: int, views: Views) -> None:
        """All of ``views``, in as many calls as it takes."""
        while views:
            count = move(self._fd, views[:MAX_VIEWS], offset)
            if not count:
                raise OSError(errno.EIO, "somebody made it shorter", self.name)
            offset += count
            views = _after(views, count)


def _after(views: Views, count: int) -> Views:
    """What is left of ``views`` without their first ``count`` bytes."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1 :]]
        count -= len(view)
    return ()


def _open(path: str, size: int | None, read_only: bool) -> OwnedFd:
    # O_NONBLOCK: not to hang where ``path`` is a FIFO. Reads and writes of files and block devices do not care.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
    try:
        return OwnedFd(os.open(path, flags))
    except FileNotFoundError:
        if size is None or read_only:
            raise ValueError(f"{path} is not there{'' if read_only else ': -o size=1G makes it'}") from None
    _check_multiple(path, size)
    return _create(path, size, flags)


def _create(path: str, size: int, flags: int) -> OwnedFd:
    """A file of its own, sparse and durably there, that others of this machine's users cannot read; or none at all."""
    file = OwnedFd(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())
        _sync_folder(Path(path).parent)
    except BaseException as error:
        file.close()
        os.unlink(path)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{size} bytes: {error.strerror}", path) from error
        raise
    return file


def _sync_folder(folder: Path) -> None:
    with OwnedFd(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as opened:
        os.fsync(opened.fileno())


def _checked_mode(path: str, file: OwnedFd) -> int:
    mode = os.fstat(file.fileno()).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ValueError(f"{path} is neither a file nor a block device")
    return mode


def _checked_size(path: str, file: OwnedFd, wanted: int | None) -> int:
    size = _size(file)
    if wanted not in (None, size):
        raise ValueError(f"{path} has {size} bytes, not {wanted}: leave the size out, or name another file")
    _check_multiple(path, size)
    return size


def _check_multiple(path: str, size: int) -> None:
    if size <= 0 or size % SECTOR:
        raise ValueError(f"{path}: {size} bytes are no disk: it must be a multiple of {SECTOR}")


def _size(file: OwnedFd) -> int:
    """In bytes; fstat knows it of files only."""
    return os.lseek(file.fileno(), 0, os.SEEK_END)
