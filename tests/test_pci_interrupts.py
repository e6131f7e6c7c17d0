"""Interrupts: no trigger is lost, INTx keeps its level, and the client's eventfds never stop or outlive us."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfio_user.fds import OwnedFd
from vfio_user.pci import Interrupts, interrupts
from vfio_user.pci.interrupts import ERR, INTX, MSI, MSIX, REQ
from vfio_user.wire.constants import IrqSetFlags, PciIrq

NONE_TRIGGER, NONE_MASK, NONE_UNMASK = 0x21, 0x09, 0x11
FD_TRIGGER, FD_MASK, FD_UNMASK = 0x24, 0x0C, 0x14
COUNTS = (1, 2, 3, 1, 1)
FULL = (1 << 64) - 2


class Listener:
    """The client's side of an eventfd: keeps its own descriptor and counts what arrives."""

    def __init__(self, flags: int = os.EFD_NONBLOCK | os.EFD_CLOEXEC) -> None:
        self.fd = OwnedFd(os.eventfd(0, flags))

    def send(self) -> OwnedFd:
        """What SCM_RIGHTS would deliver: another descriptor of the same open file."""
        return OwnedFd.duplicate(self.fd.fileno())

    def take(self) -> int:
        """Signals since the last call."""
        try:
            return os.eventfd_read(self.fd.fileno())
        except BlockingIOError:
            return 0


def assign(irq: Interrupts, index: int, *vectors: int) -> list[Listener]:
    listeners = [Listener() for _ in vectors]
    for vector, listener in zip(vectors, listeners, strict=True):
        irq.set_irqs(index, FD_TRIGGER, vector, 1, [listener.send()])
    return listeners


def pending(irq: Interrupts, index: int = MSIX) -> list[int]:
    bits = int.from_bytes(irq.pba(index), "little")
    return [vector for vector in range(bits.bit_length()) if bits >> vector & 1]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left_by_other_tests() -> None:
    """What they left to the garbage collector must not be closed while descriptors are counted."""
    gc.collect()


@pytest.fixture
def irq() -> Iterator[Interrupts]:
    before = open_fds()
    subject = Interrupts(COUNTS)
    yield subject
    subject.release_fds()
    del subject
    assert open_fds() <= before, "file descriptors leak"


def test_the_numbers_are_those_of_the_wire() -> None:
    for name in ("INTX", "MSI", "MSIX", "ERR", "REQ"):
        assert getattr(interrupts, name) == PciIrq[name]
    for name in ("DATA_NONE", "DATA_EVENTFD", "ACTION_MASK", "ACTION_UNMASK", "ACTION_TRIGGER"):
        assert getattr(interrupts, name) == IrqSetFlags[name]


