"""Where a command's data is in the guest's memory: PRPs and SGLs (4.3, 4.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from struct import Struct, unpack

from vfio_user.devices.nvme.command import Command, CommandError, check
from vfio_user.devices.nvme.constants import SglType, Status
from vfio_user.dma.memory import GuestMemory

Ranges = list[tuple[int, int]]
"""(address, length) in bytes, in the order of the data."""

BIT_BUCKET = -1
"""The address of data that nobody wants."""

MAX_DESCRIPTORS = 1024
"""SGL descriptors that one command may have, pointers to segments included: also what two segments that point at each
other come to."""

_TO_HOST = 2
"""Of an opcode: the direction of its data (figure 106)."""
_DESCRIPTOR = Struct("<QI3xB")
_POINTERS = (SglType.SEGMENT, SglType.LAST_SEGMENT)


def data_ranges(memory: GuestMemory, command: Command, length: int, page_size: int) -> Ranges:
    """Where the ``length`` bytes of a command's data are. Raises CommandError."""
    if not command.flags >> 6:
        return prp_ranges(memory, command.data1, command.data2, length, page_size)
    check(command.sgl != 3)
    to_host = bool(command.opcode & _TO_HOST)
    return sgl_ranges(memory, command.data1, command.data2, length, to_host=to_host)


def prp_ranges(memory: GuestMemory, prp1: int, prp2: int, length: int, page_size: int) -> Ranges:
    """What two PRP entries, or a list that the second points at, describe. Raises CommandError."""
    check(not prp1 & 3, Status.PRP_OFFSET_INVALID)
    first = page_size - (prp1 & page_size - 1)
    if length <= first:
        return [(prp1, length)]
    rest = length - first
    if rest <= page_size:
        check(not prp2 & page_size - 1, Status.PRP_OFFSET_INVALID)
        pages = [prp2]
    else:
        pages = prp_list(memory, prp2, -(-rest // page_size), page_size)
    return _joined(prp1, first, pages, length, page_size)


def prp_list(memory: GuestMemory, pointer: int, count: int, page_size: int) -> list[int]:
    """The ``count`` pages that a PRP list at ``pointer`` names, over as many pages as it takes. Raises CommandError.

    The last entry of a page of the list points to the next one, which begins at a page's start: so a list that comes
    back to itself still ends.
    """
    check(not pointer & 7, Status.PRP_OFFSET_INVALID)
    pages: list[int] = []
    while True:
        room = (page_size - (pointer & page_size - 1)) // 8
        missing = count - len(pages)
        here = min(room, missing)
        pages += unpack(f"<{here}Q", memory_of(memory, pointer, 8 * here))
        if here == missing:
            check(not reduce(or_, pages) & page_size - 1, Status.PRP_OFFSET_INVALID)
            return pages
        pointer = pages.pop()
        check(not pointer & page_size - 1, Status.PRP_OFFSET_INVALID)


def _joined(start: int, first: int, pages: Sequence[int], length: int, page_size: int) -> Ranges:
    """The ``first`` bytes at ``start`` and then whole pages as ranges, those that follow each other as one."""
    after = start + first
    if pages == list(range(after, after + len(pages) * page_size, page_size)):
        return [(start, length)]  # nearly always: guests like their memory in one piece
    ranges = [(start, first)]
    left = length - first
    for page in pages:
        size = min(page_size, left)
        address, before = ranges[-1]
        if address + before == page:
            ranges[-1] = address, before + size
        else:
            ranges.append((page, size))
        left -= size
    return ranges


def sgl_ranges(memory: GuestMemory, low: int, high: int, length: int, *, to_host: bool) -> Ranges:
    """What an SGL whose first descriptor is ``low`` and ``high`` describes, cut to ``length``. Raises CommandError.

    A bit bucket takes data on its way to the host; of data from there it has none (figure 115).
    """
    ranges: Ranges = []
    left = length
    for address, size in _blocks(memory, low.to_bytes(8, "little") + high.to_bytes(8, "little")):
        if not left:
            break
        if size and (to_host or address != BIT_BUCKET):
            ranges.append((address, min(size, left)))
            left -= min(size, left)
    check(not left, Status.DATA_SGL_LENGTH_INVALID)
    return ranges


def _blocks(memory: GuestMemory, segment: bytes) -> Iterator[tuple[int, int]]:
    """The data blocks and bit buckets of an SGL, segment by segment."""
    seen, last = 0, False
    while segment:
        descriptors = list(_DESCRIPTOR.iter_unpack(segment))
        seen += len(descriptors)
        check(seen <= MAX_DESCRIPTORS, Status.INVALID_NUMBER_OF_SGLS)
        segment = b""
        for number, (address, size, identifier) in enumerate(descriptors, 1):
            kind, sub_type = identifier >> 4, identifier & 0xF
            check(not sub_type, Status.SGL_SUB_TYPE_INVALID)
            if kind == SglType.DATA_BLOCK:
                yield address, size
            elif kind == SglType.BIT_BUCKET:
                yield BIT_BUCKET, size
            else:
                check(kind in _POINTERS, Status.SGL_TYPE_INVALID)
                check(number == len(descriptors) and not last, Status.INVALID_SGL_SEGMENT)
                check(size > 0 and not size % _DESCRIPTOR.size, Status.INVALID_SGL_SEGMENT)
                check(size // _DESCRIPTOR.size <= MAX_DESCRIPTORS, Status.INVALID_NUMBER_OF_SGLS)
                last = kind == SglType.LAST_SEGMENT
                segment = memory_of(memory, address, size)


def memory_of(memory: GuestMemory, address: int, size: int) -> bytes:
    """Guest memory that describes something. Raises CommandError where there is none."""
    try:
        return memory.read(address, size)
    except OSError as error:
        raise CommandError(Status.DATA_TRANSFER_ERROR) from error


class GuestData:
    """The data of one command in the guest's memory: read it, fill it, or hand out the memory itself."""

    __slots__ = ("_memory", "_ranges")

    def __init__(self, memory: GuestMemory, ranges: Ranges) -> None:
        self._memory = memory
        self._ranges = ranges

    def views(self, write: bool) -> list[memoryview] | None:
        """The memory itself, piece by piece; None where some of it cannot be had so."""
        window = self._memory.window
        if len(self._ranges) == 1:  # the hot path
            address, length = self._ranges[0]
            view = window(address, length, write)
            return None if view is None else [view]
        views = []
        for address, length in self._ranges:
            view = memoryview(bytearray(length)) if address == BIT_BUCKET else window(address, length, write)
            if view is None:
                return None
            views.append(view)
        return views

    def written(self) -> None:
        """Somebody wrote all of it through :meth:`views`."""
        log = self._memory.log
        if log.active:
            for address, length in self._ranges:
                if address != BIT_BUCKET:
                    log.mark(address, length)

    def read(self) -> bytes:
        """All of it. Raises CommandError where the guest has no such memory."""
        return b"".join(memory_of(self._memory, address, length) for address, length in self._ranges)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Fill it with ``data``, of its length. Raises CommandError where the guest has no such memory."""
        view, done = memoryview(data), 0
        for address, length in self._ranges:
            if address != BIT_BUCKET:
                try:
                    self._memory.write(address, view[done : done + length])
                except OSError as error:
                    raise CommandError(Status.DATA_TRANSFER_ERROR) from error
            done += length
