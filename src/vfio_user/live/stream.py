"""A migration as bytes: what goes through a pipe between two hosts, and how it is checked.

All integers are little-endian, nothing is padded; a CRC-32 is zlib's. Each direction begins with a preamble, then come
records::

    preamble, 32 bytes
     0  8s   magic           89 "VFLIVE" 0A
     8  u16  format version  1
    10  u16  pipe            0: the first; 1 and more: one that carries guest memory alone, beside the first
    12  16s  token           which migration it is: the source's choice, the answers repeat it
    28  u32  CRC-32          of bytes 0-27

    record, 32 bytes and the payload
     0  u16  kind
     2  u16  flags           1: the payload is compressed as ACCEPT says
     4  u32  number          of a device, of a SETTLE and its answer; 0 elsewhere
     8  u64  address         of guest memory; 0 elsewhere
    16  u32  size            in bytes, of the payload before compression; of ZERO, of the memory that it stands for
    20  u32  length          of the payload as it follows, in bytes
    24  u32  CRC-32          of the payload as it follows
    28  u32  CRC-32          of bytes 0-27
    32       payload

MEMORY that is not compressed may be summed up and sent as it lies there: to copy it first would cost as much again. The
guest may write in between. Then the sum is wrong, and the destination, which cannot tell that from damage on the way,
takes nothing of such a torn record. SETTLED names it, and the source sends a copy; all must have come whole before
LOAD. Any other wrong sum ends the migration at once.

``RULES`` says what each kind carries, ``ORDER`` what may come when in the first pipe, ``ORDER_BESIDE`` in the others,
from BEGUN on; these end before LOAD. The source sends the kinds below 0x100, the
destination answers by the others. Nothing follows END, ABORT, or an answer of REFUSED, FAILED or ABORTED.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from importlib import import_module
from itertools import groupby
from typing import NamedTuple

import msgspec

from vfio_user.errors import StreamError, UsageError
from vfio_user.live.offer import MAX_DEVICES, Offer
from vfio_user.migration.checksum import crc32

MAGIC = b"\x89VFLIVE\n"
FORMAT_VERSION = 1
MAX_PAYLOAD = 1 << 20
"""Most bytes of memory, or of a device's stream, in one record."""
MAX_TORN = 4096
"""Most records that a pipe carries between two SETTLE and that may come torn."""
LARGE = 64 << 10
"""Bytes from which on a copy of memory costs more than to send again what comes torn."""
MAX_JSON = 64 << 10
MAX_TEXT = 4 << 10

COMPRESSED = 1
"""The flag of a record."""

_PREAMBLE = struct.Struct("<8sHH16s")
_HEADER = struct.Struct("<HHIQIII")
_CRC = struct.Struct("<I")
HEADER_SIZE = _HEADER.size + _CRC.size
PREAMBLE_SIZE = _PREAMBLE.size + _CRC.size

_PAGE = bytes(4096)
"""What is looked for when memory is sent."""
_SAVES = 0.9
"""A payload that compression leaves above this part of its size goes as it is."""

Octets = bytes | bytearray | memoryview


class Kind(IntEnum):
    """``kind`` of a record."""

    OFFER = 0x01
    BEGIN = 0x02
    MEMORY = 0x03
    ZERO = 0x04
    DEVICE = 0x05
    SETTLE = 0x06
    LOAD = 0x07
    START = 0x08
    END = 0x09
    ABORT = 0x0A
    ACCEPT = 0x101
    BEGUN = 0x102
    SETTLED = 0x106
    LOADED = 0x107
    STARTED = 0x108
    ABORTED = 0x10A
    REFUSED = 0x10E
    FAILED = 0x10F


@dataclass(frozen=True, slots=True)
class Rule:
    """What a kind of record carries; what it does not use is 0."""

    sizes: range = range(1)
    """Of what it stands for, in bytes."""
    numbers: range = range(1)
    addressed: bool = False
    compressible: bool = False
    payload: bool = True
    """Whether what it stands for follows."""


_BULK = range(1, MAX_PAYLOAD + 1)
_ANY_NUMBER = range(1 << 32)

