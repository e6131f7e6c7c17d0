"""The records of a migration through a pipe: whole at any cut, refused when anything about them is wrong."""

from __future__ import annotations

import contextlib
import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.errors import StreamError, UsageError
from vfio_user.live import stream
from vfio_user.live.stream import MAX_PAYLOAD, ORDER, RULES, Kind, Octets, RecordReader, State

PAGE = 4096
TOKEN = bytes(range(16))

MEMORY, ZERO, DEVICE, SETTLE, START, END = 3, 4, 5, 6, 8, 9


# ---------------------------------------------------------------- the format, written down a second time


def raw_preamble(
    magic: bytes = b"\x89VFLIVE\n", version: int = 1, pipe: int = 0, token: bytes = TOKEN, crc: int | None = None
) -> bytes:
    fields = magic + struct.pack("<HH", version, pipe) + token
    return fields + struct.pack("<I", zlib.crc32(fields) if crc is None else crc)


def raw_record(
    kind: int,
    payload: bytes = b"",
    *,
    flags: int = 0,
    number: int = 0,
    address: int = 0,
    size: int | None = None,
    length: int | None = None,
) -> bytes:
    fields = struct.pack(
        "<HHIQIII",
        kind,
        flags,
        number,
        address,
        len(payload) if size is None else size,
        len(payload) if length is None else length,
        zlib.crc32(payload),
    )
    return fields + struct.pack("<I", zlib.crc32(fields)) + payload


SOUND = [
    raw_record(MEMORY, b"hello", address=0x10000),
    raw_record(ZERO, address=0x20000, size=MAX_PAYLOAD),
    raw_record(DEVICE, b"state" * 9, number=63),
    raw_record(SETTLE, number=0xFFFFFFFF),
    raw_record(START),
    raw_record(0x10F, "why: \u00fc".encode()),
]


def joined(buffers: Sequence[Octets]) -> bytes:
    return b"".join(buffers)


def feed(reader: RecordReader, data: bytes, step: int = 1 << 30) -> list[tuple[Any, ...]]:
    """Give ``data`` to the reader in steps, as a pipe does; what it makes of it."""
    found = []
    while data:
        space = reader.space()
        count = min(len(space), len(data), step)
        assert count > 0
        space[:count] = data[:count]
        reader.received(count)
        data = data[count:]
        while (record := reader.next()) is not None:
            found.append((record.kind, record.number, record.address, record.size, bytes(record.payload)))
    return found


def hailed() -> RecordReader:
    reader = RecordReader()
    assert feed(reader, raw_preamble()) == []
    assert reader.token == TOKEN
    return reader


# ---------------------------------------------------------------- whole, byte by byte, trailing


def test_the_writer_writes_what_the_format_says() -> None:
    assert stream.pack_preamble(TOKEN) == raw_preamble()
    assert [
        joined(buffers)
        for buffers in [
            stream.pack_bulk(Kind.MEMORY, b"hello", None, address=0x10000),
            stream.pack(Kind.ZERO, address=0x20000, size=MAX_PAYLOAD),
            stream.pack_bulk(Kind.DEVICE, b"state" * 9, None, number=63),
            stream.pack(Kind.SETTLE, number=0xFFFFFFFF),
            stream.pack(Kind.START),
            stream.pack_text(Kind.FAILED, "why: \u00fc"),
        ]
    ] == SOUND


@pytest.mark.parametrize("step", [1, 2, 31, 32, 33, 1 << 30])
def test_records_come_out_however_they_are_cut(step: int) -> None:
    reader = RecordReader()
    assert feed(reader, raw_preamble() + b"".join(SOUND), step) == [
        (Kind.MEMORY, 0, 0x10000, 5, b"hello"),
        (Kind.ZERO, 0, 0x20000, MAX_PAYLOAD, b""),
        (Kind.DEVICE, 63, 0, 45, b"state" * 9),
        (Kind.SETTLE, 0xFFFFFFFF, 0, 0, b""),
        (Kind.START, 0, 0, 0, b""),
        (Kind.FAILED, 0, 0, 7, "why: \u00fc".encode()),
    ]
    assert not reader.mid_record
    assert feed(reader, SOUND[0][:-1], step) == []
    assert reader.mid_record
    assert feed(reader, SOUND[0][-1:]) == [(Kind.MEMORY, 0, 0x10000, 5, b"hello")]


