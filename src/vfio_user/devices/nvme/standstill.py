"""What has a controller stand still though it is enabled, and whether the memory of its queues is there."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from enum import Flag, auto

from vfio_user.devices.nvme.constants import CQE_SIZE, SQE_SIZE
from vfio_user.devices.nvme.execution import Executor
from vfio_user.devices.nvme.queues import Ring
from vfio_user.dma.memory import GuestMemory

Spans = Iterable[tuple[int, int]]
"""(address, size) in bytes, in the guest's memory."""


class Halt(Flag):
    """Why nothing new is begun."""

    MIGRATION = auto()
    """The device is stopped."""
    QUIESCE = auto()
    """Somebody waits for what is under way."""
    BUS_MASTER = auto()
    """The host does not allow it DMA, by the PCI command register, or has it sleep."""
    MEMORY = auto()
    """Some of the queues' memory was taken away: until all of it is back, or the host rings."""
    CLIENT = auto()
    """The client left. The next one may be another guest's, with other memory in the same place: until it rings."""


HOST_RINGS = Halt.MEMORY | Halt.CLIENT
"""What is over when the host rings: it knows of the queues, and where they are."""


def queue_memory(executor: Executor, page_size: int) -> Iterator[tuple[int, int]]:
    """Where the queues of a controller are, and the buffers that mirror their doorbells."""
    for entry_size, queues in ((SQE_SIZE, executor.submissions), (CQE_SIZE, executor.completions)):
        for queue in queues.values():
            yield from _pieces(queue.ring, entry_size)
    if executor.doorbells is not None:
        yield executor.doorbells.shadow, page_size
        yield executor.doorbells.events, page_size


def _pieces(ring: Ring, entry_size: int) -> Iterator[tuple[int, int]]:
    for number, address in enumerate(ring.pieces):
        yield address, entry_size * min(ring.per_piece, ring.size - number * ring.per_piece)


def overlaps(spans: Spans, address: int, size: int) -> bool:
    """Whether there are bytes of ``spans`` among ``size`` from ``address`` on."""
    return any(start < address + size and address < start + length for start, length in spans)


def is_mapped(memory: GuestMemory, spans: Spans) -> bool:
    """Whether all of it is somewhere, in whatever way it can be reached."""
    return all(_is_there(memory, address, size) for address, size in spans)


def _is_there(memory: GuestMemory, address: int, size: int) -> bool:
    try:
        with memory.view(address, size):
            return True
    except OSError as error:
        return error.errno != errno.EFAULT
