"""Linux moves from QEMU to QEMU while it writes to a file system on nvme, and nothing that it made durable is lost.

As test_qemu_migrate_linux.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from vfio_user.devices.nvme import Nvme
from vfio_user.testing.linux import Guest
from vfio_user.testing.workbench import IOMMU

from .nvme_support import RANDOM_NUMBERS, complaints, create_image, tools
from .travel_support import HOPS, Travels, keep_moving, lose_all

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

WRITER = """
    while test -e /tmp/go; do
        i=$((i + 1))
        (echo "content of $i"; head -c 20000 /dev/urandom) >/mnt/file$i
        sync /mnt/file$i /mnt
        sha256sum /mnt/file$i >>/tmp/durable
        rm -f /mnt/file$((i - 50)); sed -i "/file$((i - 50))$/d" /tmp/durable
        echo $i >/tmp/written
    done
"""
"""Writes files; notes what is durable, with its checksum."""


class NvmeGuest:
    """A guest with ext4 on a disk that both servers reach, one after the other, and a writer that makes all durable."""

    def __init__(self, stack: ExitStack, qemu: Path, guest: Guest, folder: Path, *, iommu: bool = False) -> None:
        image = create_image(folder / "disk.img")

        def make() -> Nvme:
            return stack.enter_context(closing(Nvme(path=str(image))))

        self.world = Travels(stack, qemu, guest, folder, [make], cold=iommu)
        linux = self.world.boot(
            files=tools(),
            extra_args=[*RANDOM_NUMBERS, *(IOMMU if iommu else ())],
            append="intel_iommu=on iommu.strict=1" if iommu else "",
            cpus=2,
        )
        assert ("iommu group 0" in linux.console) == iommu
        linux.wait_until("test -b /dev/nvme0n1")
        linux.run("mkfs.ext4 -q -F /dev/nvme0n1")
        self._said_at_boot = len(complaints(linux.console))

    def work(self) -> None:
        self.mount()
        self.world.linux.run("rm -rf /mnt/* /tmp/durable /tmp/written; touch /tmp/go /tmp/written")
        self._writer = self.world.start(WRITER)
        self.go_on()

    def mount(self) -> None:
        self.world.linux.run("mkdir -p /mnt && mount /dev/nvme0n1 /mnt")

    def go_on(self) -> None:
        """Return when more is durable."""
        self.world.wait_progress("/tmp/written")

    def rest(self) -> None:
        """Write no more. All that is durable is there."""
        self.world.linux.run("rm /tmp/go")
        self._writer.wait()
        self.compare("/tmp/durable")

    def compare(self, sums: str) -> None:
        self.world.linux.run(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum -c {sums}")

    def end(self) -> None:
        """All is there, the file system is whole, and the kernel content."""
        self.rest()
        self.check()

    def check(self) -> None:
        self.world.linux.run("umount /mnt && e2fsck -fn /dev/nvme0n1")
        assert complaints(self.world.console)[self._said_at_boot :] == []


@pytest.fixture(scope="module")
def disk(qemu: Path, guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NvmeGuest]:
    with ExitStack() as stack:
        yield NvmeGuest(stack, qemu, guest, tmp_path_factory.mktemp("nvme"))


def test_a_guest_that_writes_to_a_file_system_on_nvme(disk: NvmeGuest) -> None:
    keep_moving(disk)


def test_the_same_behind_an_iommu(qemu: Path, guest: Guest, tmp_path: Path) -> None:
    """Strict, with interrupt remapping."""
    with ExitStack() as stack:
        keep_moving(NvmeGuest(stack, qemu, guest, tmp_path, iommu=True), max(2, HOPS // 5))


def test_a_guest_that_reboots_where_it_has_moved_to_finds_its_files(disk: NvmeGuest) -> None:
    """It does so while they are mounted: the journal is what brings them back."""
    disk.work()
    disk.world.hop()
    disk.go_on()
    disk.rest()
    disk.world.linux.run("cp /tmp/durable /mnt/durable && sync /mnt/durable /mnt")
    disk.world.reboot()
    disk.world.linux.wait_until("test -b /dev/nvme0n1")
    disk.mount()
    disk.compare("/mnt/durable")
    disk.check()
    keep_moving(disk, 1)


def test_a_file_system_is_whole_whoever_is_lost(disk: NvmeGuest) -> None:
    losses = [
        ("the destination's server", "load", False),
        ("the destination's QEMU", "programming", False),
        ("the controller", "load", False),
        ("the controller", "the last", True),
        ("the source's server", "switch", True),
    ]
    lose_all(disk, losses)
