"""Streams of an NVMe controller: whatever its guest did it can move; what no controller says of itself is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import (
    ALL_NAMESPACES,
    AdminOpcode,
    Configuration,
    ControllerStatus,
    Feature,
    IoOpcode,
    LogPage,
    Register,
)
from vfio_user.devices.nvme.logs import Health
from vfio_user.devices.nvme.saving import restore, saved
from vfio_user.devices.nvme.storage.memory import MemoryStorage
from vfio_user.migration import encode_state
from vfio_user.testing.nvme import Command, NvmeError
from vfio_user.testing.nvme.data import prps
from vfio_user.wire.constants import DeviceState

from .nvme_gate_support import BLOCK, Desk, DirectRegisters, GatedStorage, MessageGuest, gated, settle

pytestmark = pytest.mark.timeout(60)

MEMORY, SIZE = 1 << 20, 64 << 10
"""Bytes of the guest's memory, of namespace 1."""
ASQ, ACQ, RINGS, LISTS, DATA = 0x1000, 0x2000, 0x1_0000, 0x8_0000, 0x9_0000
DEPTH = 32
ENABLED = 4 << 20 | 6 << 16 | Configuration.EN


def like() -> Nvme:
    """Controllers that are alike: what one says of itself the other can become."""
    return Nvme(size=SIZE, serial="same")


