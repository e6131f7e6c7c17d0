"""Accesses to a BAR that has several things in it, and what a reset or a stop makes of doorbells and interrupts."""

from __future__ import annotations

import pytest

from vfio_user import Bar, Device, register
from vfio_user.fds import OwnedFd
from vfio_user.pci import Interrupts, Register, RegisterFile
from vfio_user.pci.interrupts import ACTION_TRIGGER, DATA_EVENTFD, MSI
from vfio_user.testing import FakeGuest

from .device_support import events

PAGE = 4096
FIRST, SECOND, LAST = 0x1000, 0x2000, 0x3000


class Mixed(Device):
    """Trapped, mapped, trapped, mapped, a page each; what the device's own code was asked for is in ``asked``."""

    vendor_id, device_id = 0x494F, 0x313D
    bars = {0: Bar(4 * PAGE, memory=True, trapped=((0, PAGE), (SECOND, PAGE)))}
    first = register(0, reset=0x11111111, writable=2**32 - 1)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []
        self.memory[0][:] = b"\xee" * (4 * PAGE)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        self.asked.append((offset, len(data)))
        data[:] = b"T" * len(data)

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        self.asked.append((offset, len(data)))


def test_an_access_across_memory_and_trapped_pages_reaches_both() -> None:
    device = Mixed()
    with FakeGuest(device) as guest:
        read = guest.client.region_read
        assert read(0, FIRST - 4, 8) == b"TTTT\xee\xee\xee\xee"
        assert read(0, SECOND - 2, PAGE + 4) == b"\xee\xee" + b"T" * PAGE + b"\xee\xee"
        assert read(0, 0, FIRST + 4) == b"\x11" * 4 + bytes(FIRST - 4) + b"\xee" * 4  # beside a register: zeros
        device.asked.clear()
        guest.client.region_write(0, SECOND - 4, b"abcdefgh")
    assert device.asked == [(SECOND, 4)]
    assert bytes(device.memory[0][SECOND - 4 : SECOND + 4]) == b"abcd\xee\xee\xee\xee"


@pytest.mark.parametrize("enabled", [1, 2, 4])
def test_an_msi_beyond_what_the_guest_enabled_shares_a_vector(enabled: int) -> None:
    """PCI: the function uses only as many low bits of the data as there are vectors enabled."""
    irq = Interrupts((0, 4, 0, 0, 0))
    with events(enabled) as listeners:
        fds = [OwnedFd.duplicate(one.fd) for one in listeners]
        irq.set_irqs(MSI, ACTION_TRIGGER | DATA_EVENTFD, 0, enabled, fds)
        for vector in range(4):
            irq.trigger(vector)
        assert [one.take() for one in listeners] == [4 // enabled] * enabled
        irq.release_fds()


def test_a_strobe_is_never_stored() -> None:
    file = RegisterFile(4, [Register(0, 4, "bell", strobe=0xF0)])
    with pytest.raises(ValueError, match="bits 0x10 of 0x11 are strobes"):
        file.set("bell", 0x11)
    with pytest.raises(ValueError, match="strobes"):
        file.load({"bell": b"\x10\0\0\0"})
    file.write(0, b"\xff\0\0\0")
    assert file.get("bell") == 0
