"""The migration data stream of a ``Device``: what it saves, byte by byte, and how that is checked.

The protocol leaves the stream to the device. This one is versioned, checksummed, bounded and deterministic: the
same records give the same bytes. All integers are little-endian, nothing is padded; a CRC-32 is zlib's.

A stream is one header, any number of records, and one END record::

    header, 24 bytes
     0  8s   magic           89 "VFUMIG" 0A
     8  u16  format version  1
    10  u16  flags           0
    12  u16  vendor ID       of the device that was saved
    14  u16  device ID
    16  u32  state version   the device's own; a device decides how old a state it still loads
    20  u32  CRC-32          of bytes 0-19

    record, 16 bytes and the payload
     0  u32  kind
     4  u32  CRC-32          of kind, length and payload, in this order
     8  u64  length          of the payload in bytes
    16       payload

    kind        payload
    1           PRE_COPY     any bytes, sent while the device still runs; any number of records
    2           STATE        any bytes; exactly one record in a stream
    3           MEMORY       u32 region, u32 0, u64 offset in the region, then at most 1 MiB of its contents
    FFFFFFFF    END          u64 number of records before this one, u32 CRC-32 of the header and of the first 16 bytes
                             of each of these records, which have the checksums of all the rest

Nothing may follow END. A stream has at most 2^20 records, END not counted.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import msgspec

from vfio_user.errors import StreamError, UsageError
from vfio_user.migration.checksum import crc32

MAGIC = b"\x89VFUMIG\n"
FORMAT_VERSION = 1
MAX_MEMORY_BLOCK = 1 << 20
"""Most bytes of a region's contents in one MEMORY record."""
MAX_RECORDS = 1 << 20
"""Most records before END: bounds what a reader keeps beside the payloads."""
MAX_STATE_DEPTH = 32
"""Deepest nesting of lists and dicts in an encoded state."""

_HEADER = struct.Struct("<8sHHHHI")
_HEADER_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<IIQ")
_RECORD_SUMMED = struct.Struct("<IQ")
_MEMORY = struct.Struct("<IIQ")
_END = struct.Struct("<QI")

_HEADER_SIZE = _HEADER.size + _HEADER_CRC.size
_END_SIZE = _RECORD.size + _END.size

_U16, _U32, _U64 = 1 << 16, 1 << 32, 1 << 64

_SCALARS = frozenset({bytes, str, bool, float, type(None)})
_CONTAINERS = frozenset({list, dict})

Octets: TypeAlias = bytes | bytearray | memoryview
"""What carries bytes: a C-contiguous buffer."""


class RecordKind(IntEnum):
    """``kind`` of a record."""

    PRE_COPY = 1
    STATE = 2
    MEMORY = 3
    END = 0xFFFFFFFF


_PAYLOAD_SIZES = {
    RecordKind.PRE_COPY: (0, _U64 - 1),
    RecordKind.STATE: (0, _U64 - 1),
    RecordKind.MEMORY: (_MEMORY.size, _MEMORY.size + MAX_MEMORY_BLOCK),
    RecordKind.END: (_END.size, _END.size),
}
"""The least and the greatest length of a payload, whatever the reader's limit."""


@dataclass(frozen=True, slots=True)
class StreamIdentity:
    """Which device a stream belongs to, and the version of its state."""

    vendor_id: int
    device_id: int
    state_version: int

    def __post_init__(self) -> None:
        for name, bound in (("vendor_id", _U16), ("device_id", _U16), ("state_version", _U32)):
            value = getattr(self, name)
            if not 0 <= value < bound:
                raise UsageError(f"{name} {value:#x} does not fit into {bound.bit_length() - 1} bits")

    def __str__(self) -> str:
        return f"{self.vendor_id:04x}:{self.device_id:04x}"


class MemoryBlock(NamedTuple):
    """Contents of a region from ``offset`` on."""

    region: int
    offset: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class LoadedStream:
    """A stream that was read whole and found sound. The records of each kind are in the stream's order."""

    pre_copy: list[bytes]
    state: bytes | bytearray
    memory: list[MemoryBlock]
    state_version: int


