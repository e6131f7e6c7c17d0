"""``shell``: Python, with a device at hand."""

from __future__ import annotations

import ast
import pydoc
import rlcompleter
import sys
import traceback
from code import InteractiveConsole
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

import vfio_user
from vfio_user.cli.inspect import registers_of
from vfio_user.cli.naming import connect
from vfio_user.cli.options import device_option, socket_argument, timeout_option
from vfio_user.errors import UsageError, VfioUserError, reason_of
from vfio_user.tools.info_text import describe
from vfio_user.tools.session import Session

MAX_PROGRAM = 1 << 20
"""Characters."""
_HELP = """\
c                          the client: c.region_read(0, 0x10, 4), c.dma_map(...), c.migration_get_state(), ...
read("config.command")     a register as a number; read("bar0+0x4:u32"), and of a range the bytes: read("config+0..")
write("bar0+0x4", 0x1234)  a number, or bytes
dump("config+0..0x40")     a range in lines; dump("bar0+0..0x20:u32") by accesses of 4 bytes
info()                     what the device is
regs("msi")                registers with a name that begins like this
irq.watch("msi")           eventfds for vectors: "intx", "msix:0-3"
irq.wait(1, seconds=1.0)   the signals of those
irq.trigger("msi:0")       and irq.mask, irq.unmask
vfio_user                  the package: vfio_user.DeviceState.STOP_COPY
help(c.region_read)        what Python says of it. Ctrl-D ends."""


@click.command(epilog="Example: echo 'read(\"config.vendor_id\")' | vfio-user shell /tmp/edu.sock")
@socket_argument
@device_option
@timeout_option
def shell(path: str, device: str | None, timeout: float) -> None:
    """Open a Python session with a client at hand, c, and read, write, dump, info, regs, irq; help() says more.

    Names of registers and regions are completed within quotes. A program on standard input is run as if it had been
    typed in: values of expressions are shown. It ends with what fails, and exit status 1.
    """
    program = None if sys.stdin.isatty() else _read_program()
    with connect(path, timeout) as client, Session(client, registers_of(client, device)) as session, _numbers_in_hex():
        names = namespace(session)
        if program is None:
            _talk(names, session)
        else:
            _run(names, program)


def _read_program() -> str:
    """All of standard input, before a device is held for it."""
    program = sys.stdin.read(MAX_PROGRAM + 1)
    if len(program) > MAX_PROGRAM:
        raise UsageError(f"a program of more than {MAX_PROGRAM >> 20} MiB on standard input")
    return program


def namespace(session: Session) -> dict[str, Any]:
    """What is at hand, by name."""

    def dump(place: str) -> None:
        for line in session.dump(place):
            click.echo(line)

    def info() -> None:
        click.echo("\n".join(describe(session.info())))

    def regs(begin: str = "") -> list[str]:
        return [name for name in session.registers.names() if name.startswith(begin)]

    def help(*what: object) -> None:
        if what:
            pydoc.help(*what)
        else:
            click.echo(_HELP)

    own: list[Callable[..., object]] = [session.read, session.write, dump, info, regs, help]
    return {
        "__name__": "__console__",
        "__doc__": None,
        "c": session.client,
        "irq": session.irq,
        "vfio_user": vfio_user,
        **{one.__name__: one for one in own},
    }


@contextmanager
def _numbers_in_hex() -> Iterator[None]:
    """Meanwhile an expression's value is shown as registers are written, if it is a number."""

    def show(value: object) -> None:
        if type(value) is int:
            click.echo(f"{value:#x} ({value})")
        elif value is not None:
            click.echo(repr(value))

    before, sys.displayhook = sys.displayhook, show
    try:
        yield
    finally:
        sys.displayhook = before


class _Console(InteractiveConsole):
    """Says in one line why a call failed."""

    def showtraceback(self) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, (VfioUserError, OSError)):
            self.write(f"{type(error).__name__}: {reason_of(error)}\n")
        else:
            super().showtraceback()


def _talk(names: dict[str, Any], session: Session) -> None:
    with suppress(ImportError):
        import readline

        completer = Completer(names, session.places, readline.get_line_buffer)
        readline.set_completer_delims(" \t\n\"'`=()[]{},;")
        readline.set_completer(completer.complete)
        readline.parse_and_bind("tab: complete")
    region = session.client.regions[7] if len(session.client.regions) > 7 else None
    what = f"{region.size} bytes of config space, " if region else ""
    _Console(names).interact(
        f"Connected: {what}{len(session.client.regions)} regions. help() lists what is at hand.", ""
    )


class Completer:
    """Completes places within quotes, and Python elsewhere. ``line()``: the line so far."""

    def __init__(self, names: dict[str, Any], places: Callable[[], list[str]], line: Callable[[], str]) -> None:
        self._python = rlcompleter.Completer(names)
        self._places = places
        self._line = line

    def complete(self, text: str, state: int) -> str | None:
        """The candidate number ``state`` for ``text``, as readline asks for them; None behind the last."""
        line = self._line()
        if line.count('"') % 2 or line.count("'") % 2:
            found = [place for place in self._places() if place.startswith(text)]
            return found[state] if state < len(found) else None
        return self._python.complete(text, state)


def _run(names: dict[str, Any], program: str) -> None:
    """Statement by statement, so that values are shown. What calls of the device raise goes on from here."""
    try:
        for statement in ast.parse(program, "<stdin>").body:
            exec(compile(ast.Interactive([statement]), "<stdin>", "single"), names)
    except (VfioUserError, OSError, SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        frames = error.__traceback__ if not isinstance(error, SyntaxError) else None
        traceback.print_exception(error.with_traceback(frames.tb_next if frames else None))  # not of this function
        raise SystemExit(1) from None