@settings(deadline=None)
@given(
    records=st.lists(
        st.one_of(
            st.tuples(st.just(Kind.MEMORY), st.just(0), st.integers(0, 2**63), st.binary(min_size=1, max_size=300)),
            st.tuples(st.just(Kind.DEVICE), st.integers(0, 63), st.just(0), st.binary(min_size=1, max_size=300)),
            st.tuples(st.just(Kind.SETTLE), st.integers(0, 2**32 - 1), st.just(0), st.just(b"")),
        ),
        max_size=12,
    ),
    step=st.integers(1, 700),
)
def test_what_was_packed_comes_out(records: list[tuple[Kind, int, int, bytes]], step: int) -> None:
    data = b"".join(
        joined(stream.pack(kind, payload, number=number, address=address)) for kind, number, address, payload in records
    )
    expected = [(kind, number, address, len(payload), payload) for kind, number, address, payload in records]
    assert feed(hailed(), data, step) == expected


def test_the_largest_records_follow_each_other() -> None:
    payload = bytes(range(256)) * (MAX_PAYLOAD // 256)
    data = b"".join(raw_record(MEMORY, payload, address=n * MAX_PAYLOAD) for n in range(4))
    for step in (100_001, 1 << 30):
        assert [found[2:] for found in feed(hailed(), data, step)] == [
            (n * MAX_PAYLOAD, MAX_PAYLOAD, payload) for n in range(4)
        ]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("preamble", "reason"),
    [
        (b"Welcome to Debian GNU/Linux 13 on a host", "not a migration: what comes begins with b'Welcome to"),
        (raw_preamble(version=2), "format 2"),
        (raw_preamble(version=0), "format 0"),
        (raw_preamble(pipe=1), "pipe 1"),
        (raw_preamble(crc=0), "wrong checksum of the preamble"),
    ],
)
def test_another_preamble_is_refused(preamble: bytes, reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        feed(RecordReader(), preamble)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (raw_record(0), "unknown kind 0x0"),
        (raw_record(0xFFFF), "unknown kind 0xffff"),
        (raw_record(MEMORY), "MEMORY record with a wrong size"),
        (raw_record(MEMORY, b"x" * (MAX_PAYLOAD + 1)), "wrong size"),
        (raw_record(MEMORY, size=0xFFFFFFFF, length=0xFFFFFFFF), "wrong size"),
        (raw_record(MEMORY, b"x", size=2), "wrong length"),
        (raw_record(MEMORY, b"x", number=1), "wrong number"),
        (raw_record(MEMORY, b"xy", address=2**64 - 1), "wrong address"),
        (raw_record(MEMORY, b"x", flags=2), "wrong flags"),
        (raw_record(MEMORY, b"x", flags=1, size=100), "wrong flags"),  # no compression was agreed upon
        (raw_record(ZERO), "wrong size"),
        (raw_record(ZERO, size=MAX_PAYLOAD + 1), "wrong size"),
        (raw_record(ZERO, b"x"), "wrong length"),
        (raw_record(ZERO, address=2**64 - 1, size=2), "wrong address"),
        (raw_record(DEVICE, b"x", number=64), "wrong number"),
        (raw_record(DEVICE, b"x", address=1), "wrong address"),
        (raw_record(START, b"x"), "wrong size"),
        (raw_record(START, length=1), "wrong length"),
        (raw_record(START, number=1), "wrong number"),
        (raw_record(1, b"{" * (stream.MAX_JSON + 1)), "wrong size"),
        (raw_record(0x10F, b"x" * (stream.MAX_TEXT + 1)), "wrong size"),
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused_before_its_payload_comes(record: bytes, reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        feed(hailed(), record[: stream.HEADER_SIZE])


def test_every_flipped_bit_is_noticed() -> None:
    data = raw_preamble() + b"".join(SOUND)
    memory = range(stream.PREAMBLE_SIZE + stream.HEADER_SIZE, stream.PREAMBLE_SIZE + len(SOUND[0]))
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            if at in memory:
                assert torn(bytes(flipped)) == [(0x10000, 5)]
            else:
                with pytest.raises(StreamError):
                    feed(RecordReader(), bytes(flipped))


def torn(data: bytes) -> list[tuple[int, int]]:
    """Where memory is, and how much, that comes torn; nothing of it is handed out."""
    reader, found = RecordReader(), []
    reader.space()[: len(data)] = data
    reader.received(len(data))
    while (record := reader.next()) is not None:
        if record.torn:
            assert (record.kind, len(record.payload)) == (Kind.MEMORY, 0)
            found.append((record.address, record.size))
    return found


@settings(deadline=None)
@given(st.binary(min_size=2, max_size=600), st.data())
def test_memory_that_is_flipped_swapped_or_moved_is_torn(payload: bytes, data: st.DataObject) -> None:
    first, second = data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=2, max_size=2, unique=True))
    swapped = bytearray(payload)
    swapped[first], swapped[second] = payload[second], payload[first]
    moved = payload[first:] + payload[:first]
    both = bytearray(payload)  # the same error twice
    both[first] ^= 1 << data.draw(st.integers(0, 7))
    both[second] ^= both[first] ^ payload[first]
    head = raw_record(MEMORY, payload)[: stream.HEADER_SIZE]
    for changed in (swapped, moved, both):
        assert torn(raw_preamble() + head + changed) == ([] if changed == payload else [(0, len(payload))])


