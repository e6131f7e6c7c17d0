"""Compile the C programs, start servers and clients on chosen cores, take turns, keep medians."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

SOURCES = Path(__file__).parent
COMPILER = ("cc", "-O2", "-Wall", "-Wextra", "-Werror")
PROGRAMS = {"client": ("client.c", "link.c"), "nvme": ("nvme.c", "link.c"), "server": ("server.c",)}
"""What each is made of."""
CLIENT_SECONDS = 60
START_SECONDS = 20


class BenchError(Exception):
    """A measurement that could not be made; the message says why."""


@dataclass(frozen=True)
class Placement:
    """The cores of the two processes that talk to each other."""

    client: int
    server: int


def placements() -> tuple[Placement, Placement | None]:
    """One core for both, and a core for each; None on a machine that has only one."""
    first, *others = sorted(os.sched_getaffinity(0))
    return Placement(first, first), Placement(first, others[0]) if others else None


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run this process on ``core`` for a while: what it starts meanwhile stays there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(command: Sequence[str], core: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended, and waited for, when the block is left."""
    with ExitStack() as stack:
        if core is not None:
            stack.enter_context(pinned(core))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_socket(process: subprocess.Popen[bytes], socket: Path) -> None:
    command = shlex.join(cast("list[str]", process.args))
    deadline = time.monotonic() + START_SECONDS
    while not socket.exists():
        if process.poll() is not None:
            raise BenchError(f"{command}: it ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise BenchError(f"{command}: no socket within {START_SECONDS} s")
        time.sleep(0.005)


@dataclass(frozen=True)
class OurServer:
    """bench/device.py behind ``vfio_user.Server``; ``spin`` in microseconds."""

    spin: int = 0

    def command(self, tools: Tools, socket: Path) -> list[str]:
        return [sys.executable, str(SOURCES / "device.py"), str(socket), "--spin", str(self.spin)]


@dataclass(frozen=True)
class CServer:
    """bench/server.c in one of its modes."""

    arguments: tuple[str, ...]

    def command(self, tools: Tools, socket: Path) -> list[str]:
        return [str(tools.server), str(socket), *self.arguments]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a server, and what the client does with it (the modes of client.c)."""

    server: OurServer | CServer
    mode: str
    size: int
    raw: bool = False


@dataclass(frozen=True)
class Tools:
    """The compiled programs, in a directory that also takes the sockets."""

    directory: Path

    @property
    def client(self) -> Path:
        return self.directory / "client"

    @property
    def server(self) -> Path:
        return self.directory / "server"

    @property
    def nvme(self) -> Path:
        return self.directory / "nvme"

    def compile(self) -> None:
        for program, sources in PROGRAMS.items():
            try:
                subprocess.run(
                    [*COMPILER, "-o", self.directory / program, *(SOURCES / name for name in sources)], check=True
                )
            except (OSError, subprocess.CalledProcessError) as error:
                raise BenchError(f"{program} does not compile: {error}") from error

    def exchange(self, side: Side, socket: Path, core: int, warmup: int, count: int) -> float:
        """Nanoseconds: the median of ``count`` exchanges, as client.c takes it."""
        arguments = [side.mode, str(side.size), str(warmup), str(count), *(["raw"] if side.raw else [])]
        return nanoseconds([self.client, socket, *arguments], core)


def nanoseconds(command: Sequence[str | Path], core: int) -> float:
    """What a program prints that was run on ``core``."""
    with pinned(core):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    name = f"{Path(command[0]).name} {command[2]}"
    try:
        out, complaint = process.communicate(timeout=CLIENT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise BenchError(f"{name}: not done within {CLIENT_SECONDS} s") from None
    if process.returncode != 0:
        raise BenchError(complaint.strip() or f"{name}: it ended with {process.returncode}")
    return float(out)


def in_turns(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    """The medians of two measurements that take turns, so that whatever else the machine does meets both."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def compete(
    tools: Tools, ours: Side, theirs: Side, placement: Placement, rounds: int, count: int
) -> tuple[float, float]:
    """Nanoseconds per exchange of the two sides, in turns. Sides with the same server share its process."""
    with ExitStack() as stack:
        sockets: dict[OurServer | CServer, Path] = {}
        for server in dict.fromkeys((ours.server, theirs.server)):
            socket = tools.directory / f"{len(sockets)}.sock"
            socket.unlink(missing_ok=True)
            process = stack.enter_context(running(server.command(tools, socket), placement.server))
            wait_for_socket(process, socket)
            sockets[server] = socket

        def one(side: Side) -> float:
            return tools.exchange(side, sockets[side.server], placement.client, max(1, count // 10), count)

        one(ours), one(theirs)
        return in_turns(rounds, lambda: one(ours), lambda: one(theirs))
