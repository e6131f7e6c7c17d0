"""``bench``: how fast a server answers, or two next to each other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from rich.console import Console

from vfio_user.cli.naming import meeting, naming
from vfio_user.cli.options import ANY_PATH, Seconds, json_option, timeout_option
from vfio_user.cli.reports import check_writable
from vfio_user.errors import UsageError
from vfio_user.histogram import duration
from vfio_user.tools.bench import Choice, Link, Measure, Report, Result, Settings, picture, pinned, plan, run
from vfio_user.tools.bench.engine import Progress, ratio
from vfio_user.tools.bench.link import ROOM
from vfio_user.tools.interrupts import Interrupts
from vfio_user.tools.location import Location

_MIB = 1 << 20


@click.command(epilog="Example: vfio-user bench /tmp/a.sock /tmp/b.sock --region bar0+0x0 --html report.html")
@click.argument("paths", metavar="SOCKET [SOCKET]", nargs=-1, required=True, type=ANY_PATH)
@click.option(
    "--region", "regions", metavar="PLACE", multiple=True, help="Also read there: bar0+0x0. Sizes go upwards."
)
@click.option("--write", is_flag=True, help="Also write there what was read there before, with and without replies.")
@click.option("--size", "sizes", metavar="N", multiple=True, type=click.IntRange(1, ROOM), help="Bytes of an access.")
@click.option("--migrate", is_flag=True, help="Also log DMA, stop the device, read its state, write it back.")
@click.option("--only", metavar="PATTERN", multiple=True, help="Measures that begin like this, or match it: read/*/4.")
@click.option("--list", "wants_list", is_flag=True, help="Show the measures, do none.")
@click.option(
    "--seconds",
    metavar="S",
    default=0.5,
    show_default=True,
    type=Seconds(0.001, 3600),
    help="Of each measure.",
)
@click.option(
    "--rounds", metavar="N", default=5, show_default=True, type=click.IntRange(1, 1000), help="Turns to spread it over."
)
@click.option("--client-core", metavar="N", type=click.IntRange(0), help="Run this program on core N.")
@click.option("--server-core", metavar="N", type=click.IntRange(0), help="Move the servers to core N meanwhile.")
@json_option
@click.option(
    "--html", metavar="FILE", type=click.Path(dir_okay=False), help="Also write a page with the distributions."
)
@timeout_option
def bench(
    paths: tuple[str, ...],
    regions: tuple[str, ...],
    write: bool,
    sizes: tuple[int, ...],
    migrate: bool,
    only: tuple[str, ...],
    wants_list: bool,
    seconds: float,
    rounds: int,
    client_core: int | None,
    server_core: int | None,
    as_json: bool,
    html: str | None,
    timeout: float,
) -> None:
    """Measure how fast the server behind SOCKET answers; of two, in turns, the second is compared to the first.

    Reads config space, maps memory and takes it back, and asks for information. What could change the device is done
    only with --region, --write and --migrate.
    """
    choice = Choice([Location.parse(text) for text in regions], sizes, write, migrate, only)
    measures = plan(choice)
    _check(paths, choice, measures)
    if wants_list:
        names = [one.name for one in measures]
        click.echo(json.dumps({"measures": names}) if as_json else "\n".join(names))
        return
    check_writable(html)
    report = Report(paths)
    try:
        with ExitStack() as stack:
            links = [stack.enter_context(_link(path, timeout)) for path in paths]
            stack.enter_context(pinned(client_core, server_core, [link.server_pid for link in links]))
            progress = stack.enter_context(_progress(len(measures)))
            interrupts = stack.enter_context(Interrupts())
            run(links, measures, Settings(seconds, rounds), report, progress, interrupts.check)
    finally:
        if report.results or report.left_out:
            _show(report, as_json, html)


def _check(paths: Sequence[str], choice: Choice, measures: Sequence[Measure]) -> None:
    if len(paths) > 2:
        raise UsageError("one server, or two to compare")
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError("a server serves one client at a time: compare two servers")
    if choice.write and not choice.regions:
        raise UsageError("--write needs a --region to write to")
    if not measures:
        raise UsageError("no measure is like that: --list shows them, some only with --region, --write, --migrate")


def _link(path: str, timeout: float) -> Link:
    with meeting(path):
        return Link.connect(path, timeout)


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """What is being measured, on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: None
        return
    with console.status("") as status:
        names: list[str] = []

        def show(name: str) -> None:
            names.append(name)
            status.update(f"{len(names)} of {total}: {name}")

        yield show


def _show(report: Report, as_json: bool, html: str | None) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        _print(report)
    if html is not None:
        with naming(html):
            Path(html).write_text(picture(report), encoding="utf-8")


def _print(report: Report) -> None:
    for line in aligned(_table(report) if len(report.servers) == 1 else _comparison(report)):
        click.echo(line)
    for one in report.left_out:
        where = f" of {report.servers[one.server]}" if len(report.servers) > 1 else ""
        click.echo(f"left out: {one.measure}{where}: {one.reason}")


_TIMES = ("p50", "p99", "p99.9", "max")


def _table(report: Report) -> Iterator[Sequence[str]]:
    yield "measure", "count", *_TIMES, "per second", "MiB/s"
    for name, (result,) in report.measures():
        facts = result.facts()
        times = [duration(facts[column] / 1e6) for column in _TIMES]
        yield name, f"{facts['count']:,}", *times, f"{facts['messages_per_s']:,.0f}", _rate(facts)


def _comparison(report: Report) -> Iterator[Sequence[str]]:
    """Times and throughputs of both; the ratio is the median of those of the turns, and goes from one to the other."""
    yield "measure", "p50 A", "p50 B", "p99 A", "p99 B", "MiB/s A", "MiB/s B", "B/A", "from", "to"
    for name, results in report.measures():
        facts = {result.server: result.facts() for result in results}
        cells = [duration(facts[n][key] / 1e6) if n in facts else "" for key in ("p50", "p99") for n in (0, 1)]
        cells += [_rate(facts[n]) if n in facts else "" for n in (0, 1)]
        yield name, *cells, *_ratio(results)


def _ratio(results: Sequence[Result]) -> list[str]:
    found = ratio(results)
    return ["", "", ""] if found is None else [f"{one:.2f}" for one in (found.median, found.least, found.largest)]


def _rate(facts: dict[str, float]) -> str:
    return f"{facts['bytes_per_s'] / _MIB:,.1f}" if facts["bytes_per_s"] else ""


def aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows as lines: the first column to the left, the others to the right, as wide as what is in them."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        numbers = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([f"{first:<{widths[0]}}", *numbers]).rstrip()