def _octets(data: Octets) -> memoryview:
    """A flat view of bytes, whatever the shape and item type of ``data``."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _record_crc(kind: int, length: int, *payload: Octets) -> int:
    crc = crc32(_RECORD_SUMMED.pack(kind, length))
    for part in payload:
        crc = crc32(part, crc)
    return crc


class _Record(NamedTuple):
    """A record that waits to be read: its payload is ``prefix`` and then ``body``."""

    kind: RecordKind
    prefix: bytes
    body: memoryview

    @property
    def size(self) -> int:
        return _RECORD.size + len(self.prefix) + len(self.body)


class StreamWriter:
    """Makes the stream out of records, as it is read.

    A payload is neither copied nor looked at before its turn comes in :meth:`read_into`. Until then it must not
    change; one that changes halfway gives a stream that a reader refuses.
    """

    def __init__(self, identity: StreamIdentity) -> None:
        fields = (identity.vendor_id, identity.device_id, identity.state_version)
        header = _HEADER.pack(MAGIC, FORMAT_VERSION, 0, *fields)
        header += _HEADER_CRC.pack(crc32(header))
        self._records: deque[_Record] = deque()
        self._parts: deque[memoryview] = deque([memoryview(header)])
        self._pending = len(header)
        self._count = 0
        self._crc = crc32(header)
        self._has_state = False
        self._ended = False

    @property
    def pending(self) -> int:
        """Bytes that were added and not read yet, for MIG_DATA_SIZE."""
        return self._pending

    def add_pre_copy(self, payload: Octets) -> None:
        """Add a PRE_COPY record. Raises :class:`UsageError` after :meth:`end`."""
        self._add(RecordKind.PRE_COPY, b"", _octets(payload))

    def add_state(self, payload: Octets) -> None:
        """Add the STATE record. Raises :class:`UsageError` for a second one, or after :meth:`end`."""
        if self._has_state:
            raise UsageError("a stream has one STATE record")
        self._add(RecordKind.STATE, b"", _octets(payload))
        self._has_state = True

    def add_memory(self, region: int, offset: int, view: Octets) -> None:
        """Add the contents of a region from ``offset`` on, in as many MEMORY records as they need.

        Raises :class:`UsageError` for a region or a range that the record cannot name, or after :meth:`end`.
        """
        data = _octets(view)
        if not 0 <= region < _U32:
            raise UsageError(f"region {region} does not fit into 32 bits")
        if not 0 <= offset <= _U64 - len(data):
            raise UsageError(f"{len(data)} bytes at offset {offset:#x} do not fit into 64 bits")
        for start in range(0, len(data), MAX_MEMORY_BLOCK):
            block = data[start : start + MAX_MEMORY_BLOCK]
            self._add(RecordKind.MEMORY, _MEMORY.pack(region, 0, offset + start), block)

    def end(self) -> None:
        """Say that nothing follows. Raises :class:`UsageError` if there is no state, or if it was said before."""
        if not self._has_state:
            raise UsageError("a stream needs a STATE record before its end")
        # What END carries is known only when all before it was read; its size is known now.
        self._add(RecordKind.END, bytes(_END.size), memoryview(b""))
        self._ended = True

    def read_into(self, buffer: memoryview) -> int:
        """Fill ``buffer`` with what comes next and return the number of bytes filled.

        Fewer than the buffer takes: there is no more for now, or, after :meth:`end`, for ever.
        """
        room = _octets(buffer)
        filled = 0
        while filled < len(room) and self._pending:
            part = self._next_part()
            taken = min(len(part), len(room) - filled)
            room[filled : filled + taken] = part[:taken]
            if taken < len(part):
                self._parts.appendleft(part[taken:])
            filled += taken
            self._pending -= taken
        return filled

    def _add(self, kind: RecordKind, prefix: bytes, body: memoryview) -> None:
        if self._ended:
            raise UsageError(f"a {kind.name} record after the end of the stream")
        if kind != RecordKind.END:
            if self._count == MAX_RECORDS:
                raise UsageError(f"a stream has at most {MAX_RECORDS} records")
            self._count += 1
        record = _Record(kind, prefix, body)
        self._records.append(record)
        self._pending += record.size

    def _next_part(self) -> memoryview:
        """What to send next, never empty; sums a record up when its turn comes."""
        if not self._parts:
            kind, prefix, body = self._records.popleft()
            if kind == RecordKind.END:
                prefix = _END.pack(self._count, self._crc)
            length = len(prefix) + len(body)
            head = _RECORD.pack(kind, _record_crc(kind, length, prefix, body), length)
            self._crc = crc32(head, self._crc)
            self._parts.append(memoryview(head + prefix))
            if body:
                self._parts.append(body)
        return self._parts.popleft()


class StreamReader:
    """Takes a stream in, cut anywhere, and hands it out once all of it was found sound.

    ``limit`` bounds the whole stream in bytes, and so what is kept of it: never more than ``limit``, one copy of
    the record in hand, and a small object for each of at most 2^20 records.

    A stream that was refused stays refused, and nothing of it is kept.
    """

    def __init__(self, identity: StreamIdentity, limit: int) -> None:
        self._limit = limit
        self._received = 0
        self._refusal: str | None = None
        self._loaded: LoadedStream | None = None
        self._parser = _parse(identity, limit)
        self._wanted = next(self._parser)
        self._piece = bytearray()

    @property
    def received(self) -> int:
        """Bytes of the stream so far. 0: nobody has begun to send one."""
        return self._received

    def write(self, data: Octets) -> None:
        """Take the next bytes of the stream.

        Raises :class:`StreamError` as soon as the stream cannot be a sound one for this device any more: for
        damage, another device, a newer format or state, anything after END, or more bytes than the limit.
        """
        self._check_refusal()
        view = _octets(data)
        try:
            if len(view) > self._limit - self._received:
                raise StreamError(f"migration stream longer than the limit of {self._limit} bytes")
            self._received += len(view)
            self._feed(view)
        except StreamError as error:
            self._refuse(error)
            raise

    def finish(self) -> LoadedStream:
        """What the stream holds. Raises :class:`StreamError` if it was refused or if its end has not come yet.

        A stream that is only incomplete may go on after that.
        """
        self._check_refusal()
        if self._loaded is None:
            raise StreamError(f"migration stream ends early, after {self._received} bytes")
        return self._loaded

    def _check_refusal(self) -> None:
        if self._refusal is not None:
            raise StreamError(self._refusal)

    def _refuse(self, error: StreamError) -> None:
        self._refusal = error.strerror
        self._loaded = None
        self._parser.close()
        self._piece = bytearray()

    def _feed(self, data: memoryview) -> None:
        """Cut ``data`` into the pieces that the parser asks for."""
        while self._loaded is None:
            taken = min(self._wanted - len(self._piece), len(data))
            self._piece += data[:taken]
            data = data[taken:]
            if len(self._piece) < self._wanted:
                return
            piece, self._piece = self._piece, bytearray()
            try:
                self._wanted = self._parser.send(piece)
            except StopIteration as stop:
                self._loaded = stop.value
        if data:
            raise StreamError(f"{len(data)} bytes after the end of the migration stream")


def _parse(own: StreamIdentity, limit: int) -> Generator[int, bytearray, LoadedStream]:
    """The parser: yields how many bytes it wants, is sent exactly so many, returns what it has read."""
    header = yield _HEADER_SIZE
    state_version = _check_header(header, own)
    crc = crc32(header)
    position = len(header)
    contents = _Contents()
    for count in range(MAX_RECORDS + 1):
        head = yield _RECORD.size
        position += len(head)
        number, expected, length = _RECORD.unpack(head)
        kind = _check_head(number, length, limit - position)
        payload = yield length
        position += length
        if _record_crc(kind, length, payload) != expected:
            raise StreamError(f"wrong checksum of {kind.name} record {count}, which ends at byte {position}")
        if kind == RecordKind.END:
            if _END.unpack(payload) != (count, crc):
                raise StreamError("the END record belongs to another migration stream")
            return contents.loaded(state_version)
        contents.add(kind, payload)
        crc = crc32(head, crc)
        del payload  # the contents have what they need of it: no more while the next record comes
    raise StreamError(f"migration stream of more than {MAX_RECORDS} records")


class _Contents:
    """What the records of a stream held so far."""

    def __init__(self) -> None:
        self._pre_copy: list[bytes] = []
        self._state: bytearray | None = None
        self._memory: list[MemoryBlock] = []

    def add(self, kind: RecordKind, payload: bytearray) -> None:
        if kind == RecordKind.MEMORY:
            self._memory.append(_memory_block(payload))
        elif kind == RecordKind.PRE_COPY:
            self._pre_copy.append(bytes(payload))
        elif self._state is None:
            self._state = payload
        else:
            raise StreamError("migration stream with a second STATE record")

    def loaded(self, state_version: int) -> LoadedStream:
        if self._state is None:
            raise StreamError("migration stream without a STATE record")
        return LoadedStream(self._pre_copy, self._state, self._memory, state_version)


def _check_header(header: bytearray, own: StreamIdentity) -> int:
    """Refuse a header that is damaged or not ours to load. Returns the version of the state behind it."""
    magic, version, flags, vendor, device, state_version = _HEADER.unpack_from(header)
    (expected,) = _HEADER_CRC.unpack_from(header, _HEADER.size)
    if magic != MAGIC:
        raise StreamError(f"not a migration stream: it begins with {magic.hex(' ')}")
    if not 1 <= version <= FORMAT_VERSION:
        raise StreamError(f"migration stream of format {version}; known is up to {FORMAT_VERSION}")
    if crc32(header[: _HEADER.size]) != expected:
        raise StreamError("wrong checksum of the migration stream's header")
    if flags:
        raise StreamError(f"unknown flags {flags:#x} in the migration stream's header")
    if (vendor, device) != (own.vendor_id, own.device_id):
        raise StreamError(f"migration stream of device {vendor:04x}:{device:04x}; this is {own}")
    if state_version > own.state_version:
        raise StreamError(f"migration stream with state version {state_version}; known is up to {own.state_version}")
    return int(state_version)


def _check_head(number: int, length: int, room: int) -> RecordKind:
    """Refuse a record by its head, before anything of its payload is kept. ``room``: bytes that may follow."""
    try:
        kind = RecordKind(number)
    except ValueError:
        raise StreamError(f"unknown record kind {number:#x} in the migration stream") from None
    least, greatest = _PAYLOAD_SIZES[kind]
    if not least <= length <= greatest:
        raise StreamError(f"{kind.name} record with a payload of {length} bytes")
    behind = 0 if kind == RecordKind.END else _END_SIZE
    if length + behind > room:
        raise StreamError(f"{kind.name} record with a payload of {length} bytes exceeds the limit")
    return kind


def _memory_block(payload: bytearray) -> MemoryBlock:
    region, reserved, offset = _MEMORY.unpack_from(payload)
    data = memoryview(payload)[_MEMORY.size :].toreadonly()
    if reserved:
        raise StreamError(f"MEMORY record with {reserved:#x} where 0 belongs")
    if offset + len(data) > _U64:
        raise StreamError(f"MEMORY record with {len(data)} bytes at offset {offset:#x}: beyond 64 bits")
    return MemoryBlock(region, offset, data)


def encode_state(fields: dict[str, object]) -> bytes:
    """Declared state as MessagePack, for a STATE record: the fields in the order given.

    Values are exactly bytes, int (64 bits, signed or unsigned), str, bool, None, float, and lists and dicts (keys:
    str or int) of these, nested at most 32 deep; so what is decoded equals what was encoded, types included.
    Anything else raises :class:`StreamError`, which names the field.
    """
    _check_fields(fields)
    try:
        return msgspec.msgpack.encode(fields)
    except ValueError as error:  # text that is not Unicode, a value of 4 GiB
        raise StreamError(f"device state cannot be encoded: {error}") from error


def decode_state(data: Octets) -> dict[str, object]:
    """The fields that :func:`encode_state` has encoded. Raises :class:`StreamError` for anything else."""
    try:
        fields: dict[str, object] = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StreamError(f"device state cannot be decoded: {error}") from error
    _check_fields(fields)
    return fields


def _check_fields(fields: object) -> None:
    if type(fields) is not dict:
        raise StreamError(f"device state is a {type(fields).__name__}; it must be a dict")
    for name, value in fields.items():
        if type(name) is not str:
            raise StreamError(f"device state has a field named {name!r}; names are str")
        _check_value(value, name, MAX_STATE_DEPTH - 1)


def _check_value(value: object, field: str, depth: int) -> None:
    """Refuse a value that the encoding does not carry, or that would come back as another type."""
    if type(value) in _CONTAINERS and not depth:
        raise StreamError(f"state field {field!r} is nested more than {MAX_STATE_DEPTH} deep")
    if type(value) is int:
        _check_int(value, field)
    elif type(value) is list:
        for item in value:
            _check_value(item, field, depth - 1)
    elif type(value) is dict:
        for key, item in value.items():
            _check_key(key, field)
            _check_value(item, field, depth - 1)
    elif type(value) not in _SCALARS:
        raise StreamError(f"state field {field!r} holds a {type(value).__name__}, which cannot be saved")


def _check_key(key: object, field: str) -> None:
    if type(key) is int:
        _check_int(key, field)
    elif type(key) is not str:
        raise StreamError(f"state field {field!r} has a {type(key).__name__} as a key; keys are str or int")


def _check_int(value: int, field: str) -> None:
    if not -_U64 // 2 <= value < _U64:
        raise StreamError(f"state field {field!r} holds {value:#x}, which does not fit into 64 bits")
