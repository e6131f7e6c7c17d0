"""A device that moves: its states over the wire, its stream, and what a second device makes of it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from vfio_user import Bar, Client, Device, DeviceState, MigrationFlags, state
from vfio_user.client.core import PROPOSAL
from vfio_user.devices.edu import Edu
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.errors import CommandError, StreamError, TransitionError
from vfio_user.fds import OwnedFd
from vfio_user.migration import StreamIdentity, StreamReader, StreamWriter, decode_state, encode_state, path
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.wire.constants import DmaFlags, IrqSetFlags, PciIrq

from .device_support import TIMEOUT, attached, events, guest_memory, serving

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = DeviceState
EDU_STATES = [STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY]
LIVENESS, FACTORIAL, STATUS, IRQ_RAISE = 0x04, 0x08, 0x20, 0x60
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
BUFFER, PAGE, U64 = 0x40000, 4096, (1 << 64) - 1
ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER


# Without a server


def poke(device: Device, offset: int, value: int, size: int = 4) -> None:
    device.region_write(0, offset, memoryview(value.to_bytes(size, "little")))


def saved(device: Device, *, piece: int = 1 << 20) -> bytes:
    """What comes out until it ends, or for now has nothing more."""
    stream = bytearray()
    while True:
        data = bytearray(piece)
        count = device.migration_read_data(memoryview(data))
        stream += data[:count]
        if count < piece:
            return bytes(stream)


def stopped_stream(device: Device) -> bytes:
    device.migration_set_state(STOP_COPY)
    return saved(device)


def load(device: Device, stream: bytes, *, piece: int = 1 << 20, then: DeviceState = RUNNING) -> None:
    device.migration_set_state(RESUMING)
    for start in range(0, len(stream), piece):
        device.migration_write_data(memoryview(stream[start : start + piece]))
    device.migration_set_state(then)


def visible(device: Device) -> dict[str, object]:
    """All that a guest can see of a device, and its interrupts."""
    seen: dict[str, object] = {"irq": dict(device.irq.save()), "pba": device.irq.pba()}
    for index, region in enumerate(device.regions):
        if region.size:
            size = min(region.size, 0x100) if index == 0 else region.size
            parts = []
            for offset in range(0, size, 4):
                data = bytearray(4)
                device.region_read(index, offset, memoryview(data))
                parts.append(bytes(data))
            seen[f"region {index}"] = b"".join(parts)
    seen |= {name: getattr(device, name) for name in device.declared_state}
    if isinstance(device, Edu):
        seen["buffer"] = bytes(device.buffer)
    return seen


def lively_edu(seed: int = 1) -> Edu:
    """One whose every register, buffer and config space say something, with an interrupt raised."""
    rng = random.Random(seed)
    device = Edu()
    device.region_write(7, 4, memoryview(b"\7\0"))
    device.region_write(7, 0x10, memoryview(b"\0\0\0\xfe"))
    for offset in (LIVENESS, FACTORIAL, STATUS, IRQ_RAISE):
        poke(device, offset, rng.randrange(1, 1 << 32) | 0x80)
    device.buffer[:] = rng.randbytes(PAGE)
    for offset in (SOURCE, DESTINATION, COUNT):
        poke(device, offset, rng.randrange(1 << 64), 8)
    return device


class Versioned(Device):
    """A device that has grown a second field with its second version."""

    vendor_id, device_id, state_version = 0x494F, 0x0C0C, 2
    bars = {0: Bar(0x2000, memory=True)}
    old = state(1)
    new = state([7])


class Original(Device):
    """The same in its first version."""

    vendor_id, device_id = 0x494F, 0x0C0C
    bars = {0: Bar(0x2000, memory=True)}
    old = state(1)


# States


@pytest.fixture
def edu() -> Iterator[Client]:
    with attached(Edu()) as client:
        yield client


def test_edu_has_stop_copy_and_pre_copy(edu: Client) -> None:
    assert edu.migration_flags() == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    assert edu.migration_get_state() == RUNNING


def has_path(source: DeviceState, target: DeviceState) -> bool:
    try:
        path(source, target, Edu.migration)
    except TransitionError:
        return False
    return True


@pytest.mark.parametrize("target", DeviceState)
@pytest.mark.parametrize("source", EDU_STATES)
def test_every_state_to_every_other_over_the_wire(edu: Client, source: DeviceState, target: DeviceState) -> None:
    stream = stopped_stream(Edu())
    edu.migration_set_state(source)
    if source == RESUMING:
        edu.migration_write_data(stream)
    if has_path(source, target):
        edu.migration_set_state(target)
        assert edu.migration_get_state() == target
    else:
        with pytest.raises(CommandError) as refused:
            edu.migration_set_state(target)
        assert (refused.value.errno, edu.migration_get_state()) == (errno.EINVAL, source)


def test_the_arcs_that_must_not_be(edu: Client) -> None:
    """Written out, so that the table that the test above asks is not the only witness."""
    for source, targets in {
        STOP_COPY: [PRE_COPY],
        RUNNING: [ERROR, RUNNING_P2P, PRE_COPY_P2P],
        PRE_COPY: [ERROR, RUNNING_P2P, PRE_COPY_P2P],
    }.items():
        edu.migration_set_state(source)
        for target in targets:
            with pytest.raises(CommandError):
                edu.migration_set_state(target)
        edu.migration_set_state(RUNNING)


@pytest.mark.parametrize("number", [8, 255, (1 << 32) - 1])
def test_a_number_that_is_no_state(edu: Client, number: int) -> None:
    with pytest.raises(CommandError) as refused:
        edu.device_feature(1 << 17 | 2, number.to_bytes(8, "little"))
    assert (refused.value.errno, edu.migration_get_state()) == (errno.EINVAL, RUNNING)


@pytest.mark.parametrize("source", EDU_STATES)
def test_reset_leads_to_running_from_every_state(edu: Client, source: DeviceState) -> None:
    edu.migration_set_state(source)
    edu.reset()
    assert edu.migration_get_state() == RUNNING
    edu.region_write(0, LIVENESS, b"\0" * 4)
    assert edu.region_read(0, LIVENESS, 4) == b"\xff" * 4


def test_bars_are_closed_in_stop_copy_and_all_else_is_served(edu: Client) -> None:
    with guest_memory(PAGE) as memory, events(1) as (event,):
        edu.migration_set_state(STOP_COPY)
        for call in (
            lambda: edu.region_read(0, 0, 4),
            lambda: edu.region_write(0, LIVENESS, bytes(4)),
            lambda: edu.region_write_multi([(0, LIVENESS, bytes(4))]),
        ):
            with pytest.raises(CommandError) as refused:
                call()
            assert refused.value.errno == errno.EINVAL
        edu.region_write(0, LIVENESS, bytes(4), posted=True)
        assert edu.region_read(7, 0, 4).hex() == "3412e811"
        edu.region_write(7, 4, b"\6\0")
        edu.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
        edu.dma_map(0, PAGE, memory)
        edu.dma_unmap(0, PAGE)
        edu.migration_set_state(STOP)
        assert edu.region_read(0, LIVENESS, 4) == bytes(4)  # what was refused was not done
        edu.migration_set_state(RUNNING)


@pytest.mark.parametrize(("direction", "states"), [("read", {PRE_COPY, STOP_COPY}), ("write", {RESUMING})])
@pytest.mark.parametrize("where", EDU_STATES)
def test_migration_data_moves_in_its_states_only(
    edu: Client, where: DeviceState, direction: str, states: set[DeviceState]
) -> None:
    edu.migration_set_state(where)
    call: Callable[[], object] = {
        "read": lambda: edu.migration_read_data(16),
        "write": lambda: edu.migration_write_data(b"\x89VFUMIG"),
    }[direction]
    if where in states:
        call()
    else:
        with pytest.raises(CommandError) as refused:
            call()
        assert refused.value.errno == errno.EINVAL


def test_a_device_in_error_is_left_by_reset_only() -> None:
    class Fragile(Original):
        def save(self) -> dict[str, object]:
            raise KeyError("a bug")

    with attached(Fragile()) as client:
        with pytest.raises(CommandError) as refused:
            client.migration_set_state(STOP_COPY)
        assert (refused.value.errno, client.migration_get_state()) == (errno.EIO, ERROR)
        for target in DeviceState:
            with pytest.raises(CommandError):
                client.migration_set_state(target)
        client.reset()
        assert client.migration_get_state() == RUNNING


def test_a_device_that_refuses_to_save_stays_where_it_was() -> None:
    class Refusing(Original):
        def save(self) -> dict[str, object]:
            raise OSError(errno.EBUSY, "not now")

    with attached(Refusing()) as client:
        with pytest.raises(CommandError) as refused:
            client.migration_set_state(STOP_COPY)
        assert (refused.value.errno, client.migration_get_state()) == (errno.EBUSY, STOP)
        client.migration_set_state(RUNNING)


def test_state_and_stream_outlive_the_client(edu: Client) -> None:
    device = lively_edu()
    with serving(device) as path:
        with Client.connect(path, TIMEOUT) as client:
            client.migration_set_state(STOP_COPY)
            stream = client.migration_read_data(100)
        with Client.connect(path, TIMEOUT) as client:
            assert client.migration_get_state() == STOP_COPY
            stream += client.migration_read_data(1 << 20)
    assert stream == stopped_stream(lively_edu())


# Reading


def test_reads_of_nothing_and_past_the_end(edu: Client) -> None:
    whole = stopped_stream(Edu())
    edu.migration_set_state(STOP_COPY)
    assert edu.migration_read_data(0) == b""
    first = edu.migration_read_data(10)
    assert edu.device_feature(1 << 16 | 2)[:4] == bytes([STOP_COPY, 0, 0, 0])
    assert edu.migration_read_data(0) == b""
    assert first + edu.migration_read_data(1 << 20) == whole
    assert edu.migration_read_data(100) == b""


def test_reads_above_the_limit_are_refused() -> None:
    """The server is asked for more at once than this client said it takes."""
    small = replace(PROPOSAL, max_data_xfer_size=4096)
    with serving(Edu()) as path, Client.connect(path, TIMEOUT, proposal=small) as client:
        client.migration_set_state(STOP_COPY)
        client._core._proposal = PROPOSAL  # the client forgets that it has to split
        with pytest.raises(CommandError) as refused:
            client.migration_read_data(4097)
        assert refused.value.errno == errno.EINVAL
        assert len(client.migration_read_data(4096)) == 4096


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 5))
def test_however_the_stream_is_cut(read_piece: int, write_piece: int, seed: int) -> None:
    source, target = lively_edu(seed), Edu()
    before = visible(source)
    source.migration_set_state(STOP_COPY)
    load(target, saved(source, piece=read_piece), piece=write_piece)
    assert visible(target) == before


def test_the_stream_of_a_stopped_device_is_the_same_every_time() -> None:
    device = lively_edu()
    first = stopped_stream(device)
    device.migration_set_state(STOP)
    assert stopped_stream(device) == first
    device.migration_set_state(RUNNING)
    assert stopped_stream(device) == first
    other = Edu()
    load(other, first, then=STOP)
    assert stopped_stream(other) == first


# Moving

registers = st.lists(
    st.tuples(
        st.sampled_from([LIVENESS, FACTORIAL, STATUS, IRQ_RAISE, 0x64, SOURCE, DESTINATION, COUNT, COMMAND]),
        st.sampled_from([4, 8]),
        st.integers(0, U64) | st.integers(0, 40),
    ),
    max_size=12,
)
config_writes = st.lists(st.tuples(st.integers(0, 0x5F), st.integers(0, 255)), max_size=8)


def apply(device: Edu, writes: list[tuple[int, int, int]], config: list[tuple[int, int]]) -> None:
    for offset, size, value in writes:
        poke(device, offset, value & (1 << 8 * size) - 1, size)
    for offset, byte in config:
        device.region_write(7, offset, memoryview(bytes([byte])))


def dma_into_buffer(device: Edu, data: bytes) -> None:
    """By the device's own engine, as a guest would."""
    with guest_memory(PAGE) as memory:
        os.pwrite(memory, data, 0)
        device.dma_map(DmaFlags.READ, 0, 0, PAGE, OwnedFd.duplicate(memory))
        for offset, value in ((SOURCE, 0), (DESTINATION, BUFFER), (COUNT, len(data)), (COMMAND, 1)):
            poke(device, offset, value, 8)
        device.dma_unmap(0, 0, PAGE)


