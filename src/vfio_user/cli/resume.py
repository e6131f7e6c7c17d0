"""``resume``: a device that a migration has left stopped runs again."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import click

from vfio_user.cli.naming import connect
from vfio_user.cli.options import ANY_PATH, timeout_option
from vfio_user.errors import UsageError
from vfio_user.tools.migrate import wake

_WARNING = "only when you know that nothing runs at the other side: see what vfio-user info says there"


@click.command(epilog="Example: vfio-user resume /tmp/edu.sock")
@click.argument("paths", metavar="SOCKET...", nargs=-1, required=True, type=ANY_PATH)
@click.option("--yes", is_flag=True, help="Do not ask: it is known that nothing runs at the other side.")
@click.option("--reset", is_flag=True, help="Reset those that have lost their state, which cannot run on otherwise.")
@timeout_option
def resume(paths: tuple[str, ...], yes: bool, reset: bool, timeout: float) -> None:
    """Let the devices behind SOCKET... run on, which a migration has left stopped: one whose end is not known.

    Only when it is known that the other side does not run: else both do.
    """
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(path, timeout)) for path in paths]
        if not yes:
            _ask()
        wake(clients, reset=reset)


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"{_WARNING}; then say --yes")
    click.confirm(f"Resume {_WARNING}. Resume?", abort=True)
