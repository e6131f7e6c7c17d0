"""Memory: blocks that live as long as the server, and travel with the device when it migrates."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator

from bitarray import bitarray

from vfio_user.devices.nvme.storage.base import SECTOR, Views
from vfio_user.wire.messages import Buffer

BLOCK = 64 << 10
"""Bytes that are sent together; the last block may be shorter."""
RECORD = struct.Struct("<QQB")
"""Offset and length in bytes, and a kind; the bytes follow if it is DATA."""
DATA, ZERO = 0, 1
LEAST_PART = RECORD.size + BLOCK
"""The smallest limit that :meth:`MemoryStorage.next_part` can keep."""
ZEROS = bytes(2 * BLOCK)


class MemoryStorage:
    """``size`` bytes of zeros to begin with; what was never written takes no memory.

    For a migration it knows which blocks have changed since they were sent. Whoever sends calls
    :meth:`mark_all_unsent` once, and then :meth:`next_part` while :meth:`unsent`; writes may go on meanwhile. The
    other side gives each part, in order, to :meth:`apply`.
    """

    block_size = SECTOR

    def __init__(self, name: str, *, size: int, read_only: bool = False) -> None:
        """Raises ValueError for a size that no disk has, OSError(ENOMEM) where there is no room for it."""
        if size <= 0 or size % SECTOR:
            raise ValueError(f"{name} {size} bytes are no disk: it must be a multiple of {SECTOR}")
        self.name, self.size, self.read_only = name, size, read_only
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise OSError(errno.ENOMEM, f"{size} bytes: {os.strerror(errno.ENOMEM)}", name) from error
        self._bytes = memoryview(self._memory)
        blocks = -(-size // BLOCK)
        self._used = bitarray(blocks)  # what may hold anything but zeros
        self._unsent = ~bitarray(blocks)  # nobody knows what is in its place at the other side

    def acquire(self) -> None:
        """Nobody else can have it."""

    def release(self) -> None:
        """Nobody else can get it."""

    def read_now(self, offset: int, views: Views) -> bool:
        self.read(offset, views)
        return True

    def read(self, offset: int, views: Views) -> None:
        for view in views:
            end = offset + len(view)
            view[:] = self._bytes[offset:end]
            offset = end

    def write_now(self, offset: int, views: Views) -> bool:
        self.write(offset, views)
        return True

    def write(self, offset: int, views: Views) -> None:
        self._check_writable()
        start = offset
        for view in views:
            end = offset + len(view)
            self._bytes[offset:end] = view
            offset = end
        # Afterwards: a part that is made meanwhile may have taken the old bytes, and must not be the last.
        touched = _blocks(start, offset)
        self._used[touched] = 1
        self._unsent[touched] = 1

    def flush(self) -> None:
        """It is as durable as it can be."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Whole blocks give their memory back, ``unmap`` or not: nobody can tell."""
        self._check_writable()
        self._zero(offset, offset + length)
        self._unsent[_blocks(offset, offset + length)] = 1

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, unmap=True)

    def close(self) -> None:
        self._bytes.release()
        self._memory.close()

    # Migration

    def mark_all_unsent(self) -> None:
        """A migration begins: nothing was sent yet."""
        self._unsent.setall(1)

    def unsent(self) -> bool:
        """Whether :meth:`next_part` has something to give."""
        return self._unsent.any()

    def next_part(self, limit: int) -> bytes:
        """What is unsent and fits into ``limit`` bytes, lowest offsets first; b"" when all was sent.

        It may be written to meanwhile: what a write that has returned left behind is in this part or a later one.
        Raises ValueError for a limit below LEAST_PART.
        """
        if limit < LEAST_PART:
            raise ValueError(f"limit {limit}: a part has up to {LEAST_PART} bytes at least")
        part = bytearray()
        block = self._unsent.find(1)
        while block >= 0 and len(part) + LEAST_PART <= limit:
            block = self._append_record(part, block)
        return bytes(part)

    def unsent_bytes(self) -> int:
        """About how many bytes are unsent."""
        return self._unsent.count() * BLOCK

    def _append_record(self, part: bytearray, block: int) -> int:
        """Add an unsent block, or a run of them that are zeros. Returns the next one that is unsent, or -1."""
        end, used = self._take(block)
        start, stop = block * BLOCK, min(end * BLOCK, self.size)
        data = bytes(self._bytes[start:stop]) if used else b""
        if data == ZEROS[: len(data)]:
            part += RECORD.pack(start, stop - start, ZERO)
        else:
            part += RECORD.pack(start, stop - start, DATA) + data
        return self._unsent.find(1, end)

    def _take(self, block: int) -> tuple[int, bool]:
        """Count ``block`` as sent, or a run of unused ones from it on. Returns its end, and whether it was used."""
        end = max(block + 1, self._end_of_unused(block))
        self._unsent[block:end] = 0
        # Only now it is sure what is used: who writes later makes it unsent again, who wrote before has made it used.
        used = self._used.find(1, block, end)
        if used >= 0:
            taken = max(used, block + 1)
            self._unsent[taken:end] = 1
            end = taken
        return end, used == block

    def _end_of_unused(self, block: int) -> int:
        """The end of the run of unsent and unused blocks that begins with this one; ``block`` itself if it is used."""
        ends = (self._used.find(1, block), self._unsent.find(0, block))
        return min((end for end in ends if end >= 0), default=len(self._unsent))

    def apply(self, part: Buffer) -> None:
        """Take over what :meth:`next_part` gave on the other side.

        Raises ValueError for anything else, and has then changed nothing.
        """
        for start, stop, data in self.check(part):
            if data is None:
                self._zero(start, stop)
            else:
                self._bytes[start:stop] = data
                self._used[_blocks(start, stop)] = 1

    def check(self, part: Buffer) -> list[tuple[int, int, memoryview | None]]:
        """Raise ValueError for a part that :meth:`apply` would not take; what it consists of."""
        return list(self._records(memoryview(part).cast("B")))

    def _records(self, part: memoryview) -> Iterator[tuple[int, int, memoryview | None]]:
        """The start and end of each record's bytes, and the bytes unless they are zeros; checked."""
        position = reached = 0
        while position < len(part):
            if len(part) - position < RECORD.size:
                raise ValueError(f"{len(part) - position} bytes are too few for a record of memory")
            start, length, kind = RECORD.unpack_from(part, position)
            position += RECORD.size
            # In order: otherwise a small part could ask for a lot of zeroing, over and over.
            if not (reached <= start and 0 < length <= self.size - start and kind in (DATA, ZERO)):
                raise ValueError(f"record of memory: {length} bytes at {start}, of kind {kind}")
            reached = start + length
            data = None if kind == ZERO else part[position : position + length]
            if data is not None:
                position += length
                if len(data) != length:
                    raise ValueError(f"record of memory: {len(data)} of {length} bytes")
            yield start, reached, data

    def _zero(self, start: int, stop: int) -> None:
        first, last = -(-start // BLOCK), stop // BLOCK if stop < self.size else len(self._used)
        if first >= last:
            self._bytes[start:stop] = ZEROS[: stop - start]
            return
        whole_start, whole_stop = first * BLOCK, min(last * BLOCK, self.size)
        self._used[first:last] = 0
        self._memory.madvise(mmap.MADV_DONTNEED, whole_start, whole_stop - whole_start)
        self._bytes[start:whole_start] = ZEROS[: whole_start - start]
        self._bytes[whole_stop:stop] = ZEROS[: stop - whole_stop]

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.name)


def _blocks(start: int, stop: int) -> slice:
    """The blocks that [start, stop) touches."""
    return slice(start // BLOCK, -(-stop // BLOCK))
