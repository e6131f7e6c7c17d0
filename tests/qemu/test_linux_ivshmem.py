"""Two Linux guests in two QEMUs exchange messages and doorbell interrupts through one ``vfio-user serve`` process.

In each guest the stock vfio-pci has the device, behind an emulated IOMMU, and a program of ours drives it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vfio_user.testing.linux import LinuxMachine

from .conftest import Compiler, LinuxFactory

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

TIMEOUT = 20.0
IOMMU = {
    "extra_args": ["-device", "intel-iommu,intremap=on,caching-mode=on"],
    "append": "intel_iommu=on",
    "modules": ["vfio-pci", "vfio_iommu_type1"],
}
REGISTERS, MEMORY = 0, 2
POSITION, DOORBELL = 8, 12
OWN_ID = f"read {REGISTERS} {POSITION} 4"
LETTERS = (0x1000, 0x8000)
"""Where in the shared memory each guest writes its message."""
READY = 0x20000
SAY_READY, WAIT_READY = f"write {MEMORY} {READY:#x} 4 1", f"until {MEMORY} {READY:#x} 4 1 1"
ROUNDS, WORDS = 5, 8


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[list[Path]]:
    """Two sockets of one process that serves members of the same group; name it before ``linux``, it ends last."""
    sockets = [tmp_path / name for name in ("a.sock", "b.sock")]
    command = [sys.executable, "-m", "vfio_user", "serve"]
    for number, path in enumerate(sockets):
        command += ["--"] if number else []
        command += ["ivshmem", "-o", "group=lab", "-o", "size=1M", "-o", "vectors=2", "--socket-path", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for path in sockets:
                while f"is served at {path}" not in (line := process.stdout.readline()):
                    assert line, "the server ended early"
            yield sockets
        finally:
            process.terminate()
            assert process.wait(TIMEOUT) == 0


def bind(machine: LinuxMachine) -> str:
    """Give the device to vfio-pci; its address."""
    (address,) = machine.addresses
    machine.run(f"echo vfio-pci >/sys/bus/pci/devices/{address}/driver_override")
    machine.run(f"echo {address} >/sys/bus/pci/drivers/vfio-pci/bind")
    return address


def drive(address: str, *steps: str) -> str:
    """The command that takes the device, maps it, enables both vectors, prints the own id, and does ``steps``."""
    begin = ("write config 4 2 6", f"mmap {REGISTERS}", f"mmap {MEMORY}", "irq msix 0 2", OWN_ID)
    return " ".join(["/bin/vfio_drive", address, *(f'"{step}"' for step in (*begin, *steps))])


def word(writer: int, turn: int, number: int) -> int:
    return (writer + 1) << 24 | turn << 16 | number


def write_letter(writer: int, turn: int) -> list[str]:
    """Write a message, and ring the other's vector of this turn."""
    words = [f"write {MEMORY} {LETTERS[writer] + 4 * n:#x} 4 {word(writer, turn, n):#x}" for n in range(WORDS)]
    return [*words, f"write {REGISTERS} {DOORBELL} 4 {(1 - writer) << 16 | turn % 2:#x}"]


def read_letter(writer: int, turn: int) -> list[str]:
    """Wait for the interrupt of this turn, and print the other's message."""
    return [f"wait msix {turn % 2}", *(f"read {MEMORY} {LETTERS[writer] + 4 * n:#x} 4" for n in range(WORDS))]


def values(output: str) -> list[int]:
    """What was read."""
    return [int(line, 0) for line in output.splitlines() if re.fullmatch("0(x[0-9a-f]+)?", line)]


def test_two_guests_exchange_messages_and_interrupts(lab: list[Path], linux: LinuxFactory, compiled: Compiler) -> None:
    files = {"/bin/vfio_drive": compiled("vfio_drive")}
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda path: linux([path], files=files, **IOMMU), lab)
    asking, answering = [WAIT_READY], [SAY_READY]
    for turn in range(ROUNDS):
        asking += write_letter(0, turn) + read_letter(1, turn)
        answering += read_letter(0, turn) + write_letter(1, turn)
    other = b.start(drive(bind(b), *answering, "interrupts"))
    asked = a.run(drive(bind(a), *asking, "interrupts"))
    answered = other.wait()
    for id, output in enumerate((asked, answered)):
        assert values(output) == [id, *(word(1 - id, turn, n) for turn in range(ROUNDS) for n in range(WORDS))]
        counts = re.findall(r":\s+(\d+)\s.*vfio-msix\[(\d)\]", output)
        assert counts == [(str((ROUNDS + 1) // 2), "0"), (str(ROUNDS // 2), "1")], output