@given(registers, registers, config_writes, st.binary(max_size=64), st.binary(max_size=64), st.integers(1, 9000))
def test_pre_copy_then_stop_copy_moves_all_of_it(
    first: list[tuple[int, int, int]],
    second: list[tuple[int, int, int]],
    config: list[tuple[int, int]],
    before: bytes,
    after: bytes,
    piece: int,
) -> None:
    source, target = Edu(), lively_edu()
    apply(source, first, config)
    dma_into_buffer(source, before)
    source.migration_set_state(PRE_COPY)
    stream = saved(source, piece=piece)
    apply(source, second, config)  # it goes on working
    dma_into_buffer(source, after)
    stream += saved(source, piece=piece)
    apply(source, first, [])
    seen = visible(source)
    source.migration_set_state(STOP_COPY)
    stream += saved(source)
    load(target, stream)
    assert visible(target) == seen
    assert target.migration_get_state() == RUNNING
    source.migration_set_state(RUNNING)  # it would go on from here if the migration were given up
    assert visible(source) == seen


def test_a_migration_that_is_given_up_can_be_begun_again() -> None:
    source = lively_edu()
    seen = visible(source)
    source.migration_set_state(PRE_COPY)
    saved(source, piece=100)
    source.migration_set_state(RUNNING)
    source.migration_set_state(PRE_COPY)
    stream = saved(source)
    source.migration_set_state(STOP_COPY)
    target = Edu()
    load(target, stream + saved(source))
    assert visible(target) == seen


