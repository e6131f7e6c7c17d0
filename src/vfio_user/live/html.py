"""The report of a migration as one HTML page, which needs nothing else: no script, no file, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from vfio_user.live.report import Report, Round, Status, Step
from vfio_user.live.text import COLUMNS, clean, duration, facts, rate, verdict

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 14, 40
"""Room around a curve for its labels, in units of the picture."""

STRIP = 0.12
"""Of the height of a logarithmic scale that below its least value."""

_NEARLY_NOTHING, _BEYOND = 1e-9, 1e18
"""Values below and from which no scale has to show: of seconds, pages, bytes per second."""

_MOST_DOTS = 60
"""With more rounds than that dots would hide the line."""

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5c6570; --line: #dde1e6;
  --curve: #1f6feb; --good: #1a7f37; --bad: #c0242b; --unsure: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --card: #181d24; --ink: #e8ebef; --soft: #a0a9b4;
  --line: #313841; --curve: #6cb0ff; --good: #57c96f; --bad: #ff7b72; --unsure: #e3a13c; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; }
.outcome { border-left: 5px solid var(--tone); }
.outcome > p { margin: 0; font-weight: 600; color: var(--tone); }
.completed { --tone: var(--good); } .failed { --tone: var(--bad); } .unconfirmed { --tone: var(--unsure); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1.2rem; margin: .6rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.steps { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; margin: .9rem 0 0; padding: 0; }
.steps li { border: 1px solid var(--line); border-radius: 99px; padding: .05rem .7rem; color: var(--soft); }
.steps .done { color: var(--ink); } .steps .done::before { content: "\\2713\\a0"; color: var(--good); }
.steps .stuck { color: var(--tone); border-color: var(--tone); font-weight: 600; }
.steps .stuck::before { content: "\\2715\\a0"; }
.unconfirmed .stuck::before { content: "?\\a0"; }
figure { margin: 0; overflow-x: auto; } figure + figure { margin-top: 1.4rem; }
figcaption { font-weight: 600; } figcaption span { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; stroke: var(--card);
  stroke-width: 4px; paint-order: stroke; }
.note { margin: .8rem 0 0; color: var(--soft); }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.curve { fill: none; stroke: var(--curve); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--curve); stroke: var(--card); stroke-width: 1.5; }
.stop { fill: var(--card); stroke: var(--curve); stroke-width: 2; }
.limit { stroke: var(--unsure); stroke-width: 1.5; stroke-dasharray: 6 4; } svg .limit-name { fill: var(--unsure); }
.scroll { overflow: auto; max-height: 32rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; }
@media print { body { padding: 0; } .scroll { max-height: none; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True, slots=True)
class _Curve:
    """A number of each round over the rounds. ``value`` is None for a round that has none."""

    name: str
    note: str
    value: Callable[[Round], float | None]
    label: Callable[[float], str]
    least: float
    """Smallest step of the axis that ``label`` can tell."""
    base: int = 1000
    """Whose powers the numbers of the axis are round in: 1024 for bytes."""
    shrinks: bool = True
    """By a factor from round to round if all goes well: a logarithmic axis makes that a straight line."""


def report_html(report: Report, title: str = "Live migration", *, allowed: float | None = None) -> str:
    """The report as a page: outcome, steps, curves per round, table of rounds.

    ``title`` is plain text, and so is all else that comes from elsewhere. ``allowed``, in seconds, is the downtime that
    the migration had to keep to: it is drawn where it is given.
    """
    name = escape(clean(title))
    parts = [_outcome(report, name), *_pictures(report, allowed), *_table(report)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: {report.status}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _outcome(report: Report, name: str) -> str:
    what = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts(report))
    steps = "".join(f"<li{_class(state)}>{step}</li>" for step, state in _steps(report))
    return (
        f"<h1>{name}</h1>\n"
        f'<section class="outcome {report.status}">\n<p>{escape(verdict(report))}</p>\n<dl>{what}</dl>\n'
        f'<ol class="steps">{steps}</ol>\n</section>'
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _steps(report: Report) -> Iterator[tuple[Step, str]]:
    """Each step, and whether it was done, was the one where it ended, or was not come to."""
    order = list(Step)
    reached = len(order) if report.status is Status.COMPLETED else order.index(report.step)
    for number, step in enumerate(order):
        yield step, "done" if number < reached else "stuck" if number == reached else ""


def _pictures(report: Report, allowed: float | None) -> Iterator[str]:
    if not report.rounds:
        yield "<section><h2>Rounds</h2>No round was finished.</section>"
        return

    def downtime(done: Round) -> float | None:
        """Expected; of the last, for which the guest stood still, what it took in the end."""
        return done.downtime if not done.stopped else report.downtime or None

    curves = (
        _Curve("Dirty pages left", "after each round", lambda done: done.left, lambda value: f"{value:,.0f}", 1),
        _Curve("Bandwidth", "in each round", lambda done: done.bandwidth, rate, 1, 1024, shrinks=False),
        _Curve("Downtime", "expected after each round; the last: as it was", downtime, duration, 1e-4),
    )
    yield "<section><h2>Curves</h2>"
    for curve in curves:
        yield _figure(curve, report.rounds, allowed if curve.label is duration else None)
    if report.rounds[-1].stopped:
        yield '<p class="note">The open dot is the last round, in which the guest stood still.</p>'
    yield "</section>"


def _figure(curve: _Curve, rounds: Sequence[Round], limit: float | None) -> str:
    points = [(done, value) for done in rounds if (value := curve.value(done)) is not None and value < _BEYOND]
    limit = limit if limit is not None and limit < _BEYOND else None
    values = [value for _, value in points] + ([limit] if limit else [])
    powers = decades(values) if curve.shrinks else []
    ticks = powers or nice_ticks(max(values, default=0), curve.least, curve.base)
    scale = _Scale(rounds[-1].number, ticks[-1], ticks[1] if powers else 0.0)
    note = curve.note + (", on a logarithmic scale" if powers else "")
    return (
        f"<figure><figcaption>{curve.name} <span>{note}</span></figcaption>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{curve.name} {note}">'
        + "".join(_picture(curve, points, scale, ticks, limit))
        + "</svg></figure>"
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """From rounds, 1 to ``last``, and values, 0 to ``top``, to places in the picture.

    With a ``least`` the scale of values is logarithmic from there on, above a strip for what is less.
    """

    last: int
    top: float
    least: float = 0.0

    def x(self, number: float) -> float:
        share = (number - 1) / (self.last - 1) if self.last > 1 else 0.5
        return round(LEFT + 10 + share * (WIDTH - LEFT - RIGHT - 20), 2)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - self._share(value) * (HEIGHT - TOP - BOTTOM), 2)

    def _share(self, value: float) -> float:
        if not self.least:
            return value / self.top
        if value < self.least:
            return value / self.least * STRIP
        return STRIP + (1 - STRIP) * math.log(value / self.least) / math.log(self.top / self.least)


def _picture(
    curve: _Curve, points: Sequence[tuple[Round, float]], scale: _Scale, ticks: Sequence[float], limit: float | None
) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for value in ticks:
        y = scale.y(value)
        yield f'<line class="{"grid" if value else "axis"}" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{curve.label(value) if value else 0}</text>'
    for number in _round_ticks(scale.last):
        x = scale.x(number)
        yield f'<line class="axis" x1="{x}" y1="{floor}" x2="{x}" y2="{floor + 5}"/>'
        yield f'<text x="{x}" y="{floor + 18}" text-anchor="middle">{number:,}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) // 2}" y="{HEIGHT - 5}" text-anchor="middle">round</text>'
    if limit is not None:
        y = scale.y(limit)
        yield f'<line class="limit" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
        below = 14 if y < TOP + 14 else -5
        name = f"allowed: {curve.label(limit)}"
        yield f'<text class="limit-name" x="{WIDTH - RIGHT}" y="{y + below}" text-anchor="end">{name}</text>'
    if len(points) > 1:
        line = " ".join(f"{scale.x(done.number)},{scale.y(value)}" for done, value in points)
        yield f'<polyline class="curve" points="{line}"/>'
    yield from _dots(curve, points, scale)


def _dots(curve: _Curve, points: Sequence[tuple[Round, float]], scale: _Scale) -> Iterator[str]:
    """Each says its number when the mouse is over it."""
    for done, value in points:
        if len(points) <= _MOST_DOTS or done.stopped:
            yield (
                f'<circle class="{"stop" if done.stopped else "dot"}" cx="{scale.x(done.number)}"'
                f' cy="{scale.y(value)}" r="4"><title>round {done.number}: {curve.label(value)}</title></circle>'
            )


def nice_ticks(largest: float, least: float = 1, base: int = 1000, most: int = 5) -> list[float]:
    """Numbers from 0 to ``largest`` or a bit more, at equal steps of 1, 2 or 5 times a power of ten, about ``most``.

    No step is smaller than ``least``, a power of ten. With a ``base`` of 1024 the power of ten is one of the unit that
    fits: 20 MiB, not 20,000,000 bytes.
    """
    if not largest / most > 0:  # nor so small that a part of it is nothing
        return [0.0, least]
    unit = 1024.0 ** math.floor(math.log(largest, 1024)) if base == 1024 and largest >= 1 else 1.0
    power = max(least / unit, 10.0 ** math.floor(math.log10(largest / most / unit)))
    step = unit * next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * unit * most >= largest)
    return [step * number for number in range(max(1, math.ceil(largest / step - 1e-9)) + 1)]


def decades(values: Sequence[float], most: int = 6) -> list[float]:
    """0, and powers of ten from below the least of ``values`` that is not about 0 to above the largest, about ``most``.

    None where all are within two powers of ten: that is seen better on an even scale.
    """
    some = [value for value in values if value > _NEARLY_NOTHING]
    if not some or max(some) < 100 * min(some):
        return []
    first, last = math.floor(math.log10(min(some))), math.ceil(math.log10(max(some)))
    step = math.ceil((last - first) / most)
    return [0.0, *(10.0**power for power in range(first, last + step, step))]


def _round_ticks(last: int, most: int = 10) -> Iterable[int]:
    """Numbers of rounds to write under the axis: the first, and round ones up to the last."""
    if last <= most:
        return range(1, last + 1)
    step = int(nice_ticks(last, most=most)[1])
    return [1, *range(step, last + 1, step)]


def _table(report: Report) -> Iterator[str]:
    if not report.rounds:
        return
    head = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in COLUMNS)
    yield '<section><h2>Rounds</h2><div class="scroll" tabindex="0" role="region" aria-label="Rounds"><table>'
    yield f"<thead><tr>{head}</tr></thead>\n<tbody>"
    for done in report.rounds:
        yield f"<tr>{''.join(f'<td>{escape(column.cell(done))}</td>' for column in COLUMNS)}</tr>"
    yield "</tbody></table></div></section>"
