"""The data stream: round trips at any cut, and refusal of everything that is not a whole, sound stream."""

from __future__ import annotations

import errno
import itertools
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import IntEnum

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.errors import StreamError, UsageError
from vfio_user.migration import (
    LoadedStream,
    MemoryBlock,
    StreamIdentity,
    StreamReader,
    StreamWriter,
    decode_state,
    encode_state,
    stream,
)

IDENTITY = StreamIdentity(vendor_id=0x494F, device_id=0x0DC8, state_version=3)
LIMIT = 1 << 16
MIB = 1 << 20

PRE_COPY, STATE, MEMORY, END = 1, 2, 3, 0xFFFFFFFF


# ---------------------------------------------------------------- the format, written down a second time


def raw_header(
    magic: bytes = b"\x89VFUMIG\n",
    version: int = 1,
    flags: int = 0,
    vendor: int = 0x494F,
    device: int = 0x0DC8,
    state_version: int = 3,
) -> bytes:
    head = magic + struct.pack("<HHHHI", version, flags, vendor, device, state_version)
    return head + struct.pack("<I", zlib.crc32(head))


def raw_record(kind: int, payload: bytes) -> bytes:
    summed = struct.pack("<IQ", kind, len(payload)) + payload
    return struct.pack("<IIQ", kind, zlib.crc32(summed), len(payload)) + payload


def raw_memory(region: int, offset: int, data: bytes, reserved: int = 0) -> bytes:
    return raw_record(MEMORY, struct.pack("<IIQ", region, reserved, offset) + data)


def raw_end(before: bytes, count: int) -> bytes:
    """``before``: the header, and the records, of which the first 16 bytes count."""
    summed, rest = before[:24], before[24:]
    while rest:
        summed += rest[:16]
        rest = rest[16 + struct.unpack_from("<Q", rest, 8)[0] :]
    return raw_record(END, struct.pack("<QI", count, zlib.crc32(summed)))


def raw_stream(*records: bytes, header: bytes | None = None) -> bytes:
    before = (raw_header() if header is None else header) + b"".join(records)
    return before + raw_end(before, len(records))


SMALL = raw_stream(raw_record(PRE_COPY, b"pre"), raw_memory(0, 0x10, b"memory"), raw_record(STATE, b"state"))
"""A stream with a record of each kind."""


# ---------------------------------------------------------------- helpers


def drain(writer: StreamWriter, sizes: Iterator[int]) -> bytes:
    """Read a writer dry, with buffers of these sizes."""
    out = b""
    while writer.pending:
        before = writer.pending
        buffer = bytearray(next(sizes))
        got = writer.read_into(memoryview(buffer))
        assert got == min(len(buffer), before), "short although there is more"
        assert writer.pending == before - got
        assert not any(buffer[got:])
        out += buffer[:got]
    return out


def forever(size: int) -> Iterator[int]:
    while True:
        yield size


def cut(data: bytes, at: list[int]) -> list[bytes]:
    ends = [0, *sorted(min(a, len(data)) for a in at), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def load(data: bytes | bytearray, identity: StreamIdentity = IDENTITY, limit: int = LIMIT) -> LoadedStream:
    return load_pieces(StreamReader(identity, limit), [data])


def load_pieces(reader: StreamReader, pieces: Iterable[bytes | bytearray]) -> LoadedStream:
    for piece in pieces:
        reader.write(piece)
    return reader.finish()


def refused(data: bytes, match: str | None = None, limit: int = LIMIT) -> None:
    """The stream is refused while it is written, not only when it is finished; and it stays refused."""
    reader = StreamReader(IDENTITY, limit)
    with pytest.raises(StreamError, match=match) as caught:
        reader.write(data)
    assert caught.value.errno == errno.EINVAL
    for again in (reader.finish, lambda: reader.write(b""), lambda: reader.write(SMALL)):
        with pytest.raises(StreamError, match=match):
            again()


blobs = st.binary(max_size=40)
blocks = st.builds(
    MemoryBlock, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 41), st.binary(min_size=1, max_size=40)
)
records = st.lists(st.one_of(st.tuples(st.just(PRE_COPY), blobs), st.tuples(st.just(MEMORY), blocks)), max_size=6)