class Guest:
    """A guest that does as it likes, and does not look at what comes of it."""

    def __init__(self, device: Nvme) -> None:
        self.device = device
        self.memory = MessageGuest(device, MEMORY).memory
        self.registers = DirectRegisters(device)
        self.tails: dict[int, int] = {}

    def enable(self) -> None:
        """A new beginning, with an admin queue."""
        self.write(Register.CC, 0)
        settle(self.device)
        self.memory[ASQ : ACQ + 0x1000] = bytes(ACQ + 0x1000 - ASQ)
        self.tails.clear()
        self.write(Register.AQA, DEPTH - 1 << 16 | DEPTH - 1)
        self.write(Register.ASQ, ASQ)
        self.write(Register.ACQ, ACQ)
        self.write(Register.CC, ENABLED)
        settle(self.device)

    def write(self, register: int, value: int) -> None:
        self.registers.write32(register, value & 0xFFFF_FFFF)

    def submit(self, command: Command, queue: int = 0) -> None:
        """A command whose end is taken, if it comes: unless it is in a queue that there is not."""
        target = self.device.executor.submissions.get(queue)
        if target is None:
            return
        at = ASQ if queue == 0 else target.ring.pieces[0]
        size = target.ring.size
        tail = self.tails.get(queue, target.tail)
        if at + 64 * (tail + 1) <= MEMORY:
            self.memory[at + 64 * tail : at + 64 * (tail + 1)] = command.pack(tail)
        self.tails[queue] = (tail + 1) % size
        self.write(0x1000 + 8 * queue, self.tails[queue])
        settle(self.device)
        completions = self.device.executor.completions.get(target.completions.number)
        if completions is not None:
            self.write(0x1004 + 8 * completions.number, completions.tail)

    def create_queue(self, number: int, size: int, vector: int, *, contiguous: bool = True) -> None:
        """A pair of them, the rings somewhere in memory."""
        for opcode, entry, at in ((AdminOpcode.CREATE_IO_CQ, 16, 0), (AdminOpcode.CREATE_IO_SQ, 64, 1)):
            first = RINGS + (number % 3 * 2 + at) * 0x1_0000
            pages = [first + page * 0x1000 for page in range(-(-size * entry // 0x1000))]
            if not contiguous:
                self.memory[LISTS : LISTS + 8 * len(pages)] = struct.pack(f"<{len(pages)}Q", *pages)
            flags = (number << 16 | contiguous) if at else (vector << 16 | 2 | contiguous)
            pointer = prps(first if contiguous else LISTS)
            self.submit(Command(opcode, cdw10=(size - 1 & 0xFFFF) << 16 | number, cdw11=flags, pointer=pointer))

    def set_feature(self, feature: int, value: int, nsid: int = 0) -> None:
        self.submit(Command(AdminOpcode.SET_FEATURES, nsid, cdw10=feature, cdw11=value, pointer=prps(DATA)))


@contextlib.contextmanager
def guest_of(device: Nvme) -> Iterator[Guest]:
    with contextlib.closing(device):
        guest = Guest(device)
        guest.enable()
        yield guest


def content(device: Nvme) -> dict[str, object]:
    """What a controller says of itself, but the time, which goes on."""
    return {name: value for name, value in saved(device).items() if name != "timestamp"}


def move(here: Guest, there: Guest) -> None:
    """The device of one guest becomes that of the other."""
    device = here.device
    device.quiesce()
    device.migration_set_state(DeviceState.STOP_COPY)
    there.memory[:] = here.memory
    there.device.migration_set_state(DeviceState.RESUMING)
    part = memoryview(bytearray(1 << 20))
    while length := device.migration_read_data(part):
        there.device.migration_write_data(part[:length])
    there.device.migration_set_state(DeviceState.STOP)
    assert content(there.device) == content(device)
    there.device.migration_set_state(DeviceState.RUNNING)
    settle(there.device)


# Whatever a guest did

Step = Callable[[Guest], object]
_U32 = st.integers(0, 0xFFFF_FFFF) | st.sampled_from([0, 1, 0xFFFF, 0x1_0000, 0xFFFF_FFFF])
_NSIDS = st.sampled_from([0, 1, 2, ALL_NAMESPACES])
_NUMBERS = st.integers(0, 4) | st.sampled_from([63, 64, 65, 0xFFFF])
_SIZES = st.sampled_from([1, 2, 3, 16, 100, 1024, 1025, 4096])
_POINTERS = st.sampled_from([prps(DATA, DATA + 0x1000), prps(0), prps(1 << 45), prps(DATA, DATA), prps(LISTS, DATA)])
_ADMIN = st.sampled_from([*AdminOpcode, 0x7F])
_REGISTERS = st.sampled_from([*Register])
_CONFIGURATIONS = st.sampled_from([0, 1, 0xF, 0xFF]).map(lambda mps: ENABLED | mps << 7) | st.sampled_from(
    [ENABLED | 1 << 14, ENABLED | 2 << 14, ENABLED ^ Configuration.EN, ENABLED | 1 << 4, ENABLED | 7 << 11, 0]
)


def step(name: str, *values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(name), *values)


STEPS: dict[str, Callable[..., object]] = {
    "enable": Guest.enable,
    "register": Guest.write,
    "configuration": lambda guest, value: guest.write(Register.CC, value),
    "feature": Guest.set_feature,
    "queue": lambda guest, number, size, vector, flat: guest.create_queue(number, size, vector, contiguous=flat),
    "doorbell": lambda guest, bell, value: guest.write(0x1000 + 4 * bell, value),
    "admin": lambda guest, opcode, nsid, pointer, *words: guest.submit(
        Command(opcode, nsid, pointer=pointer, **dict(zip(("cdw10", "cdw11", "cdw12"), words, strict=True)))
    ),
    "io": lambda guest, queue, opcode, nsid, lba, blocks: guest.submit(
        Command(opcode, nsid, cdw10=lba, cdw12=blocks, pointer=prps(DATA, DATA + 0x1000)), queue
    ),
    "vectors": lambda guest, count: [
        guest.set_feature(Feature.INTERRUPT_VECTOR_CONFIGURATION, v) for v in range(count)
    ],
}
PLANS = st.lists(
    st.one_of(
        step("enable"),
        step("register", _REGISTERS, _U32),
        step("configuration", _CONFIGURATIONS),
        step("feature", st.sampled_from([*Feature]), _U32, _NSIDS),
        step("queue", _NUMBERS, _SIZES, _NUMBERS, st.booleans()),
        step("queue", st.integers(1, 3), st.sampled_from([2, 64, 300]), st.integers(0, 3), st.booleans()),
        step("doorbell", st.integers(0, 8), st.integers(0, 40) | _U32),
        step("admin", _ADMIN, _NSIDS, _POINTERS, _U32, _U32, st.sampled_from([0, 1, 4])),
        step("admin", _ADMIN, _NSIDS, _POINTERS, st.integers(0, 0x7F) | _U32, st.integers(0, 8), st.just(0)),
        step("io", st.integers(1, 3), st.sampled_from([*IoOpcode]), _NSIDS, st.integers(0, 200), st.integers(0, 15)),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PLANS)
@example([("vectors", 4200)])
@example([("configuration", ENABLED | 0xF << 7), ("queue", 1, 16, 1, False)])
@example([("configuration", ENABLED | 1 << 4), ("enable",), ("queue", 2, 300, 2, False)])
@example([("feature", Feature.TEMPERATURE_THRESHOLD, 1 << 20 | 300, 0), ("feature", Feature.TIMESTAMP, 0, 0)])
@example([("admin", AdminOpcode.ASYNC_EVENT_REQUEST, 0, prps(0), 0, 0, 0)] * 6 + [("doorbell", 8, 1)])
@example([("queue", 1, 16, 1, True)] + [("io", 1, 0x7F, 1, 0, 0)] * 70)
@example([("register", Register.CC, 0)])
def test_whatever_a_guest_did_it_can_move(plan: list[tuple[Any, ...]]) -> None:
    """To a controller that is alike, where it goes on, and back again."""
    with guest_of(like()) as here, guest_of(like()) as there:
        for name, *values in plan:
            STEPS[name](here, *values)
        settle(here.device)
        move(here, there)
        move(there, here)
        here.enable()
        assert here.device.csts & (ControllerStatus.RDY | ControllerStatus.CFS) == ControllerStatus.RDY


@pytest.mark.parametrize(("option", "most"), [("serial", 20), ("model", 40)])
def test_what_a_controller_calls_itself_has_its_length(option: str, most: int) -> None:
    """5.15.2.2: what the data structure cannot hold no controller has; else a stream could not, either."""
    for wrong in (most + 1, 70):
        with pytest.raises(ValueError, match=option):
            Nvme(**{"size": SIZE, option: "x" * wrong})
    with guest_of(Nvme(**{"size": SIZE, option: "x" * most})) as here, guest_of(like()) as there:
        move(here, there)
        assert getattr(there.device.identity, option) == "x" * most


def test_vectors_that_there_are_not() -> None:
    """5.21.1.9: the vector is checked, and so the features are no more than a stream holds."""
    with contextlib.closing(Desk(like())) as desk:
        vectors = desk.device.msix_vectors
        desk.driver.set_feature(Feature.INTERRUPT_VECTOR_CONFIGURATION, 1 << 16 | vectors - 1)
        for vector in (vectors, 0xFFFF):
            with pytest.raises(NvmeError, match="INVALID_FIELD"):
                desk.driver.set_feature(Feature.INTERRUPT_VECTOR_CONFIGURATION, vector)


def test_pages_keep_their_size_while_the_controller_is_enabled() -> None:
    """3.1.5: MPS, CSS and AMS change while EN is 0 only."""
    with contextlib.closing(Desk(like())) as desk:
        fixed = Configuration.MPS | Configuration.CSS | Configuration.AMS
        desk.configure(set=fixed)
        assert not desk.guest.read32(Register.CC) & fixed
        assert desk.device.page_size == 4096
        desk.driver.create_queue_pair(contiguous=False)
        assert desk.driver.read(1, 0, 1) == bytes(BLOCK)


# What no controller says of itself


@pytest.fixture
def running() -> Iterator[Guest]:
    """Enabled, with I/O queue 1."""
    with guest_of(like()) as guest:
        guest.create_queue(1, 16, 1)
        assert 1 in guest.device.executor.submissions
        yield guest


def put(fields: dict[str, Any], name: str, place: int, **values: object) -> None:
    fields[name][place] |= values


def ring_of(fields: dict[str, Any], name: str, size: int) -> None:
    fields[name][1]["ring"] |= {"size": size, "per_piece": size}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a submission queue twice": (
        lambda f: f["submissions"].append(dict(f["submissions"][1])),
        "two queues of number 1",
    ),
    "a completion queue twice": (
        lambda f: f["completions"].append(dict(f["completions"][1])),
        "two queues of number 1",
    ),
    "more entries than MQES": (lambda f: ring_of(f, "submissions", 4096), "4096 entries"),
    "more completions than MQES": (lambda f: ring_of(f, "completions", 1025), "1025 entries"),
    "I/O that completes in the admin queue": (lambda f: put(f, "submissions", 1, completions=0), "submission queue 1"),
    "admin commands that complete elsewhere": (lambda f: put(f, "submissions", 0, completions=1), "submission queue 0"),
    "enabled, and not in its registers": (lambda f: f.update(enabled=False), "enabled"),
    "no admin queue": (
        lambda f: f.update(completions=f["completions"][1:], submissions=f["submissions"][1:]),
        "admin queues",
    ),
    "a feature that cannot be set so": (
        lambda f: f["features"].append({"feature": int(Feature.VOLATILE_WRITE_CACHE), "selector": 0, "value": 2}),
        "feature",
    ),
    "more queues granted than there are": (
        lambda f: f["features"].append({"feature": int(Feature.NUMBER_OF_QUEUES), "selector": 0, "value": 0xFFFE_0000}),
        "feature",
    ),
    "a feature of no namespace": (
        lambda f: f["features"].append({"feature": int(Feature.ERROR_RECOVERY), "selector": 0, "value": 1}),
        "feature",
    ),
}
"""Changes to the stream of a controller that is enabled, with I/O queue 1."""


def plain(device: Nvme) -> dict[str, Any]:
    """What a controller says of itself, as it comes out of a stream."""
    return dict(msgspec.msgpack.decode(msgspec.msgpack.encode(saved(device))))


def test_what_a_stream_does_not_say_is_as_after_a_reset(running: Guest) -> None:
    """The guest comes back to a device on which, before it left, it had set what it has not set any more."""
    executor, fields = running.device.executor, plain(running.device)
    burst = executor.burst
    running.set_feature(Feature.ARBITRATION, 0)
    assert executor.burst == 1
    restore(running.device, fields, [])
    assert executor.burst == burst


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(running: Guest, case: str) -> None:
    device = running.device
    fields = plain(device)
    restore(device, fields, [])
    before = content(device)
    change, words = WRONG[case]
    change(fields)
    with pytest.raises(ValueError, match=words):
        restore(device, fields, [])
    assert content(device) == before


@pytest.mark.parametrize("value", [-1, 1 << 63])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Health)])
def test_health_is_counts(running: Guest, name: str, value: int) -> None:
    fields = saved(running.device)
    fields["health"] = dataclasses.asdict(running.device.logs.health) | {name: value}
    with pytest.raises(ValueError, match=name):
        restore(running.device, fields, [])