class InterruptsMachine(RuleBasedStateMachine):
    """Against a model that, after every step, lets out of every vector whatever may leave."""

    lines = st.sampled_from([(i, v) for i, count in enumerate(COUNTS) for v in range(count)])

    @initialize()
    def start(self) -> None:
        self.irq = Interrupts(COUNTS)
        self.listeners: dict[tuple[int, int], Listener] = {}
        self.pending: set[tuple[int, int]] = set()
        self.masked: set[tuple[int, int]] = set()
        self.held: set[tuple[int, int]] = set()
        self.level = self.in_service = False
        self.running = True
        self.fds_before = open_fds()

    def settle(self) -> dict[tuple[int, int], int]:
        """What the model says must arrive now."""
        if not self.running:
            return {}
        ready = {
            line
            for line in self.pending
            if line[0] != INTX and line in self.listeners and line not in self.masked | self.held
        }
        self.pending -= ready
        pin = (INTX, 0)
        quiet = pin in self.masked | self.held or pin not in self.listeners
        if not quiet and (pin in self.pending or (self.level and not self.in_service)):
            self.pending.discard(pin)
            self.in_service = self.level
            ready.add(pin)
        return dict.fromkeys(ready, 1)

    @invariant()
    def every_trigger_has_arrived_or_is_pending(self) -> None:
        if not hasattr(self, "irq"):
            return
        expected = self.settle()
        arrived = {line: count for line, one in self.listeners.items() if (count := one.take())}
        assert arrived == expected
        for index in range(5):
            waits = {vector for i, vector in self.pending if i == index}
            if index == INTX and self.level and not self.in_service:
                waits.add(0)
            assert pending(self.irq, index) == sorted(waits)

    def forget(self, line: tuple[int, int]) -> None:
        self.listeners.pop(line, None)
        self.masked.discard(line)
        if line[0] == INTX:
            self.in_service = False

    @rule(vector=st.integers(0, 2))
    def trigger(self, vector: int) -> None:
        self.irq.trigger(vector)
        index = next((i for i in (MSIX, MSI, INTX) if any(line[0] == i for line in self.listeners)), MSIX)
        heard = [one for i, one in self.listeners if i == index]
        self.pending.add((index, vector % (max(heard) + 1 if index == MSI and heard else COUNTS[index])))

    @rule(line=lines, by_client=st.booleans())
    def fire(self, line: tuple[int, int], by_client: bool) -> None:
        if by_client:
            self.irq.set_irqs(line[0], NONE_TRIGGER, line[1], 1, [])
        else:
            self.irq.fire(*line)
        self.pending.add(line)

    @rule(line=lines)
    def assign(self, line: tuple[int, int]) -> None:
        listener = Listener()
        self.irq.set_irqs(line[0], FD_TRIGGER, line[1], 1, [listener.send()])
        self.listeners[line] = listener
        if line[0] == INTX:
            self.in_service = False

    @rule(line=lines)
    def deassign(self, line: tuple[int, int]) -> None:
        self.irq.set_irqs(line[0], FD_TRIGGER, line[1], 1, [])
        self.forget(line)

    @rule(index=st.integers(0, 4))
    def disable(self, index: int) -> None:
        self.irq.set_irqs(index, NONE_TRIGGER, 0, 0, [])
        for vector in range(COUNTS[index]):
            self.forget((index, vector))

    @rule(line=lines)
    def mask(self, line: tuple[int, int]) -> None:
        self.irq.set_irqs(line[0], NONE_MASK, line[1], 1, [])
        self.masked.add(line)

    @rule(index=st.sampled_from([INTX, MSI, MSIX]))
    def unmask_all(self, index: int) -> None:
        self.irq.set_irqs(index, NONE_UNMASK, 0, COUNTS[index], [])
        self.masked = {line for line in self.masked if line[0] != index}
        if index == INTX:
            self.in_service = False

    @rule(line=lines)
    def unmask(self, line: tuple[int, int]) -> None:
        self.irq.set_irqs(line[0], NONE_UNMASK, line[1], 1, [])
        self.masked.discard(line)
        if line[0] == INTX:
            self.in_service = False

    @rule(level=st.booleans())
    def drive(self, level: bool) -> None:
        if level:
            self.irq.assert_()
        else:
            self.irq.deassert()
        self.level = level
        self.in_service &= level
        assert self.irq.asserted == level

    def held_bits(self) -> dict[int, int]:
        return {index: sum(1 << vector for i, vector in self.held if i == index) for index in (INTX, MSI, MSIX)}

    @rule(held=st.sets(lines.filter(lambda line: line[0] in (INTX, MSI, MSIX))))
    def hold(self, held: set[tuple[int, int]]) -> None:
        self.held = held
        self.irq.hold(self.held_bits())

    @rule()
    def stop(self) -> None:
        self.irq.stop()
        self.running = False

    @rule()
    def run(self) -> None:
        self.irq.run()
        self.in_service = False
        self.running = True

    @rule()
    def reset(self) -> None:
        self.irq.reset()
        self.pending.clear()
        self.level = self.in_service = False

    @rule()
    def client_leaves(self) -> None:
        self.irq.release_fds()
        for line in [*self.listeners, *self.masked, (INTX, 0)]:
            self.forget(line)
        assert open_fds() <= self.fds_before

    @rule(vectors=st.sets(lines))
    def migrate(self, vectors: set[tuple[int, int]]) -> None:
        """To another process, with a client of its own that listens to ``vectors``."""
        state = self.irq.save()
        self.irq.release_fds()
        self.irq = Interrupts(COUNTS)
        self.irq.stop()
        self.running = False
        self.listeners = {line: Listener() for line in vectors}
        for (index, vector), listener in self.listeners.items():
            self.irq.set_irqs(index, FD_TRIGGER, vector, 1, [listener.send()])
        self.irq.load(state, self.held_bits())
        assert self.irq.save() == state
        self.masked.clear()
        self.in_service = False

    def teardown(self) -> None:
        if hasattr(self, "irq"):
            self.irq.release_fds()
            self.listeners.clear()
            assert open_fds() <= self.fds_before


