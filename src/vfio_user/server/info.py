"""What the device is: GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO."""

from __future__ import annotations

from collections.abc import Sequence

from vfio_user.errors import MessageError
from vfio_user.protocol import Message
from vfio_user.server.backend import RegionIoFd
from vfio_user.server.context import Context, Reply, check_argsz
from vfio_user.wire import messages as m
from vfio_user.wire.constants import MAX_MSG_FDS, DeviceFlags, IoFdType, RegionFlags

MAX_IO_FDS_ARGSZ = 1 << 20
"""libvfio-user's limit."""


def get_info(context: Context, message: Message) -> Reply:
    request = m.DeviceInfo.parse(message.payload)
    size = m.DeviceInfo.LAYOUT.size
    check_argsz(request.argsz, size)
    backend = context.backend
    flags = DeviceFlags.PCI | (DeviceFlags.RESET if backend.resettable else 0)
    return Reply([m.DeviceInfo(size, flags, len(backend.regions), len(backend.irqs)).pack()])


def get_region_info(context: Context, message: Message) -> Reply:
    """The capability travels if ``argsz`` has room for it, the descriptor of a mmap-able region always."""
    request = m.RegionInfo.parse(message.payload)
    base = m.RegionInfo.LAYOUT.size
    check_argsz(request.argsz, base)
    region = context.region(request.index)
    fds = [region.fd] if region.fd is not None and region.size and context.client.msg_fds else []
    access = region.flags & (RegionFlags.READ | RegionFlags.WRITE) if region.size else 0
    flags = access | (RegionFlags.MMAP if fds else 0)
    chain = m.pack_sparse_areas(region.sparse_areas) if fds and region.sparse_areas else b""
    argsz = base + len(chain)
    cap_offset = 0
    if argsz > request.argsz:
        chain = b""
    if chain:
        flags |= RegionFlags.CAPS
        cap_offset = base
    info = m.RegionInfo(argsz, flags, request.index, cap_offset, region.size, region.offset)
    return Reply([info.pack(), chain], fds)


def get_region_io_fds(context: Context, message: Message) -> Reply:
    request = m.RegionIoFds.parse(message.payload)
    base = m.RegionIoFds.LAYOUT.size
    check_argsz(request.argsz, base)
    if request.argsz > MAX_IO_FDS_ARGSZ:
        raise MessageError(f"argsz {request.argsz}: at most {MAX_IO_FDS_ARGSZ}")
    if request.flags or request.count:
        raise MessageError("flags and count of GET_REGION_IO_FDS must be 0")
    region = context.region(request.index)
    if not region.flags or not region.size:
        raise MessageError(f"region {request.index} does not exist")
    offered = _carried(region.io_fds, min(context.client.msg_fds, MAX_MSG_FDS))
    argsz = base + m.IoFd.LAYOUT.size * len(offered)
    head = m.RegionIoFds(argsz, 0, request.index, len(offered)).pack()
    if argsz > request.argsz:
        return Reply([head])
    entries, fds = _pack_io_fds(offered)
    return Reply([head, *entries], fds)


def _carried(io_fds: Sequence[RegionIoFd], limit: int) -> Sequence[RegionIoFd]:
    """The first of them, as many as ``limit`` descriptors are enough for: what is not offered comes by messages."""
    fds: set[int] = set()
    for number, one in enumerate(io_fds):
        fds |= {fd for fd in (one.fd, one.shadow_fd) if fd is not None and fd >= 0}
        if len(fds) > limit:
            return io_fds[:number]
    return io_fds


def _pack_io_fds(io_fds: Sequence[RegionIoFd]) -> tuple[list[bytes], list[int]]:
    """The entries, and the descriptors that their indexes mean, each of them once."""
    fds: list[int] = []

    def index(fd: int) -> int:
        if fd < 0:
            return m.NO_FD_INDEX
        if fd not in fds:
            fds.append(fd)
        return fds.index(fd)

    entries = []
    for io_fd in io_fds:
        fd_index = index(io_fd.fd)
        shadow_index = 0 if io_fd.shadow_fd is None else index(io_fd.shadow_fd)
        middle = io_fd.user_data if io_fd.type == IoFdType.IOREGIONFD else io_fd.shadow_offset
        fields = (io_fd.offset, io_fd.size, fd_index, io_fd.type, io_fd.flags, shadow_index, middle, io_fd.datamatch)
        entries.append(m.IoFd(*fields).pack())
    return entries, fds


def get_irq_info(context: Context, message: Message) -> Reply:
    request = m.IrqInfo.parse(message.payload)
    size = m.IrqInfo.LAYOUT.size
    check_argsz(request.argsz, size)
    irq = context.irq(request.index)
    return Reply([m.IrqInfo(size, irq.flags, request.index, irq.count).pack()])
