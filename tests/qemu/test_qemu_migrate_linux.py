"""Linux moves from QEMU to QEMU while it uses its devices, and does not notice.

``VFIO_USER_HOPS`` in the environment: how often each guest moves, 2 by default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vfio_user import ServerBackend
from vfio_user.devices.edu import Edu
from vfio_user.devices.nvme import Nvme
from vfio_user.live.qemu import DevicePair, Monitor, QemuMigration
from vfio_user.live.report import Report
from vfio_user.live.text import report_text
from vfio_user.testing.linux import Guest, LinuxMachine
from vfio_user.testing.qemu import QemuMachine
from vfio_user.testing.workbench import IOMMU

from .conftest import Compiler
from .migrate_support import INCOMING, TIMEOUT, Served, qmp_args
from .nvme_support import RANDOM_NUMBERS, complaints, create_image, tools

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

HOPS = int(os.environ.get("VFIO_USER_HOPS", "2"))
IF_MANY = pytest.mark.skipif(HOPS <= 2, reason="takes its time: set VFIO_USER_HOPS")
CONSOLE_COMPLAINTS = ("BUG", "WARNING", "nobody cared", "hung_task", "I/O error", "Call Trace")


class ArrivingLinux(LinuxMachine):
    """A machine into which a running Linux comes."""

    def _greet(self) -> None:
        QemuMachine._greet(self)


class Travels:
    """A Linux guest and two sets of servers, between which it goes back and forth."""

    def __init__(
        self, stack: ExitStack, qemu: Path, guest: Guest, folder: Path, here: Sequence[Served], there: Sequence[Served]
    ) -> None:
        self._stack, self._qemu, self._guest, self._folder = stack, qemu, guest, folder
        self._here, self._there = here, there
        self._monitors: dict[LinuxMachine, Path] = {}
        self._options: dict[str, Any] = {}
        self.consoles = ""
        self.cold = False

    def boot(self, *, behind_port: bool = False, **options: Any) -> LinuxMachine:
        self._options = {"behind_port": behind_port, **options}
        self.linux = self._start(LinuxMachine, self._here, [])
        return self.linux

    def _start(self, kind: type[LinuxMachine], servers: Sequence[Served], extra_args: Sequence[str]) -> LinuxMachine:
        options = dict(self._options)
        sockets = [served.path for served in servers]
        places: dict[str, Any] = {"ports": [sockets]} if options.pop("behind_port") else {"devices": sockets}
        monitor = self._folder / f"{len(self._monitors)}.qmp"
        args = [*options.pop("extra_args", ()), *qmp_args(monitor), *extra_args]
        machine = self._stack.enter_context(kind(self._qemu, self._guest, **places, extra_args=args, **options))
        self._monitors[machine] = monitor
        return machine

    def hop(self) -> Report:
        """Move the guest to the other servers, and a QEMU of its own; the one that it leaves ends."""
        with self._migration() as (job, arrived):
            list(job.run())
        self.consoles += self.linux.console
        arrived._next_id = self.linux._next_id
        self.linux._dispose(TIMEOUT)
        self.linux, self._here, self._there = arrived, self._there, self._here
        return job.report

    def failing_hop(self, moment: str) -> None:
        """Begin to, and give up when that part of the downtime is over; the QEMU that it would have come to ends."""

        def check() -> None:
            if moment in job.report.causes:
                raise KeyboardInterrupt

        with self._migration(check=check) as (job, arrived):
            with pytest.raises(KeyboardInterrupt):
                list(job.run())
            arrived._dispose(TIMEOUT)

    @contextmanager
    def _migration(self, **options: Any) -> Iterator[tuple[QemuMigration, LinuxMachine]]:
        arrived = self._start(ArrivingLinux, self._there, INCOMING)
        with ExitStack() as stack:
            pairs = [
                DevicePair(one.path.name, *(stack.enter_context(served.control()) for served in (one, other)))
                for one, other in zip(self._here, self._there, strict=True)
            ]
            source = stack.enter_context(Monitor("source", self._monitors[self.linux], TIMEOUT))
            destination = stack.enter_context(Monitor("destination", self._monitors[arrived], TIMEOUT))
            yield QemuMigration(source, destination, pairs, cold=self.cold, timeout=60.0, **options), arrived


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def travels(
    stack: ExitStack, qemu: Path, guest: Guest, folder: Path, devices: Sequence[Sequence[ServerBackend]]
) -> Travels:
    """``devices``: for each of the guest's, the one here and the one there."""
    here, there = (
        [Served(both[side], folder, f"{'ab'[side]}{number}") for number, both in enumerate(devices)] for side in (0, 1)
    )
    for served in (*here, *there):
        stack.callback(served.stop)
    return Travels(stack, qemu, guest, folder, here, there)