TestInterruptsMachine = InterruptsMachine.TestCase
TestInterruptsMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_trigger_without_eventfd_shows_in_the_pba_and_fires_when_one_is_assigned(irq: Interrupts) -> None:
    irq.trigger(2)
    irq.trigger(2)
    assert irq.pba() == b"\x04" + bytes(7)
    irq.set_irqs(MSIX, FD_TRIGGER, 0, 3, [])  # as QEMU does when MSI-X is enabled
    listeners = assign(irq, MSIX, 0, 1, 2)
    assert [one.take() for one in listeners] == [0, 0, 1]
    assert irq.pba() == bytes(8)


def test_reassigning_everything_loses_nothing_in_between(irq: Interrupts) -> None:
    first = assign(irq, MSIX, 0)
    irq.set_irqs(MSIX, NONE_TRIGGER, 0, 0, [])
    irq.trigger(0)
    irq.trigger(1)
    second = assign(irq, MSIX, 0, 1)
    assert [one.take() for one in first + second] == [0, 1, 1]


def test_one_index_leaves_the_eventfds_of_the_others_alone(irq: Interrupts) -> None:
    (pin,) = assign(irq, INTX, 0)
    messages = assign(irq, MSI, 0, 1)
    (error,) = assign(irq, ERR, 0)
    irq.set_irqs(MSI, NONE_TRIGGER, 0, 0, [])
    irq.assert_()
    irq.fire(ERR)
    assert [one.take() for one in (pin, *messages, error)] == [1, 0, 0, 1]


def test_a_range_that_starts_behind_its_count_is_disabled_too(irq: Interrupts) -> None:
    """The C library loops from start to count, and so does nothing here."""
    listeners = assign(irq, MSIX, 0, 1, 2)
    irq.set_irqs(MSIX, FD_TRIGGER, 2, 1, [])
    irq.trigger(2)
    assert (listeners[2].take(), pending(irq)) == (0, [2])


def test_intx_is_raised_again_after_each_unmask_while_it_stands(irq: Interrupts) -> None:
    (pin,) = assign(irq, INTX, 0)
    irq.assert_()
    irq.assert_()
    assert pin.take() == 1
    irq.set_irqs(INTX, NONE_UNMASK, 0, 1, [])
    assert pin.take() == 1
    irq.deassert()
    irq.set_irqs(INTX, NONE_UNMASK, 0, 1, [])
    assert pin.take() == 0
    irq.assert_()
    assert pin.take() == 1


def test_the_command_bit_holds_intx_back_and_lets_it_out(irq: Interrupts) -> None:
    (pin,) = assign(irq, INTX, 0)
    irq.hold({INTX: 1})
    irq.assert_()
    assert (pin.take(), pending(irq, INTX)) == (0, [0])
    irq.hold({})
    assert (pin.take(), pending(irq, INTX)) == (1, [])


def test_running_again_raises_intx_that_the_last_client_may_not_have_seen(irq: Interrupts) -> None:
    (pin,) = assign(irq, INTX, 0)
    irq.assert_()
    assert pin.take() == 1
    irq.stop()
    irq.run()
    assert pin.take() == 1
    irq.deassert()
    irq.stop()
    irq.run()
    assert pin.take() == 0


@pytest.mark.parametrize(("index", "vector"), [(INTX, 0), (MSI, 1), (MSIX, 2), (ERR, 0), (REQ, 0)])
def test_what_comes_while_the_device_stands_still_waits_and_comes_once(
    irq: Interrupts, index: int, vector: int
) -> None:
    (heard,) = assign(irq, index, vector)
    irq.stop()
    irq.fire(index, vector)
    irq.set_irqs(index, NONE_TRIGGER, vector, 1, [])
    irq.set_irqs(index, NONE_MASK, vector, 1, [])
    irq.set_irqs(index, NONE_UNMASK, vector, 1, [])
    irq.hold({index: -1})
    irq.hold({})
    (instead,) = assign(irq, index, vector)
    assert (heard.take(), instead.take(), pending(irq, index)) == (0, 0, [vector])
    irq.run()
    assert (heard.take(), instead.take(), pending(irq, index)) == (0, 1, [])


