"""The guest's memory, as a device reaches it by DMA.

A region of it is reached in one of three ways (libvfio-user's, protocol.md section 6.1): mapped into this process,
by file I/O on the file descriptor that came with it, or by messages to the client.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

from vfio_user.fds import OwnedFd, is_mappable

from .bitmap import DirtyLog
from .files import SharedFiles
from .iova import IovaTable

READ, WRITE, MMAP, FILE_IO = 1, 2, 4, 8
"""``flags`` of DMA_MAP, as on the wire: what the device may do, and how. MMAP and FILE_IO exclude each other."""

MAX_REGIONS = 65535
"""Regions of one guest: the protocol's default for ``max_dma_maps``."""

_VERBS = {READ: "read", WRITE: "write"}
_ALL_FLAGS = READ | WRITE | MMAP | FILE_IO
_MAX_FILE_SIZE = (1 << 63) - 1

Buffer = bytes | bytearray | memoryview


class MessageDma(Protocol):
    """How memory is reached that only the client can touch: DMA_READ and DMA_WRITE, split as the client needs it.

    Both return when all of it is done, or raise OSError.
    """

    def dma_read(self, address: int, buffer: memoryview) -> None: ...

    def dma_write(self, address: int, data: memoryview) -> None: ...


class _MessagePort:
    """Where messages go, for all regions of one guest."""

    __slots__ = ("messages",)

    def __init__(self, messages: MessageDma | None) -> None:
        self.messages = messages


