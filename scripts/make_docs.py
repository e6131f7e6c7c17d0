#!/usr/bin/env python3
"""Write the pages of the manual that are tables of the code: the commands, and the migration states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vfio_user.errors import TransitionError
from vfio_user.migration.states import ARCS, path, states
from vfio_user.wire.commands import COMMANDS, CommandSpec, Tail
from vfio_user.wire.constants import HEADER_SIZE, DeviceState, MigrationFlags
from vfio_user.wire.messages import Payload

DOCS = Path(__file__).parent.parent / "docs"

TAILS = {
    Tail.NONE: "",
    Tail.EXTENSIBLE: "",
    Tail.DATA: " + data",
    Tail.VARIABLE: " + …",
}


def commands() -> Iterator[str]:
    yield "# Commands on the wire"
    yield ""
    yield "Written by `scripts/make_docs.py` from the table that decoder and checks read, `vfio_user.wire.commands`."
    yield ""
    yield f"Every message begins with a header of {HEADER_SIZE} bytes: id u16, command u16, size u32 (header included),"
    yield "flags u32 (0 command, 1 reply, 0x10 no reply wanted, 0x20 error), errno u32. Sizes below are payloads; an"
    yield "error reply is a header alone."
    yield ""
    yield "| # | command | sent by | request | reply | fds there / back | posted | quiesces DMA |"
    yield "|---|---|---|---|---|---|---|---|"
    yield from map(_row, COMMANDS.values())


def _row(row: CommandSpec) -> str:
    cells = (
        str(int(row.command)),
        row.command.name,
        row.sender.value,
        _payload(row.request, row.request_tail),
        _payload(row.reply, row.reply_tail),
        f"{row.request_fds} / {row.reply_fds}",
        "yes" if row.posted else "",
        "yes" if row.quiesces else "",
    )
    return f"| {' | '.join(cells)} |"


def _payload(kind: type[Payload], tail: Tail) -> str:
    size = kind.LAYOUT.size
    return f"{kind.__name__}, {size}{TAILS[tail]}" if size else "none"


def migration_states() -> Iterator[str]:
    flags = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
    yield "# Migration states"
    yield ""
    yield "Written by `scripts/make_docs.py` from the arcs in `vfio_user.migration.states`. A device that lacks P2P or"
    yield "PRE_COPY lacks the arcs that need it; without P2P, RUNNING and STOP are joined directly."
    yield ""
    yield "```mermaid"
    yield "stateDiagram-v2"
    for arc in ARCS:
        if arc.exists(flags):
            yield f"    {arc.source.name} --> {arc.target.name}"
    yield "```"
    yield ""
    for some in (flags, MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY, MigrationFlags.STOP_COPY):
        yield from _paths(some)


def _paths(flags: MigrationFlags) -> Iterator[str]:
    """Which states a request passes: rows from, columns to."""
    names = [state for state in DeviceState if state in states(flags) and state != DeviceState.ERROR]
    yield f"## {' '.join(str(flag.name) for flag in flags)}"
    yield ""
    yield f"| from \\ to | {' | '.join(state.name for state in names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for source in names:
        yield f"| {source.name} | {' | '.join(_hops(source, target, flags) for target in names)} |"
    yield ""


def _hops(source: DeviceState, target: DeviceState, flags: MigrationFlags) -> str:
    try:
        hops = path(source, target, flags)
    except TransitionError:
        return "refused"
    return ", ".join(state.name for state in hops) or "="


PAGES = {"wire-commands.md": commands, "migration-states.md": migration_states}


def main() -> None:
    for name, lines in PAGES.items():
        (DOCS / name).write_text("\n".join(lines()).rstrip() + "\n")


if __name__ == "__main__":
    main()
