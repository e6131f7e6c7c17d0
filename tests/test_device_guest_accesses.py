"""A guest can do nothing that raises: random accesses to a device that has everything, against a model of it.

The model is written from the specifications and the documented behaviour: flat arrays of bytes with masks, and a few
sets for the interrupts. It shares no code with the package.
"""

from __future__ import annotations

import contextlib
import os
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfio_user import Bar, Device, DeviceState, register, state
from vfio_user.fds import OwnedFd
from vfio_user.pci import (
    AdvancedErrorReporting,
    DeviceSerialNumber,
    PcieEndpoint,
    PowerManagement,
    VendorSpecific,
    VendorSpecificExtended,
)
from vfio_user.wire.constants import IrqSetFlags

ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
MASK, UNMASK, TRIGGER = (
    IrqSetFlags.DATA_NONE | action
    for action in (IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, IrqSetFlags.ACTION_TRIGGER)
)
pytestmark = pytest.mark.timeout(240)

REGISTERS, MEMORY, PORTS, ROM, CONFIG = 0, 2, 4, 6, 7
INTX, MSI, MSIX = range(3)
VECTORS = {INTX: 1, MSI: 4, MSIX: 4}
SIZES = {REGISTERS: 0x2000, MEMORY: 0x4000, PORTS: 0x20, ROM: 0x800, CONFIG: 0x1000}
COMMAND, PM_CONTROL, DEVICE_CONTROL, MSI_CONTROL, MSI_MASK, MSIX_CONTROL = 0x04, 0x44, 0x50, 0x8A, 0x98, 0xA2
ROM_CONTENT = bytes(range(1, 101))


class Everything(Device):
    """All kinds of BARs, capabilities, registers and interrupts."""

    vendor_id, device_id = 0x494F, 0x0E0E
    bars = {
        REGISTERS: Bar(SIZES[REGISTERS]),
        MEMORY: Bar(0x4000, memory=True, bits64=True, prefetchable=True, trapped=((0, 16), (0x3000, 0x1000))),
        PORTS: Bar(SIZES[PORTS], io=True),
    }
    capabilities = (
        PowerManagement(),
        PcieEndpoint(),
        VendorSpecific(b"\x5a", b"\x0f"),
        DeviceSerialNumber(0x1122334455667788),
        AdvancedErrorReporting(),
        VendorSpecificExtended(0xBEEF, 1, bytes(4), b"\xff\0\xff"),
    )
    intx, msi_vectors, msi_masking, msix_vectors, msix_bar = True, 4, True, 4, REGISTERS
    rom = ROM_CONTENT

    scratch = register(0x100, reset=0x11, writable=0xFFFF00FF)
    events = register(0x104, w1c=0xF, reset=0x80)
    kick = register(0x108, width=8, strobe=(1 << 64) - 1)
    level = register(0x110, width=3, writable=1)
    hidden = register(0x3008, bar=MEMORY, writable=0xFFFF)
    ports = state(bytearray(SIZES[PORTS]))

    @kick.on_write
    def kicked(self, old: int, new: int) -> None:
        self.events |= 1 << new % 4
        self.irq.trigger(new % 4)

    @level.on_write
    def leveled(self, old: int, new: int) -> None:
        (self.irq.assert_ if new else self.irq.deassert)()

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        own = self.ports if bar == PORTS else bytes((offset + at) & 0xFF for at in range(-offset, SIZES[bar] - offset))
        data[:] = own[offset : offset + len(data)]

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        if bar == PORTS:
            self.ports[offset : offset + len(data)] = data


