"""MSI, MSI-X and DMA in a Linux guest: the stock vfio-pci behind an emulated IOMMU, driven by our ``vfio_drive``.

What a program maps there reaches our servers as DMA_MAP, page by page; what it unmaps, or leaves behind when it ends,
as DMA_UNMAP. The guest is booted once for all tests but one, each of which leaves its device as a new one.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vfio_user import Bar, Device
from vfio_user.device import register
from vfio_user.devices.edu import (
    BUFFER_ADDRESS,
    DMA_COMMAND,
    DMA_COUNT,
    DMA_DESTINATION,
    DMA_DONE,
    DMA_IRQ,
    DMA_SOURCE,
    DMA_START,
    DMA_TO_GUEST,
    FACTORIAL,
    IDENTIFICATION,
    IRQ_ACK,
    IRQ_RAISE,
    IRQ_STATUS,
    LIVENESS,
)
from vfio_user.devices.ivshmem import DOORBELL
from vfio_user.fds import OwnedFd
from vfio_user.pci import PcieEndpoint
from vfio_user.testing.linux import GuestCommandError, LinuxMachine

from .conftest import Compiler, LinuxFactory, serving

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

TIMEOUT = 20.0
PAGE = 4096
VECTORS = 4
MODULES = ["vfio-pci", "vfio_iommu_type1"]

COMMAND, MEMORY, BUS_MASTER = 4, 2, 4
ENABLE = f"write config {COMMAND} 2 {MEMORY | BUS_MASTER}"
"""vfio-pci opens a device with bus mastering off: it can send no message then, and do no DMA."""
MSI, MSIX = 0x05, 0x11
MASK_BITS_64 = 0x10
"""Where MSI with 64-bit addresses has its mask bits."""
MSIX_ENABLED, MSIX_FUNCTION_MASK = 1 << 15, 1 << 14
TABLE_BAR, TABLE_ENTRY, VECTOR_CONTROL = 1, 16, 12

SOURCE, DESTINATION, SIZE, SEND = 0x00, 0x08, 0x10, 0x14
U32, U64 = (1 << 32) - 1, (1 << 64) - 1


class Courier(Device):
    """Copies guest memory to guest memory, and says so by the vector whose number starts it.

    ``mapped`` has the regions that the client mapped, by address. Resets are counted: all, and those by the client's
    DEVICE_RESET.
    """

    vendor_id, device_id = 0x494F, 0xC0C0
    bars = {0: Bar(PAGE)}
    msi_vectors = msix_vectors = VECTORS
    msi_masking = True
    capabilities = (PcieEndpoint(),)

    source = register(SOURCE, width=8, writable=U64)
    destination = register(DESTINATION, width=8, writable=U64)
    size = register(SIZE, writable=U32)
    send = register(SEND, writable=VECTORS - 1)

    def __init__(self) -> None:
        super().__init__()
        self.mapped: dict[int, int] = {}
        self.resets = self.commanded_resets = 0

    def on_reset(self) -> None:
        self.resets += 1

    def reset(self) -> None:
        self.commanded_resets += 1
        super().reset()

    @send.on_write
    def _start(self, _old: int, _new: int) -> None:
        self.defer(self._copy)

    def _copy(self) -> None:
        with contextlib.suppress(OSError):  # not mapped: nothing is moved, and the vector says that it is over
            self.dma.write(self.destination, self.dma.read(self.source, self.size))
        self.irq.trigger(self.send)

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        super().dma_map(flags, offset, address, size, fd)
        self.mapped[address] = size

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        super().dma_unmap(flags, address, size)
        del self.mapped[address]


class Messenger(Courier):
    """The same, whose DMA goes by messages: QEMU itself looks up where the IOMMU has the memory."""

    device_id = 0xC0C1

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        if fd is not None:
            fd.close()
        super().dma_map(flags, offset, address, size, None)


@dataclass(frozen=True, slots=True)
class Found:
    """What steps printed: the values read, and by each ``interrupts`` the counts of /proc/interrupts by vector."""

    values: list[int] = field(default_factory=list)
    interrupts: list[dict[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Function:
    """A PCI function in the guest, driven through vfio-pci."""

    linux: LinuxMachine
    address: str

    def drive(self, *steps: str) -> Found:
        """Open the function, take the steps, and let it go again."""
        output = self.linux.run(shlex.join(["vfio_drive", self.address, ENABLE, *steps]), timeout=60)
        assert "nobody cared" not in self.linux.console
        return _parse(output)

    def bind(self) -> None:
        self.linux.run(
            f"echo vfio-pci >/sys/bus/pci/devices/{self.address}/driver_override && "
            f"echo {self.address} >/sys/bus/pci/drivers/vfio-pci/bind"
        )

    def unbind(self) -> None:
        self.linux.run(f"echo {self.address} >/sys/bus/pci/drivers/vfio-pci/unbind")

    def capability(self, wanted: int) -> int:
        """Where a capability is in config space."""
        config = self.linux.run_bytes(f"head -c 256 /sys/bus/pci/devices/{self.address}/config")
        at = config[0x34]
        while at and config[at] != wanted:
            at = config[at + 1]
        assert at, f"no capability {wanted:#x}"
        return at


def _parse(output: str) -> Found:
    found = Found()
    for line in output.splitlines():
        if line == "interrupts":
            found.interrupts.append({})
        elif match := re.fullmatch(r" *\d+:((?: +\d+)+) .*vfio-[a-z]+(?:\[(\d+)\])?\(.*", line):
            counts, vector = match.groups()
            found.interrupts[-1][int(vector or 0)] = sum(map(int, counts.split()))
        else:
            found.values.append(int(line, 0))
    return found


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sockets")


@contextlib.contextmanager
def serve_command(path: Path, *arguments: str) -> Iterator[int]:
    """``vfio-user serve`` as people start it: a process of its own, whose id this gives."""
    command = [sys.executable, "-m", "vfio_user", "serve", *arguments, "--socket-path", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "is served at" in process.stdout.readline()
            yield process.pid
            process.terminate()
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()


def iommu(interrupt_remapping: bool) -> dict[str, object]:
    """Arguments of a machine with an IOMMU that tells QEMU of what the guest maps."""
    remapping = "on" if interrupt_remapping else "off"
    return {
        "extra_args": ["-device", f"intel-iommu,intremap={remapping},caching-mode=on"],
        "append": "intel_iommu=on",
        "modules": MODULES,
    }


@dataclass(frozen=True, slots=True)
class Bench:
    """The guest that the tests share, its functions, and what serves them."""

    edu: Function
    edu_server: int
    ivshmem: Function
    ivshmem_server: int
    courier: Function
    device: Courier
    messenger: Function


@pytest.fixture(scope="module")
def bench(shared_linux: LinuxFactory, compiled: Compiler, sockets: Path) -> Iterator[Bench]:
    edu_path, ivshmem_path, device = sockets / "edu", sockets / "ivshmem", Courier()
    with (
        serve_command(edu_path, "edu") as edu_server,
        serve_command(ivshmem_path, "ivshmem", "-o", f"vectors={VECTORS}") as ivshmem_server,
        serving(sockets) as serve,
        contextlib.ExitStack() as machines,
    ):
        linux = shared_linux(
            [edu_path, ivshmem_path],
            ports=[[serve(device)], [serve(Messenger())]],
            files={"/bin/vfio_drive": compiled("vfio_drive")},
            **iommu(interrupt_remapping=True),
        )
        machines.callback(linux.close)
        edu, ivshmem = (Function(linux, address) for address in linux.addresses)
        courier, messenger = (Function(linux, address) for (address,) in linux.port_addresses)
        for function in (edu, ivshmem, courier, messenger):
            function.bind()
        yield Bench(edu, edu_server, ivshmem, ivshmem_server, courier, device, messenger)


def ring(vector: int) -> str:
    """The step by which ivshmem raises a vector of its own."""
    return f"write 0 {DOORBELL} 4 {vector}"


def raise_(cause: int) -> str:
    return f"write 0 {IRQ_RAISE} 4 {cause}"


def acknowledge(cause: int) -> str:
    return f"write 0 {IRQ_ACK} 4 {cause}"


def edu_dma(source: int, destination: int, size: int, command: int) -> list[str]:
    """The steps of one transfer of edu's; both ways it is over when the interrupt has come."""
    return [
        f"write 0 {DMA_SOURCE} 8 {source}",
        f"write 0 {DMA_DESTINATION} 8 {destination}",
        f"write 0 {DMA_COUNT} 8 {size}",
        f"write 0 {DMA_COMMAND} 8 {command | DMA_START | DMA_IRQ}",
        "wait msi 0",
        acknowledge(DMA_DONE),
    ]


