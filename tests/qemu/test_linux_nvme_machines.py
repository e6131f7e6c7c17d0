"""Linux with our NVMe disks where a machine or a server does not outlive the test: boot, interrupts, sudden ends."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vfio_user.testing.linux import GuestProcess, LinuxMachine, programs
from vfio_user.testing.qemu import QemuError

from .conftest import LinuxFactory
from .nvme_support import RANDOM_NUMBERS, NvmeServer, complaints, create_image, disk_at, tools, tools_folder

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

Serve = Callable[[Path], NvmeServer]

SHORT_TIMEOUTS = "nvme_core.io_timeout=2 nvme_core.admin_timeout=2"
"""In seconds: how long Linux waits for a command before it looks whether the controller is still there."""
WRITER = """
    while :; do
        i=$((i + 1))
        echo "content of $i" >/mnt/file$i
        echo "nobody asks for it" >/mnt/scrap$i
        sync /mnt/file$i /mnt
        echo $i
        rm -f /mnt/scrap$((i - 5))
    done
"""
"""Creates files, and removes others; prints the number of each that is durable."""
FILES = 50


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serves an image in a process; name it before ``linux``, so that the guests are gone before their servers."""
    with ExitStack() as servers:
        numbers = itertools.count()

        def start(image: Path) -> NvmeServer:
            return servers.enter_context(NvmeServer(image, tmp_path / f"{next(numbers)}.sock"))

        yield start


def test_two_controllers_without_message_signalled_interrupts(
    serve: Serve, linux: LinuxFactory, tmp_path: Path
) -> None:
    """Each in a process of its own; the driver falls back to INTx with ``pci=nomsi``."""
    images = [create_image(tmp_path / f"{name}.img") for name in ("one", "two")]
    servers = [serve(image) for image in images]
    m = linux([server.path for server in servers], append="pci=nomsi", files=tools(), extra_args=RANDOM_NUMBERS)
    one, two = (disk_at(m, address, image) for address, image in zip(m.addresses, images, strict=True))
    m.run("dd if=/dev/urandom of=/tmp/random bs=1M count=4")
    copies = [f"dd if=/tmp/random of={disk.namespace} bs=64k oflag=direct conv=notrunc" for disk in (one, two)]
    m.run(f"({' & '.join(copies)} & wait)")
    for disk in (one, two):
        m.run(f"cmp -n {4 << 20} /tmp/random {disk.namespace}")
        ((kind, count),) = set(disk.interrupts().values())
        assert kind.startswith("IO-APIC")
        assert count > 64
    assert one.nvme("id-ctrl")["sn"] != two.nvme("id-ctrl")["sn"]
    assert complaints(m.console) == []


def test_linux_boots_from_the_disk_on_which_the_last_guest_was_killed(
    serve: Serve, linux: LinuxFactory, tmp_path: Path
) -> None:
    """The server goes on with the next QEMU; the journal is replayed, and what was synced is there."""
    server = serve(create_image(tmp_path / "root.img"))
    m = linux([server.path], files=tools(), extra_args=RANDOM_NUMBERS)
    disk = disk_at(m, m.addresses[0], tmp_path)
    m.run(f"mkfs.ext4 -q {disk.namespace} && mkdir /mnt && mount {disk.namespace} /mnt")
    m.install("/mnt")
    _, durable = write_for_a_while(m)
    os.kill(m.pid, signal.SIGKILL)
    with pytest.raises(QemuError, match="Killed"):
        m.close()

    m = linux([server.path], root=disk.namespace)
    assert f"{disk.namespace} / ext4" in m.run("cat /proc/mounts")
    m.wait_console("recovery complete")
    check_durable(m, "", durable)
    assert "nvme" in m.run("ls /usr/sbin")
    m.run(f"mount -o remount,ro / && e2fsck -fn {disk.namespace}")
    assert complaints(m.console) == []
    m.close()
    assert server.terminate() == (0, "")


def test_a_root_that_cannot_be_mounted_ends_the_boot_with_the_reason(
    serve: Serve, linux: LinuxFactory, tmp_path: Path
) -> None:
    server = serve(create_image(tmp_path / "blank.img"))
    with pytest.raises(QemuError, match=r"(?s)^boot: .*mount: mounting /dev/nvme0n1 on /root failed.*Kernel panic"):
        linux([server.path], root="/dev/nvme0n1")


def test_the_server_is_killed_and_restarted_under_a_mounted_file_system(
    serve: Serve, linux: LinuxFactory, tmp_path: Path
) -> None:
    """Linux gets errors and lives on; from the next server it has all that was synced, once the journal is replayed."""
    image = create_image(tmp_path / "disk.img")
    server = serve(image)
    m = linux([], ports=[[server.path], []], files=tools(), extra_args=RANDOM_NUMBERS, append=SHORT_TIMEOUTS)
    disk = disk_at(m, m.port_addresses[0][0], image)
    m.run(f"mkfs.ext4 -q {disk.namespace} && mkdir /mnt /again && mount {disk.namespace} /mnt")
    writer, durable = write_for_a_while(m)
    kill_under(m, server)
    m.wait_console("nvme nvme0: Disabling device after reset failure")
    assert m.execute("echo more >/mnt/more")[0] != 0

    # QEMU does not connect again, and it aborts when a controller without a server is unplugged: Linux lets go of it.
    writer.kill()
    m.wait_until("umount /mnt")
    m.run(f"echo 1 >/sys/bus/pci/devices/{m.port_addresses[0][0]}/remove")
    disk = disk_at(m, m.plug(serve(image).path, 1), image)
    m.run(f"mount {disk.namespace} /again")
    m.wait_console(f"EXT4-fs ({disk.name}n1): recovery complete")
    check_durable(m, "/again", durable)
    m.run(f"umount /again && e2fsck -fn {disk.namespace}")


def kill_under(linux: LinuxMachine, server: NvmeServer) -> None:
    """Kill a server while no processor waits for its answer: QEMU would abort."""
    linux.qmp("stop")
    server.kill()
    linux.qmp("cont")


def write_for_a_while(linux: LinuxMachine) -> tuple[GuestProcess, int]:
    """WRITER at work, and the number of the last file that is durable for certain."""
    writer = linux.start(WRITER)
    linux.wait_until(f"test -e /mnt/file{FILES}")
    return writer, int(writer.output.split()[-1])


def check_durable(linux: LinuxMachine, folder: str, last: int) -> None:
    """All files up to ``last`` are there, and whole."""
    assert last >= FILES - 1
    numbers = range(1, last + 1)
    files = " ".join(f"file{number}" for number in numbers)
    assert linux.run(f"cd {folder}/ && cat {files}") == "".join(f"content of {number}\n" for number in numbers)


# What is put into a guest


def test_programs_bring_their_libraries_and_the_loader() -> None:
    files = tools()
    names = {Path(name).name.partition(".so")[0] for name in files}
    assert {"mkfs.ext4", "e2fsck", "nvme", "libc", "libext2fs", "libnvme"} < names
    assert len([name for name in names if name.startswith("ld-linux")]) == 1
    assert all(isinstance(file, Path) and file.is_file() for file in files.values())


def test_programs_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="no dynamic loader"):
        programs(tmp_path, "/usr/sbin/nvme")
    with pytest.raises(QemuError, match=r"/usr/sbin/nonsense: .*cannot open"):
        programs(tools_folder(), "/usr/sbin/nonsense")