def test_pre_copy_sends_the_buffer_whenever_it_has_changed() -> None:
    device = Edu()
    device.migration_set_state(PRE_COPY)
    assert len(saved(device)) > PAGE
    assert saved(device) == b""
    dma_into_buffer(device, b"changed")
    assert PAGE < len(saved(device)) < PAGE + 100
    assert saved(device) == b""


def test_pre_copy_may_last_as_long_as_it_likes() -> None:
    """However often the buffer changes and is read: the stream stays one that the destination takes."""
    source, target = Edu(), Edu()
    source.migration_set_state(PRE_COPY)
    stream = b""
    for round_ in range(600):
        dma_into_buffer(source, round_.to_bytes(4, "little"))
        stream += saved(source, piece=8192)
    source.migration_set_state(STOP_COPY)
    load(target, stream + saved(source))
    assert visible(target) == visible(source)


def test_over_the_wire_with_an_interrupt_on_its_way() -> None:
    device = lively_edu()
    seen = visible(device)
    with attached(device) as source, attached(Edu()) as target, events(1) as (event,):
        source.migration_set_state(PRE_COPY)
        stream = source.migration_read_data(1 << 20)
        source.migration_set_state(STOP_COPY)
        stream += source.migration_read_data(1 << 20)
        target.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
        target.migration_set_state(RESUMING)
        target.migration_write_data(stream)
        assert event.take() == 0
        target.migration_set_state(RUNNING)
        assert event.take() == 1
        assert target.region_read(0, LIVENESS, 4) == seen["region 0"][4:8]  # type: ignore[index]
        assert target.region_read(7, 0, 256) == seen["region 7"]


