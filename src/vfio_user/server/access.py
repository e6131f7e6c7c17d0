"""REGION_READ, REGION_WRITE, REGION_WRITE_MULTI."""

from __future__ import annotations

from vfio_user.errors import MessageError
from vfio_user.protocol import Message
from vfio_user.server.context import Context, Reply
from vfio_user.wire import messages as m

_ACCESS_SIZE = m.RegionAccess.LAYOUT.size
_MULTI_SIZE = m.WriteMulti.LAYOUT.size
_ENTRY = m.WriteMultiEntry.LAYOUT


def check_access(context: Context, limits: list[int], region: int, offset: int, count: int) -> None:
    """Raise MessageError unless the access lies inside a region that may be accessed like this now."""
    context.region(region)
    if limits[region] < 0:
        raise MessageError(f"region {region} does not allow this access now")
    if offset + count > limits[region]:
        raise MessageError(f"region {region}: {offset:#x}+{count:#x} goes beyond {limits[region]:#x}")


def _check_count(context: Context, count: int) -> None:
    if count > context.limits.data_xfer_size:
        raise MessageError(f"an access of {count} bytes: at most {context.limits.data_xfer_size}")


def region_read(context: Context, message: Message) -> Reply:
    """Of 0 bytes nothing is read, and the answer has no payload at all, as libvfio-user's."""
    if len(message.payload) != _ACCESS_SIZE:
        raise MessageError(f"REGION_READ takes {_ACCESS_SIZE} bytes, {len(message.payload)} came")
    head = bytes(message.payload)
    offset, region, count = m.RegionAccess.LAYOUT.unpack(head)
    _check_count(context, count)
    check_access(context, context.readable, region, offset, count)
    if not count:
        return Reply()
    data = context.backend.region_view(region, offset, count)
    if data is None:
        data = memoryview(bytearray(count))
        context.backend.region_read(region, offset, data)
    elif data.nbytes != count:
        raise ValueError(f"region_view returned {data.nbytes} of {count} bytes")
    return Reply([head, data.cast("B")])


def region_write(context: Context, message: Message) -> Reply:
    request = m.RegionAccess.parse(message.payload)
    if len(message.payload) - _ACCESS_SIZE != request.count:
        raise MessageError(f"{request.count} bytes announced, {len(message.payload) - _ACCESS_SIZE} came")
    _check_count(context, request.count)
    check_access(context, context.writable, request.region, request.offset, request.count)
    if not request.count:
        return Reply()
    context.backend.region_write(request.region, request.offset, message.payload[_ACCESS_SIZE:])
    return Reply([request.pack()])


def region_write_multi(context: Context, message: Message) -> Reply:
    """All or an error: the writes before the one that failed were done."""
    count = m.WriteMulti.parse(message.payload).count
    entries = bytes(message.payload[_MULTI_SIZE:])
    if len(entries) != count * _ENTRY.size:
        raise MessageError(f"{count} writes announced, {len(entries)} bytes came")
    writes = list(_ENTRY.iter_unpack(entries))
    for offset, region, size, _ in writes:
        if size > 8:
            raise MessageError(f"a write of {size} bytes in REGION_WRITE_MULTI: at most 8")
        check_access(context, context.writable, region, offset, size)
    for offset, region, size, data in writes:
        if size:
            context.backend.region_write(region, offset, memoryview(data)[:size])
    return Reply([m.WriteMulti(count).pack()])
