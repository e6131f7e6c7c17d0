"""Doorbells: registers that a client writes by an eventfd, with the value in memory that it shares with the device."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from vfio_user import Bar, Client, Device, DeviceState, register, state
from vfio_user.client.regions import IoFdDescription
from vfio_user.pci import PowerManagement
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.wire.constants import MAX_MSG_FDS, IoFdType

from .device_support import TIMEOUT, attached, serving

CONFIG, POWER = 7, 0x44


class Queues(Device):
    """Two doorbells of different widths in BAR0, one in BAR2; each appends what was written to ``rung``."""

    vendor_id, device_id = 0x494F, 0x0D0B
    bars = {0: Bar(0x1000), 2: Bar(0x1000)}
    capabilities = (PowerManagement(),)
    submit = register(0x10, width=4, strobe=0xFFFF_FFFF, doorbell=True)
    complete = register(0x20, width=8, writable=(1 << 64) - 1, doorbell=True)
    other = register(0x00, bar=2, width=1, writable=0xF, doorbell=True)
    plain = register(0x30, writable=0xFFFF_FFFF)
    rung: list[list[str | int]] = state([])

    def __init__(self) -> None:
        self.heard = threading.Semaphore(0)
        super().__init__()

    def note(self, name: str, value: int) -> None:
        self.rung.append([name, value])
        self.heard.release()

    @submit.on_write
    def _submitted(self, old: int, new: int) -> None:
        self.note("submit", new)

    @complete.on_write
    def _completed(self, old: int, new: int) -> None:
        self.note("complete", new)

    @other.on_write
    def _other(self, old: int, new: int) -> None:
        self.note("other", new)

    def wait(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.heard.acquire(timeout=TIMEOUT), "nobody heard the bell"


class Bell:
    """A client's end of a doorbell."""

    def __init__(self, description: IoFdDescription) -> None:
        assert description.fd is not None
        assert description.shadow_fd is not None
        self.description = description
        self.fd = description.fd

    def write(self, value: int) -> None:
        assert self.description.shadow_fd is not None
        content = value.to_bytes(self.description.size, "little")
        os.pwrite(self.description.shadow_fd.fileno(), content, self.description.shadow_offset)

    def ring(self, value: int) -> None:
        self.write(value)
        os.eventfd_write(self.fd.fileno(), 1)


def bells(client: Client, bar: int = 0) -> dict[int, Bell]:
    """The doorbells of a BAR by offset."""
    return {one.offset: Bell(one) for one in client.region_io_fds(bar)}


@pytest.fixture
def device() -> Queues:
    return Queues()


@pytest.fixture
def client(device: Queues) -> Iterator[Client]:
    with attached(device) as one:
        yield one


