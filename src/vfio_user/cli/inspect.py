"""``info``, ``read`` and ``write``: a look at what is behind a socket, or in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import click

from vfio_user.cli.naming import connect, naming
from vfio_user.cli.options import ANY_PATH, device_option, json_option, socket_argument, timeout_option
from vfio_user.client import Client
from vfio_user.errors import StreamError, UsageError
from vfio_user.tools.dump import lines, read_pieces, write_from, write_number
from vfio_user.tools.info import gather, read_config
from vfio_user.tools.info_text import describe
from vfio_user.tools.load import make_device
from vfio_user.tools.location import (
    Extent,
    Location,
    Name,
    Place,
    check_fits,
    parse_assignment,
    parse_place,
    region_name,
)
from vfio_user.tools.registers import Registers


def open_for_reading(path: str) -> BinaryIO:
    """The file at ``path``; "-" is stdin, which is left open."""
    return open(0, "rb", closefd=False) if path == "-" else open(path, "rb")


@click.command(epilog="Example: vfio-user info /tmp/edu.sock")
@click.argument("path", metavar="SOCKET|FILE", type=ANY_PATH)
@json_option
@timeout_option
def info(path: str, as_json: bool, timeout: float) -> None:
    """Show what is behind SOCKET: version, regions, interrupts, PCI identity, migration.

    Of a FILE that vfio-user save wrote, "-" for stdin: whose state it is, and whether it is sound.
    """
    if path == "-" or (Path(path).exists() and not Path(path).is_socket()):
        _info_of_file(path, as_json)
        return
    with connect(path, timeout) as client:
        facts = gather(client)
    click.echo(json.dumps(facts) if as_json else "\n".join(describe(facts)))


def _info_of_file(path: str, as_json: bool) -> None:
    from vfio_user.tools.saved import describe_saved

    with naming("stdin" if path == "-" else path), open_for_reading(path) as file:
        facts = describe_saved(file)
    click.echo(json.dumps(facts) if as_json else "\n".join(_describe_saved(facts)))
    if facts["error"]:
        raise StreamError(f"{path}: {facts['error']}")


def _describe_saved(facts: dict[str, Any]) -> list[str]:
    device = facts["device"]
    return [
        f"saved       format {facts['format']}, by version {facts['package']}",
        f"device      {device['identity']}",
        *(f"region      {name:<7}{size:>#12x}" for name, size in device["regions"].items()),
        *(f"irq         {name:<7}{count:>12}" for name, count in device["irqs"].items()),
        f"migration   {' '.join(device['migration'])}",
        f"data        {facts['data_bytes']} bytes, {facts['error'] or 'checksums right'}",
    ]


def registers_of(client: Client, device: str | None) -> Registers:
    """The registers that have names. Raises UsageError for a device that cannot be made."""
    return Registers(read_config(client), None if device is None else make_device(device))


def _registers(client: Client, device: str | None) -> Callable[[], Registers]:
    """They are asked for as soon as there is a name to be looked up, or a device to be looked for."""
    registers = cache(lambda: registers_of(client, device))
    if device is not None:
        registers()
    return registers


def resolve(place: Place, registers: Callable[[], Registers]) -> Location | Extent:
    """Where a place is; only for a name the registers are asked for."""
    return registers().find(place) if isinstance(place, Name) else place


@click.command(
    epilog="Example: vfio-user read /tmp/edu.sock config.command bar0.factorial bar0+0x10:u64 config+0..0x40"
)
@socket_argument
@click.argument("places", metavar="PLACE...", nargs=-1, required=True)
@click.option("--output", metavar="FILE", type=ANY_PATH, help='Write the bytes there instead; "-" is stdout.')
@json_option
@device_option
@timeout_option
def read(
    path: str, places: tuple[str, ...], output: str | None, as_json: bool, device: str | None, timeout: float
) -> None:
    """Read registers and ranges.

    PLACE is REGION+OFFSET:WIDTH, as bar0+0x10:u32, with a REGION of bar0 to bar5, rom, config or an index and a WIDTH
    of u8, u16, u32 or u64; a register's name, as config.command or msix.control; or a range, as bar0+0x10..0x40, which
    ends before 0x40, and at the region's end without a number.
    """
    if output is not None and as_json:
        raise UsageError("--output and --json exclude each other")
    parsed = [parse_place(text) for text in places]
    with connect(path, timeout) as client:
        registers = _registers(client, device)
        pairs = [(place, resolve(place, registers)) for place in parsed]
        if output is not None:
            _read_to_file(client, pairs, output)
        elif as_json:
            click.echo(json.dumps({str(place): _as_json(client, place, where) for place, where in pairs}))
        else:
            for place, where in pairs:
                _show(client, place, where)


def _pieces(client: Client, place: Place, where: Location | Extent) -> Iterator[bytes]:
    """What is there; what fails names the place."""
    with naming(place):
        if isinstance(where, Extent):
            yield from read_pieces(client, where)
        else:
            yield client.region_read(where.region, where.offset, where.width)


def _read_to_file(client: Client, pairs: Sequence[tuple[Place, Location | Extent]], output: str) -> None:
    """What was read before something fails is in the file."""
    with open(1, "wb", closefd=False) if output == "-" else open(output, "wb") as file:
        for place, where in pairs:
            for piece in _pieces(client, place, where):
                file.write(piece)


def _as_json(client: Client, place: Place, where: Location | Extent) -> int | str:
    """A register's number, hexadecimal digits of a range."""
    data = b"".join(_pieces(client, place, where))
    return data.hex() if isinstance(where, Extent) else int.from_bytes(data, "little")


