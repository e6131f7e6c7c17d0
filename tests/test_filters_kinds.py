"""Each filter alone: delay, error, readonly, stats, trace, trap."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from vfio_user import DeviceState, Region, ServerBackend
from vfio_user.errors import TransitionError, UsageError
from vfio_user.fds import OwnedFd
from vfio_user.filters import HOOKS, Delay, Error, Filter, ReadOnly, Stats, Trace, Trap, trace
from vfio_user.filters.base import COMMAND_HOOKS
from vfio_user.server import Quiescing, RegionIoFd
from vfio_user.testing import no_fd_leaks
from vfio_user.wire.constants import IoFdType, IrqSetFlags

from .support import CONFIG, MigratableBackend, RecordingBackend

DISABLE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER


@pytest.fixture
def backend() -> Iterator[MigratableBackend]:
    made = MigratableBackend()
    yield made
    made.close()


def read(backend: ServerBackend, region: int = 0, offset: int = 0, size: int = 4) -> bytes:
    data = bytearray(size)
    backend.region_read(region, offset, memoryview(data))
    return bytes(data)


def write(backend: ServerBackend, data: bytes, region: int = 0, offset: int = 0) -> None:
    backend.region_write(region, offset, memoryview(data))


# delay


class Clock:
    """Stands in for time.sleep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept: list[float] = []
        monkeypatch.setattr(time, "sleep", self.slept.append)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_delay_is_per_command_before_the_device_is_called(backend: MigratableBackend, clock: Clock) -> None:
    delay = Delay(backend, region_read=0.5, dma_map=2.0)
    backend.act["region_read"] = lambda: clock.slept.append(-1)
    read(delay)
    delay.dma_map(3, 0, 0, 4096, None)
    write(delay, b"data")
    delay.quiesce()
    delay.migration_get_state()
    assert clock.slept == [0.5, -1, 2.0]


def test_the_narrower_name_counts(backend: MigratableBackend, clock: Clock) -> None:
    delay = Delay(backend, dma_logging_stop=3.0, device_feature=2.0, all=1.0)
    read(delay)
    delay.dma_logging_stop()
    delay.migration_set_state(DeviceState.STOP)
    assert clock.slept == [1.0, 3.0, 2.0]


def test_delay_in_one_region(backend: MigratableBackend, clock: Clock) -> None:
    delay = Delay(backend, all=1.0, region=0)
    read(delay, CONFIG)
    write(delay, b"data", CONFIG)
    assert clock.slept == []
    read(delay, 0)
    delay.reset()
    assert clock.slept == [1.0, 1.0]


def test_jitter_is_bounded_and_the_same_with_the_same_seed(backend: MigratableBackend, clock: Clock) -> None:
    for seed in (1, 1, 2):
        delay = Delay(backend, region_read=0.5, jitter=0.25, seed=seed)
        for _ in range(50):
            read(delay)
    first, second, third = clock.slept[:50], clock.slept[50:100], clock.slept[100:]
    assert first == second != third
    assert all(0.5 <= seconds < 0.75 for seconds in clock.slept)
    assert max(first) - min(first) > 0.1


def test_no_delay_does_not_sleep(backend: MigratableBackend, clock: Clock) -> None:
    read(Delay(backend, region_read=0))
    assert clock.slept == []


def test_a_delay_that_is_slept(backend: MigratableBackend) -> None:
    begin = time.monotonic()
    read(Delay(backend, region_read=0.05))
    assert time.monotonic() - begin >= 0.05


