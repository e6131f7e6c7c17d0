"""The small NVMe driver and what NVM Express wants of a controller, with QEMU's own one: is it the tests that err?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import test_nvme_conformance as ours
from tests.nvme_support import BLOCK, BLOCKS, Peer
from vfio_user.devices.nvme import Nvme
from vfio_user.testing.nvme import NvmeDriver
from vfio_user.testing.nvme.workload import NvmeWorkload
from vfio_user.testing.qtest import QtestMachine, devfn

from .conftest import serving

pytestmark = pytest.mark.qemu

SLOT = devfn(4)
BAR = 0xE000_0000
MESSAGES = 0x10_0000
"""Where the messages of MSI-X arrive: 4 bytes for each vector."""
MEMORY, MEMORY_SIZE = 0x20_0000, 16 << 20
VECTORS = 8
MSIX, CAPABILITIES = 0x11, 0x34

DIFFERS = {
    "data that is nowhere": "SUCCESS",
    "delete CQ 0": "COMPLETION_QUEUE_INVALID",
    "delete no CQ": "COMPLETION_QUEUE_INVALID",
    "get a feature by a reserved selector": "SUCCESS",
    "unknown log page": "INVALID_FIELD",
    "health of one namespace, which is not supported": "INVALID_NAMESPACE_OR_FORMAT",  # it is
    "format, erase by what is reserved": "SUCCESS",
    "keep alive": "INVALID_OPCODE",  # it has none
    "the second of two fused commands alone": "INVALID_FIELD",  # it has none
    "data nowhere, I/O": "SUCCESS",
    "second page nowhere": "SUCCESS",
    "SGL sub type that is reserved": "SUCCESS",
    "SGL data nowhere": "SUCCESS",
    "discard ranges nowhere": "SUCCESS",
}
"""What QEMU's answers where the specification has another status, or leaves something out that it may leave out."""
GAPS = frozenset(
    {
        "no such arbitration",
        "chains of SGL segments",
        "discard outside",
        "do not retry",
        "completions nowhere",
        "error log",
        "events before requests",
        "ARBITRATION",
        "ASYNC_EVENT_CONFIGURATION",
        "INTERRUPT_COALESCING",
        "TEMPERATURE_THRESHOLD",
        "VOLATILE_WRITE_CACHE",
        "WRITE_ATOMICITY_NORMAL",
    }
)
"""What it does not do at all."""


class QemuNvme:
    """A machine with QEMU's controller in it, for all tests of a module; MSI-X writes into its RAM."""

    def __init__(self, qemu: Path, image: Path) -> None:
        self.image = image
        blockdev = f"driver=file,node-name=disk,filename={image},discard=unmap"
        arguments = ["-blockdev", blockdev, "-device", f"nvme,drive=disk,serial=one,addr={SLOT >> 3:02x}.0"]
        self.machine = QtestMachine(qemu, extra_args=arguments)
        self.machine.map_bar(SLOT, 0, BAR)

    def enable_msix(self) -> None:
        machine = self.machine
        at = machine.config_read(SLOT, CAPABILITIES, 1)
        while machine.config_read(SLOT, at, 1) != MSIX:
            at = machine.config_read(SLOT, at + 1, 1)
        table = BAR + (machine.config_read(SLOT, at + 4) & ~7)
        for vector in range(VECTORS):
            for offset, value in ((0, MESSAGES + 4 * vector), (4, 0), (8, 1), (12, 0)):
                machine.writel(table + 16 * vector + offset, value)
        machine.config_write(SLOT, at + 2, 0x8000, 2)

    def vectors(self) -> set[int]:
        """The vectors that were signalled since the last look."""
        found = {n for n in range(VECTORS) if self.machine.readl(MESSAGES + 4 * n)}
        for vector in found:
            self.machine.writel(MESSAGES + 4 * vector, 0)
        return found


@pytest.fixture(scope="module")
def controller(qemu: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuNvme]:
    image = tmp_path_factory.mktemp("nvme") / "disk.img"
    with image.open("wb") as file:
        file.truncate(BLOCKS * BLOCK)
    one = QemuNvme(qemu, image)
    with one.machine:
        one.enable_msix()
        yield one


@pytest.fixture
def peer(controller: QemuNvme) -> Iterator[Peer]:
    driver = NvmeDriver.of_machine(controller.machine, BAR, MEMORY, MEMORY_SIZE)
    with driver:
        driver.create_queue_pair(vector=1)
        controller.vectors()
        yield Peer("QEMU's", driver, controller.vectors, controller.image.read_bytes, DIFFERS, GAPS)


class TestRegisters(ours.TestRegisters):
    pass


class TestStatuses(ours.TestStatuses):
    pass


class TestQueues(ours.TestQueues):
    pass


class TestIdentify(ours.TestIdentify):
    pass


class TestData(ours.TestData):
    pass


class TestBlocks(ours.TestBlocks):
    pass


class TestFeatures(ours.TestFeatures):
    pass


class TestLogs(ours.TestLogs):
    pass


class TestEvents(ours.TestEvents):
    pass


class TestInterrupts(ours.TestInterrupts):
    pass


class TestShadowDoorbells(ours.TestShadowDoorbells):
    pass


# Ours behind QEMU


@pytest.mark.parametrize("anonymous", [False, True], ids=["memfd", "messages"])
def test_our_controller_in_qemu(qemu: Path, tmp_path: Path, anonymous: bool) -> None:
    """The same driver, by QEMU's accesses, on RAM that our server maps, or reaches by messages only."""
    image = tmp_path / "disk.img"
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(contextlib.closing(Nvme(path=str(image), size=BLOCKS * BLOCK)))
        serve = stack.enter_context(serving(tmp_path))
        machine = stack.enter_context(QtestMachine(qemu, [serve(device)], anonymous_ram=anonymous))
        machine.map_bar(machine.devfns[0], 0, BAR)
        driver = stack.enter_context(NvmeDriver.of_machine(machine, BAR, MEMORY, MEMORY_SIZE))
        for depth in (8, 33):
            driver.create_queue_pair(depth)
        workload = NvmeWorkload(driver, blocks=2048)
        workload.run(150)
        driver.enable_shadow_doorbells()
        workload.run(150)
        assert workload.verify() == []
        driver.flush()
        assert workload.verify_image(image.read_bytes()) == []
