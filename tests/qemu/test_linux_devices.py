"""Our devices in a Linux guest: what its kernel finds, and what works, on bus 0 and behind a root port.

The tests share one guest. Each leaves the devices as it found them: bound to no driver, no interrupt pending.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from vfio_user import Device
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.testing.linux import Guest, LinuxMachine

from .conftest import Compiler, linux_machines, serving

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

MIB, PAGE = 1 << 20, 4096
PROGRAMS = ("pcimem", "edu_dma", "uio_wait")

IO, MEMORY, PREFETCH, MEMORY_64 = 0x100, 0x200, 0x2000, 0x100000
"""Flags of a resource, as the kernel's include/linux/ioport.h has them."""
MSI, MSIX = 0x05, 0x11
BUS_MASTER, MULTIFUNCTION = 0x4, 0x80

LIVENESS, SOURCE = 0x04, 0x80
IRQ_STATUS, IRQ_RAISE, IRQ_ACK = 0x24, 0x60, 0x64


@dataclass(frozen=True)
class Expected:
    """What Linux is to find of a device; BARs as (size, flags)."""

    ids: str
    class_code: str
    revision: str
    bars: Mapping[int, tuple[int, int]]
    capabilities: tuple[int, ...] = ()
    pin: int = 1


EXPECTED: Mapping[type[Device], Expected] = {
    Edu: Expected("0x1234 0x11e8", "0x00ff00", "0x10", {0: (MIB, MEMORY)}, (MSI,)),
    Gpio: Expected("0x494f 0x0dc8", "0xffff00", "0x00", {2: (256, IO)}),
    Ivshmem: Expected(
        "0x1af4 0x1110",
        "0x050000",
        "0x01",
        {0: (256, MEMORY), 1: (PAGE, MEMORY), 2: (MIB, MEMORY | PREFETCH | MEMORY_64)},
        (MSIX,),
        pin=0,
    ),
}

# No line of gpio's is shared with an edu: gpio does not say in its status that an interrupt is its own.
ALONE = (Gpio, Edu, Ivshmem)
BEHIND_PORTS = ((Edu, Ivshmem, Edu), (Gpio,))
PLACES: Mapping[str, type[Device]] = {
    **{f"00:{slot:02x}.0": kind for slot, kind in enumerate(ALONE, start=1)},
    **{
        f"{bus:02x}:00.{function}": kind
        for bus, functions in enumerate(BEHIND_PORTS, start=1)
        for function, kind in enumerate(functions)
    },
}
EVERY = pytest.mark.parametrize("place", PLACES)


def each(kind: type[Device]) -> pytest.MarkDecorator:
    """The test is for all of one kind."""
    return pytest.mark.parametrize("place", [place for place in PLACES if PLACES[place] is kind])


@dataclass(frozen=True)
class Plugged:
    """A device and where it is in the guest."""

    device: Device
    address: str

    @property
    def expected(self) -> Expected:
        return EXPECTED[type(self.device)]

    def file(self, name: str) -> str:
        return f"/sys/bus/pci/devices/{self.address}/{name}"


class World:
    """A guest with devices at PLACES."""

    def __init__(self, linux: LinuxMachine, devices: Iterable[Device]) -> None:
        addresses = [*linux.addresses, *itertools.chain(*linux.port_addresses)]
        plugged = [Plugged(device, address) for device, address in zip(devices, addresses, strict=True)]
        self.linux = linux
        self.plugged = {one.address.removeprefix("0000:"): one for one in plugged}
        assert {place: type(one.device) for place, one in self.plugged.items()} == PLACES
        for one in plugged:
            linux.run(f"echo 1 >{one.file('enable')}")

    def access(self, plugged: Plugged, file: str, *accesses: str) -> list[int]:
        """Run pcimem: what it reads."""
        return [int(line, 16) for line in self.linux.run(f"pcimem {plugged.file(file)} {' '.join(accesses)}").split()]

    def interrupts(self, plugged: Plugged) -> int:
        """How often the device's interrupt arrived at the kernel, by /proc/interrupts."""
        irq = self.linux.run(f"cat {plugged.file('irq')}").strip()
        lines = [line.split() for line in self.linux.run("cat /proc/interrupts").splitlines()]
        return sum(int(line[1]) for line in lines if line[0] == f"{irq}:")

    @contextlib.contextmanager
    def uio(self, plugged: Plugged) -> Iterator[str]:
        """Have uio_pci_generic bound to the device meanwhile: its file in /dev."""
        run, address, driver = self.linux.run, plugged.address, "uio_pci_generic"
        run(f"echo {driver} >{plugged.file('driver_override')}; echo {address} >/sys/bus/pci/drivers_probe")
        assert run(f"readlink {plugged.file('driver')}").strip().endswith(f"/{driver}")
        try:
            yield "/dev/" + run(f"ls {plugged.file('uio')}").strip()
        finally:
            run(f"echo {address} >{plugged.file('driver/unbind')}; echo >{plugged.file('driver_override')}")

    @contextlib.contextmanager
    def bus_mastering(self, plugged: Plugged, wanted: bool) -> Iterator[None]:
        """Have the device do DMA, or not, meanwhile."""
        (command,) = self.access(plugged, "config", "r16:4")
        self.access(plugged, "config", f"w16:4={command & ~BUS_MASTER | wanted * BUS_MASTER}")
        yield
        self.access(plugged, "config", f"w16:4={command}")


