"""vfio_user.testing: what it promises to people who test their devices, shown with a device of ten lines."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vfio_user import Bar, Device, DeviceState, Irq, MigrationFlags, Region, ServerBackend, state
from vfio_user.devices.edu import DMA_COMMAND, DMA_COUNT, DMA_DESTINATION, DMA_SOURCE, DMA_START, DMA_TO_GUEST, Edu
from vfio_user.errors import CommandError, FramingError, MessageError, UnexpectedReplyError
from vfio_user.fds import OwnedFd, close_all
from vfio_user.testing import FakeGuest, no_fd_leaks, paired
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.constants import Command, PciIrq, PciRegion

pytest_plugins = ["vfio_user.testing.pytest_plugin"]
pytestmark = pytest.mark.usefixtures("fd_leak_check")

DOORBELL, COUNT, ADDRESS, FAIL = 0x0, 0x8, 0x10, 0x18
NO_TWIN = Capabilities(max_data_xfer_size=1 << 20, max_msg_fds=8)


class Counter(Device):
    """Counts doorbells, writes the count to guest memory, raises an interrupt: vector by what was written."""

    vendor_id, device_id, msix_vectors, msi_vectors, intx = 0x494F, 0x0DC8, 4, 2, True
    bars = {0: Bar(0x1000)}
    count = state(0)
    address = state(0)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        value = {COUNT: self.count, ADDRESS: self.address}.get(offset, 0)
        data[:] = value.to_bytes(8, "little")[: len(data)]

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        value = int.from_bytes(data, "little")
        if offset == ADDRESS:
            self.address = value
        elif offset == FAIL:
            raise OSError(value, "as asked")
        else:
            self.count += 1
            self.defer(lambda: self._finish(value))

    def _finish(self, vector: int) -> None:
        if self.address:
            self.dma.write(self.address, self.count.to_bytes(8, "little"))
        self.raise_interrupt(vector)


# The guest


def test_registers_of_every_width_and_region() -> None:
    with FakeGuest(Counter()) as guest:
        guest.write64(ADDRESS, 0x1122334455667788)
        assert guest.read64(ADDRESS) == 0x1122334455667788
        assert guest.read32(ADDRESS) == 0x55667788
        assert guest.read16(ADDRESS) == 0x7788
        assert guest.read8(ADDRESS) == 0x88
        assert guest.read32(0, PciRegion.CONFIG) == 0x0DC8494F
        guest.write16(4, 0x0400, PciRegion.CONFIG)
        assert guest.read16(4, PciRegion.CONFIG) == 0x0400
        guest.write8(0x3C, 11, PciRegion.CONFIG)
        assert guest.read8(0x3C, PciRegion.CONFIG) == 11
        guest.write64(ADDRESS, 0)
        guest.write32(DOORBELL, 0)
        assert guest.read32(COUNT) == 1


def test_a_value_that_does_not_fit_its_width() -> None:
    with FakeGuest(Counter()) as guest, pytest.raises(OverflowError):
        guest.write8(DOORBELL, 256)


def test_refusals_have_the_devices_errno() -> None:
    with FakeGuest(Counter()) as guest:
        with pytest.raises(CommandError) as caught:
            guest.write32(FAIL, errno.ENOSPC)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("proposal", [Capabilities(), NO_TWIN], ids=["defaults", "no twin socket"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "messages"])
def test_dma_into_guest_memory(shared: bool, proposal: Capabilities) -> None:
    """Waiting for the interrupt serves the device's requests meanwhile."""
    where = {"memory_address": 0x100000, "memory_size": 0x2000}
    with FakeGuest(Counter(), **where, shared=shared, proposal=proposal) as guest:
        assert len(guest.memory) == 0x2000
        guest.assign_interrupts(PciIrq.MSIX)
        guest.write64(ADDRESS, 0x100000 + 0x1F00)
        guest.write32(DOORBELL, 3)
        assert guest.wait_interrupt(3) == 1
        assert guest.memory[0x1F00:0x1F08].tobytes() == (1).to_bytes(8, "little")


