"""``check``: a conformance report of a server, or of a client."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from vfio_user.cli.naming import naming
from vfio_user.cli.options import ANY_PATH, json_option, timeout_option
from vfio_user.cli.reports import check_writable
from vfio_user.errors import VfioUserError
from vfio_user.tools.check import (
    CLIENT_QUIRKS,
    SERVER_QUIRKS,
    ClientChecker,
    Entry,
    Mode,
    Progress,
    Report,
    Result,
    Selection,
    ServerChecker,
    ShellCommand,
    Verdict,
    client_entries,
    details,
    failures,
    junit,
    select,
    server_cases,
    server_entries,
)

_STYLES = {Verdict.MUST: "red", Verdict.SHOULD: "yellow", Verdict.QUIRK: "magenta"}
_COLUMNS = {
    "passed": Verdict.PASSED,
    "must": Verdict.MUST,
    "should": Verdict.SHOULD,
    "quirk": Verdict.QUIRK,
    "skipped": Verdict.SKIPPED,
}


@click.command(epilog="Example: vfio-user check /tmp/edu.sock --all --junit report.xml")
@click.argument("path", metavar="[SOCKET]", required=False, type=ANY_PATH)
@click.option("--client", is_flag=True, help="Play the server, and check the clients that connect.")
@click.option("--listen", metavar="PATH", type=ANY_PATH, help="With --client: where to make the socket.")
@click.option(
    "--run", metavar="COMMAND", help="With --client: the client, run anew with $VFIO_USER_SOCKET for each case."
)
@click.option("--active", is_flag=True, help="Also read BARs, write, mask and trigger interrupts, reset.")
@click.option("--migrate", is_flag=True, help="Also stop, save, restore and reset the device, log its DMA.")
@click.option("--hostile", is_flag=True, help="Also send malformed messages, and vanish in mid-message.")
@click.option("--all", "everything", is_flag=True, help="All of these three.")
@click.option(
    "--only", metavar="PATTERN", multiple=True, help="Cases whose names begin like this, or match it: dma/map/*."
)
@click.option("--list", "wants_list", is_flag=True, help="Show the cases, run none.")
@click.option("--strict", is_flag=True, help="Fail for a should and for a known quirk, too.")
@json_option
@click.option("--junit", "junit_file", metavar="FILE", type=click.Path(dir_okay=False), help="Also write JUnit XML.")
@timeout_option
def check(
    path: str | None,
    client: bool,
    listen: str | None,
    run: str | None,
    active: bool,
    migrate: bool,
    hostile: bool,
    everything: bool,
    only: tuple[str, ...],
    wants_list: bool,
    strict: bool,
    as_json: bool,
    junit_file: str | None,
    timeout: float,
) -> None:
    """Check the server behind SOCKET against the specification.

    Without further options nothing is done that changes what the device does. With --client, --listen and --run
    a client is checked, as in: vfio-user check --client --listen /tmp/c.sock --run 'vfio-user info $VFIO_USER_SOCKET'
    """
    given = {Mode.ACTIVE: active, Mode.MIGRATE: migrate, Mode.HOSTILE: hostile}
    selection = Selection(frozenset(mode for mode in Mode if everything or given.get(mode, True)), only)
    _check_usage(path, client, listen, run, wants_list)
    entries = [one for one in (client_entries() if client else server_entries()) if selection.has(one.name, one.mode)]
    if not entries:
        raise click.UsageError("no case is like that: --list shows them, some only with --active, --migrate, --hostile")
    if wants_list:
        _list(entries, as_json)
        return
    check_writable(junit_file)
    logging.getLogger("vfio_user.server").setLevel(logging.CRITICAL)  # the one that is played: the report says it all
    with _progress(len(entries)) as progress:
        if listen is not None:
            with naming(listen):
                launch = None if run is None else partial(ShellCommand, run)
                report = ClientChecker(Path(listen), launch, timeout, CLIENT_QUIRKS).run(selection, progress)
        else:
            assert path is not None
            with naming(path):
                report = ServerChecker(path, timeout, SERVER_QUIRKS).run(select(server_cases(), selection), progress)
    _show(report, strict, as_json, junit_file)


def _check_usage(path: str | None, client: bool, listen: str | None, run: str | None, wants_list: bool) -> None:
    if not client and (listen or run):
        raise click.UsageError("--listen and --run go with --client")
    if wants_list:
        return
    if client and (path or not listen):
        raise click.UsageError("--client takes --listen PATH, and no SOCKET")
    if not client and not path:
        raise click.UsageError("SOCKET is missing")


def _list(entries: Sequence[Entry], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([one._asdict() for one in entries]))
        return
    width = max(len(one.name) for one in entries)
    for one in entries:
        click.echo(f"{one.name:<{width}}  {one.level:<6}  {one.mode:<7}  {one.section}")


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A bar, on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda result: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda result: bar.update(task, advance=1, description=result.name)


def _show(report: Report, strict: bool, as_json: bool, junit_file: str | None) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        _print(report)
    if junit_file is not None:
        with naming(junit_file):
            Path(junit_file).write_bytes(junit(report, strict=strict))
    failed = failures(report, strict=strict)
    if failed:
        rule = "are not as expected" if strict else "break what the specification demands"
        raise VfioUserError(f"{len(failed)} of {len(report.results)} cases {rule}, the first is {failed[0].name}")


def _print(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for one in report.results:
        if one.findings:
            console.print(Text.assemble((str(one.verdict), _STYLES[one.verdict]), f" {one.name}"))
            for line in details(one):
                console.print(Text(f"    {line}"))
    console.print(_table(report))


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE, title=report.peer, title_justify="left", show_footer=True)
    table.add_column("chapter", footer="all")
    for heading, verdict in {"cases": None, **_COLUMNS}.items():
        table.add_column(heading, justify="right", footer=_cell(report.results, verdict))
    for chapter, results in groupby(report.results, key=lambda one: one.chapter):
        of_chapter = list(results)
        table.add_row(chapter, *(_cell(of_chapter, verdict) for verdict in (None, *_COLUMNS.values())))
    return table


def _cell(results: Sequence[Result], verdict: Verdict | None) -> Text:
    """How many have this verdict; None: how many there are."""
    if verdict is None:
        return Text(str(len(results)))
    count = Counter(one.verdict for one in results)[verdict]
    return Text(str(count or ""), style=_STYLES.get(verdict, "") if count else "")
