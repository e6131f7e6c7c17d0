"""Guest memory for the data of a command, and the ways to tell a controller where it is.

Sources: NVM Express Base Specification 1.4, sections 4.3 (physical region pages) and 4.4 (scatter gather lists).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from vfio_user.devices.nvme.constants import SglType
from vfio_user.testing.nvme.access import Hardware, Pages
from vfio_user.testing.nvme.commands import NO_DATA, SGL

Piece = tuple[int, int]
"""A piece of guest memory: address and length."""

_PAIR = struct.Struct("<QQ")
_DESCRIPTOR = struct.Struct("<QI3xB")
DESCRIPTOR_SIZE = _DESCRIPTOR.size


def descriptor(kind: int, address: int, length: int, sub_type: int = 0) -> bytes:
    """An SGL descriptor, 16 bytes."""
    return _DESCRIPTOR.pack(address, length, kind << 4 | sub_type)


def prps(first: int, second: int = 0) -> bytes:
    """PRP1 and PRP2 as a data pointer."""
    return _PAIR.pack(first, second)


@dataclass(slots=True)
class Buffer:
    """Pieces of guest memory in the order of the data, and the ``pointer`` and ``flags`` that a command names them by.

    A context manager: its pages are free again at the end.
    """

    hardware: Hardware
    pages: Pages
    pieces: Sequence[Piece]
    pointer: bytes = NO_DATA
    flags: int = 0
    owned: list[int] = field(default_factory=list)
    """Its pages, those of PRP lists and SGL segments included."""

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the pages back: no command may use them any more."""
        for page in self.owned:
            self.pages.release(page)
        self.owned.clear()

    def __len__(self) -> int:
        return sum(length for _, length in self.pieces)

    def read(self) -> bytes:
        """What is in it."""
        return b"".join(self.hardware.memory.read(address, length) for address, length in self.pieces)

    def write(self, data: bytes) -> None:
        """Fill it from its beginning."""
        done = 0
        for address, length in self.pieces:
            self.hardware.memory.write(address, data[done : done + length])
            done += length


class Buffers:
    """Makes buffers of every shape from the free pages of guest memory."""

    def __init__(self, hardware: Hardware, pages: Pages) -> None:
        self._hardware = hardware
        self._pages = pages

    def prp(self, length: int, *, offset: int = 0, scattered: bool = True, list_offset: int = 0) -> Buffer:
        """``length`` bytes in pages named by PRP entries; the data begins ``offset`` bytes (a multiple of 4) into the
        first. A PRP list, where it takes one, begins ``list_offset`` bytes (a multiple of 8) into its page.
        """
        size = self._pages.page_size
        count = max(1, -(-(offset + length) // size))
        if scattered:
            owned = self._pages.scattered(count)
        else:
            first = self._pages.allocate(count)
            owned = [first + number * size for number in range(count)]
        pieces = list(_pieces_in(owned, offset, length, size))
        buffer = Buffer(self._hardware, self._pages, pieces, owned=owned)
        buffer.pointer = self._prp_pointer(buffer, [owned[0] + offset, *owned[1:]], list_offset)
        return buffer

    def _prp_pointer(self, buffer: Buffer, entries: list[int], list_offset: int) -> bytes:
        if len(entries) <= 2:
            return prps(*entries)
        return prps(entries[0], self.prp_list(buffer, entries[1:], list_offset))

    def prp_list(self, buffer: Buffer, entries: Sequence[int], offset: int = 0) -> int:
        """Write ``entries`` into PRP lists, from page to page, that ``buffer`` then owns; where the first begins."""
        size = self._pages.page_size
        room = (size - offset) // 8
        page = self._pages.allocate()
        buffer.owned.append(page)
        if len(entries) > room:
            entries = [*entries[: room - 1], self.prp_list(buffer, entries[room - 1 :])]
        self._hardware.memory.write(page + offset, struct.pack(f"<{len(entries)}Q", *entries))
        return page + offset

    def sgl(self, lengths: Sequence[int], *, per_segment: int = 256, offset: int = 0, bucket: int = 0) -> Buffer:
        """Pieces of these lengths in bytes, each ``offset`` bytes into a page of its own (or several), named by data
        block descriptors; more than one of them go into segments of at most ``per_segment`` descriptors. ``bucket``
        bytes of the data, after the first piece, are a bit bucket.
        """
        size = self._pages.page_size
        buffer = Buffer(self._hardware, self._pages, [], flags=SGL)
        pieces: list[Piece] = []
        for length in lengths:
            count = max(1, -(-(offset + length) // size))
            first = self._pages.allocate(count)
            buffer.owned += [first + number * size for number in range(count)]
            pieces.append((first + offset, length))
        buffer.pieces = pieces
        blocks = [descriptor(SglType.DATA_BLOCK, *piece) for piece in pieces]
        if bucket:
            blocks.insert(1, descriptor(SglType.BIT_BUCKET, 0, bucket))
        buffer.pointer = blocks[0] if len(blocks) == 1 else self.sgl_segments(buffer, blocks, per_segment)
        return buffer

    def sgl_segments(self, buffer: Buffer, descriptors: Sequence[bytes], per_segment: int = 256) -> bytes:
        """Write descriptors into segments, one linked to the next, that ``buffer`` then owns; what names the first."""
        if per_segment < 2:
            raise ValueError("a segment with a link in it has two descriptors at least")
        if len(descriptors) <= per_segment:
            return self._segment(buffer, descriptors, SglType.LAST_SEGMENT)
        rest = self.sgl_segments(buffer, descriptors[per_segment - 1 :], per_segment)
        return self._segment(buffer, [*descriptors[: per_segment - 1], rest], SglType.SEGMENT)

    def _segment(self, buffer: Buffer, descriptors: Sequence[bytes], kind: SglType) -> bytes:
        page = self._pages.allocate()
        buffer.owned.append(page)
        content = b"".join(descriptors)
        self._hardware.memory.write(page, content)
        return descriptor(kind, page, len(content))


def _pieces_in(pages: Sequence[int], offset: int, length: int, size: int) -> Iterator[Piece]:
    for page in pages:
        part = min(size - offset, length)
        if part > 0:
            yield page + offset, part
        length -= part
        offset = 0