def add(writer: StreamWriter, kind: int, content: object) -> None:
    if kind == PRE_COPY:
        assert isinstance(content, bytes)
        writer.add_pre_copy(content)
    else:
        assert isinstance(content, MemoryBlock)
        writer.add_memory(content.region, content.offset, memoryview(content.data))


def build(before: list[tuple[int, object]], state: bytes, after: list[tuple[int, object]]) -> StreamWriter:
    writer = StreamWriter(IDENTITY)
    for kind, content in before:
        add(writer, kind, content)
    writer.add_state(state)
    for kind, content in after:
        add(writer, kind, content)
    writer.end()
    return writer


# ---------------------------------------------------------------- the bytes


def test_the_bytes_are_the_documented_ones() -> None:
    writer = StreamWriter(IDENTITY)
    writer.add_pre_copy(b"pre")
    writer.add_memory(0, 0x10, memoryview(b"memory"))
    writer.add_state(b"state")
    writer.end()
    assert drain(writer, forever(64)) == SMALL
    assert SMALL[:20].hex() == "895646554d49470a010000004f49c80d03000000"


def test_a_reader_takes_the_documented_bytes() -> None:
    assert load(SMALL) == LoadedStream([b"pre"], b"state", [MemoryBlock(0, 0x10, b"memory")], 3)


@given(records, blobs, records, st.data())
def test_round_trip_at_any_cut(
    before: list[tuple[int, object]], state: bytes, after: list[tuple[int, object]], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any))
    written = drain(build(before, state, after), (size for _ in forever(0) for size in sizes))
    assert written == drain(build(before, state, after), forever(1 << 12)), "the cuts show"

    reader = StreamReader(IDENTITY, len(written))
    for piece in cut(written, data.draw(st.lists(st.integers(0, len(written)), max_size=8))):
        reader.write(memoryview(piece))
    assert reader.received == len(written)
    loaded = reader.finish()
    everything = before + after
    assert loaded.state == state
    assert loaded.state_version == 3
    assert loaded.pre_copy == [content for kind, content in everything if kind == PRE_COPY]
    assert loaded.memory == [content for kind, content in everything if kind == MEMORY]


def test_byte_by_byte() -> None:
    reader = StreamReader(IDENTITY, LIMIT)
    assert load_pieces(reader, (SMALL[number : number + 1] for number in range(len(SMALL)))) == load(SMALL)


def test_the_smallest_stream() -> None:
    data = drain(build([], b"", []), forever(7))
    assert len(data) == 24 + 16 + 28
    assert load(data) == LoadedStream([], b"", [], 3)


# ---------------------------------------------------------------- the writer


def test_short_for_now_and_short_for_ever() -> None:
    writer = StreamWriter(IDENTITY)
    buffer = memoryview(bytearray(100))
    assert (writer.pending, writer.read_into(buffer), writer.pending) == (24, 24, 0)
    assert writer.read_into(buffer) == 0
    writer.add_pre_copy(b"more")
    assert (writer.pending, writer.read_into(buffer), writer.pending) == (20, 20, 0)
    writer.add_state(b"")
    writer.end()
    assert (writer.pending, writer.read_into(buffer), writer.pending) == (44, 44, 0)
    assert writer.read_into(buffer) == 0
    assert writer.read_into(buffer[:0]) == 0


