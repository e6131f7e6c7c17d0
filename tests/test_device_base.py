"""What a class declares, Device makes of it: regions, config space, options, interrupts, memory, DMA."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from vfio_user import Bar, Client, Device, MigrationFlags, option, state
from vfio_user.errors import CommandError
from vfio_user.fds import OwnedFd
from vfio_user.wire.constants import DmaFlags, IrqSetFlags, PciIrq, RegionFlags

from .device_support import TIMEOUT, Event, attached, events, guest_memory, serving

READ_WRITE = DmaFlags.READ | DmaFlags.WRITE
ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
DISABLE = TRIGGER = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
MASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK
UNMASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK
TRIGGER_SOME = IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_TRIGGER
MASK_SOME = IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_MASK
UNMASK_SOME = IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_UNMASK
MASK_BY_EVENT = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_MASK
UNMASK_BY_EVENT = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK


class Box(Device):
    """A bit of everything: I/O and memory BARs, one of them with memory and trapped ends, all kinds of interrupts.

    A write to BAR0 triggers the vector written; a write of 8 bytes at 8 of BAR0 starts a DMA to that address.
    """

    vendor_id, device_id, revision, class_code = 0x494F, 0x0B0B, 7, 0x058000
    subsystem_vendor_id, subsystem_id = 0x1AF4, 0x1100
    bars = {
        0: Bar(0x100, io=True),
        2: Bar(0x4000, memory=True, trapped=((0, 16), (0x3FFF, 1))),
        4: Bar(0x1000, bits64=True),
    }
    intx, msi_vectors, msix_vectors = True, 4, 8

    count = state(0)
    table = state([1, 2])
    speed = option(3, "a number")
    name = option("x", "a text")
    fast = option(False, "a switch")

    def __init__(self, **options: object) -> None:
        self.accesses: list[tuple[str, int, int, bytes | int]] = []
        super().__init__(**options)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        self.accesses.append(("read", bar, offset, len(data)))
        data[:] = bytes([bar + 1]) * len(data)

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        self.accesses.append(("write", bar, offset, bytes(data)))
        self.count += 1
        self.table.append(len(data))
        if bar == 0 and offset == 8:
            address = int.from_bytes(data, "little")
            self.defer(lambda: self.dma.write(address, b"\x55" * 16))
        elif bar == 0:
            self.irq.trigger(data[0])


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture
def client(box: Box) -> Iterator[Client]:
    with attached(box) as one:
        yield one


@pytest.fixture
def lines() -> Iterator[list[Event]]:
    with events(8) as made:
        yield made


def taken(lines: Sequence[Event]) -> list[int]:
    return [line.take() for line in lines]


# Declarations


def test_regions_and_config_space_follow_the_declaration(client: Client) -> None:
    assert [region.size for region in client.regions] == [0x100, 0x1000, 0x4000, 0, 0x1000, 0, 0, 0x100, 0]
    assert client.regions[2].flags & RegionFlags.MMAP
    assert client.regions[2].sparse_areas == ((0x1000, 0x2000),)
    assert not any(client.regions[index].flags & RegionFlags.MMAP for index in (0, 1, 4, 7))
    assert [irq.count for irq in client.irqs] == [1, 4, 8, 1, 1]
    config = client.region_read(7, 0, 64)
    assert config[:4].hex() == "4f490b0b"
    assert config[8:12].hex() == "07008005"
    assert config[0x2C:0x30].hex() == "f41a0011"
    assert config[0x3D] == 1
    assert [config[0x10 + 4 * bar] & 0xF for bar in range(6)] == [1, 0, 0, 0, 4, 0]


def test_capabilities_form_a_chain_with_msi_and_msix(client: Client) -> None:
    config = client.region_read(7, 0, 256)
    assert config[6] & 0x10
    ids, at = [], config[0x34]
    while at:
        ids.append(config[at])
        at = config[at + 1]
    assert ids == [0x05, 0x11]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_config_space_through_region_7(client: Client, size: int) -> None:
    whole = client.region_read(7, 0, 256)
    assert b"".join(client.region_read(7, offset, size) for offset in range(0, 256, size)) == whole
    client.region_write(7, 0, b"\xff" * size)
    assert client.region_read(7, 0, 4) == whole[:4]
    client.region_write(7, 0x3C, b"\x0b")
    assert client.region_read(7, 0x3C, 1) == b"\x0b"
    with pytest.raises(CommandError):
        client.region_read(7, 256 - size + 1, size)


def test_bars_are_sized_as_firmware_does(client: Client) -> None:
    client.region_write(7, 0x10, b"\xff" * 24)
    masks = [int.from_bytes(client.region_read(7, 0x10 + 4 * bar, 4), "little") for bar in range(6)]
    assert masks == [0xFFFFFF01, 0xFFFFF000, 0xFFFFC000, 0, 0xFFFFF004, 0xFFFFFFFF]


def test_accesses_go_where_they_belong(box: Box, client: Client) -> None:
    assert client.region_read(0, 4, 2) == b"\1\1"
    assert client.region_read(4, 8, 8) == b"\5" * 8
    client.region_write(4, 0xFFF, b"x")
    assert box.accesses == [("read", 0, 4, 2), ("read", 4, 8, 8), ("write", 4, 0xFFF, b"x")]


@pytest.mark.parametrize(
    ("region", "offset", "count"), [(0, 0xFF, 2), (3, 0, 1), (6, 0, 1), (8, 0, 1), (9, 0, 1), (4, 1 << 63, 4)]
)
def test_accesses_outside_are_refused_and_never_arrive(
    box: Box, client: Client, region: int, offset: int, count: int
) -> None:
    with pytest.raises(CommandError) as read:
        client.region_read(region, offset, count)
    with pytest.raises(CommandError) as write:
        client.region_write(region, offset, bytes(count))
    assert (read.value.errno, write.value.errno) == (errno.EINVAL, errno.EINVAL)
    assert box.accesses == []


def test_memory_of_a_bar_is_shared_but_for_its_trapped_ends(box: Box, client: Client) -> None:
    (area,) = client.regions[2].map()
    assert (area.offset, area.size) == (0x1000, 0x2000)
    area.memory[:5] = b"there"
    assert client.region_read(2, 0x1000, 5) == b"there"
    client.region_write(2, 0x2FFF, b"!")
    assert bytes(area.memory[-1:]) == b"!"
    assert bytes(box.memory[2][0x1000:0x1005]) == b"there"
    assert box.accesses == []
    client.region_read(2, 15, 1)
    client.region_write(2, 0x3FFF, b"?")
    assert box.accesses == [("read", 2, 15, 1), ("write", 2, 0x3FFF, b"?")]


def test_the_msix_table_has_a_bar_of_its_own(box: Box, client: Client) -> None:
    client.region_write(1, 16, bytes(range(4, 20)))
    assert client.region_read(1, 16, 16) == bytes(range(4, 16)) + bytes(4)
    client.region_write(0, 0, b"\5")
    assert client.region_read(1, 0x800, 8) == b"\x20" + bytes(7)
    assert [one for one in box.accesses if one[1] == 1] == []


class Bare(Device):
    vendor_id, device_id = 0x494F, 0x0001


def test_a_device_without_anything_is_still_a_pci_device() -> None:
    with attached(Bare()) as client:
        assert client.region_read(7, 0, 4) == bytes.fromhex("4f490100")
        assert [region.size for region in client.regions] == [0] * 7 + [256, 0]
        assert [irq.count for irq in client.irqs] == [0, 0, 0, 1, 1]
        assert client.migration_flags() == MigrationFlags.STOP_COPY


def make(**declared: Any) -> Callable[[], Device]:
    return type("Made", (Device,), {"vendor_id": 0x494F, "device_id": 1} | declared)


@pytest.mark.parametrize(
    "declared",
    [
        {"bars": {6: Bar(16)}},
        {"bars": {5: Bar(16, bits64=True)}},
        {"bars": {0: Bar(16, bits64=True), 1: Bar(16)}},
        {"msi_vectors": 3},
        {"msi_vectors": 64},
        {"msix_vectors": 2049},
        {"msix_vectors": 1, "msix_bar": 6},
        {"msix_vectors": 1, "msix_bar": 0, "bars": {0: Bar(16)}},
        {"msix_vectors": 1, "msix_bar": 0, "bars": {0: Bar(256, io=True)}},
        {"msix_vectors": 1, "msix_bar": 0, "bars": {0: Bar(0x2000, memory=True)}},
        {"msix_vectors": 1, "bars": {index: Bar(16) for index in range(6)}},
        {"vendor_id": 1 << 16},
    ],
    ids=str,
)
def test_declarations_that_no_pci_device_can_have(declared: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make(**declared)()


def test_msix_in_a_bar_of_the_device() -> None:
    device = make(bars={0: Bar(0x2000)}, msix_vectors=4, msix_bar=0, bar_read=Box.bar_read, accesses=[])()
    with attached(device) as client:
        assert client.region_read(0, 12, 4) == b"\1\0\0\0"
        assert client.region_read(0, 0x1000, 4) == b"\1" * 4
        assert [region.size for region in client.regions[:3]] == [0x2000, 0, 0]


# Options and state


def test_options_have_defaults_and_are_set_by_keyword() -> None:
    assert (Box().speed, Box().name, Box().fast) == (3, "x", False)
    given = Box(speed=5, name="y", fast=True)
    assert (given.speed, given.name, given.fast) == (5, "y", True)


def test_an_unknown_option_names_itself_and_those_that_exist() -> None:
    with pytest.raises(TypeError, match=r"Box has no option colour; there are: fast, name, speed"):
        Box(colour=1)
    with pytest.raises(TypeError, match=r"Device has no option colour; there are: none"):
        Device(colour=1)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("speed", "7", 7), ("speed", "0x10", 16), ("name", "7", "7"), ("fast", "yes", True), ("fast", "OFF", False)],
)
def test_text_becomes_the_value_of_an_option(name: str, text: str, value: object) -> None:
    parsed = Box.declared_options[name].parse(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(("name", "text"), [("speed", "quick"), ("speed", "1.5"), ("speed", ""), ("fast", "maybe")])
def test_text_that_is_no_value_of_an_option(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Box.declared_options[name].parse(text)


def test_state_is_inherited_and_never_shared() -> None:
    class Child(Box):
        extra = state({"a": [1]})
        count = state(9)

    defaults = {name: declared.default for name, declared in Child.declared_state.items()}
    assert defaults == {"count": 9, "table": [1, 2], "extra": {"a": [1]}}
    assert "extra" not in Box.declared_state
    one, other = Child(), Child()
    one.extra["a"].append(2)
    one.table.append(3)
    assert (other.extra, other.table, Child().extra) == ({"a": [1]}, [1, 2], {"a": [1]})
    one.reset()
    assert (one.extra, one.table, one.count) == ({"a": [1]}, [1, 2], 9)


def test_reset_restores_state_config_and_interrupts_but_not_what_the_client_gave(
    box: Box, client: Client, lines: list[Event]
) -> None:
    client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 1, [lines[0].fd])
    client.region_write(7, 4, b"\7\0")
    client.region_write(0, 0, b"\1")
    with guest_memory(4096) as memory:
        client.dma_map(0, 4096, memory)
        client.reset()
        assert (box.count, box.table) == (0, [1, 2])
        assert client.region_read(7, 4, 2) == b"\0\0"
        assert client.region_read(1, 0x800, 1) == b"\0"  # what was pending is gone
        client.region_write(0, 0, b"\0")
        assert lines[0].take() == 1
        client.region_write(0, 8, bytes(8))
        client.region_read(0, 0, 1)
        assert os.pread(memory, 16, 0) == b"\x55" * 16


def test_state_and_config_outlive_the_client_and_what_it_gave_does_not(box: Box, lines: list[Event]) -> None:
    with serving(box) as path, guest_memory(4096) as memory:
        with Client.connect(path, TIMEOUT) as client:
            client.dma_map(0, 4096, memory)
            client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 8, [line.fd for line in lines])
            client.region_write(7, 4, b"\7\0")
            client.region_write(0, 0, b"\3")
            assert taken(lines) == [0, 0, 0, 1, 0, 0, 0, 0]
        with Client.connect(path, TIMEOUT) as client:
            assert client.region_read(7, 4, 1) == b"\7"
            assert (box.count, list(box.dma)) == (1, [])
            client.region_write(0, 0, b"\3")
            assert taken(lines) == [0] * 8
            client.set_irqs(PciIrq.MSIX, ASSIGN, 3, 1, [lines[3].fd])  # nothing was lost meanwhile
            assert lines[3].take() == 1


# Interrupts, by SET_IRQS


def raise_vector(client: Client, vector: int) -> None:
    client.region_write(0, 0, bytes([vector]))


@pytest.mark.parametrize(("index", "count"), [(PciIrq.MSI, 4), (PciIrq.MSIX, 8)])
def test_each_vector_has_its_eventfd(client: Client, lines: list[Event], index: int, count: int) -> None:
    client.set_irqs(index, ASSIGN, 0, count, [line.fd for line in lines[:count]])
    for vector in range(count):
        raise_vector(client, vector)
        assert taken(lines) == [int(one == vector) for one in range(8)]


def test_msix_before_msi_before_intx(client: Client, lines: list[Event]) -> None:
    for index in (PciIrq.INTX, PciIrq.MSI, PciIrq.MSIX):
        client.set_irqs(index, ASSIGN, 0, 1, [lines[index].fd])
        raise_vector(client, 0)
        assert taken(lines[:3]) == [int(one == index) for one in range(3)]
    for index in (PciIrq.MSIX, PciIrq.MSI):
        client.set_irqs(index, DISABLE, 0, 0)
        raise_vector(client, 0)
        assert taken(lines[:3]) == [int(one == index - 1) for one in range(3)]


def test_pending_without_an_eventfd_fires_when_there_is_one(client: Client, lines: list[Event]) -> None:
    raise_vector(client, 5)
    raise_vector(client, 5)
    assert client.region_read(1, 0x800, 1) == b"\x20"
    client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 8, [line.fd for line in lines])
    assert taken(lines) == [0, 0, 0, 0, 0, 1, 0, 0]


def test_loop_back_by_none_and_bool(client: Client, lines: list[Event]) -> None:
    client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 8, [line.fd for line in lines])
    client.set_irqs(PciIrq.MSIX, TRIGGER, 2, 3)
    assert taken(lines) == [0, 0, 1, 1, 1, 0, 0, 0]
    client.set_irqs(PciIrq.MSIX, TRIGGER_SOME, 1, 6, data=b"\1\0\0\1\1\0")
    assert taken(lines) == [0, 1, 0, 0, 1, 1, 0, 0]


def test_mask_and_unmask_by_bool_are_done_per_element(client: Client, lines: list[Event]) -> None:
    client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 8, [line.fd for line in lines])
    client.set_irqs(PciIrq.MSIX, MASK_SOME, 0, 4, data=b"\1\0\1\1")
    for vector in range(4):
        raise_vector(client, vector)
    assert taken(lines) == [0, 1, 0, 0, 0, 0, 0, 0]
    assert client.region_read(1, 0x800, 1) == b"\x0d"
    client.set_irqs(PciIrq.MSIX, UNMASK_SOME, 2, 2, data=b"\1\0")
    assert taken(lines) == [0, 0, 1, 0, 0, 0, 0, 0]
    client.set_irqs(PciIrq.MSIX, UNMASK, 0, 8)
    assert taken(lines) == [1, 0, 0, 1, 0, 0, 0, 0]
    client.set_irqs(PciIrq.MSIX, MASK, 7, 1)
    raise_vector(client, 7)
    assert taken(lines) == [0] * 8


def test_mask_and_unmask_by_eventfd(client: Client, lines: list[Event]) -> None:
    with events(4) as (mask0, mask1, unmask0, unmask1):
        client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 8, [line.fd for line in lines])
        client.set_irqs(PciIrq.MSIX, MASK_BY_EVENT, 0, 2, [mask0.fd, mask1.fd])
        client.set_irqs(PciIrq.MSIX, UNMASK_BY_EVENT, 0, 2, [unmask0.fd, unmask1.fd])
        mask1.signal()
        wait_until(lambda: not readable(mask1))
        raise_vector(client, 0)
        raise_vector(client, 1)
        assert taken(lines[:2]) == [1, 0]
        unmask1.signal()
        assert lines[1].wait() == 1
        # taken away again, they do nothing
        client.set_irqs(PciIrq.MSIX, MASK_BY_EVENT, 0, 2)
        mask0.signal()
        raise_vector(client, 0)
        assert lines[0].take() == 1
        assert readable(mask0)


def readable(event: Event) -> bool:
    with open(f"/proc/self/fdinfo/{event.fd}") as info:
        count = next(line for line in info if line.startswith("eventfd-count:"))
    return int(count.split()[1], 16) > 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


class Watcher:
    """A link that only knows what it was asked to watch."""

    spin = 0.0

    def __init__(self) -> None:
        self.watches: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        self.watches[fd] = ready

    def unwatch(self, fd: int) -> None:
        del self.watches[fd]

    def stop(self) -> None:
        raise AssertionError

    def defer(self, work: Callable[[], None]) -> None:
        raise AssertionError

    def dma_read(self, address: int, buffer: memoryview) -> None:
        raise AssertionError

    def dma_write(self, address: int, data: memoryview) -> None:
        raise AssertionError


@pytest.mark.parametrize("blocking", [False, True])
def test_a_signal_that_the_client_took_back_neither_masks_nor_blocks(box: Box, blocking: bool) -> None:
    """It shares the eventfd, and may read it between the server's poll and the server's read."""
    link = Watcher()
    box.connected(link)
    with events(2) as (mask, line):
        os.set_blocking(mask.fd, blocking)
        box.set_irqs(PciIrq.MSIX, ASSIGN, 0, 1, [OwnedFd.duplicate(line.fd)])
        box.set_irqs(PciIrq.MSIX, MASK_BY_EVENT, 0, 1, [OwnedFd.duplicate(mask.fd)])
        (ready,) = link.watches.values()
        ready()
        box.irq.trigger(0)
        assert line.take() == 1
        mask.signal()
        ready()
        box.irq.trigger(0)
        assert line.take() == 0
        box.disconnected()
        assert link.watches == {}


def test_eventfds_that_are_replaced_or_taken_away_hear_nothing(client: Client, lines: list[Event]) -> None:
    client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 3, [line.fd for line in lines[:3]])
    client.set_irqs(PciIrq.MSIX, ASSIGN, 1, 1, [lines[3].fd])
    client.set_irqs(PciIrq.MSIX, ASSIGN, 2, 1)
    for vector in range(3):
        raise_vector(client, vector)
    assert taken(lines[:4]) == [1, 0, 0, 1]
    client.set_irqs(PciIrq.MSIX, DISABLE, 0, 0)
    raise_vector(client, 0)
    assert taken(lines) == [0] * 8


def test_an_end_of_interrupt_by_unmask_lets_a_standing_level_out_again(box: Box, lines: list[Event]) -> None:
    line = lines[0]
    box.irq.assert_()  # before anybody listens
    with attached(box) as client:
        client.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [line.fd])
        assert line.take() == 1
        client.set_irqs(PciIrq.INTX, UNMASK, 0, 1)
        assert line.take() == 1
        assert client.region_read(7, 6, 1)[0] & 8
        box.irq.deassert()
        client.set_irqs(PciIrq.INTX, UNMASK, 0, 1)
        assert line.take() == 0
        assert not client.region_read(7, 6, 1)[0] & 8


def test_the_command_register_holds_intx_back(box: Box, client: Client, lines: list[Event]) -> None:
    client.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [lines[0].fd])
    client.region_write(7, 4, b"\0\4")
    box.irq.assert_()
    assert lines[0].take() == 0
    client.region_write(7, 4, b"\0\0")
    assert lines[0].take() == 1
    client.region_write(7, 4, b"\0\4")
    client.reset()
    box.irq.assert_()
    assert lines[0].take() == 1


@pytest.mark.parametrize("index", [PciIrq.ERR, PciIrq.REQ])
def test_error_and_request_interrupts(box: Box, client: Client, lines: list[Event], index: int) -> None:
    client.set_irqs(index, ASSIGN, 0, 1, [lines[0].fd])
    box.irq.fire(index)
    assert lines[0].take() == 1


# DMA and deferred work


def test_a_reply_comes_before_the_dma_that_the_command_asked_for(box: Box) -> None:
    """Else a client that answers DMA only between its calls, as QEMU does, and the server would wait for each other."""
    memory = bytearray(4096)
    with attached(box) as client:
        client.dma_map(0, 4096, memory=memory)
        client.region_write(0, 8, bytes(8))
        assert memory[:16] == bytes(16)  # the write is answered, and nobody has answered a DMA_WRITE yet
        wait_until(lambda: client.serve_dma(0.01) == 1)
        assert memory[:16] == b"\x55" * 16


def test_deferred_work_without_a_client_is_done_at_once(box: Box) -> None:
    done: list[int] = []
    box.defer(lambda: done.append(1))
    assert done == [1]
    assert box.link is None


class Stopping(Box):
    """Notes when it is asked to stop its DMA."""

    def quiesce(self) -> None:
        self.accesses.append(("quiesce", 0, 0, 0))

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self.accesses.append(("unmap", 0, 0, 0))
        super().dma_unmap(flags, address, size)

    def on_reset(self) -> None:
        self.accesses.append(("reset", 0, 0, 0))


def test_dma_is_quiesced_before_unmap_and_reset() -> None:
    device = Stopping()
    with attached(device) as client, guest_memory(4096) as memory:
        client.dma_map(0, 4096, memory)
        client.dma_unmap(0, 4096)
        client.reset()
        assert [what for what, *_ in device.accesses] == ["quiesce", "unmap", "quiesce", "reset"]


def test_a_device_that_fails_costs_one_error_reply(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Box):
        def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
            if offset == 0:
                raise OSError(errno.ENODEV, "gone")
            raise KeyError("a bug")

    with attached(Broken()) as client:
        for offset, error in ((0, errno.ENODEV), (1, errno.EIO)):
            with pytest.raises(CommandError) as refused:
                client.region_read(0, offset, 1)
            assert refused.value.errno == error
        assert client.region_read(7, 0, 2) == b"\x4f\x49"
    assert [record.exc_info is not None for record in caplog.records] == [True]  # the bug, with its traceback


def test_deferred_work_that_fails_does_not_end_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    with attached(Box()) as client:
        client.region_write(0, 8, (1 << 40).to_bytes(8, "little"))  # nothing is mapped there
        assert client.region_read(0, 0, 1) == b"\1"
    assert len(caplog.records) == 1


def test_a_bar_that_nobody_overrides_reads_0_and_ignores_writes() -> None:
    with attached(make(bars={0: Bar(16)})()) as client:
        client.region_write(0, 0, b"\xff" * 16)
        assert client.region_read(0, 0, 16) == bytes(16)
