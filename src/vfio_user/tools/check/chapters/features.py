"""DEVICE_FEATURE, and the migration commands as far as they leave the device alone."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from vfio_user.tools.check.cases import Ask, Case, Do, Session
from vfio_user.tools.check.expect import Findings, Refused, Served, echoes
from vfio_user.tools.check.facts import Facts, Need, needs_logging, needs_migration
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command, DeviceFeature, DeviceState, FeatureFlags, MigrationFlags

SECTION = "VFIO_USER_DEVICE_FEATURE"
GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
_HEAD = m.Feature.LAYOUT.size
_U32 = 0xFFFFFFFF
_NOT_SUPPORTED = Refused((errno.EINVAL, errno.ENOTTY))


@dataclass(frozen=True, slots=True)
class Row:
    """A feature: its operations, and where it has to be there."""

    operations: int
    needs: Need
    optional: bool = False


FEATURES = {
    DeviceFeature.MIGRATION: Row(GET, needs_migration),
    DeviceFeature.MIG_DEVICE_STATE: Row(GET | SET, needs_migration),
    DeviceFeature.DMA_LOGGING_START: Row(SET, needs_logging),
    DeviceFeature.DMA_LOGGING_STOP: Row(SET, needs_logging),
    DeviceFeature.DMA_LOGGING_REPORT: Row(GET, needs_logging),
    DeviceFeature.MIG_DATA_SIZE: Row(GET, needs_migration, optional=True),
}
_UNKNOWN = (0, 3, 4, 5, 10, 255, 0xFFFF)
"""Features of the kernel's that are none of the protocol's, and numbers that mean nothing."""
_PROBES = {"probe": 0, "probe-get": GET, "probe-set": SET, "probe-both": GET | SET}


def feature(flags: int, data: bytes = b"", argsz: int | None = None) -> bytes:
    """The payload; ``argsz`` None: room for this request again."""
    return m.Feature(_HEAD + len(data) if argsz is None else argsz, flags).pack() + data


def _probes(index: DeviceFeature, row: Row) -> Iterator[Case]:
    for name, operations in _PROBES.items():
        payload = feature(PROBE | operations | index)
        has = not operations & ~row.operations
        # One that is not in the specification's table may be absent.
        expect = Served("success or an error reply") if has and row.optional else echoes(payload)
        step = Ask(Command.DEVICE_FEATURE, payload, expect if has else _NOT_SUPPORTED)
        level = Level.SHOULD if row.optional else Level.MUST
        yield Case(f"feature/{index.name.lower()}/{name}", SECTION, (step,), level, needs=(row.needs,))


def _not_offered(index: DeviceFeature, row: Row) -> Iterator[Case]:
    """What a device without it has to say."""

    def absent(facts: Facts) -> str:
        return "" if row.needs(facts) else "the device has it"

    step = Ask(Command.DEVICE_FEATURE, feature(PROBE | index), _NOT_SUPPORTED)
    yield Case(f"feature/{index.name.lower()}/absent", SECTION, (step,), needs=(absent,))


def _bad_operations(index: DeviceFeature, row: Row) -> Iterator[Case]:
    """Operations that are none, or that the feature lacks; with data that say nothing."""
    room = bytes(32)
    for name, operation in {
        "no-operation": 0,
        "get-and-set": GET | SET,
        "bit-19": GET | 1 << 19,
        "bit-31": GET | 1 << 31,
        **{word: one for word, one in (("get", GET), ("set", SET)) if not row.operations & one},
    }.items():
        step = Ask(Command.DEVICE_FEATURE, feature(operation | index, room, 4096), _NOT_SUPPORTED)
        yield Case(f"feature/{index.name.lower()}/{name}", SECTION, (step,), needs=(row.needs,))


def _unknown(index: int) -> Iterator[Case]:
    operations = {**{name: PROBE | one for name, one in _PROBES.items()}, "get": int(GET), "set": int(SET)}
    for name, operation in operations.items():
        payload = feature(operation | index, argsz=4096)
        step = Ask(Command.DEVICE_FEATURE, payload, _NOT_SUPPORTED)
        yield Case(f"feature/unknown-{index}/{name}", SECTION, (step,))


# What is got


def _migration_flags(reply: Received, facts: Facts) -> Findings:
    flags = m.FeatureMigration.parse(reply.payload, _HEAD).flags
    if not flags & MigrationFlags.STOP_COPY:
        yield Finding("stop-copy", f"flags {flags:#x} without VFIO_MIGRATION_STOP_COPY", value=flags)
    if flags & ~sum(MigrationFlags):
        yield Finding("unknown-flags", f"flags {flags:#x} have bits that mean nothing", Level.SHOULD, flags)


def _state(reply: Received, facts: Facts) -> Findings:
    state = m.FeatureDeviceState.parse(reply.payload, _HEAD).device_state
    if state not in set(DeviceState):
        yield Finding("state", f"{state} is no device state", value=state)


def _get(index: DeviceFeature, size: int) -> Served:
    """The reply to GET: argsz and flags again, and ``size`` bytes of data, looked at."""
    looks = {DeviceFeature.MIGRATION: _migration_flags, DeviceFeature.MIG_DEVICE_STATE: _state}

    def look(reply: Received, facts: Facts) -> Findings:
        head = m.Feature.parse(reply.payload)
        if head.argsz != _HEAD + size:
            yield Finding("argsz", f"argsz is {head.argsz}, not {_HEAD + size}", Level.SHOULD, head.argsz)
        if head.flags != GET | index:
            yield Finding("flags", f"flags are {head.flags:#x}, not {GET | index:#x}", value=head.flags)
        if index in looks:
            yield from looks[index](reply, facts)

    return Served("the feature's data", _HEAD + size, look)


_GETS = {
    DeviceFeature.MIGRATION: m.FeatureMigration.LAYOUT.size,
    DeviceFeature.MIG_DEVICE_STATE: m.FeatureDeviceState.LAYOUT.size,
}


def _get_cases() -> Iterator[Case]:
    for index, size in _GETS.items():
        name, needs = f"feature/{index.name.lower()}", (FEATURES[index].needs,)
        served = _get(index, size)
        for variant, argsz in (("exact", _HEAD + size), ("room", 4096), ("largest", _U32)):
            step = Ask(Command.DEVICE_FEATURE, feature(GET | index, argsz=argsz), served)
            yield Case(f"{name}/get-{variant}", SECTION, (step,), needs=needs)
        for argsz in (0, _HEAD - 1, _HEAD + size - 1):
            refused = Ask(Command.DEVICE_FEATURE, feature(GET | index, argsz=argsz), Refused())
            yield Case(f"{name}/get-argsz-{argsz}", SECTION, (refused,), Level.SHOULD, needs=needs)
    size_is_there = Do("a number, or an error reply", _data_size)
    yield Case("feature/mig_data_size/get", SECTION, (size_is_there,), needs=(needs_migration,))


def _data_size(session: Session) -> Findings:
    answer = session.ask(Command.DEVICE_FEATURE, feature(GET | DeviceFeature.MIG_DATA_SIZE, argsz=16))
    if isinstance(answer, Received) and answer.is_error:
        yield from _NOT_SUPPORTED.judge(answer, session.facts)
        return
    yield from _get(DeviceFeature.MIG_DATA_SIZE, m.FeatureDataSize.LAYOUT.size).judge(answer, session.facts)


# What is refused while the device runs


def _running_cases() -> Iterator[Case]:
    report = m.LoggingReport(1 << 40, 1 << 20, 4096).pack()
    needs = (needs_logging,)
    off = Ask(
        Command.DEVICE_FEATURE,
        feature(GET | DeviceFeature.DMA_LOGGING_REPORT, report, 4096),
        Refused((errno.EINVAL, errno.ENOENT)),
    )
    section = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"
    yield Case("feature/dma_logging_report/not-started", section, (off,), needs=needs)
    short = Ask(Command.DEVICE_FEATURE, feature(GET | DeviceFeature.DMA_LOGGING_REPORT, report[:-1], 4096), Refused())
    yield Case("feature/dma_logging_report/short", section, (short,), needs=needs)
    # A server that takes one of these logs from then on.
    section = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START"
    control = m.LoggingControl(4096, 1).pack()
    many = m.LoggingControl(4096, _U32).pack() + bytes(32)
    starts = {"short": control[:-1], "no-range": control, "range-short": control + bytes(15), "ranges-max": many}
    for name, data in starts.items():
        step = Ask(Command.DEVICE_FEATURE, feature(SET | DeviceFeature.DMA_LOGGING_START, data), Refused(()))
        yield Case(f"feature/dma_logging_start/{name}", section, (step,), mode=Mode.MIGRATE, needs=needs)
    for name, size in (("short", 3), ("empty", 0)):
        state = m.FeatureDeviceState(DeviceState.RUNNING).pack()[:size]
        step = Ask(Command.DEVICE_FEATURE, feature(SET | DeviceFeature.MIG_DEVICE_STATE, state), Refused())
        yield Case(f"feature/mig_device_state/set-{name}", SECTION, (step,), needs=(needs_migration,))
    for command, payload in {
        Command.MIG_DATA_READ: m.MigData(8 + 4096, 4096).pack(),
        Command.MIG_DATA_WRITE: m.MigData(8 + 4, 4).pack() + b"data",
    }.items():
        # Whether it migrates or not: nobody saves or restores now.
        section = f"VFIO_USER_{command.name}"
        name = command.name.lower()
        yield Case(f"feature/{name}/running", section, (Ask(command, payload, Refused()),))
        more = m.MigData(_U32, _U32).pack()
        yield Case(f"feature/{name}/size-max", section, (Ask(command, more, Refused()),))


def cases() -> Iterator[Case]:
    for index, row in FEATURES.items():
        yield from _probes(index, row)
        yield from _not_offered(index, row)
        yield from _bad_operations(index, row)
    for number in _UNKNOWN:
        yield from _unknown(number)
    yield from _get_cases()
    yield from _running_cases()
