"""A device's own migration: states and arcs, saving, loading into the same device, what is refused.

Every case ends where it began: the device runs, with the state that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from vfio_user.errors import TransitionError
from vfio_user.migration.states import path
from vfio_user.tools.check.cases import BreachError, Case, Do, Session, Start
from vfio_user.tools.check.expect import EMPTY, Expectation, Findings, Refused, Served, echoes
from vfio_user.tools.check.facts import Facts, Need, needs_config, needs_migration, needs_pre_copy, needs_reset
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.mover import CHUNK, HEAD, Mover, state_request
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import (
    PAGE_SIZE,
    Command,
    DeviceFeature,
    DeviceState,
    FeatureFlags,
    IrqSetFlags,
    MigrationFlags,
    PciRegion,
)

STATES, ARCS = "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE", "Direct State Transitions"
READ, WRITE = "VFIO_USER_MIG_DATA_READ", "VFIO_USER_MIG_DATA_WRITE"
STOP, RUNNING, STOP_COPY = DeviceState.STOP, DeviceState.RUNNING, DeviceState.STOP_COPY
RESUMING, PRE_COPY = DeviceState.RESUMING, DeviceState.PRE_COPY

Procedure = Callable[[Mover], Findings]


def procedure(text: str, function: Procedure, *, damages: bool = False) -> Do:
    """``function`` with a running device, and the way back. ``damages``: a reset, and what it was is loaded again."""

    def run(session: Session) -> Findings:
        mover = Mover(session)
        yield from mover.settle()
        saved = mover.save() if damages else b""
        mover.set(RUNNING)
        breach = None
        try:
            yield from function(mover)
        except BreachError as error:
            breach = error
        if damages:
            mover.recover(saved)
        yield from mover.settle()
        if breach is not None:
            raise breach

    return Do(text, run)


def _case(
    name: str,
    section: str,
    text: str,
    function: Procedure,
    *,
    level: Level = Level.MUST,
    needs: tuple[Need, ...] = (),
    damages: bool = False,
) -> Case:
    step = procedure(text, function, damages=damages)
    needs = (needs_migration, *([needs_reset] if damages else []), *needs)
    return Case(f"migrate/{name}", section, (step,), level, Mode.MIGRATE, Start.FRESH, needs)


# States


def _offers(*states: DeviceState) -> Need:
    """The device has these states, by its flags."""
    flags = MigrationFlags(0)
    for state in states:
        flags |= _NEEDED.get(state, MigrationFlags(0))

    def missing(facts: Facts) -> str:
        return "" if facts.migration_flags & flags == flags else f"migration flags {facts.migration_flags:#x}"

    return missing


_P2P, _PRE = MigrationFlags.P2P, MigrationFlags.PRE_COPY
_NEEDED = {DeviceState.RUNNING_P2P: _P2P, PRE_COPY: _PRE, DeviceState.PRE_COPY_P2P: _P2P | _PRE}
_REAL = tuple(state for state in DeviceState if state != DeviceState.ERROR)


def _arc(source: DeviceState, target: DeviceState) -> Procedure:
    def walk(mover: Mover) -> Findings:
        saved = mover.save() if source == RESUMING else b""
        mover.set(source)
        if source == RESUMING and target != RESUMING:
            mover.write(saved)
        try:
            path(source, target, mover.session.facts.migration_flags)
        except TransitionError:
            yield from Refused().judge(mover.try_set(target), mover.session.facts)
            yield from _still_in(mover, source)
        else:
            yield from echoes(state_request(target)).judge(mover.try_set(target), mover.session.facts)
            yield from _still_in(mover, target)
        if target == RESUMING:
            mover.write(saved or b"")

    return walk


def _still_in(mover: Mover, state: DeviceState) -> Findings:
    now = mover.state()
    if now != state:
        yield Finding("state", f"the device is in state {now}, not {state.name}", value=now)


def _arc_cases() -> Iterator[Case]:
    for source in _REAL:
        for target in _REAL:
            name = f"arc/{source.name.lower()}-to-{target.name.lower()}"
            needs = (_offers(source, target),)
            text = f"{target.name} by way of the shortest path, or an error reply where there is none"
            # A device that came to RESUMING and is given nothing has nothing to go on with.
            damages = target == RESUMING
            yield _case(name, ARCS, text, _arc(source, target), needs=needs, damages=damages)


def _no_state(number: int, source: DeviceState) -> Procedure:
    def refuse(mover: Mover) -> Findings:
        mover.set(source)
        yield from Refused().judge(mover.try_set(number), mover.session.facts)
        yield from _still_in(mover, source)

    return refuse


def _lacks(state: DeviceState) -> Need:
    def missing(facts: Facts) -> str:
        return "" if _offers(state)(facts) else f"the device has {state.name}"

    return missing


def _no_state_cases() -> Iterator[Case]:
    text = "an error reply, and the state as it was"
    for number in (0, 8, 9, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF):
        yield _case(f"no-state/{number}", STATES, text, _no_state(number, RUNNING))
    for source in (STOP, STOP_COPY):
        yield _case(f"no-state/0-in-{source.name.lower()}", STATES, text, _no_state(0, source))
    for state in _NEEDED:
        needs = (_lacks(state),)
        yield _case(f"no-state/{state.name.lower()}", STATES, text, _no_state(state, RUNNING), needs=needs)


# Saving


def _reads(size: int, chunk: int) -> Procedure:
    """``size`` bytes of the stream are read ``chunk`` at a time, 0: all; with the rest they make one that loads."""

    def read(mover: Mover) -> Findings:
        mover.set(STOP_COPY)
        stream = b""
        while not size or len(stream) < size:
            piece = mover.read(chunk)
            stream += piece
            if len(piece) < chunk:
                break
        else:
            stream += mover.read_all()
        mover.load(stream)
        return iter(())

    return read


def _exact_reply(mover: Mover) -> Findings:
    """More than there is: the reply says how much came, and is as long as that."""
    mover.set(STOP_COPY)
    most = min(mover.session.facts.max_data, 1 << 20)
    for _ in range(1 << 12):
        request = m.MigData(m.MigData.LAYOUT.size + most, most).pack()
        answer = mover.session.ask(Command.MIG_DATA_READ, request)
        if not isinstance(answer, Received) or answer.is_error:
            yield from Served("data").judge(answer, mover.session.facts)
            return
        head = m.MigData.parse(answer.payload)
        if len(answer.payload) != m.MigData.LAYOUT.size + head.size:
            text = f"{len(answer.payload)} bytes of payload with {head.size} of data: padded"
            yield Finding("padded", text, Level.SHOULD, len(answer.payload))
        if head.argsz != m.MigData.LAYOUT.size + head.size:
            yield Finding("argsz", f"argsz is {head.argsz} with {head.size} bytes of data", Level.SHOULD, head.argsz)
        if head.size < most:
            return


def _past_the_end(mover: Mover) -> Findings:
    mover.save()
    for size in (1, 4096):
        more = mover.read(size)
        if more:
            yield Finding("more", f"{len(more)} bytes behind the end of the stream", value=len(more))


def _empty_read(mover: Mover) -> Findings:
    mover.set(STOP_COPY)
    if mover.read(0):
        yield Finding("data-size", "data for a read of 0 bytes")
    mover.load(mover.read_all())


def _again(mover: Mover) -> Findings:
    """A stream that was saved twice is one that loads."""
    mover.save()
    mover.set(STOP)
    mover.load(mover.save())
    return iter(())


def _deterministic(mover: Mover) -> Findings:
    first = mover.save()
    mover.set(STOP)
    second = mover.save()
    if first != second:
        text = f"a device that stands still saves {len(first)} bytes, then {len(second)} others"
        yield Finding("not-the-same", text)


def _honest_size(mover: Mover) -> Findings:
    mover.set(STOP_COPY)
    request = m.Feature(16, FeatureFlags.GET | DeviceFeature.MIG_DATA_SIZE).pack()
    answer = mover.session.ask(Command.DEVICE_FEATURE, request)
    if not isinstance(answer, Received) or answer.is_error:
        return  # the feature is optional
    told = int.from_bytes(answer.payload[HEAD : HEAD + 8], "little")
    real = len(mover.read_all())
    if not real // 2 <= told <= 4 * real + CHUNK:
        yield Finding("data-size", f"{told} bytes announced, {real} came", value=told)


def _pre_copy(mover: Mover) -> Findings:
    mover.set(PRE_COPY)
    stream = mover.read_all()
    mover.set(STOP_COPY)
    stream += mover.read_all()
    mover.load(stream)
    return iter(())


def _pre_copy_given_up(mover: Mover) -> Findings:
    mover.set(PRE_COPY)
    mover.read(4096)
    mover.set(RUNNING)
    mover.load(mover.save())
    return iter(())


def _refused(command: Command, payload: bytes, state: DeviceState) -> Procedure:
    def refuse(mover: Mover) -> Findings:
        mover.set(state)
        yield from mover.session.expect(Refused(), command, payload)

    return refuse


def _over_limit(mover: Mover) -> Findings:
    mover.set(STOP_COPY)
    size = mover.session.facts.max_data + 1
    yield from mover.session.expect(Refused(), Command.MIG_DATA_READ, m.MigData(size + 8, size).pack())


_SOME = m.MigData(8 + 64, 64).pack()


def _save_cases() -> Iterator[Case]:
    for chunk, size in ((1, 64), (7, 512), (4096, 0), (CHUNK, 0)):
        yield _case(f"save/in-pieces-{chunk}", READ, "a stream that loads", _reads(size, chunk))
    yield _case("save/exact-reply", READ, "replies as long as their data", _exact_reply)
    yield _case("save/past-the-end", READ, "no data", _past_the_end)
    yield _case("save/nothing", READ, "no data, and a stream that loads", _empty_read, level=Level.SHOULD)
    yield _case("save/twice", STATES, "a stream that loads", _again)
    yield _case("save/deterministic", READ, "the same bytes twice", _deterministic, level=Level.SHOULD)
    text = "between half of what follows, and four times that and 64 KiB"
    yield _case("save/data-size", "linux/vfio.h, MIG_DATA_SIZE", text, _honest_size, level=Level.SHOULD)
    needs = (needs_pre_copy,)
    yield _case("save/pre-copy", STATES, "both parts together load", _pre_copy, needs=needs)
    yield _case("save/pre-copy-given-up", ARCS, "a later stream loads", _pre_copy_given_up, needs=needs)
    error = "an error reply"
    for state in (STOP, RESUMING):
        refuse = _refused(Command.MIG_DATA_READ, _SOME, state)
        yield _case(f"save/in-{state.name.lower()}", READ, error, refuse, damages=state == RESUMING)
    small = m.MigData(8 + 63, 64).pack()
    refuse = _refused(Command.MIG_DATA_READ, small, STOP_COPY)
    yield _case("save/argsz-small", READ, error, refuse, level=Level.SHOULD)
    yield _case("save/over-max-data", READ, error, _over_limit, level=Level.SHOULD)


# Loading


def _loads(chunk: int) -> Procedure:
    def load(mover: Mover) -> Findings:
        saved = mover.save()
        mover.load(saved, chunk)
        now = mover.save()
        if now != saved:
            text = f"{len(saved)} bytes were loaded, {len(now)} others are saved then"
            yield Finding("not-the-same", text, Level.SHOULD)

    return load


def _config_survives(mover: Mover) -> Findings:
    before = _config(mover)
    mover.load(mover.save())
    after = _config(mover)
    changed = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    if changed:
        yield Finding("config", f"config space differs at {', '.join(f'{at:#x}' for at in changed[:8])}")


def _config(mover: Mover) -> bytes:
    size = len(mover.session.facts.config)
    answer = mover.session.ask(Command.REGION_READ, m.RegionAccess(0, PciRegion.CONFIG, size).pack())
    if not isinstance(answer, Received) or len(answer.payload) != 16 + size:
        raise BreachError(Finding("refused", "config space cannot be read"))
    return answer.payload[16:]


def _damaged(change: Callable[[bytes], bytes]) -> Procedure:
    """A stream that must not be loaded: refused as it comes, or on leaving RESUMING."""

    def load(mover: Mover) -> Findings:
        saved = mover.save()
        mover.set(RESUMING)
        with suppress(BreachError):
            mover.write(change(saved))
            if not mover.try_set(STOP).is_error:
                yield Finding("accepted", "the damaged stream was accepted")

    return load


def _flip(position: float) -> Callable[[bytes], bytes]:
    """One bit of the byte at this part of the stream."""

    def change(stream: bytes) -> bytes:
        at = min(int(position * len(stream)), len(stream) - 1)
        return stream[:at] + bytes([stream[at] ^ 0x40]) + stream[at + 1 :] if stream else b"\0"

    return change


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda stream: b"",
    "without-its-end": lambda stream: stream[:-1],
    "half": lambda stream: stream[: len(stream) // 2],
    "one-byte-more": lambda stream: stream + b"\0",
    "twice": lambda stream: stream * 2,
    "garbage": lambda stream: bytes(range(256)) * 16,
    "zeros": lambda stream: bytes(len(stream) or 64),
    "first-byte": _flip(0),
    "byte-in-the-middle": _flip(0.5),
    "last-byte": _flip(1),
}


def _reset_after(change: Callable[[bytes], bytes]) -> Procedure:
    def reset(mover: Mover) -> Findings:
        yield from _damaged(change)(mover)
        mover.reset()
        yield from _still_in(mover, RUNNING)

    return reset


def _load_cases() -> Iterator[Case]:
    for chunk in (1 << 20, 4096, 1000):
        yield _case(
            f"load/in-pieces-{chunk}", WRITE, "the device runs, and saves the same", _loads(chunk), damages=True
        )
    text = "config space as it was"
    yield _case("load/config", STATES, text, _config_survives, needs=(needs_config,), level=Level.SHOULD)
    error = "an error reply, to the data or to leaving RESUMING"
    for name, change in _DAMAGE.items():
        yield _case(f"load/damaged/{name}", ARCS, error, _damaged(change), level=Level.SHOULD, damages=True)
    text = "RUNNING after a reset"
    after = _reset_after(_DAMAGE["garbage"])
    yield _case("load/reset-after-damage", ARCS, text, after, needs=(needs_reset,), damages=True)
    some = _SOME + bytes(64)
    for state in (STOP, STOP_COPY):
        refuse = _refused(Command.MIG_DATA_WRITE, some, state)
        yield _case(f"load/in-{state.name.lower()}", WRITE, "an error reply", refuse)
    pre_copy = _refused(Command.MIG_DATA_WRITE, some, PRE_COPY)
    yield _case("load/in-pre_copy", WRITE, "an error reply", pre_copy, needs=(needs_pre_copy,))
    for name, payload in {
        "data-missing": some[:-1],
        "no-data": _SOME,
        "argsz-small": m.MigData(8 + 63, 64).pack() + bytes(64),
    }.items():
        refuse = _refused(Command.MIG_DATA_WRITE, payload, RESUMING)
        level = Level.SHOULD if name == "argsz-small" else Level.MUST
        yield _case(f"load/{name}", WRITE, "an error reply", refuse, level=level, damages=True)


# What works meanwhile


def _works(command: Command, payload: bytes, expectation: Expectation, state: DeviceState) -> Procedure:
    def ask(mover: Mover) -> Findings:
        mover.set(state)
        yield from mover.session.expect(expectation, command, payload)

    return ask


_MAP = m.DmaMap(32, 3, 0, 1 << 40, PAGE_SIZE).pack()
_DISABLE = m.IrqSet(20, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0, 0).pack()


def _has_intx(facts: Facts) -> str:
    return "" if facts.irq(0).count else "no INTx"


_MEANWHILE: dict[str, tuple[Command, bytes, Expectation, tuple[Need, ...]]] = {
    "get_info": (Command.DEVICE_GET_INFO, m.DeviceInfo(16).pack(), Served("success", 16), ()),
    "config": (
        Command.REGION_READ,
        m.RegionAccess(0, PciRegion.CONFIG, 4).pack(),
        Served("success", 20),
        (needs_config,),
    ),
    "dma_map": (Command.DMA_MAP, _MAP, EMPTY, ()),
    "set_irqs": (Command.DEVICE_SET_IRQS, _DISABLE, EMPTY, (_has_intx,)),
}


def _reset_to_running(state: DeviceState) -> Procedure:
    def reset(mover: Mover) -> Findings:
        mover.set(state)
        mover.reset()
        yield from _still_in(mover, RUNNING)

    return reset


def _survives_reconnect(state: DeviceState) -> Procedure:
    def leave(mover: Mover) -> Findings:
        mover.set(state)
        mover.session.reconnect()
        yield from _still_in(mover, state)

    return leave


def _state_cases() -> Iterator[Case]:
    for state in (STOP, STOP_COPY, RESUMING):
        name, resuming = state.name.lower(), state == RESUMING
        for what, (command, payload, expectation, needs) in _MEANWHILE.items():
            ask = _works(command, payload, expectation, state)
            yield _case(
                f"meanwhile/{name}/{what}",
                STATES,
                str(expectation),
                ask,
                level=Level.SHOULD,
                needs=needs,
                damages=resuming,
            )
    for state in (STOP, STOP_COPY, RESUMING, PRE_COPY):
        name, needs = state.name.lower(), (needs_reset, _offers(state))
        reset, leave = _reset_to_running(state), _survives_reconnect(state)
        section = "VFIO_USER_DEVICE_RESET"
        yield _case(f"reset/{name}", section, "RUNNING", reset, level=Level.SHOULD, needs=needs, damages=True)
        section, text = "Client Disconnection", "the state as it was"
        yield _case(f"reconnect/{name}", section, text, leave, needs=(_offers(state),), damages=True)


def cases() -> Iterator[Case]:
    yield from _arc_cases()
    yield from _no_state_cases()
    yield from _save_cases()
    yield from _load_cases()
    yield from _state_cases()
