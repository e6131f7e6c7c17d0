"""Tests of a device, by the fixtures of vfio-user's pytest plugin: pytest examples/test_my_device.py"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from vfio_user import Bar, Client, Device, register
from vfio_user.testing import AssignedInterrupts, FakeGuest, ServedDevice
from vfio_user.testing.qtest import QtestMachine
from vfio_user.wire.constants import PciIrq, PciRegion

STEP, BELL, ADDRESS, COUNT = 0x0, 0x4, 0x8, 0x10
BAR = 0xE000_0000


class MyDevice(Device):
    """Each ring of the bell counts, writes the count to the guest's memory and raises an interrupt."""

    vendor_id, device_id, msix_vectors, intx = 0x494F, 0x0DC9, 1, True
    bars = {0: Bar(0x1000)}
    step = register(STEP, reset=1, writable=0xFFFF)
    bell = register(BELL, strobe=0xFFFFFFFF)
    address = register(ADDRESS, width=8, writable=2**64 - 1)
    count = register(COUNT)

    @bell.on_write
    def ring(self, old: int, new: int) -> None:
        self.count += self.step
        self.defer(self.tell)  # reply first, DMA after: the client may be needed for it

    def tell(self) -> None:
        self.dma.write(self.address, self.count.to_bytes(4, "little"))
        self.irq.trigger()


pytestmark = pytest.mark.usefixtures("vfio_user_fd_leak_check")


def test_a_guest_rings(vfio_user_guest: Callable[..., FakeGuest]) -> None:
    guest = vfio_user_guest(MyDevice())
    guest.assign_interrupts(PciIrq.MSIX)
    guest.write32(STEP, 5)
    guest.write64(ADDRESS, 0x1000)
    guest.write32(BELL, 1)
    assert guest.wait_interrupt() == 1
    assert bytes(guest.memory[0x1000:0x1004]) == b"\x05\0\0\0"


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "DMA by messages"])
def test_a_client_rings(
    shared: bool,
    vfio_user_server: Callable[..., ServedDevice],
    vfio_user_client: Callable[..., Client],
    vfio_user_memory: Callable[..., memoryview],
    vfio_user_interrupts: Callable[..., AssignedInterrupts],
) -> None:
    client = vfio_user_client(vfio_user_server(MyDevice()))
    memory = vfio_user_memory(client, 0x2000, shared=shared)
    interrupts = vfio_user_interrupts(client, PciIrq.MSIX)
    client.region_write(PciRegion.BAR0, BELL, b"\1\0\0\0")
    assert interrupts.wait() == 1
    assert interrupts.take() == {}
    assert bytes(memory[:4]) == b"\1\0\0\0"


def test_what_is_not_there_is_refused(
    vfio_user_server: Callable[..., ServedDevice], vfio_user_client: Callable[..., Client]
) -> None:
    client = vfio_user_client(vfio_user_server(MyDevice()))
    with pytest.raises(OSError, match="REGION_READ refused") as refused:
        client.region_read(PciRegion.BAR0, 0x1000, 4)
    assert refused.value.errno == errno.EINVAL


def test_it_moves_with_its_count(vfio_user_guest: Callable[..., FakeGuest]) -> None:
    first, second = vfio_user_guest(MyDevice()), vfio_user_guest(MyDevice())
    first.write32(BELL, 1)
    second.load(first.save())
    assert second.read32(COUNT) == 1


def test_qemu_rings(vfio_user_qemu: Callable[..., QtestMachine]) -> None:
    machine = vfio_user_qemu(MyDevice())
    machine.map_bar(machine.devfns[0], 0, BAR)
    machine.writel(BAR + ADDRESS, 0x1000)
    machine.writel(BAR + BELL, 1)
    machine.wait_until("the count is in memory", lambda: machine.readl(0x1000) == 1)
