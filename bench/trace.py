"""What it costs to have ``vfio-user trace`` between client and server: the same exchange with it and without.

``python -m bench.trace`` from the top directory prints a table: microseconds for a REGION_READ of 4 bytes, MiB/s for
one of 1 MiB, by what is done with the messages.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness import SOURCES, START_SECONDS, in_turns, running, wait_for_socket

READS, LARGE_READS = 400, 20
SMALL, LARGE = 4, 1 << 20
ROUNDS = 15

HEADER, ACCESS = struct.Struct("<HHIII"), struct.Struct("<QII")
VERSION, REGION_READ = 1, 9
CAPABILITIES = b'{"capabilities":{"max_data_xfer_size":1048576}}\0'

MANNERS = {
    "passed on": ("--quiet",),
    "captured": ("--quiet", "--write", "/dev/null"),
    "shown": (),
    "shown as JSON": ("--json",),
    "shown, every reply over 1 s": ("--slow", "1000"),
}
"""What is done with the messages, and how ``vfio-user trace`` is told to."""


class Reader:
    """A client that costs next to nothing: one REGION_READ of ``size`` bytes over and over."""

    def __init__(self, path: Path, size: int) -> None:
        self._socket = _connected(path)
        self._exchange(HEADER.pack(0, VERSION, 20 + len(CAPABILITIES), 0, 0) + struct.pack("<HH", 0, 2) + CAPABILITIES)
        self._request = HEADER.pack(1, REGION_READ, 32, 0, 0) + ACCESS.pack(0, 0, size)

    def seconds(self, count: int) -> float:
        """For one exchange, of ``count``."""
        start = time.perf_counter()
        for _ in range(count):
            self._exchange(self._request)
        return (time.perf_counter() - start) / count

    def _exchange(self, request: bytes) -> None:
        self._socket.sendall(request)
        head = self._socket.recv(HEADER.size, socket.MSG_WAITALL)
        self._socket.recv(HEADER.unpack(head)[2] - HEADER.size, socket.MSG_WAITALL)

    def close(self) -> None:
        self._socket.close()


def _connected(path: Path) -> socket.socket:
    """The socket is there a moment before somebody listens."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            sock.close()
            if time.monotonic() > deadline:
                raise
        else:
            return sock


@contextmanager
def readers(folder: Path, manner: tuple[str, ...], size: int) -> Iterator[tuple[Reader, Reader]]:
    """One through ``vfio-user trace``, and one without: to a server each, on whatever cores there are."""
    with ExitStack() as stack:
        paths = []
        for name in ("traced", "direct"):
            path = folder / f"{name}.sock"
            path.unlink(missing_ok=True)
            server = stack.enter_context(running([sys.executable, str(SOURCES / "device.py"), str(path)]))
            wait_for_socket(server, path)
            paths.append(path)
        between = folder / "between.sock"
        command = [sys.executable, "-m", "vfio_user", "trace", "--listen", str(between), "--connect", str(paths[0])]
        wait_for_socket(stack.enter_context(running([*command, *manner])), between)
        traced, direct = Reader(between, size), Reader(paths[1], size)
        stack.callback(traced.close)
        stack.callback(direct.close)
        yield traced, direct


@contextmanager
def small_reads(folder: Path, manner: tuple[str, ...]) -> Iterator[tuple[Callable[[], float], Callable[[], float]]]:
    """Microseconds for a REGION_READ of 4 bytes: with ``vfio-user trace`` between, and without."""
    with readers(folder, manner, SMALL) as (traced, direct):
        yield lambda: traced.seconds(READS) * 1e6, lambda: direct.seconds(READS) * 1e6


@contextmanager
def large_reads(folder: Path, manner: tuple[str, ...]) -> Iterator[tuple[Callable[[], float], Callable[[], float]]]:
    """MiB/s of REGION_READs of 1 MiB: with ``vfio-user trace`` between, and without."""
    with readers(folder, manner, LARGE) as (traced, direct):
        yield lambda: 1 / traced.seconds(LARGE_READS), lambda: 1 / direct.seconds(LARGE_READS)


def main() -> None:
    print(f"{'4 bytes are read and':<32}{'µs':>9}{'without':>9}{'ratio':>7}   1 MiB, MiB/s{'without':>9}{'ratio':>7}")
    for name, manner in MANNERS.items():
        figures = []
        for contest in (small_reads, large_reads):
            with TemporaryDirectory() as folder, contest(Path(folder), manner) as (traced, direct):
                traced(), direct()
                figures.append(in_turns(ROUNDS, traced, direct))
        (small, alone), (large, plain) = figures
        print(f"{name:<32}{small:9.1f}{alone:9.1f}{small / alone:7.2f}{large:15.0f}{plain:9.0f}{large / plain:7.2f}")


if __name__ == "__main__":
    main()
