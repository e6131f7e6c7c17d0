"""REGION_READ, REGION_WRITE, REGION_WRITE_MULTI: protocol.md, section 5, and rows 16, 18, 22, 28."""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import (
    NO_REPLY,
    REPLY,
    RawPeer,
    RecordingBackend,
    access,
    assert_quiet,
    message,
    recording,
    serving,
)
from vfio_user import Region

READ, WRITE, MULTI = 9, 10, 15
LARGEST = 1 << 20


@pytest.fixture
def backend() -> Iterator[RecordingBackend]:
    with recording(RecordingBackend()) as backend:
        yield backend


@pytest.fixture
def peer(backend: RecordingBackend) -> Iterator[RawPeer]:
    with serving(backend) as served:
        yield served.client()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert_quiet(caplog)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 4095, 4096])
def test_read_and_write(backend: RecordingBackend, peer: RawPeer, count: int) -> None:
    data = bytes(n % 251 for n in range(count))
    assert peer.ok(WRITE, access(0, 0, count) + data) == access(0, 0, count)
    assert peer.ok(READ, access(0, 0, count)) == access(0, 0, count) + data
    assert backend.called("region_read", "region_write") == [("region_write", 0, 0, data), ("region_read", 0, 0, count)]


@pytest.mark.parametrize("count", [5000, LARGEST])
def test_large_accesses(backend: RecordingBackend, peer: RawPeer, count: int) -> None:
    backend.regions[0] = Region(LARGEST)
    assert backend.link is not None
    backend.memory = bytearray(LARGEST)
    # The sizes of regions are read when a client comes: this one is the reset's to make known.
    peer.ok(13)
    data = bytes(range(256)) * (count // 256) + b"?" * (count % 256)
    assert peer.region_write(0, 0, data) == access(0, 0, count)
    assert peer.region_read(0, 0, count) == data
    assert bytes(backend.memory[:count]) == data


@pytest.mark.parametrize("region", [0, 1, 7])
def test_a_count_of_0_has_no_payload_at_all(backend: RecordingBackend, peer: RawPeer, region: int) -> None:
    """protocol.md, section 5."""
    assert peer.ok(READ, access(region, 4, 0)) == b""
    assert not backend.called("region_read")


def test_write_of_0_bytes(backend: RecordingBackend, peer: RawPeer) -> None:
    assert peer.ok(WRITE, access(0, 0x1000, 0)) == b""
    assert not backend.called("region_write")


BAD_ACCESSES = [
    (0, 0x1000, 1),
    (0, 0xFFF, 2),
    (0, 0, 0x1001),
    (0, 0x1001, 0),
    (0, 2**64 - 1, 1),
    (0, 2**64 - 1, 2**32 - 1),
    (0, 2**64 - 4, 4),
    (0, 0, 2**32 - 1),
    (0, 0, LARGEST + 1),
    (5, 0, 1),  # a region that does not exist
    (5, 0, 0),
    (9, 0, 4),
    (2**32 - 1, 0, 4),
    (2**31, 2**63, 4),
]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("region", "offset", "count"), BAD_ACCESSES)
@pytest.mark.parametrize("command", [READ, WRITE])
def test_bounds(backend: RecordingBackend, peer: RawPeer, command: int, region: int, offset: int, count: int) -> None:
    data = bytes(count) if command == WRITE and count < 2**20 else b""
    assert peer.refused(command, access(region, offset, count) + data) == errno.EINVAL
    assert peer.region_read(0, 0, 4) == bytes(4)
    assert backend.called("region_read", "region_write") == [("region_read", 0, 0, 4)]


@pytest.mark.parametrize(("command", "region"), [(READ, 2), (WRITE, 1)])
@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.usefixtures("quiet")
def test_row18_flags_of_the_region(
    backend: RecordingBackend, peer: RawPeer, command: int, region: int, count: int
) -> None:
    data = bytes(count) if command == WRITE else b""
    assert peer.refused(command, access(region, 0, count) + data) == errno.EINVAL
    if command == WRITE:
        assert peer.refused(MULTI, struct.pack("<Q", 1) + entry(region, 0, bytes(count))) == errno.EINVAL
    assert not backend.called("region_read", "region_write")
    assert peer.region_read(1, 0, 4)
    assert peer.region_write(2, 0, bytes(4))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (READ, b""),
        (READ, access(0, 0, 4)[:15]),
        (READ, access(0, 0, 4) + b"data"),
        (READ, access(0, 0, 4) + b"\0"),
        (WRITE, access(0, 0, 4)[:15]),
        (WRITE, access(0, 0, 4)),
        (WRITE, access(0, 0, 4) + b"dat"),
        (WRITE, access(0, 0, 4) + b"data+"),
        (WRITE, access(0, 0, 0) + b"d"),
        (WRITE, access(0, 0, 2**32 - 1) + b"data"),
    ],
)
def test_sizes(backend: RecordingBackend, peer: RawPeer, command: int, payload: bytes) -> None:
    assert peer.refused(command, payload) == errno.EINVAL
    peer.check_alive()
    assert not backend.called("region_read", "region_write")


