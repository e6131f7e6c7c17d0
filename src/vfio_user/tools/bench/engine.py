"""Measures in turns, server by server, so that what slows the machine for a while slows each of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter_ns
from typing import Any

from vfio_user.errors import CommandError
from vfio_user.tools.bench.link import Link
from vfio_user.tools.bench.measures import Measure
from vfio_user.tools.bench.probes import LeftOutError, Probe

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
"""Which quantiles are reported."""
MAX_SAMPLES = 100_000
"""Of one turn: they are all kept, because the ratio of two servers takes more than a histogram's buckets tell."""
_WARM_UP = 0.1
"""Of a turn, that does not count: what ran before has the caches, and the processor's clock is down."""


@dataclass(frozen=True, slots=True)
class Settings:
    """``seconds``: of each measure and server, all turns together; ``rounds``: how many turns."""

    seconds: float = 0.5
    rounds: int = 5


@dataclass(slots=True)
class Result:
    """What a measure found of one server: nanoseconds of each message, turn by turn."""

    measure: str
    server: int
    turns: list[array[int]] = field(default_factory=list)
    moved: int = 0
    """Bytes of data, of all messages together."""

    @property
    def samples(self) -> list[int]:
        """Of all turns, by size."""
        return sorted(sample for turn in self.turns for sample in turn)

    def facts(self) -> dict[str, Any]:
        """count; p50 to p99.9 and max in microseconds; messages and bytes per second."""
        samples = self.samples
        seconds = sum(samples) / 1e9
        return {
            "server": self.server,
            "count": len(samples),
            **{name: quantile(samples, share) / 1e3 for name, share in SHARES.items()},
            "max": samples[-1] / 1e3,
            "messages_per_s": len(samples) / seconds,
            "bytes_per_s": self.moved / seconds,
        }


@dataclass(frozen=True, slots=True)
class Ratio:
    """The second server's median time to the first one's: the median over the turns, and the ends."""

    median: float
    least: float
    largest: float


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A measure that a server could not do, and why."""

    measure: str
    server: int
    reason: str


@dataclass(slots=True)
class Report:
    """What was measured, and what was left out."""

    servers: Sequence[str]
    results: list[Result] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def measures(self) -> Iterator[tuple[str, list[Result]]]:
        """Each measure with its results, one for each server that could do it."""
        for name in dict.fromkeys(result.measure for result in self.results):
            yield name, [result for result in self.results if result.measure == name]

    def as_dict(self) -> dict[str, Any]:
        """Keys: servers, measures (name, results, ratio), left_out. Times are in microseconds."""
        return {
            "servers": list(self.servers),
            "measures": [
                {"name": name, "results": [one.facts() for one in results], "ratio": _as_dict(ratio(results))}
                for name, results in self.measures()
            ],
            "left_out": [{"measure": one.measure, "server": one.server, "reason": one.reason} for one in self.left_out],
        }


def quantile(samples: Sequence[int], share: float) -> int:
    """What such a part of ``samples``, which are sorted, did not exceed."""
    return samples[min(len(samples) - 1, int(share * len(samples)))]


def ratio(results: Sequence[Result]) -> Ratio | None:
    """None unless there are two servers that could do it."""
    if len(results) != 2:
        return None
    first, second = results
    ratios = [median(b) / median(a) for a, b in zip(first.turns, second.turns, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def _as_dict(found: Ratio | None) -> dict[str, float] | None:
    return None if found is None else {"median": found.median, "least": found.least, "largest": found.largest}


Progress = Callable[[str], None]


def run(
    links: Sequence[Link],
    measures: Sequence[Measure],
    settings: Settings,
    report: Report,
    progress: Progress = lambda name: None,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Measure all of it, and put what was found into ``report`` as soon as a measure is done.

    ``progress`` is told the name of each measure before it begins. ``check`` is called between two messages; what it
    raises ends it, with every device as it was. Raises what ends a connection, MigrationError.
    """
    for measure in measures:
        progress(measure.name)
        _measure(links, measure, settings, report, check)


def _measure(
    links: Sequence[Link], measure: Measure, settings: Settings, report: Report, check: Callable[[], object]
) -> None:
    results: dict[int, Result] = {}
    with ExitStack() as stack:
        probes: dict[int, Probe] = {}
        for server, link in enumerate(links):
            probes[server] = probe = measure.make(link)
            stack.callback(probe.stop)
            with _leaving_out(measure, server, probes, report):
                probe.start()
                results[server] = Result(measure.name, server)
        for _ in range(settings.rounds):
            for server, probe in list(probes.items()):
                with _leaving_out(measure, server, probes, report):
                    _turn(probe, results[server], settings.seconds / settings.rounds, check)
        report.results += [result for server, result in results.items() if server in probes]


@contextmanager
def _leaving_out(measure: Measure, server: int, probes: dict[int, Probe], report: Report) -> Iterator[None]:
    """What a server refuses is left out for it, with the reason, and for the other goes on."""
    try:
        yield
    except (LeftOutError, CommandError) as error:
        del probes[server]
        report.left_out.append(LeftOut(measure.name, server, str(error)))


def _turn(probe: Probe, result: Result, seconds: float, check: Callable[[], object]) -> None:
    """At least one sample; a first part of the time does not count."""
    begin = perf_counter_ns()
    end = begin + int(seconds * 1e9)
    while perf_counter_ns() < begin + _WARM_UP * (end - begin):
        check()
        probe.once()
    samples = array("Q")
    while not samples or (perf_counter_ns() < end and len(samples) < MAX_SAMPLES):
        check()
        duration, size = probe.once()
        samples.append(duration)
        result.moved += size
    result.turns.append(samples)
