"""The migration states of a device, the arcs between them, and the paths that follow from the arcs.

Source: ``enum vfio_device_mig_state`` in ``linux/vfio.h`` and the rules that its comment gives. A device does
single *arcs*, whatever a client asks for; a request that no arc answers is walked arc by arc along the path that
these rules select::

    1. the shortest path;
    2. a saving state (PRE_COPY, PRE_COPY_P2P, STOP_COPY) only begins or ends it: passing through one would open
       or end a saving session that nobody asked for;
    3. from one saving state to another the path stays among the saving states: it is one session. That is why
       STOP_COPY, which can only be left by ending the session, never leads to PRE_COPY or PRE_COPY_P2P;
    4. no path leads into or out of ERROR: only failing leads there, only a reset out of it.

Only the arcs are written down (:data:`ARCS`); everything else in this module is derived from them, and remembered: a
guest stands still while its device changes its state, and the operators of flags are slow.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from vfio_user.errors import TransitionError, UnrecoverableError
from vfio_user.wire.constants import DeviceState, MigrationFlags


class Arc(NamedTuple):
    """One step that a device does by itself.

    The arc exists where the device has all flags of ``needs`` and none of ``unless``.
    """

    source: DeviceState
    target: DeviceState
    needs: MigrationFlags
    unless: MigrationFlags = MigrationFlags(0)

    def exists(self, flags: MigrationFlags) -> bool:
        """Whether a device with these ``flags`` does this arc."""
        return flags & self.needs == self.needs and not flags & self.unless


_BASE = MigrationFlags.STOP_COPY
_P2P = _BASE | MigrationFlags.P2P
_PRE_COPY = _BASE | MigrationFlags.PRE_COPY
_ALL = _P2P | _PRE_COPY

ARCS = (
    Arc(DeviceState.STOP, DeviceState.STOP_COPY, _BASE),
    Arc(DeviceState.STOP_COPY, DeviceState.STOP, _BASE),
    Arc(DeviceState.STOP, DeviceState.RESUMING, _BASE),
    Arc(DeviceState.RESUMING, DeviceState.STOP, _BASE),
    Arc(DeviceState.RUNNING, DeviceState.STOP, _BASE, unless=MigrationFlags.P2P),
    Arc(DeviceState.STOP, DeviceState.RUNNING, _BASE, unless=MigrationFlags.P2P),
    Arc(DeviceState.RUNNING, DeviceState.RUNNING_P2P, _P2P),
    Arc(DeviceState.RUNNING_P2P, DeviceState.RUNNING, _P2P),
    Arc(DeviceState.RUNNING_P2P, DeviceState.STOP, _P2P),
    Arc(DeviceState.STOP, DeviceState.RUNNING_P2P, _P2P),
    Arc(DeviceState.RUNNING, DeviceState.PRE_COPY, _PRE_COPY),
    Arc(DeviceState.PRE_COPY, DeviceState.RUNNING, _PRE_COPY),
    Arc(DeviceState.PRE_COPY, DeviceState.STOP_COPY, _PRE_COPY, unless=MigrationFlags.P2P),
    Arc(DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P, _ALL),
    Arc(DeviceState.PRE_COPY_P2P, DeviceState.PRE_COPY, _ALL),
    Arc(DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P, _ALL),
    Arc(DeviceState.PRE_COPY_P2P, DeviceState.RUNNING_P2P, _ALL),
    Arc(DeviceState.PRE_COPY_P2P, DeviceState.STOP_COPY, _ALL),
)
"""Every arc of the kernel's state machine, with the flags that bring it."""

SAVING_STATES = frozenset({DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P, DeviceState.STOP_COPY})
"""The states of one saving session: the device hands out its data stream."""

RUNNING_STATES = frozenset(
    {DeviceState.RUNNING, DeviceState.RUNNING_P2P, DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P}
)
"""The states in which the device works for the guest; in the P2P ones it does no DMA to other devices."""


@lru_cache
def arcs(flags: MigrationFlags) -> frozenset[tuple[DeviceState, DeviceState]]:
    """The arcs, as (from, to), of a device with these ``flags``. There are none without STOP_COPY."""
    return frozenset((arc.source, arc.target) for arc in ARCS if arc.exists(flags))


@lru_cache
def states(flags: MigrationFlags) -> frozenset[DeviceState]:
    """The states that a device with these ``flags`` can be in: RUNNING, ERROR and wherever an arc ends."""
    ends = (state for arc in arcs(flags) for state in arc)
    return frozenset({DeviceState.RUNNING, DeviceState.ERROR, *ends})