# offset, bytes after a reset, writable bytes, write-one-to-clear bytes
CONFIG_LAYOUT = [
    (0x00, "4f490e0e", "", ""),
    (0x04, "00001000", "47050000", "000000f9"),
    (0x08, "000000ff00000000", "00000000ff000000", ""),  # PCI Express has no latency timer
    (0x10, "00000000", "00e0ffff", ""),
    (0x18, "0c00000000000000", "00c0ffffffffffff", ""),
    (0x20, "01000000", "e0ffffff", ""),
    (0x30, "00000000", "01f8ffff", ""),
    (0x34, "40", "", ""),
    (0x3C, "0001", "ff00", ""),
    (0x40, "01480300 0800", "00000000 0300", ""),
    (0x48, "10840200 00800010 10280000 11000000 00001100", "00000000 00000000 ff780000 00000000 cb000000", ""),
    (0x52, "00", "", "0f"),
    (0x6C, "10000000 0000 0000 02000000 01000000", "00000000 1000 0000 00000000 0f000000", ""),
    (0x84, "0988045a", "0000000f", ""),
    (0x88, "05a08401", "00007100", ""),
    (0x8C, "00" * 12, "fcffffffffffffffffff0000", ""),
    (0x98, "00000000 00000000", "0f000000", ""),
    (0xA0, "11000300 00000000 00080000", "000000c0", ""),
    (0x100, "0300c110 8877665544332211", "", ""),
    (0x10C, "01004215", "", ""),
    (0x110, "00" * 4, "", "30f07f00"),
    (0x114, "00004000 30204600", "30f07f00 30f07f00", ""),
    (0x11C, "00" * 4, "", "c1f10000"),
    (0x120, "00e00000", "c1f10000", ""),
    (0x154, "0b000100 efbec100 00000000", "00000000 00000000 ff00ff00", ""),
]
BAR_LAYOUT = [
    *((16 * n, "00" * 12 + "01000000", "fcffffffffffffffffffffff01000000", "") for n in range(4)),
    (0x100, "11000000", "ff00ffff", ""),
    (0x104, "80000000", "", "0f000000"),
    (0x110, "000000", "010000", ""),
]
HIDDEN_LAYOUT = [(0x3008, "00000000", "ffff0000", "")]
TABLE, PBA = [range(64), range(0x800, 0x808)]
REGISTER_BYTES = {REGISTERS: [range(0x100, 0x113)], MEMORY: [range(0x3008, 0x300C)], PORTS: []}
MAPPED = range(0x1000, 0x3000)


def parts(region: int, offset: int, length: int) -> list[tuple[int, int]]:
    """An access cut where mapped memory begins and ends: (start, stop)."""
    stop = offset + length
    edges = [edge for edge in (MAPPED.start, MAPPED.stop) if region == MEMORY and offset < edge < stop]
    return list(pairwise([offset, *edges, stop]))


class Bytes:
    """Bytes with masks."""

    def __init__(self, size: int, layout: list[tuple[int, str, str, str]]) -> None:
        self.fresh, self.writable, self.w1c = (bytearray(size) for _ in range(3))
        for offset, *columns in layout:
            for array, column in zip((self.fresh, self.writable, self.w1c), columns, strict=True):
                content = bytes.fromhex(column)
                array[offset : offset + len(content)] = content
        self.now = bytearray(self.fresh)

    def write(self, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data, offset):
            self.now[at] = self.now[at] & ~self.writable[at] & ~(byte & self.w1c[at]) | byte & self.writable[at]

    def reset(self) -> None:
        self.now[:] = self.fresh

    def number(self, offset: int, size: int) -> int:
        return int.from_bytes(self.now[offset : offset + size], "little")


def touches(offset: int, length: int, *areas: range) -> bool:
    return any(offset < area.stop and area.start < offset + length for area in areas)


