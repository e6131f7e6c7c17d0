"""DMA logging: what may be started and reported, how long a bitmap is; and what a device with a known DMA engine logs.

The memory that is logged is the checker's own, which no device writes by itself: its pages are clean. What is dirty
is checked against a model with edu (1234:11e8), whose DMA everybody can start.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vfio_user.tools.check.cases import BreachError, Case, Do, Session, Start
from vfio_user.tools.check.chapters.dma import map_
from vfio_user.tools.check.expect import EMPTY, Answered, Findings, Refused, Served
from vfio_user.tools.check.facts import Facts, needs_logging, needs_reset
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.mover import HEAD, Mover
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import PAGE_SIZE, Command, DeviceFeature, DeviceState, FeatureFlags, PciRegion

START, REPORT = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START", "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"
BASE, SIZE = 1 << 40, 1 << 20
_CONTROL = m.LoggingControl.LAYOUT.size
_REPORT = m.LoggingReport.LAYOUT.size
_U64 = 0xFFFFFFFFFFFFFFFF
_KIB = 1024

Ranges = tuple[tuple[int, int], ...]
ALL: Ranges = ((BASE, SIZE),)


def _start_request(page_size: int, ranges: Ranges, announced: int | None = None) -> bytes:
    control = m.LoggingControl(page_size, len(ranges) if announced is None else announced).pack()
    data = control + b"".join(m.LoggingRange(*pair).pack() for pair in ranges)
    return m.Feature(HEAD + len(data), FeatureFlags.SET | DeviceFeature.DMA_LOGGING_START).pack() + data


_STOP = m.Feature(HEAD, FeatureFlags.SET | DeviceFeature.DMA_LOGGING_STOP).pack()


def _bitmap_size(length: int, page_size: int) -> int:
    return -(-length // (page_size * 64)) * 8


def _report_request(iova: int, length: int, page_size: int, argsz: int | None = None) -> bytes:
    room = HEAD + _REPORT + _bitmap_size(length, page_size) if argsz is None else argsz
    flags = FeatureFlags.GET | DeviceFeature.DMA_LOGGING_REPORT
    return m.Feature(room, flags).pack() + m.LoggingReport(iova, length, page_size).pack()


class Log:
    """Logging in a session: ``memory`` is mapped at BASE, SIZE bytes."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def start(self, page_size: int = PAGE_SIZE, ranges: Ranges = ALL) -> int:
        """The page size chosen."""
        request = _start_request(page_size, ranges)
        reply = self._succeed(request, "DMA_LOGGING_START", len(request))
        return m.LoggingControl.parse(reply, HEAD).page_size

    def stop(self) -> None:
        self._succeed(_STOP, "DMA_LOGGING_STOP", HEAD)

    def report(self, iova: int = BASE, length: int = SIZE, page_size: int = PAGE_SIZE) -> int:
        """The bitmap, as a number: bit n is page n from ``iova`` on."""
        what = f"DMA_LOGGING_REPORT of {length:#x} bytes in pages of {page_size:#x}"
        size = _bitmap_size(length, page_size)
        reply = self._succeed(_report_request(iova, length, page_size), what, HEAD + _REPORT + size)
        return int.from_bytes(reply[HEAD + _REPORT :], "little")

    def _succeed(self, request: bytes, what: str, size: int) -> bytes:
        reply = self.session.ask(Command.DEVICE_FEATURE, request)
        for finding in Served("", size).judge(reply, self.session.facts):
            raise BreachError(Finding(finding.code, f"{what}: {finding.text}", finding.level, finding.value))
        assert isinstance(reply, Received)
        return reply.payload


Procedure = Callable[[Log], Findings]


def _case(
    name: str,
    section: str,
    text: str,
    function: Procedure,
    level: Level = Level.MUST,
    *,
    base: int = BASE,
    needs: tuple[Callable[[Facts], str], ...] = (),
) -> Case:
    """``function`` with SIZE bytes of memory mapped at ``base``; logging is off before and after."""

    def run(session: Session) -> Findings:
        session.ask(Command.DEVICE_FEATURE, _STOP)
        yield from map_(base, SIZE, EMPTY).run(session)
        try:
            yield from function(Log(session))
        finally:
            session.ask(Command.DEVICE_FEATURE, _STOP)

    step = Do(text, run)
    return Case(f"logging/{name}", section, (step,), level, Mode.MIGRATE, Start.FRESH, (needs_logging, *needs))


# Start and stop


