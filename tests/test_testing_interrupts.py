"""The recording line for interrupts."""

from __future__ import annotations

import pytest

from vfio_user import Device
from vfio_user.testing import no_fd_leaks, recorded_interrupts
from vfio_user.wire.constants import PciIrq


class Ringer(Device):
    vendor_id, device_id, intx, msi_vectors, msix_vectors = 0x494F, 1, True, 2, 4


@pytest.mark.parametrize("index", [PciIrq.MSI, PciIrq.MSIX])
def test_every_vector_is_heard_and_counted(index: PciIrq) -> None:
    device = Ringer()
    with no_fd_leaks(), recorded_interrupts(device, index) as interrupts:
        device.irq.trigger(1)
        device.irq.trigger(1)
        device.irq.trigger(0)
        assert interrupts.take() == {0: 1, 1: 2}
        assert interrupts.take() == {}


def test_the_level_of_intx() -> None:
    device = Ringer()
    with recorded_interrupts(device, PciIrq.INTX) as interrupts:
        device.irq.assert_()
        assert interrupts.take() == {0: 1}
        assert device.config.interrupt_status
        device.irq.deassert()
        assert interrupts.take() == {}


def test_what_is_triggered_after_the_end_is_pending() -> None:
    device = Ringer()
    with recorded_interrupts(device, PciIrq.MSIX):
        pass
    device.irq.trigger(3)
    with recorded_interrupts(device, PciIrq.MSIX) as interrupts:
        assert interrupts.take() == {3: 1}


def test_an_index_without_vectors() -> None:
    class Silent(Device):
        vendor_id, device_id = 0x494F, 2

    with recorded_interrupts(Silent(), PciIrq.MSIX) as interrupts:
        assert interrupts.take() == {}