@pytest.mark.parametrize(
    "options",
    [{}, {"jitter": 1.0}, {"region_read": -1}, {"all": 61}, {"all": float("nan")}, {"nonsense": 1.0}]
    + [{"all": 1, "jitter": value} for value in (-1, 61, float("nan"))],
)
def test_delays_that_make_no_sense(backend: MigratableBackend, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Delay(backend, **options)


# error


def refusals(error: Filter, count: int, call: Callable[[ServerBackend], object] = read) -> list[bool]:
    outcomes = []
    for _ in range(count):
        try:
            call(error)
        except OSError:
            outcomes.append(True)
        else:
            outcomes.append(False)
    return outcomes


def test_a_refused_command_does_not_reach_the_device(backend: MigratableBackend) -> None:
    error = Error(backend, region_write=1.0, errno=errno.ENODEV)
    with pytest.raises(OSError, match="refused by the error filter") as refused:
        write(error, b"data")
    assert refused.value.errno == errno.ENODEV
    read(error)
    assert backend.calls == [("region_read", 0, 0, 4)]


def test_the_same_seed_has_the_same_refusals(backend: MigratableBackend) -> None:
    first = refusals(Error(backend, region_read=0.3, seed=1), 200)
    assert first == refusals(Error(backend, region_read=0.3, seed=1), 200)
    assert first != refusals(Error(backend, region_read=0.3, seed=2), 200)
    assert 30 <= sum(first) <= 90


def test_other_commands_do_not_change_which_calls_are_refused(backend: MigratableBackend) -> None:
    alone = refusals(Error(backend, region_read=0.3, seed=1), 50)
    error = Error(backend, region_read=0.3, reset=0.5, seed=1)
    mixed = []
    for _ in range(50):
        refusals(error, 3, lambda backend: backend.reset())
        mixed += refusals(error, 1)
    assert mixed == alone
    assert len([call for call in backend.calls if call[0] == "reset"]) < 150


def test_commands_are_not_refused_together(backend: MigratableBackend) -> None:
    error = Error(backend, region_read=0.5, reset=0.5, seed=1)
    assert refusals(error, 50) != refusals(error, 50, lambda backend: backend.reset())


def test_rates_of_none_and_all(backend: MigratableBackend) -> None:
    assert not any(refusals(Error(backend, region_read=0), 100))
    assert all(refusals(Error(backend, all=1), 100))
    assert not any(refusals(Error(backend, all=1, region=1), 100))


def test_the_refusals_are_reported(backend: MigratableBackend) -> None:
    error = Error(backend, all=1, region_write=0)
    assert error.report() == ""
    refusals(error, 3)
    write(error, b"data")
    assert error.report() == ("region_read: 3 of 3 calls refused with EIO\nregion_write: 0 of 1 calls refused with EIO")


@pytest.mark.parametrize("hook", COMMAND_HOOKS)
def test_every_command_can_be_refused(backend: MigratableBackend, hook: str) -> None:
    rate: dict[str, Any] = {hook: 1.0}
    error = Error(backend, **rate)
    with pytest.raises(OSError, match=f"{hook} refused"):
        getattr(error, hook)(*[0] * 5)
    assert backend.calls == []


@pytest.mark.parametrize("hook", sorted(HOOKS.keys() - COMMAND_HOOKS.keys()))
def test_what_the_server_asks_for_itself_is_never_refused(backend: MigratableBackend, hook: str) -> None:
    error: Any = Error(backend, all=1.0)
    arguments: dict[str, list[Any]] = {"connected": [None], "look_for_work": [True]}
    getattr(error, hook)(*arguments.get(hook, []))


def test_what_a_client_leaves_behind_is_taken_from_the_device(backend: MigratableBackend) -> None:
    """Memory and interrupts of a client that is gone must not stay, though taking them away was refused."""
    outer = Error(Error(backend, all=1.0), dma_unmap=1.0, set_irqs=1.0)
    with pytest.raises(OSError, match="refused"):
        outer.dma_unmap(0, 0x1000, 0x2000)
    with pytest.raises(OSError, match="refused"):
        outer.set_irqs(2, DISABLE, 0, 0, ())
    assert backend.calls == []
    backend.fail["dma_unmap"] = RuntimeError("the device has a bug")
    outer.disconnected()
    assert backend.calls == [
        ("dma_unmap", 0, 0x1000, 0x2000),
        ("set_irqs", 2, DISABLE, 0, 0, 0),
        ("disconnected",),
    ]
    outer.disconnected()
    assert len(backend.calls) == 4  # once


def test_what_was_taken_away_in_the_end_is_not_taken_again(backend: MigratableBackend) -> None:
    error = Error(backend, dma_unmap=0.5, set_irqs=1.0, seed=1)
    for _ in range(40):  # until it succeeds
        refusals(error, 1, lambda backend: backend.dma_unmap(0, 0, 4096))
    with pytest.raises(OSError, match="refused"):
        error.set_irqs(0, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK, 0, 1, ())
    unmapped = len(backend.called("dma_unmap"))
    refused_last = refusals(error, 1, lambda backend: backend.dma_unmap(0, 0, 4096)) == [True]
    error.disconnected()
    assert len(backend.called("dma_unmap")) == unmapped + 1
    assert backend.called("set_irqs") == []
    assert refused_last or backend.calls[-2][0] == "dma_unmap"


@pytest.mark.parametrize("options", [{}, {"errno": 5}, {"all": 1.01}, {"all": -0.1}, {"regionread": 0.5}])
def test_rates_that_make_no_sense(backend: MigratableBackend, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Error(backend, **options)


# readonly, trap


def test_readonly_refuses_writes_outside_config_space(backend: MigratableBackend) -> None:
    device = ReadOnly(backend)
    for region in (0, 1, 2, 6, 8):
        with pytest.raises(PermissionError, match="readonly filter"):
            write(device, b"data", region)
    write(device, b"data", CONFIG)
    read(device)
    assert [call[:2] for call in backend.calls] == [("region_write", CONFIG), ("region_read", 0)]


def test_readonly_may_close_config_space(backend: MigratableBackend) -> None:
    with pytest.raises(PermissionError):
        write(ReadOnly(backend, config=True), b"data", CONFIG)
    assert backend.calls == []


def test_readonly_takes_no_other_way_to_change_the_device(backend: MigratableBackend) -> None:
    device = ReadOnly(backend)
    assert (device.resettable, backend.resettable) == (False, True)
    calls: Sequence[Callable[[], object]] = (
        device.reset,
        lambda: device.migration_set_state(DeviceState.RESUMING),
        lambda: device.migration_write_data(memoryview(b"data")),
    )
    for call in calls:
        with pytest.raises(PermissionError):
            call()
    assert backend.calls == []


def test_readonly_can_be_saved_and_used(backend: MigratableBackend) -> None:
    device = ReadOnly(backend)
    backend.stream += b"stream"
    device.migration_set_state(DeviceState.STOP_COPY)
    assert device.migration_read_data(memoryview(bytearray(10))) == 6
    device.dma_map(3, 0, 0, 4096, None)
    device.set_irqs(0, DISABLE, 0, 1, ())
    assert len(backend.calls) == 4


@pytest.mark.parametrize("kind", [Trap, ReadOnly])
def test_nothing_leads_around_the_server(backend: MigratableBackend, kind: type[Filter]) -> None:
    backend.regions[0] = Region(0x1000, io_fds=(RegionIoFd(IoFdType.IOEVENTFD, 0, 4, fd=-1),))
    seen = kind(backend).regions
    assert [(region.size, region.flags) for region in seen] == [(r.size, r.flags) for r in backend.regions]
    assert any(region.fd is not None for region in backend.regions)
    assert all(region.fd is None and not region.io_fds and not region.sparse_areas for region in seen)


def test_trap_leaves_the_rest(backend: MigratableBackend) -> None:
    device = Trap(backend)
    write(device, b"data")
    device.reset()
    assert (read(device), device.resettable) == (b"data", True)


# stats


def test_stats_counts_calls_bytes_and_errors(backend: MigratableBackend) -> None:
    device = Stats(backend)
    backend.stream += b"123456"
    for _ in range(3):
        read(device, size=8)
    write(device, b"ab")
    device.migration_read_data(memoryview(bytearray(100)))
    backend.fail["reset"] = OSError(errno.EIO, "x")
    with pytest.raises(OSError, match="x"):
        device.reset()
    found = {hook: (s.calls, s.moved, s.errors) for hook, s in device.summary().items()}
    assert found == {
        "region_read": (3, 24, 0),
        "region_write": (1, 2, 0),
        "migration_read_data": (1, 6, 0),
        "reset": (1, 0, 1),
    }
    for summary in device.summary().values():
        assert 0 < summary.p50 <= summary.p99 <= summary.max


def test_stats_sees_the_filters_inside(backend: MigratableBackend) -> None:
    device = Stats(Delay(Error(backend, region_read=1.0), region_read=0.02))
    refusals(device, 2)
    found = device.summary()["region_read"]
    assert (found.calls, found.errors) == (2, 2)
    assert found.max >= found.p50 >= 0.02


def test_the_report_is_a_table(backend: MigratableBackend) -> None:
    device = Stats(backend)
    assert device.report() == "no calls"
    for _ in range(12):
        read(device)
    device.dma_map(3, 0, 0, 4096, None)
    head, *rows = device.report().splitlines()
    assert head.split() == ["call", "calls", "bytes", "errors", "p50", "p99", "max"]
    assert [row.split()[:4] for row in rows] == [["region_read", "12", "48", "0"], ["dma_map", "1", "0", "0"]]
    assert len({len(line) for line in (head, *rows)}) == 1
    assert all(re.search(r"(\d[\d.]* (us|ms|s) *){3}$", row) for row in rows)


# trace


class Named(RecordingBackend):
    """Names its registers, as Device does."""

    def register_names(self, region: int, offset: int, size: int) -> tuple[str, ...]:
        if region == 1:
            raise ValueError("a bug")
        return tuple(f"r{place}" for place in range(offset, offset + size, 4)) if region == 0 else ()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines that were traced since the last call, without their times."""
    caplog.set_level(logging.INFO, trace.LOGGER)

    def taken() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == trace.LOGGER]
        caplog.clear()
        assert all(re.search(r", \d+ us$", line) for line in found)
        return [line.rpartition(",")[0] for line in found]

    return taken


Lines = Callable[[], list[str]]


def test_a_line_has_the_register_and_its_value(lines: Lines) -> None:
    backend = Named()
    device = Trace(Stats(backend))  # the names come through the filters between
    write(device, b"\x78\x56\x34\x12", offset=8)
    read(device, offset=8)
    read(device, CONFIG, 0x10, 2)
    write(device, bytes(range(24)), offset=0)
    write(device, bytes(48), offset=0)
    assert lines() == [
        "Named region_write bar0+0x8:u32 r8 = 0x12345678",
        "Named region_read bar0+0x8:u32 r8 = 0x12345678",
        "Named region_read config+0x10:u16 = 0x1110",
        f"Named region_write bar0+0x0 24 bytes r0 r4 r8 r12 r16 r20 = {bytes(range(16)).hex(' ')} ...",
        "Named region_write bar0+0x0 48 bytes r0 r4 r8 r12 r16 r20 r24 r28 ... = " + "00 " * 16 + "...",
    ]
    backend.close()


def test_a_line_for_every_other_command(backend: MigratableBackend, lines: Lines) -> None:
    device = Trace(backend, tag="dev")
    device.connected(None)  # type: ignore[arg-type] # this backend only keeps it
    with OwnedFd(os.memfd_create("guest")) as fd:
        number = fd.fileno()
        device.dma_map(3 | 4, 0x10, 0x1000, 0x2000, OwnedFd.duplicate(number))
        device.dma_map(1, 0, 0x8000, 0x1000, None)
    duplicate = backend.fds[0].fileno()
    device.set_irqs(2, ASSIGN, 0, 4, ())
    device.set_irqs(0, DISABLE, 0, 0, ())
    backend.quiescing = Quiescing()
    device.quiesce()
    backend.quiescing = None
    device.quiesce()
    device.dma_unmap(0, 0x1000, 0x2000)
    device.dma_unmap(1, 0x8000, 0x1000)
    device.reset()
    device.migration_set_state(DeviceState.STOP_COPY)
    device.migration_data_size()
    device.migration_read_data(memoryview(bytearray(100)))
    device.migration_write_data(memoryview(b"12345"))
    device.dma_logging_start(4096, [(0, 4096)])
    device.dma_logging_report(0, 0x8000, 4096, memoryview(bytearray(8)))
    device.dma_logging_stop()
    device.disconnected()
    assert lines() == [
        "dev connected",
        f"dev dma_map 0x1000+0x2000 READ|WRITE|MMAP fd {duplicate} offset 0x10",
        "dev dma_map 0x8000+0x1000 READ",
        "dev set_irqs msix 0+4 DATA_EVENTFD|ACTION_TRIGGER",
        "dev set_irqs intx 0+0 DATA_NONE|ACTION_TRIGGER",
        "dev quiesce -> later",
        "dev quiesce",
        "dev dma_unmap 0x1000+0x2000",
        "dev dma_unmap 0x8000+0x1000 GET_DIRTY_BITMAP",
        "dev reset",
        "dev migration_set_state STOP_COPY",
        "dev migration_data_size = 0",
        "dev migration_read_data 100 bytes -> 0 bytes",
        "dev migration_write_data 5 bytes",
        "dev dma_logging_start page 0x1000 ranges 1 -> page 0x1000",
        "dev dma_logging_report 0x0+0x8000 page 0x1000",
        "dev dma_logging_stop",
        "dev disconnected",
    ]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EPERM, "x"), "EPERM"),
        (OSError(4095, "x"), "4095"),
        (TransitionError("x"), "EINVAL"),
        (TimeoutError(), "ETIMEDOUT"),
        (KeyError("x"), "EIO (KeyError)"),
    ],
)
def test_a_refusal_is_named(backend: MigratableBackend, lines: Lines, error: Exception, text: str) -> None:
    backend.fail["region_write"] = error
    with pytest.raises(type(error)):
        write(Trace(backend), b"\1\0\0\0")
    assert lines() == [f"MigratableBackend region_write bar0+0x0:u32 = 0x00000001 -> {text}"]


def test_a_device_that_fails_to_name_its_registers_works_on(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    backend = Named()
    device = Trace(backend)
    write(device, b"a", region=1)
    write(device, b"b", region=1)
    assert caplog.text.count("Named failed to name its registers") == 1
    assert lines() == [f"Named region_write bar1+0x0:u8 = {value}" for value in ("0x61", "0x62")]
    assert backend.calls == [("region_write", 1, 0, b"a"), ("region_write", 1, 0, b"b")]
    backend.close()


def test_trace_of_one_region(backend: MigratableBackend, lines: Lines) -> None:
    device = Trace(backend, region=CONFIG)
    read(device)
    device.reset()
    read(device, CONFIG)
    assert lines() == ["MigratableBackend region_read config+0x0:u32 = 0x03020100"]


def test_trace_of_slow_calls(backend: MigratableBackend, lines: Lines) -> None:
    device = Trace(Delay(backend, reset=0.02), min_us=15_000)
    device.reset()
    backend.act["region_read"] = lambda: time.sleep(0.02)
    read(device)
    assert [line.split()[1] for line in lines()] == ["reset", "region_read"]
    read(Trace(backend, min_us=10**9))
    assert lines() == []


def test_trace_that_nobody_listens_to(backend: MigratableBackend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, trace.LOGGER)
    read(Trace(backend))
    assert not caplog.records
    assert backend.calls == [("region_read", 0, 0, 4)]


def test_bytes_that_are_shown(backend: MigratableBackend, lines: Lines) -> None:
    write(Trace(backend, bytes=0), bytes(9))
    write(Trace(backend, bytes=9), bytes(9))
    assert [line.rpartition("= ")[2] for line in lines()] == [" ...", "00 00 00 00 00 00 00 00 00"]


# Descriptors


@pytest.mark.parametrize("make", [Trace, Stats, lambda backend: Delay(backend, all=0), Trap, ReadOnly])
def test_a_descriptor_goes_to_the_device(make: Callable[[ServerBackend], Filter]) -> None:
    with no_fd_leaks():
        backend = RecordingBackend()
        fd = OwnedFd(os.memfd_create("guest"))
        make(backend).dma_map(7, 0, 0, 4096, fd)
        assert backend.fds == [fd]
        assert not fd.closed
        backend.close()


def test_a_descriptor_that_was_refused_stays_the_callers(backend: MigratableBackend) -> None:
    with OwnedFd(os.memfd_create("guest")) as fd:
        with pytest.raises(OSError, match="refused"):
            Error(backend, dma_map=1.0).dma_map(7, 0, 0, 4096, fd)
        assert not fd.closed
    assert backend.fds == []