RULES = {
    Kind.OFFER: Rule(range(MAX_JSON + 1)),  # Proposal as JSON
    Kind.BEGIN: Rule(),
    Kind.MEMORY: Rule(_BULK, addressed=True, compressible=True),
    Kind.ZERO: Rule(_BULK, addressed=True, payload=False),
    Kind.DEVICE: Rule(_BULK, numbers=range(MAX_DEVICES), compressible=True),
    Kind.SETTLE: Rule(numbers=_ANY_NUMBER),
    Kind.LOAD: Rule(),
    Kind.START: Rule(),
    Kind.END: Rule(),  # the source knows that the destination runs
    Kind.ABORT: Rule(),
    Kind.ACCEPT: Rule(range(MAX_JSON + 1)),  # Acceptance as JSON
    Kind.BEGUN: Rule(),
    Kind.SETTLED: Rule(range(0, 8 * MAX_TORN + 1, 8), numbers=_ANY_NUMBER),  # u64 each: addresses of torn MEMORY
    Kind.LOADED: Rule(),
    Kind.STARTED: Rule(),
    Kind.ABORTED: Rule(),
    Kind.REFUSED: Rule(range(MAX_TEXT + 1)),  # why, in UTF-8; nothing was changed
    Kind.FAILED: Rule(range(MAX_TEXT + 1)),  # why, in UTF-8; the destination does not run, and will not
}


class State(Enum):
    """How far a migration has come, as its destination sees it."""

    OPEN = "not offered yet"
    ACCEPTED = "accepted"
    FILLING = "under way"
    LOADED = "loaded"
    STARTED = "over: the destination runs"
    ENDED = "over"


ORDER = {
    State.OPEN: {Kind.OFFER: State.ACCEPTED},
    State.ACCEPTED: {Kind.BEGIN: State.FILLING, Kind.ABORT: State.ENDED},
    State.FILLING: {
        Kind.MEMORY: State.FILLING,
        Kind.ZERO: State.FILLING,
        Kind.DEVICE: State.FILLING,
        Kind.SETTLE: State.FILLING,
        Kind.LOAD: State.LOADED,
        Kind.ABORT: State.ENDED,
    },
    State.LOADED: {Kind.START: State.STARTED, Kind.ABORT: State.ENDED},
    State.STARTED: {Kind.END: State.ENDED},
    State.ENDED: {},
}
"""What may come in a state, and where it leads."""

ORDER_BESIDE = {
    State.FILLING: {
        Kind.MEMORY: State.FILLING,
        Kind.ZERO: State.FILLING,
        Kind.SETTLE: State.FILLING,
        Kind.END: State.ENDED,
    },
}
"""The same, of a pipe of memory alone."""


class Proposal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payload of OFFER: what moves, the compressions that the source knows, the best first, and how it comes."""

    offer: Offer
    compressions: list[str] = []
    memory_pipes: int = 0


class Acceptance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payload of ACCEPT."""

    compression: str | None = None


class Record(NamedTuple):
    """A record as it came, its payload as it was before compression. That is valid until more is received."""

    kind: Kind
    number: int
    address: int
    size: int
    payload: memoryview
    torn: bool = False
    """It is MEMORY that was written to while it was sent, or damaged: there is no payload."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """What SETTLED says: those of the records that came torn through this pipe."""
        return struct.unpack(f"<{len(self.payload) // 8}Q", self.payload)

    @property
    def text(self) -> str:
        """What REFUSED and FAILED say. It came from elsewhere: what a terminal would obey is left out."""
        return printable(bytes(self.payload).decode(errors="replace"))


def printable(text: str, instead: str = "\ufffd") -> str:
    """``text`` in one line, with ``instead`` for each control character."""
    return "".join(one if one.isprintable() else instead for one in text)


class Codec(NamedTuple):
    """A compression. Both raise StreamError or return; ``decompress`` takes the size that must come out."""

    compress: Callable[[Octets], bytes]
    decompress: Callable[[memoryview, int], bytes]


def _zstd() -> Codec:
    zstandard = import_module("zstandard")  # an extra: nobody needs to have it, nor its types
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def decompress(data: memoryview, size: int) -> bytes:
        try:
            # What a frame says of its size is allocated at once: it must be what the record's header says.
            if zstandard.frame_content_size(data) != size:
                raise StreamError("a compressed record is not of the size that it says")
            whole: bytes = decompressor.decompress(data, allow_extra_data=False)
            return whole
        except zstandard.ZstdError as error:
            raise StreamError(f"a record cannot be decompressed: {error}") from error

    return Codec(compressor.compress, decompress)


_CODECS: dict[str, Callable[[], Codec]] = {"zstd": _zstd}


def compressions() -> list[str]:
    """The names of the compressions that are installed."""
    return [name for name in _CODECS if _codec(name) is not None]


def codec(name: str) -> Codec:
    """The compression of this name. Raises UsageError for one that is not installed."""
    if (found := _codec(name)) is None:
        raise UsageError(f"compression {name!r} is not installed: pip install 'vfio-user[zstd]'")
    return found


def _codec(name: str) -> Codec | None:
    try:
        return _CODECS[name]()
    except (KeyError, ImportError):
        return None


def pack_preamble(token: bytes, pipe: int = 0) -> bytes:
    fields = _PREAMBLE.pack(MAGIC, FORMAT_VERSION, pipe, token)
    return fields + _CRC.pack(crc32(fields))


def pack(
    kind: Kind, payload: Octets = b"", *, number: int = 0, address: int = 0, size: int | None = None, flags: int = 0
) -> list[Octets]:
    """A record, as the buffers to send. ``size`` differs from the payload's where that is compressed or left out."""
    fields = _HEADER.pack(
        kind, flags, number, address, len(payload) if size is None else size, len(payload), crc32(payload)
    )
    head = fields + _CRC.pack(crc32(fields))
    return [head, payload] if payload else [head]