class Line:
    """An interrupt index: what is pending, and what of it the client hears."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pending: set[int] = set()
        self.listening: set[int] = set()
        self.masked: set[int] = set()
        self.signals = [0] * VECTORS[index]
        self.asserted = self.heard = False  # the level of INTx, and whether the client was told of it

    def waiting(self, vector: int) -> bool:
        return vector in self.pending or (self.asserted and not self.heard)

    def deliver(self, held: int) -> None:
        for vector in self.listening - self.masked:
            if self.waiting(vector) and not held >> vector & 1:
                self.pending.discard(vector)
                self.heard = self.asserted
                self.signals[vector] += 1


class Model:
    """What the device must be like."""

    def __init__(self) -> None:
        self.config = Bytes(SIZES[CONFIG], CONFIG_LAYOUT)
        self.files = {REGISTERS: Bytes(SIZES[REGISTERS], BAR_LAYOUT), MEMORY: Bytes(SIZES[MEMORY], HIDDEN_LAYOUT)}
        self.memory, self.ports = bytearray(SIZES[MEMORY]), bytearray(SIZES[PORTS])
        self.lines = [Line(index) for index in VECTORS]

    # Interrupts

    @property
    def asleep(self) -> bool:
        return self.config.number(PM_CONTROL, 2) & 3 == 3

    def held(self, index: int) -> int:
        if self.asleep:
            return -1
        return (
            -(self.config.number(COMMAND, 2) >> 10 & 1),
            self.config.number(MSI_MASK, 4),
            -(self.config.number(MSIX_CONTROL, 2) >> 14 & 1),
        )[index]

    def deliver(self) -> None:
        for line in self.lines:
            line.deliver(self.held(line.index))

    def trigger(self, vector: int) -> None:
        line = next((self.lines[i] for i in (MSIX, MSI, INTX) if self.lines[i].listening), self.lines[MSIX])
        enabled = max(line.listening) + 1 if line.index == MSI and line.listening else VECTORS[line.index]
        line.pending.add(vector % enabled)
        self.deliver()

    def set_level(self, level: bool) -> None:
        line = self.lines[INTX]
        line.heard = line.heard and level and line.asserted
        line.asserted = level
        self.deliver()

    def waiting(self, index: int) -> int:
        return sum(1 << vector for vector in self.lines[index].pending)

    # Accesses

    def read(self, region: int, offset: int, length: int) -> bytes:
        return b"".join(self.read_part(region, start, stop) for start, stop in parts(region, offset, length))

    def read_part(self, region: int, offset: int, stop: int) -> bytes:
        length = stop - offset
        if region == CONFIG:
            image = bytearray(self.config.now)
            image[6] |= 8 * self.lines[INTX].asserted
            image[0x9C] = self.waiting(MSI)
            return bytes(image[offset:stop])
        if self.asleep:
            return b"\xff" * length
        if region == ROM:
            return ROM_CONTENT.ljust(SIZES[ROM], b"\xff")[offset:stop]
        if region == PORTS:
            return bytes(self.ports[offset:stop])
        if region == REGISTERS and touches(offset, length, TABLE, PBA):
            image = bytearray(SIZES[REGISTERS])
            image[:64] = self.files[REGISTERS].now[:64]
            image[0x800] = self.waiting(MSIX)
            return bytes(image[offset:stop])
        if touches(offset, length, *REGISTER_BYTES[region]):
            image = bytearray(SIZES[region])
            for area in REGISTER_BYTES[region]:
                image[area.start : area.stop] = self.files[region].now[area.start : area.stop]
            return bytes(image[offset:stop])
        if region == MEMORY and touches(offset, length, MAPPED):
            return bytes(self.memory[offset:stop])
        return bytes(at & 0xFF for at in range(offset, stop))

    def write(self, region: int, offset: int, data: bytes) -> None:
        for start, stop in parts(region, offset, len(data)):
            self.write_part(region, start, data[start - offset : stop - offset])

    def write_part(self, region: int, offset: int, data: bytes) -> None:
        if region == CONFIG:
            self.write_config(offset, data)
        elif self.asleep or region == ROM:
            pass
        elif region == PORTS:
            self.ports[offset : offset + len(data)] = data
        elif region == REGISTERS and touches(offset, len(data), TABLE, PBA):
            file = self.files[REGISTERS]
            file.write(offset, data[: max(0, TABLE.stop - offset)])
        elif touches(offset, len(data), *REGISTER_BYTES[region]):
            self.write_registers(region, offset, data)
        elif region == MEMORY and touches(offset, len(data), MAPPED):
            self.memory[offset : offset + len(data)] = data

    def write_registers(self, region: int, offset: int, data: bytes) -> None:
        file = self.files[region]
        for area in REGISTER_BYTES[region]:
            start, stop = max(offset, area.start), min(offset + len(data), area.stop)
            file.write(start, data[start - offset : stop - offset])
        if region == REGISTERS and touches(offset, len(data), range(0x108, 0x110)):
            padded = (bytes(offset) + data).ljust(0x110, b"\0")
            vector = int.from_bytes(padded[0x108:0x110], "little") % 4
            file.now[0x104] |= 1 << vector
            self.trigger(vector)
        if region == REGISTERS and touches(offset, len(data), range(0x110, 0x113)):
            self.set_level(bool(file.now[0x110] & 1))

    def write_config(self, offset: int, data: bytes) -> None:
        power = self.config.now[PM_CONTROL] & 3
        self.config.write(offset, data)
        if self.config.now[PM_CONTROL] & 3 in (1, 2):
            self.config.now[PM_CONTROL] = self.config.now[PM_CONTROL] & ~3 | power
        at = DEVICE_CONTROL + 1 - offset
        if 0 <= at < len(data) and data[at] & 0x80:
            self.reset()
        self.deliver()

    def reset(self) -> None:
        for file in (self.config, *self.files.values()):
            file.reset()
        self.ports[:] = bytes(SIZES[PORTS])
        for line in self.lines:
            line.pending.clear()
            line.asserted = line.heard = False
        self.deliver()

    # The client

    def listen(self, index: int, vectors: set[int]) -> None:
        line = self.lines[index]
        line.listening |= vectors
        if vectors:
            line.heard = False
        self.deliver()

    def release(self, index: int) -> None:
        line = self.lines[index]
        line.listening.clear()
        line.masked.clear()
        line.heard = False

    def unmask(self, index: int, vectors: set[int]) -> None:
        self.lines[index].masked -= vectors
        self.lines[index].heard = False
        self.deliver()

    def start(self) -> None:
        self.lines[INTX].heard = False
        self.deliver()


INTERESTING = {
    REGISTERS: [0, 12, 60, 64, 0xFC, 0x100, 0x104, 0x108, 0x10F, 0x110, 0x113, 0x7FC, 0x800, 0x807, 0x808, 0x1FF0],
    MEMORY: [0, 12, 0xFF8, 0x1000, 0x2FF8, 0x3000, 0x3008, 0x300C, 0x3FF0],
    PORTS: [0, 8],
    ROM: [0, 96, 0x7F0],
    CONFIG: [0, 4, 6, 0x10, 0x18, 0x30, 0x3C, 0x40, 0x44, 0x50, 0x51, 0x52, 0x54, 0x84, 0x88, 0x8A, 0x98, 0x9C, 0xA2],
}
INTERESTING[CONFIG] += [0xFF, 0x100, 0x108, 0x110, 0x11C, 0x154, 0x15C, 0xFF0]
regions = st.sampled_from(sorted(SIZES))
places = regions.flatmap(
    lambda region: st.tuples(st.just(region), st.sampled_from(INTERESTING[region]) | st.integers(0, SIZES[region] - 1))
)
lengths = st.sampled_from([1, 2, 4, 8]) | st.integers(1, 40)
contents = st.sampled_from([b"\xff", b"\0", b"\x80", b"\1"]).flatmap(
    lambda byte: st.builds(lambda length: byte * length, lengths)
) | st.binary(min_size=1, max_size=40)
indexes = st.sampled_from([INTX, MSI, MSIX])
ranges = indexes.flatmap(
    lambda index: st.tuples(st.just(index), st.integers(0, VECTORS[index] - 1), st.integers(1, VECTORS[index]))
).filter(lambda drawn: drawn[1] + drawn[2] <= VECTORS[drawn[0]])


class Guests(RuleBasedStateMachine):
    """A guest, its VMM, and a device, which may move to another process on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.model = Everything(), Model()
        self.eventfds = {
            (index, vector): os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            for index, count in VECTORS.items()
            for vector in range(count)
        }

    def teardown(self) -> None:
        self.device.disconnected()
        for fd in self.eventfds.values():
            os.close(fd)

    # The guest

    @rule(place=places, length=lengths)
    def read(self, place: tuple[int, int], length: int) -> None:
        region, offset = place
        length = min(length, SIZES[region] - offset)
        data = bytearray(b"\xee" * length)
        self.device.region_read(region, offset, memoryview(data))
        assert data == self.model.read(region, offset, length)
        view = self.device.region_view(region, offset, length)
        assert view is None or view == data

    @rule(place=places, content=contents)
    def write(self, place: tuple[int, int], content: bytes) -> None:
        region, offset = place
        data = content[: SIZES[region] - offset]
        self.device.region_write(region, offset, memoryview(data))
        self.model.write(region, offset, data)

    @rule(
        register=st.sampled_from([COMMAND, MSI_CONTROL, MSI_MASK, MSIX_CONTROL]),
        value=st.sampled_from([0, 1, 2, 3, 0x21, 0x404, 0x4000, 0x8000, 0xC000, 0xFFFF]) | st.integers(0, 0xFFFF),
    )
    def control(self, register: int, value: int) -> None:
        self.write((CONFIG, register), value.to_bytes(2, "little"))

    @rule(power=st.sampled_from([0, 0, 0, 1, 2, 3]))
    def power(self, power: int) -> None:
        self.write((CONFIG, PM_CONTROL), bytes([power]))

    @precondition(lambda self: self.model.asleep)
    @rule()
    def wake_up(self) -> None:
        self.power(0)

    @rule(high=st.sampled_from([0x80, 0xA8, 0xFF]))
    def reset_function(self, high: int) -> None:
        self.write((CONFIG, DEVICE_CONTROL + 1), bytes([high]))

    @rule(offset=st.sampled_from([0x0C, 0x100, 0x104, 0x108, 0x110]), value=st.integers(0, 255))
    def use_registers(self, offset: int, value: int) -> None:
        self.write((REGISTERS, offset), bytes([value]))

    # The device, by itself

    @rule(vector=st.integers(0, 3))
    def trigger(self, vector: int) -> None:
        self.device.irq.trigger(vector)
        self.model.trigger(vector)

    @rule(level=st.booleans())
    def drive_intx(self, level: bool) -> None:
        (self.device.irq.assert_ if level else self.device.irq.deassert)()
        self.model.set_level(level)

    # The VMM

    @rule(drawn=ranges)
    def listen(self, drawn: tuple[int, int, int]) -> None:
        index, start, count = drawn
        vectors = range(start, start + count)
        fds = [OwnedFd.duplicate(self.eventfds[index, vector]) for vector in vectors]
        self.device.set_irqs(index, ASSIGN, start, count, fds)
        self.model.listen(index, set(vectors))

    @rule(index=indexes)
    def stop_listening(self, index: int) -> None:
        self.device.set_irqs(index, TRIGGER, 0, 0, ())
        self.model.release(index)

    @rule(drawn=ranges, masked=st.booleans())
    def mask(self, drawn: tuple[int, int, int], masked: bool) -> None:
        index, start, count = drawn
        self.device.set_irqs(index, MASK if masked else UNMASK, start, count, ())
        vectors = set(range(start, start + count))
        if masked:
            self.model.lines[index].masked |= vectors
        else:
            self.model.unmask(index, vectors)

    @rule()
    def reset(self) -> None:
        self.device.reset()
        self.model.reset()

    @rule()
    def client_leaves(self) -> None:
        self.device.disconnected()
        for index in VECTORS:
            self.model.release(index)

    @rule(moves=st.booleans())
    def migrate(self, moves: bool) -> None:
        self.device.migration_set_state(DeviceState.STOP_COPY)
        stream = bytearray(1 << 17)
        size = self.device.migration_read_data(memoryview(stream))
        assert size < len(stream)
        if moves:
            self.client_leaves()
            self.device = Everything()
            self.device.migration_set_state(DeviceState.RESUMING)
            self.device.migration_write_data(memoryview(stream)[:size])
        self.device.migration_set_state(DeviceState.RUNNING)
        self.model.start()
        if not self.model.asleep:
            self.look_at_all_bars()

    # What must hold

    @invariant()
    def interrupts_arrive(self) -> None:
        for (index, vector), fd in self.eventfds.items():
            count = 0
            with contextlib.suppress(BlockingIOError):
                count = os.eventfd_read(fd)
            assert count == self.model.lines[index].signals[vector], (index, vector)
            self.model.lines[index].signals[vector] = 0

    @invariant()
    def config_space_is_right(self) -> None:
        data = bytearray(0x160)
        self.device.region_read(CONFIG, 0, memoryview(data))
        assert data == self.model.read(CONFIG, 0, 0x160)

    @precondition(lambda self: not self.model.asleep)
    @rule()
    def look_at_all_bars(self) -> None:
        for region, at, length in [
            (REGISTERS, 0, 64),
            (REGISTERS, 0x100, 0x13),
            (PORTS, 0, 0x20),
            (MEMORY, 0xFFF, 0x2002),
        ]:
            data = bytearray(length)
            self.device.region_read(region, at, memoryview(data))
            assert data == self.model.read(region, at, length)


TestGuests = Guests.TestCase
TestGuests.settings = settings(deadline=None, max_examples=120, stateful_step_count=50)
