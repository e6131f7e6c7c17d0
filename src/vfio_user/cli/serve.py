"""``serve``: devices behind sockets, after the specification's Backend Program Conventions."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from vfio_user.cli import logs
from vfio_user.cli.options import ANY_PATH
from vfio_user.device import Device
from vfio_user.tools.activation import inherited_sockets, placed
from vfio_user.tools.load import parse_pairs
from vfio_user.tools.notify import Notifier
from vfio_user.tools.serving import MICROSECOND, DeviceSpec, Service, raise_fd_limit

SEPARATOR = "--"


class _ServeCommand(click.Command):
    """Takes its command line part by part, a device each; what the parts say becomes the parameter ``parts``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            return super().parse_args(ctx, _so_far(args))
        parts = []
        for part in _split(args):
            with click.Context(self, parent=ctx.parent, info_name=ctx.info_name) as context:
                super().parse_args(context, part)
            parts.append(context.params)
        ctx.params = {"parts": parts}
        return []

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from vfio_user.filters import filter_help
        from vfio_user.tools.describe import summary
        from vfio_user.tools.load import device_names

        super().format_epilog(ctx, formatter)
        with formatter.section("Devices"):
            formatter.write_dl([(name, summary(name)) for name in device_names()])
        with formatter.section("Filters"):
            formatter.write("".join(f"  {line}\n" for line in filter_help().splitlines()))