def test_a_twin_socket_is_served_while_waiting() -> None:
    with FakeGuest(Counter(), shared=False, memory_address=0x1000) as guest:
        assert guest.client.capabilities.wants_twin_socket
        guest.assign_interrupts(PciIrq.MSI)
        guest.write64(ADDRESS, 0x1000)
        guest.write32(DOORBELL, 1)
        assert guest.wait_interrupt(1) == 1
        assert guest.memory[0] == 1


def test_memory_is_what_the_device_sees() -> None:
    with FakeGuest(Edu()) as guest:
        guest.memory[0x100:0x105] = b"hello"
        for source, destination, command in ((0x100, 0x40000, 0), (0x40000, 0x3000, DMA_TO_GUEST)):
            guest.write64(DMA_SOURCE, source)
            guest.write64(DMA_DESTINATION, destination)
            guest.write64(DMA_COUNT, 5)
            guest.write64(DMA_COMMAND, command | DMA_START)
            while guest.read32(DMA_COMMAND) & DMA_START:
                pass
        assert guest.memory[0x3000:0x3005].tobytes() == b"hello"


@pytest.mark.parametrize(("index", "vectors"), [(PciIrq.MSIX, 4), (PciIrq.MSI, 2), (PciIrq.INTX, 1)])
def test_interrupts_by_vector(index: int, vectors: int) -> None:
    with FakeGuest(Counter()) as guest:
        guest.assign_interrupts(index)
        for vector in range(vectors):
            guest.write32(DOORBELL, vector)
            assert guest.wait_interrupt(vector) == 1
            assert guest.interrupts(vector) == 0
        assert [guest.interrupts(vector) for vector in range(vectors)] == [0] * vectors


def test_interrupts_are_counted() -> None:
    with FakeGuest(Counter()) as guest:
        guest.assign_interrupts(PciIrq.MSIX, 2)
        for _ in range(3):
            guest.write32(DOORBELL, 1)
        assert guest.read32(COUNT) == 3  # its reply comes after what the writes deferred
        assert guest.interrupts(1) == 3
        guest.write32(DOORBELL, 3)
        assert guest.read32(COUNT) == 4
        assert guest.interrupts(1) == 0, "vector 3 has no eventfd: nothing arrives, anywhere"


def test_an_interrupt_that_does_not_come() -> None:
    with FakeGuest(Counter()) as guest:
        guest.assign_interrupts(PciIrq.MSIX)
        with pytest.raises(TimeoutError, match="vector 2"):
            guest.wait_interrupt(2, timeout=0.01)
        with pytest.raises(TimeoutError):
            guest.wait_interrupt(2, timeout=0)


def test_interrupts_are_assigned_anew_and_released() -> None:
    with FakeGuest(Counter()) as guest:
        guest.assign_interrupts(PciIrq.MSIX)
        guest.assign_interrupts(PciIrq.MSI)
        guest.write32(DOORBELL, 0)
        assert guest.wait_interrupt(0) == 1
        guest.release_interrupts()
        guest.write32(DOORBELL, 0)
        assert guest.read32(COUNT) == 2
        guest.release_interrupts()


def test_a_device_keeps_its_state_from_guest_to_guest() -> None:
    device = Counter()
    for expected in (1, 2, 3):
        with FakeGuest(device) as guest:
            guest.write32(DOORBELL, 0)
            assert guest.read32(COUNT) == expected


def test_a_device_is_saved_and_loaded() -> None:
    with FakeGuest(Counter()) as source, FakeGuest(Counter()) as destination:
        for _ in range(7):
            source.write32(DOORBELL, 0)
        stream = source.save()
        assert source.client.migration_get_state() == DeviceState.STOP
        destination.load(stream)
        assert destination.read32(COUNT) == 7
        assert destination.client.migration_get_state() == DeviceState.RUNNING
        with pytest.raises(CommandError):
            destination.load(stream[:-1])


