"""``stats``: how often, how much, how long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vfio_user.filters.base import COMMAND_HOOKS, Call, Filter
from vfio_user.histogram import Histogram, duration
from vfio_user.server.backend import ServerBackend

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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, the first on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    )