def test_memory_of_bars_moves_too() -> None:
    source, target = Ivshmem(size=4 << 20, vectors=2, trapped=4096), Ivshmem(size=4 << 20, vectors=2)
    source.memory[2][:] = random.Random(4).randbytes(4 << 20)
    source.irq.trigger(1)
    source.region_write(1, 0, memoryview(bytes(range(4, 16))))
    with attached(source) as one, attached(target) as other:
        (area,) = other.regions[2].map()
        one.migration_set_state(STOP_COPY)
        stream = one.migration_read_data(8 << 20)
        other.migration_set_state(RESUMING)
        other.migration_write_data(stream)
        other.migration_set_state(RUNNING)
        assert area.memory == source.memory[2]  # in place: the client's mapping shows it
        assert other.region_read(1, 0, 12) == bytes(range(4, 16))
        assert other.region_read(1, 2048, 1) == b"\2"


@pytest.mark.parametrize(("source_size", "target_size"), [(1 << 20, 2 << 20), (2 << 20, 1 << 20)])
def test_memory_of_another_size_is_refused(source_size: int, target_size: int) -> None:
    source, target = Ivshmem(size=source_size), Ivshmem(size=target_size)
    source.memory[2][:] = b"\xaa" * source_size
    with pytest.raises(OSError, match="BAR 2"):
        load(target, stopped_stream(source))
    assert target.memory[2] == bytes(target_size)


