"""SET_IRQS: every rule of struct vfio_irq_set."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vfio_user.tools.check.cases import Ask, Case, Do, FdKind, Session, Start, Step
from vfio_user.tools.check.expect import EMPTY, Answered, Expectation, Findings, Refused
from vfio_user.tools.check.facts import Facts, Need, needs_irqs
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command, IrqInfoFlags, IrqSetFlags, PciIrq

SECTION = "VFIO_USER_DEVICE_SET_IRQS"
_NONE, _BOOL, _EVENT = IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD
_MASK, _UNMASK, _TRIGGER = IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, IrqSetFlags.ACTION_TRIGGER
_U32 = 0xFFFFFFFF
_FD = (FdKind.EVENT,)


def _irqs(
    index: int,
    flags: int,
    start: int,
    count: int,
    expect: Expectation = EMPTY,
    fds: tuple[FdKind, ...] = (),
    data: bytes = b"",
) -> Ask:
    size = m.IrqSet.LAYOUT.size + len(data)
    return Ask(Command.DEVICE_SET_IRQS, m.IrqSet(size, flags, index, start, count).pack() + data, expect, fds)


def _disable(index: int) -> Ask:
    return _irqs(index, _NONE | _TRIGGER, 0, 0)


def _assign(index: int) -> Ask:
    return _irqs(index, _EVENT | _TRIGGER, 0, 1, fds=_FD)


def _case(
    name: str,
    index: PciIrq,
    *steps: Step,
    level: Level = Level.MUST,
    mode: Mode = Mode.SAFE,
    needs: tuple[Need, ...] = (),
) -> Case:
    name = f"irq/{index.name.lower()}/{name}"
    return Case(name, SECTION, steps, level, mode, Start.FRESH, (needs_irqs(index), *needs))


_BAD_FLAGS = {
    "none": 0,
    "no-data": _TRIGGER,
    "no-action": _EVENT,
    "two-data": _NONE | _BOOL | _TRIGGER,
    "all-data": _NONE | _BOOL | _EVENT | _TRIGGER,
    "mask-and-unmask": _NONE | _MASK | _UNMASK,
    "mask-and-trigger": _NONE | _MASK | _TRIGGER,
    "all-actions": _NONE | _MASK | _UNMASK | _TRIGGER,
}
_UNKNOWN_BITS = (6, 7, 16, 31)


def _as_many_fds(index: int) -> Do:
    """As many eventfds as there are interrupts, as far as one message may bring."""

    def assign(session: Session) -> Findings:
        count = min(session.facts.irq(index).count, session.facts.max_fds, 253)
        if count:
            yield from _irqs(index, _EVENT | _TRIGGER, 0, count, fds=_FD * count).run(session)
        yield from _disable(index).run(session)

    return Do("success without payload", assign)


def _one_too_many(index: int, start: int) -> Do:
    def assign(session: Session) -> Findings:
        count = session.facts.irq(index).count
        yield from _irqs(index, _EVENT | _TRIGGER, count - 1 + start, 2 - start, Refused(), _FD * (2 - start)).run(
            session
        )

    return Do(str(Refused()), assign)


def _triggered(index: int, data: IrqSetFlags, booleans: bytes, expected: int) -> Do:
    """An eventfd is assigned, the client triggers the interrupt itself, the eventfd is signalled."""

    def trigger(session: Session) -> Findings:
        fd = session.fd(FdKind.EVENT)
        request = m.IrqSet(20, _EVENT | _TRIGGER, index, 0, 1).pack()
        yield from session.expect(EMPTY, Command.DEVICE_SET_IRQS, request, [fd])
        yield from _irqs(index, data | _TRIGGER, 0, 1, data=booleans).run(session)
        try:
            came = os.eventfd_read(fd)
        except BlockingIOError:
            came = 0
        if bool(came) != bool(expected):
            yield Finding("signal", f"the eventfd was signalled {came} times, {expected} expected", value=came)

    return Do(f"the eventfd is signalled {expected} times", trigger)


def _replaced(session: Session) -> Findings:
    """The second eventfd of an interrupt takes the place of the first."""
    first, second = session.fd(FdKind.EVENT), session.fd(FdKind.EVENT)
    index = next(irq for irq in PciIrq if session.facts.irq(irq).count)
    request = m.IrqSet(20, _EVENT | _TRIGGER, index, 0, 1).pack()
    for fd in (first, second):
        yield from session.expect(EMPTY, Command.DEVICE_SET_IRQS, request, [fd])
    yield from _irqs(index, _NONE | _TRIGGER, 0, 1).run(session)
    for fd, expected in ((first, False), (second, True)):
        try:
            came = bool(os.eventfd_read(fd))
        except BlockingIOError:
            came = False
        if came != expected:
            yield Finding("signal", f"the {'second' if expected else 'first'} eventfd was signalled: {came}")


def _any_irq(facts: Facts) -> str:
    return "" if any(irq.count for irq in facts.irqs[: len(PciIrq)]) else "no interrupts"


def _maskable(index: int) -> Need:
    def missing(facts: Facts) -> str:
        return "" if facts.irq(index).flags & IrqInfoFlags.MASKABLE else "not maskable"

    return missing


def _good(irq: PciIrq) -> Iterator[Case]:
    yield _case("assign", irq, _assign(irq), _disable(irq))
    yield _case("assign-again", irq, _assign(irq), _assign(irq), _disable(irq))
    yield _case("assign-many", irq, _as_many_fds(irq))
    yield _case("de-assign", irq, _assign(irq), _irqs(irq, _EVENT | _TRIGGER, 0, 1))
    yield _case("disable", irq, _disable(irq))
    yield _case("disable-assigned", irq, _assign(irq), _disable(irq), _disable(irq))
    active = Mode.ACTIVE
    yield _case("trigger-none", irq, _triggered(irq, _NONE, b"", 1), mode=active)
    yield _case("trigger-bool-1", irq, _triggered(irq, _BOOL, b"\1", 1), mode=active)
    yield _case("trigger-bool-0", irq, _triggered(irq, _BOOL, b"\0", 0), mode=active)
    if irq not in (PciIrq.ERR, PciIrq.REQ):
        masks = (_irqs(irq, _NONE | _MASK, 0, 1), _irqs(irq, _NONE | _UNMASK, 0, 1))
        yield _case("mask", irq, *masks, mode=active, needs=(_maskable(irq),))
        masks = (_irqs(irq, _BOOL | _MASK, 0, 1, data=b"\1"), _irqs(irq, _BOOL | _UNMASK, 0, 1, data=b"\1"))
        yield _case("mask-bool", irq, *masks, mode=active, needs=(_maskable(irq),))


def _bad(irq: PciIrq) -> Iterator[Case]:
    refused = Refused()
    for name, flags in _BAD_FLAGS.items():
        yield _case(f"flags/{name}", irq, _irqs(irq, flags, 0, 1, refused))
    for bit in _UNKNOWN_BITS:
        unknown = _irqs(irq, _EVENT | _TRIGGER | 1 << bit, 0, 1, refused, _FD)
        yield _case(f"flags/bit-{bit}", irq, unknown, level=Level.SHOULD)
    yield _case("range/start-max", irq, _irqs(irq, _EVENT | _TRIGGER, _U32, 1, refused, _FD))
    yield _case("range/count-max", irq, _irqs(irq, _EVENT | _TRIGGER, 0, _U32, refused))
    yield _case("range/wraps", irq, _irqs(irq, _EVENT | _TRIGGER, _U32, 2, refused))
    yield _case("range/at-end", irq, _one_too_many(irq, 1))
    yield _case("range/across-end", irq, _one_too_many(irq, 0))
    yield _case("fds/too-many", irq, _irqs(irq, _EVENT | _TRIGGER, 0, 1, refused, _FD * 2))
    should = Level.SHOULD
    yield _case("fds/with-none", irq, _irqs(irq, _NONE | _TRIGGER, 0, 0, refused, _FD), level=should)
    for kind in (FdKind.MEMORY, FdKind.PIPE, FdKind.SOCKET):
        wrong = _irqs(irq, _EVENT | _TRIGGER, 0, 1, refused, (kind,))
        yield _case(f"fds/{kind.value}", irq, wrong, level=should)
    yield _case("bool/missing", irq, _irqs(irq, _BOOL | _TRIGGER, 0, 1, refused))
    yield _case("bool/too-many", irq, _irqs(irq, _BOOL | _TRIGGER, 0, 1, refused, data=b"\0\0"), level=should)
    yield _case("disable-from-1", irq, _irqs(irq, _NONE | _TRIGGER, 1, 0, Refused()), level=should)
    if irq in (PciIrq.ERR, PciIrq.REQ):
        for name, action in (("mask", _MASK), ("unmask", _UNMASK)):
            yield _case(name, irq, _irqs(irq, _NONE | action, 0, 1, refused), level=should)


def cases() -> Iterator[Case]:
    for irq in PciIrq:
        yield from _good(irq)
        yield from _bad(irq)
    for name, index in {"next": 5, "next-but-100": 105, "largest": _U32}.items():
        step = _irqs(index, _NONE | _TRIGGER, 0, 0, Refused())
        yield Case(f"irq/none/{name}", SECTION, (step,))
    empty = Do("an error reply, or success: there is nothing to do", _disable_empty)
    yield Case("irq/empty/disable", SECTION, (empty,))
    replaced = Do("the second eventfd is signalled, the first is not", _replaced)
    yield Case("irq/replace", SECTION, (replaced,), mode=Mode.ACTIVE, start=Start.FRESH, needs=(_any_irq,))


def _disable_empty(session: Session) -> Findings:
    """QEMU disables every index when the machine is reset, those without interrupts, too."""
    for irq in PciIrq:
        if not session.facts.irq(irq).count:
            yield from _irqs(irq, _NONE | _TRIGGER, 0, 0, Answered(EMPTY)).run(session)
