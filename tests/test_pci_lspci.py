"""lspci, as a guest's administrator runs it, decodes what our devices declare and finds nothing wrong with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vfio_user import Bar, Device
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.pci import (
    AdvancedErrorReporting,
    Capability,
    DeviceSerialNumber,
    PcieEndpoint,
    PowerManagement,
    VendorSpecific,
    VendorSpecificExtended,
)

FETCHED = Path(__file__).parent.parent / ".qemu/lspci"
TIMEOUT = 30.0
COMPLAINTS = re.compile(
    r"<unknown|unknown|invalid|access denied|chain (looped|broken)|malformed|unassigned class|reserved|\?\?|!!!",
    re.IGNORECASE,
)

Lspci = Callable[[Device], str]


@pytest.fixture
def lspci(tmp_path: Path) -> Lspci:
    """What ``lspci -vvv`` says of a device. Without lspci the test is skipped; in CI it fails."""
    program = str(FETCHED) if FETCHED.exists() else shutil.which("lspci")
    if program is None:
        reason = "no lspci: run scripts/fetch_qemu.py --lspci"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)

    def run(device: Device) -> str:
        (tmp_path / "dump").write_text(dump(device))
        command = [program, "-F", str(tmp_path / "dump"), "-vvv"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        # it looks for drivers as well, and says so on a machine without kernel modules
        assert [line for line in done.stderr.splitlines() if "libkmod" not in line] == []
        # without the first line: of our devices' names pci.ids knows few
        complaints = [line for line in done.stdout.splitlines()[1:] if COMPLAINTS.search(line)]
        assert not complaints, done.stdout
        return done.stdout

    return run


def dump(device: Device) -> str:
    """Config space as ``lspci -xxxx`` shows it."""
    data = bytearray(len(device.config))
    device.region_read(7, 0, memoryview(data))
    lines = [f"{at:02x}: {data[at : at + 16].hex(' ')}" for at in range(0, len(data), 16)]
    return "\n".join(["01:00.0 device", *lines, "", ""])


def write(device: Device, offset: int, value: int, size: int = 2) -> None:
    device.region_write(7, offset, memoryview(value.to_bytes(size, "little")))


def find(device: Device, wanted: int) -> int:
    """Where the capability with this id is."""
    config = bytearray(256)
    device.region_read(7, 0, memoryview(config))
    at = config[0x34]
    while config[at] != wanted:
        at = config[at + 1]
        assert at
    return at


def of(*capabilities: Capability, **declared: object) -> Device:
    """A device that has these capabilities, and nothing else unless it is declared."""
    fields = {"vendor_id": 0x1AF4, "device_id": 0x10F0, "class_code": 0x058000, "capabilities": capabilities}
    made: Callable[[], Device] = type("Made", (Device,), fields | declared)
    return made()


def everything() -> Device:
    return of(
        PowerManagement(),
        PcieEndpoint(),
        VendorSpecific(b"\x11\x22\x33"),
        DeviceSerialNumber(0x1122334455667788),
        AdvancedErrorReporting(),
        VendorSpecificExtended(0xBEEF, 2, bytes(8)),
        bars={0: Bar(0x1000), 1: Bar(0x100, io=True), 2: Bar(1 << 20, memory=True, bits64=True, prefetchable=True)},
        rom=bytes(4096),
        intx=True,
        msi_vectors=4,
        msi_masking=True,
        msix_vectors=65,
    )


def enable(device: Device) -> None:
    """What a guest does that finds the device: addresses, decoding, bus mastering, error reporting."""
    for index, bar in device.bars.items():
        at = 0xC000 if bar.io else 0xFE000000 + (index << 20)
        write(device, 0x10 + 4 * index, at, 4)
    if device.rom:
        write(device, 0x30, 0xFEE00001, 4)
    write(device, 4, 0x547)


@pytest.mark.parametrize("make", [Gpio, Edu, Ivshmem, everything])
def test_nothing_is_wrong_with_a_device_before_and_after_a_guest_enabled_it(
    lspci: Lspci, make: Callable[[], Device]
) -> None:
    device = make()
    lspci(device)
    enable(device)
    assert "BusMaster+" in lspci(device)
    device.reset()
    lspci(device)


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (lambda: of(PowerManagement()), ["Power Management version 3", "Flags: PMEClk- DSI- D1- D2-", "D0 NoSoftRst+"]),
        (lambda: of(msi_vectors=8), ["MSI: Enable- Count=1/8 Maskable- 64bit+"]),
        (
            lambda: of(msi_vectors=32, msi_masking=True),
            ["MSI: Enable- Count=1/32 Maskable+ 64bit+", "Masking: 00000000  Pending: 00000000"],
        ),
        (
            lambda: of(msix_vectors=2048, bars={0: Bar(16)}),
            ["MSI-X: Enable- Count=2048 Masked-", "Vector table: BAR=1 offset=00000000", "PBA: BAR=1 offset=00008000"],
        ),
        (
            lambda: of(PcieEndpoint()),
            [
                "Express (v2) Endpoint",
                "ExtTag- AttnBtn- AttnInd- PwrInd- RBE+ FLReset+",
                "CorrErr- NonFatalErr- FatalErr- UnsupReq-",
                "RlxdOrd+ ExtTag- PhantFunc- AuxPwr- NoSnoop+ FLReset-",
                "MaxPayload 128 bytes, MaxReadReq 512 bytes",
                "LnkCap:\tPort #0, Speed 2.5GT/s, Width x1, ASPM not supported",
                "LnkSta:\tSpeed 2.5GT/s, Width x1",
                "TimeoutDis+",
                "LnkCap2: Supported Link Speeds: 2.5GT/s",
                "LnkCtl2: Target Link Speed: 2.5GT/s",
            ],
        ),
        (lambda: of(PcieEndpoint(flr=False)), ["RBE+ FLReset-", "NoSnoop+\n"]),
        (lambda: of(VendorSpecific(b"\x01\x02\x03")), ["Vendor Specific Information: Len=06"]),
        (
            lambda: of(PcieEndpoint(), DeviceSerialNumber(0x1122334455667788)),
            ["[100 v1] Device Serial Number 11-22-33-44-55-66-77-88"],
        ),
        (
            lambda: of(PcieEndpoint(), AdvancedErrorReporting()),
            [
                "[100 v2] Advanced Error Reporting",
                "UESta:\tDLP- SDES- TLP- FCP- CmpltTO- CmpltAbrt- UnxCmplt- RxOF- MalfTLP-",
                "UESvrt:\tDLP+ SDES+ TLP- FCP+ CmpltTO- CmpltAbrt- UnxCmplt- RxOF+ MalfTLP+",
                "CEMsk:\tRxErr- BadTLP- BadDLLP- Rollover- Timeout- AdvNonFatalErr+",
                "HeaderLog: 00000000 00000000 00000000 00000000",
            ],
        ),
        (
            lambda: of(PcieEndpoint(), VendorSpecificExtended(0xBEEF, 2, bytes(8))),
            ["[100 v1] Vendor Specific Information: ID=beef Rev=2 Len=010"],
        ),
    ],
)
def test_each_capability_alone_reads_as_declared(lspci: Lspci, make: Callable[[], Device], lines: list[str]) -> None:
    shown = lspci(make())
    assert [line for line in lines if line not in shown] == [], shown


def test_all_together_and_what_a_guest_enabled(lspci: Lspci) -> None:
    device = everything()
    enable(device)
    write(device, find(device, 0x05) + 2, 0x0021)
    write(device, find(device, 0x11) + 2, 0xC000)
    write(device, find(device, 0x10) + 8, 0x281F)
    shown = lspci(device)
    lines = [
        "Control: I/O+ Mem+ BusMaster+ SpecCycle- MemWINV- VGASnoop- ParErr+ Stepping- SERR+ FastB2B- DisINTx+",
        "Interrupt: pin A routed to IRQ 0",
        "Region 0: Memory at fe000000 (32-bit, non-prefetchable)",
        "Region 1: I/O ports at c000",
        "Region 2: Memory at fe200000 (64-bit, prefetchable)",
        "Expansion ROM at fee00000",
        "Power Management version 3",
        "Express (v2) Endpoint",
        "CorrErr+ NonFatalErr+ FatalErr+ UnsupReq+",
        "Vendor Specific Information: Len=06",
        "MSI: Enable+ Count=4/4 Maskable+ 64bit+",
        "MSI-X: Enable+ Count=65 Masked+",
        "[100 v1] Device Serial Number 11-22-33-44-55-66-77-88",
        "[10c v2] Advanced Error Reporting",
        "[154 v1] Vendor Specific Information: ID=beef Rev=2 Len=010",
    ]
    assert [line for line in lines if line not in shown] == [], shown
    write(device, find(device, 0x01) + 4, 3)
    assert "Status: D3 NoSoftRst+" in lspci(device)