def _show(client: Client, place: Place, where: Location | Extent) -> None:
    pieces = _pieces(client, place, where)
    if isinstance(where, Extent):
        for line in lines(pieces, where.start, where.width):
            click.echo(line)
        return
    value = int.from_bytes(b"".join(pieces), "little")
    click.echo(f"{place} = {value:#0{2 + 2 * where.width}x}")


@click.command(epilog="Example: vfio-user write /tmp/edu.sock config.command=0x6 bar0+0x4:u32=0x1234")
@socket_argument
@click.argument("assignments", metavar="PLACE=VALUE...", nargs=-1, required=True)
@click.option("--input", "source", metavar="FILE", type=ANY_PATH, help='Write what is in there; "-" is stdin.')
@device_option
@timeout_option
def write(path: str, assignments: tuple[str, ...], source: str | None, device: str | None, timeout: float) -> None:
    """Write registers: bar0+0x4:u32=0x1234, config.command=6.

    With --input, one PLACE without a value: where the bytes of FILE go, as bar2+0x1000, or a range that they must fit
    into, as bar2+0x1000..0x2000.
    """
    if source is not None:
        _write_file(path, assignments, source, device, timeout)
        return
    parsed = [parse_assignment(text) for text in assignments]
    with connect(path, timeout) as client:
        for location, value in locate(client, parsed, device):
            with naming(location):
                write_number(client, location, value)


def locate(
    client: Client, assignments: Sequence[tuple[Location | Name, int]], device: str | None
) -> list[tuple[Location, int]]:
    """Where each value goes. Raises UsageError before anything is written."""
    registers = _registers(client, device)
    located = [(registers().find(place) if isinstance(place, Name) else place, value) for place, value in assignments]
    for location, value in located:
        check_fits(location, value)
    return located


def _write_file(path: str, places: Sequence[str], source: str, device: str | None, timeout: float) -> None:
    if len(places) != 1:
        raise UsageError("--input FILE takes one PLACE")
    place = parse_place(places[0])
    with open_for_reading(source) as file, connect(path, timeout) as client:
        where = resolve(place, _registers(client, device))
        with naming(place):
            count = write_from(client, file, where)
    start = where.start if isinstance(where, Extent) else where.offset
    click.echo(f"{count} bytes written at {region_name(where.region)}+{start:#x}")
