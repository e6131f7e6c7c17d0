"""The command's entry: which subcommands there are, and what its exit status means.

0: done. 1: what was asked failed, and one line on stderr says why. 2: wrong usage.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

import click

from vfio_user import __version__
from vfio_user.cli import logs
from vfio_user.devices import BUILT_IN
from vfio_user.errors import UsageError, VfioUserError, reason_of

COMMANDS = {
    "bench": "vfio_user.cli.bench:bench",
    "check": "vfio_user.cli.check:check",
    "completion": "vfio_user.cli.completion:completion",
    "demo": "vfio_user.cli.demo:demo",
    "guest": "vfio_user.cli.guest:guest",
    "info": "vfio_user.cli.inspect:info",
    "irq": "vfio_user.cli.irq:irq",
    "migrate": "vfio_user.cli.migrate:migrate",
    "proxy": "vfio_user.cli.proxy:proxy",
    "qemu-migrate": "vfio_user.cli.qemu_migrate:qemu_migrate",
    "qemu-restore": "vfio_user.cli.qemu_restore:qemu_restore",
    "qemu-save": "vfio_user.cli.qemu_save:qemu_save",
    "read": "vfio_user.cli.inspect:read",
    "receive": "vfio_user.cli.migrate:receive",
    "replay": "vfio_user.cli.replay:replay",
    "restore": "vfio_user.cli.migrate:restore",
    "resume": "vfio_user.cli.resume:resume",
    "save": "vfio_user.cli.migrate:save",
    "serve": "vfio_user.cli.serve:serve",
    "shell": "vfio_user.cli.shell:shell",
    "trace": "vfio_user.cli.trace:trace",
    "write": "vfio_user.cli.inspect:write",
}
"""Where each subcommand is: loaded when it is used, so that none pays for what another needs."""

PROGRAM = "vfio-user"


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        if ctx.resilient_parsing:  # as it is for completion
            from vfio_user.cli.completion import complete_arguments

            complete_arguments(command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line first
            raise click.Abort from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", count=True, help="Log more; twice: every refused command.")
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def cli(ctx: click.Context, verbose: int, log_json: bool) -> None:
    """Serve, look at and migrate PCI devices that speak vfio-user."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False  # commands inherit it; rich looks for itself
    logs.configure(verbose, log_json)


def main() -> NoReturn:
    """Run the command and exit with its status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that it has not is no reason to fail; stderr knows that
    sys.exit(_run())


def _arguments() -> list[str]:
    """The command line. ``vfio-user-edu`` is ``vfio-user serve edu``: a program for those who look backends up."""
    program = Path(sys.argv[0]).name
    device = program.removeprefix(f"{PROGRAM}-")
    return ["serve", device, *sys.argv[1:]] if device != program and device in BUILT_IN else sys.argv[1:]


def _run() -> int:
    try:
        cli(_arguments(), prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _fail("interrupted")
    except UsageError as error:
        return _fail(reason_of(error), 2)
    except (VfioUserError, OSError) as error:
        return _fail(reason_of(error))
    return 0


def _fail(reason: str, status: int = 1) -> int:
    from vfio_user.live.text import clean  # some of it may be a peer's

    print(f"{PROGRAM}: {clean(reason)}", file=sys.stderr)
    return status
