"""A Linux guest that reads its NVMe disk, by MSI-X: without its interrupts it would wait, and complain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, chdir, closing, contextmanager
from pathlib import Path

from vfio_user.devices.nvme import Nvme
from vfio_user.testing.linux import Guest, LinuxMachine
from vfio_user.testing.qemu import QemuMachine

from .migrate_support import INCOMING, TIMEOUT, Served, qmp_args
from .nvme_support import MIB

MEMORY = 128 * MIB


class ArrivingLinux(LinuxMachine):
    """A machine into which a running Linux comes."""

    def _greet(self) -> None:
        QemuMachine._greet(self)


@contextmanager
def linux_with_disk(
    qemu: Path, guest: Guest, folder: Path, name: str, image: Path, *, arriving: bool = False
) -> Iterator[LinuxMachine]:
    """Boot it, or have a machine that it can come to; in ``folder``, where QEMU runs: ``NAME.qmp``, ``NAME0.ctl``."""
    kind, more = (ArrivingLinux, INCOMING) if arriving else (LinuxMachine, ())
    with ExitStack() as stack, chdir(folder):
        served = Served(stack.enter_context(closing(Nvme(path=str(image)))), folder, f"{name}0")
        stack.callback(served.stop)
        args = [*qmp_args(folder / f"{name}.qmp"), *more]
        machine = kind(qemu, guest, [served.path], memory=MEMORY, extra_args=args)
        stack.callback(machine._dispose, TIMEOUT)
        yield machine


def write_disk(linux: LinuxMachine) -> str:
    """Have it write something; what :func:`read_disk` gives from now on."""
    linux.run("head -c 1M /dev/urandom | dd of=/dev/nvme0n1 bs=64k oflag=direct iflag=fullblock")
    return read_disk(linux)


def read_disk(linux: LinuxMachine) -> str:
    """A checksum of what it reads, past its cache."""
    return linux.run("dd if=/dev/nvme0n1 bs=64k count=16 iflag=direct 2>/dev/null | md5sum")
