"""What a benchmark found as one HTML page, which needs nothing else: no script, no file, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from vfio_user.histogram import duration
from vfio_user.tools.bench.engine import SHARES, Report, Result, quantile, ratio

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 40
"""Room around a curve for its labels, in units of the picture."""
_POINTS = 160
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5c6570; --line: #dde1e6;
  --s0: #1f6feb; --s1: #c4590a; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --card: #181d24; --ink: #e8ebef; --soft: #a0a9b4;
  --line: #313841; --s0: #6cb0ff; --s1: #f0975a; } }
body { margin: 0; padding: 2rem 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem;
  overflow-x: auto; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s1.curve { stroke-dasharray: 7 3; }
i { display: inline-block; width: 1.6rem; border-top: 3px solid; vertical-align: middle; margin-right: .4rem; }
i.s0 { border-color: var(--s0); } i.s1 { border-color: var(--s1); border-top-style: dashed; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
"""


def picture(report: Report, title: str = "vfio-user bench") -> str:
    """The page: for each measure the distribution of its times, a curve for each server, and the figures."""
    servers = "<br>".join(f'<i class="s{n}"></i>{escape(name)}' for n, name in enumerate(report.servers))
    parts = [f"<h1>{escape(title)}</h1>", f"<section>{servers}</section>"]
    parts += [_section(name, results) for name, results in report.measures()]
    parts += [_left_out(report)] if report.left_out else []
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _left_out(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.measure)}</td><td>{escape(report.servers[one.server])}</td>"
        f"<td>{escape(one.reason)}</td></tr>"
        for one in report.left_out
    )
    return f"<section><h2>Left out</h2><table>{rows}</table></section>"


def _section(name: str, results: Sequence[Result]) -> str:
    samples = {result.server: result.samples for result in results}
    scale = _Scale.of(list(samples.values()))
    found = ratio(results)
    note = f": the second takes {found.median:.2f} of the first's time" if found else ""
    drawn = "".join([*_axes(scale), *(_curve(server, some, scale) for server, some in samples.items())])
    return (
        f"<section><h2>{escape(name)}{note}</h2>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="times of {escape(name)}">{drawn}</svg>'
        f"{_table(results)}</section>"
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """From shares and nanoseconds, ``low`` to ``high``, to places in the picture.

    Both are logarithmic: of the shares what is missing from 1, down to ``rarest``, so that the slowest in a thousand
    have as much room as the slowest in ten.
    """

    low: float
    high: float
    rarest: float

    @classmethod
    def of(cls, all_samples: Sequence[Sequence[int]]) -> _Scale:
        low = max(1, min(samples[0] for samples in all_samples))
        high = max(samples[-1] for samples in all_samples)
        longest = max(len(samples) for samples in all_samples)
        return cls(_round_down(low), _round_up(max(high, low + 1)), min(0.1, 1 / longest))

    def x(self, share: float) -> float:
        missing = max(1 - share, self.rarest)
        return round(LEFT + math.log(missing) / math.log(self.rarest) * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 2)


_STEPS = (1, 2, 5)


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return power * max(step for step in _STEPS if step * power <= value)


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return power * min(step for step in (*_STEPS, 10) if step * power >= value)


def _times(scale: _Scale) -> Iterator[float]:
    """Round numbers of nanoseconds on the scale: 1, 2 and 5 times powers of ten, powers alone where those are many."""
    steps = _STEPS if scale.high / scale.low <= 1000 else (1,)
    power = 10.0 ** math.floor(math.log10(scale.low))
    while power <= scale.high:
        yield from (step * power for step in steps if scale.low <= step * power <= scale.high)
        power *= 10


def _axes(scale: _Scale) -> Iterator[str]:
    for value in _times(scale):
        y = scale.y(value)
        yield f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{duration(value / 1e9)}</text>'
    for share in _shares(scale):
        x = scale.x(share)
        yield f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{100 * share:.10g} %</text>'
    yield f'<text x="{(LEFT + WIDTH) // 2}" y="{HEIGHT - 5}" text-anchor="middle">of the messages took no longer</text>'


def _shares(scale: _Scale) -> Iterator[float]:
    """0, a half, and as many nines as the scale has room for."""
    yield from (0.0, 0.5)
    missing = 0.1
    while missing >= scale.rarest * 0.999:
        yield 1 - missing
        missing /= 10


def _curve(server: int, samples: Sequence[int], scale: _Scale) -> str:
    shares = [1 - scale.rarest ** (n / _POINTS) for n in range(_POINTS + 1)]
    points = " ".join(f"{scale.x(share)},{scale.y(quantile(samples, share))}" for share in shares)
    return f'<polyline class="curve s{server}" points="{points}"/>'


def _table(results: Sequence[Result]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "messages", *SHARES, "max"))
    rows = ""
    for result in results:
        facts = result.facts()
        times = "".join(f"<td>{duration(facts[name] / 1e6)}</td>" for name in (*SHARES, "max"))
        rows += f'<tr><td><i class="s{result.server}"></i></td><td>{facts["count"]:,}</td>{times}</tr>'
    return f"<table><tr>{head}</tr>{rows}</table>"