@pytest.mark.parametrize("stands", [True, False])
def test_an_end_of_interrupt_while_the_device_stands_still_is_answered_when_it_runs(
    irq: Interrupts, stands: bool
) -> None:
    (pin,) = assign(irq, INTX, 0)
    irq.assert_()
    assert pin.take() == 1
    irq.stop()
    irq.set_irqs(INTX, NONE_UNMASK, 0, 1, [])
    if not stands:
        irq.deassert()
    assert pin.take() == 0
    irq.run()
    assert pin.take() == stands


def test_a_new_eventfd_hears_of_an_intx_that_still_stands(irq: Interrupts) -> None:
    (old,) = assign(irq, INTX, 0)
    irq.assert_()
    (new,) = assign(irq, INTX, 0)
    assert (old.take(), new.take()) == (1, 1)


def test_a_client_that_sends_no_end_of_interrupt_hears_of_every_pulse_and_edge(irq: Interrupts) -> None:
    (pin,) = assign(irq, INTX, 0)
    irq.trigger()
    irq.trigger()
    assert pin.take() == 2
    irq.assert_()
    irq.assert_()
    assert pin.take() == 1
    irq.deassert()
    irq.assert_()
    assert pin.take() == 1


def test_the_owner_hears_of_the_level() -> None:
    levels: list[bool] = []
    irq = Interrupts(COUNTS, on_level=levels.append)
    irq.assert_()
    irq.deassert()
    irq.assert_()
    irq.reset()
    assert levels == [True, False, True, False]


def test_a_device_with_few_kinds_of_interrupts() -> None:
    pin_only = Interrupts((1, 0, 0, 0, 0))
    pin_only.trigger()
    assert pending(pin_only, INTX) == [0]
    assert pin_only.pba() == b""
    msi = Interrupts((0, 4, 0, 1, 1))
    msi.trigger(3)
    assert pending(msi, MSI) == [3]
    with pytest.raises(ValueError, match="no INTx"):
        msi.assert_()
    with pytest.raises(ValueError, match="vector 4: the device has 4"):
        msi.trigger(4)
    with pytest.raises(ValueError, match="MSIX vector 0: the device has 0"):
        msi.fire(MSIX)
    with pytest.raises(ValueError, match="vector 0: the device has 0"):
        Interrupts((0, 0, 0, 1, 1)).trigger()
    assert len(Interrupts((0, 0, 65, 0, 0)).pba()) == 16


@pytest.mark.parametrize(
    "counts",
    [(1, 0, 0, 1), (2, 0, 0, 1, 1), (-1, 0, 0, 1, 1), (0, 33, 0, 1, 1), (0, 0, 2049, 1, 1), (0, 0, 0, 2, 1)],
)
def test_counts_beyond_pci_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"counts: one each|are possible"):
        Interrupts(counts)


# Eventfds of a hostile, or just of another, kind of client.


@pytest.mark.timeout(5)
@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK, os.EFD_SEMAPHORE])
def test_a_full_eventfd_stops_nobody(irq: Interrupts, flags: int) -> None:
    full, (other,) = Listener(flags), assign(irq, MSIX, 1)
    os.eventfd_write(full.fd.fileno(), FULL)
    irq.set_irqs(MSIX, FD_TRIGGER, 0, 1, [full.send()])
    for _ in range(3):
        irq.trigger(0)
    irq.trigger(1)
    assert other.take() == 1
    assert pending(irq) == []
    assert full.take() == (1 if flags & os.EFD_SEMAPHORE else FULL)


@pytest.mark.timeout(5)
def test_room_for_one_more_is_used(irq: Interrupts) -> None:
    almost = Listener(0)
    os.eventfd_write(almost.fd.fileno(), FULL - 1)
    irq.set_irqs(MSIX, FD_TRIGGER, 0, 1, [almost.send()])
    irq.trigger(0)
    assert almost.take() == FULL


