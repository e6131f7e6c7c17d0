"""Fuzz an NVMe controller: any accesses, commands and memory end in a controller that a reset makes good again.

A script of operations, one after the other: the first byte says which, what it takes follows, little-endian. Operations
that are not whole are left out.
"""

from __future__ import annotations

import logging
import os
import struct

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import SQE_SIZE
from vfio_user.fds import OwnedFd
from vfio_user.testing import FakeGuest
from vfio_user.testing.nvme import NvmeDriver, QueuePair
from vfio_user.wire.constants import PAGE_SIZE

BLOCK, BLOCKS = 512, 256
PAGES = 64
DRIVERS = 1 << 44
"""Where the driver's own memory is, out of the way."""

_ACCESS = struct.Struct("<HI")


class _Bugs(logging.Handler):
    """What was logged with an exception: a bug, wherever it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(record)


class Target:
    """A controller that lives from one input to the next, and a guest with some pages of memory at address 0."""

    def __init__(self) -> None:
        self._bugs = _Bugs()
        logger = logging.getLogger("vfio_user")
        logger.addHandler(self._bugs)
        logger.propagate = False
        self.device = Nvme(path="memory:", size=BLOCKS * BLOCK)
        self.guest = FakeGuest(self.device, memory_size=1 << 20, memory_address=DRIVERS)
        self.driver = NvmeDriver.of_client(self.guest.client, self.guest.memory, DRIVERS)
        with OwnedFd(os.memfd_create("fuzz", os.MFD_CLOEXEC)) as file:
            os.ftruncate(file.fileno(), PAGES * PAGE_SIZE)
            self._memory = OwnedFd.duplicate(file.fileno())
            self.guest.client.dma_map(0, PAGES * PAGE_SIZE, file.fileno())
        self._operations = (self._write_memory, self._write_register, self._admin_command, self._io_command)

    def close(self) -> None:
        """Give back everything."""
        self.guest.close()
        self.device.close()
        self._memory.close()
        logging.getLogger("vfio_user").removeHandler(self._bugs)

    def run(self, data: bytes) -> int:
        """Carry out a script; how many operations that were. Raises AssertionError for an exception that was logged."""
        self.driver.enable()
        self.driver.create_queue_pair(64)
        done = 0
        while data and (rest := self._operations[data[0] % len(self._operations)](data[1:])) is not None:
            data, done = rest, done + 1
        self.driver.disable()  # which waits until nothing is under way any more
        if self._bugs.found:
            record = self._bugs.found.pop()
            raise AssertionError(record.getMessage()) from (record.exc_info or (None, None))[1]
        return done

    def _write_memory(self, data: bytes) -> bytes | None:
        """A page, a number of 16 bytes, and these."""
        if len(data) < 2 or len(data) < 2 + 16 * data[1]:
            return None
        end = 2 + 16 * data[1]
        os.pwrite(self._memory.fileno(), data[2:end], data[0] % PAGES * PAGE_SIZE)
        return data[end:]

    def _write_register(self, data: bytes) -> bytes | None:
        """An offset and a value."""
        if len(data) < _ACCESS.size:
            return None
        offset, value = _ACCESS.unpack_from(data)
        self.driver.hardware.registers.write32(offset & 0x3FFC, value)
        return data[_ACCESS.size :]

    def _admin_command(self, data: bytes) -> bytes | None:
        return self._command(self.driver.admin_queue, data)

    def _io_command(self, data: bytes) -> bytes | None:
        return self._command(self.driver.queues[0], data)

    @staticmethod
    def _command(pair: QueuePair, data: bytes) -> bytes | None:
        """An entry of a queue. Nobody keeps account: other operations may have left nothing of the queues."""
        if len(data) < SQE_SIZE:
            return None
        sq = pair.sq
        pair.hardware.memory.write(sq.ring.address(sq.tail), data[:SQE_SIZE])
        sq.tail = (sq.tail + 1) % sq.size
        sq.ring_doorbell()
        pair.cq.take()
        pair.cq.ring_doorbell()
        return data[SQE_SIZE:]


_target: Target | None = None


def run(data: bytes) -> int:
    """For the fuzzer: one target for all inputs."""
    global _target
    if _target is None:
        _target = Target()
    return _target.run(data)
