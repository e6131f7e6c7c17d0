"""The migration state machine against the kernel's documented table, and against models of its rules."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.errors import MigrationError, StreamError, TransitionError, UnrecoverableError
from vfio_user.migration import StateMachine
from vfio_user.migration.states import ARCS, RUNNING_STATES, SAVING_STATES, arcs, path, states
from vfio_user.wire.constants import DeviceState, MigrationFlags

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = DeviceState
BASE = MigrationFlags.STOP_COPY
P2P = BASE | MigrationFlags.P2P
PRE = BASE | MigrationFlags.PRE_COPY
FULL = P2P | PRE
FLAG_SETS = (BASE, P2P, PRE, FULL)
ALL_FLAGS = [MigrationFlags(bits) for bits in range(8)]

# The kernel's documented result for a device with every optional feature: the next hop, by [from][to].
# Columns: STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P; ERROR stands for a refusal.
COLUMNS = (STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P)
KERNEL = {
    STOP: (STOP, RUNNING_P2P, STOP_COPY, RESUMING, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P),
    RUNNING: (RUNNING_P2P, RUNNING, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P, PRE_COPY, RUNNING_P2P),
    STOP_COPY: (STOP, STOP, STOP_COPY, STOP, STOP, ERROR, ERROR),
    RESUMING: (STOP, STOP, STOP, RESUMING, STOP, STOP, STOP),
    RUNNING_P2P: (STOP, RUNNING, STOP, STOP, RUNNING_P2P, RUNNING, PRE_COPY_P2P),
    PRE_COPY: (RUNNING, RUNNING, PRE_COPY_P2P, RUNNING, RUNNING, PRE_COPY, PRE_COPY_P2P),
    PRE_COPY_P2P: (RUNNING_P2P, RUNNING_P2P, STOP_COPY, RUNNING_P2P, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P),
}
# The flags without which a state is stepped over.
KERNEL_NEEDS = {
    STOP: BASE,
    RUNNING: BASE,
    STOP_COPY: BASE,
    RESUMING: BASE,
    RUNNING_P2P: P2P,
    PRE_COPY: PRE,
    PRE_COPY_P2P: FULL,
}

# libvfio-user's table, protocol.md 8.2 (flags STOP_COPY | PRE_COPY); None is EINVAL.
SMALL_COLUMNS = (STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY)
SMALL = {
    STOP: (STOP, RUNNING, STOP_COPY, RESUMING, RUNNING),
    RUNNING: (STOP, RUNNING, STOP, STOP, PRE_COPY),
    STOP_COPY: (STOP, STOP, STOP_COPY, STOP, None),
    RESUMING: (STOP, STOP, STOP, RESUMING, STOP),
    PRE_COPY: (RUNNING, RUNNING, STOP_COPY, RUNNING, PRE_COPY),
}

# The combinations that the kernel documents for a device with every optional feature.
KERNEL_COMBINATIONS = """\
    PRE_COPY PRE_COPY_P2P STOP_COPY
    PRE_COPY RUNNING RUNNING_P2P
    PRE_COPY RUNNING RUNNING_P2P STOP
    PRE_COPY RUNNING RUNNING_P2P STOP RESUMING
    PRE_COPY_P2P RUNNING_P2P RUNNING
    PRE_COPY_P2P RUNNING_P2P STOP
    PRE_COPY_P2P RUNNING_P2P STOP RESUMING
    RESUMING STOP RUNNING_P2P
    RESUMING STOP RUNNING_P2P PRE_COPY_P2P
    RESUMING STOP RUNNING_P2P RUNNING
    RESUMING STOP RUNNING_P2P RUNNING PRE_COPY
    RESUMING STOP STOP_COPY
    RUNNING RUNNING_P2P PRE_COPY_P2P
    RUNNING RUNNING_P2P STOP
    RUNNING RUNNING_P2P STOP RESUMING
    RUNNING RUNNING_P2P STOP STOP_COPY
    RUNNING_P2P RUNNING PRE_COPY
    RUNNING_P2P STOP RESUMING
    RUNNING_P2P STOP STOP_COPY
    STOP RUNNING_P2P PRE_COPY_P2P
    STOP RUNNING_P2P RUNNING
    STOP RUNNING_P2P RUNNING PRE_COPY
    STOP_COPY STOP RESUMING
    STOP_COPY STOP RUNNING_P2P
    STOP_COPY STOP RUNNING_P2P RUNNING"""


Path = tuple[DeviceState, ...]


def walk(next_hop: Callable[[DeviceState], DeviceState | None], start: DeviceState, goal: DeviceState) -> Path | None:
    """Follow a next-hop function to its end; None where it refuses."""
    hops: list[DeviceState] = []
    here = start
    while here != goal:
        hop = next_hop(here)
        if hop is None:
            return None
        hops.append(hop)
        here = hop
        assert len(hops) < len(DeviceState), "the table turns in circles"
    return tuple(hops)


def kernel_path(start: DeviceState, goal: DeviceState, flags: MigrationFlags) -> Path | None:
    """Hop by hop as the kernel does: look it up, and look on from there while the device lacks the state found."""

    def next_hop(here: DeviceState) -> DeviceState | None:
        hop = KERNEL[here][COLUMNS.index(goal)]
        while hop != ERROR and flags & KERNEL_NEEDS[hop] != KERNEL_NEEDS[hop]:
            hop = KERNEL[hop][COLUMNS.index(goal)]
        return None if hop == ERROR else hop

    return walk(next_hop, start, goal)


def path_or_none(start: DeviceState, goal: DeviceState, flags: MigrationFlags) -> Path | None:
    try:
        return path(start, goal, flags)
    except TransitionError:
        return None


def usable(flags: MigrationFlags) -> list[DeviceState]:
    return sorted(states(flags) - {ERROR})


PAIRS = [(flags, start, goal) for flags in FLAG_SETS for start in usable(flags) for goal in usable(flags)]


def nothing(source: DeviceState, target: DeviceState) -> None:
    """A step that works."""


# ---------------------------------------------------------------- arcs and states


def test_arcs_of_the_smallest_device() -> None:
    assert arcs(BASE) == {
        (RUNNING, STOP),
        (STOP, RUNNING),
        (STOP, STOP_COPY),
        (STOP_COPY, STOP),
        (STOP, RESUMING),
        (RESUMING, STOP),
    }


def test_p2p_takes_the_place_of_the_direct_arcs() -> None:
    gone, new = arcs(BASE) - arcs(P2P), arcs(P2P) - arcs(BASE)
    assert gone == {(RUNNING, STOP), (STOP, RUNNING)}
    assert new == {(RUNNING, RUNNING_P2P), (RUNNING_P2P, RUNNING), (RUNNING_P2P, STOP), (STOP, RUNNING_P2P)}


def test_pre_copy_adds_its_arcs() -> None:
    assert arcs(PRE) - arcs(BASE) == {(RUNNING, PRE_COPY), (PRE_COPY, RUNNING), (PRE_COPY, STOP_COPY)}
    assert arcs(BASE) <= arcs(PRE)


def test_arcs_of_a_device_with_everything() -> None:
    assert arcs(FULL) - arcs(P2P) == {
        (RUNNING, PRE_COPY),
        (PRE_COPY, RUNNING),
        (PRE_COPY, PRE_COPY_P2P),
        (PRE_COPY_P2P, PRE_COPY),
        (RUNNING_P2P, PRE_COPY_P2P),
        (PRE_COPY_P2P, RUNNING_P2P),
        (PRE_COPY_P2P, STOP_COPY),
    }
    assert arcs(P2P) <= arcs(FULL)


def test_no_arc_is_listed_twice_or_touches_error() -> None:
    ends = [(arc.source, arc.target) for arc in ARCS]
    assert len(ends) == len(set(ends))
    assert all(ERROR not in pair and pair[0] != pair[1] for pair in ends)


def test_states_come_with_the_flags() -> None:
    small = {ERROR, STOP, RUNNING, STOP_COPY, RESUMING}
    assert states(BASE) == small
    assert states(P2P) == small | {RUNNING_P2P}
    assert states(PRE) == small | {PRE_COPY}
    assert states(FULL) == set(DeviceState)


@pytest.mark.parametrize("flags", [f for f in ALL_FLAGS if not f & BASE])
def test_without_stop_copy_there_is_nowhere_to_go(flags: MigrationFlags) -> None:
    assert arcs(flags) == frozenset()
    assert states(flags) == {RUNNING, ERROR}
    assert path(RUNNING, RUNNING, flags) == ()
    for target in set(DeviceState) - {RUNNING}:
        with pytest.raises(TransitionError):
            path(RUNNING, target, flags)


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(("flags", "start", "goal"), PAIRS)
def test_paths_are_the_kernels(flags: MigrationFlags, start: DeviceState, goal: DeviceState) -> None:
    assert path_or_none(start, goal, flags) == kernel_path(start, goal, flags)


@pytest.mark.parametrize(("start", "goal"), list(itertools.product(SMALL_COLUMNS, repeat=2)))
def test_paths_are_libvfio_users(start: DeviceState, goal: DeviceState) -> None:
    expected = walk(lambda here: SMALL[here][SMALL_COLUMNS.index(goal)], start, goal)
    assert path_or_none(start, goal, PRE) == expected


def test_every_documented_combination() -> None:
    documented = {tuple(DeviceState[name] for name in line.split()) for line in KERNEL_COMBINATIONS.splitlines()}
    every = ((start, *(path_or_none(start, goal, FULL) or ())) for start, goal in itertools.permutations(COLUMNS, 2))
    assert {stations for stations in every if len(stations) > 2} == documented
    assert len(documented) == 25


def admissible(flags: MigrationFlags, start: DeviceState, goal: DeviceState) -> list[Path]:
    """Every simple path along the arcs that the rules allow, by brute force, shortest first."""
    found = []
    inner = set(usable(flags)) - {start, goal}
    both_saving = {start, goal} <= SAVING_STATES
    for length in range(len(inner) + 1):
        for middle in itertools.permutations(inner, length):
            stations = (start, *middle, goal)
            if all((state in SAVING_STATES) == both_saving for state in middle) and all(
                pair in arcs(flags) for pair in itertools.pairwise(stations)
            ):
                found.append(stations[1:])
    return found


@pytest.mark.parametrize(("flags", "start", "goal"), [p for p in PAIRS if p[1] != p[2]])
def test_a_path_is_the_only_shortest_one(flags: MigrationFlags, start: DeviceState, goal: DeviceState) -> None:
    candidates = admissible(flags, start, goal)
    shortest = [c for c in candidates if len(c) == len(candidates[0])]
    assert len(shortest) <= 1, "the rules do not decide"
    assert path_or_none(start, goal, flags) == (shortest[0] if shortest else None)


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_only_stop_copy_to_pre_copy_is_refused(flags: MigrationFlags) -> None:
    every = set(itertools.product(usable(flags), repeat=2))
    refused = {(start, goal) for start, goal in every if path_or_none(start, goal, flags) is None}
    assert refused == every & {(STOP_COPY, PRE_COPY), (STOP_COPY, PRE_COPY_P2P)}


@pytest.mark.parametrize("flags", ALL_FLAGS)
@pytest.mark.parametrize("other", list(DeviceState))
def test_nothing_leads_into_or_out_of_error(flags: MigrationFlags, other: DeviceState) -> None:
    for start, goal in ((ERROR, other), (other, ERROR)):
        with pytest.raises(TransitionError) as caught:
            path(start, goal, flags)
        assert caught.value.errno == errno.EINVAL


@given(
    number=st.integers().filter(lambda n: n not in set(DeviceState)),
    other=st.sampled_from(DeviceState),
    flags=st.sampled_from(ALL_FLAGS),
)
def test_numbers_that_are_no_state_are_refused(number: int, other: DeviceState, flags: MigrationFlags) -> None:
    for start, goal in ((number, RUNNING), (RUNNING, number), (number, other), (number, number)):
        with pytest.raises(TransitionError) as caught:
            path(start, goal, flags)
        assert caught.value.errno == errno.EINVAL


def test_unknown_number_is_named() -> None:
    with pytest.raises(TransitionError, match="device state 8 does not exist"):
        path(RUNNING, 8, FULL)


@pytest.mark.parametrize("flags", ALL_FLAGS)
def test_states_that_the_flags_do_not_offer_are_refused(flags: MigrationFlags) -> None:
    for missing in set(DeviceState) - states(flags):
        for start, goal in ((RUNNING, missing), (missing, RUNNING), (missing, missing)):
            with pytest.raises(TransitionError, match=missing.name) as caught:
                path(start, goal, flags)
            assert caught.value.errno == errno.EINVAL


# ---------------------------------------------------------------- the state machine


def test_a_machine_begins_running() -> None:
    machine = StateMachine(FULL, nothing)
    assert machine.state == RUNNING
    assert (machine.running, machine.saving, machine.resuming) == (True, False, False)


@pytest.mark.parametrize("state", sorted(set(DeviceState) - {ERROR}))
def test_properties_tell_the_state(state: DeviceState) -> None:
    machine = StateMachine(FULL, nothing)
    machine.set(state)
    assert machine.state == state
    assert machine.running == (state in {RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P})
    assert machine.saving == (state in {STOP_COPY, PRE_COPY, PRE_COPY_P2P})
    assert machine.resuming == (state == RESUMING)


def test_a_step_sees_the_state_before_it_changes() -> None:
    seen = []
    machine = StateMachine(BASE, lambda source, target: seen.append((source, target, machine.state)))
    machine.set(STOP_COPY)
    assert seen == [(RUNNING, STOP, RUNNING), (STOP, STOP_COPY, STOP)]


def test_already_there_takes_no_step() -> None:
    def step(source: DeviceState, target: DeviceState) -> None:
        pytest.fail("a step was taken")

    machine = StateMachine(BASE, step)
    machine.set(RUNNING)
    assert machine.state == RUNNING


def test_a_refused_request_takes_no_step() -> None:
    steps: list[DeviceState] = []
    machine = StateMachine(PRE, lambda source, target: steps.append(target))
    machine.set(STOP_COPY)
    steps.clear()
    for target in (PRE_COPY, ERROR, RUNNING_P2P, 8, -1, 1 << 32):
        with pytest.raises(TransitionError):
            machine.set(target)
    assert (machine.state, steps) == (STOP_COPY, [])


@pytest.mark.parametrize(
    ("failure", "state", "number"),
    [
        (OSError(errno.EBUSY, "the queue is not empty"), STOP, errno.EBUSY),
        (StreamError("a bad stream"), STOP, errno.EINVAL),
        (TimeoutError("too slow"), STOP, errno.EIO),
        (OSError(), STOP, errno.EIO),
        (UnrecoverableError("half done"), ERROR, errno.EIO),
        (UnrecoverableError("half done", errno.ENODEV), ERROR, errno.ENODEV),
        (KeyError("oops"), ERROR, errno.EIO),
    ],
)
def test_a_failing_step(failure: Exception, state: DeviceState, number: int) -> None:
    def step(source: DeviceState, target: DeviceState) -> None:
        if target == STOP_COPY:
            raise failure

    machine = StateMachine(BASE, step)
    with pytest.raises(TransitionError, match="STOP -> STOP_COPY: ") as caught:
        machine.set(STOP_COPY)
    assert machine.state == state
    assert caught.value.errno == number
    assert caught.value.__cause__ is failure


def test_the_reason_is_told_once() -> None:
    def step(source: DeviceState, target: DeviceState) -> None:
        raise OSError(errno.EBUSY, "the queue is not empty")

    with pytest.raises(TransitionError) as caught:
        StateMachine(BASE, step).set(STOP)
    assert caught.value.strerror == "RUNNING -> STOP: the queue is not empty"


def test_an_unrecoverable_failure_is_one_of_ours() -> None:
    assert issubclass(UnrecoverableError, MigrationError)


def test_error_is_left_by_reset_alone() -> None:
    def step(source: DeviceState, target: DeviceState) -> None:
        if target == STOP:
            raise UnrecoverableError("broken")

    machine = StateMachine(PRE, step)
    with pytest.raises(TransitionError):
        machine.set(STOP)
    assert (machine.running, machine.saving, machine.resuming) == (False, False, False)
    for target in DeviceState:
        with pytest.raises(TransitionError):
            machine.set(target)
        assert machine.state == ERROR
    machine.reset()
    assert machine.state == RUNNING
    machine.set(PRE_COPY)
    assert machine.state == PRE_COPY


@pytest.mark.parametrize("state", sorted(set(DeviceState) - {ERROR}))
def test_reset_leads_to_running_without_a_step(state: DeviceState) -> None:
    steps: list[DeviceState] = []
    machine = StateMachine(FULL, lambda source, target: steps.append(target))
    machine.set(state)
    steps.clear()
    machine.reset()
    assert (machine.state, steps) == (RUNNING, [])


FAILURES: list[tuple[Exception | None, bool]] = [
    (None, False),
    (OSError(errno.EAGAIN, "not now"), False),
    (UnrecoverableError("broken"), True),
    (ZeroDivisionError(), True),
]
"""What a step may do, and whether that breaks the device."""


@given(
    flags=st.sampled_from(FLAG_SETS),
    orders=st.lists(
        st.tuples(st.sampled_from(DeviceState), st.integers(0, 4), st.sampled_from(FAILURES), st.booleans()),
        max_size=20,
    ),
)
def test_any_life_follows_the_model(
    flags: MigrationFlags, orders: list[tuple[DeviceState, int, tuple[Exception | None, bool], bool]]
) -> None:
    """Requests with a failure at some hop, and resets: state and steps are those that the kernel's table gives."""
    steps: list[tuple[DeviceState, DeviceState]] = []
    failing: tuple[int, Exception | None] = (0, None)

    def step(source: DeviceState, target: DeviceState) -> None:
        at, failure = failing
        steps.append((source, target))
        if failure is not None and len(steps) == at + 1:
            raise failure

    machine = StateMachine(flags, step)
    model = RUNNING
    for target, at, (failure, breaks), reset in orders:
        steps.clear()
        failing = (at, failure)
        known = {model, target} <= states(flags) - {ERROR}
        hops = kernel_path(model, target, flags) if known else None
        stations = (model, *(hops or ()))
        fails = failure is not None and at < len(stations) - 1
        done = stations[: at + 2] if fails else stations
        try:
            machine.set(target)
        except TransitionError:
            assert fails or hops is None
        else:
            assert not fails
            assert hops is not None
        assert steps == list(itertools.pairwise(done))
        model = (ERROR if breaks else done[-2]) if fails else done[-1]
        assert machine.state == model
        assert machine.running == (model in RUNNING_STATES)
        if reset:
            machine.reset()
            model = RUNNING
