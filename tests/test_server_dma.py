"""DMA_MAP and DMA_UNMAP: protocol.md, sections 6.1 and 6.2, and rows 2, 4, 5, 27 of section 0."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support import (
    NO_REPLY,
    MigratableBackend,
    RawPeer,
    assert_quiet,
    dma_map,
    dma_unmap,
    eventfds,
    memfd,
    open_fds,
    recording,
    serving,
)

MAP, UNMAP = 2, 3
MMAP, FILE_IO = 4, 8
GET_DIRTY_BITMAP, ALL = 1, 2
TIB = 1 << 40


@pytest.fixture
def backend() -> Iterator[MigratableBackend]:
    backend = MigratableBackend()
    with recording(backend):
        yield backend


@pytest.fixture
def peer(backend: MigratableBackend, caplog: pytest.LogCaptureFixture) -> Iterator[RawPeer]:
    with serving(backend, max_dma_maps=64) as served:
        yield served.client()
    assert_quiet(caplog)


def test_map_and_unmap(backend: MigratableBackend, peer: RawPeer) -> None:
    with memfd() as fd:
        assert peer.ok(MAP, dma_map(0x10000, 0x4000, offset=0x1000), [fd]) == b""
        assert peer.ok(MAP, dma_map(0x20000, 0x4000, flags=1)) == b""
        assert os.path.sameopenfile(backend.fds[0].fileno(), fd)
    assert peer.ok(UNMAP, dma_unmap(0x10000, 0x4000, argsz=999)) == dma_unmap(0x10000, 0x4000, argsz=999)
    assert peer.refused(UNMAP, dma_unmap(0x10000, 0x4000)) == errno.ENOENT
    assert backend.called("dma_map", "quiesce", "dma_unmap") == [
        ("dma_map", 3, 0x1000, 0x10000, 0x4000, True),
        ("dma_map", 1, 0, 0x20000, 0x4000, False),
        ("quiesce",),
        ("dma_unmap", 0, 0x10000, 0x4000),
        ("quiesce",),
    ]


def test_row02_the_very_same_region_again(backend: MigratableBackend, peer: RawPeer) -> None:
    """addr, size, offset, same file, same flags: success, nothing changes, and the descriptor is closed."""
    with memfd() as fd:
        request = dma_map(0x10000, 0x4000, offset=0x1000)
        peer.ok(MAP, request, [fd])
        before = open_fds()
        for _ in range(3):
            assert peer.ok(MAP, request, [fd]) == b""
        assert open_fds() <= before
    message_mode = dma_map(0x20000, 0x1000)
    peer.ok(MAP, message_mode)
    peer.ok(MAP, message_mode)
    assert len(backend.called("dma_map")) == 2


@pytest.mark.parametrize(
    "request_",
    [
        dma_map(0x10000, 0x4000, offset=0),
        dma_map(0x10000, 0x4000, offset=0x1000, flags=1),
        dma_map(0x10000, 0x4000, offset=0x1000, flags=3 | MMAP),
        dma_map(0x10000, 0x1000, offset=0x1000),
        dma_map(0x10000, 0x8000, offset=0x1000),
        dma_map(0x13FFF, 1),
        dma_map(0x13FFF, 0x1000),
        dma_map(0xF000, 0x1001),
        dma_map(0, TIB),
        dma_map(0x11000, 0x1000),
    ],
)
def test_row02_any_other_overlap(backend: MigratableBackend, peer: RawPeer, request_: bytes) -> None:
    with memfd() as fd:
        peer.ok(MAP, dma_map(0x10000, 0x4000, offset=0x1000), [fd])
        before = open_fds()
        assert peer.refused(MAP, request_, [fd]) == errno.EEXIST
        assert open_fds() <= before
    assert len(backend.called("dma_map")) == 1


def test_row02_another_file_is_another_region(backend: MigratableBackend, peer: RawPeer) -> None:
    with memfd() as fd, memfd() as other:
        peer.ok(MAP, dma_map(0x10000, 0x4000), [fd])
        assert peer.refused(MAP, dma_map(0x10000, 0x4000), [other]) == errno.EEXIST
        assert peer.refused(MAP, dma_map(0x10000, 0x4000)) == errno.EEXIST
        assert peer.ok(MAP, dma_map(0xC000, 0x4000), [other]) == b""
        assert peer.ok(MAP, dma_map(0x14000, 0x4000), [other]) == b""


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 3 | MMAP, 3 | FILE_IO])
def test_row04_flags(backend: MigratableBackend, peer: RawPeer, flags: int) -> None:
    with memfd() as fd:
        peer.ok(MAP, dma_map(0x10000, 0x4000, flags=flags), [fd])
    assert backend.called("dma_map") == [("dma_map", flags, 0, 0x10000, 0x4000, True)]


@pytest.mark.parametrize("flags", [MMAP | FILE_IO, 3 | MMAP | FILE_IO, 16, 3 | 16, 1 << 31, 0xFFFFFFFF])
def test_row04_every_other_bit(backend: MigratableBackend, peer: RawPeer, flags: int) -> None:
    with memfd() as fd:
        assert peer.refused(MAP, dma_map(0x10000, 0x4000, flags=flags), [fd]) == errno.EINVAL
    assert peer.refused(MAP, dma_map(0x10000, 0x4000, flags=flags)) == errno.EINVAL
    assert not backend.called("dma_map")


@pytest.mark.parametrize("flags", [MMAP, FILE_IO])
def test_row04_access_by_file_without_a_descriptor(peer: RawPeer, flags: int) -> None:
    assert peer.refused(MAP, dma_map(0x10000, 0x4000, flags=3 | flags)) == errno.EINVAL


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (b"", errno.EINVAL),
        (dma_map(0, 0x1000)[:31], errno.EINVAL),
        (dma_map(0, 0x1000, argsz=31), errno.EINVAL),
        (dma_map(0, 0x1000, argsz=0), errno.EINVAL),
        (dma_map(0x1000, 0), errno.EINVAL),
        (dma_map(0, 8 * TIB + 1), errno.ENOSPC),
        (dma_map(0, 2**64 - 1), errno.ENOSPC),
        (dma_map(2**64 - 0x1000, 0x1001), errno.EINVAL),
        (dma_map(2**64 - 0x1000, 0x2000), errno.EINVAL),
        (dma_map(2**64 - 1, 2), errno.EINVAL),
    ],
)
def test_map_refused(backend: MigratableBackend, peer: RawPeer, request_: bytes, error: int) -> None:
    assert peer.refused(MAP, request_) == error
    peer.check_alive()
    assert not backend.called("dma_map")


@pytest.mark.parametrize("offset", [2**63 - 0x1000, 2**63, 2**64 - 0x1000, 2**64 - 1])
def test_offsets_that_leave_any_file(backend: MigratableBackend, peer: RawPeer, offset: int) -> None:
    with memfd() as fd:
        assert peer.refused(MAP, dma_map(0, 0x1000, offset=offset), [fd]) == errno.EINVAL
    assert not backend.called("dma_map")


@pytest.mark.parametrize(("address", "size"), [(0, 8 * TIB), (2**64 - 0x1000, 0x1000), (0x1234, 7), (2**64 - 1, 1)])
def test_ranges_at_the_limits(backend: MigratableBackend, peer: RawPeer, address: int, size: int) -> None:
    peer.ok(MAP, dma_map(address, size))
    peer.ok(UNMAP, dma_unmap(address, size))
    assert backend.called("dma_unmap") == [("dma_unmap", 0, address, size)]


def test_extra_bytes_of_a_later_version(peer: RawPeer) -> None:
    peer.ok(MAP, dma_map(0, 0x1000, argsz=40) + bytes(8))
    peer.ok(UNMAP, dma_unmap(0, 0x1000, argsz=32) + bytes(8))


@pytest.mark.parametrize("kind", ["eventfd", "pipe", "socket"])
def test_row27_what_cannot_be_mapped(backend: MigratableBackend, peer: RawPeer, kind: str) -> None:
    ends = os.pipe() if kind == "pipe" else tuple(end.detach() for end in socket.socketpair())
    with eventfds(1) as events:
        before = open_fds()
        fd = events[0] if kind == "eventfd" else ends[0]
        assert peer.refused(MAP, dma_map(0, 0x1000), [fd]) == errno.EINVAL
        peer.ok(MAP, dma_map(0, 0x1000))
        assert open_fds() <= before
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("count", [2, 8])
def test_row27_more_than_one_descriptor(backend: MigratableBackend, peer: RawPeer, count: int) -> None:
    with memfd() as fd:
        before = open_fds()
        assert peer.refused(MAP, dma_map(0, 0x1000), [fd] * count) == errno.EINVAL
        peer.check_alive()
        assert open_fds() <= before
    assert not backend.called("dma_map")


def test_max_dma_maps(backend: MigratableBackend, peer: RawPeer) -> None:
    for number in range(64):
        peer.ok(MAP, dma_map(number * 0x1000, 0x1000))
    assert peer.refused(MAP, dma_map(64 * 0x1000, 0x1000)) == errno.ENOSPC
    peer.ok(MAP, dma_map(0, 0x1000))  # the very same again
    peer.ok(UNMAP, dma_unmap(0x5000, 0x1000))
    peer.ok(MAP, dma_map(64 * 0x1000, 0x1000))


@pytest.mark.parametrize("error", [errno.ENOMEM, 0xBEEF])
def test_the_hook_refuses_to_map(backend: MigratableBackend, peer: RawPeer, error: int) -> None:
    backend.fail["dma_map"] = OSError(error, "no")
    with memfd() as fd:
        before = open_fds()
        assert peer.refused(MAP, dma_map(0, 0x1000), [fd]) == error
        assert peer.refused(MAP, dma_map(0, 0x1000)) == error
        peer.check_alive()
        assert open_fds() <= before
    backend.fail.clear()
    peer.ok(MAP, dma_map(0, 0x1000))


def test_the_hook_refuses_to_unmap(backend: MigratableBackend, peer: RawPeer) -> None:
    peer.ok(MAP, dma_map(0, 0x1000))
    backend.fail["dma_unmap"] = OSError(errno.EBUSY, "no")
    assert peer.refused(UNMAP, dma_unmap(0, 0x1000)) == errno.EBUSY
    backend.fail.clear()
    peer.ok(UNMAP, dma_unmap(0, 0x1000))


def test_quiesce_refuses(backend: MigratableBackend, peer: RawPeer) -> None:
    peer.ok(MAP, dma_map(0, 0x1000))
    backend.fail["quiesce"] = OSError(errno.EAGAIN, "no")
    assert peer.refused(UNMAP, dma_unmap(0, 0x1000)) == errno.EAGAIN
    assert peer.refused(13) == errno.EAGAIN
    backend.fail.clear()
    peer.ok(UNMAP, dma_unmap(0, 0x1000))


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (0x10000, 0x2000),
        (0x12000, 0x2000),
        (0x11000, 0x1000),
        (0x12000, 2**64 - 0x12000),
        (0, 0x12000),
        (0, 0x10000),
        (0x14000, 0x1000),
        (0x10000, 0),
        (0, 0),
    ],
)
def test_unmap_takes_no_part_of_a_region(backend: MigratableBackend, peer: RawPeer, address: int, size: int) -> None:
    peer.ok(MAP, dma_map(0x10000, 0x4000))
    assert peer.refused(UNMAP, dma_unmap(address, size)) == errno.ENOENT
    assert not backend.called("dma_unmap")


@pytest.mark.parametrize(("address", "size"), [(0x10000, 2**64 - 1), (2**64 - 1, 2**64 - 1), (0x1000, 2**64 - 0xFFF)])
def test_unmap_does_not_wrap(backend: MigratableBackend, peer: RawPeer, address: int, size: int) -> None:
    """A range that holds a region and then leaves the address space: the kernel says EINVAL, too."""
    peer.ok(MAP, dma_map(0x10000, 0x4000))
    assert peer.refused(UNMAP, dma_unmap(address, size)) == errno.EINVAL
    assert not backend.called("dma_unmap")


@pytest.mark.parametrize(("address", "size"), [(0x10000, 0x5000), (0, 1 << 20), (0, 2**64 - 1), (0xF000, 0x6001)])
def test_unmap_takes_all_regions_of_a_range(backend: MigratableBackend, peer: RawPeer, address: int, size: int) -> None:
    """As the kernel's VFIO does: QEMU with an emulated IOMMU ends an address space so, and then maps the next."""
    for page in (0x10000, 0x11000, 0x14000):
        peer.ok(MAP, dma_map(page, 0x1000))
    assert peer.ok(UNMAP, dma_unmap(address, size)) == dma_unmap(address, size)
    assert sorted(backend.called("dma_unmap")) == [
        ("dma_unmap", 0, page, 0x1000) for page in (0x10000, 0x11000, 0x14000)
    ]
    peer.ok(MAP, dma_map(0, 1 << 20))


