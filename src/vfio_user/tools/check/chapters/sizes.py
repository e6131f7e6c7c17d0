"""Payloads that are too short for their command, and ``argsz`` that is: the same for every command, from one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vfio_user.tools.check.cases import Ask, Blob, Case
from vfio_user.tools.check.expect import Answered, Expectation, Refused, Served
from vfio_user.tools.check.model import Level, Mode
from vfio_user.wire import messages as m
from vfio_user.wire.constants import PAGE_SIZE, Command, FeatureFlags, IrqSetFlags, PciRegion

SECTION = "Message sizes"
NOT_THERE = 0xFFFFFFFF
FAR = 6 << 40
"""An address at which nothing is mapped."""

_WHOLE: dict[Command, bytes] = {
    Command.DMA_MAP: m.DmaMap(32, 3, 0, FAR, PAGE_SIZE).pack(),
    Command.DMA_UNMAP: m.DmaUnmap(24, 0, FAR, PAGE_SIZE).pack(),
    Command.DEVICE_GET_INFO: m.DeviceInfo(16).pack(),
    Command.DEVICE_GET_REGION_INFO: m.RegionInfo(32, 0, PciRegion.CONFIG).pack(),
    Command.DEVICE_GET_REGION_IO_FDS: m.RegionIoFds(16, 0, PciRegion.CONFIG, 0).pack(),
    Command.DEVICE_GET_IRQ_INFO: m.IrqInfo(16, 0, 0).pack(),
    Command.DEVICE_SET_IRQS: m.IrqSet(20, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0, 0).pack(),
    Command.REGION_READ: m.RegionAccess(0, PciRegion.CONFIG, 4).pack(),
    Command.REGION_WRITE: m.RegionAccess(0, NOT_THERE, 0).pack(),
    Command.REGION_WRITE_MULTI: m.WriteMulti(0).pack(),
    Command.DEVICE_FEATURE: m.Feature(8, FeatureFlags.PROBE | 1).pack(),
    Command.MIG_DATA_READ: m.MigData(8, 0).pack(),
    Command.MIG_DATA_WRITE: m.MigData(8, 0).pack(),
}
"""For each command a payload that is no longer than its fixed part."""

_ARGSZ = {
    Command.DMA_MAP,
    Command.DMA_UNMAP,
    Command.DEVICE_GET_INFO,
    Command.DEVICE_GET_REGION_INFO,
    Command.DEVICE_GET_REGION_IO_FDS,
    Command.DEVICE_GET_IRQ_INFO,
    Command.DEVICE_SET_IRQS,
}
"""Commands whose payload begins with ``argsz``, which counts at least the fixed part of what follows."""
_INFO: dict[Command, int | None] = {
    Command.DEVICE_GET_INFO: 16,
    Command.DEVICE_GET_REGION_INFO: None,
    Command.DEVICE_GET_IRQ_INFO: 16,
}


def _with_argsz(payload: bytes, argsz: int) -> bytes:
    return argsz.to_bytes(4, "little") + payload[4:]


def _case(name: str, command: Command, payload: Blob, expect: Expectation, level: Level = Level.MUST) -> Case:
    section = f"VFIO_USER_{command.name}"
    return Case(f"sizes/{command.name.lower()}/{name}", section, (Ask(command, payload, expect),), level)


def cases() -> Iterator[Case]:
    for command, whole in _WHOLE.items():
        shorter = {"empty": 0, "short-by-1": len(whole) - 1, "half": len(whole) // 2}
        for name, size in shorter.items():
            yield _case(name, command, whole[:size], Refused())
    for command in sorted(_ARGSZ):
        whole = _WHOLE[command]
        for argsz in (0, 4, len(whole) - 1):
            yield _case(f"argsz-{argsz}", command, _with_argsz(whole, argsz), Refused(), Level.SHOULD)
    for command, length in _INFO.items():
        whole = _WHOLE[command]
        answer = Served("success", length)
        # A region's descriptor comes whatever argsz is.
        for argsz in (len(whole) + 1, 4096, NOT_THERE):
            yield _case(f"argsz-{argsz}", command, _with_argsz(whole, argsz), replace(answer, fds=True))
        longer = Answered(replace(answer, fds=True))
        yield _case("longer", command, _with_argsz(whole, len(whole) + 8) + bytes(8), longer, Level.SHOULD)
    reset = Ask(Command.DEVICE_RESET, bytes(4), Answered())
    yield Case("sizes/device_reset/longer", "VFIO_USER_DEVICE_RESET", (reset,), Level.SHOULD, Mode.ACTIVE)