def bind(linux: LinuxMachine, address: str) -> str:
    """Have uio_pci_generic drive a device; its file in /dev."""
    linux.run(f"echo uio_pci_generic >/sys/bus/pci/devices/{address}/driver_override")
    linux.run(f"echo {address} >/sys/bus/pci/drivers/uio_pci_generic/bind")
    linux.run(rf"printf '\006' | dd of=/sys/bus/pci/devices/{address}/config bs=1 seek=4 conv=notrunc 2>/dev/null")
    return "/dev/" + linux.run(f"ls /sys/bus/pci/devices/{address}/uio").strip()


@pytest.mark.parametrize("behind_port", [False, True], ids=["bus 0", "root port"])
def test_a_guest_whose_devices_do_dma_and_interrupts_all_the_time(
    stack: ExitStack, qemu: Path, guest: Guest, compiled: Compiler, tmp_path: Path, behind_port: bool
) -> None:
    count = 1 if behind_port else 2
    world = travels(stack, qemu, guest, tmp_path, [(Edu(), Edu()) for _ in range(count)])
    linux = world.boot(
        behind_port=behind_port, modules=["uio_pci_generic"], files={"/bin/edu_loop": compiled("edu_loop")}
    )
    addresses = linux.port_addresses[0] if behind_port else linux.addresses
    linux.run("touch /tmp/go")
    loops = [
        linux.start(f"edu_loop /sys/bus/pci/devices/{address} {bind(linux, address)} /tmp/go") for address in addresses
    ]
    reports = [world.hop() for _ in range(HOPS)]
    if not behind_port:
        world.failing_hop("load")
    world.linux.run("rm /tmp/go")
    for loop in loops:
        loop._machine = world.linux
        assert int(loop.wait()) > 10
    for report in reports:
        print(report_text(report))
    consoles = world.consoles + world.linux.console
    assert not [line for line in consoles.splitlines() if any(word in line for word in CONSOLE_COMPLAINTS)]


WRITER = """
    while test -e /tmp/go; do
        i=$((i + 1))
        (echo "content of $i"; head -c 20000 /dev/urandom) >/mnt/file$i
        sync /mnt/file$i /mnt
        sha256sum /mnt/file$i >>/tmp/durable
        rm -f /mnt/file$((i - 50)); sed -i "/file$((i - 50))$/d" /tmp/durable
    done
    echo $i
"""
"""Writes files; notes what is durable, with its checksum."""


@pytest.mark.parametrize("iommu", [False, pytest.param(True, marks=IF_MANY)], ids=["", "IOMMU"])
def test_a_guest_that_writes_to_a_file_system_on_nvme(
    stack: ExitStack, qemu: Path, guest: Guest, tmp_path: Path, iommu: bool
) -> None:
    """MSI-X; and both servers reach the same image, one after the other."""
    image = create_image(tmp_path / "disk.img")
    disks = [stack.enter_context(closing(Nvme(path=str(image)))) for _ in range(2)]
    world = travels(stack, qemu, guest, tmp_path, [disks])
    world.cold = iommu
    linux = world.boot(
        files=tools(),
        extra_args=[*RANDOM_NUMBERS, *(IOMMU if iommu else ())],
        append="intel_iommu=on iommu.strict=1" if iommu else "",
        cpus=2,
    )
    assert ("iommu group 0" in linux.console) == iommu
    linux.wait_until("test -b /dev/nvme0n1")
    linux.run("mkfs.ext4 -q -F /dev/nvme0n1 && mkdir -p /mnt && mount /dev/nvme0n1 /mnt && touch /tmp/go")
    writer = linux.start(WRITER)
    said_at_boot = len(complaints(linux.console))
    for hop in range(HOPS):
        print(report_text(world.hop()))
        world.linux.wait_until(f"test $(wc -l </tmp/durable) -gt {2 * hop}")
    world.linux.run("rm /tmp/go")
    writer._machine = world.linux
    writer.wait()
    world.linux.run("echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /tmp/durable")
    world.linux.run("umount /mnt && e2fsck -fn /dev/nvme0n1")
    assert complaints(world.consoles + world.linux.console)[said_at_boot:] == []