def test_a_range_that_cuts_its_last_region_takes_none(backend: MigratableBackend, peer: RawPeer) -> None:
    for page in (0x10000, 0x12000):
        peer.ok(MAP, dma_map(page, 0x2000))
    for address, size in ((0x10000, 0x3000), (0x11000, 0x3000)):
        assert peer.refused(UNMAP, dma_unmap(address, size)) == errno.ENOENT
    assert not backend.called("dma_unmap")


def test_the_hook_refuses_in_the_middle_of_a_range(backend: MigratableBackend, peer: RawPeer) -> None:
    """What the client is told is an error; what the server believes to be mapped is what the backend has."""
    for page in (0x10000, 0x11000):
        peer.ok(MAP, dma_map(page, 0x1000))
    backend.fail["dma_unmap"] = OSError(errno.EBUSY, "no")
    assert peer.refused(UNMAP, dma_unmap(0, 1 << 20)) == errno.EBUSY
    backend.fail.clear()
    peer.ok(UNMAP, dma_unmap(0x10000, 0x1000))
    peer.ok(UNMAP, dma_unmap(0x11000, 0x1000))


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        dma_unmap(0, 0x1000)[:23],
        dma_unmap(0, 0x1000, argsz=23),
        dma_unmap(0, 0x1000, flags=3),
        dma_unmap(0, 0x1000, flags=4),
        dma_unmap(0, 0x1000, flags=1 << 31),
        dma_unmap(0, 0x1000, flags=ALL),
        dma_unmap(0x1000, 0, flags=ALL),
        dma_unmap(0, 1, flags=ALL),
    ],
)
def test_unmap_refused(backend: MigratableBackend, peer: RawPeer, request_: bytes) -> None:
    peer.ok(MAP, dma_map(0, 0x1000))
    assert peer.refused(UNMAP, request_) == errno.EINVAL
    assert not backend.called("dma_unmap")


