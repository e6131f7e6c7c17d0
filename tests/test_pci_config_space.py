"""Config space as a guest sees it: header, BAR sizing, capability list, and nothing a guest writes can raise."""

from __future__ import annotations

import errno
from collections.abc import Callable
from mmap import PAGESIZE
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfio_user.pci import (
    Bar,
    Capability,
    ConfigSpace,
    DeviceSerialNumber,
    MsiCapability,
    MsixCapability,
    PcieEndpoint,
    Register,
    VendorSpecific,
)

BARS = {
    0: Bar(1 << 20),
    1: Bar(256, io=True),
    2: Bar(1 << 33, bits64=True, prefetchable=True),
    4: Bar(4 * PAGESIZE, memory=True, prefetchable=True, trapped=((0, PAGESIZE),)),
}


def build(**changes: Any) -> ConfigSpace:
    arguments: dict[str, Any] = {
        "vendor_id": 0x1234,
        "device_id": 0x11E8,
        "revision": 0x10,
        "class_code": 0x058001,
        "subsystem_vendor_id": 0x1AF4,
        "subsystem_id": 0x1100,
        "interrupt_pin": 1,
        "bars": BARS,
        "capabilities": (
            MsiCapability(4, per_vector_masking=True, pending=lambda: 0b1010),
            MsixCapability(5, table_bar=4, table_offset=0x20, pba_bar=4, pba_offset=0x800),
        ),
    }
    return ConfigSpace(**arguments | changes)


def read(config: ConfigSpace, offset: int, length: int) -> int:
    data = bytearray(length)
    config.read_into(offset, memoryview(data))
    return int.from_bytes(data, "little")


def write(config: ConfigSpace, offset: int, length: int, value: int) -> None:
    config.write(offset, memoryview(value.to_bytes(length, "little")))


# offset, reset bytes, writable bytes, write-one-to-clear bytes: by the books, not by the code under test.
LAYOUT = [
    (0x00, "3412e811", "", ""),
    (0x04, "0000", "4705", ""),
    (0x06, "1000", "", "00f9"),
    (0x08, "10018005", "", ""),
    (0x0C, "0000", "ffff", ""),
    (0x10, "00000000", "0000f0ff", ""),
    (0x14, "01000000", "00ffffff", ""),
    (0x18, "0c00000000000000", "00000000feffffff", ""),
    (0x20, "08000000", (-4 * PAGESIZE & 0xFFFFFFFF).to_bytes(4, "little").hex(), ""),
    (0x2C, "f41a0011", "", ""),
    (0x34, "40", "", ""),
    (0x3C, "0001", "ff00", ""),
    (0x40, "0558", "", ""),
    (0x42, "8401", "7100", ""),
    (0x44, "0000000000000000", "fcffffffffffffff", ""),
    (0x4C, "0000", "ffff", ""),
    (0x50, "00000000", "0f000000", ""),
    (0x54, "0a000000", "", ""),
    (0x58, "1100", "", ""),
    (0x5A, "0400", "00c0", ""),
    (0x5C, "24000000", "", ""),
    (0x60, "04080000", "", ""),
]


def image(column: int) -> bytearray:
    data = bytearray(256)
    for row in LAYOUT:
        content = bytes.fromhex(str(row[column]))
        data[row[0] : row[0] + len(content)] = content
    return data


accesses = st.integers(0, 255).flatmap(lambda at: st.tuples(st.just(at), st.binary(max_size=256 - at)))


@example([(0, b"\xff" * 256)], True)
@example([(0, b"\xff" * 256), (0, bytes(256))], False)
@given(st.lists(accesses, max_size=8), st.booleans())
def test_whatever_a_guest_writes_each_byte_follows_its_masks(writes: list[tuple[int, bytes]], errors: bool) -> None:
    config, model, writable, w1c = build(), image(1), image(2), image(3)
    if errors:
        config.set("status", config.get("status") | 0xF900)
        model[7] |= 0xF9
    for offset, data in writes:
        config.write(offset, memoryview(data))
        for at, byte in enumerate(data, offset):
            model[at] = (model[at] & ~writable[at] & ~(byte & w1c[at])) | (byte & writable[at])
    assert read(config, 0, 256).to_bytes(256, "little") == model
    for at in range(256):
        assert read(config, at, 1) == model[at]


