"""What the commands that manage a running QEMU have in common: peers, plans, how it went."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vfio_user.cli.naming import naming
from vfio_user.cli.reports import show
from vfio_user.errors import CallTimeoutError, ConnectionClosedError, MigrationError, NegotiationError, reason_of
from vfio_user.live.text import clean, duration, size

if TYPE_CHECKING:
    from vfio_user.live.qemu import NamedControl, QemuRestore, QemuSave, ServedDevice, SnapshotReport

CALLS_PER_STEP = 6
"""What takes as long as that many answers may: a QEMU that loads its machine, a device its state."""


def need_qmp(command: str) -> None:
    """Say what to install where QEMU's library is missing; and have it say nothing itself."""
    if find_spec("qemu") is None or find_spec("qemu.qmp") is None:
        raise click.ClickException(f"{command} needs qemu.qmp: pip install 'vfio-user[qemu]'")
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # what it has to say is in the errors that it raises


def control(path: str, role: str, timeout: float) -> NamedControl:
    """A connection to a control socket; errors name it, and the side that it is of."""
    from vfio_user.live.qemu import NamedControl

    with naming(path):
        try:
            client = NamedControl.connect(path, timeout)
        except ConnectionClosedError as error:
            raise MigrationError(f"{path}: it hangs up: is a server behind it?") from error
        except (NegotiationError, CallTimeoutError) as error:
            raise MigrationError(f"{path} is no control socket, as serve --control makes it: {error}") from error
    client.name = f"the {role}'s {path}"
    return client


def served(stack: ExitStack, paths: Sequence[str], role: str, timeout: float) -> list[ServedDevice]:
    """The devices of one side, behind control sockets."""
    from vfio_user.live.qemu import ServedDevice

    return [ServedDevice(path, stack.enter_context(control(path, role, timeout))) for path in paths]


def tell_plan(
    devices: Sequence[tuple[str, str]], memory: int | None, obstacles: Sequence[str], *, as_json: bool, note: str = ""
) -> None:
    """What a dry run says: the devices by their places and control sockets, bytes of memory, what stands against it.

    Raises MigrationError where something does.
    """
    if as_json:
        named = [{"place": place, "control": name} for place, name in devices]
        click.echo(json.dumps({"devices": named, "memory_bytes": memory, "obstacles": list(obstacles)}))
    else:
        for place, name in devices:
            click.echo(f"device {place}: {name}")
        click.echo(f"memory: {'unknown' if memory is None else f'{memory >> 20} MiB{note}'}")
        for obstacle in obstacles:
            click.echo(f"against it: {clean(obstacle)}")
    if obstacles:
        raise MigrationError("it would be refused, and nothing would change")
    if not as_json:
        click.echo("nothing stands against it")


def carry_out(job: QemuSave | QemuRestore, doing: str, *, as_json: bool) -> None:
    """Run it, and tell on the terminal what is being done; with ``as_json`` print its report, however it goes.

    Raises MigrationError for Ctrl-C, too, with what became of the way back.
    """
    try:
        with Console(stderr=True, quiet=as_json).status(Text(doing)):
            job.run()
    except KeyboardInterrupt as error:
        job.report.error = job.report.error or reason_of(error)
        raise MigrationError(job.report.error) from error
    finally:
        if as_json:
            show(json.dumps(job.report.as_json()))


def tell_outcome(report: SnapshotReport, title: str) -> None:
    """How saving or restoring went, if it went well."""
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("memory", size(report.memory_bytes)),
        ("device state", size(report.device_state_bytes)),
        *([("downtime", duration(report.downtime))] if report.downtime else []),
        *((f"  {cause}", duration(seconds)) for cause, seconds in report.causes.items()),
        ("total", duration(report.total)),
    ):
        grid.add_row(name, Text(value))
    show(Panel(grid, title=Text(title), border_style="green", expand=False))