# Estimates


def honest(estimate: int, follows: int) -> bool:
    return follows / 2 <= estimate <= 4 * follows + (64 << 10)


@pytest.mark.parametrize("make", [Edu, lively_edu, lambda: Ivshmem(size=4 << 20), Versioned])
@pytest.mark.parametrize("where", [RUNNING, STOP, STOP_COPY])
def test_the_estimate_is_honest(make: Callable[[], Device], where: DeviceState) -> None:
    with attached(make()) as client:
        client.migration_set_state(where)
        estimate = client.migration_data_size()
        client.migration_set_state(STOP_COPY)
        read = 0
        for part in (0, 100, 8 << 20):
            rest = client.migration_data_size()
            assert honest(estimate, read + rest)
            read += (got := len(client.migration_read_data(part)))
            assert client.migration_data_size() == rest - got
        assert honest(estimate, read)
        assert client.migration_data_size() == 0


@pytest.mark.parametrize("read", [0, 10, 1 << 20])
def test_the_estimate_is_honest_in_pre_copy(read: int) -> None:
    with attached(lively_edu()) as client:
        client.migration_set_state(PRE_COPY)
        client.migration_read_data(read)
        estimate = client.migration_data_size()
        client.migration_set_state(STOP_COPY)
        assert honest(estimate, len(client.migration_read_data(1 << 20)))


# Streams that must not be loaded

GOOD = stopped_stream(lively_edu(5))
OTHER_DEVICE = stopped_stream(Ivshmem(size=4096))


def errno_of(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def refused_and_unchanged(stream: bytes, piece: int = 1 << 20, target: Device | None = None) -> None:
    """The stream is refused on its way in or at its end; the device is as it was, and still usable."""
    device = target or lively_edu(6)
    before = visible(device)
    with pytest.raises((StreamError, TransitionError)) as refused:
        load(device, stream, piece=piece)
    assert errno_of(refused.value) == errno.EINVAL
    assert visible(device) == before
    assert device.migration_get_state() == RESUMING
    with pytest.raises(TransitionError):  # it cannot be talked into running on
        device.migration_set_state(RUNNING)
    device.reset()
    if isinstance(device, Edu):
        load(device, GOOD)
        assert visible(device) == visible(lively_edu(5))


def test_the_good_stream_is_good() -> None:
    device = Edu()
    load(device, GOOD)
    assert visible(device) == visible(lively_edu(5))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.integers(1, 5000))
def test_any_byte_changed_is_refused(position: int, change: int, piece: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] ^= change
    refused_and_unchanged(bytes(damaged), piece)


@pytest.mark.parametrize("position", range(24))
def test_every_byte_of_the_header_counts(position: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] ^= 1
    refused_and_unchanged(bytes(damaged))


@given(st.integers(0, len(GOOD) - 1))
def test_any_end_missing_is_refused(length: int) -> None:
    refused_and_unchanged(GOOD[:length])


@given(st.binary(min_size=1, max_size=50))
def test_anything_behind_the_end_is_refused(more: bytes) -> None:
    refused_and_unchanged(GOOD + more)


@pytest.mark.parametrize(
    "stream",
    [
        GOOD + GOOD,
        GOOD[24:],
        GOOD[:24] + GOOD,
        OTHER_DEVICE,
        GOOD[:24] + OTHER_DEVICE[24:],
        OTHER_DEVICE[:24] + GOOD[24:],
        bytes(100),
        b"",
    ],
    ids=["twice", "headless", "two headers", "other device", "other body", "other header", "zeros", "nothing"],
)
def test_streams_put_together_wrongly(stream: bytes) -> None:
    refused_and_unchanged(stream)


