"""A Linux guest with NVMe disks: our controllers, or QEMU's own, which the same tests can be run with.

With ``VFIO_USER_NVME=qemu`` in the environment the disks are behind QEMU's own controller: what fails with both, is
the test's fault.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from vfio_user.testing.linux import LinuxMachine, find_guest_tools, programs

TIMEOUT = 30.0
MIB = 1 << 20
SECTOR = 512
SIZE = 256 * MIB

REFERENCE = os.environ.get("VFIO_USER_NVME") == "qemu"

TOOLS = ("/usr/sbin/mkfs.ext4", "/usr/sbin/e2fsck", "/usr/sbin/nvme")
RANDOM_NUMBERS = ("-cpu", "qemu64,+rdrand")
"""For mkfs, which waits 4 seconds for them in a guest that has no source of any."""

GOOD = re.compile(
    r"""nvme\ nvme\d+: \ (
        pci\ function\ .* | \d+/0/0\ default/read/poll\ queues | rescanning\ namespaces\. | resetting\ controller
        | D3\ entry\ latency\ set\ to\ \d+\ seconds
        | Ignoring\ bogus\ Namespace\ Identifiers  # QEMU's own has none
    )
    | \ nvme\d+n\d+: (\ p\d+)*
    | EXT4-fs\ \(nvme\S+\): \ ( (un)?mount(ed|ing)\ filesystem\ .* | re-mounted\ .* | recovery\ complete )
    | .*command\ line.*""",
    re.VERBOSE | re.IGNORECASE,
)
"""What Linux says when all is well."""
ABOUT_DISKS = re.compile(r"nvme|EXT4-fs|JBD2|I/O error|blk_update|nobody cared|hung_task|WARNING", re.IGNORECASE)


def complaints(console: str) -> list[str]:
    """The lines of a guest's console about its disks that say more than that they are there."""
    messages = [re.sub(r"^\[ *[\d.]+\] ", "", line) for line in console.splitlines()]
    return [message for message in messages if ABOUT_DISKS.search(message) and not GOOD.fullmatch(message)]


def tools_folder() -> Path:
    """What they come from; without it the test is skipped, where CI is to run it, it fails."""
    found = find_guest_tools()
    if found is None:
        required = os.environ.get("CI") == "true" or os.environ.get("VFIO_USER_REQUIRE_QEMU") == "1"
        (pytest.fail if required else pytest.skip)("no tools for the guest: run scripts/fetch_qemu.py --guest-tools")
    return found


def tools() -> dict[str, bytes | Path]:
    """TOOLS, as files of a guest."""
    return programs(tools_folder(), *TOOLS)


def create_image(path: Path, size: int = SIZE) -> Path:
    """An image of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def reference_args(images: Sequence[Path]) -> list[str]:
    """What gives a machine QEMU's own controllers, each with an image, in the slots that ours would have."""
    arguments = []
    for number, image in enumerate(images):
        drive = {"driver": "raw", "node-name": f"disk{number}", "discard": "unmap"}
        arguments += ["-blockdev", json.dumps({**drive, "file": {"driver": "file", "filename": str(image)}})]
        device = {"driver": "nvme", "drive": f"disk{number}", "serial": f"serial{number}"}
        arguments += ["-device", json.dumps({**device, "addr": f"{number + 1:02x}.0"})]
    return arguments


@dataclass(frozen=True)
class Disk:
    """A controller in a guest with one namespace, by its name there, and the image behind it."""

    linux: LinuxMachine
    image: Path
    name: str = "nvme0"

    @property
    def controller(self) -> str:
        return f"/dev/{self.name}"

    @property
    def namespace(self) -> str:
        return f"/dev/{self.name}n1"

    @property
    def address(self) -> str:
        """Where it is on the PCI bus."""
        return self.linux.run(f"basename $(readlink -f /sys/class/nvme/{self.name}/device)").strip()

    def nvme(self, command: str, *arguments: str) -> Any:
        """What nvme-cli says of the controller, or of what an argument names, as JSON."""
        target = () if any(argument.startswith("/dev/") for argument in arguments) else (self.controller,)
        return json.loads(self.linux.run(f"nvme {' '.join([command, *target, *arguments, '-o json'])}"))

    def interrupts(self) -> dict[str, tuple[str, int]]:
        """For each line of it in /proc/interrupts, by the driver's name: what kind it is, and how often it came."""
        rows = [line.split() for line in self.linux.run("cat /proc/interrupts").splitlines()]
        cpus = len(rows[0])
        return {
            name.rstrip(","): (row[1 + cpus], sum(map(int, row[1 : 1 + cpus])))
            for row in rows[1:]
            for name in row[2 + cpus :]
            if name.startswith(self.name)
        }

    def used(self) -> int:
        """How many bytes the image takes of the host's disk."""
        return self.image.stat().st_blocks * SECTOR


def disk_at(linux: LinuxMachine, address: str, image: Path) -> Disk:
    """The disk whose controller is at this PCI address, once Linux has found its namespace."""
    name = linux.wait_until(f"ls /sys/bus/pci/devices/{address}/nvme").strip()
    linux.wait_until(f"test -b /dev/{name}n1")
    return Disk(linux, image, name)


class NvmeServer:
    """``vfio-user serve nvme`` as a process of its own; a context manager that kills what is left of it."""

    def __init__(self, image: Path, path: Path) -> None:
        self.path = path
        options = ["-o", f"path={image}", "--socket-path", str(path)]
        command = [sys.executable, "-m", "vfio_user", "serve", "nvme", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert str(path) in self._process.stdout.readline(), self._process.communicate(timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=TIMEOUT)

    def terminate(self) -> tuple[int, str]:
        """Its exit status and what it said on stderr."""
        self._process.terminate()
        _, errors = self._process.communicate(timeout=TIMEOUT)
        return self._process.returncode, errors
