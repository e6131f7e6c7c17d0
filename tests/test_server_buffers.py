"""Buffers that are used again: replies hold what is theirs, and large messages that come in pieces come whole."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import (
    REPLY,
    MigratableBackend,
    RawPeer,
    access,
    dma_map,
    message,
    open_fds,
    recording,
    serving,
)
from vfio_user import Region
from vfio_user.server.context import Context, Limits
from vfio_user.wire.constants import DeviceState

MAP, WRITE, DMA_READ, FEATURE, DATA_READ = 2, 10, 11, 16, 17
MIB = 1 << 20
STATE, STOP, REPORT, GET, SET = 2, 7, 8, 1 << 16, 1 << 17
MODES: dict[str, dict[str, Any]] = {"serve_forever": {}, "poll": {"polled": True}, "spin": {"spin": 50e-6}}


class BulkBackend(MigratableBackend):
    """Has 1 MiB of memory. The n-th read of migration data gets bytes n; the hook ``reported`` fills reports."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = bytearray(MIB)
        self.regions[0] = Region(MIB)
        self.reads = 0
        self.reported: Callable[[memoryview], None] = lambda bitmap: None

    def migration_read_data(self, data: memoryview) -> int:
        self.reads += 1
        number = self.reads
        data[: len(data) // 2] = bytes([number]) * (len(data) // 2)
        self.record("migration_read_data", number)
        data[len(data) // 2 :] = bytes([number]) * (len(data) - len(data) // 2)
        return len(data)

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        self.reported(bitmap)


@pytest.fixture
def backend() -> Iterator[BulkBackend]:
    with recording(BulkBackend()) as backend:
        yield backend  # type: ignore[misc]


@pytest.fixture(params=MODES)
def peer(request: pytest.FixtureRequest, backend: BulkBackend) -> Iterator[RawPeer]:
    with serving(backend, **MODES[request.param]) as served:
        yield served.client()


def data_read(size: int) -> bytes:
    return struct.pack("<II", 8 + size, size)


def stop_and_copy(peer: RawPeer) -> None:
    peer.ok(FEATURE, struct.pack("<IIII", 16, STATE | SET, DeviceState.STOP_COPY, 0))


def test_a_reply_buffer_is_kept_zeroed_and_given_back(backend: BulkBackend) -> None:
    context = Context(backend, Limits())
    first = context.reply_buffer(MIB)
    first[:] = b"x" * MIB
    assert context.reply_buffer(MIB // 2).obj is first.obj
    assert context.reply_buffer(MIB // 2, zeroed=True) == bytes(MIB // 2)
    assert first[MIB // 2 :] == b"x" * (MIB // 2)
    assert len(context.reply_buffer(2 * MIB)) == 2 * MIB
    kept = context.reply_buffer(MIB)
    context.depth = 1
    assert context.reply_buffer(MIB).obj is not kept.obj
    context.depth = 0
    assert context.reply_buffer(MIB).obj is kept.obj
    context.drop_reply_buffers()
    assert context.reply_buffer(MIB).obj is not kept.obj
    assert context.reply_buffer(64).obj is not context.reply_buffer(64).obj


def test_large_reads_one_after_the_other(peer: RawPeer) -> None:
    stop_and_copy(peer)
    for number, size in enumerate((MIB, MIB // 2, MIB - 1), 1):
        assert peer.ok(DATA_READ, data_read(size)) == data_read(size) + bytes([number]) * size


def test_a_large_read_while_another_one_awaits_dma(backend: BulkBackend, peer: RawPeer) -> None:
    """Its reply goes out first, and does not touch what the other one has filled in already."""

    def ask() -> None:
        del backend.act["migration_read_data"]
        assert backend.link is not None
        backend.link.dma_read(0, memoryview(bytearray(4)))

    stop_and_copy(peer)
    backend.act["migration_read_data"] = ask
    peer.send(message(1, DATA_READ, data_read(MIB)))
    request = peer.read()
    assert request.command == DMA_READ
    peer.send(message(2, DATA_READ, data_read(MIB)))
    second = peer.read()
    assert (second.msg_id, second.payload) == (2, data_read(MIB) + b"\2" * MIB)
    peer.reply(request, request.payload + b"data")
    first = peer.read()
    assert (first.msg_id, first.payload) == (1, data_read(MIB) + b"\1" * MIB)


def test_a_report_shows_nothing_of_the_one_before(backend: BulkBackend, peer: RawPeer) -> None:
    """Neither before nor after logging was stopped, and with migration data in between."""
    length, size = 1 << 33, 1 << 18
    stop_and_copy(peer)
    peer.ok(MAP, dma_map(0, length))
    request = struct.pack("<IIQQQ", 32 + size, REPORT | GET, 0, length, 4096)

    def fill(bitmap: memoryview) -> None:
        assert bitmap == bytes(size)
        bitmap[:] = b"\xff" * size

    backend.reported = fill
    assert peer.ok(FEATURE, request)[32:] == b"\xff" * size
    assert peer.ok(FEATURE, request)[32:] == b"\xff" * size
    peer.ok(DATA_READ, data_read(MIB))
    backend.reported = lambda bitmap: None
    assert peer.ok(FEATURE, request) == request + bytes(size)
    peer.ok(FEATURE, struct.pack("<II", 8, STOP | SET))
    assert peer.ok(FEATURE, request) == request + bytes(size)


@pytest.mark.parametrize("pieces", [(1,), (15, 16, 17), (31, 32, 33, 100), (32, MIB // 2), (4096, MIB, MIB + 31)])
def test_a_large_write_in_pieces(backend: BulkBackend, peer: RawPeer, pieces: tuple[int, ...]) -> None:
    data = bytes(n % 251 for n in range(MIB))
    whole = message(1, WRITE, access(0, 0, MIB) + data)
    for start, stop in zip((0, *pieces), (*pieces, len(whole)), strict=True):
        peer.send(whole[start:stop])
    reply = peer.read()
    assert (reply.msg_id, reply.flags, reply.payload) == (1, REPLY, access(0, 0, MIB))
    assert backend.memory == data


def test_a_large_write_with_a_descriptor_in_its_middle(backend: BulkBackend, peer: RawPeer) -> None:
    """Refused whole; the stream goes on with the next message, and the descriptor is closed."""
    before = open_fds()
    whole = message(1, WRITE, access(0, 0, MIB) + b"x" * MIB)
    peer.send(whole[:1000])
    peer.send(whole[1000:2000], [0])
    peer.send(whole[2000:])
    reply = peer.read()
    assert (reply.msg_id, reply.error) == (1, errno.EINVAL)
    peer.check_alive()
    assert open_fds() <= before
    assert backend.memory == bytes(MIB)


def test_a_client_that_leaves_in_the_middle_of_a_large_write(backend: BulkBackend) -> None:
    with serving(backend) as served:
        peer = served.client()
        peer.send(message(1, WRITE, access(0, 0, MIB) + b"x" * MIB)[: MIB // 2])
        peer.close()
        backend.wait_for("disconnected")
        served.client().check_alive()
    assert backend.memory == bytes(MIB)