def test_a_stream_that_is_refused_over_the_wire(edu: Client) -> None:
    edu.region_write(0, LIVENESS, b"\1\2\3\4")
    edu.migration_set_state(RESUMING)
    with pytest.raises(CommandError) as refused:
        edu.migration_write_data(b"x" * 100)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(CommandError) as again:
        edu.migration_set_state(RUNNING)
    assert (again.value.errno, edu.migration_get_state()) == (errno.EINVAL, RESUMING)
    assert edu.region_read(0, LIVENESS, 4) == bytes(b ^ 0xFF for b in b"\1\2\3\4")


def test_what_is_kept_while_resuming_is_bounded() -> None:
    device = Edu()
    writer = StreamWriter(device.stream_identity)
    writer.add_pre_copy(bytes(1 << 30 >> 4))
    device.migration_set_state(RESUMING)
    data = bytearray(1 << 20)
    taken = 0

    def send_all() -> None:
        nonlocal taken
        while count := writer.read_into(memoryview(data)):
            device.migration_write_data(memoryview(data)[:count])
            taken += count

    with pytest.raises(StreamError, match="limit"):
        send_all()
    assert taken <= 8 << 20


def remade(device: Device, change: Callable[[dict[str, Any]], object], *, version: int | None = None) -> bytes:
    """The stream of a device with its state changed, with all checksums right."""
    own = device.stream_identity
    reader = StreamReader(own, 1 << 24)
    reader.write(stopped_stream(device))
    loaded = reader.finish()
    fields = decode_state(loaded.state)
    change(fields)
    writer = StreamWriter(
        StreamIdentity(own.vendor_id, own.device_id, own.state_version if version is None else version)
    )
    writer.add_state(encode_state(fields))
    for region, offset, data in loaded.memory:
        writer.add_memory(region, offset, data)
    writer.end()
    stream = bytearray(writer.pending)
    writer.read_into(memoryview(stream))
    return bytes(stream)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda s: s["fields"].update(colour=1), "colour"),
        (lambda s: s["fields"].pop("liveness"), "liveness"),
        (lambda s: s["fields"].update(liveness="1"), "liveness"),
        (lambda s: s["fields"].update(liveness=True), "liveness"),
        (lambda s: s["fields"].update(liveness=-1), "liveness"),
        (lambda s: s.update(fields=[1]), "fields"),
        (lambda s: s.update(more=1), "more"),
        (lambda s: s.pop("config"), "config"),
        (lambda s: s["config"].pop("bar0"), "missing registers: bar0"),
        (lambda s: s["config"].update(vendor_id=b"\0\0"), "vendor_id"),
        (lambda s: s["config"].update(vendor_id=b"\0"), "vendor_id"),
        (lambda s: s["config"].update(vendor_id=7), "config"),
        (lambda s: s.update(registers={"control": b"\0\0\0\0"}), "unknown registers: control"),
        (lambda s: s.update(config="text"), "config"),
        (lambda s: s.update(interrupts={}), "interrupt"),
        (lambda s: s["interrupts"].update(pending=[[9], [], [], [], []]), "INTX"),
        (lambda s: s.update(device={}), "buffer"),
        (lambda s: s["device"].update(buffer=b"short"), "buffer"),
        (lambda s: s["device"].update(more=1), "buffer"),
    ],
)
def test_a_sound_stream_with_state_that_does_not_fit(change: Callable[[dict[str, Any]], object], culprit: str) -> None:
    device = lively_edu(7)
    stream = remade(lively_edu(8), change)
    before = visible(device)
    with pytest.raises(TransitionError, match=culprit):
        load(device, stream)
    assert visible(device) == before
    assert device.migration_get_state() == RESUMING


def test_remade_unchanged_it_loads() -> None:
    device = Edu()
    load(device, remade(lively_edu(8), lambda s: None))
    assert visible(device) == visible(lively_edu(8))


def test_an_older_version_loads_with_defaults_for_what_it_did_not_have() -> None:
    original, grown = Original(), Versioned()
    original.old, grown.old, grown.new = 5, 8, [9, 9]
    original.memory[0][:3] = b"old"
    load(grown, stopped_stream(original))
    assert (grown.old, grown.new, bytes(grown.memory[0][:3])) == (5, [7], b"old")


def test_a_newer_version_is_refused() -> None:
    original = Original()
    with pytest.raises(StreamError, match="state version 2; known is up to 1"):
        load(original, stopped_stream(Versioned()))


