"""REGION_READ, REGION_WRITE, REGION_WRITE_MULTI."""

from __future__ import annotations

from vfio_user.errors import MessageError
from vfio_user.protocol import Message
from vfio_user.server.context import Context, Reply
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command, PciRegion, RegionFlags

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


def touches_bar(message: Message) -> bool:
    """Whether a message is a well-formed access to a region that is not config space."""
    if message.command == Command.REGION_WRITE_MULTI:
        entries = message.payload[_MULTI_SIZE:]
        if len(entries) % _ENTRY.size:
            return False
        return any(region != PciRegion.CONFIG for _, region, _, _ in _ENTRY.iter_unpack(entries))
    if message.command not in (Command.REGION_READ, Command.REGION_WRITE):
        return False
    return m.RegionAccess.parse(message.payload).region != PciRegion.CONFIG


def _read_request(context: Context, message: Message, limits: list[int]) -> tuple[bytes, m.RegionAccess]:
    """A REGION_READ that may be served, and its bytes, with which the reply begins."""
    if len(message.payload) != _ACCESS_SIZE:
        raise MessageError(f"REGION_READ takes {_ACCESS_SIZE} bytes, {len(message.payload)} came")
    head = bytes(message.payload)
    request = m.RegionAccess.parse(head)
    _check_count(context, request.count)
    check_access(context, limits, request.region, request.offset, request.count)
    return head, request


def region_read(context: Context, message: Message) -> Reply:
    """Of 0 bytes nothing is read, and the answer has no payload at all, as libvfio-user's."""
    head, request = _read_request(context, message, context.readable)
    count = request.count
    if not count:
        return Reply()
    data = context.backend.region_view(request.region, request.offset, count)
    if data is None:
        data = memoryview(bytearray(count))
        context.backend.region_read(request.region, request.offset, data)
    elif data.nbytes != count:
        raise ValueError(f"region_view returned {data.nbytes} of {count} bytes")
    return Reply([head, data.cast("B")])


def dummy_read(context: Context, message: Message) -> Reply:
    """A read that gives zeros: the device is not asked."""
    head, request = _read_request(context, message, context.access_limits(RegionFlags.READ))
    return Reply([head, bytes(request.count)] if request.count else ())


def _write_request(context: Context, message: Message, limits: list[int]) -> m.RegionAccess:
    request = m.RegionAccess.parse(message.payload)
    if len(message.payload) - _ACCESS_SIZE != request.count:
        raise MessageError(f"{request.count} bytes announced, {len(message.payload) - _ACCESS_SIZE} came")
    _check_count(context, request.count)
    check_access(context, limits, request.region, request.offset, request.count)
    return request


def region_write(context: Context, message: Message) -> Reply:
    request = _write_request(context, message, context.writable)
    if not request.count:
        return Reply()
    context.backend.region_write(request.region, request.offset, message.payload[_ACCESS_SIZE:])
    return Reply([request.pack()])


def dummy_write(context: Context, message: Message) -> Reply:
    """A write that nobody takes."""
    request = _write_request(context, message, context.access_limits(RegionFlags.WRITE))
    return Reply([request.pack()] if request.count else ())


def _multi_request(context: Context, message: Message, limits: list[int]) -> list[tuple[int, int, int, bytes]]:
    """The (offset, region, size, data) of a REGION_WRITE_MULTI, all of which may be served."""
    count = m.WriteMulti.parse(message.payload).count
    entries = bytes(message.payload[_MULTI_SIZE:])
    if len(entries) != count * _ENTRY.size:
        raise MessageError(f"{count} writes announced, {len(entries)} bytes came")
    writes = list(_ENTRY.iter_unpack(entries))
    for offset, region, size, _ in writes:
        if size > 8:
            raise MessageError(f"a write of {size} bytes in REGION_WRITE_MULTI: at most 8")
        check_access(context, limits, region, offset, size)
    return writes


def region_write_multi(context: Context, message: Message) -> Reply:
    """All or an error: the writes before the one that failed were done."""
    writes = _multi_request(context, message, context.writable)
    for offset, region, size, data in writes:
        if size:
            context.backend.region_write(region, offset, memoryview(data)[:size])
    return Reply([m.WriteMulti(len(writes)).pack()])


def dummy_write_multi(context: Context, message: Message) -> Reply:
    """Writes that nobody takes but config space, which is served in every state."""
    writes = _multi_request(context, message, context.access_limits(RegionFlags.WRITE))
    for offset, region, size, data in writes:
        if size and region == PciRegion.CONFIG:
            context.backend.region_write(region, offset, memoryview(data)[:size])
    return Reply([m.WriteMulti(len(writes)).pack()])
