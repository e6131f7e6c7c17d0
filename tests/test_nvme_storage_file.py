"""Namespaces in files: what is opened and refused, every byte in its place, locks, failures."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.devices.nvme.storage import FileStorage, MemoryStorage, NbdStorage, file, kernel, open_storage

from .nvme_storage_support import KIB, MIB, SECTOR, data, fails, open_files, read, split, views, write

TIMEOUT = 20.0
SIZE = MIB
NOBODY = 65534


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(data(SIZE))
    return str(path)


@contextlib.contextmanager
def opened(path: str, **options: bool | int) -> Iterator[FileStorage]:
    with contextlib.closing(FileStorage(path, **options)) as storage:  # type: ignore[arg-type]
        yield storage


@contextlib.contextmanager
def acquired(path: str, **options: bool | int) -> Iterator[FileStorage]:
    with opened(path, **options) as storage:
        storage.acquire()
        yield storage


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to make files larger (EFBIG), as a full disk refuses (ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestOpening:
    def test_a_new_file_is_sparse_and_its_owners(self, tmp_path: Path) -> None:
        path = tmp_path / "new.img"
        with opened(str(path), size=1 << 30) as storage:
            assert (storage.name, storage.size, storage.block_size) == (str(path), 1 << 30, SECTOR)
            assert not storage.read_only
            assert not any(read(storage, (1 << 30) - SECTOR, SECTOR))
        status = path.stat()
        assert (status.st_size, status.st_mode & 0o777) == (1 << 30, 0o600)
        assert status.st_blocks * 512 < MIB

    @pytest.mark.parametrize("size", [None, SIZE])
    def test_a_file_that_is_there_is_left_as_it_is(self, image: str, size: int | None) -> None:
        with contextlib.closing(FileStorage(image, size=size)) as storage:
            assert storage.size == SIZE
        assert Path(image).read_bytes() == data(SIZE)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 2 * SIZE}, "disk.img has 1048576 bytes, not 2097152: leave the size out, or name another file"),
            ({"size": SECTOR}, "disk.img has 1048576 bytes, not 512"),
        ],
    )
    def test_another_size_is_refused(self, image: str, options: dict[str, int], message: str) -> None:
        before = open_files()
        with pytest.raises(ValueError, match=message):
            FileStorage(image, **options)  # type: ignore[arg-type]
        assert Path(image).stat().st_size == SIZE
        assert open_files() == before

    @pytest.mark.parametrize("size", [0, 1, 511, 513, -512])
    def test_sizes_of_no_disk(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "disk.img"
        with pytest.raises(ValueError, match=f"disk.img: {size} bytes are no disk: it must be a multiple of 512"):
            FileStorage(str(path), size=size)
        assert not path.exists()
        path.write_bytes(bytes(max(0, size)))
        with pytest.raises(ValueError, match="bytes are no disk"):
            FileStorage(str(path))

    def test_absent(self, tmp_path: Path) -> None:
        path = str(tmp_path / "absent")
        with pytest.raises(ValueError, match=r"absent is not there: -o size=1G makes it$"):
            FileStorage(path)
        with pytest.raises(ValueError, match=r"absent is not there$"):
            FileStorage(path, size=SIZE, read_only=True)
        with pytest.raises(FileNotFoundError):
            FileStorage(f"{path}/disk.img", size=SIZE)
        assert os.listdir(tmp_path) == []

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "socket"))
        before = open_files()
        for path in (tmp_path / "fifo", tmp_path, Path(os.devnull)):
            with pytest.raises(ValueError, match=f"{path} is neither a file nor a block device"):
                FileStorage(str(path), read_only=True)
        for path in (tmp_path / "fifo", Path(os.devnull)):
            with pytest.raises(ValueError, match=f"{path} is neither a file nor a block device"):
                FileStorage(str(path))
        for path, expected in ((tmp_path, errno.EISDIR), (tmp_path / "socket", errno.ENXIO)):
            with fails(expected, str(path)):
                FileStorage(str(path))
        assert open_files() == before

    def test_no_permission(self, image: str) -> None:
        os.chmod(image, 0o444)
        with as_nobody(), pytest.raises(PermissionError, match=r"disk\.img"):
            FileStorage(image)

    def test_a_disk_too_large_for_the_file_system_leaves_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "huge.img"
        with largest_file(SIZE), fails(errno.EFBIG, "2097152 bytes: "):
            FileStorage(str(path), size=2 * SIZE)
        assert not path.exists()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read anything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class TestSchemes:
    def test_by_prefix(self, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with contextlib.closing(open_storage(image, read_only=True)) as storage:
            assert isinstance(storage, FileStorage)
            assert storage.read_only
        with contextlib.closing(open_storage("memory:", size=SIZE)) as memory:
            assert isinstance(memory, MemoryStorage)
        monkeypatch.chdir(tmp_path)
        with contextlib.closing(open_storage("other:name", size=SIZE)) as oddly_named:
            assert isinstance(oddly_named, FileStorage)

    @pytest.mark.parametrize("scheme", ["nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"])
    def test_nbd(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(NbdStorage, "__init__", lambda self, uri, **options: seen.append(uri))
        open_storage(f"{scheme}://host/export")
        assert seen == [f"{scheme}://host/export"]

    def test_memory_needs_a_size_of_its_own(self) -> None:
        with pytest.raises(ValueError, match="memory: needs a size: -o size=1G"):
            open_storage("memory:")
        with pytest.raises(ValueError, match="cannot be shared"):
            open_storage("memory:", size=SIZE, shared=True)


# Bytes


lengths = st.lists(st.integers(1, 8).map(lambda sectors: sectors * SECTOR), min_size=1, max_size=6)


@settings(max_examples=100)
@given(lengths, lengths, st.integers(0, 64), st.integers(0, 99).map(random.Random))
def test_every_byte_in_its_place_however_short_a_transfer_is(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int], others: list[int], sector: int, chance: random.Random
) -> None:
    """The kernel may move less than it was asked to: any number of bytes, but none."""

    def short(move: Callable[[int, Sequence[memoryview], int], int]) -> Callable[..., int]:
        def moved(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            count = chance.randint(1, sum(map(len, buffers)))
            part, left = [], count
            for buffer in buffers:
                part.append(buffer[:left])
                left -= len(part[-1])
            return move(fd, part, offset)

        return moved

    path = tmp_path_factory.mktemp("short") / "disk.img"
    path.write_bytes(data(64 * KIB))
    content = data(sum(pieces), 2)
    with pytest.MonkeyPatch.context() as patch, acquired(str(path)) as storage:
        patch.setattr(os, "preadv", short(os.preadv))
        patch.setattr(os, "pwritev", short(os.pwritev))
        storage.write(sector * SECTOR, split(content, pieces))
        into = views(others)
        storage.read(sector * SECTOR, into)
    expected = bytearray(data(64 * KIB))
    expected[sector * SECTOR : sector * SECTOR + len(content)] = content
    assert path.read_bytes() == expected
    assert b"".join(into) == expected[sector * SECTOR :][: sum(others)]


def test_more_pieces_than_the_kernel_takes_at_once(image: str) -> None:
    content = data(2500 * 64, 3)
    with acquired(image) as storage:
        storage.write(SECTOR, split(content, [64] * 2500))
        into = views([64] * 2500)
        storage.read(SECTOR, into)
        assert b"".join(into) == content
        assert not storage.read_now(SECTOR, into)
        assert storage.read_now(SECTOR, into[:8])  # and is not put off by that
    assert Path(image).read_bytes()[SECTOR:][: len(content)] == content


class TestNow:
    def test_what_is_in_the_page_cache_is_read_at_once(self, image: str) -> None:
        with acquired(image) as storage:
            (view,) = into = views([4 * KIB])
            storage.read(0, into)
            if not storage.read_now(4 * KIB, into):
                pytest.skip("this file system knows no RWF_NOWAIT")
            assert view == data(SIZE)[4 * KIB : 8 * KIB]

    def test_what_is_not_must_be_waited_for(self, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Told by an error where nothing of it is there, by less than was asked for where some is."""
        with acquired(image) as storage:
            answers: list[int | OSError] = [BlockingIOError(errno.EAGAIN, "not there"), 512]
            monkeypatch.setattr(os, "preadv", lambda *_: _answer(answers.pop(0)))
            assert not storage.read_now(0, views([4 * KIB]))
            assert not storage.read_now(0, views([4 * KIB]))
            monkeypatch.undo()
            assert read(storage, 0, 4 * KIB) == data(SIZE)[: 4 * KIB]

    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
    def test_a_file_system_that_cannot_tell_is_asked_once_and_then_looked_at(
        self, image: str, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """What is in memory is read at once, what is not is left to others."""
        there = [False, True]
        monkeypatch.setattr(kernel.Residence, "all_there", lambda *_: there.pop(0))
        with acquired(image) as storage:
            answers: list[int | OSError] = [OSError(number, "what?"), 512]
            monkeypatch.setattr(os, "preadv", lambda *_: _answer(answers.pop(0)))
            assert [storage.read_now(0, views([512])) for _ in range(3)] == [False, False, True]
            assert not answers
            assert not there

    def test_what_is_in_memory_is_there(self, image: str) -> None:
        """A file that was just written is; a hole of it that nobody read is only where the file system says so."""
        Path(image).write_bytes(data(64 * KIB, 1))
        with open(image, "rb") as file:
            residence = kernel.Residence(file.fileno(), 64 * KIB)
            assert residence.all_there(0, 64 * KIB)
            assert residence.all_there(512, 1024)

    @pytest.mark.parametrize("mappable", [True, False])
    def test_a_disk_larger_than_memory(self, monkeypatch: pytest.MonkeyPatch, mappable: bool) -> None:
        """On tmpfs, which has no RWF_NOWAIT: it is looked at if it can be mapped, and read either way."""
        if not os.path.ismount("/dev/shm"):
            pytest.skip("no tmpfs at /dev/shm")
        if not mappable:
            monkeypatch.setattr(kernel, "Residence", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOMEM, "large")))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, acquired(f"{folder}/disk", size=1 << 40) as storage:
            write(storage, 1 << 39, data(4 * KIB))
            into = views([4 * KIB])
            told = [storage.read_now(1 << 39, into) for _ in range(2)]
            assert told[0] is False or mappable
            assert told[1] is mappable
            assert read(storage, 1 << 39, 4 * KIB) == data(4 * KIB)

    def test_small_writes(self, image: str) -> None:
        """At once or not: afterwards they are there."""
        with acquired(image) as storage:
            for number in range(8):
                piece = split(data(4 * KIB, number), [512, 4 * KIB - 512])
                if not storage.write_now(number * 4 * KIB, piece):
                    storage.write(number * 4 * KIB, piece)
        expected = b"".join(data(4 * KIB, number) for number in range(8))
        assert Path(image).read_bytes()[: len(expected)] == expected

    @pytest.mark.parametrize(
        ("offset", "length", "done"),
        [
            (0, 4 * KIB, True),
            (4 * KIB, 16 * KIB, True),
            (0, 128 * KIB, True),
            (512, 4 * KIB, False),
            (0, 512, False),
            (0, 132 * KIB, False),
        ],
    )
    def test_where_the_file_system_cannot_tell_small_writes_of_whole_pages_are_tried(
        self, image: str, monkeypatch: pytest.MonkeyPatch, offset: int, length: int, done: bool
    ) -> None:
        with acquired(image) as storage:
            monkeypatch.setattr(os, "pwritev", without_nowait)
            assert not storage.write_now(0, views([4 * KIB]))  # it learns that
            assert storage.write_now(offset, split(data(length, 2), [length])) == done
            assert (read(storage, offset, length) == data(length, 2)) == done

    def test_who_was_held_back_waits_no_more_for_a_while(self, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0

        def slow(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            nonlocal now
            now += 2 * file.SLOW[16 * KIB]
            return without_nowait(fd, buffers, offset, flags)

        monkeypatch.setattr(time, "monotonic", lambda: now)
        with acquired(image) as storage:
            monkeypatch.setattr(os, "pwritev", slow)
            assert not storage.write_now(0, views([4 * KIB]))
            assert storage.write_now(0, views([4 * KIB]))
            assert not storage.write_now(0, views([4 * KIB]))
            assert storage.write_now(0, views([128 * KIB]))  # those have a patience of their own
            assert not storage.write_now(0, views([64 * KIB]))
            now += file.PAUSE
            assert storage.write_now(0, views([4 * KIB]))

    def test_a_failure_is_left_to_the_call_that_may_wait(self, image: str) -> None:
        with acquired(image) as storage, largest_file(SIZE // 2):
            assert not storage.write_now(SIZE // 2, views([4 * KIB]))
            assert not storage.write_now(SIZE // 2, views([4 * KIB]))
            with fails(errno.EFBIG):
                storage.write(SIZE // 2, views([4 * KIB]))


def _answer(answer: int | OSError) -> int:
    if isinstance(answer, OSError):
        raise answer
    return answer


_pwritev = os.pwritev


def without_nowait(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
    """os.pwritev on a file system that has no RWF_NOWAIT for writes."""
    if flags:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return _pwritev(fd, buffers, offset)


class TestZeros:
    @pytest.mark.parametrize("unmap", [False, True])
    @pytest.mark.parametrize("modes", [None, (file.PUNCH,), ()], ids=["all", "punch-only", "none"])
    def test_zeros(self, image: str, monkeypatch: pytest.MonkeyPatch, modes: tuple[int] | None, unmap: bool) -> None:
        """With what this file system can do, with less of it, and by writing."""
        if modes is not None:
            monkeypatch.setattr(kernel, "fallocate", only(modes))
        with acquired(image) as storage:
            storage.write_zeroes(512, 300 * KIB, unmap=unmap)
            storage.write_zeroes(SIZE - 512, 512, unmap=unmap)
        content = data(SIZE)
        assert Path(image).read_bytes() == b"".join(
            (content[:512], bytes(300 * KIB), content[512 + 300 * KIB : -512], bytes(512))
        )

    def test_more_zeros_than_are_written_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "disk.img"
        path.write_bytes(b"x" * (3 * MIB))
        monkeypatch.setattr(kernel, "fallocate", only(()))
        with acquired(str(path)) as storage:
            storage.write_zeroes(512, 2 * MIB + 512, unmap=False)
        assert path.read_bytes() == b"x" * 512 + bytes(2 * MIB + 512) + b"x" * (MIB - 1024)

    def test_discard_gives_room_back(self, image: str) -> None:
        before = os.stat(image).st_blocks
        with acquired(image) as storage:
            storage.discard(0, SIZE // 2)
            storage.flush()
            assert os.stat(image).st_blocks < before
            assert read(storage, 0, SIZE) == bytes(SIZE // 2) + data(SIZE)[SIZE // 2 :]
        assert os.stat(image).st_size == SIZE

    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
    def test_discard_where_there_are_no_holes_does_nothing(
        self, image: str, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        monkeypatch.setattr(kernel, "fallocate", only((), number))
        with acquired(image) as storage:
            storage.discard(0, SIZE)
            storage.discard(0, SIZE)
        assert Path(image).read_bytes() == data(SIZE)

    def test_a_full_disk_is_no_reason_to_write(self, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel, "fallocate", only((), errno.ENOSPC))
        with acquired(image) as storage, fails(errno.ENOSPC):
            storage.write_zeroes(0, 512, unmap=True)

    def test_fallocate_itself(self, image: str) -> None:
        with fails(errno.EBADF):
            kernel.fallocate(-1, file.PUNCH, 0, 512)


def only(modes: Sequence[int], number: int = errno.EOPNOTSUPP) -> Callable[[int, int, int, int], None]:
    real = kernel.fallocate

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if mode not in modes:
            raise OSError(number, os.strerror(number))
        real(fd, mode, offset, length)

    return fallocate


# Others


class TestLocks:
    def test_one_writer_in_one_process(self, image: str) -> None:
        with acquired(image) as first, opened(image) as second, opened(image, read_only=True) as reader:
            for other in (second, reader):
                with fails(errno.EWOULDBLOCK, "somebody else uses it"):
                    other.acquire()
            first.acquire()  # it has it
            first.release()
            first.release()
            second.acquire()
            with pytest.raises(BlockingIOError):
                first.acquire()
            second.close()
            first.acquire()

    def test_readers_share(self, image: str) -> None:
        with (
            acquired(image, read_only=True),
            acquired(image, read_only=True),
            opened(image) as writer,
            fails(errno.EAGAIN),
        ):
            writer.acquire()

    def test_shared_writers(self, image: str) -> None:
        with acquired(image, shared=True) as one, acquired(image, shared=True) as other, opened(image) as alone:
            write(one, 0, data(512, 5))
            assert read(other, 0, 512) == data(512, 5)
            with pytest.raises(BlockingIOError):
                alone.acquire()

    def test_against_another_process_until_it_dies(self, image: str) -> None:
        program = """
            import sys, time
            from vfio_user.devices.nvme.storage import open_storage
            storage = open_storage(sys.argv[1])
            storage.acquire()
            print("acquired", flush=True)
            time.sleep(60)
        """
        with running(program, image) as process, opened(image) as storage:
            assert process.stdout is not None
            assert process.stdout.readline() == "acquired\n"
            with pytest.raises(BlockingIOError):
                storage.acquire()
            process.send_signal(signal.SIGKILL)
            process.wait(TIMEOUT)
            storage.acquire()

    def test_opening_alone_locks_nothing(self, image: str) -> None:
        with opened(image), acquired(image):
            pass

    def test_where_files_cannot_be_locked(self, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "fcntl", no_locks)
        with opened(image) as storage, fails(errno.ENOLCK, "cannot be locked: No locks available"):
            storage.acquire()


class TestChangedMeanwhile:
    @pytest.mark.parametrize("size", [SIZE - SECTOR, SIZE + SECTOR])
    def test_of_another_size_when_it_is_acquired(self, image: str, size: int) -> None:
        with opened(image) as storage, opened(image) as other:
            os.truncate(image, size)
            with fails(errno.ESTALE, f"has {size} bytes now, had {SIZE} when it was opened"):
                storage.acquire()
            os.truncate(image, SIZE)
            other.acquire()  # the one that failed holds no lock

    def test_replaced(self, image: str) -> None:
        with opened(image) as storage:
            shutil.copy(image, f"{image}.new")
            os.replace(f"{image}.new", image)
            with fails(errno.ESTALE, "is another file now"):
                storage.acquire()
            os.unlink(image)
            with pytest.raises(FileNotFoundError, match=r"disk\.img"):
                storage.acquire()

    def test_cut_short_under_the_guest(self, image: str) -> None:
        """What is left can be read; nobody is killed; it works again when the file does."""
        with acquired(image) as storage:
            os.truncate(image, SIZE // 2)
            assert read(storage, 0, SIZE // 2) == data(SIZE)[: SIZE // 2]
            for offset in (SIZE // 2, SIZE // 2 - 512):
                assert not storage.read_now(offset, views([1024]))
                with fails(errno.EIO, "somebody made it shorter"):
                    read(storage, offset, 1024)
            os.truncate(image, SIZE)
            assert not any(read(storage, SIZE // 2, 1024))

    def test_written_by_another_while_it_was_released(self, image: str) -> None:
        """As when a guest migrates to another server on the same disk, and back."""
        with acquired(image) as here, opened(image) as there:
            assert read(here, 0, 512) == data(SIZE)[:512]
            here.release()
            there.acquire()
            write(there, 0, data(512, 7))
            there.release()
            here.acquire()
            assert read(here, 0, 512) == data(512, 7)


def test_a_block_device(tmp_path: Path) -> None:
    """One that the kernel makes of a file, where that is allowed."""
    if shutil.which("losetup") is None:
        pytest.skip("no losetup")
    path = tmp_path / "disk.img"
    path.write_bytes(data(SIZE))
    made = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, timeout=TIMEOUT)
    if made.returncode:
        pytest.skip("no loop devices here")
    device = made.stdout.strip()
    try:
        with pytest.raises(ValueError, match="leave the size out"):
            FileStorage(device, size=2 * SIZE)
        with acquired(device) as storage:
            assert storage.size == SIZE
            assert read(storage, 0, SIZE) == data(SIZE)
            storage.read_now(0, views([4 * KIB]))
            write(storage, 4 * KIB, data(MIB // 2, 2))
            storage.write_zeroes(8 * KIB, 64 * KIB, unmap=False)
            storage.write_zeroes(128 * KIB, 64 * KIB, unmap=True)
            storage.discard(SIZE - 64 * KIB, 64 * KIB)
            storage.release()
            storage.acquire()
            found = read(storage, 0, SIZE)
        expected = bytearray(data(SIZE))
        expected[4 * KIB : 4 * KIB + MIB // 2] = data(MIB // 2, 2)
        for start in (8 * KIB, 128 * KIB, SIZE - 64 * KIB):
            expected[start : start + 64 * KIB] = bytes(64 * KIB)
        assert found == expected
        assert path.read_bytes() == expected  # it was flushed
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=TIMEOUT)


class TestFailures:
    def test_read_only(self, image: str) -> None:
        with acquired(image, read_only=True) as storage:
            assert not storage.write_now(0, views([4 * KIB]))
            with fails(errno.EROFS, "disk.img"):
                write(storage, 0, bytes(512))
            with fails(errno.EROFS):
                storage.write_zeroes(0, 512, unmap=True)
            with fails(errno.EROFS):
                storage.discard(0, 512)
            storage.flush()
            storage.release()
        assert Path(image).read_bytes() == data(SIZE)

    def test_a_write_that_fails_does_not_stop_the_next(self, image: str) -> None:
        with acquired(image) as storage:
            with largest_file(SIZE // 2), fails(errno.EFBIG):
                write(storage, SIZE // 2 - 512, data(1024, 2))
            write(storage, SIZE // 2 - 512, data(1024, 2))
            assert read(storage, SIZE // 2 - 512, 1024) == data(1024, 2)

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """A tmpfs of one MiB, in a mount namespace of its own: ENOSPC in the middle of a write, then it goes on."""
        program = """
            import errno, os, sys
            from vfio_user.devices.nvme.storage import open_storage
            storage = open_storage(sys.argv[1] + "/disk.img", size=2 << 20)
            storage.acquire()
            content = memoryview(bytearray(b"x" * (2 << 20)))
            try:
                storage.write(0, [content])
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
            else:
                raise SystemExit("there was room")
            storage.discard(0, 2 << 20)
            storage.write(1 << 20, [content[: 1 << 19]])
            storage.flush()
            assert os.stat(storage.name).st_blocks <= 1 << 10
            print("done")
        """
        mount = f'mount -t tmpfs -o size=1m none "$1" && exec {sys.executable} -c "$2" "$1"'
        unshare = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-m"]
        if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.skip("no mount namespaces here")
        command = [*unshare, "sh", "-c", mount, "sh", str(tmp_path), textwrap.dedent(program)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        assert (done.stdout, done.stderr) == ("done\n", "")

    def test_a_flush_that_fails_is_not_followed_by_one_that_does_not(
        self, image: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with acquired(image) as storage, opened(image) as other:
            write(storage, 0, bytes(512))
            monkeypatch.setattr(os, "fdatasync", broken)
            with pytest.raises(OSError, match="Input/output error"):
                storage.flush()
            monkeypatch.undo()
            for call in (storage.flush, storage.release):
                with fails(errno.EIO, "what was written before is lost"):
                    call()
            with pytest.raises(BlockingIOError):
                other.acquire()  # it is still the first one's
            storage.acquire()
            storage.flush()
            storage.release()

    @pytest.mark.parametrize("broken", [False, True])
    def test_flushes_that_wait_share_one(self, image: str, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
        """The one that is under way may not have what they are asked for; the next has."""
        waiting, under_way = 7, threading.Event()
        syncs: list[int] = []
        all_wait = threading.Barrier(waiting + 1)

        class Watched:
            """A lock that says when somebody is about to wait for it."""

            def __init__(self, lock: threading.Lock) -> None:
                self.lock = lock

            def __enter__(self) -> None:
                if under_way.is_set() and len(syncs) == 1:
                    all_wait.wait(TIMEOUT)
                self.lock.acquire()

            def __exit__(self, *_: object) -> None:
                self.lock.release()

        def fdatasync(fd: int) -> None:
            syncs.append(fd)
            if len(syncs) == 1:
                under_way.set()
                all_wait.wait(TIMEOUT)
            elif broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with acquired(image) as storage, ThreadPoolExecutor(waiting + 1) as threads:
            monkeypatch.setattr(os, "fdatasync", fdatasync)
            storage._flushing = Watched(storage._flushing)  # type: ignore[assignment]
            first = threads.submit(storage.flush)
            assert under_way.wait(TIMEOUT)
            others = [threads.submit(storage.flush) for _ in range(waiting)]
            first.result(TIMEOUT)
            failures = [other.exception(TIMEOUT) is not None for other in others]
        assert failures == [broken] * waiting
        assert len(syncs) == 2

    def test_closing(self, image: str) -> None:
        before = open_files()
        storage = FileStorage(image)
        storage.acquire()
        storage.close()
        storage.close()
        assert open_files() == before
        with pytest.raises(OSError, match="Bad file descriptor"):
            read(storage, 0, 512)


@contextlib.contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program of ours in a process of its own, ended at the end."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
