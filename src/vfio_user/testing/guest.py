"""A guest that is none: what it takes to drive a device in a test, without a VMM."""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
import time
from types import TracebackType

from vfio_user.client import Client
from vfio_user.client.core import PROPOSAL
from vfio_user.fds import OwnedFd, close_all
from vfio_user.server import Server, ServerBackend
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.constants import DeviceState, IrqSetFlags, PciIrq, PciRegion

_ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
_CHUNK = 1 << 20


class FakeGuest:
    """Guest memory, register accesses and interrupts for one device, which is served in a thread.

    ::

        with FakeGuest(Edu()) as guest:
            guest.write32(0x04, 0x1234)
            assert guest.read32(0x04) == 0xFFFFEDCB

    ``memory`` is the guest's memory, ``memory_size`` bytes that the device reaches by DMA from ``memory_address`` on:
    as a shared file, or with ``shared=False`` by messages. ``client`` is the connection, for everything else.
    ``timeout`` in seconds, for every call and every wait. Registers are little-endian; offsets are in bytes, in BAR0
    unless another ``region`` is given (PciRegion). Calls raise what the client's raise: an OSError with the errno
    that the device refused with.

    Leaving the ``with`` block disconnects; the device is the caller's and keeps its state, so that another guest can
    follow. What goes wrong in the server's thread is raised there.
    """

    def __init__(
        self,
        device: ServerBackend,
        *,
        memory_size: int = 1 << 20,
        memory_address: int = 0,
        shared: bool = True,
        timeout: float = 10.0,
        proposal: Capabilities = PROPOSAL,
    ) -> None:
        self.timeout = timeout
        self.memory_address = memory_address
        self._vectors: list[OwnedFd] = []
        self._error: BaseException | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server = Server(device, sock=theirs)
        self._thread = threading.Thread(target=self._serve, name="vfio-user guest's device", daemon=True)
        self._thread.start()
        try:
            self.client = Client(ours, timeout, proposal=proposal)
        except BaseException:
            self._stop_server()
            raise
        try:
            with OwnedFd(os.memfd_create("vfio-user-guest", os.MFD_CLOEXEC)) as file:
                os.ftruncate(file.fileno(), memory_size)
                self.memory = memoryview(mmap.mmap(file.fileno(), memory_size))
                backing = {"fd": file.fileno()} if shared else {}
                self.client.dma_map(memory_address, memory_size, **backing, memory=self.memory)
        except BaseException:
            self.close()
            raise

    def _serve(self) -> None:
        try:
            self._server.serve_forever()
        except BaseException as error:
            self._error = error

    def close(self) -> None:
        """Disconnect. Raises what the server's thread failed with."""
        self.client.close()
        close_all(self._vectors)
        self._stop_server()

    def _stop_server(self) -> None:
        self._server.shutdown()
        self._thread.join(self.timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the device did not let go of its client in {self.timeout} s")
        self._server.close()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> FakeGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Registers

    def read(self, offset: int, size: int, region: int = PciRegion.BAR0) -> int:
        """The value of ``size`` bytes at ``offset``."""
        return int.from_bytes(self.client.region_read(region, offset, size), "little")

    def write(self, offset: int, value: int, size: int, region: int = PciRegion.BAR0) -> None:
        """Write ``value`` as ``size`` bytes at ``offset``. Raises OverflowError where it does not fit."""
        self.client.region_write(region, offset, value.to_bytes(size, "little"))

    def read8(self, offset: int, region: int = PciRegion.BAR0) -> int:
        return self.read(offset, 1, region)

    def read16(self, offset: int, region: int = PciRegion.BAR0) -> int:
        return self.read(offset, 2, region)

    def read32(self, offset: int, region: int = PciRegion.BAR0) -> int:
        return self.read(offset, 4, region)

    def read64(self, offset: int, region: int = PciRegion.BAR0) -> int:
        return self.read(offset, 8, region)

    def write8(self, offset: int, value: int, region: int = PciRegion.BAR0) -> None:
        self.write(offset, value, 1, region)

    def write16(self, offset: int, value: int, region: int = PciRegion.BAR0) -> None:
        self.write(offset, value, 2, region)

    def write32(self, offset: int, value: int, region: int = PciRegion.BAR0) -> None:
        self.write(offset, value, 4, region)

    def write64(self, offset: int, value: int, region: int = PciRegion.BAR0) -> None:
        self.write(offset, value, 8, region)

    def reset(self) -> None:
        """Reset the device, as the VMM does when its machine is reset."""
        self.client.reset()

    # Interrupts

    def assign_interrupts(self, index: int = PciIrq.INTX, count: int | None = None) -> None:
        """Listen for the first ``count`` vectors of ``index`` (PciIrq), or for all; no longer for those before."""
        self.release_interrupts()
        vectors = self.client.irqs[index].count if count is None else count
        self._vectors = [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in range(vectors)]
        self.client.set_irqs(index, _ASSIGN, 0, vectors, [fd.fileno() for fd in self._vectors])
        self._index = index

    def release_interrupts(self) -> None:
        """Listen no longer."""
        if self._vectors:
            self.client.set_irqs(self._index, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0)
        close_all(self._vectors)
        self._vectors = []

    def interrupts(self, vector: int = 0) -> int:
        """How often ``vector`` was signalled since the last look, without waiting."""
        try:
            return os.eventfd_read(self._vectors[vector].fileno())
        except BlockingIOError:
            return 0

    def wait_interrupt(self, vector: int = 0, timeout: float | None = None) -> int:
        """Wait until ``vector`` is signalled; how often it was. Raises TimeoutError after ``timeout`` seconds.

        Meanwhile the device's DMA by messages is served.
        """
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._vectors[vector].fileno(), select.POLLIN)
        poll.register(self.client.fileno(), select.POLLIN)
        while not (count := self.interrupts(vector)):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no interrupt on vector {vector} in {seconds} s")
            if self.client.fileno() in dict(poll.poll(left * 1000)):
                self.client.serve_dma()
        return count

    # Migration

    def save(self) -> bytes:
        """Stop the device and take its migration stream; it stays in STOP."""
        self.client.migration_set_state(DeviceState.STOP_COPY)
        stream = bytearray()
        while part := self.client.migration_read_data(_CHUNK):
            stream += part
        self.client.migration_set_state(DeviceState.STOP)
        return bytes(stream)

    def load(self, stream: bytes) -> None:
        """Have the device become what ``stream`` says, and run."""
        self.client.migration_set_state(DeviceState.RESUMING)
        self.client.migration_write_data(stream)
        self.client.migration_set_state(DeviceState.RUNNING)