@lru_cache
def path(current: int, target: int, flags: MigrationFlags) -> tuple[DeviceState, ...]:
    """The states to pass on the way from ``current`` to ``target``, which is the last of them.

    Empty if the device is already there. Raises :class:`TransitionError` (EINVAL) where the rules above leave no
    path, for ERROR at either end, and for states that these ``flags`` do not offer or that do not exist.
    """
    start, goal = _offered(current, flags), _offered(target, flags)
    session = start in SAVING_STATES and goal in SAVING_STATES
    came_from = {start: start}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        if here == goal:
            return _unwind(came_from, goal)
        for arc in ARCS:
            beyond = arc.target
            passable = beyond == goal or (beyond in SAVING_STATES) == session
            if arc.source == here and arc.exists(flags) and passable and beyond not in came_from:
                came_from[beyond] = here
                queue.append(beyond)
    raise TransitionError(f"no path leads from {start.name} to {goal.name}")


def _offered(number: int, flags: MigrationFlags) -> DeviceState:
    """The state with this number, if a path may begin or end there."""
    try:
        state = DeviceState(number)
    except ValueError:
        raise TransitionError(f"device state {number} does not exist") from None
    if state == DeviceState.ERROR:
        raise TransitionError("no path leads into or out of ERROR; a reset leaves it")
    if state not in states(flags):
        raise TransitionError(f"the device has no state {state.name} (its migration flags are {int(flags):#x})")
    return state


def _unwind(came_from: dict[DeviceState, DeviceState], goal: DeviceState) -> tuple[DeviceState, ...]:
    hops: list[DeviceState] = []
    here = goal
    while came_from[here] != here:
        hops.append(here)
        here = came_from[here]
    return tuple(reversed(hops))


class StateMachine:
    """The migration state of one device, which begins in RUNNING.

    ``step(from, to)`` does the work of one arc. It is called before the state changes, and how it ends decides
    what the state becomes:

    ============================  ====================  =================================================
    the step                      state                 :meth:`set` raises TransitionError with
    ============================  ====================  =================================================
    returns                       ``to``                (goes on along the path)
    raises UnrecoverableError     ERROR                 the step's errno
    raises another OSError        stays ``from``        the step's errno (EIO if it has none)
    raises any other exception    ERROR: a bug of the   EIO
                                  device, of which no
                                  state is known
    ============================  ====================  =================================================

    So a step that refuses must leave the device as it found it. Refusing a damaged stream is such a case: the
    device has loaded nothing of it and stays in RESUMING, from where the client resets it or sends the rest.
    """

    def __init__(self, flags: MigrationFlags, step: Callable[[DeviceState, DeviceState], None]) -> None:
        self.flags = flags
        self._step = step
        self._state = DeviceState.RUNNING

    @property
    def state(self) -> DeviceState:
        """The state that the device is in."""
        return self._state

    @property
    def saving(self) -> bool:
        """Whether the device hands out its data stream: PRE_COPY, PRE_COPY_P2P or STOP_COPY."""
        return self._state in SAVING_STATES

    @property
    def resuming(self) -> bool:
        """Whether the device takes in a data stream."""
        return self._state == DeviceState.RESUMING

    @property
    def running(self) -> bool:
        """Whether the device works for the guest, see :data:`RUNNING_STATES`."""
        return self._state in RUNNING_STATES

    def set(self, target: int) -> None:
        """Walk the path to ``target``, arc by arc; nothing happens if the device is already there.

        Raises :class:`TransitionError`: with EINVAL, before the first step, where no path leads there; or as the
        table above says, with the step's exception as its cause, where a step fails. The arcs before the failed
        one stay done.
        """
        for hop in path(self._state, target, self.flags):
            self._walk(hop)

    def reset(self) -> None:
        """Back to RUNNING from every state, ERROR included, without a step (DEVICE_RESET)."""
        self._state = DeviceState.RUNNING

    def _walk(self, target: DeviceState) -> None:
        arc = f"{self._state.name} -> {target.name}"
        try:
            self._step(self._state, target)
        except OSError as error:
            if isinstance(error, UnrecoverableError):
                self._state = DeviceState.ERROR
            reason = error.strerror or error
            raise TransitionError(f"{arc}: {reason}", error.errno or errno.EIO) from error
        except Exception as error:
            self._state = DeviceState.ERROR
            raise TransitionError(f"{arc}: {error!r}", errno.EIO) from error
        self._state = target