def test_memory_is_split_into_blocks_of_one_mib() -> None:
    contents = bytes(range(256)) * (10 * MIB // 1024)
    assert len(contents) == 2 * MIB + MIB // 2
    writer = StreamWriter(IDENTITY)
    writer.add_memory(2, 0x1000, memoryview(contents))
    writer.add_state(b"")
    writer.end()
    loaded = load(drain(writer, forever(300_000)), limit=3 * MIB)
    assert [(block.region, block.offset, len(block.data)) for block in loaded.memory] == [
        (2, 0x1000, MIB),
        (2, 0x1000 + MIB, MIB),
        (2, 0x1000 + 2 * MIB, MIB // 2),
    ]
    assert b"".join(block.data for block in loaded.memory) == contents


def test_memory_is_referenced_until_it_is_read() -> None:
    contents = bytearray(64)
    writer = StreamWriter(IDENTITY)
    writer.add_memory(0, 0, memoryview(contents))
    contents[:] = b"\x55" * 64
    writer.add_state(b"")
    writer.end()
    with pytest.raises(BufferError):
        contents.append(0)
    data = drain(writer, forever(16))
    contents.append(0)  # released once it was read
    assert load(data).memory == [MemoryBlock(0, 0, b"\x55" * 64)]


def test_memory_that_changes_halfway_is_noticed() -> None:
    contents = bytearray(64)
    writer = StreamWriter(IDENTITY)
    writer.add_memory(0, 0, memoryview(contents))
    writer.add_state(b"")
    writer.end()
    first = bytearray(24 + 32 + 10)
    assert writer.read_into(memoryview(first)) == len(first)
    contents[60] = 1
    refused(bytes(first) + drain(writer, forever(16)), "wrong checksum of MEMORY record 0")


def test_a_view_of_any_item_type_is_bytes() -> None:
    writer = StreamWriter(IDENTITY)
    words = memoryview(b"\x01\x02\x03\x04" * 4).cast("I")
    writer.add_memory(0, 0, words)
    writer.add_memory(0, 0, words[:0])  # nothing to save, no record
    writer.add_state(words)
    writer.end()
    loaded = load(drain(writer, forever(16)))
    assert loaded.state == bytes(words)
    assert loaded.memory == [MemoryBlock(0, 0, bytes(words))]


def test_the_last_byte_of_a_64_bit_region() -> None:
    writer = StreamWriter(IDENTITY)
    writer.add_memory(2**32 - 1, 2**64 - 1, b"x")
    writer.add_state(b"")
    writer.end()
    assert load(drain(writer, forever(16))).memory == [MemoryBlock(2**32 - 1, 2**64 - 1, b"x")]


@pytest.mark.parametrize(("region", "offset"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**64 - 1), (0, 2**64)])
def test_memory_that_no_record_can_name(region: int, offset: int) -> None:
    writer = StreamWriter(IDENTITY)
    with pytest.raises(UsageError):
        writer.add_memory(region, offset, b"xy")
    assert writer.pending == 24


@pytest.mark.parametrize(
    "action",
    [
        lambda writer: writer.add_pre_copy(b""),
        lambda writer: writer.add_state(b""),
        lambda writer: writer.add_memory(0, 0, b"x"),
        lambda writer: writer.end(),
    ],
)
def test_nothing_is_added_after_the_end(action: Callable[[StreamWriter], None]) -> None:
    writer = build([], b"", [])
    pending = writer.pending
    with pytest.raises(UsageError):
        action(writer)
    assert writer.pending == pending


def test_a_stream_has_one_state() -> None:
    writer = StreamWriter(IDENTITY)
    with pytest.raises(UsageError, match="needs a STATE record"):
        writer.end()
    writer.add_state(b"")
    with pytest.raises(UsageError, match="one STATE record"):
        writer.add_state(b"")


def test_too_many_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_RECORDS", 3)
    writer = StreamWriter(IDENTITY)
    writer.add_state(b"")
    writer.add_pre_copy(b"")
    writer.add_pre_copy(b"")
    with pytest.raises(UsageError, match="at most 3"):
        writer.add_pre_copy(b"")
    writer.end()
    assert load(drain(writer, forever(16))).pre_copy == [b"", b""]
    refused(raw_stream(raw_record(STATE, b""), *[raw_record(PRE_COPY, b"")] * 3), "more than 3 records")


@pytest.mark.parametrize(
    "fields", [(-1, 0, 0), (1 << 16, 0, 0), (0, -1, 0), (0, 1 << 16, 0), (0, 0, -1), (0, 0, 1 << 32)]
)
def test_an_identity_fits_its_fields(fields: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        StreamIdentity(*fields)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("position", range(len(SMALL)))
def test_every_changed_byte_is_refused(position: int) -> None:
    for change in (0x01, 0x80, 0xFF, *(1 << bit for bit in range(1, 7))):
        damaged = bytearray(SMALL)
        damaged[position] ^= change
        with pytest.raises(StreamError):
            load(damaged)


@given(records, blobs, records, st.data())
def test_any_changed_byte_of_any_stream_is_refused(
    before: list[tuple[int, object]], state: bytes, after: list[tuple[int, object]], data: st.DataObject
) -> None:
    written = bytearray(drain(build(before, state, after), forever(1 << 12)))
    position = data.draw(st.integers(0, len(written) - 1))
    written[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StreamError):
        load(written)


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_every_truncation_is_refused_until_the_rest_comes(length: int) -> None:
    reader = StreamReader(IDENTITY, LIMIT)
    reader.write(SMALL[:length])
    with pytest.raises(StreamError, match=f"ends early, after {length} bytes"):
        reader.finish()
    reader.write(SMALL[length:])
    assert reader.finish() == load(SMALL)


@pytest.mark.parametrize("extra", [b"\0", b"\x89", SMALL, raw_record(PRE_COPY, b"")])
def test_anything_behind_the_end_is_refused(extra: bytes) -> None:
    refused(SMALL + extra, "after the end")
    reader = StreamReader(IDENTITY, LIMIT)
    reader.write(SMALL)
    assert reader.finish().state == b"state"
    reader.write(b"")
    with pytest.raises(StreamError, match=f"{len(extra)} bytes after the end"):
        reader.write(extra)
    with pytest.raises(StreamError, match="after the end"):
        reader.finish()


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_noise_is_refused(noise: bytes, at: list[int]) -> None:
    reader = StreamReader(IDENTITY, LIMIT)
    with pytest.raises(StreamError):
        load_pieces(reader, cut(noise, at))


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (raw_header(magic=b"\x89VFUMIG\r"), "not a migration stream"),
        (raw_header(version=2), "format 2; known is up to 1"),
        (raw_header(version=0), "format 0"),
        (raw_header(flags=1), "flags 0x1"),
        (raw_header(vendor=0x8086), "8086:0dc8; this is 494f:0dc8"),
        (raw_header(device=1), "494f:0001; this is 494f:0dc8"),
        (raw_header(state_version=4), "state version 4; known is up to 3"),
        (raw_header()[:-1] + b"\0", "checksum of the migration stream's header"),
    ],
)
def test_a_header_that_is_not_ours_is_refused_at_once(header: bytes, match: str) -> None:
    refused(header, match)


