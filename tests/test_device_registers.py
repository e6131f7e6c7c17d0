"""Registers that a device class declares: attributes of the device, registers of the guest, part of the stream."""

from __future__ import annotations

from typing import Any

import pytest

from vfio_user import Bar, Device, DeviceState, register, state
from vfio_user.errors import CommandError, TransitionError
from vfio_user.pci import VendorSpecific
from vfio_user.testing import FakeGuest

RUNNING, RESUMING, STOP_COPY = DeviceState.RUNNING, DeviceState.RESUMING, DeviceState.STOP_COPY


class Timer(Device):
    """Two BARs of registers with every kind of bit and hook; what the hooks saw is in ``calls``."""

    vendor_id, device_id, state_version = 0x494F, 0x0717, 2
    bars = {0: Bar(0x100), 3: Bar(0x40)}
    control = register(0x00, writable=0xFF, strobe=0x8000_0000)
    status = register(0x04, w1c=0x0F, reset=0x30)
    ticks = register(0x08, width=8)
    odd = register(0x13, width=3, writable=0xFFFFFF)
    far = register(0x00, bar=3, width=2, reset=0x1234, writable=0xFF00)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.reads = 0
        super().__init__()

    @control.on_write
    def control_written(self, old: int, new: int) -> None:
        self.calls.append(("control", old, new))
        if new & 0x8000_0000:
            self.status |= 1

    @status.on_write
    def status_written(self, old: int, new: int) -> None:
        self.calls.append(("status", old, new))

    @ticks.on_read
    def now(self) -> int:
        self.reads += 1
        return (1 << 64) - self.reads

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        data[:] = b"\xbb" * len(data)

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        self.calls.append(("bar_write", bar, offset, bytes(data)))


def get(device: Device, offset: int, size: int = 4, bar: int = 0) -> int:
    data = bytearray(b"\xee" * size)
    device.region_read(bar, offset, memoryview(data))
    return int.from_bytes(data, "little")


def put(device: Device, offset: int, value: int, size: int = 4, bar: int = 0) -> None:
    device.region_write(bar, offset, memoryview(value.to_bytes(size, "little")))


@pytest.fixture
def timer() -> Timer:
    return Timer()


def test_a_guest_reads_what_the_device_wrote_and_the_other_way(timer: Timer) -> None:
    timer.control = 0x1234
    put(timer, 0, 0xFFFF)
    assert (timer.control, get(timer, 0)) == (0x12FF, 0x12FF)
    put(timer, 0x14, 0xAB, 1)
    assert (timer.odd, get(timer, 0x13, 3)) == (0xAB00, 0xAB00)
    assert (get(timer, 0, 2, bar=3), timer.far) == (0x1234, 0x1234)
    put(timer, 0, 0xABCD, 2, bar=3)
    assert (timer.far, timer.control) == (0xAB34, 0x12FF)


def test_hooks_see_old_and_new_and_strobes(timer: Timer) -> None:
    put(timer, 0, 0x11)
    put(timer, 0, 0x8000_0022)
    put(timer, 3, 0x80, 1)
    assert timer.calls == [("control", 0, 0x11), ("control", 0x11, 0x8000_0022), ("control", 0x22, 0x8000_0022)]
    assert get(timer, 0) == 0x22


def test_hooks_run_after_the_whole_write_in_order(timer: Timer) -> None:
    """The strobe of the first sets a bit that the same write would have cleared in the second."""
    timer.status = 0x3F
    put(timer, 0, 0x0000_000F_8000_0001, 8)
    assert timer.calls == [("control", 0, 0x8000_0001), ("status", 0x3F, 0x30)]
    assert timer.status == 0x31


def test_a_one_clears_and_the_device_sets(timer: Timer) -> None:
    timer.status |= 0x0A
    put(timer, 4, 0x02, 1)
    assert get(timer, 4) == 0x38
    put(timer, 4, 0xFF)
    assert get(timer, 4) == 0x30


def test_a_read_hook_is_asked_once_for_an_access_and_not_beside_it(timer: Timer) -> None:
    assert get(timer, 8, 8) == (1 << 64) - 1
    assert get(timer, 12, 4) == 0xFFFF_FFFF
    assert get(timer, 0, 16) >> 64 == (1 << 64) - 3
    assert get(timer, 0, 8) == 0x30 << 32
    assert (timer.reads, timer.ticks) == (3, 0)


def test_what_touches_no_register_is_the_devices_own(timer: Timer) -> None:
    assert get(timer, 0x20, 2) == get(timer, 2, 2, bar=3) == 0xBBBB
    put(timer, 0x10, 5, 2)
    assert timer.calls == [("bar_write", 0, 0x10, b"\5\0")]
    assert get(timer, 0x10, 4) == 0  # touches ``odd``: beside it stands nothing
    put(timer, 0x10, 0xFFFFFFFF)
    assert (timer.odd, len(timer.calls)) == (0xFF, 1)


