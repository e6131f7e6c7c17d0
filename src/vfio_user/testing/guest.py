"""A guest that is none: what it takes to drive a device in a test, without a VMM."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from types import TracebackType

from vfio_user.client import Client
from vfio_user.client.core import PROPOSAL
from vfio_user.fds import OwnedFd
from vfio_user.server import Server, ServerBackend
from vfio_user.testing.interrupts import AssignedInterrupts
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.constants import DeviceState, PciIrq, PciRegion

_CHUNK = 1 << 20


def map_memory(client: Client, size: int = 1 << 20, address: int = 0, *, shared: bool = True) -> memoryview:
    """Memory of a guest: ``size`` bytes that the device reaches by DMA from ``address`` on.

    As a shared file, or with ``shared=False`` by messages. It is there until the client leaves, or unmaps it.
    """
    with OwnedFd(os.memfd_create("vfio-user-guest", os.MFD_CLOEXEC)) as file:
        os.ftruncate(file.fileno(), size)
        memory = memoryview(mmap.mmap(file.fileno(), size))
        client.dma_map(address, size, file.fileno() if shared else None, memory=memory)
    return memory


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
        self._interrupts: AssignedInterrupts | None = None
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
            self.memory = map_memory(self.client, memory_size, memory_address, shared=shared)
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
        if self._interrupts is not None:
            self._interrupts.forget()
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
        self._interrupts = AssignedInterrupts(self.client, index, count, timeout=self.timeout)

    def release_interrupts(self) -> None:
        """Listen no longer."""
        if self._interrupts is not None:
            self._interrupts.close()
            self._interrupts = None

    def interrupts(self, vector: int = 0) -> int:
        """How often ``vector`` was signalled since the last look, without waiting."""
        return self._assigned().count(vector)

    def wait_interrupt(self, vector: int = 0, timeout: float | None = None) -> int:
        """Wait until ``vector`` is signalled; how often it was. Raises TimeoutError after ``timeout`` seconds.

        Meanwhile the device's DMA by messages is served.
        """
        return self._assigned().wait(vector, timeout)

    def _assigned(self) -> AssignedInterrupts:
        if self._interrupts is None:
            raise LookupError("assign_interrupts() comes first")
        return self._interrupts

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