def to_edu(iova: int, size: int) -> list[str]:
    return edu_dma(iova, BUFFER_ADDRESS, size, 0)


def from_edu(iova: int, size: int) -> list[str]:
    return edu_dma(BUFFER_ADDRESS, iova, size, DMA_TO_GUEST)


def send(source: int, destination: int, size: int, vector: int, kind: str = "msix") -> list[str]:
    """The steps by which the courier copies, and says so."""
    return [
        f"write 0 {SOURCE} 8 {source}",
        f"write 0 {DESTINATION} 8 {destination}",
        f"write 0 {SIZE} 4 {size}",
        f"write 0 {SEND} 4 {vector}",
        f"wait {kind} {vector}",
    ]


def quiet(*vectors: int, kind: str = "msix") -> list[str]:
    return [f"quiet {kind} {vector}" for vector in vectors]


def eventually(what: str, condition: Callable[[], bool]) -> None:
    """Wait until something that another thread or process does has come about."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


# Registers and interrupts


def test_registers_by_reading_and_by_mapping(bench: Bench) -> None:
    steps = ["read 0 0 4", f"write 0 {LIVENESS} 4 0x12345678", f"read 0 {LIVENESS} 4"]
    factorial = [f"write 0 {FACTORIAL} 4 10", f"until 0 {FACTORIAL} 4 0xffffffff 3628800"]
    expected = [IDENTIFICATION, ~0x12345678 & 0xFFFFFFFF]
    assert bench.edu.drive(*steps, *factorial, "mmap 0", *steps, *factorial).values == expected * 2


def test_msi_arrives_and_is_counted(bench: Bench) -> None:
    three = [raise_(1), "wait msi 0", acknowledge(1)] * 3
    assert bench.edu.drive("irq msi 0 1", "quiet msi 0", "interrupts", *three, "interrupts").interrupts == [
        {0: 0},
        {0: 3},
    ]


def test_msi_that_was_disabled_is_silent_and_comes_again_when_enabled(bench: Bench) -> None:
    once = ["irq msi 0 1", raise_(1), "wait msi 0", acknowledge(1), "interrupts", "disable msi"]
    off = [raise_(2), "quiet msi 0", f"read 0 {IRQ_STATUS} 4", acknowledge(2)]
    found = bench.edu.drive(*once, *off, *once, *off, *once)
    assert found.interrupts == [{0: 1}] * 3
    assert found.values == [2, 2]


def test_intx_is_masked_until_its_end_and_comes_again_while_its_cause_stands(bench: Bench) -> None:
    """Unmasked while it stands, it is vfio-pci that signals it: it looks at the status bit and takes no interrupt."""
    end = [acknowledge(1), "unmask intx 0 1", "quiet intx 0"]
    before, after = bench.edu.drive(
        *("irq intx 0 1", "interrupts", raise_(1), "wait intx 0", "quiet intx 0"),
        *("unmask intx 0 1", "wait intx 0", *end),
        *("mask intx 0 1", raise_(1), "quiet intx 0", "unmask intx 0 1", "wait intx 0", *end),
        *(raise_(1), "wait intx 0", "interrupts", *end),
    ).interrupts
    assert after[0] == before[0] + 2


def test_from_intx_to_msi_and_back(bench: Bench) -> None:
    def once(kind: str) -> list[str]:
        return [f"irq {kind} 0 1", raise_(1), f"wait {kind} 0", "interrupts", acknowledge(1), f"disable {kind}"]

    found = bench.edu.drive(*once("intx"), *once("msi"), *once("intx"))
    line, message, line_again = (counts[0] for counts in found.interrupts)
    assert (message, line_again) == (1, line + 1)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 2, 0, 2, 1)])
def test_each_vector_of_msix_is_itself(bench: Bench, order: Sequence[int]) -> None:
    steps = []
    for vector in order:
        others = set(range(VECTORS)) - {vector}
        steps += [ring(vector), f"wait msix {vector}", *quiet(*sorted(others))]
    found = bench.ivshmem.drive(f"irq msix 0 {VECTORS}", *steps, "interrupts")
    assert found.interrupts == [{vector: order.count(vector) for vector in range(VECTORS)}]


def test_msix_re_enabled_after_disable(bench: Bench) -> None:
    once = [f"irq msix 0 {VECTORS}", ring(1), "wait msix 1", ring(3), "wait msix 3", *quiet(0, 1, 2, 3), "interrupts"]
    found = bench.ivshmem.drive(*once, "disable msix", *once, "disable msix", *once)
    assert found.interrupts == [{0: 0, 1: 1, 2: 0, 3: 1}] * 3


def test_vectors_are_added_while_others_are_in_use(bench: Bench) -> None:
    """What came for a vector before anybody listened to it comes when somebody does."""
    found = bench.ivshmem.drive(
        *("irq msix 0 2", ring(1), "wait msix 1", ring(3), "quiet msix 3"),
        *("irq msix 2 2", "wait msix 3", ring(2), "wait msix 2", ring(0), "wait msix 0"),
        *(*quiet(0, 1, 2, 3), "silence msix 2 1", ring(2), ring(3), "wait msix 3", "quiet msix 2", "interrupts"),
        *("irq msix 2 1", "wait msix 2", "disable msix"),
    )
    assert found.interrupts[0].keys() == {0, 1, 3}


def test_a_masked_vector_waits(bench: Bench) -> None:
    """Its mask bit is in the table, which vfio-pci lets a program map."""
    control = TABLE_ENTRY * 2 + VECTOR_CONTROL
    bench.ivshmem.drive(
        *(f"mmap {TABLE_BAR}", f"irq msix 0 {VECTORS}", f"write {TABLE_BAR} {control} 4 1"),
        *(ring(2), ring(1), "wait msix 1", *quiet(0, 2, 3)),
        *(f"write {TABLE_BAR} {control} 4 0", "wait msix 2", *quiet(0, 1, 2, 3)),
        *(ring(2), "wait msix 2"),
    )


def test_the_function_mask_holds_back_all_vectors(bench: Bench) -> None:
    msix_control = bench.ivshmem.capability(MSIX) + 2

    def function_mask(bits: int) -> str:
        return f"write raw {msix_control} 2 {MSIX_ENABLED | bits}"

    bench.ivshmem.drive(
        *(f"irq msix 0 {VECTORS}", function_mask(MSIX_FUNCTION_MASK), ring(0), ring(3), *quiet(0, 1, 2, 3)),
        *(function_mask(0), "wait msix 0", "wait msix 3", *quiet(0, 1, 2, 3)),
        *(ring(1), "wait msix 1"),
    )


def test_a_doorbell_before_msix_is_enabled_is_heard_when_it_is(bench: Bench) -> None:
    bench.ivshmem.drive(ring(2), f"irq msix 0 {VECTORS}", "wait msix 2", *quiet(0, 1, 2, 3))


def test_a_vector_of_msi_waits_while_its_mask_bit_is_set(bench: Bench) -> None:
    mask_bits = bench.courier.capability(MSI) + MASK_BITS_64
    masked = f"write raw {mask_bits} 4 {1 << 2}"
    bench.courier.drive(
        *(f"irq msi 0 {VECTORS}", masked, f"write 0 {SEND} 4 2", f"write 0 {SEND} 4 1", "wait msi 1"),
        *(*quiet(0, 2, 3, kind="msi"), f"write raw {mask_bits} 4 0", "wait msi 2", *quiet(0, 1, 2, 3, kind="msi")),
    )


def test_without_bus_mastering_no_message_is_sent(bench: Bench) -> None:
    """QEMU throws it away, as hardware would, and sends the next one."""
    off, on = (f"write config {COMMAND} 2 {bits}" for bits in (MEMORY, MEMORY | BUS_MASTER))
    found = bench.ivshmem.drive(
        *(f"irq msix 0 {VECTORS}", off, ring(0), "quiet msix 0", on, ring(1), "wait msix 1", "quiet msix 0"),
        *(ring(0), "wait msix 0", "interrupts"),
    )
    assert found.interrupts == [{0: 1, 1: 1, 2: 0, 3: 0}]


# DMA


@pytest.mark.parametrize("iova", [0, 0x10_0000, 0x7F_FFFF_F000, 0x80_0000_0000])
def test_dma_both_ways(bench: Bench, iova: int) -> None:
    """Into edu, back to another place that shares no page boundary with the first, and nothing beside it."""
    there, size = iova + 0x1_0000, PAGE
    bench.edu.drive(
        *("irq msi 0 1", f"map {iova} {4 * PAGE}", f"map {there} {4 * PAGE}", f"fill {iova} {4 * PAGE} 1"),
        *(f"fill {iova + 0x123} {size} 7", *to_edu(iova + 0x123, size), *from_edu(there + 0x800, size)),
        *(f"expect {there} {0x800} 0", f"expect {there + 0x800} {size} 7", f"expect {there + 0x1800} {0x2800} 0"),
        *(f"expect {iova + 0x123} {size} 7", f"fill {iova + 0x123} {size} 0", *from_edu(iova + 0x123, size)),
        f"expect {iova + 0x123} {size} 7",
    )


def test_dma_no_longer_reaches_what_is_unmapped(bench: Bench) -> None:
    kept, gone = 0x10_0000, 0x20_0000
    bench.edu.drive(
        *("irq msi 0 1", f"map {kept} {PAGE}", f"map {gone} {2 * PAGE}", f"fill {kept} {PAGE} 5", *to_edu(kept, PAGE)),
        *(*from_edu(gone + 0x800, PAGE), f"expect {gone + 0x800} {PAGE} 5", f"fill {gone} {2 * PAGE} 0"),
        *(f"unmap {gone} {2 * PAGE}", *from_edu(gone + 0x800, PAGE), f"expect {gone} {2 * PAGE} 0"),
        *(f"fill {kept} {PAGE} 0", *from_edu(kept, PAGE), f"expect {kept} {PAGE} 5"),
        *(f"map {gone} {2 * PAGE}", *from_edu(gone + 0x800, PAGE), f"expect {gone + 0x800} {PAGE} 5"),
    )


def test_dma_by_messages(bench: Bench) -> None:
    """As far as one message reaches, and further; nothing is found any more where it was unmapped."""
    steps = ["irq msix 0 1"]
    for number, size in enumerate((1, PAGE, 64 * PAGE), start=1):
        pages = -(-size // PAGE) * PAGE
        source, destination = number << 24, 1 << 32 | number << 24
        steps += [f"map {source} {pages}", f"map {destination} {pages}"]
        steps += [f"fill {source} {size} {number}", *send(source, destination, size, 0)]
        steps += [f"expect {destination} {size} {number}", f"fill {destination} {size} 0"]
        steps += [f"unmap {destination} {pages}", *send(source, destination, size, 0)]
        steps += [f"expect {destination} {size} 0", f"unmap {source} {pages}"]
    bench.messenger.drive(*steps)


@pytest.mark.parametrize("kind", ["msi", "msix"])
def test_several_vectors_and_dma_in_one_device(bench: Bench, kind: str) -> None:
    size, source, destination = 16 * PAGE, 0x10_0000, 0x40_0000
    steps = [f"irq {kind} 0 {VECTORS}", f"map {source} {size}", f"map {destination} {size}"]
    for vector in range(VECTORS):
        others = sorted(set(range(VECTORS)) - {vector})
        steps += [f"fill {source} {size} {vector + 1}", *send(source, destination, size, vector, kind)]
        steps += [*quiet(*others, kind=kind), f"expect {destination} {size} {vector + 1}"]
    assert bench.courier.drive(*steps, "interrupts").interrupts == [dict.fromkeys(range(VECTORS), 1)]


def mapped_at(device: Courier, start: int, size: int) -> set[int]:
    """The pages of a range that are mapped."""
    return {
        page
        for address, length in list(device.mapped.items())
        for page in range(address, address + length, PAGE)
        if start <= page < start + size
    }


def test_what_a_program_maps_and_leaves_behind(bench: Bench) -> None:
    """It ends, or is killed, with memory mapped: none of that stays mapped in the server, and the next one starts anew.

    QEMU ends the address space by DMA_UNMAPs of large ranges, of which each is many DMA_MAPs.
    """
    iova, size = 0x10_0000, 32 * PAGE
    linux, device = bench.courier.linux, bench.device
    whole = set(range(iova, iova + size, PAGE))
    for _ in range(2):
        bench.courier.drive(f"map {iova} {size}")
        eventually("what the program mapped is gone", lambda: not mapped_at(device, iova, size))
        never = "until 0 0 4 1 1"
        process = linux.start(shlex.join(["vfio_drive", bench.courier.address, ENABLE, f"map {iova} {size}", never]))
        eventually("all of it is mapped", lambda: mapped_at(device, iova, size) == whole)
        linux.run("killall -KILL vfio_drive")
        with pytest.raises(GuestCommandError):
            process.wait()
        eventually("what the killed program mapped is gone", lambda: not mapped_at(device, iova, size))
    bench.courier.drive(
        *("irq msix 0 1", f"map {iova} {PAGE}", f"map {2 * iova} {PAGE}", f"fill {iova} {PAGE} 9"),
        *(*send(iova, 2 * iova, PAGE, 0), f"expect {2 * iova} {PAGE} 9"),
        *(*send(iova, iova + PAGE, PAGE, 0), *send(iova + PAGE, 2 * iova, PAGE, 0), f"expect {2 * iova} {PAGE} 9"),
    )


def test_a_region_of_many_pages(bench: Bench) -> None:
    """2 MiB are 512 DMA_MAPs, each with a file descriptor; unmapped, each has gone."""
    iova, size = 0x100_0000, 2 << 20
    bench.courier.drive(
        *("irq msix 0 1", f"map {iova} {size}", f"fill {iova} {size // 2} 3"),
        *send(iova, iova + size // 2, size // 2, 0),
        *(f"expect {iova + size // 2} {size // 2} 3", f"unmap {iova} {size}"),
    )
    eventually("it is unmapped", lambda: not mapped_at(bench.device, iova, size))


@pytest.mark.parametrize("method", ["flr", "bus"])
def test_reset(bench: Bench, method: str) -> None:
    """Registers are as in a new device; interrupts and memory are the program's and stay."""
    function, device, iova = bench.courier, bench.device, 0x10_0000
    function.linux.run(f"echo {method} >/sys/bus/pci/devices/{function.address}/reset_method")
    used = ["irq msix 0 2", f"map {iova} {2 * PAGE}", *send(iova, iova + PAGE, PAGE, 1), f"read 0 {SIZE} 4"]
    function.drive(*used)
    before, commanded_before = device.resets, device.commanded_resets
    found = function.drive(
        *(*used, "reset", f"read 0 {SIZE} 4"),
        *(f"fill {iova} {PAGE} 2", *send(iova, iova + PAGE, PAGE, 1), f"expect {iova + PAGE} {PAGE} 2", "interrupts"),
    )
    assert found.values == [PAGE, 0]
    assert found.interrupts == [{0: 0, 1: 2}]
    resets, commanded = device.resets - before, device.commanded_resets - commanded_before
    assert (resets, commanded) == (3, 0 if method == "flr" else 3)  # vfio-pci resets what it opens and closes


