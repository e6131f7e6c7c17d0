"""``qemu-migrate``: a running QEMU guest moves with its vfio-user devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from vfio_user.cli.options import ANY_PATH, bandwidth_option, force_option, html_option, json_option, timeout_option
from vfio_user.cli.progress import render
from vfio_user.cli.qemu import CALLS_PER_STEP, control, need_qmp, tell_plan
from vfio_user.cli.reports import check_writable, show, write_page
from vfio_user.errors import MigrationError, UsageError, VfioUserError
from vfio_user.live.report import Status
from vfio_user.live.text import clean, round_line, verdict
from vfio_user.tools.interrupts import Interrupts

if TYPE_CHECKING:
    from vfio_user.live.qemu import DevicePair, QemuMigration

MIB = 1 << 20
_ADVICE = "; see whether its guest runs, then: vfio-user qemu-migrate --recover"


@click.command(
    "qemu-migrate",
    epilog="Example: vfio-user qemu-migrate --from a.qmp --to b.qmp --device a.ctl:b.ctl --uri tcp:127.0.0.1:4444",
)
@click.option("--from", "source", metavar="QMP", required=True, help="QMP socket of the QEMU whose guest is to move.")
@click.option("--to", "destination", metavar="QMP", required=True, help="That of the QEMU that waits for it.")
@click.option(
    "--device",
    "devices",
    metavar="SRC:DST",
    multiple=True,
    required=True,
    help="Control sockets of a device's servers, as serve --control makes them: one pair for each device.",
)
@click.option("--uri", metavar="URI", help="Where the memory goes, as both QEMUs reach it: tcp:HOST:PORT.")
@click.option(
    "--gdb",
    metavar="PATH",
    type=ANY_PATH,
    help="For devices with MSI-X on another host: a socket that its QEMU makes and that is reached here, too.",
)
@click.option("--shared-memory", is_flag=True, help="Both have their memory in the same file, which is not copied.")
@click.option("--cold", is_flag=True, help="Stop the guest first: for one with an IOMMU, and devices that do not log.")
@click.option("--dry-run", is_flag=True, help="Say what would move, and what stands against it; change nothing.")
@click.option("--recover", is_flag=True, help="After a qemu-migrate that was killed: have exactly one guest run.")
@click.option("--keep-source", is_flag=True, help="Do not end the source's QEMU, whose guest must never run again.")
@json_option
@html_option
@click.option(
    "--downtime",
    default=300,
    show_default=True,
    type=click.IntRange(min=0),
    help="Milliseconds for the rest of memory.",
)
@click.option(
    "--max-passes", default=30, show_default=True, type=click.IntRange(min=1), help="Over the memory, to come to that."
)
@force_option
@bandwidth_option
@timeout_option
def qemu_migrate(
    source: str,
    destination: str,
    devices: tuple[str, ...],
    dry_run: bool,
    recover: bool,
    as_json: bool,
    html: str | None,
    timeout: float,
    downtime: int,
    bandwidth: int | None,
    **wishes: Any,
) -> None:
    """Move the running guest of one QEMU to another one, with its vfio-user devices.

    Whatever fails, Ctrl-C too, leaves exactly one guest running. The QEMUs are 11.x, as they are; the second one waits
    with -incoming defer -S, and has the same machine and the same devices in the same places.
    """
    need_qmp("qemu-migrate")
    from vfio_user.live.qemu import AbsentError, EndedMonitor, Monitor, QemuMigration

    if recover and dry_run:
        raise UsageError("--recover and --dry-run exclude each other")

    def connected(role: str, path: str) -> Monitor:
        try:
            return Monitor(role, path, timeout)
        except AbsentError:
            if recover:
                return EndedMonitor(role)
            raise

    with ExitStack() as stack:
        job = QemuMigration(
            stack.enter_context(connected("source", source)),
            stack.enter_context(connected("destination", destination)),
            _pairs(stack, devices, timeout),
            downtime=downtime / 1000,
            bandwidth=None if bandwidth is None else bandwidth * MIB,
            timeout=CALLS_PER_STEP * timeout,
            check=stack.enter_context(Interrupts()).check,
            **wishes,
        )
        if dry_run:
            _tell_plan(job, as_json)
        elif recover:
            at_destination = job.recover() is Status.COMPLETED
            click.echo(f"the guest runs at the {'destination' if at_destination else 'source'}")
        else:
            _move(job, f"{source} → {destination}", as_json=as_json, html=html)


def _move(job: QemuMigration, title: str, *, as_json: bool, html: str | None) -> None:
    check_writable(html)
    report = job.report
    with suppress(VfioUserError, OSError, KeyboardInterrupt):  # the reason is in the report
        _follow(job, Console(stderr=True, quiet=as_json))
    show(json.dumps(report.as_json()) if as_json else render(report))
    write_page(html, report, title)
    if report.status is not Status.COMPLETED:
        advice = _ADVICE if report.status is Status.UNCONFIRMED else ""
        raise MigrationError(f"{verdict(report)}: {clean(report.error or 'no reason')}{advice}")


def _pairs(stack: ExitStack, devices: Sequence[str], timeout: float) -> list[DevicePair]:
    from vfio_user.live.qemu import DevicePair

    pairs = []
    for device in devices:
        paths = device.split(":")
        if len(paths) != 2 or not all(paths):
            raise click.UsageError(f"--device {device}: write SRC:DST")
        sides = zip(paths, ("source", "destination"), strict=True)
        pairs.append(DevicePair(device, *(stack.enter_context(control(*side, timeout)) for side in sides)))
    return pairs


def _tell_plan(job: QemuMigration, as_json: bool) -> None:
    plan = job.plan()
    devices = [(one.function.name, one.pair.name) for one in plan.devices]
    note = ", which is not copied" if job.shared_memory else ""
    tell_plan(devices, plan.memory, plan.obstacles, as_json=as_json, note=note)


def _follow(job: QemuMigration, console: Console) -> None:
    """A line for each pass over the memory; on a terminal also what is being done."""
    if console.quiet:
        list(job.run())
        return
    with console.status("looking whether it fits") as status:
        for done in job.run():
            console.out(round_line(done), highlight=False)
            status.update(f"{job.report.step}, pass {done.number + 1}")