@pytest.mark.parametrize(("value", "name"), [(-1, "control"), (1 << 32, "control"), (1 << 16, "far")])
def test_a_value_that_does_not_fit_is_the_devices_mistake(timer: Timer, value: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'.*does not fit"):
        setattr(timer, name, value)


def test_registers_are_a_devices_own(timer: Timer) -> None:
    other = Timer()
    timer.control = 5
    put(timer, 0, 9)
    assert (other.control, other.calls) == (0, [])


def test_reset_values_come_back_and_no_hook_is_called(timer: Timer) -> None:
    put(timer, 0, 0xFF)
    put(timer, 0, 0, 2, bar=3)
    timer.status = 7
    timer.calls.clear()
    timer.reset()
    assert (timer.control, timer.status, timer.far, timer.calls) == (0, 0x30, 0x1234, [])


# Inheritance


class Mixin:
    """Registers for any device that has a BAR3."""

    extra = register(0x20, bar=3, writable=0xFF)

    @extra.on_write
    def extra_written(self, old: int, new: int) -> None:
        self.extra_seen = new


class Child(Mixin, Timer):
    status = register(0x40, reset=0x77)  # in place of the base's, hooks and all
    own = register(0x44, writable=1)

    def control_written(self, old: int, new: int) -> None:
        super().control_written(old, new)
        self.calls.append(("child", old, new))


def test_a_subclass_adds_replaces_and_overrides(timer: Timer) -> None:
    child = Child()
    assert sorted(Child.declared_registers) == ["control", "extra", "far", "odd", "own", "status", "ticks"]
    put(child, 0, 3)
    assert child.calls == [("control", 0, 3), ("child", 0, 3)]
    assert get(child, 0x40) == 0x77
    assert get(child, 4) == 0xBBBBBBBB
    put(child, 0x20, 9, bar=3)
    assert (child.extra, child.extra_seen) == (9, 9)
    put(timer, 0, 3)
    assert timer.calls == [("control", 0, 3)]
    assert "own" not in Timer.declared_registers


def test_a_subclass_hides_a_register_by_anything_else() -> None:
    class Fixed(Timer):
        odd = 7

    fixed = Fixed()
    assert (fixed.odd, get(fixed, 0x13, 3)) == (7, 0xBBBBBB)


# Migration


def stream(device: Device) -> bytes:
    device.migration_set_state(STOP_COPY)
    data = bytearray(1 << 20)
    return bytes(data[: device.migration_read_data(memoryview(data))])


def load(device: Device, content: bytes) -> None:
    device.migration_set_state(RESUMING)
    device.migration_write_data(memoryview(content))
    device.migration_set_state(RUNNING)


class Older(Device):
    """The first version of Timer: it had fewer registers."""

    vendor_id, device_id, state_version = 0x494F, 0x0717, 1
    bars = {0: Bar(0x100), 3: Bar(0x40)}
    control = register(0x00, writable=0xFF)
    ticks = register(0x08, width=8, writable=0xFF)


class Moved(Timer):
    """A second version that has its registers elsewhere."""

    control = register(0x80, writable=0xFF)
    far = register(0x90, width=2, writable=0xFF00)


class Widened(Timer):
    control = register(0x80, width=8)


class Fewer(Timer):
    odd = 0


class Newer(Timer):
    state_version = 3


class Grown(Timer):
    """The same version, and yet a register more: a mistake of its author's."""

    grown = register(0x40)


def busy() -> Timer:
    device = Timer()
    device.control, device.status, device.ticks = 0x5EADBEEF, 5, 1 << 63
    device.odd, device.far = 0xABCDEF, 0xFFFF
    device.calls.clear()
    return device


def values(device: Device) -> list[int]:
    return [getattr(device, name) for name in ("control", "status", "ticks", "odd", "far")]


@pytest.mark.parametrize("target", [Timer, Moved])
def test_registers_move_by_name_with_all_their_bits_and_without_hooks(target: type[Timer]) -> None:
    device = target()
    load(device, stream(busy()))
    assert values(device) == values(busy())
    assert device.calls == []


def test_a_stream_of_an_older_version_leaves_new_registers_at_their_reset_values() -> None:
    older = Older()
    older.control, older.ticks = 0x55, 0x66
    device = busy()
    load(device, stream(older))
    assert values(device) == [0x55, 0x30, 0x66, 0, 0x1234]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (Timer, Fewer, "unknown registers: odd"),
        (Timer, Widened, "'control'.*8 bytes.*saved are 4 bytes"),
        (Timer, Grown, "missing registers: grown"),
        (Newer, Timer, "version 3"),
    ],
)
def test_a_stream_that_does_not_fit_changes_nothing_and_names_the_culprit(
    source: type[Timer], target: type[Timer], message: str
) -> None:
    content = stream(source())
    device = target()
    device.status, device.far = 1, 2
    before = values(device)
    with pytest.raises((TransitionError, OSError), match=message):
        load(device, content)
    assert values(device) == before
    device.reset()
    assert get(device, 4) == 0x30


class Both(Timer):
    """State and registers side by side."""

    count = state(0)

    def control_written(self, old: int, new: int) -> None:
        self.count += 1


def test_state_and_registers_move_together() -> None:
    one, other = Both(), Both()
    put(one, 0, 1)
    put(one, 0, 2)
    load(other, stream(one))
    assert (other.count, other.control) == (2, 2)


def test_what_a_device_changes_in_its_vendor_capability_migrates() -> None:
    class Vendor(Device):
        vendor_id, device_id = 0x494F, 0x7E57
        capabilities = (VendorSpecific(b"abcd"),)

    device, other = Vendor(), Vendor()
    device.config.set("vendor.body", 0x64636258)
    other.config.load(device.config.save())
    assert other.config.get("vendor.body") == 0x64636258


def test_state_of_another_type_is_refused_where_it_is_saved() -> None:
    class Careless(Device):
        vendor_id, device_id = 0x494F, 0x7E58
        n = state(0)

    device = Careless()
    device.n = 1.5  # type: ignore[assignment]
    with FakeGuest(device) as guest, pytest.raises(CommandError):
        guest.save()
    device.n = 2
    with FakeGuest(device) as guest:
        assert guest.save()
