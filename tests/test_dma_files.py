"""Regions in the same file: one mapping and one descriptor for all of them, and nothing left at the end."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfio_user.dma.files import SharedFiles
from vfio_user.dma.memory import FILE_IO, MAX_REGIONS, MMAP, READ, WRITE, GuestMemory
from vfio_user.fds import OwnedFd

RW = READ | WRITE
PAGE = mmap.ALLOCATIONGRANULARITY
HUGE_PAGE = 2 << 20
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def refused(error: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  the errno is looked at
        call(*args)
    assert caught.value.errno == error


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped(name: str = "shared") -> list[tuple[int, str]]:
    """The size and the permissions of each mapping of the memfds that are called so."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"memfd:{name}" in line:
            addresses, permissions = line.split()[:2]
            start, end = addresses.split("-")
            found.append((int(end, 16) - int(start, 16), permissions))
    return found


def memfd(size: int, flags: int = os.MFD_CLOEXEC) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("shared", flags))
    os.ftruncate(fd.fileno(), size)
    return fd


def again(fd: OwnedFd) -> OwnedFd:
    return OwnedFd.duplicate(fd.fileno())


def reopened(fd: OwnedFd, flags: int) -> OwnedFd:
    return OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", flags))


@contextmanager
def limit(which: int, value: int) -> Iterator[None]:
    """Lower a soft limit of this process."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    fds = open_fds()
    yield
    assert (open_fds(), mapped()) == (fds, [])


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    guest = GuestMemory()
    yield guest
    guest.unmap_all()


@dataclass
class Mapping:
    """What the memory should hold once: a mapping of ``size`` bytes, or a descriptor. ``users`` are keys of regions."""

    size: int
    users: set[object] = field(default_factory=set)


FILES = 3
FILE_PAGES = 6
WAYS = [RW, RW | MMAP, READ, WRITE, READ | MMAP, RW | FILE_IO, READ | FILE_IO]
PAGES = st.integers(0, FILE_PAGES)
# Bytes beside the page limits too: nothing needs to be aligned.
OFFSETS = st.builds(lambda page, more: page * PAGE + more, PAGES, st.sampled_from([0, 0, 1, PAGE - 1]))


class FilesMachine(RuleBasedStateMachine):
    """Maps and unmaps over several files that grow and shrink, against a model of every byte and every descriptor."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.before = open_fds()
        self.memory = GuestMemory()
        self.files = [memfd(FILE_PAGES * PAGE) for _ in range(FILES)]
        self.readers = [reopened(file, os.O_RDONLY) for file in self.files]
        self.content = [bytearray(FILE_PAGES * PAGE) for _ in range(FILES)]
        self.regions: dict[int, tuple[int, int, int, int]] = {}
        self.held: dict[tuple[int, ...], list[Mapping]] = {}
        self.fds = open_fds()
        self.number = 0

    def join(self, key: tuple[int, ...], end: int, size: int, user: object) -> None:
        mappings = self.held.setdefault(key, [])
        if not mappings or mappings[-1].size < end:
            mappings.append(Mapping(size))
        mappings[-1].users.add(user)

    def leave(self, user: object) -> None:
        for key, mappings in self.held.items():
            for mapping in mappings:
                mapping.users.discard(user)
            self.held[key] = [mapping for mapping in mappings if mapping.users]

    @initialize(pages=st.lists(st.integers(0, FILES - 1), max_size=12))
    def page_by_page(self, pages: list[int]) -> None:
        for place, file in enumerate(pages):
            self.map(place, file, place % FILE_PAGES * PAGE, PAGE, RW, False)

    @rule(
        place=st.integers(0, 20),
        file=st.integers(0, FILES - 1),
        offset=OFFSETS,
        size=st.sampled_from([1, PAGE, PAGE + 1, 2 * PAGE]),
        flags=st.sampled_from(WAYS),
        reader=st.booleans(),
    )
    def map(self, place: int, file: int, offset: int, size: int, flags: int, reader: bool) -> None:
        fd = again((self.readers if reader else self.files)[file])
        address = place * 16 * PAGE
        region = (file, offset, size, flags)
        length = len(self.content[file])
        if place in self.regions:
            expected = 0 if self.regions[place] == region else errno.EEXIST
        elif flags & FILE_IO:
            expected = 0
        elif offset + size > length:
            expected = errno.EINVAL
        else:
            expected = errno.EACCES if reader and flags & WRITE else 0
        if expected:
            refused(expected, self.memory.map, address, size, flags, fd, offset)
        else:
            self.memory.map(address, size, flags, fd, offset)
        assert fd.closed
        if expected or place in self.regions:
            return
        if flags & FILE_IO:
            self.join((file, reader), 0, 0, place)
        else:
            self.join((file, reader, flags & RW), offset + size, length, place)
        # What is written through a reader's descriptor fails, as it did when the region had its own.
        self.regions[place] = (file, offset, size, flags & ~WRITE if reader else flags)
        if reader and flags & WRITE:
            self.unmap(place)

    @rule(place=st.integers(0, 20))
    def unmap(self, place: int) -> None:
        if place in self.regions:
            self.memory.unmap(place * 16 * PAGE, self.regions.pop(place)[2])
            self.leave(place)

    @rule()
    def unmap_all(self) -> None:
        self.memory.unmap_all()
        self.regions.clear()
        self.held.clear()

    @rule(file=st.integers(0, FILES - 1), pages=st.integers(1, 2))
    def grow(self, file: int, pages: int) -> None:
        self.content[file] += bytes(pages * PAGE)
        os.ftruncate(self.files[file].fileno(), len(self.content[file]))

    @rule(file=st.integers(0, FILES - 1))
    def shrink_what_is_free(self, file: int) -> None:
        used = max((region[1] + region[2] for region in self.regions.values() if region[0] == file), default=0)
        length = min(len(self.content[file]), -(-max(used, 1) // PAGE) * PAGE)
        del self.content[file][length:]
        os.ftruncate(self.files[file].fileno(), length)

    @rule(place=st.integers(0, 20), at=st.integers(0, PAGE))
    def write(self, place: int, at: int) -> None:
        if place not in self.regions:
            return
        file, offset, size, flags = self.regions[place]
        if flags & WRITE and at < size and offset + size <= len(self.content[file]):
            self.number += 1
            data = self.number.to_bytes(8, "little")[: size - at]
            self.memory.write(place * 16 * PAGE + at, data)
            self.content[file][offset + at : offset + at + len(data)] = data
        elif not flags & WRITE:
            refused(errno.EPERM, self.memory.write, place * 16 * PAGE, b"x")

    @invariant()
    def every_byte_is_right(self) -> None:
        for place, (file, offset, size, flags) in self.regions.items():
            if offset + size > len(self.content[file]):
                continue  # file I/O on what is not there
            address = place * 16 * PAGE
            if flags & READ:
                assert self.memory.read(address, size) == self.content[file][offset : offset + size]
                refused(errno.EFAULT, self.memory.read, address, size + 1)
                refused(errno.EFAULT, self.memory.read, address - 1, size)

    @invariant()
    def nothing_is_held_twice(self) -> None:
        held = [mapping for mappings in self.held.values() for mapping in mappings]
        assert open_fds() == self.fds + len(held)
        assert sum(size for size, _ in mapped()) == sum(mapping.size for mapping in held)

    def teardown(self) -> None:
        self.memory.unmap_all()
        for fd in self.files + self.readers:
            fd.close()
        assert (open_fds(), mapped()) == (self.before, [])


TestFiles = FilesMachine.TestCase
TestFiles.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_as_many_regions_as_there_can_be(memory: GuestMemory) -> None:
    with memfd(MAX_REGIONS * PAGE) as fd, limit(resource.RLIMIT_NOFILE, open_fds() + 20):
        for page in range(MAX_REGIONS):
            flags = RW | FILE_IO if page % 2 else RW
            memory.map(2 * page * PAGE, PAGE, flags, again(fd), page * PAGE)
        os.pwrite(fd.fileno(), b"last", (MAX_REGIONS - 1) * PAGE)
        assert memory.read(2 * (MAX_REGIONS - 1) * PAGE, 4) == b"last"
        assert mapped() == [(MAX_REGIONS * PAGE, "rw-s")]


def test_a_region_ends_where_it_ends_and_not_with_the_mapping(memory: GuestMemory) -> None:
    with memfd(3 * PAGE) as fd:
        memory.map(PAGE, PAGE, RW, again(fd), PAGE)
        for address in (PAGE - 1, 2 * PAGE - 1):
            refused(errno.EFAULT, memory.read, address, 2)
            refused(errno.EFAULT, memory.write, address, b"xx")
        with memory.view(PAGE, PAGE, write=True) as [view]:
            assert len(view) == PAGE
            view[:] = b"x" * PAGE
        assert os.pread(fd.fileno(), 3 * PAGE, 0) == bytes(PAGE) + b"x" * PAGE + bytes(PAGE)


def test_access_is_not_shared(memory: GuestMemory) -> None:
    with memfd(4 * PAGE) as fd:
        memory.map(0, PAGE, RW, again(fd))
        memory.map(PAGE, PAGE, READ, again(fd), PAGE)
        assert sorted(mapped()) == [(4 * PAGE, "r--s"), (4 * PAGE, "rw-s")]
        refused(errno.EACCES, memory.map, 2 * PAGE, PAGE, RW, reopened(fd, os.O_RDONLY), 2 * PAGE)
        refused(errno.EBADF, memory.map, 2 * PAGE, PAGE, READ, reopened(fd, os.O_PATH), 2 * PAGE)
        memory.map(2 * PAGE, PAGE, READ, reopened(fd, os.O_RDONLY), 2 * PAGE)
        memory.write(0, b"x")
        refused(errno.EPERM, memory.write, PAGE, b"x")
        refused(errno.EPERM, memory.write, 2 * PAGE, b"x")


def test_file_access_is_not_shared(memory: GuestMemory) -> None:
    with memfd(4 * PAGE) as fd:
        for place, flags in enumerate((os.O_RDWR | os.O_APPEND, os.O_RDONLY, os.O_PATH, os.O_RDWR)):
            memory.map(place * PAGE, PAGE, RW | FILE_IO, reopened(fd, flags))
        refused(errno.EBADF, memory.write, PAGE, b"x")
        refused(errno.EBADF, memory.read, 2 * PAGE, 1)
        memory.write(3 * PAGE, b"x")
        assert (memory.read(PAGE, 1), os.fstat(fd.fileno()).st_size) == (b"x", 4 * PAGE)


def test_a_file_that_has_grown(memory: GuestMemory) -> None:
    with memfd(PAGE) as fd:
        memory.map(0, PAGE, RW, again(fd))
        refused(errno.EINVAL, memory.map, PAGE, PAGE, RW, again(fd), PAGE)
        os.ftruncate(fd.fileno(), 8 * PAGE)
        for page in range(1, 8):
            memory.map(page * PAGE, PAGE, RW, again(fd), page * PAGE)
        memory.write(PAGE - 1, b"xy")
        assert os.pread(fd.fileno(), 2, PAGE - 1) == b"xy"
        assert sum(size for size, _ in mapped()) == 9 * PAGE
        memory.unmap(0, PAGE)
        assert mapped() == [(8 * PAGE, "rw-s")]


def test_a_file_that_was_cut_off(memory: GuestMemory) -> None:
    with memfd(4 * PAGE) as fd:
        memory.map(0, PAGE, RW, again(fd))
        os.ftruncate(fd.fileno(), 2 * PAGE)
        refused(errno.EINVAL, memory.map, 3 * PAGE, PAGE, RW, again(fd), 3 * PAGE)
        memory.map(PAGE, PAGE, RW, again(fd), PAGE)
        os.ftruncate(fd.fileno(), 4 * PAGE)
        memory.map(3 * PAGE, PAGE, RW, again(fd), 3 * PAGE)
        memory.write(3 * PAGE, b"x")
        assert os.pread(fd.fileno(), 1, 3 * PAGE) == b"x"


def test_a_file_that_is_cut_off_after_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.fstat

    def look_and_cut_off(fd: int) -> os.stat_result:
        status = look(fd)
        os.ftruncate(fd, PAGE)
        return status

    monkeypatch.setattr(os, "fstat", look_and_cut_off)
    with memfd(4 * PAGE) as fd:
        refused(errno.EINVAL, SharedFiles().map, fd.fileno(), 2 * PAGE, PAGE, mmap.PROT_READ)


@pytest.mark.parametrize("size", [4 * PAGE, 16 << 40])
@pytest.mark.parametrize("offset", [0, 5, PAGE, 2 * PAGE - 1])
def test_a_view_has_the_bytes_that_were_asked_for_and_no_more(size: int, offset: int) -> None:
    with memfd(size) as fd:
        os.pwrite(fd.fileno(), bytes(range(256)) * 64, 0)
        files = SharedFiles()
        for length in (1, 7, PAGE, PAGE + 1):
            with files.map(fd.fileno(), offset, length, mmap.PROT_READ) as view:
                assert view == os.pread(fd.fileno(), length, offset)
                assert view.readonly


@pytest.mark.parametrize("size", [16 << 40, (1 << 63) - PAGE])
def test_only_what_is_needed_of_a_file_that_is_too_large(memory: GuestMemory, size: int) -> None:
    with memfd(size) as fd:
        for place, offset in enumerate((0, 5 * PAGE + 1, size - PAGE - 1)):
            memory.map(2 * place * PAGE, PAGE, RW, again(fd), offset)
            memory.write(2 * place * PAGE, b"x")
            assert os.pread(fd.fileno(), 2, offset) == b"x\0"
        assert sum(length for length, _ in mapped()) == 5 * PAGE


def test_only_what_is_needed_where_there_is_no_room_for_all(memory: GuestMemory) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    with memfd(4 << 40) as fd:
        with limit(resource.RLIMIT_AS, used + (1 << 30)):
            memory.map(0, PAGE, RW, again(fd), 1 << 40)
            refused(errno.ENOMEM, memory.map, 1 << 40, 2 << 40, RW, again(fd))
        assert mapped() == [(PAGE, "rw-s")]
        memory.map(PAGE, PAGE, RW, again(fd), 2 << 40)
        memory.write(PAGE - 1, b"xy")
        assert os.pread(fd.fileno(), 1, (1 << 40) + PAGE - 1) == b"x"
        assert os.pread(fd.fileno(), 1, 2 << 40) == b"y"


def test_huge_pages(memory: GuestMemory) -> None:
    if not FREE_HUGE_PAGES.exists() or int(FREE_HUGE_PAGES.read_text()) < 2:
        pytest.skip("no huge pages are free: sysctl vm.nr_hugepages=2")
    with memfd(2 * HUGE_PAGE, os.MFD_CLOEXEC | os.MFD_HUGETLB) as fd:
        for page in (1, 511, 512, 1023):
            memory.map(page * PAGE, PAGE, RW, again(fd), page * PAGE)
            memory.write(page * PAGE, b"x")
        assert mapped() == [(2 * HUGE_PAGE, "rw-s")]
        memory.unmap(PAGE, PAGE)
        assert memory.read(1023 * PAGE, 2) == b"x\0"
        # More of the file than there are huge pages: what is needed is mapped all the same.
        os.ftruncate(fd.fileno(), 1 << 40)
        memory.map(0, 1, RW, again(fd), 0)
        refused(errno.ENOMEM, memory.map, 1 << 40, 1 << 39, RW, again(fd))


@pytest.mark.parametrize("flags", [RW, RW | FILE_IO])
def test_a_file_with_a_name(memory: GuestMemory, tmp_path: Path, flags: int) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(range(256)) * 100)  # its end is within a page
    fds = open_fds()
    for place in range(50):
        memory.map(place * PAGE, 512, flags, OwnedFd(os.open(path, os.O_RDWR)), place * 512)
    memory.write(49 * PAGE + 511, b"!")
    assert path.read_bytes()[-3:] == b"\xfd\xfe!"
    assert open_fds() == fds + 1
    # Another file of that name is another file.
    path.unlink()
    path.write_bytes(b"new" * 1000)
    memory.map(50 * PAGE, 3, flags, OwnedFd(os.open(path, os.O_RDWR)))
    assert memory.read(50 * PAGE, 3) == b"new"
    assert memory.read(0, 3) == b"\0\1\2"


def test_devices_are_not_shared(memory: GuestMemory) -> None:
    fds = open_fds()
    for place, flags in enumerate((RW, RW, RW | FILE_IO, RW | FILE_IO)):
        memory.map(place * PAGE, PAGE, flags, OwnedFd(os.open("/dev/zero", os.O_RDWR)))
    memory.write(0, b"x")
    assert memory.read(PAGE, 1) == b"\0"
    assert open_fds() == fds + 4


def test_a_view_keeps_the_mapping_and_the_next_region_finds_it(memory: GuestMemory) -> None:
    with memfd(4 * PAGE) as fd:
        memory.map(0, PAGE, RW, again(fd))
        with memory.view(0, 1, write=True) as [view]:
            memory.unmap(0, PAGE)
            memory.map(PAGE, 2 * PAGE, RW, again(fd))
            view[:] = b"x"
            assert mapped() == [(4 * PAGE, "rw-s")]
        assert memory.read(PAGE, 1) == b"x"
        memory.unmap(PAGE, 2 * PAGE)
        assert mapped() == []


def test_a_failed_map_leaves_what_is_shared(memory: GuestMemory) -> None:
    with memfd(1 << 43) as fd:
        memory.log.start(4096)
        memory.map(1 << 50, PAGE, RW, OwnedFd(os.open("/dev/zero", os.O_RDWR)))
        fds = open_fds()
        for flags in (RW, RW | FILE_IO):
            refused(errno.ENOMEM, memory.map, 0, 1 << 43, flags, again(fd))  # no room for the bitmap
            assert (open_fds(), mapped()) == (fds, [])
        memory.map(0, PAGE, RW, again(fd))
        memory.map(PAGE, PAGE, RW | FILE_IO, again(fd))
        for flags in (RW, RW | FILE_IO):
            refused(errno.ENOMEM, memory.map, 2 * PAGE, (1 << 43) - PAGE, flags, again(fd))
        memory.write(PAGE - 1, b"xy")
        assert open_fds() == fds + 2


def test_two_guests_share_nothing() -> None:
    with memfd(2 * PAGE) as fd:
        one, two = GuestMemory(), GuestMemory()
        fds = open_fds()
        for flags in (RW, RW | FILE_IO):
            for guest in (one, two):
                guest.map(0, PAGE, flags, again(fd), PAGE)
            assert open_fds() == fds + 2
            one.write(0, b"x")
            one.unmap_all()
            assert open_fds() == fds + 1
            assert two.read(0, 1) == b"x"
            two.unmap_all()


def test_guests_in_threads() -> None:
    with memfd(64 * PAGE) as fd:
        done: list[int] = []

        def work(number: int) -> None:
            guest = GuestMemory()
            for turn in range(20):
                for page in range(number, 64, 4):
                    guest.map(page * PAGE, PAGE, RW | FILE_IO if page & 4 else RW, again(fd), page * PAGE)
                for page in range(number, 64, 4):
                    guest.write(page * PAGE, bytes([number, turn, page]))
                    assert guest.read(page * PAGE, 3) == bytes([number, turn, page])
                if turn % 2:
                    guest.unmap_all()
                else:
                    for page in range(number, 64, 4):
                        guest.unmap(page * PAGE, PAGE)
            done.append(number)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(done) == [0, 1, 2, 3]


def test_everything_goes_with_the_memory() -> None:
    with memfd(2 * PAGE) as fd:
        memory = GuestMemory()
        for page in range(2):
            for place, flags in enumerate((RW, READ, RW | FILE_IO)):
                memory.map((3 * page + place) * PAGE, PAGE, flags, again(fd), page * PAGE)
        fds = open_fds()
        gc.disable()
        try:
            del memory
            assert (open_fds(), mapped()) == (fds - 3, [])
        finally:
            gc.enable()


def test_no_descriptor_left_to_map_with(memory: GuestMemory) -> None:
    """Out of descriptors, the next page of a known file still maps; another file is refused, and nothing else."""
    with memfd(4 * PAGE) as fd, memfd(PAGE) as other:
        memory.map(0, PAGE, RW, again(fd))
        one, two = again(fd), again(other)
        filler: list[int] = []
        with limit(resource.RLIMIT_NOFILE, open_fds() + 4):
            with suppress(OSError):
                while True:
                    filler.append(os.dup(fd.fileno()))
            memory.map(PAGE, PAGE, RW, one, PAGE)
            filler.append(os.dup(fd.fileno()))  # in the place of what came with the page
            refused(errno.EMFILE, memory.map, 2 * PAGE, PAGE, RW, two)
            for number in filler:
                os.close(number)
        assert two.closed
        memory.write(PAGE, b"x")
        assert os.pread(fd.fileno(), 1, PAGE) == b"x"
