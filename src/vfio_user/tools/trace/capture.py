"""Messages in a file: pcapng that Wireshark shows with the dissector of this package, and recorded vectors.

Each packet is an exported PDU (link type 252): tags that name the dissector, then :data:`PREFIX`, what is known of the
message beyond its bytes, an FD for each of its descriptors, and the message. ``share/vfio-user.lua`` reads the same.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from vfio_user import __version__
from vfio_user.errors import MessageError
from vfio_user.fds import OwnedFd
from vfio_user.tools.trace import pcapng
from vfio_user.tools.trace.pcapng import CaptureError, Packet
from vfio_user.tools.trace.seen import FdKind, Place, Seen, SeenFd
from vfio_user.transport.ancillary import skip_sent
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import HEADER_SIZE, MAX_MSG_FDS, Command
from vfio_user.wire.messages import Buffer, DmaMap, Header

LINK_TYPE = 252
"""LINKTYPE_WIRESHARK_UPPER_PDU: no settings are needed, as a user link type would need them."""
DISSECTOR = b"vfio_user"

_TAG_DISSECTOR, _TAG_END = 12, 0
_TAG = struct.Struct(">HH")
_TAGS = (
    _TAG.pack(_TAG_DISSECTOR, -(-len(DISSECTOR) // 4) * 4)
    + DISSECTOR.ljust(-(-len(DISSECTOR) // 4) * 4, b"\0")
    + _TAG.pack(_TAG_END, 0)
)

PREFIX = struct.Struct("<BBBBI")
"""Version of this format (1), sender (0 client, 1 server), twin socket (1 if it is), count of FDs, connection."""
FD = struct.Struct("<B7xQ")
"""FdKind, and the size in bytes."""
VERSION = 1

_SENDERS = (Role.CLIENT, Role.SERVER)


class CaptureWriter:
    """Writes messages as they are seen: each is in the file, whole, before the next is looked at."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError. What was at ``path`` is gone; only this user may read what is there now: it is guest data."""
        self._file = OwnedFd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        self._write([pcapng.head(LINK_TYPE, "vfio-user", f"vfio-user {__version__}")])

    def add(self, message: Seen) -> None:
        place = message.place
        prefix = PREFIX.pack(
            VERSION, _SENDERS.index(place.sender), place.twin, len(message.fds), place.connection & 0xFFFFFFFF
        )
        fds = b"".join(FD.pack(kind, size) for kind, size in message.fds)
        before = _TAGS + prefix + fds
        parts = (before + message.header.pack(), message.payload)
        self._write(pcapng.packet(message.time, parts, len(before) + message.header.msg_size))

    def _write(self, block: Sequence[Buffer]) -> None:
        rest = skip_sent(block, 0)
        while rest:
            rest = skip_sent(rest, os.writev(self._file.fileno(), rest))

    def close(self) -> None:
        self._file.close()


def read_capture(path: str | os.PathLike[str]) -> Iterator[Seen]:
    """The messages of a capture, or of recorded vectors (JSON lines of name, request_hex and reply_hex).

    Raises OSError, and CaptureError after what comes before the fault.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == pcapng.MAGIC:
            yield from map(_message, pcapng.read_packets(file))
        elif start[:1] == b"{":
            yield from _vectors(file)
        else:
            raise CaptureError("it is neither a pcapng capture nor recorded vectors")


def _message(packet: Packet) -> Seen:
    if packet.link_type != LINK_TYPE:
        raise CaptureError(f"its link type {packet.link_type} is not that of a vfio-user capture, {LINK_TYPE}")
    try:
        return _parse(packet)
    except (struct.error, ValueError, IndexError, MessageError):
        raise CaptureError("there is a packet in it that is no message of vfio-user") from None


def _parse(packet: Packet) -> Seen:
    data = packet.data
    offset, dissector = _skip_tags(data)
    version, sender, twin, count, connection = PREFIX.unpack_from(data, offset)
    if dissector != DISSECTOR or version != VERSION or count > MAX_MSG_FDS:
        raise ValueError
    offset += PREFIX.size
    fds = tuple(SeenFd(*FD.unpack_from(data, offset + i * FD.size)) for i in range(count))
    offset += count * FD.size
    header = Header.parse(data, offset)
    payload = data[offset + HEADER_SIZE :]
    missing = header.msg_size - HEADER_SIZE - len(payload)
    place = Place(connection, bool(twin), _SENDERS[sender])
    known = tuple(SeenFd(FdKind(kind), size) for kind, size in fds)
    return Seen(packet.time, place, header, payload, known, f"{missing} bytes were not captured" if missing else None)


def _skip_tags(data: bytes) -> tuple[int, bytes]:
    """Where the tags end, and the dissector that they name."""
    offset, dissector = 0, b""
    while True:
        tag, size = _TAG.unpack_from(data, offset)
        offset += _TAG.size
        if tag == _TAG_DISSECTOR:
            dissector = data[offset : offset + size].rstrip(b"\0")
        offset += size
        if tag == _TAG_END:
            return offset, dissector


def _vectors(file: BinaryIO) -> Iterator[Seen]:
    """Recorded exchanges, each a command and its reply, of connections that begin with VERSION each."""
    connection = 0
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
            name, request, reply = row["name"], bytes.fromhex(row["request_hex"]), bytes.fromhex(row["reply_hex"])
            header = Header.parse(request)
            connection += header.command == Command.VERSION
            yield _vector(request, connection, Role.CLIENT, _fds_out(name, request))
            if reply:
                yield _vector(reply, connection, Role.SERVER, [SeenFd(FdKind.MEMFD)] * _fds_back(name))
        except (ValueError, KeyError, TypeError, MessageError) as error:
            raise CaptureError(f"line {number} is no recorded vector: {error}") from None


def _vector(message: bytes, connection: int, sender: Role, fds: list[SeenFd]) -> Seen:
    return Seen(0, Place(connection, False, sender), Header.parse(message), message[HEADER_SIZE:], tuple(fds))


def _fds_out(name: str, request: bytes) -> list[SeenFd]:
    """The descriptors that went with a request: the name has their number, the command says of what kind they are."""
    found = re.search(r"(?<!\+)(\d+) ?fds?(?: out|\)$|$)", name)
    count = int(found[1]) if found else name.endswith("dma_map/fd")
    if Header.parse(request).command != Command.DMA_MAP:
        return [SeenFd(FdKind.EVENTFD)] * count
    mapping = DmaMap.parse(request, HEADER_SIZE)
    return [SeenFd(FdKind.MEMFD, mapping.offset + mapping.size)] * count


def _fds_back(name: str) -> int:
    found = re.search(r"(\d+) fds back|\+(\d+) fd", name)
    return int(next(filter(None, found.groups()))) if found else 0


def dissector_path() -> Path:
    """Where this package has its Wireshark dissector."""
    return Path(__file__).parents[2] / "share" / "vfio-user.lua"
