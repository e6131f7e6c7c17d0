"""Files that are a guest's memory, as QEMU's ``-object memory-backend-file,share=on`` makes them."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vfio_user.client import Client
from vfio_user.errors import UsageError
from vfio_user.fds import OwnedFd
from vfio_user.live import MemoryRegion
from vfio_user.wire.constants import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """A file that is guest memory from ``address`` on, whole."""

    path: Path
    address: int = 0

    @classmethod
    def parse(cls, text: str) -> MemorySpec:
        """``FILE[@ADDRESS]``; the address is 0 without one, and a multiple of the page size."""
        path, address = _apart(text)
        if not path:
            raise UsageError(f"{text!r} names no file: write it like /dev/shm/guest@0x100000000")
        return cls(Path(path), address)

    @classmethod
    def parse_pair(cls, text: str) -> tuple[MemorySpec, MemorySpec]:
        """``SRC:DST[@ADDRESS]``: the same memory at both sides."""
        paths, address = _apart(text)
        source, _, destination = paths.partition(":")
        if not source or not destination or ":" in destination:
            raise UsageError(f"{text!r} names not two files: write it like /dev/shm/a:/dev/shm/b@0x100000000")
        return cls(Path(source), address), cls(Path(destination), address)


def _apart(text: str) -> tuple[str, int]:
    """What comes before the last ``@``, and the address behind it."""
    name, found, number = text.rpartition("@")
    if not found:
        return text, 0
    try:
        address = int(number, 0)
    except ValueError:
        raise UsageError(f"{text!r}: {number!r} is no address") from None
    if address < 0 or address % PAGE_SIZE:
        raise UsageError(f"{text!r}: {number} is not the address of a page")
    return name, address


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """Memory that this process has mapped."""

    regions: Sequence[MemoryRegion] = ()
    files: Sequence[OwnedFd] = ()

    def map_into(self, clients: Sequence[Client]) -> None:
        """Let the devices reach it by DMA, for as long as their clients are connected."""
        for client in clients:
            for region, file in zip(self.regions, self.files, strict=True):
                client.dma_map(region.address, region.size, file.fileno())


@contextmanager
def guest_memory(specs: Sequence[MemorySpec]) -> Iterator[GuestMemory]:
    """The files of ``specs``, which nobody may cut off meanwhile: that would be a SIGBUS.

    Each is first given room for all of it. Raises OSError for one that cannot be opened and written, or that has no
    room; UsageError for one that is no memory, and for two that are the same memory.
    """
    files: list[OwnedFd] = []
    try:
        regions = [_mapped(spec, files) for spec in specs]
        spans = sorted((region.address, region.address + region.size) for region in regions)
        for (_, end), (start, _) in pairwise(spans):
            if start < end:
                raise UsageError(f"guest memory overlaps at {start:#x}")
        yield GuestMemory(regions, files)
    finally:
        for file in files:
            file.close()


def _mapped(spec: MemorySpec, files: list[OwnedFd]) -> MemoryRegion:
    files.append(OwnedFd(os.open(spec.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)))  # not to wait at a FIFO
    status = os.fstat(files[-1].fileno())
    if not stat.S_ISREG(status.st_mode) or not status.st_size or status.st_size % PAGE_SIZE:
        raise UsageError(f"{spec.path} is no memory: a file of whole pages of {PAGE_SIZE} bytes is")
    if spec.address + status.st_size > 1 << 64:
        raise UsageError(f"{spec.path}: {status.st_size:#x} bytes at {spec.address:#x} do not fit in 64 bits")
    try:
        os.posix_fallocate(files[-1].fileno(), 0, status.st_size)  # no room for it later would be a SIGBUS
        return MemoryRegion(spec.address, memoryview(mmap.mmap(files[-1].fileno(), status.st_size)))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(spec.path)) from error