@pytest.mark.parametrize("version", range(4))
def test_an_older_state_is_the_devices_business(version: int) -> None:
    data = raw_stream(raw_record(STATE, b"old"), header=raw_header(state_version=version))
    assert load(data).state_version == version


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (struct.pack("<IIQ", 4, 0, 0), "unknown record kind 0x4"),
        (struct.pack("<IIQ", 0, 0, 0), "unknown record kind 0x0"),
        (struct.pack("<IIQ", 0xFFFFFFFE, 0, 0), "unknown record kind 0xfffffffe"),
        (struct.pack("<IIQ", MEMORY, 0, 15), "MEMORY record with a payload of 15"),
        (struct.pack("<IIQ", END, 0, 11), "END record with a payload of 11"),
        (struct.pack("<IIQ", END, 0, 13), "END record with a payload of 13"),
        (struct.pack("<IIQ", STATE, 0, 2**64 - 1), "STATE record .* exceeds the limit"),
        (struct.pack("<IIQ", PRE_COPY, 0, LIMIT), "PRE_COPY record .* exceeds the limit"),
    ],
)
def test_a_bad_record_is_refused_by_its_head(head: bytes, match: str) -> None:
    refused(raw_header() + head, match)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (raw_header() + raw_memory(0, 0, b"x", reserved=1), "0x1 where 0 belongs"),
        (raw_header() + raw_memory(0, 2**64 - 1, b"xy"), "beyond 64 bits"),
        (raw_header() + raw_record(STATE, b"") * 2, "second STATE record"),
        (raw_stream(raw_record(PRE_COPY, b"")), "without a STATE record"),
        (raw_header() + raw_end(raw_header(), 0), "without a STATE record"),
        (raw_header() + raw_record(STATE, b"") + raw_end(raw_header(), 1), "another migration stream"),
        (raw_header() + raw_end(raw_header(), 1), "another migration stream"),
    ],
)
def test_sound_records_in_an_unsound_stream(data: bytes, match: str) -> None:
    refused(data, match)


