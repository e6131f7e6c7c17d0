"""DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE, DEVICE_RESET: protocol.md, sections 7 to 9.

Rows 6, 9, 10, 11, 16, 19, 20, 31, 33 of section 0, as far as they are the server's and not the device's.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Iterator

import pytest

from tests.support import (
    NO_REPLY,
    MigratableBackend,
    RawPeer,
    RecordingBackend,
    Serving,
    access,
    assert_quiet,
    dma_map,
    dma_unmap,
    memfd,
    recording,
    serving,
)
from vfio_user.wire.constants import DeviceState, MigrationFlags

FEATURE, DATA_READ, DATA_WRITE, RESET = 16, 17, 18, 13
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
MIGRATION, STATE, START, STOP, REPORT, SIZE = 1, 2, 6, 7, 8, 9
LARGEST = 1 << 20

# What each feature supports, the data of a good request, and the data of the reply to it.
OPERATIONS = {MIGRATION: GET, STATE: GET | SET, START: SET, STOP: SET, REPORT: GET, SIZE: GET}
MAPPED = (0x10000, 0x10000)
GOOD_DATA = {
    (MIGRATION, GET): b"",
    (STATE, GET): b"",
    (STATE, SET): struct.pack("<Ii", 1, 77),
    (START, SET): struct.pack("<QII", 4096, 0, 0),
    (STOP, SET): b"",
    (REPORT, GET): struct.pack("<QQQ", *MAPPED, 4096),
    (SIZE, GET): b"",
}
GOOD_WITH_ZEROS = {(MIGRATION, GET), (STATE, GET), (STATE, SET), (STOP, SET), (SIZE, GET)}
"""What takes zeros for its data: 0 is a state, but no page size."""


@pytest.fixture
def backend() -> Iterator[MigratableBackend]:
    backend = MigratableBackend()
    with recording(backend):
        yield backend


@pytest.fixture
def served(backend: MigratableBackend, caplog: pytest.LogCaptureFixture) -> Iterator[Serving]:
    with serving(backend) as served:
        yield served
    assert_quiet(caplog)


@pytest.fixture
def peer(served: Serving) -> RawPeer:
    return served.client()


def feature(index: int, operation: int, data: bytes = b"", *, argsz: int = 1 << 16) -> bytes:
    return struct.pack("<II", argsz, index | operation) + data


def set_state(peer: RawPeer, state: int) -> bytes:
    return peer.ok(FEATURE, feature(STATE, SET, struct.pack("<II", state, 0)))


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0xFFFF])
@pytest.mark.parametrize(
    "operation",
    [
        GET,
        SET,
        PROBE,
        PROBE | GET,
        PROBE | SET,
        GET | SET,
        PROBE | GET | SET,
        0,
        1 << 19,
        PROBE | 1 << 19,
        GET | 1 << 31,
        PROBE | GET | 1 << 31,
    ],
)
def test_row19_every_operation_on_every_feature(peer: RawPeer, index: int, operation: int) -> None:
    """A PROBE of what is supported is echoed; a GET or SET alone needs its data; the rest is EINVAL."""
    peer.ok(2, dma_map(*MAPPED))
    supported = OPERATIONS.get(index, 0)
    probes = supported and operation & PROBE and not operation & ~(supported | PROBE)
    for data in (b"", bytes(8), bytes(16), bytes(24)):
        request = feature(index, operation, data)
        if probes:
            assert peer.ok(FEATURE, request) == request
        elif (index, operation) in GOOD_WITH_ZEROS and len(data) >= len(GOOD_DATA[index, operation]):
            assert peer.ok(FEATURE, request)[4:8] == request[4:8]
        else:
            assert peer.refused(FEATURE, request) == errno.EINVAL
    peer.check_alive()


@pytest.mark.parametrize(("index", "operation"), GOOD_DATA)
def test_probe_and_set_take_an_argsz_of_the_payload(peer: RawPeer, index: int, operation: int) -> None:
    data = GOOD_DATA[index, operation]
    probe = feature(index, operation | PROBE, data, argsz=8 + len(data))
    assert peer.ok(FEATURE, probe) == probe
    assert peer.refused(FEATURE, feature(index, operation | PROBE, data, argsz=7 + len(data))) == errno.EINVAL
    if operation == SET:
        request = feature(index, SET, data, argsz=8 + len(data))
        assert peer.ok(FEATURE, request) == request
        assert peer.refused(FEATURE, feature(index, SET, data, argsz=7 + len(data))) == errno.EINVAL


@pytest.mark.parametrize(
    ("index", "size"),
    [(MIGRATION, 16), (STATE, 16), (SIZE, 16), (REPORT, 32 + 8)],
    ids=["flags", "state", "size", "report"],
)
def test_get_takes_an_argsz_of_the_reply(peer: RawPeer, index: int, size: int) -> None:
    """And the reply says how long it is (section 7)."""
    peer.ok(2, dma_map(*MAPPED))
    data = GOOD_DATA[index, GET]
    reply = peer.ok(FEATURE, feature(index, GET, data, argsz=size))
    assert len(reply) == size
    assert reply[:8] == struct.pack("<II", size, index | GET)
    for argsz in (0, 8, size - 1):
        assert peer.refused(FEATURE, feature(index, GET, data, argsz=argsz)) == errno.EINVAL


@pytest.mark.parametrize(("index", "operation"), [key for key, data in GOOD_DATA.items() if data])
def test_data_cut_anywhere(backend: MigratableBackend, peer: RawPeer, index: int, operation: int) -> None:
    peer.ok(2, dma_map(*MAPPED))
    data = GOOD_DATA[index, operation]
    calls = len(backend.calls)
    for length in range(len(data)):
        assert peer.refused(FEATURE, feature(index, operation, data[:length])) == errno.EINVAL
    for length in range(8):
        assert peer.refused(FEATURE, feature(index, operation, data)[:length]) == errno.EINVAL
    assert backend.calls[calls:] == []


@pytest.mark.parametrize("flags", [1, 5, 7])
def test_migration_flags(backend: MigratableBackend, peer: RawPeer, flags: int) -> None:
    backend.flags = MigrationFlags(flags)
    assert peer.ok(FEATURE, feature(MIGRATION, GET)) == struct.pack("<IIQ", 16, MIGRATION | GET, flags)


@pytest.mark.parametrize("state", DeviceState)
def test_device_state(backend: MigratableBackend, peer: RawPeer, state: DeviceState) -> None:
    """The state that was asked for goes to the backend as it is; data_fd is echoed."""
    request = feature(STATE, SET, struct.pack("<Ii", state, -1))
    assert peer.ok(FEATURE, request) == request
    assert backend.called("migration_set_state") == [("migration_set_state", state)]
    assert peer.ok(FEATURE, feature(STATE, GET))[8:] == struct.pack("<Ii", state, 0)


@pytest.mark.parametrize("number", [8, 9, 2**31, 2**32 - 1])
def test_no_device_state(backend: MigratableBackend, peer: RawPeer, number: int) -> None:
    assert peer.refused(FEATURE, feature(STATE, SET, struct.pack("<II", number, 0))) == errno.EINVAL
    assert not backend.called("migration_set_state")


def test_the_backend_refuses_a_transition(backend: MigratableBackend, peer: RawPeer) -> None:
    backend.fail["migration_set_state"] = OSError(errno.EBUSY, "no")
    assert peer.refused(FEATURE, feature(STATE, SET, struct.pack("<II", 1, 0))) == errno.EBUSY
    assert backend.state == DeviceState.RUNNING


@pytest.mark.parametrize(
    ("state", "quiesces"), [(s, s in (0, 1, 3, 4, 5, 7)) for s in range(8)], ids=[state.name for state in DeviceState]
)
def test_quiesced_before_dma_must_stop(backend: MigratableBackend, peer: RawPeer, state: int, quiesces: bool) -> None:
    """Before every state in which the device does no DMA of its own; a query never waits for that."""
    set_state(peer, state)
    names = [call[0] for call in backend.called("quiesce", "migration_set_state")]
    assert names in (["quiesce"] * quiesces + ["migration_set_state"], ["migration_set_state"])
    assert "quiesce" in names or state not in (DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.RESUMING)
    assert "quiesce" not in names or state not in (DeviceState.RUNNING, DeviceState.PRE_COPY)
    calls = len(backend.called("quiesce"))
    peer.ok(FEATURE, feature(STATE, GET))
    peer.ok(FEATURE, feature(STATE, SET | PROBE, struct.pack("<II", 1, 0)))
    assert len(backend.called("quiesce")) == calls


def test_migration_data_size(backend: MigratableBackend, peer: RawPeer) -> None:
    backend.stream += bytes(12345)
    assert peer.ok(FEATURE, feature(SIZE, GET)) == struct.pack("<IIQ", 16, SIZE | GET, 12345)


class NotMigratable(MigratableBackend):
    """Has all the hooks, and no migration."""

    def __init__(self) -> None:
        super().__init__()
        self.flags = MigrationFlags(0)


class Refusing(MigratableBackend):
    def __init__(self) -> None:
        super().__init__()
        self.fail["migration_flags"] = OSError(errno.EOPNOTSUPP, "no migration")


@pytest.mark.parametrize("kind", [RecordingBackend, NotMigratable, Refusing])
def test_row19_a_device_that_cannot_migrate(kind: type[RecordingBackend], caplog: pytest.LogCaptureFixture) -> None:
    """All of it is refused cleanly, and the rest is unaffected."""
    with recording(kind()) as backend, serving(backend) as served:
        peer = served.client()
        peer.ok(2, dma_map(*MAPPED))
        for (index, operation), data in GOOD_DATA.items():
            for flags in (operation, PROBE, PROBE | operation):
                assert peer.refused(FEATURE, feature(index, flags, data)) == errno.EINVAL
        assert peer.refused(DATA_READ, struct.pack("<II", 16, 8)) == errno.EINVAL
        assert peer.refused(DATA_WRITE, struct.pack("<II", 16, 8) + bytes(8)) == errno.EINVAL
        assert not [call for call in backend.calls if "migration" in call[0] or "logging" in call[0]]
        peer.region_write(0, 0, b"data")
        peer.ok(RESET)
    assert_quiet(caplog)


class Stateless(MigratableBackend):
    """Migrates, and cannot say its state."""

    migration_get_state = RecordingBackend.migration_get_state


class Busy(MigratableBackend):
    def migration_get_state(self) -> DeviceState:
        raise OSError(errno.EBUSY, "not now")


class Broken(MigratableBackend):
    def migration_get_state(self) -> DeviceState:
        raise KeyError("a bug")


class WithBrokenFlags(MigratableBackend):
    def migration_flags(self) -> MigrationFlags:
        raise KeyError("a bug")


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Stateless, errno.EINVAL), (Busy, errno.EBUSY), (Broken, errno.EIO), (WithBrokenFlags, errno.EIO)],
)
def test_a_backend_that_fails_to_say_its_state(kind: type[MigratableBackend], error: int) -> None:
    """The command that asks is refused; the connection, the server and everything else live."""
    with recording(kind()) as backend, serving(backend) as served:
        for _ in range(2):
            peer = served.client()
            assert peer.refused(FEATURE, feature(STATE, GET)) == error
            assert peer.refused(DATA_READ, data_read(8)) == error
            peer.region_write(0, 0, b"data")
            peer.ok(RESET)
            peer.close()


def test_row19_hooks_that_an_object_has_and_its_class_has_not() -> None:
    lacking = WithoutSize()
    lacking.migration_data_size = lambda: 7  # type: ignore[method-assign]
    with recording(lacking), serving(lacking) as served:
        assert served.client().ok(FEATURE, feature(SIZE, GET)) == struct.pack("<IIQ", 16, SIZE | GET, 7)


class PlainState(MigratableBackend):
    """Gives its state as a plain number."""

    def migration_get_state(self) -> DeviceState:
        return 2  # type: ignore[return-value]


def test_row31_a_state_that_is_a_plain_number(caplog: pytest.LogCaptureFixture) -> None:
    with recording(PlainState()) as backend, serving(backend) as served:
        assert served.client().refused(DATA_READ, data_read(8)) == errno.EINVAL
    assert_quiet(caplog)


class WithoutSize(MigratableBackend):
    """Migrates, but has no estimate and no dirty log."""

    migration_data_size = RecordingBackend.migration_data_size
    dma_logging_start = RecordingBackend.dma_logging_start


def test_row19_only_what_the_backend_has(caplog: pytest.LogCaptureFixture) -> None:
    with recording(WithoutSize()) as backend, serving(backend) as served:
        peer = served.client()
        for index in (SIZE, START):
            assert peer.refused(FEATURE, feature(index, PROBE)) == errno.EINVAL
        assert peer.ok(FEATURE, feature(MIGRATION, PROBE))
    assert_quiet(caplog)


# Dirty logging


@pytest.mark.parametrize(
    ("page_size", "ranges"),
    [
        (4096, []),
        (1, [(3, 5)]),
        (1 << 63, []),
        (4096, [(0x1000, 0x2000), (0x10000, 0x1000)]),
        (1 << 21, [(1 << 21, 1 << 21), (2**64 - (1 << 21), 1 << 21)]),
    ],
)
def test_row09_logging_start(
    backend: MigratableBackend, peer: RawPeer, page_size: int, ranges: list[tuple[int, int]]
) -> None:
    data = struct.pack("<QII", page_size, len(ranges), 0) + b"".join(struct.pack("<QQ", *pair) for pair in ranges)
    request = feature(START, SET, data)
    assert peer.ok(FEATURE, request) == request
    assert backend.called("dma_logging_start") == [("dma_logging_start", page_size, ranges)]


def test_row09_the_size_chosen_comes_back(backend: MigratableBackend, peer: RawPeer) -> None:
    backend.chosen_page_size = 1 << 16
    data = struct.pack("<QII", 4096, 0, 5)
    assert peer.ok(FEATURE, feature(START, SET, data))[8:] == struct.pack("<QII", 1 << 16, 0, 5)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(struct.pack("<QII", 0, 0, 0), id="page size 0"),
        pytest.param(struct.pack("<QII", 100, 0, 0), id="page size 100"),
        pytest.param(struct.pack("<QII", 2**64 - 1, 0, 0), id="page size 2^64-1"),
        pytest.param(struct.pack("<QII", 4096, 1, 0), id="a range announced, none sent"),
        pytest.param(struct.pack("<QII", 4096, 2, 0) + struct.pack("<QQ", 0, 4096), id="two announced, one sent"),
        pytest.param(struct.pack("<QII", 4096, 1, 0) + bytes(15), id="half a range"),
        pytest.param(struct.pack("<QII", 4096, 2**32 - 1, 0) + bytes(64), id="4 Gi ranges announced"),
        pytest.param(struct.pack("<QII", 4096, 1, 0) + struct.pack("<QQ", 0x800, 4096), id="iova not aligned"),
        pytest.param(struct.pack("<QII", 4096, 1, 0) + struct.pack("<QQ", 0, 100), id="length not aligned"),
        pytest.param(struct.pack("<QII", 4096, 1, 0) + struct.pack("<QQ", 0, 0), id="empty"),
        pytest.param(struct.pack("<QII", 4096, 1, 0) + struct.pack("<QQ", 2**64 - 4096, 8192), id="wrapping"),
        pytest.param(struct.pack("<QII", 4096, 2, 0) + struct.pack("<QQQQ", 0, 8192, 4096, 4096), id="overlapping"),
        pytest.param(
            struct.pack("<QII", 1, 20000, 0) + b"".join(struct.pack("<QQ", n, 1) for n in range(20000)), id="20000"
        ),
    ],
)
def test_row33_logging_start_refused(backend: MigratableBackend, peer: RawPeer, data: bytes) -> None:
    assert peer.refused(FEATURE, feature(START, SET, data, argsz=1 << 20)) == errno.EINVAL
    assert not backend.called("dma_logging_start")


def test_logging_stop(backend: MigratableBackend, peer: RawPeer) -> None:
    for data in (b"", b"ignored"):
        request = feature(STOP, SET, data)
        assert peer.ok(FEATURE, request) == request
    assert len(backend.called("dma_logging_stop")) == 2


def report(iova: int, length: int, page_size: int = 4096, *, argsz: int = 1 << 16) -> bytes:
    return feature(REPORT, GET, struct.pack("<QQQ", iova, length, page_size), argsz=argsz)


@pytest.mark.parametrize(
    ("iova", "length", "page_size", "size"),
    [
        (*MAPPED, 4096, 8),
        (0x10000, 1, 4096, 8),
        (0x10100, 0x300, 1, 0x60),
        (0, 2**64 - 1, 1 << 50, 2048),
        (0x1FFFF, 0x10000, 2, 4096),
        (0, 0x10001, 4096, 8),
        (0x10000, 0x8000, 1 << 63, 8),
    ],
)
def test_row10_any_range_that_touches_what_is_mapped(
    backend: MigratableBackend, peer: RawPeer, iova: int, length: int, page_size: int, size: int
) -> None:
    peer.ok(2, dma_map(*MAPPED))
    reply = peer.ok(FEATURE, report(iova, length, page_size))
    assert reply[:32] == struct.pack("<IIQQQ", 32 + size, REPORT | GET, iova, length, page_size)
    assert reply[32:] == b"\xa5" + bytes(size - 1)
    assert backend.called("dma_logging_report") == [("dma_logging_report", iova, length, page_size, size)]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (report(0, 0x10000), errno.ENOENT),
        (report(0x20000, 0x10000), errno.ENOENT),
        (report(2**64 - 4096, 4096), errno.ENOENT),
        (report(*MAPPED, 0), errno.EINVAL),
        (report(*MAPPED, 100), errno.EINVAL),
        (report(*MAPPED, 2**64 - 1), errno.EINVAL),
        (report(0x10000, 0), errno.EINVAL),
        (report(2**64 - 4096, 8192), errno.EINVAL),
        (report(2**64 - 1, 2**64 - 1), errno.EINVAL),
        (report(0, 2**63, 1, argsz=2**32 - 1), errno.EINVAL),  # a bitmap of 2^60 bytes
        (report(*MAPPED, argsz=39), errno.EINVAL),
    ],
)
def test_row10_report_refused(backend: MigratableBackend, peer: RawPeer, request_: bytes, error: int) -> None:
    peer.ok(2, dma_map(*MAPPED))
    assert peer.refused(FEATURE, request_) == error
    assert not backend.called("dma_logging_report")


def test_row10_the_backend_refuses(backend: MigratableBackend, peer: RawPeer) -> None:
    peer.ok(2, dma_map(*MAPPED))
    backend.fail["dma_logging_report"] = OSError(errno.EINVAL, "logging is off")
    assert peer.refused(FEATURE, report(*MAPPED)) == errno.EINVAL
    peer.check_alive()


# The migration data stream


def data_read(size: int, *, argsz: int | None = None) -> bytes:
    return struct.pack("<II", 8 + size if argsz is None else argsz, size)


@pytest.mark.parametrize("state", [DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P, DeviceState.STOP_COPY])
def test_row11_row31_data_read_is_exact(backend: MigratableBackend, peer: RawPeer, state: int) -> None:
    backend.stream += b"0123456789"
    set_state(peer, state)
    assert peer.ok(DATA_READ, data_read(0)) == struct.pack("<II", 8, 0)
    assert peer.ok(DATA_READ, data_read(4)) == struct.pack("<II", 12, 4) + b"0123"
    assert peer.ok(DATA_READ, data_read(0)) == struct.pack("<II", 8, 0)
    assert peer.ok(DATA_READ, data_read(100)) == struct.pack("<II", 14, 6) + b"456789"
    assert peer.ok(DATA_READ, data_read(100)) == struct.pack("<II", 8, 0)
    assert [call[1] for call in backend.called("migration_read_data")] == [4, 100, 100]


def test_data_both_ways_in_the_largest_pieces(backend: MigratableBackend, peer: RawPeer) -> None:
    data = bytes(range(256)) * (LARGEST // 256)
    set_state(peer, DeviceState.RESUMING)
    assert peer.ok(DATA_WRITE, data_read(LARGEST) + data) == b""
    assert bytes(backend.stream) == data
    set_state(peer, DeviceState.STOP_COPY)
    assert peer.ok(DATA_READ, data_read(LARGEST, argsz=2**32 - 1))[8:] == data


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        data_read(8)[:7],
        data_read(LARGEST + 1),
        data_read(2**32 - 9),
        data_read(2**32 - 1, argsz=2**32 - 1),
        data_read(8, argsz=15),
        data_read(0, argsz=7),
    ],
)
def test_row31_data_read_refused(backend: MigratableBackend, peer: RawPeer, payload: bytes) -> None:
    set_state(peer, DeviceState.STOP_COPY)
    assert peer.refused(DATA_READ, payload) == errno.EINVAL
    assert not backend.called("migration_read_data")


@pytest.mark.parametrize("limit", [1, 1024])
def test_row31_data_read_above_the_clients_limit(backend: MigratableBackend, served: Serving, limit: int) -> None:
    """Row 16: what a write may carry is the server's limit, and does not shrink with the client's."""
    peer = served.client(f'{{"capabilities":{{"max_data_xfer_size":{limit}}}}}\0'.encode())
    backend.stream += bytes(limit + 1)
    set_state(peer, DeviceState.STOP_COPY)
    assert peer.refused(DATA_READ, data_read(limit + 1)) == errno.EINVAL
    assert len(peer.ok(DATA_READ, data_read(limit))) == 8 + limit
    set_state(peer, DeviceState.RESUMING)
    peer.ok(DATA_WRITE, data_read(limit + 1) + bytes(limit + 1))


@pytest.mark.parametrize("state", DeviceState)
def test_data_in_every_state(backend: MigratableBackend, peer: RawPeer, state: DeviceState) -> None:
    set_state(peer, state)
    saving = state in (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P, DeviceState.STOP_COPY)
    for size in (0, 8):
        assert peer.call(DATA_READ, data_read(size)).error == (0 if saving else errno.EINVAL)
        resuming = state == DeviceState.RESUMING
        assert peer.call(DATA_WRITE, data_read(size) + bytes(size)).error == (0 if resuming else errno.EINVAL)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        data_read(8)[:7],
        data_read(8),
        data_read(8) + bytes(7),
        data_read(8) + bytes(9),
        data_read(8, argsz=15) + bytes(8),
        data_read(2**32 - 1, argsz=2**32 - 1) + bytes(8),
        data_read(LARGEST + 1) + bytes(LARGEST + 1),
    ],
)
def test_row16_data_write_refused(backend: MigratableBackend, peer: RawPeer, payload: bytes) -> None:
    set_state(peer, DeviceState.RESUMING)
    assert peer.refused(DATA_WRITE, payload) == errno.EINVAL
    peer.check_alive()
    assert not backend.called("migration_write_data")


def test_data_hooks_refuse(backend: MigratableBackend, peer: RawPeer) -> None:
    backend.fail["migration_read_data"] = OSError(errno.ENODATA, "no")
    backend.fail["migration_write_data"] = OSError(errno.EBADMSG, "no")
    set_state(peer, DeviceState.STOP_COPY)
    assert peer.refused(DATA_READ, data_read(8)) == errno.ENODATA
    set_state(peer, DeviceState.RESUMING)
    assert peer.refused(DATA_WRITE, data_read(8) + bytes(8)) == errno.EBADMSG


class Overfull(MigratableBackend):
    def migration_read_data(self, data: memoryview) -> int:
        return len(data) + 1


def test_a_backend_that_returns_more_than_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    with recording(Overfull()) as backend, serving(backend) as served:
        peer = served.client()
        set_state(peer, DeviceState.STOP_COPY)
        assert peer.refused(DATA_READ, data_read(8)) == errno.EIO
        peer.check_alive()
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


class WithView(MigratableBackend):
    """Has its stream sent without a copy; ``extra`` bytes more than asked."""

    extra = 0

    def migration_view(self, size: int) -> memoryview | None:
        self.record("migration_view", size)
        part = bytes(self.stream[: size + self.extra])
        del self.stream[:size]
        return memoryview(part)


def test_row11_views_of_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    backend = WithView()
    with recording(backend), serving(backend) as served:
        peer = served.client()
        set_state(peer, DeviceState.STOP_COPY)
        backend.stream += b"0123456789"
        assert peer.ok(DATA_READ, data_read(4)) == struct.pack("<II", 12, 4) + b"0123"
        assert peer.ok(DATA_READ, data_read(100)) == struct.pack("<II", 14, 6) + b"456789"
        assert peer.ok(DATA_READ, data_read(100)) == struct.pack("<II", 8, 0)
        assert not backend.called("migration_read_data")
        backend.stream += b"0123456789"
        backend.extra = 1
        assert peer.refused(DATA_READ, data_read(4)) == errno.EIO
        peer.check_alive()
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_no_reply(backend: MigratableBackend, peer: RawPeer) -> None:
    peer.post(FEATURE, feature(STATE, SET, struct.pack("<II", 3, 0)), flags=NO_REPLY)
    peer.post(FEATURE, feature(STATE, SET, struct.pack("<II", 9, 0)), flags=NO_REPLY)
    peer.post(FEATURE, feature(MIGRATION, GET), flags=NO_REPLY)
    peer.post(DATA_READ, data_read(8), flags=NO_REPLY)
    peer.post(DATA_WRITE, data_read(8) + bytes(8), flags=NO_REPLY)
    peer.post(RESET, flags=NO_REPLY)
    peer.check_alive()
    assert [call[0] for call in backend.calls[1:] if call[0] != "quiesce"] == [
        "migration_set_state",
        "migration_read_data",
        "reset",
    ]


# States and the other commands


@pytest.mark.parametrize("state", DeviceState)
def test_row20_what_is_served_in_every_state(backend: MigratableBackend, peer: RawPeer, state: DeviceState) -> None:
    set_state(peer, state)
    bars = errno.EINVAL if state is DeviceState.STOP_COPY else 0
    multi = struct.pack("<QQII8s", 1, 0, 0, 4, b"data")
    for command, payload in ((9, access(0, 0, 4)), (10, access(0, 0, 4) + b"data"), (15, multi)):
        assert peer.call(command, payload).error == bars
    assert peer.call(9, access(0, 0, 4096)).error == bars
    assert peer.region_read(7, 0, 4) == bytes(range(4))
    peer.region_write(7, 4, b"\6\0")
    with memfd() as fd:
        peer.ok(2, dma_map(0, 0x1000), [fd])
    peer.ok(3, dma_unmap(0, 0x1000))
    peer.ok(8, struct.pack("<5I", 20, 1 | 32, 0, 0, 1))
    peer.ok(4, struct.pack("<4I", 16, 0, 0, 0))
    peer.ok(5, struct.pack("<IIIIQQ", 32, 0, 0, 0, 0, 0))
    peer.ok(7, struct.pack("<4I", 16, 0, 0, 0))
    peer.ok(RESET)


def test_row20_bars_come_back_with_the_state(backend: MigratableBackend, peer: RawPeer) -> None:
    for leave in (DeviceState.STOP, DeviceState.RUNNING):
        set_state(peer, DeviceState.STOP_COPY)
        assert peer.refused(9, access(0, 0, 4)) == errno.EINVAL
        set_state(peer, leave)
        peer.region_read(0, 0, 4)


def test_row06_reset_in_every_state_opens_the_bars(backend: MigratableBackend, peer: RawPeer) -> None:
    """The server looks at the state again after a reset, which leads to RUNNING."""
    set_state(peer, DeviceState.STOP_COPY)
    backend.act["reset"] = lambda: setattr(backend, "state", DeviceState.RUNNING)
    peer.ok(RESET)
    peer.region_read(0, 0, 4)


def test_row20_a_failed_transition_is_looked_at_too(backend: MigratableBackend, peer: RawPeer) -> None:
    set_state(peer, DeviceState.STOP_COPY)
    backend.act["migration_set_state"] = lambda: setattr(backend, "state", DeviceState.ERROR)
    backend.fail["migration_set_state"] = OSError(errno.EIO, "failed on the way")
    assert peer.refused(FEATURE, feature(STATE, SET, struct.pack("<II", 1, 0))) == errno.EIO
    peer.region_read(0, 0, 4)


@pytest.mark.parametrize("payload", [b"", b"a payload is tolerated"])
def test_reset(backend: MigratableBackend, peer: RawPeer, payload: bytes) -> None:
    assert peer.ok(RESET, payload) == b""
    assert backend.called("quiesce", "reset") == [("quiesce",), ("reset",)]


def test_reset_refused(backend: MigratableBackend, peer: RawPeer) -> None:
    backend.fail["reset"] = OSError(errno.EBUSY, "no")
    assert peer.refused(RESET) == errno.EBUSY
    backend.resettable = False
    assert peer.refused(RESET) == errno.EINVAL
    assert len(backend.called("reset")) == 1
