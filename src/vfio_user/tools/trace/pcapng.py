"""The three blocks of pcapng that a capture has: a section, its interface, a packet each. Knows nothing of vfio-user.

No library: those that are kept up read networks, and would bring all of TCP/IP along to write three structures. What
is written here is read by Wireshark, and what Wireshark saves is read here.

Source: draft-ietf-opsawg-pcapng, sections 3.1 (blocks), 3.5 (options), 4.1 to 4.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from vfio_user.errors import VfioUserError
from vfio_user.wire.messages import Buffer

SECTION, INTERFACE, PACKET = 0x0A0D0D0A, 1, 6
MAGIC = SECTION.to_bytes(4, "little")
"""What a capture begins with, in either byte order."""

_BYTE_ORDER = 0x1A2B3C4D
_OPT_END, _SHB_APPLICATION, _IF_NAME, _IF_TIME_RESOLUTION = 0, 4, 2, 9
_NANOSECONDS, _MICROSECOND_TICKS = 9, 10**6
_UNKNOWN_LENGTH = 0xFFFFFFFFFFFFFFFF

MAX_BLOCK = 128 << 20
"""Bytes of the largest block that is read: a message of 64 MiB is the largest that is ever written."""


class CaptureError(VfioUserError):
    """A capture that cannot be read, or only up to some place."""


class Packet(NamedTuple):
    """``time`` is nanoseconds since the epoch; ``size`` is what the packet had before it was cut for the capture."""

    link_type: int
    time: int
    data: bytes
    size: int


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _padded(value)


def _block(kind: int, body: bytes) -> bytes:
    size = 12 + len(body)
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


def head(link_type: int, interface: str, application: str) -> bytes:
    """How a capture begins: a section, and its only interface, whose times are nanoseconds."""
    section = struct.pack("<IHHQ", _BYTE_ORDER, 1, 0, _UNKNOWN_LENGTH) + _option(_SHB_APPLICATION, application.encode())
    described = struct.pack("<HHI", link_type, 0, 0) + _option(_IF_NAME, interface.encode())
    end = _option(_OPT_END, b"")
    resolution = _option(_IF_TIME_RESOLUTION, bytes([_NANOSECONDS]))
    return _block(SECTION, section + end) + _block(INTERFACE, described + resolution + end)


def packet(time: int, parts: Sequence[Buffer], size: int) -> list[Buffer]:
    """A packet of the first interface whose data is ``parts``, which are not copied."""
    captured = sum(map(len, parts))
    block_size = 32 + captured + -captured % 4
    fixed = struct.pack("<IIIIIII", PACKET, block_size, 0, time >> 32, time & 0xFFFFFFFF, captured, size)
    return [fixed, *parts, bytes(-captured % 4) + struct.pack("<I", block_size)]


class _Interface(NamedTuple):
    link_type: int
    ticks: int  # a second


def read_packets(file: BinaryIO) -> Iterator[Packet]:
    """The packets of a capture. Raises CaptureError, after what comes before the fault."""
    order = "<"
    interfaces: list[_Interface] = []
    position = 0
    while start := file.read(8):
        if start[:4] == MAGIC:
            start += file.read(4)
            order, interfaces = _order(start), []
        kind, size = _unpack(order + "II", start, 0, position)
        if not 12 <= size <= MAX_BLOCK or size % 4:
            raise CaptureError(f"no pcapng block at byte {position}: its length is {size}")
        rest = file.read(size - len(start))
        if len(start) + len(rest) < size:
            raise CaptureError(f"it is cut off in the block at byte {position}")
        if rest[-4:] != start[4:8]:
            raise CaptureError(f"the block at byte {position} is damaged: its two lengths differ")
        body = (start + rest)[8:-4]
        if kind == INTERFACE:
            interfaces.append(_interface(order, body, position))
        elif kind == PACKET:
            yield _packet(order, body, interfaces, position)
        position += size


def _order(start: bytes) -> str:
    for order in "<>":
        if start[8:] == struct.pack(order + "I", _BYTE_ORDER):
            return order
    raise CaptureError("it is no pcapng file")


def _unpack(layout: str, data: bytes, offset: int, position: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, offset)
    except struct.error:
        raise CaptureError(f"the block at byte {position} is too short") from None


def _interface(order: str, body: bytes, position: int) -> _Interface:
    link_type, _, _ = _unpack(order + "HHI", body, 0, position)
    resolutions = (_ticks(v) for code, v in _options(order, body[8:]) if code == _IF_TIME_RESOLUTION and v)
    return _Interface(link_type, next(resolutions, _MICROSECOND_TICKS))


def _options(order: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        code, size = struct.unpack_from(order + "HH", data, offset)
        if code == _OPT_END:
            return
        yield code, data[offset + 4 : offset + 4 + size]
        offset += 4 + size + -size % 4


def _ticks(resolution: bytes) -> int:
    base = 2 if resolution[0] & 0x80 else 10
    return int(base ** (resolution[0] & 0x7F))


def _packet(order: str, body: bytes, interfaces: list[_Interface], position: int) -> Packet:
    index, high, low, captured, size = _unpack(order + "IIIII", body, 0, position)
    if index >= len(interfaces) or 20 + captured > len(body):
        raise CaptureError(f"the packet at byte {position} is damaged")
    interface = interfaces[index]
    time = (high << 32 | low) * 10**9 // interface.ticks
    return Packet(interface.link_type, time, body[20 : 20 + captured], size)