# The driver


def open_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def drive_anew_without_a_leak(function: Function, server: int, steps: Sequence[str]) -> None:
    """Unbind, bind and drive it three times: its server has as many descriptors after each time as before."""
    function.drive(*steps)
    before = open_fds(server)
    for _ in range(3):
        function.unbind()
        function.bind()
        function.drive(*steps)
        eventually(f"no more than {before} descriptors are open", lambda: open_fds(server) == before)


def test_edu_unbound_and_bound_three_times(bench: Bench) -> None:
    iova = 0x10_0000
    moved = [f"map {iova} {8 * PAGE}", f"fill {iova} {PAGE} 1", *to_edu(iova, PAGE), *from_edu(iova + PAGE, PAGE)]
    steps = ["irq msi 0 1", *moved, f"expect {iova + PAGE} {PAGE} 1"]
    drive_anew_without_a_leak(bench.edu, bench.edu_server, steps)


def test_ivshmem_unbound_and_bound_three_times(bench: Bench) -> None:
    steps = [f"irq msix 0 {VECTORS}", f"map 0 {8 * PAGE}", ring(3), "wait msix 3", ring(0), "wait msix 0"]
    drive_anew_without_a_leak(bench.ivshmem, bench.ivshmem_server, steps)


def test_maps_are_as_before_after_unbind_and_bind(bench: Bench) -> None:
    iova, device = 0x10_0000, bench.device
    steps = ["irq msix 0 1", f"map {iova} {8 * PAGE}", *send(iova, iova + PAGE, PAGE, 0)]
    bench.courier.drive(*steps)
    before = dict(device.mapped)
    for _ in range(3):
        bench.courier.unbind()
        bench.courier.bind()
        bench.courier.drive(*steps)
        eventually(f"{before} is what is mapped", lambda: device.mapped == before)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("wait", "it is wait INDEX VECTOR"),
        ("dance", "no such step"),
        ("", "no such step"),
        ("read 0 0x100000 4", "no number up to 0xffffc"),
        ("read 9 0 4", "no number up to 0x5"),
        ("irq msi 0 99", "no number up to 0x40"),
        ("irq pin 0 1", "none of intx, msi, msix"),
        ("unmap 0x5000 0x1000", "0 bytes were unmapped"),
        ("map 0x5001 0x1000", "VFIO_IOMMU_MAP_DMA: Invalid argument"),
        ("fill 0x5000 1 1", "no memory was ever mapped there"),
        ("irq msix 0 1", "VFIO_DEVICE_SET_IRQS: Invalid argument"),
    ],
)
def test_a_step_that_cannot_be_says_why(bench: Bench, step: str, complaint: str) -> None:
    with pytest.raises(GuestCommandError, match=re.escape(complaint)) as failed:
        bench.edu.drive(step)
    assert failed.value.status == 1


