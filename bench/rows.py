"""What is measured: one row per claim, each with its target."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from bench import live, lookup, nvme
from bench.harness import (
    BenchError,
    CServer,
    OurServer,
    Placement,
    Side,
    Tools,
    compete,
    in_turns,
    placements,
    running,
    wait_for_socket,
)

Contestants = AbstractContextManager[tuple[Callable[[], float], Callable[[], float]]]
"""Ours and theirs, each a measurement that gives a figure."""

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))

SPIN = 50
"""Microseconds that our server polls before it sleeps, in the row that says "spin"."""

HEADER, ACCESS, MIG_DATA, REPORT = 16, 16, 8, 32
"""Sizes in bytes of the header and of the fixed parts of the payloads (wire.h)."""


@dataclass(frozen=True)
class Target:
    """A bound for a ratio, or for a figure that has nothing beside it."""

    comparison: str
    limit: float

    def met(self, value: float) -> bool:
        return {"<=": value <= self.limit, "<": value < self.limit, ">=": value >= self.limit}[self.comparison]

    def __str__(self) -> str:
        return f"{self.comparison} {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """Two medians in a row's unit. ``theirs`` is None where the target bounds the figure itself."""

    ours: float
    theirs: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours if self.theirs is None else self.ours / self.theirs


@dataclass(frozen=True)
class Effort:
    """``rounds`` turns of each side, and how much of a row's usual count each turn takes."""

    rounds: int
    share: float


QUICK = Effort(rounds=9, share=0.4)
FULL = Effort(rounds=25, share=1.0)


