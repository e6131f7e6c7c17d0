"""The reset that a guest asks for in config space: what it resets, when, and what may come in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import pytest

from vfio_user import Bar, Client, Device, DeviceState, MigrationFlags, register, state
from vfio_user.pci import PcieEndpoint, PowerManagement, VendorSpecific
from vfio_user.server.backend import Quiescing
from vfio_user.wire.constants import DmaFlags, IrqSetFlags, PciIrq

from .device_support import TIMEOUT, attached, events, guest_memory, serving

CONFIG, TABLE = 7, 1
COMMAND, CONTROL, STATUS, VENDOR, POWER = 0x04, 0x48, 0x4A, 0x7F, 0x84
PENDING = 1 << 5
ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
READ_WRITE = DmaFlags.READ | DmaFlags.WRITE


class Shared(Quiescing):
    """What a device gives every caller: only the last one hears when it is done."""

    def __init__(self, listeners: int) -> None:
        super().__init__()
        self.heard = threading.Semaphore(0)
        self.listeners = listeners

    def on_done(self, wake: Callable[[], None]) -> None:
        super().on_done(wake)
        self.heard.release()

    def wait_for_listeners(self) -> None:
        for _ in range(self.listeners):
            assert self.heard.acquire(timeout=TIMEOUT)


class Worker(Device):
    """A device whose DMA ends when the test says so: until then ``busy`` is what quiesce() gives."""

    vendor_id, device_id = 0x494F, 0x0F18
    bars = {0: Bar(0x100), 2: Bar(0x1000, memory=True)}
    capabilities = (PcieEndpoint(), VendorSpecific(b"\0", b"\xff"), PowerManagement())
    msix_vectors = 2
    scratch = register(0, reset=7, writable=0xFFFF_FFFF)
    hits = state(0)

    def __init__(self) -> None:
        self.busy: Quiescing | None = None
        self.resets = 0
        super().__init__()

    def on_reset(self) -> None:
        self.resets += 1

    def quiesce(self) -> Quiescing | None:
        return self.busy


@dataclass
class Guest:
    """A client, and the accesses that a guest makes."""

    client: Client

    def get(self, region: int, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.client.region_read(region, offset, size), "little")

    def put(self, region: int, offset: int, value: int, size: int = 4) -> None:
        self.client.region_write(region, offset, value.to_bytes(size, "little"))

    def ask_for_reset(self) -> None:
        self.put(CONFIG, CONTROL, self.get(CONFIG, CONTROL, 2) | 0x8000, 2)

    def reset(self) -> None:
        self.client.reset()

    @property
    def pending(self) -> bool:
        return bool(self.get(CONFIG, STATUS, 2) & PENDING)

    def wait_for_reset(self) -> None:
        """As Linux does: until no transactions are pending."""
        deadline = time.monotonic() + TIMEOUT
        while self.pending:
            assert time.monotonic() < deadline, "the reset never came"


def scribble(guest: Guest) -> None:
    """Change all that a reset takes back."""
    guest.put(CONFIG, COMMAND, 6, 2)
    guest.put(CONFIG, 0x10, 0xFEB00000)
    guest.put(CONFIG, VENDOR, 0x55, 1)
    guest.put(0, 0, 0x1234)
    guest.put(TABLE, 0, 0xFEE00000)


def is_new(guest: Guest) -> bool:
    return (
        guest.get(CONFIG, COMMAND, 2) == guest.get(CONFIG, 0x10) == guest.get(CONFIG, VENDOR, 1) == 0
        and guest.get(0, 0) == 7
        and guest.get(TABLE, 0) == 0
        and guest.get(TABLE, 12) == 1
        and guest.get(TABLE, 0x800, 8) == 0
    )


@pytest.fixture
def device() -> Worker:
    return Worker()


@pytest.fixture
def guest(device: Worker) -> Iterator[Guest]:
    with attached(device) as client:
        yield Guest(client)


def test_everything_of_the_function_is_as_new(device: Worker, guest: Guest) -> None:
    scribble(guest)
    device.hits = 3
    device.irq.trigger(1)
    assert not is_new(guest)
    guest.ask_for_reset()
    assert is_new(guest)
    assert not guest.pending
    assert (device.hits, device.resets) == (0, 1)


def test_what_belongs_to_the_client_stays(device: Worker, guest: Guest) -> None:
    with events(1) as (line,), guest_memory(4096) as memory:
        guest.client.dma_map(0, 4096, memory)
        guest.client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 1, [line.fd])
        (area,) = guest.client.regions[2].map()
        area.memory[:4] = b"kept"
        guest.ask_for_reset()
        guest.wait_for_reset()
        device.dma.write(0, b"x")
        device.irq.trigger(0)
        assert line.wait() == 1
        assert guest.client.region_read(2, 0, 4) == b"kept"


def test_it_also_wakes_the_function(guest: Guest) -> None:
    guest.put(CONFIG, POWER, 3, 2)
    assert guest.get(0, 0) == 0xFFFF_FFFF
    guest.ask_for_reset()
    assert (guest.get(0, 0), guest.get(CONFIG, POWER, 2)) == (7, 8)


def test_it_waits_until_dma_has_stopped(device: Worker, guest: Guest) -> None:
    device.busy = Quiescing()
    scribble(guest)
    guest.ask_for_reset()
    assert guest.pending
    assert (guest.get(0, 0), device.resets) == (0x1234, 0)  # the device goes on until then
    device.busy.done()
    guest.wait_for_reset()
    assert is_new(guest)
    assert device.resets == 1


def test_dma_that_cannot_be_stopped_does_not_hold_it_up_for_ever(device: Worker, guest: Guest) -> None:
    device.busy = Quiescing()
    guest.ask_for_reset()
    device.busy.done(5)
    guest.wait_for_reset()
    assert device.resets == 1


def test_asked_for_twice_it_happens_once_and_later_again(device: Worker, guest: Guest) -> None:
    device.busy = Quiescing()
    guest.ask_for_reset()
    guest.ask_for_reset()
    device.busy.done()
    guest.wait_for_reset()
    assert device.resets == 1
    device.busy = None
    scribble(guest)
    guest.ask_for_reset()
    guest.wait_for_reset()
    assert (device.resets, is_new(guest)) == (2, True)


def test_a_client_that_leaves_meanwhile_finds_it_done(device: Worker) -> None:
    with serving(device) as path:
        device.busy = busy = Quiescing()
        with Client.connect(path, TIMEOUT) as client:
            scribble(Guest(client))
            Guest(client).ask_for_reset()
            assert Guest(client).pending
        busy.done()  # the server waits for that before it takes another client
        device.busy = None
        with Client.connect(path, TIMEOUT) as client:
            assert is_new(Guest(client))
            assert not Guest(client).pending
            assert device.resets == 1
            Guest(client).ask_for_reset()
            Guest(client).wait_for_reset()
            assert device.resets == 2


def stop(guest: Guest) -> None:
    guest.client.migration_set_state(DeviceState.STOP)


def unmap(guest: Guest) -> None:
    guest.client.dma_unmap(0, 4096)


@pytest.mark.parametrize("command", [stop, unmap, Guest.reset])
def test_a_command_that_stops_dma_does_what_waits_for_that(
    device: Worker, guest: Guest, command: Callable[[Guest], None]
) -> None:
    with guest_memory(4096) as memory:
        guest.client.dma_map(0, 4096, memory)
        device.busy = waiting = Quiescing()
        scribble(guest)
        guest.ask_for_reset()
        assert guest.pending
        device.busy = None
        command(guest)
        assert (device.resets, guest.pending, is_new(guest)) == (1, False, True)
        scribble(guest)
        waiting.done()
        assert not is_new(guest)  # else it would take back what the next driver has set up
        guest.ask_for_reset()
        guest.wait_for_reset()
        assert device.resets == 2


@pytest.mark.parametrize("command", [stop, unmap, Guest.reset])
def test_so_it_does_where_both_wait_for_the_same(
    device: Worker, guest: Guest, command: Callable[[Guest], None]
) -> None:
    with guest_memory(4096) as memory:
        guest.client.dma_map(0, 4096, memory)
        device.busy = waiting = Shared(listeners=2)
        scribble(guest)
        guest.ask_for_reset()
        thread = threading.Thread(target=command, args=[guest])
        thread.start()
        waiting.wait_for_listeners()
        device.busy = None
        waiting.done()
        thread.join(TIMEOUT)
        guest.wait_for_reset()
        assert (device.resets, is_new(guest)) == (1, True)


def test_entering_pre_copy_does_not_stop_dma_and_so_does_not_reset() -> None:
    class Moving(Worker):
        migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY

    device = Moving()
    with attached(device) as client:
        guest = Guest(client)
        device.busy = busy = Quiescing()
        guest.ask_for_reset()
        client.migration_set_state(DeviceState.PRE_COPY)
        found = device.resets, guest.pending
        busy.done()
        assert found == (0, True)
        guest.wait_for_reset()
        assert (device.resets, client.migration_get_state()) == (1, DeviceState.PRE_COPY)


def test_the_migration_state_is_the_vmms_and_not_touched(device: Worker, guest: Guest) -> None:
    other = Worker()
    guest.client.migration_set_state(DeviceState.STOP_COPY)
    guest.ask_for_reset()
    guest.wait_for_reset()
    assert guest.client.migration_get_state() == DeviceState.STOP_COPY
    stream = b"".join(iter(lambda: guest.client.migration_read_data(1 << 16), b""))
    other.migration_set_state(DeviceState.RESUMING)
    other.migration_write_data(memoryview(stream))
    other.migration_set_state(DeviceState.RUNNING)
    assert other.scratch == 7


def test_a_device_that_fails_to_quiesce_can_be_reset_the_next_time(
    device: Worker, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count()

    def quiesce() -> None:
        if next(calls) == 0:
            raise RuntimeError("a bug of the device's")

    monkeypatch.setattr(device, "quiesce", quiesce)
    guest.ask_for_reset()
    guest.wait_for_reset()
    assert device.resets == 1
    guest.ask_for_reset()
    guest.wait_for_reset()
    assert device.resets == 2


def test_without_a_client_it_happens_at_once(device: Worker) -> None:
    device.scratch = 1
    device.region_write(CONFIG, CONTROL, memoryview(b"\0\x80"))
    assert (device.scratch, device.resets, device.config.transactions_pending) == (7, 1, False)


def test_a_reset_whose_quiescing_somebody_else_heard_of_does_not_wait_for_ever() -> None:
    """A device may give one Quiescing to two, of whom the later hears: asked again, the reset sees that it is done."""
    device = Worker()
    device.busy = Quiescing()
    with attached(device) as client:
        guest = Guest(client)
        guest.ask_for_reset()
        assert guest.get(CONFIG, STATUS, 2) & PENDING
        device.busy.on_done(lambda: None)
        device.busy.done()
        device.busy = None
        guest.ask_for_reset()
        assert not guest.get(CONFIG, STATUS, 2) & PENDING
    assert device.resets == 2
