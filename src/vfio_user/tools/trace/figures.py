"""How often, how much, how long: figures per command."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vfio_user.filters.stats import table
from vfio_user.histogram import Histogram, duration
from vfio_user.tools.trace.exchanges import Told
from vfio_user.wire.commands import command_name

_NANOSECOND = 1e-9


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of a command: commands, errors, bytes both ways, latencies in seconds, at most 12.5 % too high."""

    count: int
    errors: int
    bytes: int
    p50: float
    p99: float
    max: float


@dataclass(slots=True)
class _Counted:
    count: int = 0
    errors: int = 0
    bytes: int = 0
    latencies: Histogram = field(default_factory=Histogram)

    def summary(self) -> Summary:
        p50, p99 = (nanoseconds * _NANOSECOND for nanoseconds in self.latencies.quantiles((0.5, 0.99)))
        return Summary(self.count, self.errors, self.bytes, p50, p99, self.latencies.max * _NANOSECOND)


class Figures:
    """Counts messages by their command."""

    def __init__(self) -> None:
        self._counted: dict[int, _Counted] = {}

    def add(self, told: Told) -> None:
        message = told.message
        counted = self._counted.setdefault(message.header.command, _Counted())
        counted.bytes += message.header.msg_size
        counted.count += message.is_command
        counted.errors += not message.is_command and message.is_error
        if told.latency is not None:
            counted.latencies.add(max(0, told.latency))

    def summary(self) -> dict[str, Summary]:
        """By the command's name, in the order of the numbers."""
        return {command_name(number): counted.summary() for number, counted in sorted(self._counted.items())}

    def as_json(self) -> dict[str, Any]:
        return {name: asdict(one) for name, one in self.summary().items()}

    def table(self) -> str:
        """The figures as a table; a line that says so when nothing was seen."""
        rows = [
            (name, str(s.count), str(s.errors), str(s.bytes), *map(_duration, (s.p50, s.p99, s.max)))
            for name, s in self.summary().items()
        ]
        return table(("command", "count", "errors", "bytes", "p50", "p99", "max"), rows) if rows else "no messages"


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds else "-"
