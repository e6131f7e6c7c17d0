"""DMA_MAP and DMA_UNMAP, with memory of the checker's own at addresses that no guest has."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from vfio_user.tools.check.cases import MEMORY_SIZE, Ask, Case, Do, FdKind, Session, Start, Step
from vfio_user.tools.check.expect import EMPTY, Answered, Expectation, Findings, Refused, Served, echoes
from vfio_user.tools.check.facts import Facts, Need
from vfio_user.tools.check.model import Level, Mode
from vfio_user.wire import messages as m
from vfio_user.wire.constants import PAGE_SIZE, Command, DmaFlags, DmaUnmapFlags

MAP, UNMAP = "VFIO_USER_DMA_MAP", "VFIO_USER_DMA_UNMAP"
BASE = 1 << 40
"""Where it is mapped."""
_RW = DmaFlags.READ | DmaFlags.WRITE
_SIZE = m.DmaMap.LAYOUT.size
_UNMAP_SIZE = m.DmaUnmap.LAYOUT.size
_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_EXISTS = Refused((errno.EEXIST,), strict=True)
_MEMORY = (FdKind.MEMORY,)


def map_(
    address: int,
    size: int,
    expect: Expectation = EMPTY,
    fds: tuple[FdKind, ...] = _MEMORY,
    *,
    flags: int = _RW,
    offset: int = 0,
    argsz: int = _SIZE,
) -> Ask:
    return Ask(Command.DMA_MAP, m.DmaMap(argsz, flags, offset, address, size).pack(), expect, fds)


def unmap(
    address: int,
    size: int,
    expect: Expectation | None = None,
    *,
    flags: int = 0,
    argsz: int = _UNMAP_SIZE,
    tail: bytes = b"",
) -> Ask:
    """By default it must succeed, and be answered with the request's structure."""
    payload = m.DmaUnmap(argsz, flags, address, size).pack()
    return Ask(Command.DMA_UNMAP, payload + tail, expect or echoes(payload), ())


def _case(
    name: str,
    section: str,
    *steps: Step,
    level: Level = Level.MUST,
    mode: Mode = Mode.SAFE,
    needs: tuple[Need, ...] = (),
) -> Case:
    return Case(f"dma/{name}", section, steps, level, mode, Start.FRESH, needs)


_GOOD = {
    "fd": map_(BASE, MEMORY_SIZE),
    "fd-part": map_(BASE, PAGE_SIZE, offset=PAGE_SIZE),
    "read-only": map_(BASE, MEMORY_SIZE, flags=DmaFlags.READ),
    "write-only": map_(BASE, MEMORY_SIZE, flags=DmaFlags.WRITE),
    "no-fd": map_(BASE, MEMORY_SIZE, fds=()),
    "at-0": map_(0, MEMORY_SIZE),
    "below-4g": map_((1 << 32) - MEMORY_SIZE, MEMORY_SIZE),
    "across-4g": map_((1 << 32) - PAGE_SIZE, 2 * PAGE_SIZE),
    "no-fd-1g": map_(BASE, 1 << 30, fds=()),
}

_OVERLAPS = {
    "head": (BASE - PAGE_SIZE, 2 * PAGE_SIZE),
    "tail": (BASE + MEMORY_SIZE - PAGE_SIZE, 2 * PAGE_SIZE),
    "inside": (BASE + PAGE_SIZE, PAGE_SIZE),
    "around": (BASE - PAGE_SIZE, MEMORY_SIZE + 2 * PAGE_SIZE),
    "first-page": (BASE, PAGE_SIZE),
    "last-byte": (BASE + MEMORY_SIZE - 1, 1),
}

