"""``stats``: how often, how much, how long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vfio_user.filters.base import COMMAND_HOOKS, Call, Filter
from vfio_user.server.backend import ServerBackend

_SUB_BITS = 3
"""Each power of two of nanoseconds has 2**3 buckets: a latency is known to an eighth."""
_SUB = 1 << _SUB_BITS
_BUCKETS = 64 * _SUB

_NANOSECOND = 1e-9


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of a hook: calls, bytes moved, refusals, and latencies in seconds, at most 12.5 % too high."""

    calls: int
    moved: int
    errors: int
    p50: float
    p99: float
    max: float


class Histogram:
    """Counts durations in nanoseconds, in memory that does not grow."""

    def __init__(self) -> None:
        self._buckets = [0] * _BUCKETS
        self.max = 0

    def add(self, duration: int) -> None:
        """Count one duration."""
        self._buckets[min(_bucket(duration), _BUCKETS - 1)] += 1
        if duration > self.max:
            self.max = duration

    def quantiles(self, shares: Iterable[float]) -> list[int]:
        """For each share, 0 to 1, the nanoseconds that such a part of the durations did not exceed; 0 without any."""
        counts = list(accumulate(self._buckets))  # a copy: another thread may be counting
        total = counts[-1]
        return [
            min(self.max, next((_highest(i) for i, count in enumerate(counts) if count >= max(1, share * total)), 0))
            for share in shares
        ]


def _bucket(duration: int) -> int:
    shift = max(0, duration.bit_length() - _SUB_BITS - 1)
    return (shift << _SUB_BITS) + (duration >> shift)


def _highest(bucket: int) -> int:
    """The longest duration that a bucket counts."""
    shift = max(0, (bucket >> _SUB_BITS) - 1)
    return ((bucket - (shift << _SUB_BITS) + 1) << shift) - 1


class _Figures:
    """What is counted for one hook."""

    __slots__ = ("calls", "errors", "latencies", "moved")

    def __init__(self) -> None:
        self.calls = self.moved = self.errors = 0
        self.latencies = Histogram()

    def summary(self) -> Summary:
        p50, p99 = (nanoseconds * _NANOSECOND for nanoseconds in self.latencies.quantiles((0.5, 0.99)))
        return Summary(self.calls, self.moved, self.errors, p50, p99, self.latencies.max * _NANOSECOND)


class Stats(Filter):
    """Counts calls, bytes, refusals and latencies per command, for a report at the end and on SIGUSR1.

    Latencies are those of the device, and of the filters between it and this one. What the server does for a client
    that leaves (unmapping, disabling interrupts) counts like the client's own commands.
    """

    name = "stats"

    def __init__(self, backend: ServerBackend) -> None:
        self._figures = {hook: _Figures() for hook in COMMAND_HOOKS}
        super().__init__(backend)

    def around(self, call: Call) -> Any:
        figures = self._figures[call.hook.name]
        begin = time.perf_counter_ns()
        try:
            result = call()
        except BaseException:
            figures.errors += 1
            raise
        else:
            figures.moved += call.hook.moved(call.arguments, result)
            return result
        finally:
            figures.latencies.add(time.perf_counter_ns() - begin)
            figures.calls += 1

    def summary(self) -> dict[str, Summary]:
        """What is known so far, by hook; those that were not called are left out."""
        return {hook: figures.summary() for hook, figures in self._figures.items() if figures.calls}

    def report(self) -> str:
        """The summary as a table; a line that says so if nothing was called."""
        rows = [
            (hook, str(s.calls), str(s.moved), str(s.errors), *(duration(t) for t in (s.p50, s.p99, s.max)))
            for hook, s in self.summary().items()
        ]
        return table(("call", "calls", "bytes", "errors", "p50", "p99", "max"), rows) if rows else "no calls"


_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def duration(seconds: float) -> str:
    """A time with the unit that suits it, three digits at least."""
    unit, size = next((row for row in _UNITS if seconds >= row[1]), _UNITS[-1])
    value = seconds / size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, the first on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    )
