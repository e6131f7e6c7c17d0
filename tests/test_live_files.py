"""Saved devices: what is whole and fits is restored, all else is refused before a device changes."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device_support import attached
from vfio_user import Client, DeviceState, __version__
from vfio_user.devices.edu import LIVENESS, Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.errors import MigrationError, StreamError
from vfio_user.live.files import MAGIC, MAX_HEADER, MAX_RECORD, Header, Reader, load, opened, read_header, restore, save
from vfio_user.live.offer import DeviceOffer

VALUE, INVERTED = b"\x78\x56\x34\x12", b"\x87\xa9\xcb\xed"
"""What is written to edu's liveness register, and what is read there then."""
OFFER = DeviceOffer("1234:11e8 class 00ff00 rev 10", [(4096, 3)], [1], 1)


def set_value(client: Client) -> None:
    client.region_write(0, LIVENESS, VALUE)


def value(client: Client) -> bytes:
    return client.region_read(0, LIVENESS, 4)


def expect_running(client: Client, expected: bytes) -> None:
    assert client.migration_get_state() == DeviceState.RUNNING
    assert value(client) == expected


class Sides:
    """A source that has a value, and a destination that has none."""

    def __init__(self, stack: ExitStack) -> None:
        self.devices = Edu(), Edu()
        self.source, self.destination = (stack.enter_context(attached(device)) for device in self.devices)
        set_value(self.source)

    def saved(self) -> bytes:
        file = io.BytesIO()
        save(self.source, file)
        return file.getvalue()


@pytest.fixture
def sides() -> Iterator[Sides]:
    with ExitStack() as stack:
        yield Sides(stack)


def in_pieces(data: bytes) -> bytes:
    """Records of ``data``, and the end, put together after the module's docstring and not by its code."""
    header = msgspec.json.encode(Header(__version__, OFFER))
    fields = struct.pack("<8sHHI", MAGIC, 1, 0, len(header))
    text = fields + struct.pack("<I", zlib.crc32(fields + header)) + header
    for start in range(0, len(data), MAX_RECORD):
        piece = data[start : start + MAX_RECORD]
        length = struct.pack("<I", len(piece))
        text += length + struct.pack("<I", zlib.crc32(length + piece)) + piece
    text += struct.pack("<IIQ", 0, zlib.crc32(bytes(4)), len(data))
    return text + hashlib.sha256(text).digest()


def with_header(text: bytes) -> bytes:
    fields = struct.pack("<8sHHI", MAGIC, 1, 0, len(text))
    return fields + struct.pack("<I", zlib.crc32(fields + text)) + text


def test_a_saved_device_is_restored_and_the_source_runs_on(sides: Sides) -> None:
    file = io.BytesIO()
    size = save(sides.source, file)
    expect_running(sides.source, INVERTED)
    file.seek(0)
    assert restore(sides.destination, file) == size
    expect_running(sides.destination, INVERTED)
    file.seek(0)
    assert read_header(file) == Header(__version__, DeviceOffer.of(sides.source))


def test_the_file_is_as_its_description_says() -> None:
    data = random.Random(1).randbytes(MAX_RECORD + 5)
    with opened(io.BytesIO(in_pieces(data))) as saved:
        assert (saved.header.device, saved.size) == (OFFER, len(data))
        assert b"".join(saved.records()) == data == b"".join(saved.records())


def test_a_file_is_read_from_where_it_is(sides: Sides) -> None:
    file = io.BytesIO(b"something before" + sides.saved())
    file.seek(len(b"something before"))
    restore(sides.destination, file)
    expect_running(sides.destination, INVERTED)


def test_a_file_that_is_cut_anywhere_changes_nothing(sides: Sides) -> None:
    saved = sides.saved()
    for size in range(len(saved)):
        with pytest.raises(StreamError, match="ends early"):
            restore(sides.destination, io.BytesIO(saved[:size]))
    expect_running(sides.destination, bytes(4))


def test_a_file_with_any_byte_changed_changes_nothing(sides: Sides) -> None:
    saved, randomly = sides.saved(), random.Random(2)
    for at in range(len(saved)):
        damaged = bytearray(saved)
        damaged[at] ^= 1 << randomly.randrange(8)
        with pytest.raises(StreamError):
            restore(sides.destination, io.BytesIO(damaged))
    expect_running(sides.destination, bytes(4))


@given(st.binary(max_size=64), st.booleans())
def test_what_is_no_file_is_refused(garbage: bytes, begins_well: bool) -> None:
    with pytest.raises(StreamError), opened(io.BytesIO(MAGIC * begins_well + garbage)):
        pass