_BAD_MAPS: dict[str, tuple[Ask, Level]] = {
    **{
        f"flag-bit-{bit}": (map_(BASE, MEMORY_SIZE, Refused(), flags=_RW | 1 << bit), Level.SHOULD)
        for bit in (4, 8, 16, 31)
    },
    "wraps": (map_(_U64 - PAGE_SIZE + 1, 2 * PAGE_SIZE, Refused(()), fds=()), Level.MUST),
    "size-max": (map_(PAGE_SIZE, _U64, Refused(()), fds=()), Level.MUST),
    "eventfd": (map_(BASE, PAGE_SIZE, Refused(()), (FdKind.EVENT,)), Level.SHOULD),
    "pipe": (map_(BASE, PAGE_SIZE, Refused(()), (FdKind.PIPE,)), Level.SHOULD),
    "socket": (map_(BASE, PAGE_SIZE, Refused(()), (FdKind.SOCKET,)), Level.SHOULD),
    "two-fds": (map_(BASE, PAGE_SIZE, Refused(), _MEMORY * 2), Level.SHOULD),
    "offset-max": (map_(BASE, PAGE_SIZE, Refused(()), offset=_U64 - PAGE_SIZE + 1), Level.MUST),
    "mmap-flag-without-fd": (map_(BASE, PAGE_SIZE, Refused(), (), flags=_RW | DmaFlags.MMAP), Level.SHOULD),
}
_OPEN = {
    "size-0": map_(BASE, 0, Answered(EMPTY), ()),
    "size-0-fd": map_(BASE, 0, Answered(EMPTY)),
    "no-access": map_(BASE, PAGE_SIZE, Answered(EMPTY), flags=0),
    "unaligned": map_(BASE + 1, 17, Answered(EMPTY), ()),
    "behind-the-file": map_(BASE, PAGE_SIZE, Answered(EMPTY), offset=MEMORY_SIZE),
    "over-8t": map_(BASE, 9 << 40, Answered(EMPTY), ()),
    "argsz-max": map_(BASE, PAGE_SIZE, Answered(EMPTY), argsz=_U32),
}
"""What the specification leaves open: an answer, and no more."""

_NO_ENTRY = Refused((errno.ENOENT, errno.EINVAL))
_BAD_UNMAPS: dict[str, Ask] = {
    "unknown": unmap(BASE + (1 << 30), MEMORY_SIZE, _NO_ENTRY),
    "first-page": unmap(BASE, PAGE_SIZE, _NO_ENTRY),
    "last-page": unmap(BASE + MEMORY_SIZE - PAGE_SIZE, PAGE_SIZE, _NO_ENTRY),
    "middle": unmap(BASE + PAGE_SIZE, PAGE_SIZE, _NO_ENTRY),
    "size-0": unmap(BASE, 0, _NO_ENTRY),
    "across-head": unmap(BASE - PAGE_SIZE, 2 * PAGE_SIZE, _NO_ENTRY),
    "wraps": unmap(BASE, _U64, _NO_ENTRY),
}


def _many(session: Session) -> Findings:
    """Regions in a row, without a gap."""
    count = min(32, session.facts.number("max_dma_maps", 65535))
    addresses = range(BASE, BASE + count * PAGE_SIZE, PAGE_SIZE)
    for address in addresses:
        yield from map_(address, PAGE_SIZE).run(session)
    for address in addresses:
        yield from unmap(address, PAGE_SIZE).run(session)


def _forgotten(session: Session) -> Findings:
    """The client leaves; the next one maps something else at the same place."""
    yield from map_(BASE, MEMORY_SIZE).run(session)
    session.reconnect()
    yield from map_(BASE + PAGE_SIZE, PAGE_SIZE, offset=PAGE_SIZE).run(session)


def _unmap_unmapped(session: Session) -> Findings:
    yield from map_(BASE, MEMORY_SIZE).run(session)
    session.reconnect()
    yield from unmap(BASE, MEMORY_SIZE, _NO_ENTRY).run(session)


def _has_limit(facts: Facts) -> str:
    limit = facts.number("max_dma_maps", 65535)
    return "" if 0 < limit <= 128 else f"max_dma_maps is {limit}"


def _too_many(session: Session) -> Findings:
    limit = session.facts.number("max_dma_maps", 65535)
    for number in range(limit):
        yield from map_(BASE + 2 * number * PAGE_SIZE, PAGE_SIZE, fds=()).run(session)
    yield from map_(BASE + 2 * limit * PAGE_SIZE, PAGE_SIZE, Refused(()), ()).run(session)


def _bitmap(page_size: int, size: int) -> bytes:
    return m.DirtyBitmapInfo(page_size, size).pack()