@pytest.mark.parametrize("offset", [0, 0x10, 0x40, 0xFC])
@pytest.mark.parametrize(("size", "express"), [(256, ()), (4096, (PcieEndpoint(),))])
def test_an_access_that_leaves_config_space_is_einval(offset: int, size: int, express: tuple[Capability, ...]) -> None:
    config = build(capabilities=express)
    assert len(config) == size
    for at, length in [(size, 1), (offset, size - offset + 1), (-1, 1)]:
        with pytest.raises(OSError, match="bytes") as caught:
            config.read_into(at, memoryview(bytearray(length)))
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="bytes"):
            config.write(at, memoryview(bytes(length)))
    assert read(config, size - 1, 1) == 0


def test_extended_config_space_is_empty() -> None:
    assert read(build(capabilities=(PcieEndpoint(),)), 256, 4096 - 256) == 0


@pytest.mark.parametrize("index", BARS)
def test_a_guest_measures_each_bar(index: int) -> None:
    config, bar, offset = build(), BARS[index], 0x10 + 4 * index
    for dword in range(bar.width // 4):
        write(config, offset + 4 * dword, 4, 0xFFFFFFFF)
    answer, low = read(config, offset, bar.width), 0x3 if bar.io else 0xF
    assert (~answer & (1 << 8 * bar.width) - 1 | low) + 1 == bar.size
    assert answer & low == 1 * bar.io | 4 * bar.bits64 | 8 * bar.prefetchable
    address = 3 * bar.size & (1 << 8 * bar.width) - 1
    write(config, offset, bar.width, address | 5)
    assert read(config, offset, bar.width) == address | bar.flags


def test_what_is_not_there_reads_zero_after_all_ones() -> None:
    config = build(bars={}, capabilities=(), interrupt_pin=0)
    config.write(0x10, b"\xff" * (0x3C - 0x10))
    config.write(0x40, b"\xff" * (256 - 0x40))
    assert read(config, 0x10, 0x1C) == read(config, 0x30, 0xC) == read(config, 0x40, 192) == 0
    assert config.get("status") == 0
    assert not config.msi_enabled
    assert not config.msix_enabled


@pytest.mark.parametrize(
    ("bit", "property_name"),
    [
        (0x1, "io_enabled"),
        (0x2, "memory_enabled"),
        (0x4, "bus_master"),
        (0x400, "intx_disabled"),
    ],
)
def test_command_bits(bit: int, property_name: str) -> None:
    config = build()
    assert not getattr(config, property_name)
    write(config, 4, 2, bit)
    assert getattr(config, property_name)
    write(config, 4, 2, 0xFFFF & ~bit)
    assert not getattr(config, property_name)


def test_the_enable_bits_of_msi_and_msix() -> None:
    config = build()
    write(config, 0x42, 2, 0xFFFE)
    write(config, 0x5A, 2, 0x7FFF)
    assert (config.msi_enabled, config.msix_enabled) == (False, False)
    write(config, 0x42, 2, 1)
    assert (config.msi_enabled, config.msix_enabled) == (True, False)
    write(config, 0x5A, 2, 0x8000)
    assert (config.msi_enabled, config.msix_enabled) == (True, True)


def test_interrupt_status_is_the_devices_and_leaves_its_neighbours_alone() -> None:
    config = build()
    config.set("status", config.get("status") | 0x8000)
    config.interrupt_status = True
    write(config, 6, 2, 0x0008)
    assert config.get("status") == 0x8018
    assert config.interrupt_status
    config.interrupt_status = False
    assert config.get("status") == 0x8010
    write(config, 6, 2, 0xFFFF)
    assert config.get("status") == 0x0010


class Vendor(Capability):
    """A vendor-specific capability, as a device's author would write one."""

    def registers(self) -> list[Register]:
        return [Register(2, 1, "length", self.length), Register(3, 2, "scratch", writable=0xFFFF)]


def test_the_capability_list_can_be_walked() -> None:
    capabilities = (Vendor(9, 5, "one"), MsiCapability(), Vendor(9, 7, "two"))
    config = build(capabilities=capabilities)
    found, offset = [], read(config, 0x34, 1)
    while offset:
        found.append((offset, read(config, offset, 1)))
        offset = read(config, offset + 1, 1)
    assert found == [(0x40, 9), (0x48, 5), (0x58, 9)]
    write(config, 0x5B, 2, 0xBEEF)
    assert (config.get("one.scratch"), config.get("two.scratch")) == (0, 0xBEEF)
    assert config.get("msi.control") == 0x80


@given(st.lists(accesses, max_size=4))
def test_saved_config_space_loads_into_the_same_device(writes: list[tuple[int, bytes]]) -> None:
    config, other = build(), build()
    for offset, data in writes:
        config.write(offset, data)
    config.interrupt_status = True
    other.load(config.save())
    assert other.save() == config.save()
    other.reset()
    assert other.save() == build().save()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"device_id": 1}, "device_id"),
        ({"revision": 1}, "revision"),
        ({"interrupt_pin": 0}, "interrupt_pin"),
        ({"bars": BARS | {1: Bar(256)}}, "bar1"),
        ({"capabilities": ()}, "missing registers: msi"),
        ({"capabilities": (*build().capabilities, VendorSpecific(b""))}, "unknown register 'vendor"),
        ({"capabilities": (MsiCapability(8, True), *build().capabilities[1:])}, "msi.control"),
    ],
)
def test_another_devices_config_space_is_refused(changes: dict[str, Any], culprit: str) -> None:
    config = build()
    before = config.save()
    with pytest.raises(ValueError, match=culprit):
        config.load(build(**changes).save())
    assert config.save() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(vendor_id=0x10000), "vendor_id"),
        (lambda: build(class_code=1 << 24), "class_code"),
        (lambda: build(interrupt_pin=5), "pin 5"),
        (lambda: build(capabilities=[DeviceSerialNumber(1)]), "'serial'.*add PcieEndpoint"),
        (lambda: build(rom_size=1024), "expansion ROM of 0x400 bytes.*power of two"),
        (lambda: build(rom_size=3 << 10), "expansion ROM"),
        (lambda: build(rom_size=1 << 25), "expansion ROM"),
        (lambda: build(bars={0: Bar(100)}, capabilities=()), "BAR 0: .*power of two"),
        (lambda: build(bars={6: Bar(16)}, capabilities=()), "BAR 6"),
        (lambda: build(bars={-1: Bar(16, bits64=True)}, capabilities=()), "BAR -1"),
        (lambda: build(bars={5: Bar(16, bits64=True)}, capabilities=()), "BAR 5 of 64 bits"),
        (lambda: build(bars={2: Bar(16, bits64=True), 3: Bar(16)}, capabilities=()), "BAR 2 of 64 bits.*move BAR 3"),
        (lambda: build(capabilities=(MsixCapability(1, 0, 0, 0, 16),), bars={}), "table: no 16 bytes.*BAR 0"),
        (lambda: build(capabilities=(MsixCapability(1, 1, 0, 1, 16),)), "memory BAR 1"),
        (lambda: build(capabilities=(MsixCapability(1, 0, 0, 0, 1 << 20),)), "PBA: no 8 bytes at 0x100000"),
        (lambda: build(capabilities=(MsixCapability(1, 0, 0, 4, PAGESIZE),)), "PBA.*add .*trapped"),
        (lambda: build(capabilities=(MsiCapability(), MsiCapability())), "'msi' is there twice"),
        (lambda: build(capabilities=[Capability(9, 100, f"v{n}") for n in range(2)]), "'v1' ends at 0x108"),
        (lambda: build(capabilities=[Vendor(9, 4, "v")]), "'scratch'.*not inside the 4 bytes of 'v'"),
        (lambda: Capability(0x100, 2, "x"), "'x'"),
        (lambda: Capability(9, 1, "x"), "'x'"),
        (lambda: Capability(9, 193, "x"), "'x'"),
        (lambda: MsiCapability(3), "power of two"),
        (lambda: MsiCapability(64), "1 to 32"),
        (lambda: MsiCapability(0), "1 to 32"),
        (lambda: MsixCapability(0, 0, 0, 0, 16), "1 to 2048"),
        (lambda: MsixCapability(2049, 0, 0, 1, 0), "1 to 2048"),
        (lambda: MsixCapability(1, 6, 0, 0, 0), "table at 0x0 of BAR 6"),
        (lambda: MsixCapability(1, 0, 0, 0, 20), "PBA at 0x14"),
        (lambda: MsixCapability(2, 0, 0, 0, 24), "overlap"),
        (lambda: MsixCapability(65, 0, 8, 0, 0), "overlap"),
    ],
)
def test_a_wrong_declaration_fails_when_built(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_table_and_pba_may_touch() -> None:
    MsixCapability(2, 0, 0, 0, 32)
    MsixCapability(64, 0, 8, 0, 0)
    assert build(capabilities=(MsixCapability(2048, 0, 0, 0, 0x8000),)).get("msix.control") == 2047