@given(st.binary(max_size=300) | st.builds(msgspec.json.encode, st.recursive(st.none() | st.text(), st.lists)))
def test_a_header_that_says_something_else_is_refused(text: bytes) -> None:
    with pytest.raises(StreamError):
        read_header(io.BytesIO(with_header(text)))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"package": "1\n", "device": OFFER}, "package"),
        ({"package": "1" * 65, "device": OFFER}, "package"),
        ({"package": "1", "device": OFFER, "\x1b[2J": 1}, "unknown field"),
        ({"package": "1", "device": msgspec.structs.replace(OFFER, identity="\x1b[2J")}, "printed"),
        ({"package": "1", "device": msgspec.structs.replace(OFFER, irqs=[[]])}, "irqs"),
        ([[[[]]]], "none"),
    ],
)
def test_a_header_that_would_do_harm_is_refused(header: object, reason: str) -> None:
    with pytest.raises(StreamError, match=reason) as caught:
        read_header(io.BytesIO(with_header(msgspec.json.encode(header))))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 0xFFFFFFFF])
def test_a_long_header_is_not_waited_for(length: int) -> None:
    with pytest.raises(StreamError, match="header"):
        read_header(io.BytesIO(struct.pack("<8sHHII", MAGIC, 1, 0, length, 0) + bytes(100)))


def test_a_long_record_is_not_waited_for() -> None:
    start = with_header(msgspec.json.encode(Header("1", OFFER)))
    with pytest.raises(StreamError, match=f"record of {MAX_RECORD + 1} bytes at byte {len(start)}"):
        list(Reader(io.BytesIO(start + struct.pack("<II", MAX_RECORD + 1, 0) + bytes(100))))


@pytest.mark.parametrize("version", [0, 2, 0xFFFF])
def test_a_format_of_another_time_is_refused(version: int) -> None:
    with pytest.raises(StreamError, match=f"format {version}"):
        read_header(io.BytesIO(struct.pack("<8sHHII", MAGIC, version, 0, 0, 0)))


def test_what_follows_the_end_is_refused() -> None:
    with pytest.raises(StreamError, match="follows the end"), opened(io.BytesIO(in_pieces(b"data") + b"\0")):
        pass


def piped(data: bytes, stack: ExitStack) -> io.BufferedReader:
    """The reading end of a pipe, into which a thread writes ``data``, byte by byte at first."""
    reader, writer = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError), open(writer, "wb", buffering=0) as sink:
            for at in range(100):
                sink.write(data[at : at + 1])
            for at in range(100, len(data), 1000):  # less than PIPE_BUF: whole or not at all
                sink.write(data[at : at + 1000])

    thread = threading.Thread(target=write)
    thread.start()
    stack.callback(thread.join, 10)
    return stack.enter_context(open(reader, "rb"))


def test_a_pipe_is_put_aside_and_restored(sides: Sides) -> None:
    saved = sides.saved()
    with ExitStack() as stack:
        restore(sides.destination, piped(saved, stack), max_size=len(saved))
        expect_running(sides.destination, INVERTED)


def test_a_pipe_that_brings_too_much_or_too_little_changes_nothing(sides: Sides) -> None:
    saved = sides.saved()
    with ExitStack() as stack:
        with pytest.raises(StreamError, match=f"more than the {len(saved) - 1} bytes"):
            restore(sides.destination, piped(saved, stack), max_size=len(saved) - 1)
        with pytest.raises(StreamError, match="ends early"):
            restore(sides.destination, piped(saved[:-1], stack))
        with pytest.raises(StreamError, match="not a saved device"):
            restore(sides.destination, piped(bytes(1 << 20), stack))
        expect_running(sides.destination, bytes(4))


class OtherEdu(Edu):
    revision = 0x11


def test_another_device_is_refused_before_it_changes(sides: Sides) -> None:
    saved = sides.saved()
    with attached(OtherEdu()) as other:
        set_value(other)
        with pytest.raises(MigrationError, match="identity of device 0 differs"):
            restore(other, io.BytesIO(saved))
        expect_running(other, INVERTED)
    with attached(Gpio()) as gpio, pytest.raises(MigrationError, match="cannot migrate"):
        restore(gpio, io.BytesIO(saved))
    with attached(Gpio()) as gpio, pytest.raises(MigrationError, match="cannot migrate"):
        save(gpio, io.BytesIO())