def cases() -> Iterator[Case]:
    yield from _map_cases()
    yield from _unmap_cases()
    yield _case("many", MAP, Do("success, for each region", _many))
    yield _case("limit", SECTION_LIMIT, Do("an error reply", _too_many), needs=(_has_limit,))
    section = "Client Disconnection"
    yield _case("left/mapped-again", section, Do("all regions are unmapped when the client leaves", _forgotten))
    yield _case("left/unmapped", section, Do("an error reply: it went with the client", _unmap_unmapped))


SECTION_LIMIT = "VFIO_USER_VERSION, max_dma_maps"


def _map_cases() -> Iterator[Case]:
    for name, ask in _GOOD.items():
        request = m.DmaMap.parse(ask.payload if isinstance(ask.payload, bytes) else b"")
        yield _case(f"map/{name}", MAP, ask, unmap(request.address, request.size))
    first = map_(BASE, MEMORY_SIZE)
    for name, (address, size) in _OVERLAPS.items():
        yield _case(f"map/overlap/{name}", MAP, first, map_(address, size, _EXISTS, ()))
        yield _case(f"map/overlap/{name}-fd", MAP, first, map_(address, size, _EXISTS))
    other = map_(BASE, MEMORY_SIZE, _EXISTS, flags=DmaFlags.READ)
    yield _case("map/overlap/other-access", MAP, first, other)
    again = map_(BASE, MEMORY_SIZE, _EXISTS)
    yield _case("map/overlap/other-file", MAP, first, again)
    same = Answered(EMPTY)  # libvfio-user takes it; the specification says EEXIST
    yield _case("map/overlap/same", MAP, map_(BASE, 1 << 20, fds=()), map_(BASE, 1 << 20, same, ()))
    yield _case("map/adjacent", MAP, first, map_(BASE + MEMORY_SIZE, PAGE_SIZE), map_(BASE - PAGE_SIZE, PAGE_SIZE))
    yield _case("map/again-after-unmap", MAP, first, unmap(BASE, MEMORY_SIZE), first)
    for name, (ask, level) in _BAD_MAPS.items():
        yield _case(f"map/bad/{name}", MAP, ask, level=level)
    for name, ask in _OPEN.items():
        mode = Mode.HOSTILE if name in ("behind-the-file", "size-0-fd") else Mode.SAFE
        yield _case(f"map/open/{name}", MAP, ask, mode=mode)


def _unmap_cases() -> Iterator[Case]:
    first = map_(BASE, MEMORY_SIZE)
    for name, ask in _BAD_UNMAPS.items():
        yield _case(f"unmap/{name}", UNMAP, first, ask, unmap(BASE, MEMORY_SIZE))
    yield _case("unmap/again", UNMAP, first, unmap(BASE, MEMORY_SIZE), unmap(BASE, MEMORY_SIZE, _NO_ENTRY))
    yield _case("unmap/never-mapped", UNMAP, unmap(BASE, MEMORY_SIZE, _NO_ENTRY))
    everything = unmap(0, 0, Answered(Served("the structure again", _UNMAP_SIZE)), flags=DmaUnmapFlags.ALL)
    yield _case("unmap/all", UNMAP, first, map_(BASE * 2, MEMORY_SIZE, fds=()), everything)
    for name, flags in (("all-with-address", DmaUnmapFlags.ALL), ("bit-2", 4), ("bit-31", 1 << 31), ("both", 3)):
        bad = unmap(BASE, MEMORY_SIZE, Refused(), flags=flags)
        yield _case(f"unmap/flags/{name}", UNMAP, first, bad, level=Level.SHOULD)
    for name, tail, argsz in (
        ("no-room", _bitmap(PAGE_SIZE, 32), _UNMAP_SIZE),
        ("no-logging", _bitmap(PAGE_SIZE, 32), _UNMAP_SIZE + 16 + 32),
        ("missing", b"", 4096),
        ("page-size-0", _bitmap(0, 32), _UNMAP_SIZE + 16 + 32),
        ("size-max", _bitmap(PAGE_SIZE, _U64), _U32),
    ):
        bad = unmap(BASE, MEMORY_SIZE, Refused(()), flags=DmaUnmapFlags.GET_DIRTY_BITMAP, tail=tail, argsz=argsz)
        yield _case(f"unmap/bitmap/{name}", UNMAP, first, bad, level=Level.SHOULD)