def test_an_unknown_field_of_an_older_version_is_refused_too() -> None:
    stream = remade(Versioned(), lambda s: s["fields"].update(lost=1), version=1)
    with pytest.raises(TransitionError, match="unknown state: lost"):
        load(Versioned(), stream)


class Careful(Original):
    """Loads what it saved, and fails as it is told to."""

    failure: Exception | None = None
    extra = b"none"

    def save(self) -> dict[str, object]:
        return {"extra": self.extra}

    def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
        self.extra = bytes(saved["extra"])  # type: ignore[call-overload]
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


@pytest.mark.parametrize("failure", [ValueError("no"), KeyError("no"), TypeError("no"), OSError(errno.ENOSPC, "no")])
def test_a_load_that_fails_leaves_everything_as_it_was(failure: Exception) -> None:
    source, target = Careful(), Careful()
    source.old, source.extra = 5, b"source"
    source.memory[0][:] = b"s" * 0x2000
    target.old, target.extra = 6, b"target"
    target.memory[0][:] = b"t" * 0x2000
    target.irq.fire(PciIrq.ERR)
    before = visible(target)
    target.failure = failure
    with pytest.raises(TransitionError, match="no"):
        load(target, stopped_stream(source))
    assert (visible(target), target.extra) == (before, b"target")
    target.migration_set_state(RESUMING)  # where it still is
    target.migration_set_state(RUNNING)  # what was sent is still there, and now it loads
    assert (target.old, target.extra, bytes(target.memory[0][:1])) == (5, b"source", b"s")


def test_a_bug_in_load_is_error_until_a_reset() -> None:
    target = Careful()
    target.failure = ZeroDivisionError()
    with pytest.raises(TransitionError):
        load(target, stopped_stream(Careful()))
    assert target.migration_get_state() == ERROR
    target.reset()
    assert target.migration_get_state() == RUNNING


def test_state_that_cannot_be_saved_is_named() -> None:
    device = Versioned()
    device.new = [object()]  # type: ignore[list-item]
    with pytest.raises(TransitionError, match="fields"):
        device.migration_set_state(STOP_COPY)
    assert device.migration_get_state() == STOP


def test_bytearrays_keep_type_and_length() -> None:
    class Buffered(Original):
        data = state(bytearray(4))

    source, target = Buffered(), Buffered()
    source.data[:] = b"abcd"
    load(target, stopped_stream(source))
    assert target.data == bytearray(b"abcd")
    source.reset()
    source.data += b"more"
    with pytest.raises(TransitionError, match="data is 4 bytes"):
        load(target, stopped_stream(source))


def test_a_device_that_takes_neither_a_stream_nor_its_own_state_back_is_in_error() -> None:
    class Stubborn(Edu):
        def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
            raise ValueError(f"not {saved['buffer']!r:.8}" if self.factorial else "not even mine")

    stream = stopped_stream(lively_edu(1))
    device = Stubborn()
    with pytest.raises(TransitionError, match=r"half of a stream \(.*\), and not its own state \(not even mine\)"):
        load(device, stream)
    assert device.migration_get_state() == DeviceState.ERROR
    device.reset()
    assert device.migration_get_state() == DeviceState.RUNNING


# Interrupts of a device that stands still

MASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK
UNMASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK
TRIGGER = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER


class Noisy(Device):
    vendor_id, device_id, intx, msix_vectors = 0x494F, 0x0C0E, True, 2
    migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY | MigrationFlags.P2P


@pytest.mark.parametrize("where", [STOP, STOP_COPY])
def test_an_end_of_interrupt_in_a_stopped_device_is_answered_when_it_runs(edu: Client, where: DeviceState) -> None:
    """QEMU sends one whenever it touches a BAR of a device whose line is up."""
    with events(1) as (pin,):
        edu.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [pin.fd])
        edu.region_write(0, IRQ_RAISE, b"\1\0\0\0")
        assert pin.take() == 1
        edu.migration_set_state(where)
        edu.set_irqs(PciIrq.INTX, UNMASK, 0, 1)
        assert pin.take() == 0
        edu.migration_set_state(RUNNING)
        assert pin.take() == 1


