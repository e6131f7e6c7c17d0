"""A migration in words and numbers, for people: what the terminal, a log and the HTML page have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from vfio_user.live.report import Report, Round, Status
from vfio_user.live.stream import printable

_SIZES = ("KiB", "MiB", "GiB", "TiB")
_FULL = 1023.95
"""From here on a number would be shown as 1024.0: the next unit is due."""

_DURATIONS = (
    (99.5e-6, 1e6, "{:.3g} µs"),
    (9.95e-3, 1e3, "{:.2f} ms"),
    (0.9995, 1e3, "{:.0f} ms"),
    (59.95, 1, "{:.1f} s"),
)
"""Below how many seconds, how many of the unit are a second, and how they are written."""


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a number to read: ``61.2 MiB``."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in _SIZES[:-1]:
        count /= 1024
        if count < _FULL:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:,.1f} {_SIZES[-1]}"


def rate(count: float) -> str:
    """Bytes per second: ``61.2 MiB/s``."""
    return f"{size(count)}/s"


def duration(seconds: float) -> str:
    """Seconds as people read them: ``41 µs``, ``0.41 ms``, ``41 ms``, ``4.1 s``, ``1:02:03``, ``for ever``."""
    for below, units, text in _DURATIONS:
        if seconds < below:
            return text.format(seconds * units)
    if seconds == float("inf"):
        return "for ever"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{rest:02}"


def clean(text: str) -> str:
    """``text``, part of which may be a peer's, in one line and without what would drive a terminal."""
    return " ".join(printable(text, " ").split())


@dataclass(frozen=True, slots=True)
class Column:
    """Of the table of rounds: its heading, and a round's cell."""

    heading: str
    cell: Callable[[Round], str]
    brief: bool = True
    """Whether it is shown where there is no room for all."""


COLUMNS = (
    Column("round", lambda done: f"{done.number}{' (stopped)' if done.stopped else ''}"),
    Column("pages", lambda done: f"{done.pages:,}"),
    Column("memory", lambda done: size(done.memory_bytes), brief=False),
    Column("device", lambda done: size(done.device_bytes), brief=False),
    Column("time", lambda done: duration(done.seconds)),
    Column("bandwidth", lambda done: rate(done.bandwidth)),
    Column("dirty again", lambda done: "" if done.stopped else f"{done.left:,}"),
    Column("pages/s", lambda done: "" if done.stopped else f"{done.dirty_rate:,.0f}", brief=False),
    Column("downtime", lambda done: "" if done.stopped else duration(done.downtime)),
)
"""The table of rounds. Its last three are about what comes next, of which there is nothing after the last."""

_VERDICTS = {
    Status.COMPLETED: "completed: the destination runs",
    Status.FAILED: "failed at {step}: the source is as it was",
    Status.UNCONFIRMED: "unconfirmed at {step}: the destination may run, the source stays stopped",
}


def verdict(report: Report) -> str:
    """How it ended, and which side runs now."""
    return _VERDICTS[report.status].format(step=report.step)


def facts(report: Report) -> list[tuple[str, str]]:
    """What there is to say about the whole of it, as (name, value)."""
    sent = sum(done.pages for done in report.rounds)
    return [
        *([("reason", clean(report.error))] if report.error else []),
        ("rounds", f"{len(report.rounds):,}"),
        ("pages sent", f"{sent:,}, {report.dirty_pages:,} of them again"),
        ("memory", size(sum(done.memory_bytes for done in report.rounds))),
        ("device state", size(report.device_state_bytes)),
        *([("downtime", duration(report.downtime))] if report.downtime else []),
        *((f"  {cause}", duration(seconds)) for cause, seconds in report.causes.items()),
        ("total", duration(report.total)),
    ]


def round_line(done: Round) -> str:
    """A round in one line, for a log."""
    what = f"{done.pages:,} pages" if done.pages else f"{size(done.device_bytes)} of device state"
    line = f"round {COLUMNS[0].cell(done)}: {what} in {duration(done.seconds)}, {rate(done.bandwidth)}"
    if done.stopped:
        return line
    return f"{line}; {done.left:,} dirty again, downtime {duration(done.downtime)}"


def report_text(report: Report) -> str:
    """The whole report as plain text, for a log or a file. Ends without a newline."""
    rows = [[column.heading for column in COLUMNS]] if report.rounds else []
    rows += [[column.cell(done) for column in COLUMNS] for done in report.rounds]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    names = facts(report)
    widest = max(len(name) for name, _ in names)
    return "\n".join(chain([verdict(report)], (f"  {name:<{widest}}  {value}" for name, value in names), table))
