"""Live migration: what memory rounds, the switch-over and logging cost, next to plain sockets and plain memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from mmap import mmap
from pathlib import Path

from bench.harness import BenchError, pinned, placements, running, wait_for_socket
from vfio_user.client import Client
from vfio_user.devices import edu
from vfio_user.errors import MigrationError
from vfio_user.fds import OwnedFd
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Offer
from vfio_user.live.memory import PIECE
from vfio_user.live.pipes import SocketPipe
from vfio_user.live.remote import RemoteDestination, receive
from vfio_user.wire.constants import PAGE_SIZE

MIB = 1 << 20
MEMORY = 64 * MIB
DIRTY_PAGES = 1000
ROUND_TRIPS = 40
TRANSFERS = 500
BIG_STATE = Path(__file__).with_name("big_state.py")
"""A device with 1 MiB of state."""
STATE = 1 * MIB


def memory(size: int, fill: bytes = b"") -> tuple[OwnedFd, memoryview]:
    fd = OwnedFd(os.memfd_create("bench", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), size)
    view = memoryview(mmap(fd.fileno(), size))
    if fill:
        view[:] = fill * (size // len(fill))
    return fd, view


@contextmanager
def partner(role: str, core: int | None = None) -> Iterator[socket.socket]:
    """A process of its own that runs :func:`main` with ``role``, at the other end of a socket."""
    ours, theirs = socket.socketpair()
    with ours:
        command = [sys.executable, "-m", "bench.live", role, str(theirs.fileno())]
        with theirs, pinned(core) if core is not None else nullcontext():
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        try:
            yield ours
        finally:
            ours.close()
            if process.wait(20):
                raise BenchError(f"{role}: exit status {process.returncode}")


@contextmanager
def rounds_of_memory() -> Iterator[tuple[Callable[[], float], Callable[[], float]]]:
    """MiB per second of a round in which all memory is dirty: through a migration, and as bytes on a socket.

    Each end has a core of its own, if there are two: they belong to different hosts.
    """
    one, two = placements()
    place = two or one
    _, content = memory(MEMORY, os.urandom(MIB))
    with ExitStack() as stack:
        stack.enter_context(pinned(place.client))
        remote = RemoteDestination(SocketPipe(stack.enter_context(partner("receive", place.server))))
        stack.callback(remote.abort)
        plain = stack.enter_context(partner("plain", place.server))
        remote.check(Offer([], [(0, MEMORY)]))
        remote.begin()

        def migration() -> None:
            for start in range(0, MEMORY, PIECE):
                remote.write_memory(start, content[start : start + PIECE])
            remote.settle()

        yield lambda: rate(migration, MEMORY), lambda: rate(lambda: exchange(plain, content), MEMORY)


def rate(work: Callable[[], None], size: int) -> float:
    start = time.perf_counter()
    work()
    return size / MIB / (time.perf_counter() - start)


def exchange(sock: socket.socket, content: memoryview) -> None:
    """All of it there, one byte back."""
    sock.sendall(len(content).to_bytes(8, "little"))
    for start in range(0, len(content), PIECE):
        sock.sendall(content[start : start + PIECE])
    if sock.recv(1) != b"!":
        raise BenchError("the plain socket broke")


@contextmanager
def switch_overs(directory: Path) -> Iterator[tuple[Callable[[], float], Callable[[], float]]]:
    """Milliseconds of downtime with 1 MiB of state and 1000 dirty pages; of these bytes and 40 round trips."""
    fd, here = memory(MEMORY, os.urandom(MIB))
    other_fd, there = memory(MEMORY)
    with ExitStack() as stack:
        clients = []
        for name, file in (("source", fd), ("destination", other_fd)):
            path = directory / f"{name}.sock"
            command = [sys.executable, "-m", "vfio_user", "serve", f"{BIG_STATE}:BigState", "--socket-path", str(path)]
            wait_for_socket(stack.enter_context(running(command)), path)
            clients.append(stack.enter_context(Client.connect(path, 20.0)))
            clients[-1].dma_map(0, MEMORY, file.fileno())
        plain = stack.enter_context(partner("plain"))
        sides = [(clients[0], here), (clients[1], there)]

        def downtime() -> float:
            """There or back: the side that was left, stopped, takes the next one."""
            (source, content), (destination, target) = sides
            wrote: list[tuple[int, int]] = []
            job = Migration(
                [source],
                LocalDestination([destination], [MemoryRegion(0, target)]),
                memory=[MemoryRegion(0, content)],
                guest_dirty=lambda: [wrote.pop()] if wrote else [],
                pause=lambda: wrote.append((0, DIRTY_PAGES * PAGE_SIZE)),
            )
            list(job.run())
            sides.reverse()
            return job.report.downtime * 1e3

        def bytes_and_trips() -> float:
            start = time.perf_counter()
            exchange(plain, here[: STATE + DIRTY_PAGES * PAGE_SIZE])
            for _ in range(ROUND_TRIPS):
                exchange(plain, here[:0])
            return (time.perf_counter() - start) * 1e3

        yield downtime, bytes_and_trips


@contextmanager
def dma_writes(directory: Path) -> Iterator[tuple[Callable[[], float], Callable[[], float]]]:
    """MiB per second that an edu moves into guest memory, a page each time, with its log on and off."""
    fd, _ = memory(MEMORY)
    path = directory / "edu.sock"
    command = [sys.executable, "-m", "vfio_user", "serve", "edu", "--socket-path", str(path)]
    with ExitStack() as stack:
        wait_for_socket(stack.enter_context(running(command)), path)
        client = stack.enter_context(Client.connect(path, 20.0))
        client.dma_map(0, MEMORY, fd.fileno())

        def write() -> None:
            for address in range(0, TRANSFERS * PAGE_SIZE, PAGE_SIZE):
                transfer = (edu.BUFFER_ADDRESS, address, PAGE_SIZE, edu.DMA_START | edu.DMA_TO_GUEST)
                for number, value in enumerate(transfer):
                    client.region_write(0, edu.DMA_SOURCE + 8 * number, value.to_bytes(8, "little"))

        def logged() -> float:
            client.dma_logging_start(PAGE_SIZE, [(0, MEMORY)])
            try:
                return rate(write, TRANSFERS * PAGE_SIZE)
            finally:
                client.dma_logging_stop()

        yield logged, lambda: rate(write, TRANSFERS * PAGE_SIZE)


def main(role: str, fd: int) -> None:
    """What a partner does until its socket ends."""
    _, content = memory(MEMORY)
    with socket.socket(fileno=fd) as sock:
        if role == "receive":
            try:
                receive(SocketPipe(sock), LocalDestination([], [MemoryRegion(0, content)]))
            except MigrationError as error:
                if "gave the migration up" not in str(error):  # which is how the measurement ends
                    raise
            return
        while size := sock.recv(8, socket.MSG_WAITALL):
            left = content[: int.from_bytes(size, "little")]
            while left:
                left = left[sock.recv_into(left) :]
            sock.sendall(b"!")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