def test_memory_comes_in_blocks_of_one_mib() -> None:
    data = raw_stream(raw_memory(0, 0, bytes(MIB)), raw_record(STATE, b""))
    assert load(data, limit=2 * MIB).memory == [MemoryBlock(0, 0, bytes(MIB))]
    refused(raw_stream(raw_memory(0, 0, bytes(MIB + 1)), raw_record(STATE, b"")), "MEMORY record", limit=2 * MIB)


def test_records_that_are_swapped_lost_or_doubled() -> None:
    one, two, state = raw_record(PRE_COPY, b"1"), raw_record(PRE_COPY, b"2"), raw_record(STATE, b"")
    whole = raw_header() + one + two + state
    end = raw_end(whole, 3)
    assert load(whole + end).pre_copy == [b"1", b"2"]
    for shuffled in (two + one + state, one + state, one + one + two + state, one + one + state):
        refused(raw_header() + shuffled + end, "another migration stream")


# ---------------------------------------------------------------- bounds


def test_the_limit_is_exact() -> None:
    assert load(SMALL, limit=len(SMALL)) == load(SMALL)
    refused(SMALL, limit=len(SMALL) - 1)
    for limit in (0, 1, 23, 24, 40):
        refused(SMALL, "limit", limit=limit)


@pytest.mark.parametrize("limit", range(24 + 16, len(SMALL)))
def test_too_long_a_stream_is_refused_before_its_last_byte_comes(limit: int) -> None:
    reader = StreamReader(IDENTITY, limit)
    with pytest.raises(StreamError, match="exceeds the limit"):
        load_pieces(reader, (SMALL[number : number + 1] for number in range(limit)))


def test_nothing_is_kept_for_a_length_that_is_only_announced() -> None:
    reader = StreamReader(IDENTITY, 1 << 50)
    reader.write(raw_header() + struct.pack("<IIQ", STATE, 0, 1 << 49))
    with pytest.raises(StreamError, match="ends early"):
        reader.finish()


def test_endless_writing_is_refused_at_the_limit() -> None:
    reader = StreamReader(IDENTITY, LIMIT)
    reader.write(raw_header())
    chunk = raw_record(PRE_COPY, bytes(1008))
    with pytest.raises(StreamError, match="limit"):
        load_pieces(reader, itertools.repeat(chunk))
    assert reader.received <= LIMIT


def test_what_is_kept_is_bounded_and_a_refused_stream_is_dropped() -> None:
    """A reader keeps what it was sent, if that; nothing once the stream is refused, even after its end."""
    whole = raw_stream(raw_record(PRE_COPY, bytes(MIB)), raw_record(STATE, bytes(MIB)))
    for data in (whole, whole[:-1], whole[: MIB + 64], whole[: 2 * MIB]):
        tracemalloc.start()
        try:
            reader = StreamReader(IDENTITY, len(whole))
            for start in range(0, len(data), 4096):
                reader.write(data[start : start + 4096])
            kept, peak = tracemalloc.get_traced_memory()
            assert kept < len(data) * 9 // 8 + 65536  # a growing bytearray is an eighth larger than it needs to be
            assert peak < len(data) + 2 * MIB
            with pytest.raises(StreamError):
                reader.write(bytes(len(whole)))
            assert tracemalloc.get_traced_memory()[0] < 65536 + len(whole) // 8
        finally:
            tracemalloc.stop()


