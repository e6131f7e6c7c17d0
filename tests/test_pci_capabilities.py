"""Each capability byte by byte, by the books: what stands there after a reset, and what a guest's writes do to it.

The tables are copied from the PCI and PCI Express specifications and ``linux/pci_regs.h``, not from the code under
test. A row: offset, bytes after a reset, writable bytes, write-one-to-clear bytes (as many or none).
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfio_user.pci import (
    AdvancedErrorReporting,
    Capability,
    ConfigSpace,
    DeviceSerialNumber,
    MsiCapability,
    PcieEndpoint,
    PowerManagement,
    VendorSpecific,
    VendorSpecificExtended,
)

Row = tuple[int, str, str, str]

HEADER: list[Row] = [
    (0x00, "3412e811", "", ""),
    (0x04, "00001000", "47050000", "000000f9"),
    (0x08, "000000ff00000000", "00000000ffff", ""),
    (0x34, "40", "", ""),
    (0x3C, "00", "ff", ""),
]

PM: list[Row] = [
    (0x40, "0100 0300", "", ""),  # PCI PM 1.2, no PME, neither D1 nor D2
    (0x44, "0800 0000", "0300", ""),  # No_Soft_Reset; PowerState
]

MSI_32: list[Row] = [
    (0x40, "0500 0400", "00007100", ""),  # four vectors; enable and multiple message enable
    (0x44, "00000000", "fcffffff", ""),
    (0x48, "0000", "ffff", ""),
]
MSI_64: list[Row] = [
    (0x40, "0500 8000", "00007100", ""),
    (0x44, "0000000000000000", "fcffffffffffffff", ""),
    (0x4C, "0000", "ffff", ""),
]
MSI_32_MASKED: list[Row] = [
    (0x40, "0500 0a01", "00007100", ""),  # 32 vectors, maskable
    (0x44, "00000000", "fcffffff", ""),
    (0x48, "00000000", "ffff0000", ""),
    (0x4C, "00000000", "ffffffff", ""),
    (0x50, "05000080", "", ""),  # what pends
]
MSI_64_MASKED: list[Row] = [
    (0x40, "0500 8201", "00007100", ""),  # two vectors, 64 bits, maskable
    (0x44, "0000000000000000", "fcffffffffffffff", ""),
    (0x4C, "00000000", "ffff0000", ""),
    (0x50, "00000000", "03000000", ""),
    (0x54, "02000000", "", ""),
]

PCIE: list[Row] = [
    (0x0D, "00", "00", ""),  # PCI Express has no latency timer
    (0x40, "1000 0200", "", ""),  # version 2, endpoint
    (0x44, "00800010", "", ""),  # role-based error reporting, function-level reset
    # error reporting, relaxed ordering, payload size, no snoop, read request size of 512 bytes
    (0x48, "1028 0000", "ff780000", "0000 0f00"),
    (0x4C, "11000000", "", ""),  # x1, 2.5 GT/s
    (0x50, "0000 1100", "cb000000", ""),  # ASPM, RCB, common clock, extended synch
    (0x64, "10000000", "", ""),  # completion timeout disable is supported, its ranges are not
    (0x68, "0000 0000", "10000000", ""),
    (0x6C, "02000000", "", ""),  # 2.5 GT/s
    (0x70, "0100 0000", "0f000000", ""),  # target link speed
]
PCIE_WITHOUT_FLR: list[Row] = [(0x44, "00800000", "", "") if row[0] == 0x44 else row for row in PCIE]

SERIAL: list[Row] = [(0x100, "03000100", "", ""), (0x104, "8877665544332211", "", "")]

AER: list[Row] = [
    (0x100, "01000200", "", ""),
    (0x104, "00000000", "", "30f07f00"),
    (0x108, "00004000", "30f07f00", ""),  # uncorrectable internal errors start masked
    (0x10C, "30204600", "30f07f00", ""),  # fatal: DLP, surprise down, FCP, overflow, malformed, internal
    (0x110, "00000000", "", "c1f10000"),
    (0x114, "00e00000", "c1f10000", ""),  # masked: advisory non-fatal, internal, log overflow
    (0x118, "00000000" + 4 * "00000000", "", ""),
]

VENDOR: list[Row] = [(0x40, "0900 07 a1a2a3a4", "000000 00f0", "")]
VSEC: list[Row] = [(0x100, "0b000100", "", ""), (0x104, "adde a300", "", ""), (0x108, "0102", "00ff", "")]


class Case(NamedTuple):
    capabilities: tuple[Capability, ...]
    layout: list[Row]
    rom_size: int = 0


CASES = {
    "power management": Case((PowerManagement(),), PM),
    "msi 32": Case((MsiCapability(4, bits64=False),), MSI_32),
    "msi 64": Case((MsiCapability(),), MSI_64),
    "msi 32 masked": Case((MsiCapability(32, True, bits64=False, pending=lambda: 0x80000005),), MSI_32_MASKED),
    "msi 64 masked": Case((MsiCapability(2, True, pending=lambda: 2),), MSI_64_MASKED),
    "endpoint": Case((PcieEndpoint(),), PCIE),
    "endpoint without reset": Case((PcieEndpoint(flr=False),), PCIE_WITHOUT_FLR),
    "serial number": Case((PcieEndpoint(), DeviceSerialNumber(0x1122334455667788)), PCIE + SERIAL),
    "error reporting": Case((PcieEndpoint(), AdvancedErrorReporting()), PCIE + AER),
    "vendor": Case((VendorSpecific(b"\xa1\xa2\xa3\xa4", b"\0\xf0"),), VENDOR),
    "vendor, extended": Case((PcieEndpoint(), VendorSpecificExtended(0xDEAD, 3, b"\1\2", b"\0\xff")), PCIE + VSEC),
    "no capability": Case((), [(0x06, "00", "", ""), (0x34, "00", "", "")]),
    "rom of 2 KiB": Case((PowerManagement(),), [*PM, (0x30, "00000000", "01f8ffff", "")], 1 << 11),
    "rom of 16 MiB": Case((PowerManagement(),), [*PM, (0x30, "00000000", "010000ff", "")], 1 << 24),
}


def image(case: Case, column: int) -> bytearray:
    data = bytearray(4096 if any(isinstance(one, PcieEndpoint) for one in case.capabilities) else 256)
    for row in HEADER + case.layout:
        content = bytes.fromhex(str(row[column]))
        data[row[0] : row[0] + len(content)] = content
    return data


def build(case: Case) -> ConfigSpace:
    return ConfigSpace(0x1234, 0x11E8, capabilities=case.capabilities, rom_size=case.rom_size)


def read(config: ConfigSpace, offset: int, length: int) -> bytes:
    data = bytearray(b"\xee" * length)
    config.read_into(offset, memoryview(data))
    return bytes(data)


offsets = st.integers(0, 0xFF) | st.integers(0x100, 0x150)
accesses = st.lists(st.tuples(offsets, st.binary(min_size=1, max_size=16) | st.just(b"\xff" * 8)), max_size=8)


@pytest.mark.parametrize("name", CASES)
@example([(0, b"\xff" * 0x44), (0x48, b"\xff" * 0xB8), (0x100, b"\xff" * 0x100)], True)
@example([(0, b"\xff" * 0x44), (0x48, b"\xff" * 0xB8), (0, bytes(0x44)), (0x48, bytes(0x400))], False)
@settings(deadline=None)
@given(accesses, st.booleans())
def test_each_byte_is_what_the_specification_says(name: str, writes: list[tuple[int, bytes]], errors: bool) -> None:
    case = CASES[name]
    config, model, writable, w1c = build(case), image(case, 1), image(case, 2), image(case, 3)
    if errors:  # the device found some, all that there are
        for register in config._registers:
            config.set(register.name, config.get(register.name) | register.w1c)
        model = bytearray(byte | bits for byte, bits in zip(model, w1c, strict=True))
    for offset, written in writes:
        data = written[: max(0, len(config) - offset)]
        before = model[0x44] & 3
        config.write(min(offset, len(config)), data)
        for at, byte in enumerate(data, offset):
            model[at] = (model[at] & ~writable[at] & ~(byte & w1c[at])) | (byte & writable[at])
        if case.capabilities and isinstance(case.capabilities[0], PowerManagement) and model[0x44] & 3 in (1, 2):
            model[0x44] = model[0x44] & ~3 | before
    assert read(config, 0, len(config)) == model
    for width in (1, 2, 4, 8):
        assert b"".join(read(config, at, width) for at in range(0, len(config), width)) == model


@pytest.mark.parametrize("name", CASES)
def test_errors_that_the_device_found_are_a_guests_to_clear_and_they_migrate(name: str) -> None:
    config, other = build(CASES[name]), build(CASES[name])
    w1c = image(CASES[name], 3)
    for register in config._registers:
        config.set(register.name, config.get(register.name) | register.w1c)
    other.load(config.save())
    for at, bits in enumerate(w1c):
        assert read(other, at, 1)[0] & bits == bits
        other.write(at, bytes([bits]))
        assert read(other, at, 1)[0] & bits == 0


def test_states_between_d0_and_d3hot_are_discarded() -> None:
    """PCI PM 1.2, section 3.2.4: the write completes normally, no state change occurs."""
    config = build(CASES["power management"])
    for written, state in [(1, 0), (2, 0), (3, 3), (1, 3), (2, 3), (0, 0), (0xFFFF, 3)]:
        config.write(0x44, written.to_bytes(2, "little"))
        assert read(config, 0x44, 2) == (8 | state).to_bytes(2, "little")
        assert config.asleep == (state == 3)


@pytest.mark.parametrize(("flr", "calls"), [(True, 3), (False, 0)])
def test_only_a_one_written_to_bit_15_of_device_control_asks_for_a_reset(flr: bool, calls: int) -> None:
    asked: list[int] = []
    config = ConfigSpace(1, 2, capabilities=[PcieEndpoint(flr=flr)], on_flr=lambda: asked.append(1))
    for at, data in [(0x48, "1028"), (0x48, "ff"), (0x48, "00"), (0x49, "7f"), (0x4A, "ffff"), (0x47, "ff")]:
        config.write(at, bytes.fromhex(data))
    assert asked == []
    for at, data in [(0x48, "0080"), (0x49, "80"), (0x40, "ff" * 0x40)]:
        config.write(at, bytes.fromhex(data))
    assert len(asked) == calls
    assert read(config, 0x49, 1)[0] & 0x80 == 0


def test_the_header_that_a_device_logged_migrates() -> None:
    config, other = build(CASES["error reporting"]), build(CASES["error reporting"])
    for n in range(4):
        config.set(f"aer.header_log_{n}", 0xDEADBEE0 + n)
    config.set("aer.control", 20)  # the first error pointer
    other.load(config.save())
    assert read(other, 0x118, 20).hex() == "14000000e0beaddee1beaddee2beaddee3beadde"


def test_each_list_is_chained_on_its_own() -> None:
    case = (PowerManagement(), DeviceSerialNumber(1), PcieEndpoint(), AdvancedErrorReporting(), VendorSpecific(b"x"))
    config = ConfigSpace(1, 2, capabilities=case)
    assert read(config, 0x34, 1)[0] == 0x40
    assert [read(config, at, 2).hex() for at in (0x40, 0x48, 0x84)] == ["0148", "1084", "0900"]
    assert [read(config, at, 4).hex() for at in (0x100, 0x10C)] == ["0300c110", "01000200"]


def test_an_expansion_rom_is_measured_as_a_bar_is() -> None:
    config = build(CASES["rom of 2 KiB"])
    config.write(0x30, b"\xfe\xff\xff\xff")  # all but the enable bit, as firmware does
    assert read(config, 0x30, 4).hex() == "00f8ffff"
    config.write(0x30, b"\x01\x08\xff\xfe")
    assert read(config, 0x30, 4).hex() == "0108fffe"
    assert read(build(CASES["power management"]), 0x30, 4) == bytes(4)