def test_a_blocking_eventfd_stays_one(irq: Interrupts) -> None:
    """O_NONBLOCK belongs to the open file: a client may rely on a read that waits."""
    listener = Listener(0)
    irq.set_irqs(MSIX, FD_TRIGGER, 0, 1, [listener.send()])
    irq.trigger(0)
    irq.trigger(0)
    assert os.get_blocking(listener.fd.fileno())
    assert listener.take() == 2


def test_what_is_no_eventfd_is_refused_and_changes_nothing(irq: Interrupts) -> None:
    (listener,) = assign(irq, MSIX, 0)
    reader, writer = map(OwnedFd, os.pipe())
    with reader, writer:
        good = listener.send()
        with pytest.raises(OSError, match="one eventfd each") as caught:
            irq.set_irqs(MSIX, FD_TRIGGER, 0, 2, [good, writer])
        assert caught.value.errno == errno.EINVAL
        assert not good.closed
        assert not writer.closed
        good.close()
    irq.trigger(0)
    assert listener.take() == 1
    listener.fd.close()  # the traceback that was caught would keep it open


@pytest.mark.parametrize(
    ("index", "flags", "start", "count"),
    [
        (5, NONE_TRIGGER, 0, 1),
        (-1, NONE_TRIGGER, 0, 1),
        (MSIX, NONE_TRIGGER, 3, 1),
        (MSIX, NONE_TRIGGER, 0, 4),
        (MSIX, NONE_MASK, 0xFFFFFFFF, 0xFFFFFFFF),
        (MSIX, NONE_MASK, -1, 1),
        (MSIX, NONE_MASK, 1, -1),
        (MSIX, 0x22, 0, 1),
        (MSIX, 0x39, 0, 1),
        (MSIX, 0x20, 0, 1),
        (MSIX, 0x01, 0, 1),
        (MSIX, 0x61, 0, 1),
    ],
)
def test_a_request_that_cannot_be_meant_is_einval(
    irq: Interrupts, index: int, flags: int, start: int, count: int
) -> None:
    before = irq.save()
    with pytest.raises(OSError, match=r"no .* vectors|flags") as caught:
        irq.set_irqs(index, flags, start, count, [])
    assert caught.value.errno == errno.EINVAL
    assert irq.save() == before


def test_the_fds_given_are_taken_and_all_closed_in_the_end(irq: Interrupts) -> None:
    listeners = [Listener() for _ in range(3)]
    sent = [listener.send() for listener in listeners]
    with_ours = open_fds()
    irq.set_irqs(MSIX, FD_TRIGGER, 0, 3, sent)
    assert all(fd.closed for fd in sent), "ownership went over"
    assert open_fds() == with_ours
    irq.set_irqs(MSIX, FD_TRIGGER, 1, 2, [listener.send() for listener in listeners[1:]])
    assert open_fds() == with_ours
    irq.set_irqs(MSIX, NONE_TRIGGER, 0, 0, [])
    assert open_fds() == with_ours - 3


# Mask and unmask by eventfd.


class Watcher:
    """An event loop that has one job."""

    def __init__(self) -> None:
        self.watched: dict[tuple[int, int, int], OwnedFd] = {}

    def __call__(self, fd: OwnedFd | None, index: int, vector: int, action: int) -> None:
        if fd is None:
            assert not self.watched.pop((index, vector, action)).closed, "closed while watched"
        else:
            assert (index, vector, action) not in self.watched, "the last one is still watched"
            self.watched[index, vector, action] = fd

    def poll(self, irq: Interrupts) -> None:
        for (index, vector, action), fd in list(self.watched.items()):
            try:
                os.eventfd_read(fd.fileno())
            except BlockingIOError:
                continue
            irq.set_irqs(index, action | interrupts.DATA_NONE, vector, 1, ())


def test_eventfds_mask_and_unmask_when_they_are_signalled() -> None:
    watcher = Watcher()
    irq = Interrupts(COUNTS, watcher)
    (listener,) = assign(irq, MSIX, 1)
    mask, unmask = Listener(), Listener()
    irq.set_irqs(MSIX, FD_MASK, 1, 1, [mask.send()])
    irq.set_irqs(MSIX, FD_UNMASK, 1, 1, [unmask.send()])
    os.eventfd_write(mask.fd.fileno(), 1)
    watcher.poll(irq)
    irq.trigger(1)
    assert (listener.take(), pending(irq)) == (0, [1])
    os.eventfd_write(unmask.fd.fileno(), 1)
    watcher.poll(irq)
    assert (listener.take(), pending(irq)) == (1, [])


