"""``qemu-save``: a QEMU guest is saved to a folder with its vfio-user devices."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vfio_user.cli.options import json_option, timeout_option
from vfio_user.cli.qemu import CALLS_PER_STEP, carry_out, need_qmp, served, tell_outcome, tell_plan
from vfio_user.tools.interrupts import Interrupts

if TYPE_CHECKING:
    from vfio_user.live.qemu import QemuSave


@click.command("qemu-save", epilog="Example: vfio-user qemu-save --from a.qmp --device a.ctl snapshot")
@click.argument("folder", metavar="FOLDER", type=click.Path(readable=False, path_type=Path))
@click.option("--from", "source", metavar="QMP", required=True, help="QMP socket of the QEMU whose guest to save.")
@click.option(
    "--device",
    "devices",
    metavar="CONTROL",
    multiple=True,
    required=True,
    help="Control socket of a device's server, as serve --control makes it: one for each device.",
)
@click.option("--quit", "end", is_flag=True, help="End the QEMU once all is saved, instead of letting the guest go on.")
@click.option("--dry-run", is_flag=True, help="Say what would be saved, and what stands against it; change nothing.")
@click.option("--recover", is_flag=True, help="After a qemu-save that was killed: have the guest go on.")
@json_option
@timeout_option
def qemu_save(
    folder: Path,
    source: str,
    devices: tuple[str, ...],
    end: bool,
    dry_run: bool,
    recover: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Save the guest of a QEMU, with its vfio-user devices, to a new FOLDER.

    The guest stands still meanwhile, and goes on whatever fails, Ctrl-C too. The QEMU is an 11.x, as it is. What is on
    disks is not saved.
    """
    need_qmp("qemu-save")
    from vfio_user.live.qemu import Monitor, QemuSave

    with ExitStack() as stack:
        job = QemuSave(
            stack.enter_context(Monitor("source", source, timeout)),
            served(stack, devices, "source", timeout),
            folder,
            end=end,
            timeout=CALLS_PER_STEP * timeout,
            check=stack.enter_context(Interrupts()).check,
        )
        if dry_run:
            _tell_plan(job, as_json)
        elif recover:
            job.recover()
            click.echo("the guest runs")
        else:
            carry_out(job, f"saving to {folder}", as_json=as_json)
            if not as_json:
                outcome = "has ended" if end else "goes on" if job.guest_runs else "is paused, as it was"
                tell_outcome(job.report, f"saved: the guest {outcome}")


def _tell_plan(job: QemuSave, as_json: bool) -> None:
    plan = job.plan()
    memory = plan.shape.memory if plan.shape else None
    devices = [(one.function.name, one.served.name) for one in plan.devices]
    tell_plan(devices, memory, plan.obstacles, as_json=as_json)