def test_row16_writes_of_more_than_max_data_xfer_size(backend: RecordingBackend, peer: RawPeer) -> None:
    """Larger than any message that is taken: skipped whole, refused, and the stream lives."""
    assert peer.refused(WRITE, access(0, 0, LARGEST + 4096) + bytes(LARGEST + 4096)) == errno.EINVAL
    peer.check_alive()


@pytest.mark.parametrize("flags", [0x20, 0x40, 0x80000000, 0xFFFFFFC0])
def test_flags_that_mean_nothing_in_a_command(peer: RawPeer, flags: int) -> None:
    """protocol.md, section 1: unknown bits, ERROR and error_no of a request are ignored, NO_REPLY never echoed."""
    assert peer.ok(WRITE, access(0, 0, 2) + b"ab", flags=flags) == access(0, 0, 2)
    assert peer.ok(READ, access(0, 0, 2), flags=flags)[16:] == b"ab"
    peer.send(message(7, READ, access(0, 0, 2), 0, error=5))
    assert peer.read().payload[16:] == b"ab"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("command", [READ, WRITE])
def test_no_reply(backend: RecordingBackend, peer: RawPeer, command: int) -> None:
    """Honoured for every command, also a failing one."""
    data = b"abcd" if command == WRITE else b""
    peer.post(command, access(0, 0, 4) + data, flags=NO_REPLY)
    peer.post(command, access(0, 0x1000, 4) + data, flags=NO_REPLY)
    peer.post(command, b"", flags=NO_REPLY)
    backend.fail["region_read"] = backend.fail["region_write"] = OSError(errno.EBUSY, "busy")
    peer.post(command, access(0, 4, 4) + data, flags=NO_REPLY)
    peer.check_alive()
    assert [call[1:3] for call in backend.called("region_read", "region_write")] == [(0, 0), (0, 4)]


@pytest.mark.parametrize("count", [4, 4096 + 8])
@pytest.mark.usefixtures("quiet")
def test_errno_of_the_hook_goes_into_the_reply(backend: RecordingBackend, peer: RawPeer, count: int) -> None:
    """Row 1: and nothing but the header, where the C library sends the payload that it had begun."""
    backend.memory = bytearray(0x2000)
    backend.regions[0] = Region(0x2000)
    peer.ok(13)
    for error in (errno.EPERM, errno.ENODEV, 0xBEEF):
        backend.fail["region_read"] = backend.fail["region_write"] = OSError(error, "refused")
        assert peer.refused(READ, access(0, 0, count)) == error
        assert peer.refused(WRITE, access(0, 0, count) + bytes(count)) == error
    backend.fail.clear()
    assert peer.region_read(0, 0, count) == bytes(count)


@pytest.mark.parametrize("bug", [ValueError("bug"), ZeroDivisionError(), OSError("no errno"), KeyError("x")])
@pytest.mark.parametrize("command", [READ, WRITE])
def test_a_bug_of_the_device_is_eio_with_a_traceback(
    backend: RecordingBackend, peer: RawPeer, caplog: pytest.LogCaptureFixture, command: int, bug: Exception
) -> None:
    backend.fail["region_read"] = backend.fail["region_write"] = bug
    assert peer.refused(command, access(0, 0, 4) + (bytes(4) if command == WRITE else b"")) == errno.EIO
    backend.fail.clear()
    peer.check_alive()
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.exc_info is not None for record in logged] == ([] if isinstance(bug, OSError) else [True])


def test_many_in_one_send(backend: RecordingBackend, peer: RawPeer) -> None:
    """Pipelined commands are answered in order; posted ones among them are silent."""
    stream = b""
    for number in range(200):
        stream += message(number, WRITE, access(0, number * 2, 2) + struct.pack("<H", number), NO_REPLY)
        stream += message(number, READ, access(0, number * 2, 2))
        if number % 10 == 0:
            stream += message(1000 + number, 4, struct.pack("<4I", 16, 0, 0, 0))
    peer.send(stream)
    for number in range(200):
        reply = peer.read()
        assert (reply.msg_id, reply.flags) == (number, REPLY)
        assert reply.payload == access(0, number * 2, 2) + struct.pack("<H", number)
        if number % 10 == 0:
            assert peer.read().msg_id == 1000 + number