@pytest.mark.parametrize(
    ("flags", "start", "count", "left"),
    [
        (FD_UNMASK, 0, 3, {(1, 8)}),
        (FD_MASK, 1, 1, {(0, 16), (1, 16)}),
        (FD_TRIGGER, 0, 1, {(1, 8), (1, 16)}),
        (NONE_TRIGGER, 0, 0, set()),
        (None, 0, 0, set()),
    ],
)
def test_watching_ends_with_the_binding(flags: int | None, start: int, count: int, left: set[tuple[int, int]]) -> None:
    watcher = Watcher()
    irq, before = Interrupts(COUNTS, watcher), open_fds()
    with Listener().fd as eventfd:
        for vector, action in [(0, FD_UNMASK), (1, FD_MASK), (1, FD_UNMASK), (1, FD_UNMASK)]:
            irq.set_irqs(MSIX, action, vector, 1, [OwnedFd.duplicate(eventfd.fileno())])
        if flags is None:
            irq.release_fds()
        else:
            irq.set_irqs(MSIX, flags, start, count, [])
        assert {(vector, action) for _, vector, action in watcher.watched} == left
        assert open_fds() == before + 1 + len(left)
    irq.release_fds()
    assert not watcher.watched
    assert open_fds() == before


def test_nobody_watches_is_said(irq: Interrupts) -> None:
    with Listener().send() as fd:
        with pytest.raises(OSError, match="nobody here watches") as caught:
            irq.set_irqs(INTX, FD_UNMASK, 0, 1, [fd])
        assert caught.value.errno == errno.ENOTSUP
        assert not fd.closed
    irq.set_irqs(INTX, FD_UNMASK, 0, 1, [])


# Saved state.

EMPTY: list[list[int]] = [[], [], [], [], []]


def test_the_saved_state_is_plain_data(irq: Interrupts) -> None:
    irq.assert_()
    irq.trigger(2)
    irq.trigger(0)
    assert irq.save() == {
        "asserted": True,
        "pending": [[], [], [0, 2], [], []],
    }


def test_a_level_that_was_loaded_waits_until_the_device_runs(irq: Interrupts) -> None:
    (pin,) = assign(irq, INTX, 0)
    irq.assert_()
    irq.stop()
    irq.load(irq.save(), {})
    assert (pin.take(), pending(irq, INTX)) == (1, [0])
    irq.run()
    assert (pin.take(), pending(irq, INTX)) == (1, [])


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        {"asserted": False},
        {"asserted": False, "pending": EMPTY, "more": 1},
        {"asserted": 1, "pending": EMPTY},
        {"asserted": False, "pending": EMPTY[1:]},
        {"asserted": False, "pending": {}},
        {"asserted": False, "pending": [[], [], None, [], []]},
        {"asserted": False, "pending": [[], [], [3], [], []]},
        {"asserted": False, "pending": [[], [], [-1], [], []]},
        {"asserted": False, "pending": [[], [], [1, 0], [], []]},
        {"asserted": False, "pending": [[], [], [1, 1], [], []]},
        {"asserted": False, "pending": [[], [], ["1"], [], []]},
        {"asserted": False, "pending": [[], [], [1.0], [], []]},
        {"asserted": False, "pending": [[True], [], [], [], []]},
        {"asserted": False, "pending": [[], [], [], [], [REQ]]},
    ],
)
def test_a_state_that_nobody_saved_is_refused_and_changes_nothing(irq: Interrupts, state: Any) -> None:
    irq.trigger(1)
    before = irq.save()
    with pytest.raises(ValueError, match="interrupt state"):
        irq.load(state, {})
    assert irq.save() == before


def test_a_level_is_not_loaded_into_a_device_without_intx() -> None:
    with pytest.raises(ValueError, match="without INTx"):
        Interrupts((0, 0, 1, 0, 0)).load({"asserted": True, "pending": EMPTY}, {})