def make(kind: type[Device]) -> Device:
    return kind(size=MIB, vectors=2) if kind is Ivshmem else kind()


@pytest.fixture(scope="module")
def world(qemu: Path, guest: Guest, compiled: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    files = {f"/bin/{name}": compiled(name) for name in PROGRAMS}
    with serving(tmp_path_factory.mktemp("sockets")) as serve, linux_machines(qemu, guest) as start:
        devices = [make(kind) for kind in PLACES.values()]
        sockets = map(serve, devices)
        alone = list(itertools.islice(sockets, len(ALONE)))
        ports = [list(itertools.islice(sockets, len(functions))) for functions in BEHIND_PORTS]
        linux = start(alone, ports=ports, modules=["uio_pci_generic"], files=files)
        yield World(linux, devices)


def capabilities(config: bytes) -> list[int]:
    """The ids of a config space's capabilities, in their order."""
    ids, at = [], config[0x34]
    while at:
        ids.append(config[at])
        at = config[at + 1]
    return ids


# What Linux finds


@EVERY
def test_sysfs_has_the_identity_that_is_declared(world: World, place: str) -> None:
    plugged, expected = world.plugged[place], world.plugged[place].expected
    assert world.linux.run(f"cd {plugged.file('.')}; echo $(cat vendor device)").strip() == expected.ids
    assert world.linux.run(f"cat {plugged.file('class')}").strip() == expected.class_code
    assert world.linux.run(f"cat {plugged.file('revision')}").strip() == expected.revision


@EVERY
def test_sysfs_has_the_bars_that_are_declared(world: World, place: str) -> None:
    plugged = world.plugged[place]
    lines = world.linux.run(f"head -n 6 {plugged.file('resource')}").splitlines()
    found = {}
    for bar, (start, end, flags) in enumerate([int(field_, 16) for field_ in line.split()] for line in lines):
        if flags:
            found[bar] = (end - start + 1, flags & (IO | MEMORY | PREFETCH | MEMORY_64))
            assert start % found[bar][0] == 0
    assert found == plugged.expected.bars


@EVERY
def test_config_space_has_the_capabilities_that_are_declared(world: World, place: str) -> None:
    plugged = world.plugged[place]
    config = world.linux.run_bytes(f"cat {plugged.file('config')}")
    assert capabilities(config) == list(plugged.expected.capabilities)
    assert config[0x3D] == plugged.expected.pin
    assert bool(config[0x0E] & MULTIFUNCTION) == place.startswith("01:")


@EVERY
def test_linux_gives_an_irq_to_a_device_with_a_pin(world: World, place: str) -> None:
    plugged = world.plugged[place]
    irq = int(world.linux.run(f"cat {plugged.file('irq')}"))
    assert (irq not in {0, 255}) == bool(plugged.expected.pin)


# Registers


@each(Edu)
def test_registers_of_a_memory_bar_are_read_and_written(world: World, place: str) -> None:
    plugged = world.plugged[place]
    accesses = ["r32:0", f"w32:{LIVENESS}=0x12345678", f"r32:{LIVENESS}"]
    assert world.access(plugged, "resource0", *accesses) == [0x010000ED, 0xEDCBA987]
    wide = [f"w64:{SOURCE}=0x1122334455667788", f"r64:{SOURCE}", f"r32:{SOURCE}"]
    assert world.access(plugged, "resource0", *wide) == [0x1122334455667788, 0x55667788]


@each(Gpio)
def test_registers_of_an_io_bar_are_read_and_written(world: World, place: str) -> None:
    """The pins read 1 every third time, whatever is written; the read after it is the end of the interrupt."""
    plugged = world.plugged[place]
    before = plugged.device.reads  # type: ignore[attr-defined]
    values = world.access(plugged, "resource2", *["r8:0", "r16:0", "w8:0=0xff", "r32:0"] * 3, "r8:4")
    assert values == [int((before + read) % 3 == 0) for read in range(1, 10)] + [0]


@each(Ivshmem)
def test_a_memory_bar_is_one_memory_for_guest_and_device(world: World, place: str) -> None:
    plugged = world.plugged[place]
    data = random.Random(place).randbytes(MIB)
    plugged.device.memory[2][:] = data
    values = world.access(plugged, "resource2", f"r64:{PAGE}", f"r32:{MIB - 4}", "r8:1")
    where = [(PAGE, 8), (MIB - 4, 4), (1, 1)]
    assert values == [int.from_bytes(data[at : at + size], "little") for at, size in where]
    world.access(plugged, "resource2", f"w64:{MIB - 8}=0x0102030405060708", "w16:0=0xbeef", "r8:0")
    assert bytes(plugged.device.memory[2][MIB - 8 :]) == bytes(range(8, 0, -1))
    assert bytes(plugged.device.memory[2][:2]) == b"\xef\xbe"


# DMA


@each(Edu)
def test_dma_moves_a_page_of_a_process_both_ways(world: World, place: str) -> None:
    plugged = world.plugged[place]
    assert isinstance(plugged.device, Edu)
    with world.bus_mastering(plugged, True):
        source, destination = world.linux.run(f"edu_dma {plugged.file('resource0')} 10").split()
    assert plugged.device.dma_source == 0x40000
    assert plugged.device.dma_destination == int(destination, 16) != int(source, 16)
    assert bytes(plugged.device.buffer[:3]) == bytes([9, 16, 23])  # the tenth round's pattern


# Interrupts


def raise_and_take(plugged: Plugged, uio: str, cause: int, times: int) -> str:
    """The command that has the device interrupt so often, and acknowledges each."""
    return f"uio_wait {uio} {plugged.file('resource0')} {IRQ_RAISE} {IRQ_ACK} {cause} {times}"


@each(Edu)
def test_intx_arrives_at_uio_as_often_as_it_was_raised(world: World, place: str) -> None:
    """Three drivers, one after the other. /proc/interrupts may count more, which no handler took for its own: a QEMU
    that gets no time raises its line after the guest has acknowledged, until the guest accesses the device again.
    """
    plugged = world.plugged[place]
    for cause in (1, 2, 4):
        with world.uio(plugged) as uio:
            before = world.interrupts(plugged)
            assert int(world.linux.run(raise_and_take(plugged, uio, cause, 20))) == 20
            assert world.interrupts(plugged) - before >= 20
            assert world.access(plugged, "resource0", f"r32:{IRQ_STATUS}") == [0]
    assert "nobody cared" not in world.linux.console


def test_two_functions_share_a_line_and_each_gets_all_of_its_own(world: World) -> None:
    """Linux may count one more for a function whose status says "pending" while the line rises for the other."""
    first, second = world.plugged["01:00.0"], world.plugged["01:00.2"]
    assert world.linux.run(f"cat {first.file('irq')}") == world.linux.run(f"cat {second.file('irq')}")
    with world.uio(first) as one, world.uio(second) as two:
        running = world.linux.start(raise_and_take(first, one, 1, 50))
        assert int(world.linux.run(raise_and_take(second, two, 1, 50))) >= 50
        assert int(running.wait()) >= 50
    assert "nobody cared" not in world.linux.console


def test_neither_the_kernel_nor_qemu_complains(world: World) -> None:
    """But for gpio's interrupts, recorded from a sample that has none for errors."""
    complaint = re.compile(r"\bBUG\b|WARNING|nobody cared|failed to assign|can't claim|no space")
    assert [line for line in world.linux.console.splitlines() if complaint.search(line)] == []
    assert [line for line in world.linux.stderr.splitlines() if "Could not enable error recovery" not in line] == []