def _starts(page_size: int, ranges: Ranges) -> Procedure:
    def start(log: Log) -> Findings:
        chosen = log.start(page_size, ranges)
        if chosen <= 0 or chosen & (chosen - 1):
            yield Finding("page-size", f"page size {chosen} is chosen: no power of two", value=chosen)
        log.stop()

    return start


def _refuses_start(request: bytes) -> Procedure:
    def start(log: Log) -> Findings:
        yield from log.session.expect(Refused(), Command.DEVICE_FEATURE, request)

    return start


def _start_twice(second: int) -> Procedure:
    def start(log: Log) -> Findings:
        log.start(PAGE_SIZE)
        log_again = Served("success") if second == PAGE_SIZE else Refused()
        yield from log.session.expect(log_again, Command.DEVICE_FEATURE, _start_request(second, ALL))

    return start


def _stop_twice(log: Log) -> Findings:
    log.start()
    log.stop()
    yield from log.session.expect(Served("success", HEAD), Command.DEVICE_FEATURE, _STOP)


def _stopped(log: Log) -> Findings:
    log.start()
    log.stop()
    off = Refused((errno.EINVAL, errno.ENOENT))
    yield from log.session.expect(off, Command.DEVICE_FEATURE, _report_request(BASE, SIZE, PAGE_SIZE))


_BAD_STARTS: dict[str, tuple[bytes, Level]] = {
    "page-size-0": (_start_request(0, ALL), Level.SHOULD),
    "page-size-3000": (_start_request(3000, ALL), Level.SHOULD),
    "range-unaligned": (_start_request(PAGE_SIZE, ((BASE + 1, PAGE_SIZE),)), Level.SHOULD),
    "length-unaligned": (_start_request(PAGE_SIZE, ((BASE, 100),)), Level.SHOULD),
    "range-wraps": (_start_request(PAGE_SIZE, ((_U64 - PAGE_SIZE + 1, 2 * PAGE_SIZE),)), Level.SHOULD),
    "one-range-less": (_start_request(PAGE_SIZE, ALL, announced=2), Level.MUST),
    "2^28-ranges": (_start_request(PAGE_SIZE, ALL, announced=1 << 28), Level.MUST),
}


def _start_cases() -> Iterator[Case]:
    for name, (page_size, ranges) in {
        "4k": (PAGE_SIZE, ALL),
        "64k": (64 * _KIB, ALL),
        "1m": (SIZE, ALL),
        "no-ranges": (PAGE_SIZE, ()),
        "part": (PAGE_SIZE, ((BASE + PAGE_SIZE, PAGE_SIZE),)),
        "two-ranges": (PAGE_SIZE, ((BASE, PAGE_SIZE), (BASE + 2 * PAGE_SIZE, PAGE_SIZE))),
        "beyond-memory": (PAGE_SIZE, ((BASE, 2 * SIZE),)),
    }.items():
        text = "the request again, with the page size chosen: a power of two"
        yield _case(f"start/{name}", START, text, _starts(page_size, ranges))
    for name, (request, level) in _BAD_STARTS.items():
        yield _case(f"start/bad/{name}", START, "an error reply", _refuses_start(request), level)
    yield _case("start/again", START, "success", _start_twice(PAGE_SIZE), Level.SHOULD)
    again = _start_twice(64 * _KIB)
    yield _case("start/again-other-page-size", START, "an error reply", again, Level.SHOULD)
    yield _case("stop/again", START, "success", _stop_twice, Level.SHOULD)
    yield _case("stop/no-report-then", REPORT, "an error reply", _stopped)


# Reports


@dataclass(frozen=True, slots=True)
class Span:
    """What is reported: offset from BASE and length in bytes, size of the report's pages, of the log's."""

    offset: int
    length: int
    page_size: int
    log_page_size: int = PAGE_SIZE


_SPANS: dict[str, tuple[Span, Level]] = {
    "whole": (Span(0, SIZE, PAGE_SIZE), Level.MUST),
    "coarser": (Span(0, SIZE, 64 * _KIB), Level.MUST),
    "coarser-8k": (Span(0, SIZE, 8 * _KIB), Level.MUST),
    "one-bit": (Span(0, SIZE, SIZE), Level.MUST),
    "finer": (Span(0, 16 * PAGE_SIZE, _KIB), Level.SHOULD),
    "finer-than-the-log": (Span(0, SIZE, PAGE_SIZE, 64 * _KIB), Level.MUST),
    "first-page": (Span(0, PAGE_SIZE, PAGE_SIZE), Level.SHOULD),
    "last-page": (Span(SIZE - PAGE_SIZE, PAGE_SIZE, PAGE_SIZE), Level.SHOULD),
    "in-the-middle": (Span(17 * PAGE_SIZE, 65 * PAGE_SIZE, PAGE_SIZE), Level.SHOULD),
    "unaligned": (Span(100, 5000, PAGE_SIZE), Level.SHOULD),
}


