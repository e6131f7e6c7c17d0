"""DMA_MAP and DMA_UNMAP: the table of what the client mapped, and every rule about it."""

from __future__ import annotations

import errno
import os

from vfio_user.dma.bitmap import bitmap_size, check_report
from vfio_user.errors import MessageError
from vfio_user.fds import is_mappable
from vfio_user.protocol import Message
from vfio_user.server.context import Context, DmaMapping, Reply, check_argsz
from vfio_user.wire import messages as m
from vfio_user.wire.constants import MAX_BITMAP_SIZE, MAX_DMA_REGION_SIZE, DmaFlags, DmaUnmapFlags

# An integer: the complement of an IntFlag has only the bits that have names.
_KNOWN_FLAGS = int(DmaFlags.READ | DmaFlags.WRITE | DmaFlags.MMAP | DmaFlags.FILE_IO)
_FD_FLAGS = DmaFlags.MMAP | DmaFlags.FILE_IO


def dma_map(context: Context, message: Message) -> Reply:
    request = m.DmaMap.parse(message.payload)
    check_argsz(request.argsz, m.DmaMap.LAYOUT.size)
    mapping = _check_map(message, request)
    if context.maps.get(request.address, request.size) == mapping:
        return Reply()
    if len(context.maps) >= context.limits.dma_maps:
        raise MessageError(f"{len(context.maps)} DMA regions are mapped already", errno.ENOSPC)
    context.maps.check(request.address, request.size)
    fd = message.fds.pop() if message.fds else None
    try:
        context.backend.dma_map(request.flags, request.offset, request.address, request.size, fd)
    except BaseException:
        if fd is not None:
            fd.close()
        raise
    context.maps.add(request.address, request.size, mapping)
    return Reply()


def _check_map(message: Message, request: m.DmaMap) -> DmaMapping:
    flags = request.flags
    if flags & ~_KNOWN_FLAGS or flags & _FD_FLAGS == _FD_FLAGS:
        raise MessageError(f"DMA_MAP flags {flags:#x}")
    if request.size > MAX_DMA_REGION_SIZE:
        raise MessageError(f"a DMA region of {request.size:#x} bytes", errno.ENOSPC)
    if not message.fds:
        if flags & _FD_FLAGS:
            raise MessageError(f"DMA_MAP flags {flags:#x} without a file descriptor")
        return DmaMapping(flags, request.offset, None)
    number = message.fds[0].fileno()
    if not is_mappable(number):
        raise MessageError("the file descriptor of DMA_MAP cannot be mapped")
    if request.offset + request.size >= 1 << 63:
        raise MessageError(f"DMA_MAP offset {request.offset:#x} leaves the file")
    status = os.fstat(number)
    return DmaMapping(flags, request.offset, (status.st_dev, status.st_ino))


def dma_unmap(context: Context, message: Message) -> Reply:
    request = m.DmaUnmap.parse(message.payload)
    check_argsz(request.argsz, m.DmaUnmap.LAYOUT.size)
    if request.flags == DmaUnmapFlags.ALL:
        if request.address or request.size:
            raise MessageError("DMA_UNMAP of all takes no address and no size")
        for address, size, _ in list(context.maps):
            unmap(context, address, size)
        return Reply([request.pack()])
    if request.flags not in (0, DmaUnmapFlags.GET_DIRTY_BITMAP):
        raise MessageError(f"DMA_UNMAP flags {request.flags:#x}")
    bitmap = _bitmap_request(message, request) if request.flags else None
    if context.maps.get(request.address, request.size) is None:
        raise MessageError(f"no DMA region at {request.address:#x}, {request.size:#x} bytes", errno.ENOENT)
    parts: list[m.Buffer] = [request.pack()]
    if bitmap is not None:
        bits = bytearray(bitmap.size)
        context.backend.dma_logging_report(request.address, request.size, bitmap.page_size, memoryview(bits))
        parts += [bitmap.pack(), bits]
    context.backend.dma_unmap(request.flags, request.address, request.size)
    context.maps.remove(request.address, request.size)
    return Reply(parts)


def _bitmap_request(message: Message, request: m.DmaUnmap) -> m.DirtyBitmapInfo:
    bitmap = m.DirtyBitmapInfo.parse(message.payload, m.DmaUnmap.LAYOUT.size)
    check_report(request.address, request.size, bitmap.page_size)
    needed = bitmap_size(request.size, bitmap.page_size)
    if not needed <= bitmap.size <= MAX_BITMAP_SIZE:
        raise MessageError(f"a dirty bitmap of {bitmap.size} bytes: {needed} are needed, {MAX_BITMAP_SIZE} the most")
    check_argsz(request.argsz, m.DmaUnmap.LAYOUT.size + m.DirtyBitmapInfo.LAYOUT.size + bitmap.size)
    return bitmap


def unmap(context: Context, address: int, size: int) -> None:
    """Take one region away from the backend."""
    context.backend.dma_unmap(0, address, size)
    context.maps.remove(address, size)