def test_row05_unmap_all(backend: MigratableBackend, peer: RawPeer) -> None:
    for address in (0x30000, 0x10000, 2**64 - 0x1000):
        peer.ok(MAP, dma_map(address, 0x1000))
    assert peer.ok(UNMAP, dma_unmap(0, 0, flags=ALL)) == dma_unmap(0, 0, flags=ALL)
    assert {call[2] for call in backend.called("dma_unmap")} == {0x30000, 0x10000, 2**64 - 0x1000}
    assert peer.ok(UNMAP, dma_unmap(0, 0, flags=ALL)) == dma_unmap(0, 0, flags=ALL)
    assert len(backend.called("dma_unmap")) == 3
    peer.ok(MAP, dma_map(0, 8 * TIB))


def with_bitmap(address: int, size: int, page_size: int, bitmap_size: int, *, argsz: int | None = None) -> bytes:
    head = dma_unmap(address, size, flags=GET_DIRTY_BITMAP, argsz=40 + bitmap_size if argsz is None else argsz)
    return head + struct.pack("<QQ", page_size, bitmap_size)


@pytest.mark.parametrize("bitmap_size", [8, 16, 100])
def test_row05_dirty_bitmap(backend: MigratableBackend, peer: RawPeer, bitmap_size: int) -> None:
    peer.ok(MAP, dma_map(0x10000, 0x4000))
    request = with_bitmap(0x10000, 0x4000, 4096, bitmap_size)
    assert peer.ok(UNMAP, request) == request + b"\xa5" + bytes(bitmap_size - 1)
    assert backend.called("dma_logging_report", "dma_unmap") == [
        ("dma_logging_report", 0x10000, 0x4000, 4096, bitmap_size),
        ("dma_unmap", GET_DIRTY_BITMAP, 0x10000, 0x4000),
    ]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EBUSY])
