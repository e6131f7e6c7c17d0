"""DMA_MAP and DMA_UNMAP: the table of what the client mapped, and every rule about it."""

from __future__ import annotations

import errno
import os

from vfio_user.dma.bitmap import bitmap_size, check_report
from vfio_user.dma.iova import ADDRESS_SPACE
from vfio_user.errors import MessageError
from vfio_user.fds import is_mappable
from vfio_user.protocol import Message
from vfio_user.server.context import Context, DmaMapping, Reply, check_argsz
from vfio_user.wire import messages as m
from vfio_user.wire.constants import MAX_BITMAP_SIZE, MAX_DMA_REGION_SIZE, DmaFlags, DmaUnmapFlags

# An integer: the complement of an IntFlag has only the bits that have names.
_KNOWN_FLAGS = int(DmaFlags.READ | DmaFlags.WRITE | DmaFlags.MMAP | DmaFlags.FILE_IO)
_FD_FLAGS = DmaFlags.MMAP | DmaFlags.FILE_IO

_Entry = tuple[int, int, DmaMapping]
"""Address, size, and what is there."""


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
        _unmap_all(context, list(context.maps))
        return Reply([request.pack()])
    if request.flags not in (0, DmaUnmapFlags.GET_DIRTY_BITMAP):
        raise MessageError(f"DMA_UNMAP flags {request.flags:#x}")
    bitmap = _bitmap_request(message, request) if request.flags else None
    regions = _regions_within(context, request.address, request.size, exactly_one=bitmap is not None)
    parts: list[m.Buffer] = [request.pack()]
    if bitmap is not None:
        bits = bytearray(bitmap.size)
        context.backend.dma_logging_report(request.address, request.size, bitmap.page_size, memoryview(bits))
        parts += [bitmap.pack(), bits]
    _unmap_all(context, regions, request.flags)
    return Reply(parts)


def _regions_within(context: Context, address: int, size: int, *, exactly_one: bool) -> list[_Entry]:
    """The regions that a range takes away: at least one, and all of them whole. Raises ENOENT otherwise.

    libvfio-user wants exactly one region; here we follow the kernel's VFIO_IOMMU_UNMAP_DMA. QEMU needs that: behind
    an emulated IOMMU it maps page by page, and when the guest takes the device to another address space, it unmaps
    all of the old one in a few large ranges. What stayed would be reached by DMA that the guest has forbidden, and
    be in the way of the next DMA_MAP.
    """
    if address + size > ADDRESS_SPACE:
        raise MessageError(f"DMA_UNMAP of {address:#x}, {size:#x} bytes: that wraps")
    regions = context.maps.overlapping(address, size)
    whole = bool(regions) and regions[0][0] >= address and sum(regions[-1][:2]) <= address + size
    if not whole or (exactly_one and regions[0][:2] != (address, size)):
        raise MessageError(f"no DMA region at {address:#x}, {size:#x} bytes", errno.ENOENT)
    return regions


def _bitmap_request(message: Message, request: m.DmaUnmap) -> m.DirtyBitmapInfo:
    bitmap = m.DirtyBitmapInfo.parse(message.payload, m.DmaUnmap.LAYOUT.size)
    check_report(request.address, request.size, bitmap.page_size)
    needed = bitmap_size(request.size, bitmap.page_size)
    if not needed <= bitmap.size <= MAX_BITMAP_SIZE:
        raise MessageError(f"a dirty bitmap of {bitmap.size} bytes: {needed} are needed, {MAX_BITMAP_SIZE} the most")
    check_argsz(request.argsz, m.DmaUnmap.LAYOUT.size + m.DirtyBitmapInfo.LAYOUT.size + bitmap.size)
    return bitmap


def _unmap_all(context: Context, regions: list[_Entry], flags: int = 0) -> None:
    for address, size, _ in reversed(regions):  # from the end of the table: nothing in it has to move up
        unmap(context, address, size, flags)


def unmap(context: Context, address: int, size: int, flags: int = 0) -> None:
    """Take one region away from the backend."""
    context.backend.dma_unmap(flags, address, size)
    context.maps.remove(address, size)
