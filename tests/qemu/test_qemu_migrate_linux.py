"""Linux moves from QEMU to QEMU while it uses its devices, and does not notice.

``VFIO_USER_HOPS`` in the environment: how often each guest moves, 10 by default. Most tests share a guest, which must
outlive them all: each sets it to work, and sees in the end that the work was done well.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from vfio_user.devices.edu import Edu
from vfio_user.testing.linux import Guest, GuestProcess
from vfio_user.wire.constants import PciRegion

from .conftest import Compiler
from .migrate_support import LIVENESS
from .travel_support import PATIENCE, Travels, keep_moving, lose_all

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

ABOUT_TIME = re.compile("hrtimer|clocksource|crng")
"""What a kernel says of a machine that has other things to do."""


class WatchedEdu(Edu):
    """Tells of the resets that reach it, and of the rounds that edu_loop does with it."""

    def __init__(self) -> None:
        self.resets = 0
        self._round = threading.Event()
        super().__init__()

    def on_reset(self) -> None:
        super().on_reset()
        self.resets += 1

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        super().region_write(region, offset, data)
        if region == PciRegion.BAR0 and offset == LIVENESS:
            self._round.set()

    def see_rounds(self, count: int) -> bool:
        """Whether so many are done from now on."""
        for _ in range(count):
            self._round.clear()
            if not self._round.wait(PATIENCE):
                return False
        return True


class EduGuest:
    """A guest that has its edus do DMA and interrupts all the time, and compares every page."""

    def __init__(self, world: Travels, compiled: Compiler, *, behind_port: bool) -> None:
        self.world = world
        world.boot(behind_port=behind_port, modules=["uio_pci_generic"], files={"/bin/edu_loop": compiled("edu_loop")})
        self.bind()

    def bind(self) -> None:
        """Have uio_pci_generic drive the devices."""
        linux = self.world.linux
        for address in self.world.addresses:
            device = f"/sys/bus/pci/devices/{address}"
            linux.run(f"echo uio_pci_generic >{device}/driver_override")
            linux.run(f"echo {address} >/sys/bus/pci/drivers/uio_pci_generic/bind")
            linux.run(rf"printf '\006' | dd of={device}/config bs=1 seek=4 conv=notrunc 2>/dev/null")

    def work(self) -> None:
        self._said_before = len(self.world.console.splitlines())
        self.world.linux.run("touch /tmp/go")
        self._loops = [self._loop(address) for address in self.world.addresses]
        self.go_on()

    def _loop(self, address: str) -> GuestProcess:
        device = f"/sys/bus/pci/devices/{address}"
        uio = "/dev/" + self.world.linux.run(f"ls {device}/uio").strip()
        return self.world.start(f"edu_loop {device} {uio} /tmp/go")

    def go_on(self) -> None:
        """Return when the guest has done more with each of the devices that it has now."""
        if not all(device.see_rounds(2) for device in self.devices):
            self.end()  # which may say why
            raise AssertionError("a device is used no more")

    @property
    def devices(self) -> list[WatchedEdu]:
        return cast("list[WatchedEdu]", self.world.devices)

    def end(self) -> None:
        """All were content to the end, and the kernel has nothing to say."""
        self.world.linux.run("rm /tmp/go")
        for loop in self._loops:
            assert int(loop.wait()) > 10
        said = self.world.console.splitlines()[self._said_before :]
        assert [line for line in said if not ABOUT_TIME.search(line)] == []


@pytest.fixture(scope="module")
def edus(qemu: Path, guest: Guest, compiled: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EduGuest]:
    """One, behind a root port."""
    with ExitStack() as stack:
        world = Travels(stack, qemu, guest, tmp_path_factory.mktemp("edu"), [WatchedEdu])
        yield EduGuest(world, compiled, behind_port=True)


def test_a_guest_whose_device_does_dma_and_interrupts_all_the_time(edus: EduGuest) -> None:
    keep_moving(edus)


def test_a_guest_with_two_devices(qemu: Path, guest: Guest, compiled: Compiler, tmp_path: Path) -> None:
    with ExitStack() as stack:
        world = Travels(stack, qemu, guest, tmp_path, [WatchedEdu, WatchedEdu])
        keep_moving(EduGuest(world, compiled, behind_port=False))


def test_a_guest_that_reboots_where_it_has_moved_to(edus: EduGuest) -> None:
    edus.work()
    edus.world.hop()
    (device,) = edus.devices
    before = device.resets
    edus.world.reboot()
    assert device.resets > before
    assert (device.liveness, device.irq.asserted) == (0, False)
    edus.bind()
    keep_moving(edus, 1)


LOSSES = [
    ("the destination's server", "push", False),
    ("the destination's server", "load", False),
    ("the destination's QEMU", "pre-copy", False),
    ("the destination's QEMU", "switch", False),
    ("the destination's QEMU", "programming", False),
    ("the user's patience", "programming", False),
    ("the controller", "save", False),
    ("the controller", "programming", False),
    ("the controller", "the last", True),
    ("the source's server", "save", True),
    ("the source's server", "programming", True),
]
"""Who is lost, when, and whether the guest moves all the same."""


def test_a_guest_at_work_goes_on_in_one_place_whoever_is_lost(edus: EduGuest) -> None:
    lose_all(edus, LOSSES)
