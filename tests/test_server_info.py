"""GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO: protocol.md, section 4."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from tests.support import (
    RawPeer,
    RecordingBackend,
    Serving,
    assert_quiet,
    eventfds,
    recording,
    serving,
)
from vfio_user import Region, RegionIoFd
from vfio_user.wire.constants import IoFdType


@pytest.fixture
def backend() -> Iterator[RecordingBackend]:
    with recording(RecordingBackend()) as backend:
        yield backend


@pytest.fixture
def served(backend: RecordingBackend, caplog: pytest.LogCaptureFixture) -> Iterator[Serving]:
    with serving(backend) as served:
        yield served
    assert_quiet(caplog)


@pytest.fixture
def peer(served: Serving) -> RawPeer:
    return served.client()


def four(*words: int) -> bytes:
    return struct.pack("<4I", *words)


@pytest.mark.parametrize("resettable", [False, True])
@pytest.mark.parametrize("extra", [b"", b"later version"])
def test_get_info(backend: RecordingBackend, peer: RawPeer, resettable: bool, extra: bytes) -> None:
    backend.resettable = resettable
    assert peer.ok(4, four(16 + len(extra), 0xFF, 1, 2) + extra) == four(16, 2 | resettable, 9, 5)


@pytest.mark.parametrize("payload", [b"", four(16, 0, 0, 0)[:15], four(15, 0, 0, 0), four(0, 0, 0, 0)])
@pytest.mark.parametrize("command", [4, 7])
def test_too_small(peer: RawPeer, command: int, payload: bytes) -> None:
    assert peer.refused(command, payload) == errno.EINVAL
    peer.check_alive()


@pytest.mark.parametrize(("index", "flags", "count"), [(0, 7, 1), (1, 1, 4), (2, 1, 2048), (4, 1, 1)])
def test_get_irq_info(peer: RawPeer, index: int, flags: int, count: int) -> None:
    assert peer.ok(7, four(100, 0xFF, index, 0xFF)) == four(16, flags, index, count)


@pytest.mark.parametrize("index", [5, 0xFFFFFFFF])
def test_get_irq_info_of_no_index(peer: RawPeer, index: int) -> None:
    assert peer.refused(7, four(16, 0, index, 0)) == errno.EINVAL


def region_info(argsz: int, index: int) -> bytes:
    return struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0)


@pytest.mark.parametrize(
    ("index", "flags", "size"), [(0, 3, 0x1000), (1, 1, 0x100), (2, 2, 0x100), (7, 3, 256), (5, 0, 0), (8, 0, 0)]
)
def test_get_region_info(peer: RawPeer, index: int, flags: int, size: int) -> None:
    reply = peer.call(5, region_info(32, index))
    assert reply.payload == struct.pack("<IIIIQQ", 32, flags, index, 0, size, 0)
    assert reply.fds == []


def test_a_region_of_size_0_does_not_exist(backend: RecordingBackend, served: Serving) -> None:
    """Whatever its other fields say."""
    backend.regions[5] = Region()
    peer = served.client()
    assert peer.ok(5, region_info(32, 5)) == struct.pack("<IIIIQQ", 32, 0, 5, 0, 0, 0)
    assert peer.refused(6, four(16, 0, 5, 0)) == errno.EINVAL


def test_row13_sparse_areas_in_the_reply(backend: RecordingBackend, peer: RawPeer) -> None:
    reply = peer.call(5, region_info(80, 3))
    assert reply.payload == struct.pack("<IIIIQQ", 80, 3 | 4 | 8, 3, 32, 0x3000, 0x1000) + struct.pack(
        "<HHIIIQQQQ", 1, 1, 0, 2, 0, 0, 0x1000, 0x2000, 0x1000
    )
    (fd,) = reply.fds
    assert os.path.sameopenfile(fd, backend.file.fileno())


@pytest.mark.parametrize("argsz", [32, 48, 79])
def test_row13_sparse_areas_that_do_not_fit(backend: RecordingBackend, peer: RawPeer, argsz: int) -> None:
    """The size that is needed, no CAPS and no cap_offset, but the descriptor, because MMAP is set."""
    reply = peer.call(5, region_info(argsz, 3))
    assert reply.payload == struct.pack("<IIIIQQ", 80, 3 | 4, 3, 0, 0x3000, 0x1000)
    assert [os.path.sameopenfile(fd, backend.file.fileno()) for fd in reply.fds] == [True]


def test_row13_a_region_that_is_wholly_mappable(peer: RawPeer) -> None:
    reply = peer.call(5, region_info(0xFFFFFFFF, 4))
    assert reply.payload == struct.pack("<IIIIQQ", 32, 3 | 4, 4, 0, 0x1000, 0)
    assert len(reply.fds) == 1


def test_row13_no_mmap_for_a_client_that_takes_no_descriptors(served: Serving) -> None:
    peer = served.client(b'{"capabilities":{"max_msg_fds":0}}\0')
    reply = peer.call(5, region_info(80, 3))
    assert reply.payload == struct.pack("<IIIIQQ", 32, 3, 3, 0, 0x3000, 0x1000)
    assert reply.fds == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        region_info(32, 0)[:31],
        region_info(31, 0),
        region_info(0, 0),
        region_info(32, 9),
        region_info(32, 2**32 - 1),
    ],
)
def test_get_region_info_refused(peer: RawPeer, payload: bytes) -> None:
    assert peer.refused(5, payload) == errno.EINVAL
    peer.check_alive()


def io_fds_region(backend: RecordingBackend, fds: list[int]) -> None:
    """All three types; the first and the last share their descriptor, the shadow memory is one of its own."""
    backend.regions[0] = Region(
        0x1000,
        io_fds=[
            RegionIoFd(IoFdType.IOEVENTFD, 0x10, 4, fds[0], flags=1, datamatch=0xAABB),
            RegionIoFd(IoFdType.IOREGIONFD, 0x20, 8, fds[1], flags=2, user_data=0x1122334455667788),
            RegionIoFd(IoFdType.IOEVENTFD_SHADOW, 0x30, 2, fds[0], shadow_fd=fds[2], shadow_offset=0x40, datamatch=3),
        ],
    )


def test_row03_region_io_fds(backend: RecordingBackend, peer: RawPeer) -> None:
    """48 bytes for each entry, at the offsets of protocol.md, section 4.3; descriptors are sent once."""
    with eventfds(3) as fds:
        io_fds_region(backend, fds)
        reply = peer.call(6, four(16 + 3 * 48, 0, 0, 0))
        assert reply.payload[:16] == four(160, 0, 0, 3)
        assert reply.payload[16:] == (
            struct.pack("<QQIIIIQQ", 0x10, 4, 0, 0, 1, 0, 0, 0xAABB)
            + struct.pack("<QQIIIIQQ", 0x20, 8, 1, 1, 2, 0, 0x1122334455667788, 0)
            + struct.pack("<QQIIIIQQ", 0x30, 2, 0, 2, 0, 2, 0x40, 3)
        )
        assert len(reply.fds) == 3
        for value, fd in enumerate(reply.fds, 1):
            os.eventfd_write(fd, value)
        assert [os.eventfd_read(fd) for fd in fds] == [1, 2, 3]


@pytest.mark.parametrize("argsz", [16, 64, 159])
def test_row03_region_io_fds_that_do_not_fit(backend: RecordingBackend, peer: RawPeer, argsz: int) -> None:
    with eventfds(3) as fds:
        io_fds_region(backend, fds)
        reply = peer.call(6, four(argsz, 0, 0, 0))
    assert (reply.payload, reply.fds) == (four(160, 0, 0, 3), [])


def test_a_sub_region_without_a_descriptor(backend: RecordingBackend, peer: RawPeer) -> None:
    backend.regions[0] = Region(0x1000, io_fds=[RegionIoFd(IoFdType.IOEVENTFD, 0, 4, -1)])
    reply = peer.call(6, four(64, 0, 0, 0))
    assert struct.unpack_from("<I", reply.payload, 32) == (0xFFFFFFFF,)
    assert reply.fds == []


def test_region_without_io_fds(peer: RawPeer) -> None:
    assert peer.ok(6, four(1 << 20, 0, 7, 0)) == four(16, 0, 7, 0)


def test_of_more_io_fds_than_the_client_takes_the_first_are_offered(served: Serving, backend: RecordingBackend) -> None:
    peer = served.client(b'{"capabilities":{"max_msg_fds":2}}\0')
    with eventfds(3) as fds:
        io_fds_region(backend, fds)
        assert peer.ok(6, four(16, 0, 0, 0)) == four(112, 0, 0, 2)
        reply = peer.call(6, four(112, 0, 0, 0))
        assert reply.payload[:16] == four(112, 0, 0, 2)
        assert len(reply.fds) == 2


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        four(16, 0, 0, 0)[:15],
        four(15, 0, 0, 0),
        four((1 << 20) + 1, 0, 0, 0),
        four(16, 1, 0, 0),
        four(16, 0, 0, 1),
        four(16, 0, 9, 0),
        four(16, 0, 5, 0),  # a region that does not exist
    ],
)
def test_get_region_io_fds_refused(peer: RawPeer, payload: bytes) -> None:
    assert peer.refused(6, payload) == errno.EINVAL
    peer.check_alive()