def test_health_that_has_counted_far(running: Guest) -> None:
    """The largest counts that a stream may have: one more READ, and all that tells of them still can."""
    device = running.device
    fields = saved(device)
    fields["health"] = dict.fromkeys((field.name for field in dataclasses.fields(Health)), (1 << 63) - 1)
    restore(device, fields, [])
    running.submit(Command(IoOpcode.READ, 1, pointer=prps(DATA)), 1)
    running.submit(
        Command(AdminOpcode.GET_LOG_PAGE, ALL_NAMESPACES, cdw10=127 << 16 | LogPage.SMART_HEALTH, pointer=prps(DATA))
    )
    assert running.memory[ACQ + 16 * (running.tails[0] - 1) + 14] >> 1 == 0
    assert encode_state(saved(device))


def test_requests_without_an_admin_queue_are_refused() -> None:
    """There is nobody to answer to: neither a word of it later, nor at RUNNING."""
    with contextlib.closing(like()) as device:
        fields = saved(device)
        restore(device, fields, [])
        with pytest.raises(ValueError, match="admin queue"):
            restore(device, fields | {"requests": [1], "pending": [0]}, [])
        with pytest.raises(ValueError, match="enabled"):
            restore(device, fields | {"enabled": True}, [])


def test_a_memory_that_comes_while_a_stream_is_sent_is_whole_at_the_other_side() -> None:
    """Also what nobody has written there yet: at the other side something may be left of an earlier guest."""
    old = GatedStorage()
    MemoryStorage.write(old, 0, [memoryview(b"O" * BLOCK)])
    with gated(GatedStorage(), serial="same") as here, gated(GatedStorage(), old, serial="same") as there:
        source, destination = here.guest.client, there.guest.client
        source.migration_set_state(DeviceState.PRE_COPY)
        stream = [source.migration_read_data(1 << 20)]
        here.in_device(lambda: here.device.add_namespace(GatedStorage()))
        source.migration_set_state(DeviceState.STOP_COPY)
        while stream[-1]:
            stream.append(source.migration_read_data(1 << 20))
        destination.migration_set_state(DeviceState.RESUMING)
        for part in stream[:-1]:
            destination.migration_write_data(part)
        destination.migration_set_state(DeviceState.STOP)
        seen = bytearray(BLOCK)
        MemoryStorage.read(old, 0, [memoryview(seen)])
        assert seen == bytes(BLOCK)


def test_a_stream_that_is_refused_has_changed_no_namespace() -> None:
    """Namespace 2 of the destination wants blocks of 4096 bytes: then namespace 1 is not overwritten, either."""
    first, second = GatedStorage(), GatedStorage()
    there_first, there_second = GatedStorage(), GatedStorage(block_size=4096)
    with (
        gated(first, second, serial="same") as here,
        gated(there_first, there_second, serial="same", block_size=4096) as there,
    ):
        here.driver.create_queue_pair()
        here.driver.write(1, 0, b"A" * 8 * BLOCK)
        stream = here.guest.save()
        with pytest.raises(OSError, match=r"Invalid argument"):
            there.guest.load(stream)
        seen = bytearray(8 * BLOCK)
        MemoryStorage.read(there_first, 0, [memoryview(seen)])
        assert seen == bytes(8 * BLOCK)