def pack_settled(number: int, torn: Collection[int]) -> list[Octets]:
    """SETTLED, with at most MAX_TORN addresses."""
    return pack(Kind.SETTLED, struct.pack(f"<{len(torn)}Q", *torn), number=number)


def pack_text(kind: Kind, text: str) -> list[Octets]:
    """REFUSED or FAILED, cut to what such a record holds."""
    return pack(kind, text.encode(errors="replace")[:MAX_TEXT])


def pack_bulk(kind: Kind, data: Octets, codec: Codec | None, *, number: int = 0, address: int = 0) -> list[Octets]:
    """A record of MEMORY or DEVICE, compressed where that is worth it. ``data`` must not change until it is sent.

    Unless it is MEMORY, which then is torn.
    """
    if codec is not None:
        small = codec.compress(data)
        if len(small) < _SAVES * len(data):
            return pack(kind, small, number=number, address=address, size=len(data), flags=COMPRESSED)
    return pack(kind, data, number=number, address=address)


def pack_memory(
    address: int, data: memoryview, codec: Codec | None, exposed: list[tuple[int, memoryview]] | None = None
) -> Iterator[list[Octets]]:
    """The records for memory at ``address``, at most MAX_PAYLOAD of it: pages of zeros are only named.

    ``data`` is the guest's and may change at any time. It is copied; or what is LARGE goes as it lies, and is added to
    ``exposed`` as (address, memory).
    """
    for start, stop, zero in _runs(data):
        part = data[start:stop]
        if zero:
            yield pack(Kind.ZERO, address=address + start, size=len(part))
        elif exposed is None or len(part) < LARGE:
            yield pack_bulk(Kind.MEMORY, bytes(part), codec, address=address + start)
        else:
            exposed.append((address + start, part))
            yield pack_bulk(Kind.MEMORY, part, codec, address=address + start)


