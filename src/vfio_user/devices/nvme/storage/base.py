"""What a namespace keeps its blocks in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Views = Sequence[memoryview]
"""Pieces of guest memory, one after the other: contiguous, of format B."""

SECTOR = 512
"""The smallest block of NVMe's that anyone formats, in bytes."""


class Storage(Protocol):
    """Bytes that outlive the controller: a file, a block device, memory, an NBD export.

    Offsets and lengths are in bytes, lie inside ``size``, and are multiples of ``block_size``. Calls may come from
    several threads at once; two that overlap in time and place are the guest's affair, as on any disk. What fails
    raises OSError with the errno of what failed (ENOSPC, EIO, EROFS, ...), and the next call may succeed again;
    :meth:`flush` says what is different there.

    A new one may be looked at, and read only its size be believed: it is nobody's before :meth:`acquire`.
    """

    name: str
    """How people call it: a path, a URI."""
    size: int
    """In bytes."""
    block_size: int
    """What offsets and lengths must be multiples of, in bytes: SECTOR, or a larger power of two."""
    read_only: bool

    def acquire(self) -> None:
        """Make it this process's own; whoever reads it from now on sees what the one before wrote.

        Called whenever the controller is enabled, and when it is back after a :meth:`release`. Where it is acquired
        already, no more happens than that a flush that failed is forgotten: whoever resets a disk starts anew from
        what is on it. Raises OSError: EWOULDBLOCK where another process has it, ESTALE where it is not what it was
        when it was opened.
        """

    def release(self) -> None:
        """Make everything durable, and leave it to others: the controller has stopped. Released twice changes nothing.

        Raises OSError where something cannot be written: then it is still acquired.
        """

    def read_now(self, offset: int, views: Views) -> bool:
        """Read, if that takes no waiting. False: nothing was read, or not all of it: :meth:`read` must be called."""

    def read(self, offset: int, views: Views) -> None:
        """Fill ``views`` from ``offset`` on."""

    def write_now(self, offset: int, views: Views) -> bool:
        """Write, if that takes no waiting; False: :meth:`write` must be called."""

    def write(self, offset: int, views: Views) -> None:
        """Write ``views`` from ``offset`` on. Durable after the next :meth:`flush` only."""

    def flush(self) -> None:
        """What was written before, by any thread, is durable when this returns.

        Once it has failed, nobody knows what of that is lost, and a second try would not write it again: every flush
        fails until :meth:`acquire`.
        """

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make it read as zeros; with ``unmap``, better without keeping room for it."""

    def discard(self, offset: int, length: int) -> None:
        """Nobody needs what is there any more: give its room back.

        It then reads as zeros. Where that would take writing them, nothing happens, and it reads as before.
        """

    def close(self) -> None:
        """Give back what it holds, without waiting for anything. Closed twice changes nothing.

        No other call may be under way, or come after it.
        """