def test_a_record_cut_short_is_no_record() -> None:
    data = b"".join(SOUND)
    ends = {sum(map(len, SOUND[:count])) for count in range(len(SOUND) + 1)}
    for end in range(len(data)):
        reader = hailed()
        found = feed(reader, data[:end])
        assert len(found) == sum(0 < whole <= end for whole in ends)
        assert reader.mid_record is (end not in ends)


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 100))
def test_no_bytes_do_anything_but_be_refused(data: bytes, step: int) -> None:
    with contextlib.suppress(StreamError):
        assert feed(hailed(), data, step) == []


def test_text_from_elsewhere_has_no_control_characters() -> None:
    reader = hailed()
    data = raw_record(0x10F, b"no\x1b[2J\r\n\xff\x00end")
    reader.space()[: len(data)] = data
    reader.received(len(data))
    record = reader.next()
    assert record is not None
    assert record.text == "no\ufffd[2J\ufffd\ufffd\ufffd\ufffdend"
    assert len(joined(stream.pack_text(Kind.FAILED, "x" * 10_000))) == stream.HEADER_SIZE + stream.MAX_TEXT


# ---------------------------------------------------------------- memory


def unpacked(data: bytes, size: int) -> tuple[bytes, list[tuple[Any, ...]]]:
    """The memory that records say, and the records."""
    memory = bytearray(b"\xee" * size)
    found = feed(hailed(), data)
    for kind, _, address, length, payload in found:
        memory[address : address + length] = payload if kind is Kind.MEMORY else bytes(length)
    return bytes(memory), found