def _split(arguments: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for argument in arguments:
        if argument == SEPARATOR:
            yield part
            part = []
        else:
            part.append(argument)
    yield part


def _so_far(arguments: Sequence[str]) -> list[str]:
    """Of a command line that is to be completed, the last part, without an option whose value is what is missing."""
    *_, part = _split(arguments)
    return part[:-1] if part and part[-1].startswith("-") else part


@click.command(
    cls=_ServeCommand,
    options_metavar="",
    epilog="Example: vfio-user serve edu --socket-path /tmp/edu.sock -o dma_mask=0xfffffff",
)
@click.argument("device", required=False, metavar="DEVICE [OPTIONS] [-- DEVICE [OPTIONS]]...")
@click.option("--socket-path", metavar="PATH", type=ANY_PATH, help="Listen on a UNIX socket that is made here.")
@click.option("--fd", metavar="N", type=click.IntRange(min=0), help="Use an inherited socket, listening or connected.")
@click.option(
    "--control",
    metavar="PATH",
    type=ANY_PATH,
    help="Make a second socket there, to manage the device by.",
)
@click.option("-o", "options", metavar="KEY=VALUE", multiple=True, help="An option of the device.")
@click.option("--filter", "filters", metavar="SPEC", multiple=True, help="A filter around it; the first is outermost.")
@click.option(
    "--spin",
    metavar="US",
    type=click.IntRange(min=0),
    help="Microseconds to look for the next message before sleeping: lower latency for a busy core. By default what "
    "the device asks for.",
)
@click.option(
    "--config", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help="Serve the devices of a TOML file."
)
@click.option("--run", metavar="COMMAND", help="Run a shell command with $VFIO_USER_SOCKET set, and end with it.")
@click.option("-h", "--help", "wants_help", is_flag=True, help="Show this, or with a DEVICE what that is.")
def serve(parts: list[dict[str, Any]]) -> None:
    """Serve DEVICE until SIGTERM: a name, pkg.mod:Class or ./file.py:Class.

    More devices follow behind "--", each with options of its own.
    """
    for part in parts:
        if part["wants_help"]:
            click.echo(_help(part))
            return
    specs, command = placed(_specs(parts), inherited_sockets()), _only(parts, "run")
    notify = Notifier.of_environment()
    with ExitStack() as stack:
        if command is not None:
            from vfio_user.tools.running import Command, private_sockets

            specs = stack.enter_context(private_sockets(specs))
        fd_limit = raise_fd_limit()
        service = stack.enter_context(Service(specs, _print_report, handle_signals=True, notify=notify))
        _show_traces(service)
        stack.enter_context(_activity_shown(service))
        stack.callback(lambda: _print_report(service.report()))
        if command is None:
            _say_how_to_plug(service)
            service.serve()
            return
        running = stack.enter_context(Command(command, service.socket_paths, fd_limit))
        service.serve(running)
    sys.exit(running.status)


def _specs(parts: list[dict[str, Any]]) -> list[DeviceSpec]:
    config = _only(parts, "config")
    if config is None:
        return [_spec(part, f"device {number}" if len(parts) > 1 else "") for number, part in enumerate(parts, 1)]
    if len(parts) > 1 or any(
        parts[0][key] for key in ("device", "socket_path", "control", "options", "filters", "spin")
    ):
        raise click.UsageError("--config takes the place of all devices and their options")
    from vfio_user.tools.configuration import read_configuration

    return read_configuration(Path(config))


def _spec(part: dict[str, Any], origin: str) -> DeviceSpec:
    if part["device"] is None:
        raise click.UsageError(f"{origin or 'DEVICE'} is missing")
    return DeviceSpec(
        device=part["device"],
        socket_path=None if part["socket_path"] is None else Path(part["socket_path"]),
        fd=part["fd"],
        options=parse_pairs(part["options"]),
        filters=part["filters"],
        spin=None if part["spin"] is None else part["spin"] * MICROSECOND,
        origin=origin,
        control=None if part["control"] is None else Path(part["control"]),
    )


def _only(parts: list[dict[str, Any]], name: str) -> str | None:
    """An option that is of no device in particular: wherever it is, but once."""
    given = [part[name] for part in parts if part[name] is not None]
    if len(given) > 1:
        raise click.UsageError(f"--{name} is given twice")
    return given[0] if given else None


def _help(part: dict[str, Any]) -> str:
    if part["device"] is None:
        return click.get_current_context().get_help()
    from vfio_user.tools.describe import facts, option_rows, title

    name, options = part["device"], parse_pairs(part["options"])
    formatter = click.HelpFormatter()
    formatter.write_text(f"{name}: {title(name)}")
    with formatter.section("What it is"):
        formatter.write_dl(facts(name, options))
    with formatter.section("Options (-o)"):
        formatter.write_dl(option_rows(name) or [("none", "")])
    return formatter.getvalue().rstrip()


def _print_report(report: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it: no reason to end what others use
        click.echo(report, err=True, nl=bool(report))


def _show_traces(service: Service) -> None:
    """What a trace filter logs is what was asked for, however little else is to be logged."""
    if not any(one.name == "trace" for built in service.devices for one in built.filters):
        return
    from vfio_user.filters.trace import LOGGER

    logs.show(LOGGER)


@contextlib.contextmanager
def _activity_shown(service: Service) -> Iterator[None]:
    """On a terminal, a line a second for each device whose statistics were asked for and that has something to say."""
    counted = [one for one in service.devices if any(filter.name == "stats" for filter in one.filters)]
    if not counted or not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(1.0):
            for built in counted:
                if line := built.device.activity():
                    click.echo(f"{type(built.device).__name__}: {line}", err=True)

    thread = threading.Thread(target=show, name="vfio-user activity", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _say_how_to_plug(service: Service) -> None:
    for built in service.devices:
        if built.spec.socket_path is not None:
            click.echo("\n".join(how_to_plug(built.device, built.spec.socket_path.absolute())))


def how_to_plug(device: Device, path: Path) -> list[str]:
    """The lines that plug a device into a VMM."""
    driver = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(path)}}
    return [
        f"{type(device).__name__} {device.vendor_id:04x}:{device.device_id:04x} is served at {path}",
        "QEMU:             -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \\",
        f"                  -device '{json.dumps(driver)}'",
        f"Cloud Hypervisor: --memory size=1G,shared=on --user-device socket={path}",
    ]