class WithView(RecordingBackend):
    """Has its memory sent without a copy. ``extra`` bytes too many, or too few."""

    extra = 0

    def region_view(self, region: int, offset: int, count: int) -> memoryview | None:
        self.record("region_view", region, offset, count)
        if region != 0:
            return None
        words = memoryview(self.memory).cast("Q")
        return words[offset // 8 : (offset + count + self.extra) // 8]


def test_views_of_large_reads(caplog: pytest.LogCaptureFixture) -> None:
    backend = WithView()
    with recording(backend):
        backend.regions[0] = backend.regions[7] = Region(0x10000)
        backend.memory = bytearray(n % 251 for n in range(0x10000))
        with serving(backend) as served:
            peer = served.client()
            for offset, count in ((0, 0x10000), (64, 5000)):
                assert peer.region_read(0, offset, count) == bytes(backend.memory[offset : offset + count])
            assert not backend.called("region_read")
            assert len(peer.region_read(7, 0, 5000)) == 5000
            assert backend.called("region_read") == [("region_read", 7, 0, 5000)]
            for extra in (-8, 8):
                backend.extra = extra
                assert peer.refused(READ, access(0, 0, 8000)) == errno.EIO
            peer.check_alive()
    assert len([record for record in caplog.records if record.exc_info]) == 2


def entry(region: int, offset: int, data: bytes, count: int | None = None) -> bytes:
    return struct.pack("<QII8s", offset, region, len(data) if count is None else count, data)


def test_row22_row28_write_multi(backend: RecordingBackend, peer: RawPeer) -> None:
    """payload exactly 8 + 24 n, each write at most 8 bytes; reply 8 bytes, the count done."""
    writes = [(0, 0, b"12345678"), (2, 8, b"ab"), (0, 3, b""), (0, 0xFFF, b"!")]
    payload = struct.pack("<Q", len(writes)) + b"".join(entry(*write) for write in writes)
    assert peer.ok(MULTI, payload) == struct.pack("<Q", 4)
    assert backend.called("region_write") == [("region_write", *write) for write in writes if write[2]]
    assert peer.ok(MULTI, struct.pack("<Q", 0)) == struct.pack("<Q", 0)
    peer.post(MULTI, payload, flags=NO_REPLY)
    peer.check_alive()
    assert len(backend.called("region_write")) == 6


def test_row28_as_many_as_fit(backend: RecordingBackend, peer: RawPeer) -> None:
    count = (LARGEST + 16 - 8) // 24
    payload = struct.pack("<Q", count) + entry(0, 0, b"x") * count
    assert peer.ok(MULTI, payload) == struct.pack("<Q", count)
    assert len(backend.called("region_write")) == count


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("<Q", 0)[:7],
        struct.pack("<Q", 0) + b"\0",
        struct.pack("<Q", 1),
        struct.pack("<Q", 1) + entry(0, 0, b"a")[:23],
        struct.pack("<Q", 1) + entry(0, 0, b"a") + b"\0",
        struct.pack("<Q", 1) + entry(0, 0, b"a") * 2,
        struct.pack("<Q", 2) + entry(0, 0, b"a"),
        struct.pack("<Q", 2**64 - 1) + entry(0, 0, b"a"),
        struct.pack("<Q", 2**61) + entry(0, 0, b"a"),
        struct.pack("<Q", 1) + entry(0, 0, b"12345678", 9),
        struct.pack("<Q", 1) + entry(0, 0, b"12345678", 2**32 - 1),
        struct.pack("<Q", 1) + entry(9, 0, b"a"),
        struct.pack("<Q", 2) + entry(0, 0, b"a") + entry(0, 0xFFF, b"ab"),
        struct.pack("<Q", 2) + entry(0, 0, b"a") + entry(0, 2**64 - 1, b"a"),
    ],
)
def test_row28_write_multi_refused_before_anything_is_written(
    backend: RecordingBackend, peer: RawPeer, payload: bytes
) -> None:
    assert peer.refused(MULTI, payload) == errno.EINVAL
    peer.check_alive()
    assert not backend.called("region_write")


def test_write_multi_ends_with_the_write_that_fails(backend: RecordingBackend, peer: RawPeer) -> None:
    backend.fail["region_write"] = OSError(errno.ENOSPC, "full")
    payload = struct.pack("<Q", 2) + entry(0, 0, b"a") * 2
    assert peer.refused(MULTI, payload) == errno.ENOSPC
    assert len(backend.called("region_write")) == 1


regions = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 2**32 - 1])
offsets = st.one_of(st.integers(0, 0x1100), st.integers(2**64 - 16, 2**64 - 1), st.sampled_from([2**32, 2**63]))
counts = st.one_of(st.integers(0, 40), st.integers(0xFF0, 0x1010), st.integers(2**32 - 9, 2**32 - 1))
SIZES = [0x1000, 0x100, 0x100, 0x3000, 0x1000, 0, 0, 256, 0]
FLAGS = [3, 1, 2, 3, 3, 0, 0, 3, 0]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.sampled_from([READ, WRITE]), regions, offsets, counts, st.booleans())
def test_any_access_against_the_model(
    backend: RecordingBackend, peer: RawPeer, command: int, region: int, offset: int, count: int, posted: bool
) -> None:
    """A hook is called exactly for what lies inside a region that allows it; everything else is EINVAL."""
    backend.calls.clear()
    data = bytes(count) if command == WRITE and count <= 0x2000 else b""
    wrong_size = command == WRITE and len(data) != count
    flag = 1 if command == READ else 2
    good = region < 9 and FLAGS[region] & flag and offset + count <= SIZES[region] and not wrong_size
    peer.post(command, access(region, offset, count) + data, flags=NO_REPLY if posted else 0)
    if not posted:
        reply = peer.read()
        assert reply.error == (0 if good else errno.EINVAL)
        assert reply.size == (16 if not good or not count else 32 + (count if command == READ else 0))
    peer.check_alive()
    called = [call[1:3] for call in backend.called("region_read", "region_write")]
    assert called == ([(region, offset)] if good and count else [])
