"""Namespaces on real NBD servers: every byte in its place, servers that fail, stop, come back, or are none."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vfio_user.devices.nvme.storage import FileStorage, NbdStorage, Storage, connections, libnbd, nbd, open_storage
from vfio_user.devices.nvme.storage.libnbd import Connection

from .nbd_support import NbdServer, Servers, garbage_server, library_path, load_libnbd, program
from .nvme_storage_support import KIB, MIB, SECTOR, data, fails, open_files, read, split, views, write

TIMEOUT = 20.0
SIZE = 4 * MIB
KINDS = ["nbdkit", "raw", "qcow2"]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_libnbd()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    folder = tmp_path / "servers"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        yield Servers(folder, stack)


@pytest.fixture
def served(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> NbdServer:
    """One of KINDS, with SIZE zeros."""
    kind: str = request.param
    return servers.nbdkit("memory", str(SIZE)) if kind == "nbdkit" else servers.qemu_nbd(*image(tmp_path, kind))


def image(folder: Path, kind: str) -> tuple[Path, str, str]:
    path = folder / f"disk.{kind}"
    subprocess.run([program("qemu-img"), "create", "-q", "-f", kind, path, str(SIZE)], check=True, timeout=TIMEOUT)
    return path, f"--format={kind}", "--shared=8"


@contextlib.contextmanager
def acquired(server: NbdServer, **options: float) -> Iterator[NbdStorage]:
    with contextlib.closing(NbdStorage(server.uri, **options)) as storage:  # type: ignore[arg-type]
        storage.acquire()
        yield storage


each_kind = pytest.mark.parametrize("served", KINDS, indirect=True)


class TestBytes:
    @each_kind
    def test_every_byte_in_its_place(self, served: NbdServer) -> None:
        with acquired(served) as storage:
            assert (storage.name, storage.size, storage.block_size) == (served.uri, SIZE, SECTOR)
            assert not storage.read_only
            content = data(MIB)
            storage.write(SECTOR, split(content, [MIB]))
            storage.write(2 * MIB, split(content[: 96 * KIB], [SECTOR, *[4 * KIB] * 23, 4 * KIB - SECTOR]))
            storage.flush()
            expected = bytearray(SIZE)
            expected[SECTOR : SECTOR + MIB] = content
            expected[2 * MIB : 2 * MIB + 96 * KIB] = content[: 96 * KIB]
            assert read(storage, 0, SIZE) == expected
            into = views([4 * KIB] * 32)
            storage.read(2 * MIB, into)
            assert b"".join(into) == expected[2 * MIB : 2 * MIB + 128 * KIB]
            assert not storage.read_now(0, into)
            assert not storage.write_now(0, into)

    @each_kind
    @pytest.mark.parametrize("unmap", [False, True])
    def test_zeros(self, served: NbdServer, unmap: bool) -> None:
        with acquired(served) as storage:
            write(storage, 0, data(MIB))
            storage.write_zeroes(SECTOR, 300 * KIB, unmap=unmap)
            content = data(MIB)
            assert read(storage, 0, MIB) == content[:SECTOR] + bytes(300 * KIB) + content[SECTOR + 300 * KIB :]

    @each_kind
    def test_what_was_discarded_is_zeros_or_as_before(self, served: NbdServer) -> None:
        with acquired(served) as storage:
            write(storage, 0, data(MIB))
            storage.discard(4 * KIB, 200 * KIB)
            after = read(storage, 0, MIB)
            for start in range(0, MIB, 4 * KIB):
                was = data(MIB)[start : start + 4 * KIB]
                discarded = 4 * KIB <= start < 204 * KIB
                assert after[start : start + 4 * KIB] in ([was, bytes(4 * KIB)] if discarded else [was])
            assert not any(after[64 * KIB : 192 * KIB])  # the whole clusters, at least

    def test_a_server_without_zeros(self, servers: Servers) -> None:
        server = servers.nbdkit("memory", str(SIZE), filters=("nozero",))
        with acquired(server) as storage:
            write(storage, 0, data(2 * MIB + SECTOR))
            storage.discard(0, MIB)
            assert read(storage, 0, MIB) == data(2 * MIB + SECTOR)[:MIB]
            storage.write_zeroes(SECTOR, 2 * MIB, unmap=True)
            assert read(storage, 0, 2 * MIB) == data(2 * MIB + SECTOR)[:SECTOR] + bytes(2 * MIB - SECTOR)

    def test_lengths_that_need_several_commands(self, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libnbd, "USUAL_MAXIMUM", 3 * SECTOR)
        monkeypatch.setattr(nbd, "LONGEST", 5 * SECTOR)
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage:
            write(storage, SECTOR, data(100 * SECTOR))
            storage.write_zeroes(50 * SECTOR, 12 * SECTOR, unmap=True)
            content = data(100 * SECTOR)
            expected = content[: 49 * SECTOR] + bytes(12 * SECTOR) + content[61 * SECTOR :]
            assert read(storage, SECTOR, 100 * SECTOR) == expected

    def test_memory_that_cannot_be_written_to(self, servers: Servers) -> None:
        """A guest may show memory to the device for reading only."""
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage:
            storage.write(0, [memoryview(data(SECTOR))])
            assert read(storage, 0, SECTOR) == data(SECTOR)

    def test_what_was_flushed_outlives_the_server(self, servers: Servers, tmp_path: Path) -> None:
        path, *options = image(tmp_path, "qcow2")
        server = servers.qemu_nbd(path, *options)
        with acquired(server) as storage:
            write(storage, MIB, data(MIB))
            storage.flush()
            server.end()
        server.start()
        with acquired(server, read_only=True) as storage:
            assert read(storage, MIB, MIB) == data(MIB)

    def test_one_after_the_other(self, servers: Servers, tmp_path: Path) -> None:
        """As when a guest migrates, and back; both look at it before."""
        server = servers.qemu_nbd(*image(tmp_path, "qcow2"))
        with acquired(server) as here, contextlib.closing(open_storage(server.uri)) as there:
            storages: list[Storage] = [here, there]
            for number in range(6):
                storage = storages[number % 2]
                storage.acquire()
                storage.acquire()
                assert read(storage, 0, 4 * KIB) == (data(4 * KIB, number - 1) if number else bytes(4 * KIB))
                write(storage, 0, data(4 * KIB, number))
                storage.release()
                storage.release()

    def test_a_server_that_ends_with_its_last_client(self, servers: Servers, tmp_path: Path) -> None:
        """It lives until the storage is closed, and ends then."""
        server = servers.qemu_nbd(*image(tmp_path, "raw"), persistent=False)
        with acquired(server) as storage:
            storage.release()
            storage.acquire()
            write(storage, 0, data(SECTOR))
            assert server.process.poll() is None
        assert server.process.wait(TIMEOUT) == 0


class TestSeveralAtOnce:
    def test_as_many_as_there_are_connections(self, servers: Servers, tmp_path: Path) -> None:
        """A server that answers a read when so many have come, and not before."""
        together = connections.MOST
        wait = f"until [ $(ls {tmp_path} | grep -c read) -ge {together} ]; do sleep 0.05; done"
        script = f"mktemp {tmp_path}/read.XXXXXX >&2; {wait}; head -c $3 /dev/zero"
        server = servers.nbdkit(
            "eval",
            f"get_size=echo {SIZE}",
            f"pread={script}",
            "can_multi_conn=exit 0",
            "thread_model=echo parallel",
        )
        with acquired(server) as storage, ThreadPoolExecutor(together) as threads:
            done = [threads.submit(read, storage, 0, SECTOR) for _ in range(together)]
            assert [one.result(TIMEOUT) for one in done] == [bytes(SECTOR)] * together

    @each_kind
    def test_many_threads(self, served: NbdServer) -> None:
        """More of them than connections; where the server allows one, too."""

        def work(number: int) -> None:
            for turn in range(20):
                content = data(4 * KIB, number * 100 + turn)
                write(storage, number * 64 * KIB, content)
                assert read(storage, number * 64 * KIB, 4 * KIB) == content
                if turn % 7 == 0:
                    storage.flush()

        with acquired(served) as storage, ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8), timeout=TIMEOUT))

    def test_a_server_that_takes_fewer_than_it_promised(self, servers: Servers) -> None:
        server = servers.nbdkit("memory", str(SIZE), "limit=1", filters=("limit",))
        with acquired(server) as storage, ThreadPoolExecutor(2) as threads:
            with lent(storage):
                reading = [threads.submit(read, storage, 0, SECTOR) for _ in range(2)]
                wait_until(lambda: storage._connections._most == 1)
            assert [one.result(TIMEOUT) for one in reading] == [bytes(SECTOR)] * 2


class TestOpening:
    def test_read_only(self, servers: Servers) -> None:
        server = servers.nbdkit("memory", str(SIZE), options=("--readonly",))
        with acquired(server) as storage:
            assert storage.read_only
            with fails(errno.EROFS, server.uri):
                write(storage, 0, bytes(SECTOR))
            with fails(errno.EROFS):
                storage.write_zeroes(0, SECTOR, unmap=True)
            with fails(errno.EROFS):
                storage.discard(0, SECTOR)
            storage.flush()
            storage.release()

    @pytest.mark.parametrize(
        ("size", "options", "message"),
        [
            (SIZE, {"size": SIZE // 2}, f"has {SIZE} bytes, not {SIZE // 2}: leave the size out"),
            (513, {}, "513 bytes are no disk: it must be a multiple of 512"),
            (0, {}, "0 bytes are no disk"),
        ],
    )
    def test_sizes(self, servers: Servers, size: int, options: dict[str, int], message: str) -> None:
        server = servers.nbdkit("memory", str(size))
        before = open_files()
        with pytest.raises(ValueError, match=message):
            NbdStorage(server.uri, **options)  # type: ignore[arg-type]
        assert open_files() == before

    def test_large_blocks(self, servers: Servers) -> None:
        server = servers.nbdkit(
            "memory", str(SIZE), "blocksize-minimum=4096", "blocksize-error-policy=error", filters=("blocksize-policy",)
        )
        with acquired(server) as storage:
            assert storage.block_size == 4 * KIB
            write(storage, 4 * KIB, data(4 * KIB))
            assert read(storage, 0, 8 * KIB) == bytes(4 * KIB) + data(4 * KIB)

    def test_nobody_there(self, tmp_path: Path) -> None:
        before = open_files()
        for uri, expected, words in (
            (f"nbd+unix:///?socket={tmp_path}/absent", errno.ENOENT, "] connect: No such file"),
            ("nbd://127.0.0.1:1/", errno.ECONNREFUSED, "] connect: 127.0.0.1:1: "),
            ("nbd+unix:///", errno.EINVAL, "socket"),
            ("nbd://[", errno.EINVAL, "URI"),
        ):
            with fails(expected, uri, words):
                open_storage(uri)
        assert open_files() == before

    def test_no_such_export(self, servers: Servers, tmp_path: Path) -> None:
        path, *options = image(tmp_path, "raw")
        server = servers.qemu_nbd(path, *options, "--export-name=disk")
        with fails(errno.ENOENT, "socket="):
            NbdStorage(server.uri)
        with contextlib.closing(NbdStorage(server.uri.replace("///", "///disk"))) as storage:
            assert storage.size == SIZE

    @pytest.mark.parametrize("says", [b"", b"\0" * 8, b"NBDMAGIC", b"NBDMAGIC" + b"\xff" * 200, bytes(200)])
    def test_no_nbd_server(self, tmp_path: Path, says: bytes) -> None:
        """Whatever it says before it goes away, it is one error."""
        before = open_files()
        path = tmp_path / "socket"
        with garbage_server(path) as listening, ThreadPoolExecutor(1) as threads:
            opening = threads.submit(NbdStorage, f"nbd+unix:///?socket={path}", timeout=TIMEOUT)
            taken, _ = listening.accept()
            taken.sendall(says)
            taken.close()
            with pytest.raises(OSError, match="socket="):
                opening.result(TIMEOUT)
        assert open_files() == before

    def test_a_server_that_says_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with garbage_server(path), fails(errno.ETIMEDOUT, "does not answer"):
            NbdStorage(f"nbd+unix:///?socket={path}", timeout=0.1)

    def test_without_libnbd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libnbd, "LIBRARY", "libnone.so.0")
        libnbd._library.cache_clear()
        with fails(errno.ELIBACC, "needs libnone.so.0: install libnbd0 (Debian, Ubuntu) or libnbd (Fedora, SUSE)"):
            open_storage("nbd://localhost")
        libnbd._library.cache_clear()

    def test_with_keys(self, servers: Servers, tmp_path: Path) -> None:
        keys = tmp_path / "keys.psk"
        keys.write_text(f"guest:{bytes(range(32)).hex()}\n")
        server = servers.nbdkit("memory", str(SIZE), options=("--tls=require", f"--tls-psk={keys}"))
        with pytest.raises(OSError, match="nbd"):
            NbdStorage(server.uri)
        secured = f"nbds+unix://guest@/?socket={server.path}&tls-psk-file={keys}"
        with contextlib.closing(open_storage(secured)) as storage:
            storage.acquire()
            write(storage, 0, data(MIB))
            assert read(storage, 0, MIB) == data(MIB)


class TestFailures:
    """What the server says reaches the caller, and the next call may succeed."""

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPERM])
    def test_of_commands(self, servers: Servers, tmp_path: Path, number: int) -> None:
        trigger = tmp_path / "fail"
        options = (f"error={errno.errorcode[number]}", "error-rate=100%", f"error-file={trigger}")
        with acquired(servers.nbdkit("memory", str(SIZE), *options, filters=("error",))) as storage:
            write(storage, 0, data(SECTOR))
            trigger.touch()
            with fails(number):
                read(storage, 0, SECTOR)
            with fails(number):
                write(storage, 0, bytes(SECTOR))
            with fails(number):
                storage.write_zeroes(0, SECTOR, unmap=True)
            with fails(number):
                storage.discard(0, SECTOR)
            trigger.unlink()
            assert read(storage, 0, SECTOR) == data(SECTOR)
            storage.flush()

    def test_a_full_disk(self, servers: Servers) -> None:
        with acquired(servers.nbdkit("full", str(SIZE))) as storage:
            with fails(errno.ENOSPC):
                write(storage, 0, data(SECTOR))
            assert not any(read(storage, 0, SECTOR))

    def test_a_flush_that_fails_is_not_followed_by_one_that_does_not(self, servers: Servers, tmp_path: Path) -> None:
        trigger = tmp_path / "fail"
        server = servers.nbdkit(
            "eval",
            f"get_size=echo {SIZE}",
            "pread=head -c $3 /dev/zero",
            "pwrite=cat >/dev/null",
            "can_write=exit 0",
            "can_flush=exit 0",
            f"flush=if [ -e {trigger} ]; then echo EIO broken >&2; exit 1; fi",
        )
        with acquired(server) as storage:
            storage.flush()
            write(storage, 0, bytes(SECTOR))
            trigger.touch()
            with fails(errno.EIO):
                storage.flush()
            trigger.unlink()
            with fails(errno.EIO, "may be lost"):
                storage.flush()
            with fails(errno.EIO):
                storage.release()
            storage.acquire()
            trigger.touch()
            with fails(errno.EIO, "command failed"):  # it is asked again, though nothing was written
                storage.flush()
            trigger.unlink()
            storage.acquire()
            write(storage, 0, bytes(SECTOR))
            storage.flush()
            storage.release()

    def test_a_server_that_cannot_flush(self, servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
        server = servers.nbdkit(
            "eval",
            f"get_size=echo {SIZE}",
            "pread=head -c $3 /dev/zero",
            "pwrite=cat >/dev/null",
            "can_write=exit 0",
        )
        with acquired(server) as storage:
            assert "its server cannot flush" in caplog.text
            write(storage, 0, bytes(SECTOR))
            storage.flush()


class TestGone:
    def test_killed_and_restarted(self, servers: Servers, tmp_path: Path) -> None:
        """What was flushed is no reason to complain."""
        server = servers.qemu_nbd(*image(tmp_path, "raw"))
        with acquired(server) as storage:
            write(storage, 0, data(MIB))
            storage.flush()
            server.end()
            for _ in range(2):
                with fails(errno.ECONNREFUSED, server.uri):
                    read(storage, 0, SECTOR)
            server.start()
            assert read(storage, 0, MIB) == data(MIB)
            server.end()
            server.start()
            write(storage, MIB, data(MIB))  # it did not notice
            storage.flush()
            assert read(storage, 0, 2 * MIB) == data(MIB) * 2

    def test_what_was_not_flushed_may_be_lost(self, servers: Servers) -> None:
        """As it is here: this server keeps it in memory."""
        server = servers.nbdkit("memory", str(SIZE))
        with acquired(server) as storage:
            write(storage, 0, data(SECTOR))
            server.end()
            server.start()
            assert not any(read(storage, 0, SECTOR))
            for call in (storage.flush, storage.release):
                with pytest.raises(OSError, match="may be lost"):
                    call()
            storage.acquire()
            write(storage, 0, data(SECTOR))
            storage.flush()
            storage.release()

    def test_the_flush_itself_finds_out(self, servers: Servers) -> None:
        server = servers.nbdkit("memory", str(SIZE))
        with acquired(server) as storage:
            write(storage, 0, data(SECTOR))
            server.end()
            server.start()
            with pytest.raises(OSError, match="may be lost"):
                storage.flush()

    @pytest.mark.parametrize("times", [1, 2])
    def test_written_just_before_another_thread_finds_that_the_server_is_gone(
        self, servers: Servers, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        """It is written again, to the server that is there now."""
        real, left = Connection.write, times

        def write_and_lose(connection: Connection, deadline: float, offset: int, view: memoryview) -> None:
            nonlocal left
            real(connection, deadline, offset, view)
            if left:
                left -= 1
                storage._connections.distrust(connection, errno.ECONNRESET)

        monkeypatch.setattr(Connection, "write", write_and_lose)
        monkeypatch.setattr(nbd, "CHANGES", {write_and_lose})
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage:
            if times == 1:
                write(storage, 0, data(SECTOR))
                assert read(storage, 0, SECTOR) == data(SECTOR)
                storage.flush()
            else:
                with fails(errno.ENOTCONN, "the connection was lost"):
                    write(storage, 0, data(SECTOR))

    def test_written_by_another_thread_on_another_connection(self, servers: Servers) -> None:
        """The loss of one connection is the loss of what was written on any."""
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage:
            with lent(storage) as connection:
                write(storage, 0, data(SECTOR))
                storage._connections.distrust(connection, errno.ECONNRESET)
                storage._connections.distrust(connection, errno.EPIPE)  # no news
            with fails(errno.ECONNRESET, "may be lost"):
                storage.flush()

    def test_another_export_came_back(self, servers: Servers, tmp_path: Path) -> None:
        path, *options = image(tmp_path, "raw")
        server = servers.qemu_nbd(path, *options)
        with acquired(server) as storage:
            server.end()
            os.truncate(path, SIZE // 2)
            server.start()
            with fails(errno.ESTALE, "another export"):
                read(storage, 0, SECTOR)
            server.end()
            os.truncate(path, SIZE)
            server.start()
            read(storage, 0, SECTOR)

    def test_killed_while_it_is_asked(self, servers: Servers) -> None:
        server = servers.nbdkit("memory", str(SIZE), "rdelay=600", filters=("delay",))
        with acquired(server) as storage, ThreadPoolExecutor(2) as threads:
            before = open_files()
            reading = [threads.submit(read, storage, 0, SECTOR) for _ in range(2)]
            wait_until(lambda: not storage._connections._idle)
            server.end()
            for one in reading:
                with pytest.raises(OSError, match="socket="):
                    one.result(TIMEOUT)
            assert open_files() < before

    def test_a_server_that_stops_answering(self, servers: Servers, tmp_path: Path) -> None:
        """The guest gets an answer; nothing lands in its memory afterwards."""
        server = servers.qemu_nbd(*image(tmp_path, "raw"))
        with acquired(server) as storage:
            write(storage, 0, data(SECTOR))
            storage.flush()
            server.stop_answering()
            storage._timeout = 0.2
            into = views([SECTOR])
            for _ in range(2):  # on the connection, and when it connects
                with fails(errno.ETIMEDOUT, "does not answer"):
                    storage.read(0, into)
            server.go_on()
            assert not any(into[0])
        with acquired(server) as storage:
            assert read(storage, 0, SECTOR) == data(SECTOR)

    def test_closed_while_it_is_asked(self, servers: Servers) -> None:
        """close() waits for nobody; who was asking ends by itself, and asks no more."""
        server = servers.nbdkit("memory", str(SIZE), "rdelay=600", filters=("delay",))
        before = open_files()
        with acquired(server) as storage, ThreadPoolExecutor(1) as threads:
            storage._timeout = 0.5
            reading = threads.submit(read, storage, 0, SECTOR)
            wait_until(lambda: not storage._connections._idle)
            storage.close()
            assert not reading.done()
            with pytest.raises(OSError, match="does not answer"):
                reading.result(TIMEOUT)
            with fails(errno.EBADF):
                read(storage, 0, SECTOR)
        assert open_files() == before


class TestAnotherAtItsAddress:
    """A server falls silent, as when its host has died, and another takes its address."""

    def test_what_the_first_had_is_not_flushed_by_the_other(self, servers: Servers) -> None:
        first = servers.nbdkit("memory", str(SIZE))
        with acquired(first) as storage, ThreadPoolExecutor(2) as threads:
            write(storage, 0, data(SECTOR))
            first.stop_answering()
            servers.stand_in(first)
            reading = threads.submit(read, storage, 0, SECTOR)
            wait_until(lambda: not storage._connections._idle)
            write(storage, MIB, data(SECTOR))  # on a connection to the other
            flushing = threads.submit(storage.flush)
            wait_until(lambda: flushing.done() or a_flush_waits(storage))
            first.end()
            with fails(errno.ENOTCONN, "lost"):
                flushing.result(TIMEOUT)
            assert reading.result(TIMEOUT) == bytes(SECTOR)
            with pytest.raises(OSError, match="may be lost"):
                storage.flush()
            storage.acquire()
            write(storage, 0, data(SECTOR))
            storage.flush()
            assert read(storage, 0, SECTOR) == data(SECTOR)

    def test_the_first_times_out(self, servers: Servers) -> None:
        first = servers.nbdkit("memory", str(SIZE))
        with acquired(first) as storage:
            write(storage, 0, data(SECTOR))
            first.stop_answering()
            servers.stand_in(first)
            storage._timeout = 0.2
            with fails(errno.ETIMEDOUT):
                storage.flush()
            with fails(errno.ETIMEDOUT, "may be lost"):
                storage.flush()

    def test_what_was_written_to_the_other_only_is_flushed(self, servers: Servers) -> None:
        """It waits for nothing of the first, which had all made durable; nor is it an error that that is gone."""
        first = servers.nbdkit("memory", str(SIZE))
        with acquired(first) as storage, ThreadPoolExecutor(1) as threads:
            write(storage, 0, data(SECTOR))
            storage.flush()
            first.stop_answering()
            servers.stand_in(first)
            reading = threads.submit(read, storage, 0, SECTOR)
            wait_until(lambda: not storage._connections._idle)
            write(storage, 0, data(SECTOR))
            storage.flush()
            assert not reading.done()
            first.end()
            assert reading.result(TIMEOUT) == data(SECTOR)
            storage.flush()

    def test_a_flush_has_the_connection_that_was_written_through(
        self, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It waits for it, and is the next to have it."""
        flushes = Held(monkeypatch, "flush")
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage, ThreadPoolExecutor(1) as threads:
            write(storage, 0, data(SECTOR))
            with lent(storage) as written_through:
                flushing = threads.submit(storage.flush)
                wait_until(lambda: a_flush_waits(storage))
            with lent(storage) as another:
                assert another is not written_through
                flushes.go_on.set()
                flushing.result(TIMEOUT)
            assert flushes.connections == [written_through]

    def test_a_flush_waits_no_longer_than_any_command(self, servers: Servers) -> None:
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage:
            write(storage, 0, data(SECTOR))
            with lent(storage):
                storage._timeout = 0.2
                with fails(errno.ETIMEDOUT, "still at what it was asked before"):
                    storage.flush()

    def test_a_flush_has_any_connection_that_was_there_before_the_write(self, servers: Servers) -> None:
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage:
            with lent(storage), lent(storage):
                pass
            write(storage, 0, data(SECTOR))
            with lent(storage):  # the one that came back last: that was written through
                storage.flush()

    def test_a_flush_has_no_connection_that_was_made_during_the_write(
        self, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The answer to the write may have been on its way when its server died."""
        writes, flushes = Held(monkeypatch, "write"), Held(monkeypatch, "flush")
        monkeypatch.setattr(nbd, "CHANGES", {Connection.write})
        flushes.go_on.set()
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage, ThreadPoolExecutor(2) as threads:
            writing = threads.submit(write, storage, 0, data(SECTOR))
            wait_until(lambda: bool(writes.connections))
            read(storage, 0, SECTOR)  # on a further connection
            writes.go_on.set()
            writing.result(TIMEOUT)
            with lent(storage) as written_through:
                assert [written_through] == writes.connections
                flushing = threads.submit(storage.flush)
                wait_until(lambda: flushing.done() or a_flush_waits(storage))
            flushing.result(TIMEOUT)
            assert flushes.connections == [written_through]

    def test_what_was_written_during_a_flush_waits_for_the_next(
        self, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushes = Held(monkeypatch, "flush")
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage, ThreadPoolExecutor(1) as threads:
            write(storage, 0, data(SECTOR))
            flushing = threads.submit(storage.flush)
            wait_until(lambda: bool(flushes.connections))
            write(storage, 0, data(SECTOR))
            flushes.go_on.set()
            flushing.result(TIMEOUT)
            for _ in range(2):
                storage.flush()
                assert len(flushes.connections) == 2

    def test_a_connection_is_dead_and_nobody_has_said_so(self, servers: Servers) -> None:
        """Whoever had it was interrupted."""
        with acquired(servers.nbdkit("memory", str(SIZE))) as storage:
            write(storage, 0, data(SECTOR))
            with lent(storage) as connection:
                connection.close()
            with fails(errno.ENOTCONN, "may be lost"):
                storage.flush()


class Held:
    """A command that does nothing before it may :attr:`go_on`; and the connections where it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.go_on = threading.Event()
        self.connections: list[Connection] = []
        real = getattr(Connection, name)

        def command(connection: Connection, *arguments: object) -> None:
            self.connections.append(connection)
            assert self.go_on.wait(TIMEOUT)
            real(connection, *arguments)

        monkeypatch.setattr(Connection, name, command)


def lent(storage: NbdStorage) -> contextlib.AbstractContextManager[Connection]:
    return storage._connections.one(time.monotonic() + TIMEOUT)


def a_flush_waits(storage: NbdStorage) -> bool:
    return storage._connections._kept > 0


def test_served_by_the_command(servers: Servers, tmp_path: Path) -> None:
    server = servers.qemu_nbd(*image(tmp_path, "qcow2"))
    command: list[str | Path] = [sys.executable, "-m", "vfio_user", "serve", "nvme", "-o", f"path={server.uri}"]
    command += ["--socket-path", tmp_path / "nvme"]
    environment = {**os.environ, **library_path()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Nvme")
        process.terminate()
        assert process.wait(TIMEOUT) == 0
    server.end()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert refused.returncode
    assert len(refused.stderr.splitlines()) == 1
    assert "Connection refused" in refused.stderr


def test_qemu_respects_our_lock_and_we_its(tmp_path: Path) -> None:
    path, *_ = image(tmp_path, "raw")
    command: list[str | Path] = [program("qemu-img"), "convert", "-f", "raw", path, tmp_path / "copy"]
    with contextlib.closing(FileStorage(str(path))) as storage:
        storage.acquire()
        refused = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        assert "lock" in refused.stderr
        storage.release()
        subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT)


def test_an_image_that_qemu_serves(servers: Servers, tmp_path: Path) -> None:
    path, *options = image(tmp_path, "raw")
    server = servers.qemu_nbd(path, *options)
    with contextlib.closing(FileStorage(str(path))) as storage:
        with contextlib.closing(NbdStorage(server.uri)), fails(errno.EWOULDBLOCK, "somebody else uses it"):
            storage.acquire()  # that it answers means that it has it open
        server.end()
        storage.acquire()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