def test_a_reset_forgets_the_interrupts_that_wait_and_lets_out_those_that_come() -> None:
    device = Noisy()
    with events(1) as (heard,):
        device.set_irqs(PciIrq.MSIX, ASSIGN, 0, 1, [OwnedFd.duplicate(heard.fd)])
        device.migration_set_state(STOP)
        device.irq.trigger(0)
        device.reset()
        assert heard.take() == 0
        device.irq.trigger(0)
        assert heard.take() == 1


def test_a_save_that_fails_on_the_way_leaves_interrupts_as_the_state_is() -> None:
    class Mute(Noisy):
        migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY

        def save(self) -> dict[str, object]:
            raise OSError(errno.EIO, "cannot")

    device = Mute()
    with events(1) as (heard,):
        device.set_irqs(PciIrq.MSIX, ASSIGN, 0, 1, [OwnedFd.duplicate(heard.fd)])
        for begun, left in ((PRE_COPY, PRE_COPY), (RUNNING, STOP)):
            device.migration_set_state(begun)
            with pytest.raises(TransitionError):
                device.migration_set_state(STOP_COPY)
            assert device.migration_get_state() == left
            device.irq.trigger(0)
            assert heard.take() == (left == PRE_COPY)


LINES = [(PciIrq.INTX, 0), (PciIrq.MSIX, 0), (PciIrq.MSIX, 1), (PciIrq.ERR, 0)]
STATES = (RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, STOP, STOP_COPY)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["fire", "trigger", "mask", "unmask", "assign", "deassign"]), st.sampled_from(LINES)),
    st.tuples(st.sampled_from(["assert_", "deassert"]), st.none()),
    st.tuples(st.just("go to"), st.sampled_from(STATES)),
)


@given(steps=st.lists(STEPS, max_size=40))
def test_nothing_comes_from_a_stopped_device_nothing_is_lost_and_nothing_comes_twice(
    steps: list[tuple[str, Any]],
) -> None:
    device = Noisy()
    fired, came = dict.fromkeys(LINES, 0), dict.fromkeys(LINES, 0)
    owed: set[tuple[PciIrq, int]] = set()  # fired, and nothing came since
    with events(len(LINES)) as listeners:
        heard = dict(zip(LINES, listeners, strict=True))

        def listen() -> None:
            for line, event in heard.items():
                if count := event.take():
                    came[line] += count
                    owed.discard(line)

        def set_irqs(action: int, line: tuple[PciIrq, int], fds: Sequence[int] = ()) -> None:
            device.set_irqs(line[0], action, line[1], 1, [OwnedFd.duplicate(fd) for fd in fds])

        def fire(line: tuple[PciIrq, int], by_client: bool = False) -> None:
            fired[line] += 1
            owed.add(line)
            set_irqs(TRIGGER, line) if by_client else device.irq.fire(*line)

        def go_to(state: DeviceState) -> None:
            with contextlib.suppress(TransitionError):  # no path leads there
                device.migration_set_state(state)

        actions: dict[str, Callable[[Any], None]] = {
            "fire": fire,
            "trigger": lambda line: fire(line, by_client=True),
            "mask": lambda line: set_irqs(MASK, line),
            "unmask": lambda line: set_irqs(UNMASK, line),
            "assign": lambda line: set_irqs(ASSIGN, line, [heard[line].fd]),
            "deassign": lambda line: set_irqs(ASSIGN, line),
            "assert_": lambda _: device.irq.assert_(),
            "deassert": lambda _: device.irq.deassert(),
            "go to": go_to,
        }
        for line in LINES:
            actions["assign"](line)
        for action, argument in steps:
            before = dict(came)
            actions[action](argument)
            listen()
            if device.migration_get_state() not in RUNNING_STATES:
                assert came == before
        go_to(STOP)
        for line in LINES:
            actions["assign"](line)
            actions["unmask"](line)
        go_to(RUNNING)
        before = dict(came)
        listen()
        assert not owed
        assert came[PciIrq.INTX, 0] - before[PciIrq.INTX, 0] >= device.irq.asserted
        messages = LINES[1:]
        assert all(came[line] <= fired[line] for line in messages)
        device.disconnected()