def _runs(data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Where pages of zeros and other ones begin and end. What is no whole page at the end is no page of zeros."""
    size = len(_PAGE)
    firsts = bytes(data[: len(data) // size * size : size])
    zeros = bytearray(-(-len(data) // size))
    page = firsts.find(0)  # most pages begin with something else: only the others are looked at
    while page >= 0:
        zeros[page] = _PAGE.startswith(data[page * size : (page + 1) * size])  # which compares all of it
        page = firsts.find(0, page + 1)
    first = 0
    for zero, run in groupby(zeros) if any(zeros) else [(0, zeros)]:
        last = first + len(list(run))
        yield first * size, min(last * size, len(data)), bool(zero)
        first = last


class RecordReader:
    """Cuts one direction of a pipe into records.

    What is received goes into :meth:`space`, then :meth:`received`; :meth:`next` gives record after record. It keeps
    one record and a little more, whatever comes in: a header is checked before anything is kept for it. ``codec``
    decompresses; it is agreed upon in the first records. ``beside``: it is a pipe of memory alone.
    """

    def __init__(self, *, beside: bool = False) -> None:
        self._beside = beside
        self.codec: Codec | None = None
        self.token: bytes | None = None
        """That of the preamble, once it has come."""
        self._buffer = memoryview(bytearray(2 * (HEADER_SIZE + MAX_PAYLOAD)))
        self._start = self._end = 0
        self._needed = PREAMBLE_SIZE
        self._head: tuple[Kind, int, int, int, int, int, int] | None = None

    @property
    def pending(self) -> int:
        """Bytes that have come and were not handed out."""
        return self._end - self._start

    @property
    def mid_record(self) -> bool:
        """Whether a part of a record waits for its rest."""
        return self.pending > 0 or self._head is not None

    def space(self) -> memoryview:
        """Where the next bytes go; never empty, and the payloads handed out before are gone."""
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + self._needed > len(self._buffer):
            rest = self.pending
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        # Of a record that has begun no more than it needs: then the next begins at the front, and nothing is moved.
        return self._buffer[self._end : self._start + self._needed if self.pending else None]

    def received(self, count: int) -> None:
        self._end += count

    def next(self) -> Record | None:
        """The next record, or None until more has come. Raises StreamError for what is none."""
        if self.token is None:
            if self.pending < PREAMBLE_SIZE:
                return None
            self.token = _check_preamble(self._take(PREAMBLE_SIZE), self._beside)
            self._needed = HEADER_SIZE
        if self._head is None:
            if self.pending < HEADER_SIZE:
                return None
            self._head = _check_header(self._take(HEADER_SIZE), compressed=self.codec is not None)
            self._needed = self._head[5]
        kind, flags, number, address, size, length, crc = self._head
        if self.pending < length:
            return None
        payload = self._take(length)
        self._head, self._needed = None, HEADER_SIZE
        if crc32(payload) != crc:
            if kind is Kind.MEMORY and not flags:
                return Record(kind, number, address, size, payload[:0], torn=True)
            raise StreamError(f"wrong checksum of a {kind.name} record of {length} bytes")
        if flags & COMPRESSED and self.codec is not None:
            payload = memoryview(self.codec.decompress(payload, size))
        return Record(kind, number, address, size, payload)

    def _take(self, count: int) -> memoryview:
        self._start += count
        return self._buffer[self._start - count : self._start]


def _check_preamble(data: memoryview, beside: bool) -> bytes:
    magic, version, pipe, token = _PREAMBLE.unpack_from(data)
    if magic != MAGIC:
        raise StreamError(f"not a migration: what comes begins with {bytes(data)!r}")
    if crc32(data[: _PREAMBLE.size]) != _CRC.unpack_from(data, _PREAMBLE.size)[0]:
        raise StreamError("wrong checksum of the preamble")
    if version != FORMAT_VERSION:
        raise StreamError(f"a migration of format {version}; known is {FORMAT_VERSION}")
    if bool(pipe) is not beside:
        raise StreamError(
            f"pipe {pipe} of a migration where {'one of memory alone' if beside else 'the first'} belongs"
        )
    return bytes(token)


def _check_header(data: memoryview, *, compressed: bool) -> tuple[Kind, int, int, int, int, int, int]:
    if crc32(data[: _HEADER.size]) != _CRC.unpack_from(data, _HEADER.size)[0]:
        raise StreamError("wrong checksum of a record's header")
    number_of_kind, flags, number, address, size, length, crc = _HEADER.unpack_from(data)
    try:
        kind = Kind(number_of_kind)
    except ValueError:
        raise StreamError(f"unknown kind {number_of_kind:#x} of record") from None
    rule = RULES[kind]
    lengths = (
        range(1, size) if flags & COMPRESSED else range(size, size + 1) if rule.payload else range(1)
    )  # what compression does not make smaller goes as it is
    sound = {
        "flags": not flags or (flags == COMPRESSED and rule.compressible and compressed),
        "number": number in rule.numbers,
        "address": address + size <= 1 << 64 if rule.addressed else not address,
        "size": size in rule.sizes,
        "length": length in lengths,
    }
    if wrong := [name for name, good in sound.items() if not good]:
        raise StreamError(f"{kind.name} record with a wrong {' and '.join(wrong)}")
    return kind, flags, number, address, size, length, crc
