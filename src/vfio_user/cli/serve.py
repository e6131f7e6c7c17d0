"""``serve``: a device behind a socket, after the specification's Backend Program Conventions."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import click

from vfio_user.cli.reasons import naming
from vfio_user.device import Device
from vfio_user.server import Server
from vfio_user.tools.load import make_device

MICROSECOND = 1e-6


@click.command()
@click.argument("device")
@click.option("--socket-path", metavar="PATH", type=click.Path(), help="Listen on a UNIX socket that is made here.")
@click.option("--fd", metavar="N", type=click.IntRange(min=0), help="Use an inherited socket, listening or connected.")
@click.option("-o", "options", metavar="KEY=VALUE", multiple=True, help="An option of the device.")
@click.option(
    "--spin",
    metavar="US",
    default=0,
    type=click.IntRange(min=0),
    help="Microseconds to look for the next message before sleeping: lower latency for a busy core.",
)
def serve(device: str, socket_path: str | None, fd: int | None, options: tuple[str, ...], spin: int) -> None:
    """Serve DEVICE until SIGTERM: a built-in name, pkg.mod:Class or ./file.py:Class."""
    if (socket_path is None) == (fd is None):
        raise click.UsageError("give one of --socket-path and --fd")
    backend = make_device(device, options)
    _raise_fd_limit()
    with naming(f"--fd {fd}" if socket_path is None else socket_path):
        server = Server(backend, socket_path, fd=fd, spin=spin * MICROSECOND)
    with server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.shutdown())
        if socket_path is not None:
            click.echo("\n".join(how_to_plug(backend, Path(socket_path).absolute())))
        server.serve_forever()


def how_to_plug(device: Device, path: Path) -> list[str]:
    """The lines that plug a device into a VMM."""
    driver = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(path)}}
    return [
        f"{type(device).__name__} {device.vendor_id:04x}:{device.device_id:04x} is served at {path}",
        "QEMU:             -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \\",
        f"                  -device '{json.dumps(driver)}'",
        f"Cloud Hypervisor: --memory size=1G,shared=on --user-device socket={path}",
    ]


def _raise_fd_limit() -> None:
    """Every eventfd of a client and every mapped file takes a descriptor: take as many as there are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
