"""An NVMe controller on a file in the page cache, driven by nvme.c.

``python -m bench.nvme [WORD]`` shows each way to drive it, with the processor's time that the server takes for a
command, next to the same calls without a controller. The rows of bench.run have the targets.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from struct import Struct

from bench.harness import (
    OurServer,
    Placement,
    Side,
    Tools,
    nanoseconds,
    placements,
    running,
    wait_for_socket,
)

KIB, MIB = 1 << 10, 1 << 20
DISK = 64 * MIB
PAGE = 4 * KIB
_STAMPED = Struct(f"<Q{PAGE - 16}xQ")
"""A page of the disk, with its number at both ends."""
ROUND_TRIPS = 1000
ROUNDS = 5


@dataclass(frozen=True)
class Load:
    """What nvme.c is told; ``count`` commands make one turn."""

    kind: str
    block: int
    depth: int
    count: int
    ways: tuple[str, ...] = ()

    @property
    def all(self) -> int:
        """Commands with those that nvme.c sends to warm up."""
        return self.count + self.count // 10 + 2 * self.depth

    def arguments(self) -> list[str]:
        return [self.kind, str(self.block), str(self.depth), str(self.count), *self.ways]

    def __str__(self) -> str:
        return " ".join([self.kind, f"{self.block // KIB} KiB, depth {self.depth}", *self.ways])


SEQUENTIAL = Load("read", 128 * KIB, 32, 8000)
DEEP = Load("random-read", 4 * KIB, 32, 4000)
SINGLE = Load("random-read", 4 * KIB, 1, 1000)
SINGLE_POLLED = replace(SINGLE, ways=("polled",))
LOADS = [
    SEQUENTIAL,
    replace(SEQUENTIAL, kind="write"),
    DEEP,
    replace(DEEP, kind="random-write"),
    SINGLE,
    replace(SINGLE, kind="random-write"),
]
WAYS = [(), ("polled",), ("shadow",), ("polled", "shadow"), ("scattered",)]


def write_disk(path: Path) -> None:
    """It then is in the page cache as it comes there when it is read, in large pieces; as it comes there when a guest
    writes it, page by page, every call that reads much of it takes two or three times as long."""
    with path.open("wb") as file:
        file.write(b"".join(_STAMPED.pack(number, number) for number in range(DISK // PAGE)))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Disk:
    """A file whose pages bear their numbers, and a server of it on one core."""

    def __init__(self, tools: Tools, placement: Placement, spin: int) -> None:
        self.path = tools.directory / "disk.img"
        self._tools, self._placement, self._spin = tools, placement, spin
        self._socket = tools.directory / "nvme.sock"
        self.server = 0
        """Its process."""

    @contextmanager
    def served(self) -> Iterator[Disk]:
        write_disk(self.path)
        self._socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "vfio_user", "serve", "nvme", "-o", f"path={self.path}"]
        command += ["--socket-path", str(self._socket), "--spin", str(self._spin)]
        with running(command, self._placement.server) as process:
            wait_for_socket(process, self._socket)
            self.server = process.pid
            yield self

    def commands(self, load: Load) -> float:
        """Nanoseconds per command of the controller."""
        return self._run(self._socket, load.arguments())

    def calls(self, load: Load) -> float:
        """Nanoseconds per call of preadv, or pwritev, for the same."""
        return self._run(self.path, [*load.arguments(), "plain"])

    def _run(self, target: Path, arguments: list[str]) -> float:
        self.path.read_bytes()  # the page cache may have lost some of it
        return nanoseconds([self._tools.nvme, target, *arguments], self._placement.client)


Contestants = tuple[Callable[[], float], Callable[[], float]]


@contextmanager
def bandwidths(load: Load, placement: Placement, spin: int, directory: Path) -> Iterator[Contestants]:
    """MiB per second of the controller, and of the calls alone."""
    with Disk(Tools(directory), placement, spin).served() as disk:
        size = load.block / MIB * 1e9
        yield lambda: size / disk.commands(load), lambda: size / disk.calls(load)


@contextmanager
def latencies(load: Load, placement: Placement, spin: int, directory: Path) -> Iterator[Contestants]:
    """Microseconds per command, and per round trip of a REGION_READ of 4 bytes to a device that does nothing."""
    tools, socket = Tools(directory), directory / "device.sock"
    socket.unlink(missing_ok=True)
    server = OurServer(spin)
    with (
        Disk(tools, placement, spin).served() as disk,
        running(server.command(tools, socket), placement.server) as process,
    ):
        wait_for_socket(process, socket)

        def round_trip() -> float:
            side = Side(server, "region-read", 4)
            return tools.exchange(side, socket, placement.client, ROUND_TRIPS // 10, ROUND_TRIPS) / 1e3

        yield lambda: disk.commands(load) / 1e3, round_trip


def processor_time(process: int) -> int:
    """Nanoseconds that all threads of a process have run."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{process}/task").iterdir())


def show(disk: Disk, load: Load) -> None:
    figures = []
    for _ in range(ROUNDS):
        before = processor_time(disk.server)
        command = disk.commands(load)
        after = processor_time(disk.server)
        figures.append((command, (after - before) / load.all, disk.calls(load)))
    command, server, call = (median(column) / 1e3 for column in zip(*figures, strict=True))
    print(f"{load!s:44} {command:9.2f} {server:9.2f} {call:9.2f} {call / command:7.2f}", flush=True)


def main(word: str) -> None:
    one, two = placements()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        tools = Tools(Path(directory))
        tools.compile()
        for where, placement in (("one core", one), ("two cores", two)):
            if placement is None:
                continue
            print(f"{where + ', µs per command':44} {'all':>9} {'server':>9} {'calls':>9} {'ratio':>7}")
            with Disk(tools, placement, spin=0).served() as disk:
                for load in (replace(load, ways=ways) for load in LOADS for ways in WAYS):
                    if word in str(load):
                        show(disk, load)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
