"""DMA: the guest's memory by I/O virtual address, and the log of what a device writes there."""

from .bitmap import DirtyBitmap, DirtyLog, bitmap_size, check_logging_ranges, check_report
from .iova import IovaTable
from .memory import FILE_IO, MAX_REGIONS, MMAP, READ, WRITE, GuestMemory, MessageDma

__all__ = [
    "FILE_IO",
    "MAX_REGIONS",
    "MMAP",
    "READ",
    "WRITE",
    "DirtyBitmap",
    "DirtyLog",
    "GuestMemory",
    "IovaTable",
    "MessageDma",
    "bitmap_size",
    "check_logging_ranges",
    "check_report",
]
