"""``completion``: what a shell needs to complete command lines, and what there is to complete.

Commands say nothing of it: what a parameter is called in their help, its metavar, is what it is completed as.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from vfio_user.errors import UsageError

if TYPE_CHECKING:
    _Kind = click.ParamType[Any]
else:  # what not every click of ours can be asked for
    _Kind = click.ParamType

Completer = Callable[[click.Context, str], Iterator[str]]
"""What there is in a place like this; what does not begin as the word does is left out afterwards."""


class _Bash(BashComplete):
    """Leaves no space behind what goes on: KEY=, a folder."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", "COMPREPLY+=($value)\n            [[ $value != *[=/] ]] || compopt -o nospace"
    )


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "fish": FishComplete, "zsh": ZshComplete}


@click.command(epilog='Example: eval "$(vfio-user completion bash)"')
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print what SHELL is to read, from ~/.bashrc, say, to complete commands, devices, options and sockets."""
    from vfio_user.cli.main import PROGRAM, cli

    click.echo(SHELLS[shell](cli, {}, PROGRAM, _variable(PROGRAM)).source())


def _variable(program: str) -> str:
    """The environment variable by which click is asked to complete."""
    return f"_{program.replace('-', '_').upper()}_COMPLETE"


def complete_arguments(command: click.Command) -> None:
    """Have the parameters of ``command``, and of those within, complete."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            complete_arguments(each)
    for parameter in command.params:
        completer = COMPLETERS.get(_called(parameter))
        if completer is not None and not isinstance(parameter.type, _Completed):
            parameter.type = _Completed(parameter.type, completer)


def _called(parameter: click.Parameter) -> str:
    """DEVICE of ``DEVICE [OPTIONS]``, SOCKET of ``[SOCKET]...`` and the like."""
    words = (parameter.metavar or "").split()
    return words[0].strip("[].") if words else ""


class _Completed(_Kind):
    """The same as ``kind``, with completions."""

    def __init__(self, kind: _Kind, completer: Completer) -> None:
        self.name = kind.name
        self._kind = kind
        self._completer = completer

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._kind.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        with suppress(UsageError, OSError):  # nothing to offer
            return [CompletionItem(each) for each in self._completer(ctx, incomplete) if each.startswith(incomplete)]
        return []


def _sockets(ctx: click.Context, incomplete: str) -> Iterator[str]:
    """Sockets, and folders in which there may be some."""
    folder = os.path.dirname(incomplete)
    for entry in sorted(os.scandir(folder or "."), key=lambda entry: entry.name):
        path = os.path.join(folder, entry.name)
        if entry.is_dir():
            yield f"{path}/"
        elif stat.S_ISSOCK(entry.stat(follow_symlinks=True).st_mode):
            yield path


def _files(ctx: click.Context, incomplete: str) -> Iterator[str]:
    folder = os.path.dirname(incomplete)
    for entry in sorted(os.scandir(folder or "."), key=lambda entry: entry.name):
        yield os.path.join(folder, entry.name) + "/" * entry.is_dir()


def _devices(ctx: click.Context, incomplete: str) -> Iterator[str]:
    """Devices with a name; of a file, its classes that are devices."""
    from vfio_user.tools.load import device_names

    if "/" not in incomplete and not incomplete.startswith("."):
        yield from device_names()
        return
    source, found, _ = incomplete.partition(":")
    if found:
        yield from (f"{source}:{name}" for name in _classes(Path(source)))
    else:
        yield from (path for path in _files(ctx, incomplete) if path.endswith(("/", ".py")))


def _classes(path: Path) -> Iterator[str]:
    """Classes of a file, which is not run for that."""
    import ast

    with suppress(SyntaxError, ValueError):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.ClassDef):
                yield node.name


def _filters(ctx: click.Context, incomplete: str) -> Iterator[str]:
    from vfio_user.filters.catalogue import FILTERS

    yield from FILTERS


def _device_options(ctx: click.Context, incomplete: str) -> Iterator[str]:
    """``KEY=`` of each option of the device."""
    from vfio_user.tools.load import load_device

    if device := ctx.params.get("device"):
        yield from (f"{key}=" for key in load_device(device).declared_options)


COMPLETERS: dict[str, Completer] = {
    "DEVICE": _devices,
    "DST": _sockets,
    "KEY=VALUE": _device_options,
    "SOCKET": _sockets,
    "SPEC": _filters,
    "SRC": _sockets,
}
"""By what a parameter is called."""
