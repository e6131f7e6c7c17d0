"""``qemu-restore``: a QEMU guest that was saved to a folder goes on in another QEMU."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from vfio_user.cli.options import ANY_PATH, json_option, timeout_option
from vfio_user.cli.qemu import CALLS_PER_STEP, carry_out, need_qmp, served, tell_outcome, tell_plan
from vfio_user.tools.interrupts import Interrupts


@click.command("qemu-restore", epilog="Example: vfio-user qemu-restore --to b.qmp --device b.ctl snapshot")
@click.argument("folder", metavar="FOLDER", type=click.Path(readable=False, path_type=Path))
@click.option("--to", "destination", metavar="QMP", required=True, help="QMP socket of the QEMU that waits for it.")
@click.option(
    "--device",
    "devices",
    metavar="CONTROL",
    multiple=True,
    required=True,
    help="Control socket of a device's server, as serve --control makes it: one for each device, in any order.",
)
@click.option(
    "--gdb",
    metavar="PATH",
    type=ANY_PATH,
    help="For devices with MSI-X, if QEMU cannot be given a socket: one that it makes and that is reached here, too.",
)
@click.option("--paused", is_flag=True, help="Do not let the guest go on: cont, by QMP, does.")
@click.option("--dry-run", is_flag=True, help="Read all of it and say what stands against it; change nothing.")
@json_option
@timeout_option
def qemu_restore(
    folder: Path,
    destination: str,
    devices: tuple[str, ...],
    gdb: str | None,
    paused: bool,
    dry_run: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Let the guest in FOLDER, which qemu-save has written, go on in a QEMU and with devices that are as new.

    The QEMU is an 11.x and waits with -incoming defer -S; it has the same machine and the same devices in the same
    places. FOLDER stays as it is. What fails before anything changes lets the QEMU wait on, later it ends.
    """
    need_qmp("qemu-restore")
    from vfio_user.live.qemu import Monitor, QemuRestore

    with ExitStack() as stack:
        job = QemuRestore(
            stack.enter_context(Monitor("destination", destination, timeout)),
            served(stack, devices, "destination", timeout),
            folder,
            gdb=gdb,
            paused=paused,
            timeout=CALLS_PER_STEP * timeout,
            check=stack.enter_context(Interrupts()).check,
        )
        if dry_run:
            plan = job.plan()
            placed = [(one.function.name, one.served.name) for one in plan.devices]
            tell_plan(placed, plan.memory, plan.obstacles, as_json=as_json)
            return
        carry_out(job, f"restoring {folder}", as_json=as_json)
        if not as_json:
            tell_outcome(job.report, f"restored: the guest {'goes on' if job.guest_runs else 'is paused'}")
