"""A controller's life while its storage takes its time: whatever happens, and in whatever order, it ends well."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.devices.nvme import controller, standstill
from vfio_user.devices.nvme.constants import NSSR_RESET, Configuration, ControllerStatus, Register
from vfio_user.devices.nvme.storage.base import Storage
from vfio_user.testing.nvme.bare import NORMAL_SHUTDOWN
from vfio_user.wire.constants import DeviceState, PciRegion

from .nvme_gate_support import BUS_MASTER, NO_BUS_MASTER, PCI_COMMAND, TIMEOUT, DirectRegisters
from .nvme_table_support import Spinning, Table, table

pytestmark = pytest.mark.timeout(120)

SOON = 0.02
_QUEUES = (Register.ASQ, Register.ACQ)


class Owned:
    """Has a storage wait at a gate whenever it is taken or left."""

    def __init__(self, storage: Storage) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.acquired = True
        acquire, release = storage.acquire, storage.release

        def take() -> None:
            assert self.gate.wait(TIMEOUT)
            acquire()
            self.acquired = True

        def leave() -> None:
            assert not self.acquired or self.gate.wait(TIMEOUT)
            release()
            self.acquired = False

        storage.acquire, storage.release = take, leave  # type: ignore[method-assign]


class Life:
    """A controller that is enabled, and everything that can happen to it: one method each."""

    def __init__(self, desk: Table) -> None:
        self.desk, self.device = desk, desk.device
        self.registers = DirectRegisters(desk.device)
        self.storage = Owned(desk.device.namespaces[1].storage)
        self._configuration = self.registers.read32(Register.CC)
        self._sizes = self.registers.read32(Register.AQA)
        self._addresses = [self.registers.read64(register) for register in _QUEUES]
        self._client = True

    # What a host does

    def enable(self) -> None:
        self.registers.write32(Register.AQA, self._sizes)
        for register, address in zip(_QUEUES, self._addresses, strict=True):
            self.registers.write64(register, address)
        self.registers.write32(Register.CC, self._configuration)

    def disable(self) -> None:
        self.registers.write32(Register.CC, self.registers.read32(Register.CC) & ~Configuration.EN)

    def shut_down(self) -> None:
        cc = self.registers.read32(Register.CC) & ~Configuration.SHN
        self.registers.write32(Register.CC, cc | NORMAL_SHUTDOWN)

    def reset_subsystem(self) -> None:
        self.registers.write32(Register.NSSR, NSSR_RESET)

    def forbid_dma(self) -> None:
        self._command(NO_BUS_MASTER)

    def allow_dma(self) -> None:
        self._command(BUS_MASTER)

    def _command(self, value: int) -> None:
        self.device.region_write(PciRegion.CONFIG, PCI_COMMAND, memoryview(value.to_bytes(2, "little")))

    # What a client does, which waits for the device to stand still

    def reset(self) -> None:
        if self._stands_still():
            self.device.reset()

    def reset_function(self) -> None:
        self._stands_still()
        self.device.reset_function()

    def stop(self) -> None:
        self.storage.gate.set()  # whoever asks for this waits for the storage as long as it takes
        if self._stands_still():
            with contextlib.suppress(OSError):
                self.device.migration_set_state(DeviceState.STOP)
                assert not self.storage.acquired

    def run(self) -> None:
        self.storage.gate.set()
        if self._stands_still():
            self.device.migration_set_state(DeviceState.RUNNING)

    def leave(self) -> None:
        if self._client:
            self._client = False
            self._stands_still()
            self.desk.unmap()
            self.device.disconnected()

    def come(self) -> None:
        if not self._client:
            self._client = True
            self.device.connected(self.desk.link)
            self.desk.map()

    def _stands_still(self) -> bool:
        try:
            self.device.quiesce()
        except OSError:
            return False
        return True

    # What a storage does

    def hang(self) -> None:
        self.storage.gate.clear()

    def recover(self) -> None:
        self.storage.gate.set()

    # What comes of it

    def settle(self) -> None:
        """Have everything end that is under way."""
        self.storage.gate.set()
        executor, deadline = self.device.executor, time.monotonic() + TIMEOUT
        while executor.workers:
            assert time.monotonic() < deadline
            executor.workers.wait(TIMEOUT)
            executor.land()

    @property
    def status(self) -> ControllerStatus:
        return ControllerStatus(self.registers.read32(Register.CSTS))


STEPS: list[Callable[[Life], None]] = [
    Life.enable,
    Life.disable,
    Life.shut_down,
    Life.reset_subsystem,
    Life.forbid_dma,
    Life.allow_dma,
    Life.reset,
    Life.reset_function,
    Life.stop,
    Life.run,
    Life.leave,
    Life.come,
    Life.hang,
    Life.recover,
    Life.settle,
]


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Nobody waits long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller, "AT_ONCE", SOON / 10)
        for timeout in ("QUIESCE_TIMEOUT", "BUS_MASTER_TIMEOUT"):
            patch.setattr(standstill, timeout, SOON)
        yield


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=25))
def test_whatever_happens_it_is_what_the_host_made_of_it(steps: list[Callable[[Life], None]]) -> None:
    """Ready if it is enabled, the owner of its storage then and only then, and good for another life."""
    with impatient(), table(Spinning(), shadow=False) as desk:
        life = Life(desk)
        try:
            for step in steps:
                step(life)
        finally:
            life.recover()
        life.come()
        life.run()
        life.allow_dma()
        life.settle()
        enabled = bool(life.registers.read32(Register.CC) & Configuration.EN)
        assert not life.status & ControllerStatus.CFS
        assert bool(life.status & ControllerStatus.RDY) == enabled == life.storage.acquired
        assert life.status & ControllerStatus.SHST != ControllerStatus.SHST_OCCURRING

        life.disable()
        life.settle()
        assert not life.status & ControllerStatus.RDY
        assert not life.storage.acquired
        life.enable()
        life.settle()
        assert life.status & ControllerStatus.RDY
        assert life.storage.acquired
