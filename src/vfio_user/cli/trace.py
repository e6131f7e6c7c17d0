"""``trace``: what a client and a server say to each other, message by message."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from vfio_user.cli.naming import naming
from vfio_user.cli.options import ANY_PATH
from vfio_user.errors import ProtocolError, UsageError
from vfio_user.filters.settings import parse_region
from vfio_user.tools.trace import (
    CaptureError,
    CaptureWriter,
    Choice,
    Ends,
    Manner,
    RegisterNames,
    Tracer,
    TraceSession,
    dissector_path,
    parse_command,
    read_capture,
)
from vfio_user.tools.trace.lines import Part, Style, plain
from vfio_user.wire.commands import Role

_COLOURS: dict[Style, dict[str, Any]] = {
    Style.TIME: {"dim": True},
    Style.ARROW: {"fg": "blue", "bold": True},
    Style.COMMAND: {"bold": True},
    Style.TARGET: {"fg": "cyan"},
    Style.PLAIN: {},
    Style.ERROR: {"fg": "red", "bold": True},
    Style.LATENCY: {"fg": "yellow"},
}
_MILLISECOND = 10**6


def _show_dissector(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(dissector_path())
        ctx.exit()


@click.command(epilog="Example: vfio-user trace --listen /tmp/seen.sock --connect /tmp/edu.sock --stats")
@click.option("--listen", metavar="PATH", type=click.Path(path_type=Path), help="Where clients come: made here.")
@click.option("--connect", metavar="PATH", type=click.Path(path_type=Path), help="Where the server is.")
@click.option("--run", metavar="COMMAND", help="Run a client with $VFIO_USER_SOCKET set, and end with it.")
@click.option("--run-server", metavar="COMMAND", help="Run a server that listens at $VFIO_USER_SOCKET.")
@click.option("--read", "read_from", metavar="FILE", type=ANY_PATH, help="Show a capture in place of all that.")
@click.option("--write", "write_to", metavar="FILE", type=ANY_PATH, help="Keep everything in a pcapng capture.")
@click.option("--command", "commands", metavar="NAME", multiple=True, help="Show such commands and their replies.")
@click.option("--region", "regions", metavar="REGION", multiple=True, help="Show what is about such regions.")
@click.option("--from", "sender", type=click.Choice([role.value for role in Role]), help="Show what that side sends.")
@click.option("--errors", is_flag=True, help="Show commands that were refused.")
@click.option("--slow", metavar="MS", type=click.FloatRange(min=0), help="Show commands that took so long or longer.")
@click.option("--hex", "hex_data", is_flag=True, help="Show all data.")
@click.option("--device", metavar="DEVICE", help="Whose registers these are; built-in devices are recognized.")
@click.option("--stats", is_flag=True, help="End with a table: count, bytes and latency per command.")
@click.option("--quiet", is_flag=True, help="Show no messages.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option(
    "--dissector",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_dissector,
    help="Print where the Wireshark dissector is.",
)
def trace(
    listen: Path | None,
    connect: Path | None,
    run: str | None,
    run_server: str | None,
    read_from: str | None,
    write_to: str | None,
    device: str | None,
    stats: bool,
    **shown: Any,
) -> None:
    """Pass on what a client and a server say, untouched, and show every message decoded."""
    tracer = _tracer(device, **shown)
    if read_from is not None:
        if any((listen, connect, run, run_server, write_to)):
            raise click.UsageError("--read shows a capture: there is nothing to pass on or to write")
        _show_capture(tracer, read_from, stats)
        return
    ends = Ends(listen, connect, run, run_server)
    with ExitStack() as stack:
        if write_to is not None:
            with naming(write_to):
                tracer.capture = stack.enter_context(closing(CaptureWriter(write_to)))
        session = stack.enter_context(TraceSession(ends, tracer))
        if run is None:
            click.echo(f"{session.listen_path} is passed on to {session.connect_path}", err=True)
        try:
            status = session.serve()
        finally:
            _show_figures(tracer, stats)
    if session.proxy.failure is not None:
        raise session.proxy.failure
    if tracer.complaints:
        raise ProtocolError(tracer.complaints[0])
    sys.exit(status)


def _tracer(
    device: str | None,
    commands: tuple[str, ...],
    regions: tuple[str, ...],
    sender: str | None,
    errors: bool,
    slow: float | None,
    hex_data: bool,
    quiet: bool,
    as_json: bool,
) -> Tracer:
    choice = Choice(
        commands=frozenset(map(parse_command, commands)),
        regions=frozenset(map(_region, regions)),
        sender=None if sender is None else Role(sender),
        errors=errors,
        slow=int((slow or 0) * _MILLISECOND),
    )
    return Tracer(_printer(as_json), choice, Manner(as_json, hex_data, quiet), _names(device))


def _region(text: str) -> int:
    try:
        return parse_region(text)
    except ValueError as error:
        raise UsageError(f"--region {text}: {error}") from None


def _names(device: str | None) -> RegisterNames:
    if device is None:
        return RegisterNames()
    from vfio_user.tools.load import make_device

    return RegisterNames(make_device(device))


def _printer(as_json: bool) -> Callable[[list[Part]], None]:
    """Prints a line at once: whoever reads it through a pipe is not kept waiting."""
    coloured = sys.stdout.isatty() and not as_json and not os.environ.get("NO_COLOR")

    def print_line(parts: list[Part]) -> None:
        line = " ".join(click.style(part.text, **_COLOURS[part.style]) for part in parts) if coloured else plain(parts)
        try:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it is flushed at exit
            raise

    return print_line


def _show_capture(tracer: Tracer, path: str, stats: bool) -> None:
    try:
        for message in read_capture(path):
            tracer.seen(message)
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from error
    finally:
        _show_figures(tracer, stats)


def _show_figures(tracer: Tracer, wanted: bool) -> None:
    if wanted:
        figures = tracer.figures
        click.echo(json.dumps({"stats": figures.as_json()}) if tracer.manner.as_json else figures.table())
