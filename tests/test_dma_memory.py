"""Guest memory: mapped, in files, behind messages, and all of them side by side."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.dma.bitmap import bitmap_size
from vfio_user.dma.iova import ADDRESS_SPACE
from vfio_user.dma.memory import FILE_IO, MAX_REGIONS, MMAP, READ, WRITE, GuestMemory
from vfio_user.fds import OwnedFd

RW = READ | WRITE
PAGE = mmap.ALLOCATIONGRANULARITY


def memfd(size: int = 4 * PAGE, content: bytes = b"") -> OwnedFd:
    fd = OwnedFd(os.memfd_create("guest"))
    os.ftruncate(fd.fileno(), size)
    os.pwrite(fd.fileno(), content, 0)
    return fd


def refused(error: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  the errno is looked at
        call(*args)
    assert caught.value.errno == error


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:guest")


class Client:
    """The other end of message-mode DMA: its memory, and what it was asked."""

    def __init__(self, size: int = 1 << 16, error: int = 0) -> None:
        self.memory = bytearray(size)
        self.asked: list[tuple[str, int, int]] = []
        self.error = error

    def dma_read(self, address: int, buffer: memoryview) -> None:
        self.asked.append(("read", address, len(buffer)))
        if self.error:
            raise OSError(self.error, "as told")
        buffer[:] = self.memory[address : address + len(buffer)]

    def dma_write(self, address: int, data: memoryview) -> None:
        self.asked.append(("write", address, len(data)))
        if self.error:
            raise OSError(self.error, "as told")
        self.memory[address : address + len(data)] = data


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    guest = GuestMemory()
    yield guest
    guest.unmap_all()


def dirty(memory: GuestMemory, iova: int, length: int, page_size: int = 4096) -> set[int]:
    out = bytearray(bitmap_size(length, page_size))
    memory.log.report(iova, length, page_size, memoryview(out))
    return {n for n in range(len(out) * 8) if out[n // 8] >> n % 8 & 1}


KINDS = ["hole", "mmap", "file", "message", "mmap-ro", "file-wo"]
FLAGS = {"mmap": RW, "file": RW | FILE_IO, "message": RW, "mmap-ro": READ | MMAP, "file-wo": WRITE | FILE_IO}


@given(
    layout=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 40), st.integers(0, 9000)), max_size=6),
    accesses=st.lists(
        st.tuples(st.sampled_from(["read", "read_into", "write"]), st.integers(0, 150), st.integers(0, 80)),
        max_size=20,
    ),
    connected=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_like_an_array(
    layout: list[tuple[str, int, int]], accesses: list[tuple[str, int, int]], connected: bool
) -> None:
    client = Client()
    memory = GuestMemory(client if connected else None)
    model = bytearray(os.urandom(1 << 12))
    kinds: list[str] = []
    with ExitStack() as stack:
        stack.callback(memory.unmap_all)
        backing: list[tuple[OwnedFd, int, int, int]] = []
        for kind, size, offset in layout:
            address = len(kinds)
            kinds += [kind] * size
            if kind == "hole":
                continue
            fd = None
            if kind != "message":
                fd = memfd(offset + size)
                keep = stack.enter_context(OwnedFd.duplicate(fd.fileno()))
                os.pwrite(keep.fileno(), model[address : address + size], offset)
                backing.append((keep, offset, address, size))
            memory.map(address, size, FLAGS[kind], fd, offset)
        client.memory[: len(kinds)] = model[: len(kinds)]
        for number, (what, address, size) in enumerate(accesses):
            errors = set()
            for kind in (kinds + ["hole"] * 300)[address : address + size]:
                if kind == "hole" or (kind == "message" and not connected):
                    errors.add(errno.EFAULT)
                elif (kind == "mmap-ro" and what == "write") or (kind == "file-wo" and what != "write"):
                    errors.add(errno.EPERM)
            data = bytes([number + 1]) * size
            target = bytearray(b"?" * size)
            call: Callable[[], object] = {
                "read": lambda address=address, size=size: memory.read(address, size),
                "read_into": lambda address=address, target=target: memory.read_into(address, target),
                "write": lambda address=address, data=data: memory.write(address, data),
            }[what]
            if errors:
                with pytest.raises(OSError) as caught:  # noqa: PT011  the errno is looked at
                    call()
                assert caught.value.errno in errors
                assert target == b"?" * size
                continue
            result = call()
            if what == "write":
                model[address : address + size] = data
            else:
                assert (target if what == "read_into" else result) == model[address : address + size]
        for fd, offset, address, size in backing:
            assert os.pread(fd.fileno(), size, offset) == model[address : address + size]
        for address in (a for a, kind in enumerate(kinds) if kind == "message"):
            assert client.memory[address] == model[address]


@pytest.mark.parametrize("offset", [0, 1, PAGE, PAGE + 7, 2 * PAGE - 1])
@pytest.mark.parametrize("flags", [RW, RW | MMAP, RW | FILE_IO])
def test_offset_and_size_need_no_alignment(memory: GuestMemory, offset: int, flags: int) -> None:
    content = os.urandom(3 * PAGE + 5)
    memory.map(0x777, PAGE + 5, flags, memfd(len(content), content), offset)
    assert memory.read(0x777, PAGE + 5) == content[offset : offset + PAGE + 5]


@pytest.mark.parametrize("address", [0, ADDRESS_SPACE - PAGE])
def test_ends_of_the_address_space(memory: GuestMemory, address: int) -> None:
    memory.map(address, PAGE, RW, memfd())
    memory.write(address + PAGE - 1, b"x")
    assert memory.read(address, PAGE) == bytes(PAGE - 1) + b"x"
    refused(errno.EFAULT, memory.read, address + PAGE - 1, 2)
    refused(errno.EFAULT, memory.read, address - 1, 2)


def test_bad_sizes(memory: GuestMemory) -> None:
    memory.map(0, PAGE, RW, memfd())
    refused(errno.EINVAL, memory.read, 0, -1)
    refused(errno.EFAULT, memory.read, 0, 1 << 62)
    assert memory.read(5 * PAGE, 0) == b""


@pytest.mark.parametrize("flags", [RW, RW | MMAP, RW | FILE_IO])
def test_permissions(memory: GuestMemory, flags: int) -> None:
    for place, granted in enumerate((0, READ, WRITE, RW)):
        memory.map(place * PAGE, PAGE, flags & ~RW | granted, memfd())
        for need, call, args in (
            (READ, memory.read, (place * PAGE, 1)),
            (READ, memory.read_into, (place * PAGE, bytearray(1))),
            (WRITE, memory.write, (place * PAGE, b"x")),
        ):
            if granted & need:
                call(*args)
            else:
                refused(errno.EPERM, call, *args)


def test_every_kind_of_buffer(memory: GuestMemory) -> None:
    memory.map(0, PAGE, RW, memfd())
    words = memoryview(bytearray(b"abcdefgh")).cast("I")
    for data in (b"abcdefgh", bytearray(b"abcdefgh"), memoryview(b"abcdefgh").cast("b"), words):
        memory.write(8, bytes(8))
        memory.write(8, data)
        assert memory.read(8, 8) == b"abcdefgh"
    target = memoryview(bytearray(8)).cast("I")
    memory.read_into(8, target)
    assert target == words


@pytest.mark.parametrize(
    ("address", "size", "flags", "offset", "error"),
    [
        (0, 0, RW, 0, errno.EINVAL),
        (0, -PAGE, RW, 0, errno.EINVAL),
        (0, PAGE, RW, -PAGE, errno.EINVAL),
        (0, PAGE, RW | FILE_IO, -PAGE, errno.EINVAL),
        (-PAGE, PAGE, RW, 0, errno.EINVAL),
        (ADDRESS_SPACE - PAGE, 2 * PAGE, RW, 0, errno.EINVAL),
        (0, PAGE, RW | MMAP | FILE_IO, 0, errno.EINVAL),
        (0, PAGE, RW | 16, 0, errno.EINVAL),
        (0, PAGE, -1, 0, errno.EINVAL),
        (0, 4 * PAGE + 1, RW, 0, errno.EINVAL),
        (0, 1, RW, 4 * PAGE, errno.EINVAL),
        (0, PAGE, RW, (1 << 64) - 1, errno.EINVAL),
        (0, PAGE, RW | FILE_IO, (1 << 63) - PAGE, errno.EINVAL),
        (0, 1 << 63, RW | MMAP, 0, errno.EINVAL),
        (9 * PAGE, PAGE, RW, 0, errno.EEXIST),  # the same place and size, another offset
        (9 * PAGE, 2 * PAGE, RW, PAGE, errno.EEXIST),
        (8 * PAGE, 2 * PAGE, RW | FILE_IO, 0, errno.EEXIST),
    ],
)
def test_map_refused(memory: GuestMemory, address: int, size: int, flags: int, offset: int, error: int) -> None:
    memory.map(9 * PAGE, PAGE, RW, memfd(), PAGE)
    before, maps, fd = open_fds(), mappings(), memfd()
    refused(error, memory.map, address, size, flags, fd, offset)
    assert fd.closed
    assert (open_fds(), mappings(), list(memory)) == (before, maps, [(9 * PAGE, PAGE, RW)])


@pytest.mark.parametrize("flags", [RW | MMAP, RW | FILE_IO, 32])
def test_map_without_a_descriptor_refused(memory: GuestMemory, flags: int) -> None:
    refused(errno.EINVAL, memory.map, 0, PAGE, flags)
    assert len(memory) == 0


def test_descriptors_that_are_no_memory(memory: GuestMemory) -> None:
    reader, writer = os.pipe()
    left, right = socket.socketpair()
    with left:
        for number in (reader, writer, os.eventfd(0), right.detach()):
            for flags in (RW, RW | MMAP, RW | FILE_IO):
                refused(errno.EINVAL, memory.map, 0, PAGE, flags, OwnedFd.duplicate(number))
            os.close(number)
    assert len(memory) == 0


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_more_than_a_device_can_map(memory: GuestMemory, size: int) -> None:
    refused(errno.EINVAL, memory.map, 0, size, RW, OwnedFd(os.open("/dev/zero", os.O_RDWR)))


def test_a_device_as_memory(memory: GuestMemory) -> None:
    memory.map(0, PAGE, RW, OwnedFd(os.open("/dev/zero", os.O_RDWR)))
    memory.write(5, b"x")
    assert memory.read(4, 3) == b"\0x\0"


def test_descriptor_without_write_permission(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    refused(errno.EACCES, memory.map, 0, PAGE, RW, OwnedFd(os.open(path, os.O_RDONLY)))
    memory.map(0, PAGE, READ, OwnedFd(os.open(path, os.O_RDONLY)))
    assert memory.read(0, 4) == bytes(4)


def test_the_same_region_again_changes_nothing(memory: GuestMemory) -> None:
    for place, flags in enumerate((RW, RW | MMAP, RW | FILE_IO)):
        fd = memfd()
        again = [OwnedFd.duplicate(fd.fileno()) for _ in range(3)]
        memory.map(place * PAGE, PAGE, flags, fd, PAGE)
        memory.log.start(4096)
        memory.write(place * PAGE, b"x")
        memory.map(place * PAGE, PAGE, flags, again[0], PAGE)
        assert again[0].closed
        assert dirty(memory, place * PAGE, PAGE) == {0}
        refused(errno.EEXIST, memory.map, place * PAGE, PAGE, flags & ~WRITE, again[1], PAGE)
        refused(errno.EEXIST, memory.map, place * PAGE, PAGE, flags, memfd(), PAGE)
        refused(errno.EEXIST, memory.map, place * PAGE, PAGE, flags, again[2], 0)
    memory.map(1 << 20, PAGE, RW)
    memory.map(1 << 20, PAGE, RW)
    refused(errno.EEXIST, memory.map, 1 << 20, PAGE, READ)
    assert len(memory) == 4


def test_too_many_regions() -> None:
    memory = GuestMemory()
    for index in range(MAX_REGIONS):
        memory.map(index * PAGE, PAGE, RW)
    memory.map(0, PAGE, RW)
    refused(errno.ENOSPC, memory.map, MAX_REGIONS * PAGE, PAGE, RW)


def test_unmap(memory: GuestMemory) -> None:
    fds, maps = open_fds(), mappings()
    memory.map(0, PAGE, RW, memfd())
    memory.map(PAGE, PAGE, RW | FILE_IO, memfd())
    assert (open_fds(), mappings()) == (fds + 2, maps + 1)  # the mapping keeps a duplicate
    for address, size in ((0, 2 * PAGE), (1, PAGE - 1), (0, 1), (2 * PAGE, PAGE)):
        refused(errno.ENOENT, memory.unmap, address, size)
    memory.unmap(0, PAGE)
    refused(errno.EFAULT, memory.read, 0, 1)
    refused(errno.EFAULT, memory.write, PAGE - 1, b"xx")
    assert memory.read(PAGE, 1) == b"\0"
    memory.unmap(PAGE, PAGE)
    refused(errno.EFAULT, memory.read, PAGE, 1)
    assert (open_fds(), mappings(), len(memory)) == (fds, maps, 0)


def test_unmap_all_frees_everything_and_leaves_logging_on() -> None:
    fds, maps = open_fds(), mappings()
    memory = GuestMemory(Client())
    memory.log.start(4096)
    for place, flags in enumerate((RW, RW | MMAP, RW | FILE_IO)):
        memory.map(place * PAGE, PAGE, flags, memfd())
    memory.map(3 * PAGE, PAGE, RW)
    memory.unmap_all()
    assert (open_fds(), mappings(), len(memory)) == (fds, maps, 0)
    assert memory.log.active
    memory.map(0, PAGE, RW, memfd())
    assert dirty(memory, 0, 4 * PAGE) == set()
    memory.unmap_all()


def test_what_was_dirty_comes_back_with_the_memory_that_can_be_written(memory: GuestMemory) -> None:
    fd = memfd()
    memory.log.start(4096)
    memory.map(0, 4 * PAGE, RW, OwnedFd.duplicate(fd.fileno()))
    memory.write(3 * PAGE, b"1")
    memory.unmap(0, 4 * PAGE)
    for address, flags, offset in ((2 * PAGE, RW, 0), (2 * PAGE, READ, 2 * PAGE), (3 * PAGE, RW, 0)):
        memory.map(address, 2 * PAGE, flags, OwnedFd.duplicate(fd.fileno()), offset)
        assert dirty(memory, 0, 5 * PAGE) == set()
        memory.unmap(address, 2 * PAGE)
    memory.map(2 * PAGE, 2 * PAGE, RW, None)
    assert dirty(memory, 0, 4 * PAGE) == set()
    memory.unmap(2 * PAGE, 2 * PAGE)
    memory.map(2 * PAGE, 2 * PAGE, WRITE | FILE_IO, fd, 2 * PAGE)
    assert dirty(memory, 0, 4 * PAGE, PAGE) == {3}
    assert not memory.log.incomplete


def test_what_a_client_that_left_had_unmapped_is_forgotten(memory: GuestMemory) -> None:
    memory.messages = Client()
    memory.log.start(4096)
    memory.map(0, PAGE, RW, memfd())
    memory.write(0, b"1")
    memory.unmap(0, PAGE)
    assert memory.log.incomplete
    memory.messages = None
    assert not memory.log.incomplete


def test_a_region_goes_when_nobody_holds_the_memory() -> None:
    gc.collect()
    fds, maps = open_fds(), mappings()
    memory = GuestMemory(Client())
    memory.map(0, PAGE, RW, memfd())
    memory.map(PAGE, PAGE, RW | FILE_IO, memfd())
    memory.map(2 * PAGE, PAGE, RW)
    gc.disable()
    try:
        del memory
        assert (open_fds(), mappings()) == (fds, maps)
    finally:
        gc.enable()


def test_message_mode(memory: GuestMemory) -> None:
    client = Client()
    memory.map(0x1000, 0x1000, RW)
    refused(errno.EFAULT, memory.read, 0x1000, 1)
    memory.messages = client
    assert memory.messages is client
    memory.log.start(4096)
    memory.write(0x1FFF, b"x")
    assert memory.read(0x1FFE, 2) == b"\0x"
    assert client.asked == [("write", 0x1FFF, 1), ("read", 0x1FFE, 2)]
    assert dirty(memory, 0x1000, 0x1000) == set()
    client.error = errno.EIO
    refused(errno.EIO, memory.read, 0x1000, 1)
    memory.messages = None
    refused(errno.EFAULT, memory.write, 0x1000, b"x")


def test_nothing_moves_when_the_end_cannot_be_reached(memory: GuestMemory) -> None:
    client = Client()
    memory.messages = client
    memory.map(0, PAGE, RW)
    memory.map(PAGE, PAGE, RW, memfd())
    memory.map(2 * PAGE, PAGE, READ, memfd())
    refused(errno.EFAULT, memory.read, 0, 4 * PAGE)
    refused(errno.EPERM, memory.write, 0, bytes(3 * PAGE))
    memory.messages = None
    memory.map(3 * PAGE, PAGE, RW)
    refused(errno.EFAULT, memory.write, PAGE - 1, b"xx")
    assert memory.read(PAGE, 1) == b"\0"
    assert client.asked == []


def test_a_file_that_shrank(memory: GuestMemory) -> None:
    fd = memfd()
    with OwnedFd.duplicate(fd.fileno()) as keep:
        memory.map(0, 4 * PAGE, RW | FILE_IO, fd)
        os.ftruncate(keep.fileno(), PAGE)
        assert memory.read(0, PAGE) == bytes(PAGE)
        refused(errno.EIO, memory.read, PAGE - 1, 2)


def test_file_io_in_small_parts(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    memory.map(0, PAGE, RW | FILE_IO, memfd(), 3)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:3]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:2], at))
    memory.write(10, b"0123456789")
    assert memory.read(9, 12) == b"\x000123456789\0"


@pytest.mark.parametrize("flags", [RW, RW | FILE_IO])
def test_writes_are_logged(memory: GuestMemory, flags: int) -> None:
    memory.map(0, 4 * PAGE, flags, memfd())
    memory.write(0, b"before")
    memory.log.start(4096)
    memory.map(4 * PAGE, 4 * PAGE, flags, memfd())
    memory.read(0, 8 * PAGE)
    assert dirty(memory, 0, 8 * PAGE) == set()
    memory.write(PAGE, b"x")
    memory.write(4 * PAGE - 1, b"xx")
    assert dirty(memory, 0, 8 * PAGE) == {1, 3, 4}
    memory.write(7 * PAGE, b"x")
    memory.unmap(4 * PAGE, 4 * PAGE)
    memory.map(4 * PAGE, 4 * PAGE, flags, memfd())
    assert dirty(memory, 0, 8 * PAGE) == set()


def test_a_write_is_logged_after_its_bytes_are_there(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    mark = memory.log.mark

    def look(address: int, length: int) -> None:
        seen.append(memory.read(address, length))
        mark(address, length)

    monkeypatch.setattr(memory.log, "mark", look)
    memory.map(0, PAGE, RW, memfd())
    memory.map(PAGE, PAGE, RW | FILE_IO, memfd())
    memory.log.start(4096)
    memory.write(PAGE - 2, b"ab")
    memory.write(PAGE - 1, b"cd")
    with memory.view(0, 2, write=True) as [view]:
        view[:] = b"ef"
    assert seen == [b"ab", b"c", b"d", b"ef"]


def test_a_write_that_fails_halfway_is_logged(memory: GuestMemory) -> None:
    memory.messages = Client(error=errno.ENODEV)
    memory.map(0, PAGE, RW, memfd())
    memory.map(PAGE, PAGE, RW)
    memory.log.start(4096)
    refused(errno.ENODEV, memory.write, PAGE - 1, b"xx")
    assert dirty(memory, 0, 2 * PAGE) == {0}


def test_a_file_write_that_fails_halfway_is_logged(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.map(0, PAGE, RW | FILE_IO, memfd())
    memory.log.start(4096)
    pwrite, parts = os.pwrite, iter([1, 0])
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: next(parts)], at))
    refused(errno.EIO, memory.write, 0, b"xyz")
    assert memory.read(0, 3) == b"x\0\0"
    assert dirty(memory, 0, PAGE) == {0}


def test_no_room_for_the_bitmap_of_a_region(memory: GuestMemory) -> None:
    before, maps, fd = open_fds(), mappings(), memfd(1 << 43)
    memory.log.start(4096)
    memory.map(1 << 50, PAGE, RW, memfd())
    refused(errno.ENOMEM, memory.map, 0, 1 << 43, RW | FILE_IO, fd)
    assert fd.closed
    memory.unmap_all()
    assert (open_fds(), mappings()) == (before, maps)
    refused(errno.EFAULT, memory.read, 0, 1)


def test_view(memory: GuestMemory) -> None:
    memory.map(0, PAGE, RW, memfd(content=b"abc"))
    memory.map(PAGE, PAGE, RW, memfd())
    memory.log.start(4096)
    with memory.view(1, 2) as [view]:
        assert bytes(view) == b"bc"
        assert view.readonly
    with pytest.raises(ValueError, match="released"):
        len(view)
    with memory.view(PAGE - 1, 3, write=True) as views:
        views[0][:] = b"x"
        views[1][:] = b"yz"
        assert [len(view) for view in views] == [1, 2]
        assert dirty(memory, 0, 2 * PAGE) == set()
    assert memory.read(PAGE - 1, 3) == b"xyz"
    assert dirty(memory, 0, 2 * PAGE) == {0, 1}
    with memory.view(0, 0) as views:
        assert views == []


def test_view_refused(memory: GuestMemory) -> None:
    memory.map(0, PAGE, READ, memfd())
    memory.map(PAGE, PAGE, RW | FILE_IO, memfd())
    memory.map(2 * PAGE, PAGE, RW)

    def view(address: int, size: int, write: bool) -> None:
        with memory.view(address, size, write):
            pytest.fail("was not refused")

    refused(errno.EPERM, view, 0, 1, True)
    refused(errno.ENOTSUP, view, 0, PAGE + 1, False)
    refused(errno.ENOTSUP, view, PAGE, 1, True)
    refused(errno.ENOTSUP, view, 2 * PAGE, 1, True)
    refused(errno.EFAULT, view, 0, 4 * PAGE, False)


def test_unmap_below_a_view(memory: GuestMemory) -> None:
    maps = mappings()
    memory.map(0, PAGE, RW, memfd())
    with memory.view(0, 3, write=True) as [view]:
        memory.unmap(0, PAGE)
        refused(errno.EFAULT, memory.read, 0, 1)
        view[:] = b"abc"
        assert mappings() == maps + 1
    assert mappings() == maps


def test_a_view_that_something_is_made_of(memory: GuestMemory) -> None:
    maps = mappings()
    memory.map(0, PAGE, RW, memfd())
    with memory.view(0, 8, write=True) as [view]:
        words = view.cast("I")
    memory.unmap(0, PAGE)
    words[0] = 7
    assert mappings() == maps + 1
    del view, words
    assert mappings() == maps