def _reports(span: Span) -> Procedure:
    """The bitmap has its length, and nothing in it: nobody wrote."""

    def report(log: Log) -> Findings:
        log.start(span.log_page_size)
        bits = log.report(BASE + span.offset, span.length, span.page_size)
        pages = -(-span.length // span.page_size)
        if bits >> pages:
            yield Finding("outside", f"bits behind the last of {pages} pages are set")
        if bits:
            yield Finding("dirty", f"{bits.bit_count()} pages are dirty that nobody wrote", Level.SHOULD)

    return report


def _adjacent(log: Log) -> Findings:
    yield from map_(BASE + SIZE, SIZE, EMPTY).run(log.session)
    log.start(PAGE_SIZE, ())
    log.report(BASE, 2 * SIZE)


def _over_a_hole(log: Log) -> Findings:
    yield from map_(BASE + 2 * SIZE, SIZE, EMPTY).run(log.session)
    log.start(PAGE_SIZE, ())
    log.report(BASE, 3 * SIZE)


def _mapped_later(log: Log) -> Findings:
    log.start(PAGE_SIZE, ())
    yield from map_(BASE + 4 * SIZE, SIZE, EMPTY).run(log.session)
    log.report(BASE + 4 * SIZE, SIZE)


def _refuses_report(request: bytes, errnos: tuple[int, ...] = (errno.EINVAL,)) -> Procedure:
    def report(log: Log) -> Findings:
        log.start()
        yield from log.session.expect(Refused(errnos), Command.DEVICE_FEATURE, request)

    return report


_BAD_REPORTS: dict[str, tuple[bytes, Level]] = {
    "page-size-0": (_report_request(BASE, SIZE, PAGE_SIZE)[:-8] + bytes(8), Level.MUST),
    "page-size-3000": (_report_request(BASE, SIZE, 3000), Level.MUST),
    "length-0": (_report_request(BASE, 0, PAGE_SIZE), Level.SHOULD),
    "wraps": (_report_request(_U64 - PAGE_SIZE + 1, 2 * PAGE_SIZE, PAGE_SIZE, 4096), Level.MUST),
    "length-max": (_report_request(BASE, _U64, PAGE_SIZE, 0xFFFFFFFF), Level.MUST),
    "argsz-small": (_report_request(BASE, SIZE, PAGE_SIZE, HEAD + _REPORT), Level.SHOULD),
}


def _report_cases() -> Iterator[Case]:
    for name, (span, level) in _SPANS.items():
        text = f"a bitmap of {_bitmap_size(span.length, span.page_size)} bytes, all clean"
        yield _case(f"report/{name}", REPORT, text, _reports(span), level)
    text = "a bitmap of all of it"
    yield _case("report/adjacent-regions", REPORT, text, _adjacent, Level.SHOULD)
    yield _case("report/over-a-hole", REPORT, text, _over_a_hole, Level.SHOULD)
    yield _case("report/mapped-later", REPORT, text, _mapped_later, Level.SHOULD)
    for name, (request, level) in _BAD_REPORTS.items():
        yield _case(f"report/bad/{name}", REPORT, "an error reply", _refuses_report(request), level)
    hole = _refuses_report(_report_request(BASE + 16 * SIZE, SIZE, PAGE_SIZE), (errno.ENOENT,))
    yield _case("report/bad/hole", REPORT, "an error reply, ENOENT", hole, Level.SHOULD)
    text = "the structure again and the bitmap, or an error reply"
    yield _case("unmap-with-bitmap", "VFIO_USER_DMA_UNMAP", text, _unmap_with_bitmap, Level.SHOULD)


def _unmap_with_bitmap(log: Log) -> Findings:
    log.start()
    size = _bitmap_size(SIZE, PAGE_SIZE)
    info = m.DirtyBitmapInfo(PAGE_SIZE, size).pack()
    request = m.DmaUnmap(24 + len(info) + size, 1, BASE, SIZE).pack() + info
    served = Answered(Served("the bitmap", len(request) + size))
    yield from log.session.expect(served, Command.DMA_UNMAP, request)


# A device whose DMA anybody can start: edu, as QEMU documents it (docs/specs/edu.rst)

_LOW = 1 << 20
"""Where the memory is mapped: the original edu has addresses of 28 bits."""
_SOURCE, _DESTINATION, _COUNT, _COMMAND = 0x80, 0x88, 0x90, 0x98
_BUFFER, _RUN, _TO_MEMORY = 0x40000, 1, 2
_BUS_MASTER = 0x07
_TRIES = 1000


def _is_edu(facts: Facts) -> str:
    return "" if facts.identity == "1234:11e8" else "no device whose DMA is known: edu (1234:11e8)"


class Edu:
    """Its DMA engine: moves up to 4096 bytes between its buffer and memory."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._write(PciRegion.CONFIG, 0x04, _BUS_MASTER, 2)

    def _write(self, region: int, offset: int, value: int, width: int) -> None:
        payload = m.RegionAccess(offset, region, width).pack() + value.to_bytes(width, "little")
        self._done(self.session.ask(Command.REGION_WRITE, payload))

    def _done(self, answer: object) -> bytes:
        if not isinstance(answer, Received) or answer.is_error:
            raise BreachError(Finding("refused", f"a register of edu: {answer}"))
        return answer.payload[16:]

    def move(self, address: int, count: int, *, to_memory: bool) -> None:
        """Raises BreachError when it does not end."""
        source, destination = (_BUFFER, address) if to_memory else (address, _BUFFER)
        for offset, value in ((_SOURCE, source), (_DESTINATION, destination), (_COUNT, count)):
            self._write(0, offset, value, 8)
        self._write(0, _COMMAND, _RUN | (_TO_MEMORY if to_memory else 0), 8)
        for _ in range(_TRIES):
            command = self._done(self.session.ask(Command.REGION_READ, m.RegionAccess(_COMMAND, 0, 8).pack()))
            if not struct.unpack("<Q", command)[0] & _RUN:
                return
        raise BreachError(Finding("no-dma", "edu does not finish its DMA"))


def _pages(writes: tuple[tuple[int, int], ...], page_size: int) -> int:
    """The model: the bitmap of writes of (offset, count)."""
    bits = 0
    for offset, count in writes:
        for page in range(offset // page_size, (offset + count - 1) // page_size + 1):
            bits |= 1 << page
    return bits


_WRITES: dict[str, tuple[tuple[int, int], ...]] = {
    "one-byte": ((5 * PAGE_SIZE + 7, 1),),
    "a-page": ((3 * PAGE_SIZE, PAGE_SIZE),),
    "across-pages": ((7 * PAGE_SIZE - 1, 2),),
    "first-and-last": ((0, 1), (SIZE - 1, 1)),
    "many": tuple((page * PAGE_SIZE, 4) for page in range(0, 256, 3)),
}


def _logs(writes: tuple[tuple[int, int], ...], page_size: int) -> Procedure:
    """What was written is dirty, once; what was read is not."""

    def compare(log: Log) -> Findings:
        mover = Mover(log.session)
        saved = mover.save()
        mover.set(DeviceState.RUNNING)
        yield from written(log)
        mover.recover(saved)

    def written(log: Log) -> Findings:
        edu = Edu(log.session)
        log_page = log.start(PAGE_SIZE, ((_LOW, SIZE),))
        edu.move(_LOW + 100 * PAGE_SIZE, 64, to_memory=False)
        for offset, count in writes:
            edu.move(_LOW + offset, count, to_memory=True)
        came = log.report(_LOW, SIZE, page_size)
        expected = _pages(writes, max(log_page, page_size))
        if page_size >= log_page and came != expected:
            missing, more = (expected & ~came).bit_count(), (came & ~expected).bit_count()
            yield Finding("dirty", f"{missing} dirty pages are missing, {more} are dirty that nobody wrote")
        again = log.report(_LOW, SIZE, page_size)
        if again:
            yield Finding("not-cleared", f"{again.bit_count()} pages are dirty again that were reported")

    return compare


def _edu_cases() -> Iterator[Case]:
    for name, writes in _WRITES.items():
        for suffix, page_size in (("", PAGE_SIZE), ("-in-64k", 64 * _KIB)):
            text = "the pages that edu wrote, once"
            function = _logs(writes, page_size)
            yield _case(f"edu/{name}{suffix}", REPORT, text, function, base=_LOW, needs=(_is_edu, needs_reset))


def cases() -> Iterator[Case]:
    yield from _start_cases()
    yield from _report_cases()
    yield from _edu_cases()