class _Region:
    """A range of guest memory. ``readable`` and ``writable`` are its bytes where it is mapped and may be accessed."""

    __slots__ = ("flags", "identity", "readable", "writable")

    logged = True

    def __init__(self, flags: int, identity: tuple[int, ...]) -> None:
        self.flags = flags
        self.identity = identity
        self.readable: memoryview | None = None
        self.writable: memoryview | None = None

    @property
    def reachable(self) -> bool:
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def write(self, offset: int, data: memoryview) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the region holds. Nothing of it is used afterwards."""


class _MappedRegion(_Region):
    """Memory that this process shares with the guest."""

    __slots__ = ("_bytes",)

    def __init__(self, flags: int, identity: tuple[int, ...], shared: memoryview) -> None:
        super().__init__(flags, identity)
        self._bytes = shared
        self.readable = shared.toreadonly() if flags & READ else None
        self.writable = shared if flags & WRITE else None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._bytes[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self._bytes[offset : offset + len(data)] = data

    def close(self) -> None:
        # Somebody may still hold a view: the mapping goes away together with the last one.
        self.readable = self.writable = None
        self._bytes.release()


class _FileRegion(_Region):
    """Memory in a file that is read and written, not mapped."""

    __slots__ = ("_fd", "_offset")

    def __init__(self, flags: int, identity: tuple[int, ...], fd: OwnedFd, offset: int) -> None:
        super().__init__(flags, identity)
        self._fd = fd
        self._offset = offset

    def read_into(self, offset: int, buffer: memoryview) -> None:
        position, fd = self._offset + offset, self._fd.fileno()
        while buffer:
            count = _some(os.preadv(fd, [buffer], position), "ends within what is mapped")
            buffer, position = buffer[count:], position + count

    def write(self, offset: int, data: memoryview) -> None:
        position, fd = self._offset + offset, self._fd.fileno()
        while data:
            count = _some(os.pwrite(fd, data, position), "takes no more bytes")
            data, position = data[count:], position + count

    def close(self) -> None:
        del self._fd  # other regions may have the same one: it is closed with the last of them


class _MessageRegion(_Region):
    """Memory that only the client can touch. It knows what it writes for us: there is nothing to log."""

    __slots__ = ("_address", "_port")

    logged = False

    def __init__(self, flags: int, identity: tuple[int, ...], address: int, port: _MessagePort) -> None:
        super().__init__(flags, identity)
        self._address = address
        self._port = port

    @property
    def reachable(self) -> bool:
        return self._port.messages is not None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._messages().dma_read(self._address + offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self._messages().dma_write(self._address + offset, data)

    def _messages(self) -> MessageDma:
        if self._port.messages is None:
            raise OSError(errno.EFAULT, "no messages can be sent to the client")
        return self._port.messages


class GuestMemory:
    """The guest's memory by I/O virtual address, and the log of what the device writes there.

    An access may reach over adjacent regions. One that touches an address where nothing is mapped, or a region
    that may not be accessed so, fails as a whole before a byte is moved.

    Addresses, offsets and sizes are in bytes. Reads and writes may come from several threads (``lock``: see
    :class:`DirtyLog`); to map and to unmap, let there be no access meanwhile.
    """

    def __init__(
        self, messages: MessageDma | None = None, *, lock: AbstractContextManager[object] | None = None
    ) -> None:
        self._port = _MessagePort(messages)
        self._regions: IovaTable[_Region] = IovaTable()
        self._files = SharedFiles()
        self.log = DirtyLog(lock)
        """What the device wrote, while logging is on. The regions in it are those that are mapped here."""

    @property
    def messages(self) -> MessageDma | None:
        """How to reach the regions that came without a file descriptor; without it, accesses there are EFAULT.

        Without it there is no client, too, and what one had unmapped is no concern of the next.
        """
        return self._port.messages

    @messages.setter
    def messages(self, messages: MessageDma | None) -> None:
        self._port.messages = messages
        if messages is None:
            self.log.forget_unmapped()

    def __len__(self) -> int:
        """How many regions are mapped."""
        return len(self._regions)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Every region as ``(address, size, flags)``, by rising address."""
        for address, size, region in self._regions:
            yield address, size, region.flags

    def map(self, address: int, size: int, flags: int, fd: OwnedFd | None = None, offset: int = 0) -> None:
        """Make ``size`` bytes of ``fd`` from ``offset`` on the guest's memory at ``address``.

        ``flags`` are READ, WRITE, MMAP and FILE_IO. Without MMAP and FILE_IO, memory with a file descriptor is
        mapped and memory without one is reached by messages. The very same region once more changes nothing.
        ``fd`` belongs to this call, which closes it or keeps it, whether it succeeds or not.

        Raises OSError: EEXIST for an overlap; EINVAL for flags, range or descriptor that cannot be, or a mapping
        that would end beyond its file; ENOSPC for one region too many; ENOMEM where logging is on and has no
        room; and what mmap(2) fails with.
        """
        try:
            self._map(address, size, flags, fd, offset)
        finally:
            if fd is not None:
                fd.close()

    def _map(self, address: int, size: int, flags: int, fd: OwnedFd | None, offset: int) -> None:
        _check_flags(flags, fd)
        identity = _identity(flags, fd, offset, size)
        known = self._regions.get(address, size)
        if known is not None and known.identity == identity:
            return
        self._regions.check(address, size)
        if len(self._regions) >= MAX_REGIONS:
            raise OSError(errno.ENOSPC, f"{MAX_REGIONS} regions are mapped already")
        region = self._open(address, size, flags, fd, offset, identity)
        try:
            self.log.map(address, size, region.logged and bool(flags & WRITE), _memory(identity, address))
        except BaseException:
            region.close()
            raise
        self._regions.add(address, size, region)

    def _open(
        self, address: int, size: int, flags: int, fd: OwnedFd | None, offset: int, identity: tuple[int, ...]
    ) -> _Region:
        if fd is None:
            return _MessageRegion(flags, identity, address, self._port)
        if flags & FILE_IO:
            return _FileRegion(flags, identity, self._files.keep(fd), offset)
        prot = (mmap.PROT_READ if flags & READ else 0) | (mmap.PROT_WRITE if flags & WRITE else 0)
        return _MappedRegion(flags, identity, self._files.map(fd.fileno(), offset, size, prot))

    def unmap(self, address: int, size: int) -> None:
        """Take away exactly this region. Raises OSError(ENOENT) where there is none."""
        region = self._regions.remove(address, size)
        self.log.unmap(address, size)
        region.close()

    def unmap_all(self) -> None:
        """Take away every region. Logging, if on, stays on."""
        regions = list(self._regions)
        self._regions.clear()
        for address, size, region in reversed(regions):  # from the end of the log's table: nothing has to move up
            self.log.unmap(address, size)
            region.close()

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes of guest memory.

        Raises OSError: EFAULT where something is not mapped or not reachable, EPERM where the client granted no
        reading, EIO where a file ends too soon, and what the client's error reply says.
        """
        entry = self._regions.find(address)
        if entry is not None:
            start, length, region = entry
            offset = address - start
            if region.readable is not None and 0 <= size <= length - offset:
                return region.readable[offset : offset + size].tobytes()
        spans = self._reach(address, size, READ)  # before the allocation, which it bounds
        data = bytearray(size)
        _read_spans(spans, memoryview(data))
        return bytes(data)

    def read_into(self, address: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from guest memory. Raises as :meth:`read` does."""
        target = memoryview(buffer).cast("B")
        size = len(target)
        entry = self._regions.find(address)
        if entry is not None:
            start, length, region = entry
            offset = address - start
            if region.readable is not None and size <= length - offset:
                target[:] = region.readable[offset : offset + size]
                return
        _read_spans(self._reach(address, size, READ), target)

    def write(self, address: int, data: Buffer) -> None:
        """Write ``data`` to guest memory, and log it where the client cannot know.

        Raises OSError: EFAULT where something is not mapped or not reachable, EPERM where the client granted no
        writing, and what the file or the client's error reply says.
        """
        source = memoryview(data).cast("B")
        size = len(source)
        entry = self._regions.find(address)
        if entry is not None:
            start, length, region = entry
            offset = address - start
            if region.writable is not None and size <= length - offset:
                region.writable[offset : offset + size] = source
                if self.log.active:
                    self.log.mark(address, size)
                return
        self._write_spans(address, source)

    def _write_spans(self, address: int, source: memoryview) -> None:
        done = 0
        for region, offset, length in self._reach(address, len(source), WRITE):
            try:
                region.write(offset, source[done : done + length])
            finally:  # a write that failed may have written some of it
                self.log.mark(address + done, length)
            done += length

    @contextmanager
    def view(self, address: int, size: int, write: bool = False) -> Iterator[list[memoryview]]:
        """The guest's memory itself, as views that add up to ``size`` bytes: one, or one per adjacent region.

        They can be written when ``write`` is set, and count as written when the context is left; after that they
        are no longer valid.

        Raises OSError: EFAULT and EPERM as :meth:`read` and :meth:`write`, ENOTSUP where memory is not mapped into
        this process.
        """
        views = [
            _direct(region, write)[offset : offset + length]
            for region, offset, length in self._spans(address, size, WRITE if write else READ)
        ]
        try:
            yield views
        finally:
            if write:
                self.log.mark(address, size)
            for view in views:
                with suppress(BufferError):  # something made from it, an array perhaps, is still in use
                    view.release()

    def window(self, address: int, size: int, write: bool = False) -> memoryview | None:
        """The guest's memory itself, where it is mapped into this process as one region; None where it is not.

        For hot paths: valid until that region is unmapped, and who writes there has it logged, by ``log.mark``, when
        all is written.
        """
        entry = self._regions.find(address)
        if entry is None:
            return None
        start, length, region = entry
        offset, view = address - start, region.writable if write else region.readable
        return view[offset : offset + size] if view is not None and 0 <= size <= length - offset else None

    def _spans(self, address: int, size: int, need: int) -> list[tuple[_Region, int, int]]:
        """The (region, offset in it, length) that make up an access, all of them fit for it."""
        if size < 0:
            raise OSError(errno.EINVAL, f"an access of {size} bytes")
        spans = []
        position, end = address, address + size
        for start, length, region in self._regions.overlapping(address, size):
            if start > position:
                break
            if not region.flags & need:
                raise OSError(errno.EPERM, f"no permission to {_VERBS[need]} {position:#x}")
            stop = min(start + length, end)
            spans.append((region, position - start, stop - position))
            position = stop
        if position < end:
            raise OSError(errno.EFAULT, f"nothing is mapped at {position:#x}")
        return spans

    def _reach(self, address: int, size: int, need: int) -> list[tuple[_Region, int, int]]:
        """The same for an access that moves bytes by whatever way the regions have."""
        spans = self._spans(address, size, need)
        if not all(region.reachable for region, _, _ in spans):
            raise OSError(errno.EFAULT, f"no messages can be sent to the client for {address:#x}, {size:#x} bytes")
        return spans


