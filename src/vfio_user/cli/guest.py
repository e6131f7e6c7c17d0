"""``guest``: a small Linux with devices plugged in, to try them from the other side."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from vfio_user.errors import UsageError
from vfio_user.testing.linux import LinuxMachine, find_guest
from vfio_user.testing.qemu import QemuError, find_qemu
from vfio_user.testing.workbench import workbench
from vfio_user.tools.running import SOCKETS_VARIABLE

FETCH = (
    "scripts/fetch_qemu.py --guest (of the sources) fetches both into .qemu, which is looked for here and above;"
    " $VFIO_USER_QEMU and $VFIO_USER_GUEST name others"
)


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: vfio-user guest --socket /tmp/edu.sock bar0 w32:0x4=5 r32:0x4",
)
@click.option(
    "--socket",
    "sockets",
    metavar="PATH",
    multiple=True,
    help=f"A device to plug in; by default those in ${SOCKETS_VARIABLE}, which serve --run sets.",
)
@click.option("--iommu", is_flag=True, help="Behind an emulated IOMMU: vfio-pci can drive the devices then.")
@click.option("--module", "modules", metavar="NAME", multiple=True, help="A driver of Linux to load: nvme, say.")
@click.argument("command", nargs=-1)
def guest(sockets: tuple[str, ...], iommu: bool, modules: tuple[str, ...], command: tuple[str, ...]) -> None:
    """Boot Linux in QEMU with devices plugged in, and run COMMAND in it, or lines from standard input.

    A single word is a line for the shell; each line has a shell of its own. In the guest, "bar0 w32:0x4=5 r32:0x0"
    accesses the first device's BAR 0, "config" its config space; behind an IOMMU "drive" takes interrupts and does DMA.
    """
    sockets = sockets or tuple(os.environ.get(SOCKETS_VARIABLE, "").splitlines())
    if not sockets:
        raise UsageError("no device: give --socket, or run this by serve --run")
    for path in sockets:
        if not Path(path).is_socket():
            raise UsageError(f"{path}: no socket is there")
    qemu, linux = find_qemu(), find_guest()
    if qemu is None or linux is None:
        raise QemuError(f"no {'guest' if qemu else 'QEMU with vfio-user-pci'} here: {FETCH}")
    try:
        with workbench(qemu, linux, sockets, iommu=iommu, modules=modules) as machine:
            _work(machine, command[0] if len(command) == 1 else shlex.join(command))
    except QemuError as error:  # with the end of the guest's console: more than a line
        raise click.ClickException(str(error)) from error


def _work(machine: LinuxMachine, command: str) -> None:
    if command:
        _run(machine, command)
        return
    failed = False
    for line in _lines(machine):
        try:
            _run(machine, line)
        except click.ClickException as error:
            error.show()
            failed = True
    if failed and not sys.stdin.isatty():
        raise click.ClickException("a line failed")


def _run(machine: LinuxMachine, command: str) -> None:
    status, output = machine.execute(command, timeout=3600)
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()
    if status:
        raise click.ClickException(f"in the guest: exit status {status}")


def _lines(machine: LinuxMachine) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline

    readline.set_auto_history(True)
    click.echo(f"Linux is up; devices: {', '.join(machine.addresses)}. Ctrl-D ends it.", err=True)
    while True:
        try:
            yield input("guest# ")
        except EOFError:
            return