def test_a_client_is_told_of_each_doorbell_and_of_nothing_else(client: Client) -> None:
    found = [(one.type, one.offset, one.size) for bar in (0, 2) for one in client.region_io_fds(bar)]
    shadow = IoFdType.IOEVENTFD_SHADOW
    assert found == [(shadow, 0x10, 4), (shadow, 0x20, 8), (shadow, 0x00, 1)]
    places = [one.shadow_offset for bar in (0, 2) for one in client.region_io_fds(bar)]
    assert len({at // 8 for at in places}) == 3
    assert max(places) < 4096


def test_a_ring_arrives_with_its_value(device: Queues, client: Client) -> None:
    found = bells(client) | {-1: bells(client, 2)[0]}
    for offset, value in [(0x10, 0x12345678), (0x20, 1 << 63 | 5), (-1, 0xFF), (0x10, 0)]:
        found[offset].ring(value)
        device.wait()
    assert device.rung == [["submit", 0x12345678], ["complete", 1 << 63 | 5], ["other", 0xF], ["submit", 0]]
    assert int.from_bytes(client.region_read(0, 0x20, 8), "little") == 1 << 63 | 5
    assert client.region_read(0, 0x10, 4) == bytes(4)


def test_a_write_by_message_rings_as_well(device: Queues, client: Client) -> None:
    client.region_write(0, 0x10, b"\7\0\0\0")
    client.region_write(0, 0x22, b"\1")
    assert device.rung == [["submit", 7], ["complete", 0x10000]]


def test_rings_in_a_row_may_be_one_and_the_last_value_arrives(device: Queues, client: Client) -> None:
    bell = bells(client)[0x20]
    for value in range(1, 1001):
        bell.ring(value)
    while not device.rung or device.rung[-1] != ["complete", 1000]:
        device.wait()
    assert len(device.rung) <= 1000
    assert [value for _, value in device.rung] == sorted(value for _, value in device.rung)


def test_a_sleeping_function_does_not_hear(device: Queues, client: Client) -> None:
    bell = bells(client)[0x20]
    client.region_write(CONFIG, POWER, b"\3\0")
    bell.ring(1)
    client.migration_set_state(DeviceState.STOP)  # answers whatever is left of it
    client.migration_set_state(DeviceState.RUNNING)
    client.region_write(CONFIG, POWER, b"\0\0")
    bell.ring(2)
    device.wait()
    assert device.rung == [["complete", 2]]


def test_a_ring_before_the_stop_is_in_the_stream(device: Queues, client: Client) -> None:
    bell = bells(client)[0x10]
    for value in range(50):
        bell.ring(value)
        client.migration_set_state(DeviceState.STOP_COPY)
        stream = b"".join(iter(lambda: client.migration_read_data(1 << 16), b""))
        target = Queues()
        target.migration_set_state(DeviceState.RESUMING)
        target.migration_write_data(memoryview(stream))
        target.migration_set_state(DeviceState.RUNNING)
        assert target.rung[-1] == ["submit", value]
        client.migration_set_state(DeviceState.RUNNING)


class Unpolled:
    """A link whose server sees to no descriptor and does no deferred work: what happens, the device does by itself."""

    spin = 0.0

    def __init__(self) -> None:
        self.deferred: list[Callable[[], None]] = []

    def defer(self, work: Callable[[], None]) -> None:
        self.deferred.append(work)

    def watch(self, fd: int, ready: Callable[[], None]) -> None: ...

    def unwatch(self, fd: int) -> None: ...

    def stop(self) -> None: ...

    def dma_read(self, address: int, buffer: memoryview) -> None: ...

    def dma_write(self, address: int, data: memoryview) -> None: ...


class Working(Queues):
    """What it does when ``submit`` is rung, it does later."""

    def _submitted(self, old: int, new: int) -> None:
        self.defer(lambda: self.note("worked", new))


def test_what_was_rung_and_not_seen_is_done_before_the_stop_with_all_that_it_defers() -> None:
    """DMA after the reply to STOP would write to memory that has been moved already."""
    device, link = Working(), Unpolled()
    device.connected(link)
    ring(device, 0x10, 7)
    device.migration_set_state(DeviceState.STOP)
    assert (device.rung, link.deferred) == ([["worked", 7]], [])
    device.migration_set_state(DeviceState.RUNNING)
    device.region_write(0, 0x10, memoryview(b"\1\0\0\0"))
    assert len(link.deferred) == 1


@pytest.mark.parametrize("reset", [Queues.reset, Queues.reset_function])
def test_what_was_rung_and_not_seen_does_not_outlive_a_reset(reset: Callable[[Queues], None]) -> None:
    device = Queues()
    device.connected(Unpolled())
    ring(device, 0x20, 7)
    reset(device)
    device.migration_set_state(DeviceState.STOP)
    assert (device.rung, device.complete) == ([], 0)


def ring(device: Queues, offset: int, value: int) -> None:
    """As a client does."""
    bell = next(one for one in device.io_fds(0) if one.offset == offset)
    assert bell.shadow_fd is not None
    os.pwrite(bell.shadow_fd, value.to_bytes(bell.size, "little"), bell.shadow_offset)
    os.eventfd_write(bell.fd, 1)


def test_bells_outlive_a_client_and_leak_nothing(device: Queues) -> None:
    with no_fd_leaks(), serving(device) as path:
        for value in range(20):
            with Client.connect(path, TIMEOUT) as client:
                bells(client)[0x10].ring(value)
                device.wait()
    assert device.rung == [["submit", value] for value in range(20)]


def many() -> Device:
    """More doorbells than a message carries descriptors."""

    def rang(self: Device, old: int, new: int) -> None:
        self.total += new  # type: ignore[attr-defined]

    fields: dict[str, object] = {"vendor_id": 0x494F, "device_id": 0x0D0C, "bars": {0: Bar(0x1000)}}
    fields |= {"total": state(0), "rang": rang}
    for index in range(2 * MAX_MSG_FDS):
        fields[f"bell{index}"] = one = register(8 * index, width=8, writable=0xFF, doorbell=True)
        one.on_write(rang)
    made: type[Device] = type("Many", (Device,), fields)
    return made()


def test_those_that_do_not_fit_into_the_message_are_reached_by_messages() -> None:
    device = many()
    with attached(device) as client:
        found = bells(client)
        assert 0 < len(found) < MAX_MSG_FDS
        for offset in range(0, 8 * 2 * MAX_MSG_FDS, 8):
            if offset in found:
                found[offset].ring(1)
            else:
                client.region_write(0, offset, b"\1")
        client.migration_set_state(DeviceState.STOP)
        assert device.total == 2 * MAX_MSG_FDS  # type: ignore[attr-defined]


def test_a_hostile_client_cannot_shrink_the_values_or_block_the_device(device: Queues, client: Client) -> None:
    bell = bells(client)[0x10]
    assert bell.description.shadow_fd is not None
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(bell.description.shadow_fd.fileno(), size)
    os.set_blocking(bell.fd.fileno(), True)
    os.eventfd_write(bell.fd.fileno(), (1 << 64) - 2)
    device.wait()
    os.eventfd_write(bell.fd.fileno(), 1)
    with contextlib.suppress(BlockingIOError):
        os.set_blocking(bell.fd.fileno(), False)
        os.eventfd_read(bell.fd.fileno())  # taken back before, or after, the device sees it
    client.region_write(0, 0x30, b"\1")
    assert client.region_read(0, 0x30, 1) == b"\1"


def test_what_was_rung_before_a_stop_is_done_before_dma_is_quiesced() -> None:
    """The ring and the command that stops the device wait side by side: the ring is first."""
    seen: list[str] = []

    class Worker(Device):
        vendor_id, device_id = 0x494F, 0xD00A
        bars = {0: Bar(0x1000)}
        slow = register(0x10, writable=0xFF)
        bell = register(0x20, writable=0xFF, doorbell=True)

        def quiesce(self) -> None:
            seen.append("quiesced")

        @bell.on_write
        def work(self, old: int, new: int) -> None:
            seen.append("DMA")

        @slow.on_write
        def take_time(self, old: int, new: int) -> None:
            found[0x20].ring(new)

    with attached(Worker()) as client:
        found = bells(client)
        client.region_write(0, 0x10, b"\1\0\0\0", posted=True)
        client.migration_set_state(DeviceState.STOP)
        client.migration_set_state(DeviceState.RUNNING)
    assert seen[: seen.index("quiesced") + 1] == ["DMA", "quiesced"]