def test_without_interrupt_remapping(linux: LinuxFactory, compiled: Compiler, tmp_path: Path) -> None:
    """Messages are then what the guest writes into the capability, and every vector is set up at once."""
    edu_path, ivshmem_path, program = tmp_path / "edu", tmp_path / "ivshmem", compiled("vfio_drive")
    with (
        serve_command(edu_path, "edu"),
        serve_command(ivshmem_path, "ivshmem", "-o", f"vectors={VECTORS}"),
        contextlib.ExitStack() as machines,
    ):
        m = linux([edu_path, ivshmem_path], files={"/bin/vfio_drive": program}, **iommu(interrupt_remapping=False))
        machines.callback(m.close)
        m.run("echo 1 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
        edu, ivshmem = (Function(m, address) for address in m.addresses)
        for function in (edu, ivshmem):
            function.bind()
        moved = ["map 0x100000 0x2000", "fill 0x100000 0x1000 1", *to_edu(0x100000, PAGE), *from_edu(0x101000, PAGE)]
        assert edu.drive("irq msi 0 1", *moved, "expect 0x101000 0x1000 1", "interrupts").interrupts == [{0: 2}]
        rings = [step for vector in range(VECTORS) for step in (ring(vector), f"wait msix {vector}")]
        assert ivshmem.drive(f"irq msix 0 {VECTORS}", *rings, "interrupts").interrupts == [
            dict.fromkeys(range(VECTORS), 1)
        ]
