"""A migration for people: how far it is while it runs, and how it went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vfio_user.live import Migration, Report, Status, Step
from vfio_user.live.progress import Progress, Watch
from vfio_user.live.text import COLUMNS, Column, duration, facts, rate, round_line, size, verdict

PER_SECOND = 4
"""Looks at a migration, and pictures of it."""

_MOST_ROWS = 20
"""Of the table of rounds: of more of them the first and the last ones are shown."""

_ANY_WIDTH = 10_000

_STYLES = {Status.COMPLETED: "green", Status.FAILED: "red", Status.UNCONFIRMED: "yellow"}


def follow(migration: Migration, console: Console | None = None) -> None:
    """Run ``migration`` to its end, and show how far it is; raises what that raises.

    On a terminal it is a picture that changes, and is gone at the end. Else it is a line per round, ``console`` being
    stderr by default. With a quiet console it is nothing.
    """
    console = console or Console(stderr=True)
    rounds = migration.run()
    if console.quiet:
        list(rounds)
    elif not console.is_terminal:
        for done in rounds:
            console.out(round_line(done), highlight=False)
    else:
        watch = Watch(migration)
        with Live(
            get_renderable=lambda: picture(watch.look(), migration.downtime),
            console=console,
            refresh_per_second=PER_SECOND,
            transient=True,
        ):
            for done in rounds:
                console.print(Text(round_line(done), style="dim"))


def picture(progress: Progress, allowed: float) -> RenderableType:
    """A moment of a migration. ``allowed``: seconds that the switch-over may take."""
    names = Table.grid(padding=(0, 2))
    for name, value in _lines(progress, allowed):
        names.add_row(name, Text(value))
    title = Text.assemble((str(progress.step), "bold"), f", round {progress.number}")
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        title,
        ProgressBar(total=1.0, completed=progress.share, width=40),
        f"{progress.share:.0%}",
    )
    return Group(bar, names)


def _lines(progress: Progress, allowed: float) -> list[tuple[str, str]]:
    """What is known, as (name, value)."""

    def pages(count: float) -> str:
        return f"{count:,.0f} pages"

    lines = [("left", f"{pages(progress.left)}, {size(progress.left * progress.page_size)}")]
    if progress.bandwidth is not None:
        lines.append(("bandwidth", rate(progress.bandwidth)))
    if progress.dirty_rate is not None:
        lines.append(
            ("dirty rate", f"{pages(progress.dirty_rate)}/s, {rate(progress.dirty_rate * progress.page_size)}")
        )
    if progress.downtime is not None and progress.step is Step.PRE_COPY:
        lines.append(("switch-over", f"would take {duration(progress.downtime)}, {duration(allowed)} are allowed"))
    lines.append(("time to go", _time_to_go(progress)))
    return lines


def _time_to_go(progress: Progress) -> str:
    if progress.to_go is None:
        return "not known yet"
    if progress.to_go == float("inf"):
        return "it does not converge: memory gets dirty too fast for this bandwidth"
    return f"{'at least' if progress.number == 1 else 'about'} {duration(progress.to_go)}"


class RoundsTable:
    """The rounds, a row each; of very many those in the middle are left out, and columns where they have no room."""

    def __init__(self, report: Report) -> None:
        self._rounds = report.rounds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table(COLUMNS)
        if console.measure(table, options=options.update(max_width=_ANY_WIDTH)).maximum > options.max_width:
            table = self._table([column for column in COLUMNS if column.brief])
        yield table

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
        for cells in self._rows(columns):
            table.add_row(*cells)
        return table

    def _rows(self, columns: Sequence[Column]) -> Iterator[list[str]]:
        half, left_out = _MOST_ROWS // 2, len(self._rounds) - _MOST_ROWS
        for number, done in enumerate(self._rounds):
            if left_out <= 0 or not half <= number < half + left_out:
                yield [column.cell(done) for column in columns]
            elif number == half:
                yield [f"{left_out:,} more"]


def facts_panel(report: Report, *more: tuple[str, str], title: str = "", style: str = "") -> Panel:
    """How it went in all, with ``more`` to say about it. ``title`` and ``style`` in place of the report's verdict."""
    grid = Table.grid(padding=(0, 2))
    for name, value in (*facts(report), *more):
        grid.add_row(name, Text(value))
    return Panel(grid, title=Text(title or verdict(report)), border_style=style or _STYLES[report.status], expand=False)


def render(report: Report) -> Group:
    """The whole report."""
    return Group(*([RoundsTable(report)] if report.rounds else []), facts_panel(report))
