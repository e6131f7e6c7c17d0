"""Where a command's data is in the guest's memory: PRPs and SGLs (4.3, 4.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from struct import Struct, unpack
from typing import NamedTuple

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
    first = page_size - (prp1 & page_size - 1)
    if prp1 & 3:
        raise CommandError(Status.PRP_OFFSET_INVALID)
    if length <= first:
        return [(prp1, length)]
    after, count = prp1 + first, -(-(length - first) // page_size)
    entries = prp2.to_bytes(8, "little") if count == 1 else prp_entries(memory, prp2, count, page_size)
    # As one long number: to look at them one by one takes as long as to read 64 KiB of a file.
    number, digits = int.from_bytes(entries, "little"), _digits(count, page_size)
    if number == after * digits.ones + digits.steps:
        return [(prp1, length)]  # most often: guests like their memory in one piece
    if number & digits.within:
        raise CommandError(Status.PRP_OFFSET_INVALID)
    pages = unpack(f"<{count}Q", entries)
    return _joined(prp1, after, pages, first + count * page_size - length, page_size)


class _Digits(NamedTuple):
    """Numbers of digits of 64 bits, as the entries of a PRP list are one."""

    ones: int
    """1, 1, 1, ..."""
    steps: int
    """From the lowest on: 0, a page's size, two of them, ..."""
    within: int
    """In each the bits that are an offset in a page."""


@cache
def _digits(count: int, page_size: int) -> _Digits:
    ones = sum(1 << 64 * n for n in range(count))
    return _Digits(ones, sum(n * page_size << 64 * n for n in range(count)), ones * (page_size - 1))


def prp_list(memory: GuestMemory, pointer: int, count: int, page_size: int) -> tuple[int, ...]:
    """The ``count`` pages that a PRP list at ``pointer`` names. Raises CommandError."""
    pages = unpack(f"<{count}Q", prp_entries(memory, pointer, count, page_size))
    check(not any(page & page_size - 1 for page in pages), Status.PRP_OFFSET_INVALID)
    return pages


def prp_entries(memory: GuestMemory, pointer: int, count: int, page_size: int) -> bytes:
    """The ``count`` entries of a PRP list at ``pointer``, over as many pages as it takes. Raises CommandError.

    The last entry of a page of the list points to the next one, which begins at a page's start: so a list that comes
    back to itself still ends.
    """
    if pointer & 7:
        raise CommandError(Status.PRP_OFFSET_INVALID)
    if 8 * count <= page_size - (pointer & page_size - 1):  # the hot path
        return memory_of(memory, pointer, 8 * count)
    entries = b""
    while True:
        room, missing = page_size - (pointer & page_size - 1), 8 * count - len(entries)
        entries += memory_of(memory, pointer, min(room, missing))
        if missing <= room:
            return entries
        pointer, entries = int.from_bytes(entries[-8:], "little"), entries[:-8]
        check(not pointer & page_size - 1, Status.PRP_OFFSET_INVALID)


def _joined(start: int, end: int, pages: Sequence[int], excess: int, page_size: int) -> Ranges:
    """From ``start`` to ``end`` and then ``pages``, without the last ``excess`` bytes: those that follow as one."""
    ranges = []
    for page in pages:
        if page != end:
            ranges.append((start, end - start))
            start = end = page
        end += page_size
    ranges.append((start, end - start - excess))
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


def views_of(memory: GuestMemory, ranges: Ranges, write: bool) -> list[memoryview] | None:
    """The memory that ``ranges`` name, piece by piece; None where some of it cannot be had so."""
    window = memory.window
    if len(ranges) == 1:  # the hot path
        address, length = ranges[0]
        view = window(address, length, write)
        return None if view is None else [view]
    # Most often, one region of the guest's memory has them all. (Not where there is a bit bucket: it is nowhere.)
    low, high = min(ranges)[0], max([address + length for address, length in ranges])
    if (whole := window(low, high - low, write)) is not None:
        return [whole[address - low : address - low + length] for address, length in ranges]
    views = []
    for address, length in ranges:
        part = memoryview(bytearray(length)) if address == BIT_BUCKET else window(address, length, write)
        if part is None:
            return None
        views.append(part)
    return views


def log_written(memory: GuestMemory, ranges: Ranges) -> None:
    """Somebody wrote all that ``ranges`` name through :func:`views_of`."""
    log = memory.log
    if log.active:
        for address, length in ranges:
            if address != BIT_BUCKET:
                log.mark(address, length)


class GuestData:
    """The data of one command in the guest's memory: read it, fill it, or hand out the memory itself."""

    __slots__ = ("_memory", "_ranges")

    def __init__(self, memory: GuestMemory, ranges: Ranges) -> None:
        self._memory = memory
        self._ranges = ranges

    def views(self, write: bool) -> list[memoryview] | None:
        """The memory itself, piece by piece; None where some of it cannot be had so."""
        return views_of(self._memory, self._ranges, write)

    def written(self) -> None:
        """Somebody wrote all of it through :meth:`views`."""
        log_written(self._memory, self._ranges)

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
