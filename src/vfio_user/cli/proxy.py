"""``proxy``: a control socket for a server that has none."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path

import click

from vfio_user.cli.options import seconds
from vfio_user.errors import UsageError
from vfio_user.server import Server
from vfio_user.tools.interrupts import END_SIGNALS
from vfio_user.tools.proxy import ProxyBackend
from vfio_user.tools.serving import raise_fd_limit

_PATH = click.Path(readable=False, path_type=Path)


@click.command(
    epilog="Example: vfio-user proxy /tmp/theirs.sock --socket-path /tmp/device.sock --control /tmp/device.ctl"
)
@click.argument("upstream", type=_PATH)
@click.option("--socket-path", metavar="PATH", type=_PATH, required=True, help="Where the VMM comes: made here.")
@click.option("--control", metavar="PATH", type=_PATH, required=True, help="The control socket: made here.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    type=float,
    callback=seconds,
    help="How long the server may take to answer.",
)
@click.option(
    "--max-write",
    metavar="BYTES",
    type=click.IntRange(min=1),
    help="Most data in one write, for a server that takes less than it says (libvfio-user: 32768).",
)
def proxy(upstream: Path, socket_path: Path, control: Path, timeout: float, max_write: int | None) -> None:
    """Stand between a VMM and the server at UPSTREAM, and give its device a control socket.

    Runs until SIGTERM. The server is connected to when a VMM comes, and left when that leaves.
    """
    if len({path.resolve() for path in (upstream, socket_path, control)}) < 3:
        raise UsageError("UPSTREAM, --socket-path and --control are three sockets")
    raise_fd_limit()
    backend = ProxyBackend(upstream, timeout=timeout, max_write=max_write)
    with closing(backend), Server(backend, socket_path, control=control) as server:
        numbers = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

        def end(*_: object) -> None:
            server.shutdown()
            for number in numbers:  # who insists does not wait for a server that hangs
                signal.signal(number, signal.default_int_handler)

        for number in numbers:
            signal.signal(number, end)
        click.echo(f"{upstream} is served at {socket_path}, managed at {control}")
        server.serve_forever()