@pytest.mark.parametrize("state", [DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.PRE_COPY])
def test_a_device_that_does_not_run_is_not_saved(sides: Sides, state: DeviceState) -> None:
    sides.source.migration_set_state(state)
    with pytest.raises(MigrationError, match=f"in state {state.name}, not RUNNING"):
        save(sides.source, io.BytesIO())
    assert sides.source.migration_get_state() == state


def test_a_device_that_was_left_behind_takes_its_state_back(sides: Sides) -> None:
    saved = sides.saved()
    sides.source.migration_set_state(DeviceState.STOP)
    restore(sides.source, io.BytesIO(saved))
    expect_running(sides.source, INVERTED)


class Full(io.BytesIO):
    """A file with room for ``room`` writes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, data: object) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        return super().write(data)  # type: ignore[arg-type]


def test_a_full_disk_leaves_the_source_running(sides: Sides) -> None:
    whole = Full(1 << 20)
    save(sides.source, whole)
    writes = (1 << 20) - whole.room
    assert writes > 6
    for room in range(writes):
        file = Full(room)
        with pytest.raises((OSError, MigrationError), match="No space left"):
            save(sides.source, file)
        expect_running(sides.source, INVERTED)
        with pytest.raises(StreamError):
            read_whole(file.getvalue())


def read_whole(data: bytes) -> None:
    with opened(io.BytesIO(data)):
        pass


class TroubleError(Exception):
    pass


def trouble(size: int) -> None:
    raise TroubleError(f"after {size} bytes")


@pytest.mark.parametrize("error", [TroubleError, KeyboardInterrupt])
def test_giving_up_leaves_the_source_running_and_the_destination_reset(
    sides: Sides, error: type[BaseException]
) -> None:
    def give_up(size: int) -> None:
        raise error(f"after {size} bytes")

    saved = sides.saved()
    with pytest.raises(error, match="after"):
        save(sides.source, io.BytesIO(), on_progress=give_up)
    expect_running(sides.source, INVERTED)
    set_value(sides.destination)
    with pytest.raises(error, match="after"):
        restore(sides.destination, io.BytesIO(saved), on_progress=give_up)
    expect_running(sides.destination, bytes(4))


def refuse(*arguments: object) -> int:
    raise OSError(errno.EIO, "no")


@pytest.mark.parametrize("hook", ["migration_read_data", "save"])
def test_a_source_that_refuses_runs_on(sides: Sides, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides.devices[0], hook, refuse)
    with pytest.raises(MigrationError, match=r"not saved: .* refused"):
        save(sides.source, io.BytesIO())
    expect_running(sides.source, INVERTED)


@pytest.mark.parametrize("hook", ["migration_write_data", "load"])
def test_a_destination_that_refuses_is_reset(sides: Sides, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = sides.saved()
    set_value(sides.destination)
    monkeypatch.setattr(sides.devices[1], hook, refuse)
    with pytest.raises(MigrationError, match=r"not restored: .* refused"):
        restore(sides.destination, io.BytesIO(saved))
    expect_running(sides.destination, bytes(4))


def test_a_destination_that_cannot_be_reset_is_left_and_told(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = sides.saved()
    for hook in ("load", "reset"):
        monkeypatch.setattr(sides.devices[1], hook, refuse)
    with pytest.raises(MigrationError, match=r"not restored: .*; and then: the destination cannot be reset"):
        restore(sides.destination, io.BytesIO(saved))


def test_a_server_that_dies_is_told(sides: Sides) -> None:
    saved = sides.saved()
    with pytest.raises(MigrationError, match=r"not restored: .*; and then"):
        restore(sides.destination, io.BytesIO(saved), on_progress=lambda size: sides.destination.close())
    with pytest.raises(MigrationError, match=r"not saved: .*; and then"):
        save(sides.source, io.BytesIO(), on_progress=lambda size: sides.source.close())


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_file_that_changes_after_it_was_checked_is_not_loaded(
    sides: Sides, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    saved = sides.saved()
    path.write_bytes(saved)
    set_value(sides.destination)
    with path.open("rb", buffering=0) as file, opened(file) as sound:
        path.write_bytes(change(saved))
        with pytest.raises(MigrationError, match="damaged"):
            load(sides.destination, sound)
    expect_running(sides.destination, bytes(4))


def test_a_device_with_too_much_to_say_is_not_touched(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_user.live.files.MAX_HEADER", 100)
    with pytest.raises(MigrationError, match="room for 100"):
        save(sides.source, io.BytesIO(), on_progress=trouble)
    expect_running(sides.source, INVERTED)