def test_row05_what_logging_does_not_cover(backend: MigratableBackend, peer: RawPeer, error: int) -> None:
    peer.ok(MAP, dma_map(0x10000, 0x4000))
    backend.fail["dma_logging_report"] = OSError(error, "not logged")
    assert peer.refused(UNMAP, with_bitmap(0x10000, 0x4000, 4096, 8)) == error
    assert not backend.called("dma_unmap")
    peer.ok(UNMAP, dma_unmap(0x10000, 0x4000))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (dma_unmap(0x10000, 0x4000, flags=1, argsz=48), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 4096, 8)[:39], errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 4096, 8, argsz=47), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 4096, 7), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 4096, 0), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 16, 127), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 4096, 1 << 32, argsz=2**32 - 1), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 4096, 2**64 - 1, argsz=2**32 - 1), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 0, 8), errno.EINVAL),
        (with_bitmap(0x10000, 0x4000, 100, 64), errno.EINVAL),
        (with_bitmap(0x10000, 0x3000, 4096, 8), errno.ENOENT),
        (with_bitmap(0, 2**64 - 1, 1 << 63, 8), errno.ENOENT),
        (with_bitmap(2**64 - 4096, 8192, 4096, 8), errno.EINVAL),
    ],
)
def test_row05_dirty_bitmap_refused(backend: MigratableBackend, peer: RawPeer, request_: bytes, error: int) -> None:
    peer.ok(MAP, dma_map(0x10000, 0x4000))
    assert peer.refused(UNMAP, request_) == error
    assert not backend.called("dma_unmap", "dma_logging_report")


def test_no_reply(backend: MigratableBackend, peer: RawPeer) -> None:
    with memfd() as fd:
        peer.post(MAP, dma_map(0, 0x1000), [fd], flags=NO_REPLY)
        peer.post(MAP, dma_map(0, 0x2000), [fd], flags=NO_REPLY)
    peer.post(UNMAP, dma_unmap(0, 0x1000), flags=NO_REPLY)
    peer.post(UNMAP, dma_unmap(0, 0x1000), flags=NO_REPLY)
    peer.check_alive()
    assert len(backend.called("dma_map")) == len(backend.called("dma_unmap")) == 1


def test_descriptors_with_unmap(backend: MigratableBackend, peer: RawPeer) -> None:
    peer.ok(MAP, dma_map(0, 0x1000))
    with memfd() as fd:
        assert peer.refused(UNMAP, dma_unmap(0, 0x1000), [fd]) == errno.EINVAL
    peer.ok(UNMAP, dma_unmap(0, 0x1000))
