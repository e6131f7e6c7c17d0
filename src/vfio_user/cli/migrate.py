"""``migrate``, ``receive``, ``save`` and ``restore``: the state of devices, from here to there and into files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click
from rich.console import Console

from vfio_user.cli.inspect import connect, open_for_reading, socket_argument, timeout_option
from vfio_user.cli.progress import follow, render
from vfio_user.cli.reasons import describe, naming
from vfio_user.errors import MigrationError, UsageError, VfioUserError
from vfio_user.live import LocalDestination, Migration, files
from vfio_user.live.html import report_html
from vfio_user.live.remote import RemoteDestination
from vfio_user.live.remote import receive as receive_from
from vfio_user.live.report import Report, Status
from vfio_user.live.text import clean, verdict
from vfio_user.tools.interrupts import Interrupts
from vfio_user.tools.migrate import Remote, Stoppable, StoppablePipe, moved
from vfio_user.tools.saved import is_special, replaced, spooled

MIB = 1 << 20
STDIN, STDOUT, STDERR = 0, 1, 2
CALLS_PER_ANSWER = 6
"""What the other side does before it answers takes some calls: to give up on it sooner would leave it in doubt."""
file_argument = click.argument("file", metavar="FILE|-", type=click.Path())


@click.command()
@socket_argument
@file_argument
@timeout_option
def save(path: str, file: str, timeout: float) -> None:
    """Write the state of the device behind SOCKET into FILE; the device runs on as it was."""
    with _whole(file) as sink, connect(path, timeout) as client, Interrupts() as interrupts:
        with _telling(f"{path} is not saved to {file}"):
            files.save(client, sink, on_progress=interrupts.check)
        interrupts.check()  # the file is not in its place yet


@click.command()
@socket_argument
@file_argument
@click.option(
    "--max-size",
    default=files.MAX_SPOOLED // MIB,
    show_default=True,
    type=click.IntRange(min=1),
    help="MiB that a pipe may bring: all of it is put aside and checked first.",
)
@timeout_option
def restore(path: str, file: str, max_size: int, timeout: float) -> None:
    """Give the state in FILE to the device behind SOCKET, which runs on with it."""
    with ExitStack() as stack:
        with naming("stdin" if file == "-" else file):
            source = stack.enter_context(open_for_reading(file))
            saved = stack.enter_context(files.opened(source, max_size=max_size * MIB))
        client = stack.enter_context(connect(path, timeout))
        interrupts = stack.enter_context(Interrupts())
        with _telling(f"{path} is not restored from {file}"):
            files.load(client, saved, on_progress=interrupts.check)


@contextmanager
def _whole(file: str) -> Iterator[BinaryIO]:
    """Where to write what shall be in ``file`` whole or not at all."""
    path = Path(file)
    if file == "-":
        if os.isatty(STDOUT):
            raise UsageError("a device's state is nothing for a terminal: redirect stdout")
        with _poured(STDOUT, "stdout") as sink:
            yield sink
    elif is_special(path):
        with _poured(file, file) as sink:
            yield sink
    else:
        with replaced(path) as sink:
            yield sink


@contextmanager
def _poured(file: str | int, name: str) -> Iterator[BinaryIO]:
    """Where to write what shall go into a pipe or a device; what fails names it."""
    try:
        with naming(name), open(file, "wb", closefd=isinstance(file, str)) as sink, spooled(sink) as spool:
            yield spool
    except BrokenPipeError as error:  # of which click would tell nobody
        raise MigrationError(describe(error)) from error


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """What fails within is told with what it was to be."""
    try:
        yield
    except (VfioUserError, OSError) as error:
        raise MigrationError(f"{what}: {describe(error)}") from error


@click.command()
@click.argument("paths", metavar="SRC DST", nargs=-1, type=click.Path())
@click.option("--device", "devices", metavar="SRC:DST", multiple=True, help="One more device of the same guest.")
@click.option("--exec", "command", metavar="COMMAND", help="In place of DST, what runs vfio-user receive: ssh ...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False), help="The report as a page, with curves.")
@click.option(
    "--downtime",
    default=50,
    show_default=True,
    type=click.IntRange(min=0),
    help="Milliseconds that the switch-over may take.",
)
@click.option(
    "--max-rounds", default=30, show_default=True, type=click.IntRange(min=1), help="Rounds to come to that in."
)
@click.option("--force", is_flag=True, help="Switch over after that, however long it takes.")
@click.option("--bandwidth", metavar="MIB", type=click.IntRange(min=1), help="MiB per second to use at most.")
@timeout_option
def migrate(
    paths: tuple[str, ...],
    devices: tuple[str, ...],
    command: str | None,
    as_json: bool,
    html: str | None,
    timeout: float,
    **limits: Any,
) -> None:
    """Move the state of the device behind SRC to the one behind DST, which runs on with it; SRC stays stopped.

    What fails, Ctrl-C too, leaves SRC running as if nothing had been.
    """
    sources, destinations = _sides(paths, devices, remote=command is not None)
    report, verified = Report(), False
    try:
        with ExitStack() as stack:
            here = [stack.enter_context(connect(path, timeout)) for path in sources]
            there = [stack.enter_context(connect(path, timeout)) for path in destinations]
            remote = None if command is None else stack.enter_context(Remote(command, timeout))
            target = LocalDestination(there) if remote is None else _remote_destination(remote, timeout)
            interrupts = stack.enter_context(Interrupts())
            job = Migration(here, Stoppable(target, interrupts), **_engine_options(**limits))
            report = job.report
            follow(job, Console(stderr=True, quiet=as_json))
            verified = moved(here, there) and (remote is None or remote.wait() == 0)
    except (VfioUserError, OSError) as error:
        report.error = report.error or describe(error)
    except KeyboardInterrupt as error:
        report.error = report.error or str(error) or "interrupted"
    _show(report, verified, as_json=as_json)
    if html is not None:
        title = f"{' '.join(sources)} → {command or ' '.join(destinations)}"
        Path(html).write_text(report_html(report, title), encoding="utf-8")
    _raise_failure(report, verified)


def _sides(paths: Sequence[str], devices: Sequence[str], *, remote: bool) -> tuple[list[str], list[str]]:
    """The sockets of the sources and of the destinations."""
    each = 1 if remote else 2
    if len(paths) not in ({each, 0} if devices else {each}):
        raise click.UsageError("give SRC, and --exec for the other side" if remote else "give SRC and DST, or --exec")
    rows = [list(paths)] if paths else []
    for device in devices:
        rows.append(device.split(":"))
        if len(rows[-1]) != each or not all(rows[-1]):
            raise click.UsageError(f"--device {device}: write {'SRC' if remote else 'SRC:DST'}")
    return [row[0] for row in rows], [path for row in rows for path in row[1:]]


def _remote_destination(remote: Remote, timeout: float) -> RemoteDestination:
    return RemoteDestination(remote.pipe, timeout=timeout * CALLS_PER_ANSWER)


def _engine_options(downtime: int, max_rounds: int, force: bool, bandwidth: int | None) -> dict[str, Any]:
    return {
        "downtime": downtime / 1000,
        "max_rounds": max_rounds,
        "force": force,
        "bandwidth": float("inf") if bandwidth is None else float(bandwidth * MIB),
    }


def _show(report: Report, verified: bool, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_json() | {"verified": verified}))
    else:
        Console().print(render(report))


def _raise_failure(report: Report, verified: bool) -> None:
    if report.status is not Status.COMPLETED:
        raise MigrationError(f"{verdict(report)}: {clean(report.error or 'no reason')}")
    if not verified:
        raise MigrationError(
            f"it moved, but is not as it must be: {clean(report.error or 'see what info says of both')}"
        )


@click.command()
@click.argument("paths", metavar="DST...", nargs=-1, required=True, type=click.Path())
@timeout_option
def receive(paths: tuple[str, ...], timeout: float) -> None:
    """Be the other end of vfio-user migrate --exec, on stdin and stdout, for the devices behind DST."""
    if os.isatty(STDIN) or os.isatty(STDOUT):
        raise UsageError("a migration comes through stdin and stdout: this is for vfio-user migrate --exec")
    interrupts = Interrupts()
    with StoppablePipe(interrupts) as pipe, ExitStack() as stack:
        os.dup2(STDERR, STDOUT)  # whatever else is printed does not get between the records
        clients = [stack.enter_context(connect(path, timeout)) for path in paths]
        stack.enter_context(interrupts)
        destination = Stoppable(LocalDestination(clients), interrupts)
        receive_from(pipe, destination, timeout=timeout * CALLS_PER_ANSWER)