def test_row_06_a_reset_leaves_the_error_state() -> None:
    """The client's column of protocol.md's section 0: it resets to leave ERROR."""

    class Fragile(ServerBackend):
        regions, irqs, resettable = (Region(0x1000),), (Irq(1),), True
        state = DeviceState.RUNNING

        def migration_flags(self) -> MigrationFlags:
            return MigrationFlags.STOP_COPY

        def migration_get_state(self) -> DeviceState:
            return self.state

        def migration_set_state(self, state: DeviceState) -> None:
            self.state = DeviceState.ERROR
            raise OSError(errno.EIO, "broken")

        def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
            close_all([fd] if fd else [])

        def dma_unmap(self, flags: int, address: int, size: int) -> None:
            pass

        def reset(self) -> None:
            self.state = DeviceState.RUNNING

    with FakeGuest(Fragile()) as guest:
        with pytest.raises(CommandError):
            guest.client.migration_set_state(DeviceState.STOP)
        assert guest.client.migration_get_state() == DeviceState.ERROR
        guest.client.reset()
        assert guest.client.migration_get_state() == DeviceState.RUNNING


def test_row_15_bits_of_a_report_are_pages_from_its_start() -> None:
    """The client's column: page n of the report is bit n % 8 of byte n // 8."""
    with FakeGuest(Counter(), memory_size=1 << 20) as guest:
        guest.client.dma_logging_start(4096)
        for page in (1, 3, 8, 77):
            guest.write64(ADDRESS, page * 4096 + 16)
            guest.write32(DOORBELL, 0)
        report = guest.client.dma_logging_report(4096, 100 * 4096, 4096)
        dirty = [n for n in range(len(report) * 8) if report[n // 8] >> n % 8 & 1]
        assert dirty == [0, 2, 7, 76]


def test_a_device_that_refuses_memory_leaves_nothing_behind() -> None:
    with no_fd_leaks(), pytest.raises(CommandError, match="DMA_MAP"):
        FakeGuest(ServerBackend())


def test_set_up_that_fails_leaves_nothing_behind() -> None:
    class Absurd(ServerBackend):
        regions = (Region(1),) * 300

    with no_fd_leaks(), pytest.raises(MessageError, match="300 regions"):
        FakeGuest(Absurd())


def test_what_the_devices_thread_fails_with_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(region: int, offset: int, data: memoryview) -> None:
        raise SystemExit(7)

    device = Counter()
    monkeypatch.setattr(device, "bar_write", interrupted)
    guest = FakeGuest(device)
    monkeypatch.setattr(device, "region_write", interrupted)
    with pytest.raises(ConnectionError):
        guest.write32(DOORBELL, 0)
    with pytest.raises(SystemExit):
        guest.close()
    guest.close()


def test_a_device_that_does_not_let_go() -> None:
    """The guest does not wait for ever; what it could not stop is the device's doing."""
    release = threading.Event()

    class Stuck(Counter):
        def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
            release.wait(20)

    guest = FakeGuest(Stuck(), timeout=0.05)
    with pytest.raises(TimeoutError):
        guest.write32(DOORBELL, 0)
    with pytest.raises(TimeoutError, match="did not let go"):
        guest.close()
    release.set()
    guest.timeout = 20.0
    guest.close()


# The fixtures


def test_the_fixture_makes_guests(fake_guest: Callable[..., FakeGuest]) -> None:
    first = fake_guest(Counter())
    second = fake_guest(Counter(), memory_size=0x1000)
    first.write32(DOORBELL, 0)
    assert (first.read32(COUNT), second.read32(COUNT)) == (1, 0)
    assert len(second.memory) == 0x1000


def test_leaks_are_found_and_named() -> None:
    fds: list[int] = []
    with pytest.raises(AssertionError, match=r"left open: \d+ \(/memfd:culprit"), no_fd_leaks():
        fds.append(os.memfd_create("culprit"))
    os.close(fds[0])


def test_descriptors_held_by_a_caught_exception_are_no_leak() -> None:
    gc.disable()
    try:
        with no_fd_leaks():
            cycle: list[Any] = [OwnedFd(os.eventfd(0))]
            cycle.append(cycle)
            del cycle
    finally:
        gc.enable()


def test_a_failure_inside_is_not_hidden_by_its_leak() -> None:
    fds: list[int] = []

    def leak_and_fail() -> None:
        fds.append(os.eventfd(0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), no_fd_leaks():
        leak_and_fail()
    os.close(fds[0])


# Paired connections


@pytest.mark.parametrize("piece", [None, 1, 7, 16])
def test_pairs_carry_commands_replies_and_descriptors(piece: int | None) -> None:
    client, server = paired(piece=piece)
    fd = os.eventfd(5)
    try:
        with client, server:
            msg_id = client.command(Command.DEVICE_SET_IRQS, [m.IrqSet(20, 0x24, 0, 0, 1).pack()], [fd])
            request = server.receive_checked()
            assert (request.msg_id, request.command) == (msg_id, Command.DEVICE_SET_IRQS)
            [arrived] = request.fds
            assert arrived.fileno() != fd
            assert os.eventfd_read(arrived.fileno()) == 5
            request.close()
            server.reply(request)
            reply = client.receive_checked()
            assert reply.msg_id == msg_id
            assert reply.is_reply
            assert not reply.is_error
            assert client.receive() is None
    finally:
        os.close(fd)


def test_pairs_refuse_and_post_and_ask_the_other_way() -> None:
    client, server = paired()
    with client, server:
        client.command(Command.DEVICE_RESET)
        client.command(Command.DEVICE_RESET, posted=True)
        server.refuse(server.receive_checked(), errno.EBUSY)
        assert not server.receive_checked().wants_reply
        reply = client.receive_checked()
        assert (reply.is_error, reply.error) == (True, errno.EBUSY)
        server.command(Command.DMA_READ, [m.DmaAccess(0, 4).pack()])
        request = client.receive_checked()
        client.reply(request, [request.payload, b"data"])
        assert bytes(server.receive_checked().payload[16:]) == b"data"


def test_pairs_check_what_comes() -> None:
    client, server = paired(negotiated=False)
    with client, server:
        client.command(Command.DEVICE_RESET)
        with pytest.raises(MessageError, match="before VERSION"):
            server.receive_checked()
        with pytest.raises(LookupError):
            client.receive_checked()
    client, server = paired()
    with client, server:
        msg_id = client.command(Command.DEVICE_RESET)
        client.connection.abandon(msg_id)
        server.reply(server.receive_checked())
        with pytest.raises(LookupError):
            client.receive_checked()
        client.command(Command.DEVICE_RESET)
        request = server.receive_checked()
        request.command = Command.VERSION
        server.reply(request)
        with pytest.raises(UnexpectedReplyError):
            client.receive_checked()


@pytest.mark.parametrize("piece", [None, 100])
def test_pairs_carry_more_than_a_framer_holds(piece: int | None) -> None:
    client, server = paired(max_size=64, piece=piece)
    with client, server:
        for number in range(50):
            client.command(Command.MIG_DATA_WRITE, [m.MigData(40, 32).pack(), bytes([number]) * 32])
        came = [message.payload[8] for _ in range(50) if (message := server.receive())]
        assert came == list(range(50))
        server.command(Command.DMA_WRITE, [m.DmaAccess(0, 200).pack(), bytes(200)])
        with pytest.raises(MessageError, match="at most 64"):
            client.receive_checked()


def test_pairs_close_the_descriptors_that_nobody_took() -> None:
    with no_fd_leaks():
        client, server = paired(piece=5)
        with client, server:
            client.command(Command.DEVICE_RESET, fds=[0])
            client.command(Command.DEVICE_RESET, fds=[1])
            request = server.receive()
            assert request is not None
            request.close()


def test_a_stream_that_cannot_be_framed() -> None:
    client, server = paired()
    with client, server:
        outgoing = client.connection.command(Command.DEVICE_RESET)[1]
        header = bytearray(outgoing.buffers[0])
        header[4:8] = bytes(4)
        client.send(outgoing._replace(buffers=[header]))
        with pytest.raises(FramingError):
            server.receive()
