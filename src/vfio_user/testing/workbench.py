"""A Linux to try devices in: what it takes to drive them from there is in the guest already.

::

    with workbench(find_qemu(), find_guest(), ["/run/counter.sock"]) as linux:
        print(linux.run("bar0 w32:0x8=1 r32:0x0"))

In the guest, ``bar0`` to ``bar5`` and ``config`` access the first device by the steps of ``programs/pcimem.c``. With an
IOMMU ``drive`` binds it to vfio-pci and takes the steps of ``programs/vfio_drive.c``: interrupts, DMA. For another
device set DEVICE to its address.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vfio_user.testing.linux import Guest, LinuxMachine
from vfio_user.testing.qemu import PluggedDevice, QemuError

PROGRAMS = Path(__file__).parent / "programs"
COMPILER = ("cc", "-static", "-O1", "-Wall", "-Wextra", "-Werror")

IOMMU = ("-machine", "kernel-irqchip=split", "-device", "intel-iommu,intremap=on,caching-mode=on")

_FIRST = "address=${DEVICE:-0000:00:01.0}; device=/sys/bus/pci/devices/$address"
_ACCESS = f"""\
#!/bin/sh
{_FIRST}
[ -e $device/driver ] || grep -q 1 $device/enable || echo 1 >$device/enable
exec pcimem $device/%s "$@"
"""
_DRIVE = f"""\
#!/bin/sh
[ -e /sys/bus/pci/drivers/vfio-pci ] || {{ echo "drive needs an IOMMU: vfio-user guest --iommu" >&2; exit 1; }}
{_FIRST}
echo vfio-pci >$device/driver_override
[ -e $device/driver ] || echo $address >/sys/bus/pci/drivers/vfio-pci/bind
exec vfio_drive $address "write config 4 2 6" "$@"  # vfio-pci opens it with memory and bus mastering off
"""


def build(source: Path, folder: Path) -> Path:
    """A C program, built in ``folder`` for the guest: it needs no library there. Raises QemuError when it cannot be."""
    program = folder / source.stem
    try:
        subprocess.run([*COMPILER, "-o", program, source], check=True, timeout=60, capture_output=True, text=True)
    except FileNotFoundError:
        raise QemuError(f"{COMPILER[0]}: no C compiler, to build {source.name} for the guest") from None
    except subprocess.SubprocessError as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        raise QemuError(f"{source.name} cannot be built for the guest: {error}\n{said}") from error
    return program


@contextlib.contextmanager
def workbench(
    qemu: str | Path,
    guest: Guest,
    devices: Sequence[PluggedDevice],
    *,
    iommu: bool = False,
    modules: Sequence[str] = (),
) -> Iterator[LinuxMachine]:
    """Boot it, with ``devices`` on bus 0 from slot 1 on; with ``iommu`` behind an emulated one of Intel's.

    ``modules``: drivers of the kernel to load besides; what they take, ``bar0`` and ``drive`` leave alone.

    Raises QemuError when it does not come up.
    """
    with tempfile.TemporaryDirectory() as folder:
        programs = {f"/bin/{source.stem}": build(source, Path(folder)) for source in PROGRAMS.glob("*.c")}
        with LinuxMachine(
            qemu,
            guest,
            devices,
            files={**programs, **_scripts()},
            modules=(*(("vfio-pci", "vfio_iommu_type1") if iommu else ("uio_pci_generic",)), *modules),
            append="intel_iommu=on" if iommu else "",
            extra_args=IOMMU if iommu else (),
        ) as linux:
            yield linux


def _scripts() -> Mapping[str, bytes]:
    files = {f"bar{index}": f"resource{index}" for index in range(6)} | {"config": "config"}
    scripts = {f"/bin/{name}": (_ACCESS % file).encode() for name, file in files.items()}
    return {**scripts, "/bin/drive": _DRIVE.encode()}