# ---------------------------------------------------------------- declared state

integers = st.integers(-(2**63), 2**64 - 1)
values = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | integers, inner, max_size=4),
    max_leaves=12,
)


def shape(value: object) -> object:
    """A value with the types and the order that ``==`` overlooks."""
    if isinstance(value, list):
        return [shape(item) for item in value]
    if isinstance(value, dict):
        return [(type(key), key, shape(item)) for key, item in value.items()]
    return type(value), repr(value)


@given(st.dictionaries(st.text(max_size=6), values, max_size=6))
def test_state_comes_back_as_it_was(fields: dict[str, object]) -> None:
    data = encode_state(fields)
    assert shape(decode_state(data)) == shape(fields)
    assert encode_state(decode_state(data)) == data == encode_state(fields)


def test_not_a_number_comes_back() -> None:
    (value,) = decode_state(encode_state({"f": math.nan})).values()
    assert isinstance(value, float)
    assert math.isnan(value)


def nested(depth: int, wrap: Callable[[object], object]) -> object:
    value: object = 1
    for _ in range(depth):
        value = wrap(value)
    return value


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (2**64, "'f' holds 0x10000000000000000, which does not fit into 64 bits"),
        (-(2**63) - 1, "'f' holds .* 64 bits"),
        ([{"x": 2**64}], "'f' holds .* 64 bits"),
        ({2**64: 1}, "'f' holds .* 64 bits"),
        ((1, 2), "'f' holds a tuple"),
        ({1, 2}, "'f' holds a set"),
        (bytearray(b"x"), "'f' holds a bytearray"),
        (Colour.RED, "'f' holds a Colour"),
        ([object()], "'f' holds a object"),
        ({b"x": 1}, "'f' has a bytes as a key"),
        ({True: 1}, "'f' has a bool as a key"),
        ("\ud800", "cannot be encoded"),
        (nested(32, lambda value: [value]), "'f' is nested more than 32 deep"),
        (nested(32, lambda value: {"x": value}), "'f' is nested more than 32 deep"),
    ],
)
def test_what_state_cannot_hold(value: object, match: str) -> None:
    with pytest.raises(StreamError, match=match) as caught:
        encode_state({"e": 1, "f": value})
    assert caught.value.errno == errno.EINVAL


def test_the_deepest_nesting() -> None:
    fields = {"f": nested(31, lambda value: [value])}
    assert decode_state(encode_state(fields)) == fields


def test_a_state_that_holds_itself() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(StreamError, match="nested more than 32 deep"):
        encode_state({"f": loop})


def test_fields_have_names() -> None:
    with pytest.raises(StreamError, match="field named 1"):
        encode_state({1: 1})  # type: ignore[dict-item]
    with pytest.raises(StreamError, match="state is a list"):
        encode_state([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x80",
        b"\x81\xa1f",
        b"\xc1",
        b"\x81\xa1f\xa1\xff",
        b"\x81\xa1\xff\x01",
        b"\x81\x80\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1f" + b"\x91" * 100_000 + b"\x01",
        b"\x81\xa1f" + b"\x91" * 32 + b"\x01",
        b"\x81\xa1f\xc7\x01\x05a",
        b"\x81\xa1f\xd6\xff\0\0\0\0",
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode(1),
        msgspec.msgpack.encode(None),
        msgspec.msgpack.encode({1: 1}),
        msgspec.msgpack.encode({"f": {(1, 2): 3}}),
    ],
)
def test_what_is_no_state(data: bytes) -> None:
    with pytest.raises(StreamError) as caught:
        decode_state(data)
    assert caught.value.errno == errno.EINVAL


@given(st.binary(max_size=64))
def test_noise_decodes_to_state_or_is_refused(noise: bytes) -> None:
    try:
        fields = decode_state(noise)
    except StreamError:
        return
    assert shape(decode_state(encode_state(fields))) == shape(fields)


def test_an_identity_says_which_device_it_is() -> None:
    assert str(replace(IDENTITY, device_id=7)) == "494f:0007"
