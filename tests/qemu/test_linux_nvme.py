"""Linux's own NVMe driver and tools with a disk of ours. The tests share one guest; each leaves the disk idle.

Linux must have nothing to complain of meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.nvme_gate_support import until
from vfio_user.devices.nvme import Nvme, execution
from vfio_user.devices.nvme.constants import Status
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.filters import Stats
from vfio_user.testing.linux import Guest, GuestCommandError, LinuxMachine

from .conftest import linux_machines, serving
from .nvme_support import (
    MIB,
    RANDOM_NUMBERS,
    REFERENCE,
    SECTOR,
    SIZE,
    TIMEOUT,
    Disk,
    complaints,
    create_image,
    reference_args,
    tools,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

CPUS = 2
BLOCK = 4096
TEXT = b"what is written to a disk can be read from it\n"


@dataclass(frozen=True)
class Served:
    """A controller of ours, and what counts the accesses to it."""

    device: Nvme
    stats: Stats


@dataclass(frozen=True)
class World:
    """A guest with a disk; None is behind QEMU's own controller."""

    disk: Disk
    served: Served | None


@pytest.fixture(scope="module")
def world(qemu: Path, guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    image = create_image(tmp_path_factory.mktemp("images") / "disk.img")
    sockets = tmp_path_factory.mktemp("sockets")
    with controller(image) as served, serving(sockets) as serve, linux_machines(qemu, guest) as start:
        linux = start(
            [] if served is None else [serve(served.stats)],
            cpus=CPUS,
            files=tools(),
            extra_args=[*RANDOM_NUMBERS, *(reference_args([image]) if served is None else [])],
        )
        linux.wait_until("test -b /dev/nvme0n1")
        yield World(Disk(linux, image), served)


@contextlib.contextmanager
def controller(image: Path) -> Iterator[Served | None]:
    """A controller of ours, or None if QEMU's own is to be used."""
    if REFERENCE:
        yield None
        return
    with contextlib.closing(Nvme(path=str(image))) as device:
        yield Served(device, Stats(device))


@pytest.fixture
def served(world: World) -> Served:
    if world.served is None:
        pytest.skip("QEMU's own controller does not do this")
    return world.served


@pytest.fixture(autouse=True)
def disk(world: World) -> Iterator[Disk]:
    """The disk; when the test ends, Linux has said nothing ill of it."""
    before = len(world.disk.linux.console)
    yield world.disk
    assert complaints(world.disk.linux.console[before:]) == []


@pytest.fixture
def linux(disk: Disk) -> LinuxMachine:
    return disk.linux


@contextlib.contextmanager
def mounted(linux: LinuxMachine, partition: str) -> Iterator[str]:
    linux.run(f"mkdir -p /mnt && mount {partition} /mnt")
    try:
        yield "/mnt"
    finally:
        linux.run("umount /mnt")


# What Linux finds


def test_the_driver_starts_without_a_complaint_with_a_vector_per_queue(disk: Disk, linux: LinuxMachine) -> None:
    assert f"nvme nvme0: {CPUS}/0/0 default/read/poll queues" in linux.console
    assert complaints(linux.console) == []
    assert int(linux.run("cat /sys/block/nvme0n1/size")) == SIZE // SECTOR
    kinds = {name: kind.split("-0000")[0] for name, (kind, _) in disk.interrupts().items()}
    assert kinds == dict.fromkeys(("nvme0q0", "nvme0q1", "nvme0q2"), "PCI-MSIX")


def test_the_tools_find_what_is_there(disk: Disk, linux: LinuxMachine) -> None:
    controller = disk.nvme("id-ctrl")
    assert (controller["ver"], controller["sqes"], controller["cqes"]) == (0x10400, 0x66, 0x44)
    namespace = disk.nvme("id-ns", disk.namespace)
    assert namespace["nsze"] == namespace["ncap"] == SIZE // SECTOR
    assert disk.nvme("list-ns") == {"nsid_list": [{"nsid": 1}]}
    (listed,) = disk.nvme("list", disk.namespace)["Devices"]
    assert (listed["PhysicalSize"], listed["SectorSize"]) == (SIZE, SECTOR)
    assert listed["SerialNumber"] == controller["sn"].strip() != ""


def test_the_logs_can_be_read(disk: Disk, linux: LinuxMachine) -> None:
    before = disk.nvme("smart-log")
    linux.run(f"dd if={disk.namespace} of=/dev/null bs={SECTOR} count=3 iflag=direct")
    after = disk.nvme("smart-log")
    assert after["host_read_commands"] == before["host_read_commands"] + 3
    assert after["critical_warning"] == after["media_errors"] == 0
    assert 273 < after["temperature"] < 373
    assert disk.nvme("fw-log")["nvme0"]["Active Firmware Slot (afi)"] == 1
    linux.run(f"nvme get-log {disk.controller} -i 4 -l 4096")  # unlike the next one, this takes note of what it reads
    assert disk.nvme("changed-ns-list-log")["nvme0"] == {}  # nothing has changed since


@pytest.mark.usefixtures("served")
def test_the_error_log_has_what_failed(disk: Disk, linux: LinuxMachine) -> None:
    before = disk.nvme("error-log")["errors"][0]["error_count"]
    assert linux.execute(f"nvme verify {disk.namespace} -s {SIZE // SECTOR} -c 0")[0] != 0
    error = disk.nvme("error-log")["errors"][0]
    assert error["error_count"] > before  # nvme itself asks for what a controller of 1.4 does not have
    assert (error["nsid"], error["lba"], error["status_field"] & 0x7FF) == (1, SIZE // SECTOR, 0x80)


def test_features_can_be_read_and_set(disk: Disk, linux: LinuxMachine) -> None:
    queues = feature(disk, 7)
    assert queues & 0xFFFF == queues >> 16 >= CPUS - 1
    for cached in (0, 1):
        linux.run(f"nvme set-feature {disk.controller} -f 6 -V {cached}")
        assert feature(disk, 6) == cached


def feature(disk: Disk, number: int) -> int:
    """The current value of a feature."""
    return int(disk.nvme("get-feature", f"-f {number}")[f"feature: {number:#04x}"][0]["Current"], 16)


# Data


def test_a_file_system_keeps_what_is_written(disk: Disk, linux: LinuxMachine) -> None:
    """64 MiB through a partition and ext4 to the image, and back from there."""
    linux.run(f"printf 'o\\nn\\np\\n1\\n\\n\\nw\\n' | fdisk {disk.namespace}")
    partition = f"{disk.namespace}p1"
    linux.run(f"mkfs.ext4 -q -F {partition}")
    linux.run("dd if=/dev/urandom of=/tmp/random bs=1M count=8")
    # No two blocks are the same: each copy is shifted by what is before it.
    parts = "for i in 1 2 3 4 5 6 7 8; do cat /tmp/random; echo $i; done"
    expected = linux.run(f"({parts}) | sha256sum")
    with mounted(linux, partition) as folder:
        linux.run(f"({parts}) >{folder}/file; sync; echo 3 >/proc/sys/vm/drop_caches")
        read = disk.nvme("smart-log")["data_units_read"]
        assert linux.run(f"sha256sum <{folder}/file") == expected
        assert disk.nvme("smart-log")["data_units_read"] - read >= 64 * MIB // 512_000
    linux.run("rm /tmp/random")
    linux.run(f"e2fsck -fn {partition}")


def test_what_the_guest_writes_is_in_the_image_and_the_other_way_round(disk: Disk, linux: LinuxMachine) -> None:
    there, back = 128 * MIB, 160 * MIB
    linux.run("dd if=/dev/urandom of=/tmp/random bs=1M count=3")
    digest = linux.run("sha256sum </tmp/random").split()[0]
    linux.run(f"dd if=/tmp/random of={disk.namespace} bs=1M seek={there // MIB} oflag=direct conv=fsync,notrunc")
    with disk.image.open("r+b", buffering=0) as image:
        data = os.pread(image.fileno(), 3 * MIB, there)
        assert hashlib.sha256(data).hexdigest() == digest
        os.pwrite(image.fileno(), data, back)
    read = f"dd if={disk.namespace} bs=1M skip={back // MIB} count=3 iflag=direct"
    assert linux.run(f"{read} 2>/dev/null | sha256sum").split()[0] == digest


def test_single_sectors_and_odd_numbers_of_them(disk: Disk, linux: LinuxMachine) -> None:
    start = 100 * MIB // SECTOR
    linux.run(f"dd if=/dev/urandom of=/tmp/odd bs={SECTOR} count=257")
    for count, size in ((257, 1), (1, 257)):
        blocks = f"bs={SECTOR * size} count={count}"
        linux.run(f"dd if=/tmp/odd of={disk.namespace} {blocks} seek={start // size} oflag=direct conv=notrunc")
        linux.run(f"dd if={disk.namespace} of=/tmp/back {blocks} skip={start // size} iflag=direct")
        linux.run("cmp /tmp/odd /tmp/back")


# Commands


def write_block(disk: Disk, block: int) -> str:
    """Write random data to a block; the file that has it."""
    disk.linux.run(f"dd if=/dev/urandom of=/tmp/block bs={BLOCK} count=1")
    disk.linux.run(f"nvme write {disk.namespace} {blocks(block)} -z {BLOCK} -d /tmp/block")
    return "/tmp/block"


def blocks(block: int, count: int = 1) -> str:
    """A range of 4096-byte blocks, as arguments of nvme."""
    sectors = BLOCK // SECTOR
    return f"-s {block * sectors} -c {count * sectors - 1}"


def reads_zeros(disk: Disk, block: int) -> bool:
    disk.linux.run(f"nvme read {disk.namespace} {blocks(block)} -z {BLOCK} -d /tmp/read")
    return disk.linux.execute(f"cmp -s -n {BLOCK} /tmp/read /dev/zero")[0] == 0


def test_compare_and_verify(disk: Disk, linux: LinuxMachine) -> None:
    written = write_block(disk, 1000)
    assert "Success" in linux.run(f"nvme compare {disk.namespace} {blocks(1000)} -z {BLOCK} -d {written}")
    with pytest.raises(GuestCommandError, match=r"Compare Failure.*\(0x.285\)"):
        linux.run(f"nvme compare {disk.namespace} {blocks(1001)} -z {BLOCK} -d {written}")
    assert "Success" in linux.run(f"nvme verify {disk.namespace} {blocks(1000)}")


def test_flush(disk: Disk, linux: LinuxMachine) -> None:
    assert "success" in linux.run(f"nvme flush {disk.namespace}")


def test_write_zeroes(disk: Disk, linux: LinuxMachine) -> None:
    write_block(disk, 1000)
    assert not reads_zeros(disk, 1000)
    linux.run(f"nvme write-zeroes {disk.namespace} {blocks(1000)}")
    assert reads_zeros(disk, 1000)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (f"read {{namespace}} -s {SIZE // SECTOR} -c 0 -z {SECTOR} -d /tmp/x", "LBA Out of Range"),
        (f"write-zeroes {{namespace}} -s {SIZE // SECTOR - 1} -c 1", "LBA Out of Range"),
        ("admin-passthru {controller} --opcode=0x7f", "Invalid Command Opcode"),
        ("io-passthru {namespace} --opcode=0x7f -n 1", "Invalid Command Opcode"),
        ("get-log {controller} -i 0x99 -l 64", "Invalid (Field in Command|Log Page)"),
        ("get-feature {controller} -f 0x7f", "Invalid Field in Command"),
        ("id-ns {controller} -n 0x7fffffff", "Invalid Namespace or Format"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(disk: Disk, linux: LinuxMachine, command: str, status: str) -> None:
    named = command.format(namespace=disk.namespace, controller=disk.controller)
    with pytest.raises(GuestCommandError, match=f"NVMe status: {status}"):
        linux.run(f"nvme {named}")


# Discard


def test_discarded_blocks_read_zeros_and_the_image_has_holes(disk: Disk, linux: LinuxMachine) -> None:
    fill = f"dd if=/dev/urandom of={disk.namespace} bs=1M count=4 seek=200 oflag=direct conv=notrunc"
    first = 200 * MIB // BLOCK
    for discard in (
        f"nvme dsm {disk.namespace} -d -s {200 * MIB // SECTOR} -b {4 * MIB // SECTOR}",
        f"blkdiscard -o {200 * MIB} -l {4 * MIB} {disk.namespace}",
    ):
        linux.run(fill)
        full = disk.used()
        linux.run(discard)
        assert full - disk.used() == 4 * MIB
        assert reads_zeros(disk, first)
        assert reads_zeros(disk, first + 1023)


def test_fstrim_gives_room_back(disk: Disk, linux: LinuxMachine) -> None:
    linux.run(f"blkdiscard {disk.namespace}; mkfs.ext4 -q -F -E nodiscard {disk.namespace}")
    with mounted(linux, disk.namespace) as folder:
        linux.run(f"dd if=/dev/urandom of={folder}/big bs=1M count=8 conv=fsync")
        full = disk.used()
        linux.run(f"rm {folder}/big; sync; fstrim {folder}")
        assert full - disk.used() > 7 * MIB
    linux.run(f"e2fsck -fn {disk.namespace}")


def test_format_erases_everything(disk: Disk, linux: LinuxMachine) -> None:
    write_block(disk, 1000)
    assert "Success" in linux.run(f"nvme format {disk.namespace} --lbaf=0 --ses=1 --force")
    assert reads_zeros(disk, 1000)


def test_format_changes_the_size_of_blocks(disk: Disk, linux: LinuxMachine) -> None:
    formats = disk.nvme("id-ns", disk.namespace)["lbafs"]
    large = next(number for number, one in enumerate(formats) if (one["ds"], one["ms"]) == (12, 0))
    linux.run("dd if=/dev/urandom of=/tmp/random bs=1M count=1")
    for number, size in ((large, 4096), (0, SECTOR)):
        linux.run(f"nvme format {disk.namespace} --lbaf={number} --force")
        assert int(linux.run("cat /sys/block/nvme0n1/queue/logical_block_size")) == size
        assert int(linux.run("cat /sys/block/nvme0n1/size")) == SIZE // 512
        linux.run(f"dd if=/tmp/random of={disk.namespace} bs={size * 3} oflag=direct conv=notrunc,sync")
        linux.run(f"dd if={disk.namespace} of=/tmp/back bs={size * 3} iflag=direct count=100")
        linux.run(f"cmp -n {size * 3 * 85} /tmp/random /tmp/back")


# The controller comes and goes


def test_a_reset_while_it_is_read_and_written_loses_nothing(disk: Disk, linux: LinuxMachine) -> None:
    linux.run("dd if=/dev/urandom of=/tmp/random bs=1M count=4")
    expected = linux.run("sha256sum </tmp/random").split()[0]
    copy = f"dd if=/tmp/random of={disk.namespace} bs=64k oflag=direct conv=notrunc"
    check = f"dd if={disk.namespace} bs=64k count=64 iflag=direct | sha256sum"
    working = linux.start(f"while ! test -e /tmp/enough; do {copy}; {check}; done 2>/dev/null")
    for _ in range(5):
        linux.run(f"nvme reset {disk.controller}")
    linux.run("touch /tmp/enough")
    sums = {line.split()[0] for line in working.wait().splitlines()}
    linux.run("rm /tmp/enough")
    assert sums == {expected}


def test_the_driver_is_unbound_and_bound(disk: Disk, linux: LinuxMachine) -> None:
    linux.run("dd if=/dev/urandom of=/tmp/random bs=1M count=1")
    linux.run(f"dd if=/tmp/random of={disk.namespace} bs=1M conv=notrunc")
    address = disk.address
    for _ in range(3):
        linux.run(f"echo {address} >/sys/bus/pci/drivers/nvme/unbind; test ! -e {disk.controller}")
        linux.run(f"echo {address} >/sys/bus/pci/drivers/nvme/bind")
        linux.wait_until(f"test -b {disk.namespace}")
        linux.run(f"cmp -n {MIB} {disk.namespace} /tmp/random")


# What only ours does


def test_a_namespace_that_comes_or_goes_is_seen_without_a_command(
    served: Served, disk: Disk, linux: LinuxMachine, tmp_path: Path
) -> None:
    """The controller completes an asynchronous event request; the driver reads the log and looks for namespaces."""
    image = tmp_path / "second.img"
    image.write_bytes(TEXT.ljust(8 * MIB, b"\0"))
    served.device.post(lambda: served.device.add_namespace(str(image)))
    linux.wait_until("test -b /dev/nvme0n2")
    assert int(linux.run("cat /sys/block/nvme0n2/size")) == 8 * MIB // SECTOR
    assert linux.run_bytes(f"head -c {len(TEXT)} /dev/nvme0n2") == TEXT
    assert disk.nvme("list-ns") == {"nsid_list": [{"nsid": 1}, {"nsid": 2}]}
    served.device.post(lambda: served.device.remove_namespace(2))
    linux.wait_until("test ! -e /dev/nvme0n2")
    assert disk.nvme("list-ns") == {"nsid_list": [{"nsid": 1}]}


def test_what_is_interrupted_is_read_again_and_nobody_hears_of_it(
    served: Served, disk: Disk, linux: LinuxMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that the storage keeps waiting when a migration stops the device: the driver sends them again."""
    jobs, gate, storage = 16, threading.Event(), served.device.namespaces[1].storage
    workers, errors = served.device.executor.workers, served.device.logs.errors
    read = storage.read

    def read_slowly(offset: int, views: Views) -> None:
        gate.wait(TIMEOUT)
        read(offset, views)

    linux.run(f"dd if=/dev/urandom of={disk.namespace} bs=4k count={jobs} conv=notrunc,fsync")
    monkeypatch.setattr(execution, "MAX_PATIENCE", 0.2)
    monkeypatch.setattr(storage, "read", read_slowly)
    monkeypatch.setattr(storage, "read_now", lambda offset, views: False)
    before = served.device.logs.error_count
    reads = [f"dd if={disk.namespace} of=/tmp/{job} bs=4k count=1 skip={job} iflag=direct" for job in range(jobs)]
    reading = linux.start(f"{' & '.join(reads)} & wait")
    linux.wait_until(f"read -r reads writes </sys/block/nvme0n1/inflight; test $reads = {jobs}", TIMEOUT)
    served.device.post(lambda: served.device.executor.quiesce(TIMEOUT))
    until(lambda: served.device.logs.error_count > before)
    gate.set()
    assert reading.wait().count("1+0 records out") == jobs
    assert {error.status for error in list(errors)[: served.device.logs.error_count - before]} == {
        Status.COMMAND_INTERRUPTED
    }
    assert not workers
    with disk.image.open("rb") as image:
        for job in range(jobs):
            assert linux.run_bytes(f"cat /tmp/{job}") == image.read(BLOCK)


def test_shadow_doorbells_spare_traps_while_the_controller_is_at_work(
    served: Served, disk: Disk, linux: LinuxMachine
) -> None:
    """The driver writes its queues' tails to memory, and to a register only where the controller asks for it."""
    jobs, go_on = 16, threading.Event()
    traps = served.stats.summary()["region_write"].calls
    served.device.post(lambda: go_on.wait(TIMEOUT))
    reads = [f"dd if={disk.namespace} of=/dev/null bs=4k count=1 skip={job} iflag=direct" for job in range(jobs)]
    reading = linux.start(f"{' & '.join(reads)} & wait")
    linux.wait_until(f"read -r reads writes </sys/block/nvme0n1/inflight; test $reads = {jobs}", TIMEOUT)
    go_on.set()
    assert reading.wait().count("1+0 records out") == jobs
    # At most the first command of each queue, and the first completion that the driver ever takes from it.
    assert 1 <= served.stats.summary()["region_write"].calls - traps <= 2 * CPUS