class Row(Protocol):
    """One line of the table. ``measure`` raises BenchError where it cannot be measured."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def target(self) -> Target: ...
    def measure(self, tools: Tools, effort: Effort) -> Result: ...


def microseconds(nanoseconds: float, size: int) -> float:
    return nanoseconds / 1e3


def mib_per_second(nanoseconds: float, size: int) -> float:
    return size / MIB / (nanoseconds / 1e9)


def messages_per_second(nanoseconds: float, size: int) -> float:
    return 1e9 / nanoseconds


UNITS = {"µs": microseconds, "MiB/s": mib_per_second, "msg/s": messages_per_second}


@dataclass(frozen=True)
class Contest:
    """Our server and another, both driven by client.c; ``count`` exchanges make one turn."""

    name: str
    unit: str
    target: Target
    ours: Side
    theirs: Side
    placement: Placement | None
    count: int

    def measure(self, tools: Tools, effort: Effort) -> Result:
        if self.placement is None:
            raise BenchError("needs two cores")
        count = max(1, int(self.count * effort.share))
        ours, theirs = compete(tools, self.ours, self.theirs, self.placement, effort.rounds, count)
        convert = UNITS[self.unit]
        return Result(convert(ours, self.ours.size), convert(theirs, self.theirs.size))


@dataclass(frozen=True)
class Figure:
    """Anything else: ``function`` measures it."""

    name: str
    unit: str
    target: Target
    function: Callable[[Tools, Effort], Result]

    def measure(self, tools: Tools, effort: Effort) -> Result:
        return self.function(tools, effort)


# ---- contests ----


def like_libvfio_user(mode: str, size: int) -> Side:
    return Side(CServer(("rpc",)), mode, size)


def plain_stream(mode: str, size: int) -> Side:
    """A socket without a protocol that moves as many bytes each way as one exchange of ``mode``."""
    request, reply = {
        "region-read": (ACCESS, ACCESS + size),
        "region-write": (ACCESS + size, ACCESS),
        "mig-read": (MIG_DATA, MIG_DATA + size),
        "mig-write": (MIG_DATA + size, 0),
        "report": (REPORT, REPORT + size // (4 * KIB) // 8),
    }[mode]
    return Side(CServer(("stream", str(HEADER + request), str(HEADER + reply))), mode, size, raw=True)


def access_rows(one: Placement, two: Placement | None) -> list[Row]:
    read, posted = ("region-read", 4), ("posted", 5000)
    return [
        Contest(
            name="REGION_READ 4 B, one core",
            unit="µs",
            target=Target("<=", 1.25),
            ours=Side(OurServer(), *read),
            theirs=like_libvfio_user(*read),
            placement=one,
            count=5000,
        ),
        Contest(
            name="REGION_READ 4 B, two cores, ours spins",
            unit="µs",
            target=Target("<", 1),
            ours=Side(OurServer(SPIN), *read),
            theirs=like_libvfio_user(*read),
            placement=two,
            count=3000,
        ),
        Contest(
            name="posted REGION_WRITE 4 B, two cores",
            unit="msg/s",
            target=Target(">=", 0.8),
            ours=Side(OurServer(), *posted),
            theirs=like_libvfio_user(*posted),
            placement=two,
            count=10,
        ),
    ]


BULK = {
    "region-read": "REGION_READ 1 MiB",
    "region-write": "REGION_WRITE 1 MiB",
    "mig-read": "MIG_DATA_READ 1 MiB",
    "mig-write": "MIG_DATA_WRITE 1 MiB",
}


def bulk_rows(one: Placement, two: Placement | None) -> list[Row]:
    return [
        Contest(
            name=f"{title}, {where}",
            unit="MiB/s",
            target=Target(">=", 0.9),
            ours=Side(OurServer(), mode, MIB),
            theirs=plain_stream(mode, MIB),
            placement=placement,
            count=250,
        )
        for mode, title in BULK.items()
        for where, placement in (("one core", one), ("two cores", two))
    ]


def report_rows(one: Placement) -> list[Row]:
    return [
        Contest(
            name="LOGGING_REPORT 1 GiB / our REGION_READ 32 KiB",
            unit="µs",
            target=Target("<=", 1.5),
            ours=Side(OurServer(), "report", GIB),
            theirs=Side(OurServer(), "region-read", 32 * KIB),
            placement=one,
            count=1000,
        ),
        Contest(
            name="LOGGING_REPORT 1 TiB / stream of 32 MiB",
            unit="µs",
            target=Target("<=", 2),
            ours=Side(OurServer(), "report", TIB),
            theirs=plain_stream("report", TIB),
            placement=one,
            count=8,
        ),
    ]


# ---- other figures ----


def look_up(distinct: int, tools: Tools, effort: Effort) -> Result:
    many, few = lookup.look_ups(lookup.MANY, distinct), lookup.look_ups(lookup.FEW, distinct)
    return Result(*in_turns(effort.rounds, many, few))


def run_milliseconds(code: str) -> float:
    start = time.perf_counter()
    if subprocess.run([sys.executable, "-c", code]).returncode != 0:
        raise BenchError(f"python -c {code!r} failed")
    return (time.perf_counter() - start) * 1e3


def start_up(tools: Tools, effort: Effort) -> Result:
    ours, bare = partial(run_milliseconds, "import vfio_user"), partial(run_milliseconds, "pass")
    in_turns(2, ours, bare)  # the first ones write and read bytecode
    return Result(*in_turns(4 * effort.rounds, ours, bare))


def resident_mib(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def idle_memory(tools: Tools, effort: Effort) -> Result:
    command = Path(sys.executable).with_name("vfio-user")
    if not command.exists():
        raise BenchError("no vfio-user command beside this interpreter")
    socket = tools.directory / "idle.sock"
    with running([str(command), "serve", "gpio", "--socket-path", str(socket)]) as process:
        wait_for_socket(process, socket)
        time.sleep(0.3)  # for what it still does once it listens
        return Result(resident_mib(process.pid))


def lookup_rows() -> list[Row]:
    return [
        Figure(
            name=f"region look-up, {lookup.MANY} / {lookup.FEW}, {distinct} addresses",
            unit="ns",
            target=Target("<=", 2),
            function=partial(look_up, distinct),
        )
        for distinct in (100, 1000)
    ]


def process_rows() -> list[Row]:
    return [
        Figure("import vfio_user / bare interpreter", "ms", Target("<=", 3), start_up),
        Figure("idle vfio-user serve gpio, resident", "MiB", Target("<=", 30), idle_memory),
    ]


def take_turns(contest: Callable[[Path], Contestants], tools: Tools, effort: Effort) -> Result:
    with contest(tools.directory) as (ours, theirs):
        ours(), theirs()
        return Result(*in_turns(effort.rounds, ours, theirs))


def live_rows() -> list[Row]:
    return [
        Figure(name, unit, target, partial(take_turns, contest))
        for name, unit, target, contest in (
            ("memory rounds / plain socket", "MiB/s", Target(">=", 0.8), lambda folder: live.rounds_of_memory()),
            ("downtime, 1 MiB and 1,000 pages", "ms", Target("<=", 1.5), live.switch_overs),
            ("DMA writes of edu, logged / not", "MiB/s", Target(">=", 0.9), live.dma_writes),
        )
    ]


def nvme_rows(one: Placement, two: Placement | None) -> list[Row]:
    return [
        Figure(name.format(where), unit, Target(*target), partial(take_turns, partial(contest, load, placement, spin)))
        for where, placement, spin, single in (
            ("one core", one, 0, nvme.SINGLE),
            ("two cores", two, SPIN, nvme.SINGLE_POLLED),
        )
        for name, unit, target, contest, load in (
            ("NVMe read 128 KiB / preadv, {}", "MiB/s", (">=", 0.8), nvme.bandwidths, nvme.SEQUENTIAL),
            ("NVMe 4 KiB at depth 32 / REGION_READ, {}", "µs", ("<=", 0.6), nvme.latencies, nvme.DEEP),
            ("NVMe 4 KiB at depth 1 / REGION_READ, {}", "µs", ("<=", 2.5), nvme.latencies, single),
        )
        if placement is not None
    ]


def rows() -> list[Row]:
    one, two = placements()
    others = [*report_rows(one), *lookup_rows(), *process_rows(), *live_rows(), *nvme_rows(one, two)]
    return [*access_rows(one, two), *bulk_rows(one, two), *others]
