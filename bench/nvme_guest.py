"""``python -m bench.nvme_guest``: a disk inside Linux, ours next to QEMU's own NVMe controller.

One guest, emulated, has both at once, each on an image of the same size in the host's page cache. The same program
loads them in turns, past the guest's page cache; a figure is the median of its turns. A row that misses its target says
so, and the exit status stays 0: figures depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.harness import BenchError, running, wait_for_socket
from vfio_user.testing.linux import LinuxMachine, find_guest
from vfio_user.testing.qemu import QemuError, find_qemu
from vfio_user.testing.workbench import build

KIB, MIB = 1 << 10, 1 << 20
SIZE = 256 * MIB


@dataclass(frozen=True)
class Load:
    """What is asked of a disk at a time: arguments of disk_load. ``target`` is the least ratio of ours to theirs."""

    kind: str
    block: int
    jobs: int
    target: float

    def __str__(self) -> str:
        return f"{self.kind} {self.block // KIB} KiB, {self.jobs} in flight"


LOADS = [
    Load(kind, block, jobs, target)
    for kinds, block, target in ((("sequential", "seqwrite"), 128 * KIB, 1.0), (("random", "randwrite"), 4 * KIB, 0.8))
    for kind in kinds
    for jobs in (1, 16)
]


@contextmanager
def guest(folder: Path, cpus: int) -> Iterator[tuple[LinuxMachine, dict[str, str]]]:
    """A guest with both disks, full of data, and their names in it: ours and theirs."""
    qemu, linux = find_qemu(), find_guest()
    if qemu is None or linux is None:
        raise BenchError("no QEMU or no guest: run scripts/fetch_qemu.py --guest")
    images = {name: folder / f"{name}.img" for name in ("ours", "theirs")}
    for image in images.values():
        image.write_bytes(bytes(range(256)) * (SIZE // 256))
    drive = {"driver": "raw", "node-name": "theirs", "file": {"driver": "file", "filename": str(images["theirs"])}}
    theirs = {"driver": "nvme", "drive": "theirs", "serial": "theirs", "addr": "10.0"}
    socket = folder / "ours.sock"
    command = [sys.executable, "-m", "vfio_user", "serve", "nvme", "-o", f"path={images['ours']}"]
    with running([*command, "--socket-path", str(socket)]) as server:
        wait_for_socket(server, socket)
        with LinuxMachine(
            qemu,
            linux,
            [socket],
            cpus=cpus,
            files={"/bin/disk_load": build(Path(__file__).parent / "disk_load.c", folder)},
            extra_args=["-blockdev", json.dumps(drive), "-device", json.dumps(theirs)],
        ) as machine:
            addresses = {"ours": machine.addresses[0], "theirs": "0000:00:10.0"}
            yield machine, {name: _disk(machine, address) for name, address in addresses.items()}


def _disk(machine: LinuxMachine, address: str) -> str:
    name = machine.wait_until(f"ls /sys/bus/pci/devices/{address}/nvme").strip()
    machine.wait_until(f"test -b /dev/{name}n1")
    return f"/dev/{name}n1"


def compare(machine: LinuxMachine, disks: dict[str, str], load: Load, rounds: int, seconds: float) -> dict[str, float]:
    """Commands per second of both, medians of turns."""
    figures: dict[str, list[float]] = {name: [] for name in disks}
    for _ in range(rounds):
        for name, disk in disks.items():
            words = f"disk_load {disk} {load.kind} {load.block} {load.jobs} {seconds}"
            figures[name].append(float(machine.run(words)))
    return {name: median(values) for name, values in figures.items()}


def measure(rounds: int, seconds: float, cpus: int) -> Iterator[str]:
    """A line for each of LOADS."""
    with tempfile.TemporaryDirectory() as folder, guest(Path(folder), cpus) as (machine, disks):
        for load in LOADS:
            found = compare(machine, disks, load, rounds, seconds)
            ratio = found["ours"] / found["theirs"]
            figures = f"{found['ours']:>7.0f}/s {found['theirs']:>7.0f}/s {ratio:>6.2f}"
            yield f"{load!s:<38} {figures}  >= {load.target:g} {'ok' if ratio >= load.target else 'MISS'}"


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.nvme_guest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a turn")
    parser.add_argument(
        "--cpus", type=int, default=1, metavar="N", help="of the guest; each takes a core of this machine"
    )
    options = parser.parse_args()
    print(f"{'load':<38} {'ours':>9} {'theirs':>9} {'ratio':>6}  target")
    try:
        for line in measure(options.rounds, options.seconds, options.cpus):
            print(line, flush=True)
    except (BenchError, QemuError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