def _read_spans(spans: list[tuple[_Region, int, int]], target: memoryview) -> None:
    done = 0
    for region, offset, length in spans:
        region.read_into(offset, target[done : done + length])
        done += length


def _direct(region: _Region, write: bool) -> memoryview:
    view = region.writable if write else region.readable
    if view is None:
        raise OSError(errno.ENOTSUP, "memory is not mapped into this process")
    return view


def _check_flags(flags: int, fd: OwnedFd | None) -> None:
    if flags & ~_ALL_FLAGS or flags & (MMAP | FILE_IO) == MMAP | FILE_IO:
        raise OSError(errno.EINVAL, f"DMA flags {flags:#x}")
    if fd is None and flags & (MMAP | FILE_IO):
        raise OSError(errno.EINVAL, f"DMA flags {flags:#x} need a file descriptor")


def _identity(flags: int, fd: OwnedFd | None, offset: int, size: int) -> tuple[int, ...]:
    """What makes two mappings of the same addresses the same. Raises OSError(EINVAL) for an unfit descriptor."""
    if fd is None:
        return flags, offset
    if not is_mappable(fd.fileno()):
        raise OSError(errno.EINVAL, "the file descriptor is of nothing that could be guest memory")
    if offset < 0 or offset + size > _MAX_FILE_SIZE:
        raise OSError(errno.EINVAL, f"no file reaches to {offset:#x} + {size:#x}")
    status = os.fstat(fd.fileno())
    return flags, offset, status.st_dev, status.st_ino


def _memory(identity: tuple[int, ...], address: int) -> tuple[int, ...]:
    """What is the same wherever the same memory is mapped at the same addresses."""
    _, offset, *file = identity
    return offset - address, *file


def _some(count: int, otherwise: str) -> int:
    """``count``, or OSError(EIO) where it is nothing."""
    if not count:
        raise OSError(errno.EIO, f"the file behind guest memory {otherwise}")
    return count
