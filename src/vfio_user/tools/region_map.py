"""What is where in a region: what a client can map, what traps, where MSI-X has its table; and a picture of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import groupby, pairwise
from typing import NamedTuple

from vfio_user.client.regions import RegionDescription
from vfio_user.tools.config_space import MSIX, Snapshot


class Part(StrEnum):
    """What becomes of an access there."""

    TRAPPED = "trapped"
    MMAP = "mmap"
    TABLE = "MSI-X table"
    PBA = "MSI-X PBA"


MARKS = {Part.TRAPPED: ".", Part.MMAP: "#", Part.TABLE: "T", Part.PBA: "P"}
"""How a part is drawn."""


class Span(NamedTuple):
    """``size`` bytes of a region from ``offset`` on."""

    part: Part
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


def structures(snapshot: Snapshot) -> dict[int, list[Span]]:
    """By BAR, where the capability of MSI-X says that its table and its pending bits are."""
    found: dict[int, list[Span]] = {}
    for capability in snapshot.capabilities:
        if capability.id == MSIX:
            vectors = (snapshot.value(capability.offset + 2, 2) & 0x7FF) + 1
            for part, at, size in ((Part.TABLE, 4, 16 * vectors), (Part.PBA, 8, (vectors + 63) // 64 * 8)):
                place = snapshot.value(capability.offset + at, 4)
                found.setdefault(place & 7, []).append(Span(part, place & ~7, size))
    return found


def spans(region: RegionDescription, inside: Sequence[Span] = ()) -> list[Span]:
    """The parts of a region by offset, without a gap. ``inside``: those of MSI-X, as far as they lie in it.

    Where a client can map MSI-X's structures, they are shown as what they are.
    """
    known = (*inside, *(Span(Part.MMAP, offset, size) for offset, size in region.mmap_areas))
    changes = [(0, Part.TRAPPED, 1), (region.size, Part.TRAPPED, -1)]
    for one in known:
        changes += [(min(one.offset, region.size), one.part, 1), (min(one.end, region.size), one.part, -1)]
    return list(_merged(_sweep(sorted(changes))))


_ORDER = (Part.TABLE, Part.PBA, Part.MMAP, Part.TRAPPED)
"""Which one counts where several are."""


def _sweep(changes: Iterable[tuple[int, Part, int]]) -> Iterator[Span]:
    """The parts between offsets where one begins (1) or ends (-1)."""
    there: Counter[Part] = Counter()
    for (start, part, change), (end, _, _) in pairwise(changes):
        there[part] += change
        if start < end:
            yield Span(next(one for one in _ORDER if there[one]), start, end - start)


def _merged(parts: Iterable[Span]) -> Iterator[Span]:
    """Neighbours of one kind as one."""
    for part, same in groupby(parts, key=lambda one: one.part):
        first, *rest = same
        yield Span(part, first.offset, sum(one.size for one in (first, *rest)))


def draw(parts: Sequence[Span], width: int = 64) -> str:
    """A line of ``width`` characters for a region: each stands for as many bytes, and shows the smallest part of them.

    So nothing that is there vanishes, however small, unless more than one such thing is in one character.
    """
    total = parts[-1].end if parts else 0
    line = [""] * width
    for one in sorted(parts, key=lambda one: -one.size):
        first, last = one.offset * width // total, -(-one.end * width // total)
        line[first:last] = MARKS[one.part] * (last - first)
    return "".join(line)
