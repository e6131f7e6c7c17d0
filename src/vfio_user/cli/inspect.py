"""``info``, ``read`` and ``write``: a look at what is behind a socket, or in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import click

from vfio_user.cli.reasons import naming
from vfio_user.client import Client
from vfio_user.errors import StreamError
from vfio_user.tools.info import gather
from vfio_user.tools.location import Location, parse_assignment

MIN_TIMEOUT, MAX_TIMEOUT = 0.01, 86400.0


def _seconds(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not MIN_TIMEOUT <= value <= MAX_TIMEOUT:  # NaN is not either, which FloatRange would take
        raise click.BadParameter(f"{value} is not in the range {MIN_TIMEOUT} to {MAX_TIMEOUT:.0f}")
    return value


timeout_option = click.option(
    "--timeout", default=5.0, show_default=True, type=float, callback=_seconds, help="Seconds for each call."
)
socket_argument = click.argument("path", metavar="SOCKET", type=click.Path())


def connect(path: str, timeout: float) -> Client:
    """A client of the server at ``path``; what fails names it."""
    with naming(path):
        return Client.connect(path, timeout)


def open_for_reading(path: str) -> BinaryIO:
    """The file at ``path``; "-" is stdin, which is left open."""
    return open(0, "rb", closefd=False) if path == "-" else open(path, "rb")


@click.command()
@click.argument("path", metavar="SOCKET|FILE", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
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
    click.echo(json.dumps(facts) if as_json else "\n".join(_describe(facts)))


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


def _describe(facts: dict[str, Any]) -> list[str]:
    lines = [f"version     {facts['version']}"]
    lines += [f"limits      {', '.join(f'{k} {v}' for k, v in facts['capabilities'].items()) or 'defaults'}"]
    lines += _describe_pci(facts["pci"])
    lines.append(f"device      {' '.join(facts['device']['flags'])}")
    for region in facts["regions"]:
        if region["size"]:
            lines.append(
                f"region {region['index']}    {region['name']:<7}{region['size']:>#12x}  {' '.join(region['flags'])}"
            )
            lines += [f"              mmap {area['offset']:#x}+{area['size']:#x}" for area in region["mmap_areas"]]
    for irq in facts["irqs"]:
        if irq["count"]:
            lines.append(f"irq {irq['index']}       {irq['name']:<7}{irq['count']:>12}  {' '.join(irq['flags'])}")
    migration = facts["migration"]
    if migration["supported"]:
        logging = "DMA logging" if migration["dma_logging"] else "no DMA logging"
        size = "" if migration["data_size"] is None else f", about {migration['data_size']} bytes of state"
        lines.append(f"migration   {' '.join(migration['flags'])}, {migration['state']}, {logging}{size}")
    else:
        lines.append("migration   not supported")
    return lines


def _describe_pci(pci: dict[str, Any] | None) -> list[str]:
    if pci is None:
        return ["pci         no config space"]
    lines = [f"pci         {pci['vendor_id']}:{pci['device_id']} class {pci['class_code']} revision {pci['revision']}"]
    lines += [f"capability  [{cap['offset']:02x}] {cap['name']} (id {cap['id']:#04x})" for cap in pci["capabilities"]]
    return lines


@click.command()
@socket_argument
@click.argument("places", metavar="PLACE...", nargs=-1, required=True)
@timeout_option
def read(path: str, places: tuple[str, ...], timeout: float) -> None:
    """Read registers: bar0+0x10:u32, config+0:u16, rom, or an index as region; u8 u16 u32 u64."""
    locations = [Location.parse(place) for place in places]
    with connect(path, timeout) as client:
        for location in locations:
            with naming(location):
                data = client.region_read(location.region, location.offset, location.width)
            click.echo(f"{location} = {int.from_bytes(data, 'little'):#0{2 + 2 * location.width}x}")


@click.command()
@socket_argument
@click.argument("assignments", metavar="PLACE=VALUE...", nargs=-1, required=True)
@timeout_option
def write(path: str, assignments: tuple[str, ...], timeout: float) -> None:
    """Write registers: bar0+0x4:u32=0x1234."""
    writes = [parse_assignment(text) for text in assignments]
    with connect(path, timeout) as client:
        for location, value in writes:
            with naming(location):
                client.region_write(location.region, location.offset, value.to_bytes(location.width, "little"))
