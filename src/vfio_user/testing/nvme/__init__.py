"""A small NVMe driver, for tests of controllers.

- :class:`NvmeDriver` has a method for each command; ``buffers`` and :class:`Command` make what no driver would send.
- :class:`Registers`, :class:`Memory` and :class:`Interrupts` are what it works on: a client, a QEMU, or yours.
- ``workload.NvmeWorkload`` keeps a controller busy and knows what must be in every block.
"""

from vfio_user.testing.nvme.access import ClientInterrupts, Interrupts, Memory, Pages, Polling, Registers, SharedMemory
from vfio_user.testing.nvme.commands import Command, Completion, NvmeError, NvmeProtocolError, NvmeTimeoutError
from vfio_user.testing.nvme.data import Buffer
from vfio_user.testing.nvme.driver import NvmeDriver, io
from vfio_user.testing.nvme.identify import Event, IdentifyController, IdentifyNamespace
from vfio_user.testing.nvme.queues import QueuePair, Ticket

__all__ = [
    "Buffer",
    "ClientInterrupts",
    "Command",
    "Completion",
    "Event",
    "IdentifyController",
    "IdentifyNamespace",
    "Interrupts",
    "Memory",
    "NvmeDriver",
    "NvmeError",
    "NvmeProtocolError",
    "NvmeTimeoutError",
    "Pages",
    "Polling",
    "QueuePair",
    "Registers",
    "SharedMemory",
    "Ticket",
    "io",
]
