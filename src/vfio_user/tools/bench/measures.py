"""What can be measured: names, and the probe that each measure has on a connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import NamedTuple

from vfio_user.tools.bench import probes
from vfio_user.tools.bench.link import Link
from vfio_user.tools.location import Location, region_name
from vfio_user.wire.constants import PciRegion

CONFIG_SIZES = (4, 64, 256)
SIZES = (4, 64, 4096, 65536, 1 << 20)
DMA_SIZES = (4096, 2 << 20, 1 << 30)
REPORT_SIZES = (1 << 30,)


class Measure(NamedTuple):
    """``name``: chapter, what, and size. ``make``: its probe on a connection."""

    name: str
    make: Callable[[Link], probes.Probe]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to measure. ``regions``: places whose region is read, and with ``write`` written with what it holds.

    ``sizes``: bytes of each access; without any, those that are usual. ``migrate``: also what stops the device, and
    logs its DMA. ``only``: patterns of names, all without any.
    """

    regions: Sequence[Location] = ()
    sizes: Sequence[int] = ()
    write: bool = False
    migrate: bool = False
    only: Sequence[str] = ()

    def has(self, name: str) -> bool:
        return not self.only or any(name.startswith(pattern) or fnmatch(name, pattern) for pattern in self.only)


def plan(choice: Choice) -> list[Measure]:
    """The measures of a choice, in their order; what is chosen twice is done once."""
    return list({measure.name: measure for measure in _all(choice) if choice.has(measure.name)}.values())


def _all(choice: Choice) -> Iterator[Measure]:
    yield Measure("info", probes.Info)
    for size in (size for size in choice.sizes or CONFIG_SIZES if size <= CONFIG_SIZES[-1]):
        yield _access("read", probes.Read, Location(PciRegion.CONFIG, 0, 4), size)
    for place in choice.regions:
        for size in choice.sizes or SIZES:
            yield _access("read", probes.Read, place, size)
            if choice.write:
                yield _access("write", probes.Write, place, size)
                yield _access("posted", probes.Posted, place, size)
    for size in DMA_SIZES:
        yield Measure(f"dma/map/{_binary(size)}", partial(probes.Map, size=size))
        yield Measure(f"dma/unmap/{_binary(size)}", partial(probes.Unmap, size=size))
    if choice.migrate:
        for size in REPORT_SIZES:
            yield Measure(f"log/report/{_binary(size)}", partial(probes.Report, size=size))
        yield Measure("migration/read", probes.MigrationRead)
        yield Measure("migration/write", probes.MigrationWrite)


def _binary(size: int) -> str:
    """A number of bytes, with the unit that divides it."""
    units = (unit for unit in ((30, "G"), (20, "M"), (10, "K")) if size >> unit[0] << unit[0] == size)
    shift, name = next(units, (0, ""))
    return f"{size >> shift}{name}"


def _access(chapter: str, kind: type[probes.Access], place: Location, size: int) -> Measure:
    where = region_name(place.region) + (f"+{place.offset:#x}" if place.offset else "")
    return Measure(f"{chapter}/{where}/{_binary(size)}", partial(kind, place=place, size=size))
