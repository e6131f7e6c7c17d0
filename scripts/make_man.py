#!/usr/bin/env python3
"""Write the man pages, from what the commands say of themselves with --help: into the package, or the folder given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from vfio_user import __version__
from vfio_user.cli.main import PROGRAM, cli

MAN = Path(__file__).parent.parent / "src/vfio_user/share/man"
SECTION = 1

EXIT_STATUS = (
    ("0", "Done."),
    ("1", "What was asked for failed; a line on stderr says why."),
    ("2", "Wrong usage."),
)
ENVIRONMENT = (
    ("NO_COLOR", "Whatever it is, unless empty: no colours."),
    ("LISTEN_PID, LISTEN_FDS", "Sockets that a service manager passes to serve."),
    ("NOTIFY_SOCKET", "Where serve says that it is ready, and that it stops."),
    ("VFIO_USER_QEMU, VFIO_USER_GUEST", "The QEMU and the Linux of guest, in place of those that it finds."),
)


def pages() -> dict[str, str]:
    """The man pages by the names of their files."""
    written = {}
    for context in _contexts(click.Context(cli, info_name=PROGRAM, **cli.context_settings)):
        name = _page_name(context)
        written[f"{name}.{SECTION}"] = "\n".join(_page(name, context)) + "\n"
    return written


def _contexts(context: click.Context) -> Iterator[click.Context]:
    """Of a command and those within."""
    yield context
    for command in _subcommands(context):
        yield from _contexts(click.Context(command, parent=context, info_name=command.name))


def _subcommands(context: click.Context) -> Iterator[click.Command]:
    group = context.command
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield command


def _page_name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(name: str, context: click.Context) -> Iterator[str]:
    command = context.command
    yield f'.TH "{_text(name.upper())}" {SECTION} "" "{PROGRAM} {__version__}" "User Commands"'
    yield ".nh\n.ad l"  # commands and options stay as they are typed
    first, *more = (command.help or "").split("\n\n")
    yield f".SH NAME\n{_text(name)} \\- {_text(' '.join(first.split()))}"
    yield f".SH SYNOPSIS\n.B {_text(context.command_path)}\n{_text(' '.join(command.collect_usage_pieces(context)))}"
    if more:
        yield ".SH DESCRIPTION"
        yield "\n.PP\n".join(_text(" ".join(paragraph.split())) for paragraph in more)
    yield from _list("OPTIONS", _options(context))
    yield from _list("COMMANDS", ((_page_name_below(context, one), _short(one)) for one in _subcommands(context)))
    if command.epilog:
        yield f".SH EXAMPLE\n.EX\n{_text(command.epilog.removeprefix('Example: '))}\n.EE"
    yield from _list("EXIT STATUS", iter(EXIT_STATUS))
    if context.parent is None:
        yield from _list("ENVIRONMENT", iter(ENVIRONMENT))
    else:
        yield f".SH SEE ALSO\n.BR {_text(_page_name(context.parent))} ({SECTION})"


def _options(context: click.Context) -> Iterator[tuple[str, str]]:
    for parameter in context.command.get_params(context):
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)) is not None:
            yield record


def _page_name_below(context: click.Context, command: click.Command) -> str:
    return f"{_page_name(context)}-{command.name}({SECTION})"


def _short(command: click.Command) -> str:
    return command.get_short_help_str(limit=200)


def _list(title: str, rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    for number, (term, meaning) in enumerate(rows):
        if number == 0:
            yield f".SH {title}"
        yield f".TP\n.B {_text(term)}\n{_text(meaning)}"


def _text(text: str) -> str:
    """Text that means itself: no line of it is a request, a hyphen can be copied as the minus that it is typed as."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    escaped = escaped.replace("~", "\\(ti").replace("^", "\\(ha").replace('"', "\\(dq")
    return f"\\&{escaped}" if escaped.startswith(".") else escaped


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MAN
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