@settings(deadline=None)
@given(pages=st.lists(st.sampled_from([0, 0, 1, 255]), min_size=1, max_size=12), tail=st.integers(0, PAGE - 1))
def test_pages_of_zeros_are_only_named_and_runs_stay_together(pages: list[int], tail: int) -> None:
    data = b"".join(bytes(PAGE - 1) + bytes([value]) for value in pages) + bytes(tail)
    packed = b"".join(map(joined, stream.pack_memory(0, memoryview(data), None)))
    memory, found = unpacked(packed, len(data))
    assert memory == data
    assert sum(len(record[4]) for record in found) == PAGE * sum(map(bool, pages)) + tail
    kinds = [not value for value in pages] + ([False] if tail else [])
    assert len(found) == 1 + sum(one != other for one, other in itertools.pairwise(kinds))


# ---------------------------------------------------------------- compression


@pytest.fixture
def zstd() -> stream.Codec:
    pytest.importorskip("zstandard")
    return stream.codec("zstd")


def test_a_compression_that_is_not_there_is_named_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"'lzma' is not installed: pip install 'vfio-user\[zstd\]'"):
        stream.codec("lzma")


@settings(deadline=None)
@given(data=st.one_of(st.binary(min_size=1, max_size=2000), st.integers(1, 5000).map(lambda count: b"ab" * count)))
def test_compressed_records_come_out(data: bytes) -> None:
    pytest.importorskip("zstandard")
    codec = stream.codec("zstd")
    packed = joined(stream.pack_bulk(Kind.DEVICE, data, codec, number=3))
    assert len(packed) <= stream.HEADER_SIZE + len(data)
    reader = hailed()
    reader.codec = codec
    assert feed(reader, packed) == [(Kind.DEVICE, 3, 0, len(data), data)]


def test_what_compression_does_not_make_smaller_goes_as_it_is(zstd: stream.Codec) -> None:
    noise = bytes((n * n * 31 + n // 7) & 0xFF for n in range(64))
    assert joined(stream.pack_bulk(Kind.DEVICE, noise, zstd)) == raw_record(DEVICE, noise)


def test_a_compressed_record_gives_exactly_what_it_says_or_nothing(zstd: stream.Codec) -> None:
    bomb = zstd.compress(bytes(MAX_PAYLOAD))
    garbage = bomb[:10] + b"\xff" * (len(bomb) - 10)
    for payload, size, reason in [
        (bomb, 1000, "not of the size"),
        (bomb[:-1], MAX_PAYLOAD, "decompressed"),
        (bomb + b"more", MAX_PAYLOAD, "decompressed"),
        (garbage, MAX_PAYLOAD, "decompressed"),
        (b"no frame at all", MAX_PAYLOAD, "not of the size|decompressed"),
        (b"", MAX_PAYLOAD, "wrong length"),
        (bomb, len(bomb), "wrong length"),  # compressed, and not smaller
    ]:
        reader = hailed()
        reader.codec = zstd
        with pytest.raises(StreamError, match=reason):
            feed(reader, raw_record(MEMORY, payload, flags=1, size=size))
    for kind in (SETTLE, START):
        reader = hailed()
        reader.codec = zstd
        with pytest.raises(StreamError, match="wrong flags"):
            feed(reader, raw_record(kind, flags=1))


# ---------------------------------------------------------------- the tables


def test_every_kind_has_a_rule_and_every_one_of_the_source_has_its_place() -> None:
    assert set(RULES) == set(Kind)
    placed = {kind for following in ORDER.values() for kind in following}
    assert placed == {kind for kind in Kind if kind < 0x100}
    assert set(ORDER) == set(State)


def test_start_is_reached_through_every_step_and_no_other_way() -> None:
    ways: list[tuple[list[Kind], State]] = [([], State.OPEN)]
    found: list[list[Kind]] = []
    while ways:
        kinds, state = ways.pop()
        for kind, following in ORDER[state].items():
            if following is State.STARTED:
                found.append([*kinds, kind])
            elif following is not state:
                ways.append(([*kinds, kind], following))
    assert found == [[Kind.OFFER, Kind.BEGIN, Kind.LOAD, Kind.START]]
