"""A device behind a server that knows nothing of control sockets, and the proxy that gives it one."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfio_user import Client, Irq, Region, Server, ServerBackend
from vfio_user.client.control import AccessMode, ControlClient
from vfio_user.devices.edu import Edu
from vfio_user.errors import CommandError, ConnectionClosedError, MigrationError
from vfio_user.fds import OwnedFd
from vfio_user.filters.base import Filter
from vfio_user.live.offer import DeviceOffer
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.testing.served import ServedDevice
from vfio_user.wire.constants import Command, DeviceFeature, DeviceState, IrqSetFlags, PciIrq

from .check_support import check, not_passed
from .control_support import (
    ASK,
    BAR0,
    CONFIG,
    DMA_TO,
    LEVEL,
    PAGE,
    RAM,
    VALUE,
    Answering,
    Bench,
    Pad,
    refusal,
    wait_until,
)
from .device_support import TIMEOUT, Event, guest_memory
from .proxy_support import Strict, bench_before, lost, proxied
from .support import RawPeer, RecordingBackend
from .test_check_rust import RecordedServer
from .test_vectors import recorded
from .tools_support import command

LISTEN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
RAISE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
COMMAND, INTX_DISABLE = 4, 1 << 10


@pytest.fixture
def pad() -> Pad:
    return Pad()


@pytest.fixture
def bench(pad: Pad) -> Iterator[Bench]:
    with bench_before(pad) as bench:
        yield bench


@pytest.fixture
def events() -> Iterator[list[Event]]:
    made = [Event() for _ in range(4)]
    yield made
    for event in made:
        os.close(event.fd)


# What passes


def test_accesses_pass(bench: Bench, pad: Pad) -> None:
    primary = bench.primary()
    primary.region_write(BAR0, VALUE, b"\x11\x22\0\0")
    assert (pad.value, primary.region_read(BAR0, VALUE, 4)) == (0x2211, b"\x11\x22\0\0")
    assert primary.region_read(CONFIG, 0, 4) == b"\x4f\x49\x0c\x0c"
    assert refusal(lambda: primary.region_write(5, 0, b"1")) == errno.EINVAL
    primary.reset()
    assert pad.value == 0


def test_it_is_the_same_device_to_a_client(bench: Bench) -> None:
    primary = bench.primary()
    with ServedDevice(Pad()) as served, Client.connect(served.path, TIMEOUT) as direct:
        assert seen(primary) == seen(direct)
        assert primary.migration_flags() == direct.migration_flags()


def test_memory_of_a_bar_is_the_servers_own(bench: Bench) -> None:
    fd = os.memfd_create("bar")
    os.ftruncate(fd, 2 * PAGE)

    class Mapped(ServerBackend):
        regions = [Region(2 * PAGE, 3, fd, 0, [(PAGE, PAGE)])]
        irqs = [Irq(1)]

    try:
        with bench_before(Mapped()) as bench:
            (area,) = bench.primary().regions[0].map()
            area.memory[:4] = b"here"
            assert os.pread(fd, 4, PAGE) == b"here"
            assert (area.offset, area.size) == (PAGE, PAGE)
            area.memory.release()
    finally:
        os.close(fd)


def test_interrupts_go_straight_to_the_client(bench: Bench, pad: Pad, events: list[Event]) -> None:
    primary = bench.primary()
    primary.set_irqs(PciIrq.MSIX, LISTEN, 0, 4, [event.fd for event in events])
    pad.irq.trigger(2)
    events[2].wait()
    primary.set_irqs(PciIrq.MSIX, RAISE, 0, 0)
    pad.irq.trigger(2)
    assert [event.take() for event in events] == [0] * 4


def test_dma_by_files_and_by_messages(bench: Bench) -> None:
    primary = bench.primary()
    shared, buffer = bench.memory(primary), bytearray(b"memory by messages".ljust(PAGE))
    primary.dma_map(0, PAGE, memory=buffer)
    bench.dirty(primary, RAM + 16)
    assert shared[16:24] == b"\xdd" * 8
    assert primary.region_read(BAR0, ASK, 8) == b"memory b"
    bench.dirty(primary, 8)
    assert buffer[:24] == b"memory b" + b"\xdd" * 8 + b"es      "
    primary.dma_unmap(RAM, 16 * PAGE)
    assert refusal(lambda: bench.dirty(primary, RAM)) == errno.EFAULT


def test_the_server_has_nothing_left_of_a_client_that_left(bench: Bench, pad: Pad, events: list[Event]) -> None:
    with Client.connect(bench.path, TIMEOUT) as primary, guest_memory(PAGE) as fd:
        primary.dma_map(RAM, PAGE, fd)
        primary.set_irqs(PciIrq.MSIX, LISTEN, 0, 1, [events[0].fd])
        primary.region_write(BAR0, VALUE, b"stay")
    assert bench.primary().region_read(BAR0, VALUE, 4) == b"stay"
    assert not len(pad.dma)
    assert not pad.irq.message_signalled


def test_no_descriptor_is_left_of_clients_that_came_and_went(events: list[Event]) -> None:
    with no_fd_leaks(), bench_before(Pad()) as bench, guest_memory(4 * PAGE) as fd:
        for _ in range(3):
            with Client.connect(bench.path, TIMEOUT) as primary:
                primary.dma_map(RAM, 4 * PAGE, fd)
                primary.dma_map(0, PAGE)
                primary.set_irqs(PciIrq.MSIX, LISTEN, 0, 4, [event.fd for event in events])
                primary.set_irqs(PciIrq.INTX, LISTEN, 0, 1, [events[0].fd])
        bench.control().status()


# The control socket


def test_what_looks_works_with_and_without_a_client(bench: Bench, pad: Pad) -> None:
    control = bench.control()
    pad.value = 7
    assert control.region_read(BAR0, VALUE, 1) == b"\7"
    assert not control.status().connected
    primary = bench.primary()
    assert control.region_read(BAR0, VALUE, 1) == primary.region_read(BAR0, VALUE, 1) == b"\7"
    assert control.status().connected
    assert len(control.regions) == len(primary.regions) == 9
    assert refusal(lambda: control.region_write(BAR0, VALUE, b"1")) == errno.EPERM


def test_state_that_was_loaded_before_the_client_came_is_there(bench: Bench, pad: Pad) -> None:
    pad.value = 0x77
    control = bench.control()
    control.migration_set_state(DeviceState.STOP_COPY)
    data = control.migration_read_data(1 << 16)
    control.migration_set_state(DeviceState.STOP)
    pad.value = 0
    control.migration_set_state(DeviceState.RESUMING)
    control.migration_write_data(data)
    control.migration_set_state(DeviceState.RUNNING)
    assert bench.primary().region_read(BAR0, VALUE, 1) == b"\x77"


def test_what_the_device_wrote_is_pushed_once(bench: Bench) -> None:
    primary, control = bench.primary(), bench.control()
    shared = bench.memory(primary)
    assert control.dma_logging_start(PAGE) == PAGE
    bench.dirty(primary, RAM + 8, RAM + 5 * PAGE, RAM + 16 * PAGE - 8)
    assert control.status().dirty_pages == 3
    control.migration_set_state(DeviceState.STOP)
    shared[0] = 0xEE
    with Answering(primary):
        assert control.push() == 3
        assert control.push() == 0
    assert shared[0] == 0xEE
    control.dma_logging_stop()
    assert refusal(control.push) == errno.ENODATA


def test_a_push_that_is_refused_is_made_good_later(bench: Bench) -> None:
    control = bench.control()
    with RawPeer.connect(bench.path) as primary, guest_memory(4 * PAGE) as fd:
        primary.version()
        primary.ok(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, RAM, 4 * PAGE), [fd])
        control.dma_logging_start(PAGE)
        primary.region_write(BAR0, DMA_TO, RAM.to_bytes(8, "little"))
        control.migration_set_state(DeviceState.STOP)
        found: list[int] = []
        pushing = threading.Thread(target=lambda: found.append(refusal(control.push)))
        pushing.start()
        primary.reply(primary.read(), flags=0x21, error=errno.ENODEV)
        pushing.join(TIMEOUT)
        assert found == [errno.ENODEV]
        assert control.status().dirty_pages == 1


def test_accesses_are_held_until_the_device_runs(bench: Bench, pad: Pad) -> None:
    control = bench.control()
    control.set_access(AccessMode.HOLD)
    with RawPeer.connect(bench.path) as primary:
        primary.version()
        control.migration_set_state(DeviceState.STOP)
        primary.post(Command.REGION_READ, struct.pack("<QII", VALUE, BAR0, 1))
        wait_until(lambda: control.status().held == 1)
        pad.value = 5
        control.migration_set_state(DeviceState.RUNNING)
        assert primary.read().payload[16:] == b"\5"


def test_accesses_in_dummy_mode_do_not_reach_the_server(bench: Bench, pad: Pad) -> None:
    primary, control = bench.primary(), bench.control()
    control.set_access(AccessMode.DUMMY)
    control.migration_set_state(DeviceState.STOP)
    pad.value, pad.accesses[:] = 5, []
    primary.region_write(BAR0, VALUE, b"\7")
    assert primary.region_read(BAR0, VALUE, 1) == b"\0"
    assert not pad.accesses


def test_a_pending_interrupt_comes_with_its_eventfd(bench: Bench, events: list[Event]) -> None:
    primary, control = bench.primary(), bench.control()
    control.set_irqs(PciIrq.MSIX, RAISE, 1, 1)
    primary.set_irqs(PciIrq.MSIX, LISTEN, 0, 2, [events[0].fd, events[1].fd])
    assert (events[0].take(), events[1].take()) == (0, 1)
    control.set_irqs(PciIrq.MSIX, RAISE, 0, 1)
    assert events[0].take() == 1


def test_intx_is_raised_again_for_a_device_that_does_not_do_that(
    bench: Bench, pad: Pad, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, control = bench.primary(), bench.control()
    primary.set_irqs(PciIrq.INTX, LISTEN, 0, 1, [events[0].fd])
    monkeypatch.setattr(pad.irq, "run", lambda: None)
    for level, bits, raised in ((1, 0, 1), (1, INTX_DISABLE, 0), (0, 0, 0)):
        primary.region_write(CONFIG, COMMAND, bits.to_bytes(2, "little"))
        primary.region_write(BAR0, LEVEL, bytes([level]))
        control.migration_set_state(DeviceState.STOP)
        events[0].take()
        control.migration_set_state(DeviceState.RUNNING)
        assert events[0].take() == raised


def test_it_answers_control_while_the_server_waits_for_the_client(bench: Bench) -> None:
    control = bench.control()
    with RawPeer.connect(bench.path) as primary, guest_memory(PAGE) as fd:
        primary.version()
        primary.ok(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, PAGE))
        primary.ok(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, RAM, PAGE), [fd])
        control.dma_logging_start(PAGE)
        asked = primary.post(Command.REGION_READ, struct.pack("<QII", ASK, BAR0, 4))
        request = primary.read()
        assert request.command == Command.DMA_READ
        assert control.status().state is DeviceState.RUNNING
        assert control.region_read(CONFIG, 0, 2) == b"\x4f\x49"
        assert primary.region_read(CONFIG, 0, 2) == b"\x4f\x49"  # so does the client itself
        primary.reply(request, request.payload[:16] + b"abcd")
        answer = primary.read()
        assert (answer.msg_id, answer.payload[16:]) == (asked, b"abcd")


def test_a_report_of_gigabytes_is_refused(bench: Bench) -> None:
    bench.memory(bench.primary())
    control = bench.control()
    control.dma_logging_start(PAGE)
    with bench.raw() as raw:
        for length in (1 << 47, 1 << 63, 0, PAGE - 1 << 40):
            request = struct.pack("<IIQQQ", 0xFFFF_FFFF, 1 << 16 | DeviceFeature.DMA_LOGGING_REPORT, RAM, length, PAGE)
            assert raw.refused(Command.DEVICE_FEATURE, request)
    assert control.dma_logging_report(RAM, 16 * PAGE, PAGE) == bytes(8)


# Servers that have less


class Without(Filter):
    """Refuses some hooks, as a device does that has them not."""

    def __init__(self, backend: ServerBackend, *hooks: str) -> None:
        super().__init__(backend)
        for hook in hooks:
            setattr(self, hook, getattr(ServerBackend, hook).__get__(self))


def test_a_device_that_cannot_migrate_passes_and_says_so() -> None:
    device = RecordingBackend()
    with contextlib.closing(device), bench_before(device) as bench:
        primary, control = bench.primary(), bench.control()
        primary.region_write(0, 0, b"1")
        assert primary.region_read(0, 0, 1) == b"1"
        assert control.status().state is None
        assert not control.probe(DeviceFeature.MIG_DEVICE_STATE)
        with pytest.raises(MigrationError, match="cannot migrate"):
            DeviceOffer.of(control)


def test_a_device_without_a_log_moves_cold_only() -> None:
    with bench_before(Without(Pad(), "dma_logging_start", "migration_data_size")) as bench:
        for client in (bench.primary(), bench.control()):
            assert not client.probe(DeviceFeature.DMA_LOGGING_START)
            assert not client.probe(DeviceFeature.MIG_DATA_SIZE)
            assert client.probe(DeviceFeature.MIG_DEVICE_STATE)


@pytest.mark.parametrize("prefix", ["gpio/", "sparse/"])
def test_the_rust_crates_server_as_it_was_recorded_passes(prefix: str, tmp_path: Path) -> None:
    path, vectors = tmp_path / "rust.sock", [*recorded(f"rustclient/{prefix}"), *recorded(prefix)]
    with guest_memory(0x400000) as memory, contextlib.closing(RecordedServer(path, vectors, memory)) as server:
        server.start()
        with Client.connect(path, TIMEOUT) as direct:
            expected = seen(direct)
        with proxied(path) as bench:
            assert seen(bench.primary()) == expected
            assert bench.control().status().state is None


def seen(client: Client) -> object:
    """What a device is to a client: that a region can be mapped says its descriptor."""
    regions = [(region.size, region.flags & 3, region.mmap_areas) for region in client.regions]
    return client.info, regions, client.irqs


class Wants(Filter):
    """Logs only what it is told, as the kernel."""

    def dma_logging_start(self, page_size: int, ranges: Any) -> int:
        if not ranges:
            raise OSError(errno.EINVAL, "what is there to log?")
        return self.backend.dma_logging_start(page_size, ranges)


class Silent(Filter):
    """Does not say what it logged."""

    silent = True

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        if self.silent:
            raise OSError(errno.EIO, "who knows")
        self.backend.dma_logging_report(iova, length, page_size, bitmap)


def test_a_log_that_wants_to_be_told_is_told_what_is_mapped() -> None:
    with bench_before(Wants(Pad())) as bench:
        primary, control = bench.primary(), bench.control()
        bench.memory(primary)
        assert control.dma_logging_start(PAGE) == PAGE
        bench.dirty(primary, RAM + PAGE)
        assert control.status().dirty_pages == 1
        with guest_memory(4 * PAGE) as fd:  # what comes later is not in that log: all of it may be dirty
            primary.dma_map(1 << 30, 4 * PAGE, fd, memory=bytearray(4 * PAGE))
        assert control.status().dirty_pages == 5
        control.migration_set_state(DeviceState.STOP)
        with Answering(primary):
            assert control.push() == 5


@pytest.mark.parametrize(("kind", "pages"), [(Filter, 1), (Wants, 1), (Silent, 16)])
def test_what_was_logged_of_memory_that_is_mapped_anew_is_pushed(kind: type[Filter], pages: int) -> None:
    """The server forgets it; one that does not tell before may have written to all of it."""
    device = kind(Pad())
    with bench_before(device) as bench, guest_memory(16 * PAGE) as fd:
        primary, control = bench.primary(), bench.control()
        primary.dma_map(RAM, 16 * PAGE, fd)
        assert control.dma_logging_start(PAGE) == PAGE
        bench.dirty(primary, RAM + PAGE)
        primary.dma_unmap(RAM, 16 * PAGE)
        control.migration_set_state(DeviceState.STOP)
        assert refusal(control.push) == errno.ENOTRECOVERABLE
        primary.dma_map(RAM, 16 * PAGE, fd, memory=bytearray(16 * PAGE))
        if isinstance(device, Silent):
            device.silent = False
        with Answering(primary):
            assert control.push() == pages


def test_what_a_standing_server_does_not_take_is_done_when_it_runs(events: list[Event]) -> None:
    pad = Pad()
    with bench_before(Strict(pad)) as bench:
        primary, control = bench.primary(), bench.control()
        old = bench.memory(primary)
        control.migration_set_state(DeviceState.STOP)
        primary.set_irqs(PciIrq.MSIX, LISTEN, 0, 1, [events[0].fd])
        primary.dma_unmap(RAM, 16 * PAGE)
        shared = bench.memory(primary, 4)
        assert not pad.irq.message_signalled
        control.migration_set_state(DeviceState.RUNNING)
        pad.irq.trigger(0)
        events[0].wait()
        bench.dirty(primary, RAM)
        assert (shared[:8], old[:8]) == (b"\xdd" * 8, bytes(8))


class Small(Filter):
    """Has no room for memory at an address."""

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        if address == 0:
            raise OSError(errno.ENOSPC, "no room")
        self.backend.dma_map(flags, offset, address, size, fd)


def test_a_refusal_of_what_was_put_off_keeps_nothing_else_from_being_done(events: list[Event]) -> None:
    pad = Pad()
    with bench_before(Strict(Small(pad))) as bench, guest_memory(PAGE) as fd:
        primary, control = bench.primary(), bench.control()
        primary.set_irqs(PciIrq.INTX, LISTEN, 0, 1, [events[1].fd])
        primary.region_write(BAR0, LEVEL, b"\1")
        control.migration_set_state(DeviceState.STOP)
        events[1].take()
        primary.dma_map(0, PAGE, fd)
        primary.dma_map(RAM, PAGE, fd)
        assert refusal(lambda: control.migration_set_state(DeviceState.RUNNING)) == errno.ENOSPC
        assert control.migration_get_state() is DeviceState.RUNNING
        assert [address for address, _, _ in pad.dma] == [RAM]
        assert events[1].take()
        primary.dma_map(2 * RAM, PAGE, fd)
        primary.set_irqs(PciIrq.MSIX, LISTEN, 0, 1, [events[0].fd])
        assert [address for address, _, _ in pad.dma] == [RAM, 2 * RAM]
        pad.irq.trigger(0)
        events[0].wait()


def test_what_was_put_off_is_done_when_a_reset_has_the_device_run() -> None:
    pad = Pad()
    with bench_before(Strict(pad)) as bench, guest_memory(PAGE) as fd:
        primary, control = bench.primary(), bench.control()
        control.migration_set_state(DeviceState.STOP_COPY)
        primary.region_write(CONFIG, COMMAND, b"\6\0")  # the reset would have undone that
        primary.dma_map(RAM, PAGE, fd)
        primary.reset()
        assert [address for address, _, _ in pad.dma] == [RAM]
        assert primary.region_read(CONFIG, COMMAND, 2) == b"\0\0"
        primary.dma_unmap(RAM, PAGE)
        assert not len(pad.dma)


def test_config_space_can_be_used_while_the_server_refuses_that() -> None:
    pad = Pad()
    with bench_before(Strict(pad)) as bench:
        primary, control = bench.primary(), bench.control()
        control.migration_set_state(DeviceState.STOP_COPY)
        before = control.region_read(CONFIG, 0, 256)
        assert before[:4] == b"\x4f\x49\x0c\x0c"
        primary.region_write(CONFIG, COMMAND, b"\x06\x04")
        assert control.region_read(CONFIG, COMMAND, 2) == b"\x06\x04"
        assert refusal(lambda: control.region_read(BAR0, VALUE, 1)) == errno.EINVAL
        control.migration_set_state(DeviceState.STOP)
        assert control.region_read(CONFIG, COMMAND, 2) == b"\x06\x04"  # though the server would answer now
        assert primary.region_read(BAR0, VALUE, 1) == b"\0"
        control.migration_set_state(DeviceState.RUNNING)
        assert control.region_read(CONFIG, COMMAND, 2) == b"\x06\x04"


def test_what_is_put_off_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_user.tools.proxy.standing.MAX_PUT_OFF", 3)
    with bench_before(Strict(Pad())) as bench:
        primary, control = bench.primary(), bench.control()
        control.migration_set_state(DeviceState.STOP_COPY)
        for _ in range(3):
            primary.region_write(CONFIG, COMMAND, b"\x06\0")
        assert refusal(lambda: primary.region_write(CONFIG, COMMAND, b"\x07\0")) == errno.ENOSPC
        assert refusal(lambda: primary.set_irqs(PciIrq.MSIX, RAISE, 0, 0)) == errno.ENOSPC
        assert control.region_read(CONFIG, COMMAND, 1) == b"\6"


def test_what_a_server_refuses_for_another_reason_is_refused(bench: Bench) -> None:
    primary, control = bench.primary(), bench.control()
    control.migration_set_state(DeviceState.STOP)
    assert refusal(lambda: primary.dma_map(0xFFF, 1 << 60, memory=None)) == errno.ENOSPC


class Full(Filter):
    """Has no room for memory, once."""

    refused = False

    def dma_map(self, *arguments: Any) -> None:
        if not self.refused:
            self.refused = True
            raise OSError(errno.ENOMEM, "no room")
        self.backend.dma_map(*arguments)


def test_memory_that_the_server_did_not_take_can_be_mapped_later() -> None:
    with bench_before(Full(Pad())) as bench:
        primary = bench.primary()
        assert refusal(lambda: bench.memory(primary)) == errno.ENOMEM
        shared = bench.memory(primary)
        bench.dirty(primary, RAM)
        assert shared[:8] == b"\xdd" * 8


# Who comes and goes


@contextlib.contextmanager
def served_at(device: ServerBackend, path: Path) -> Iterator[None]:
    with Server(device, path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join(TIMEOUT)


def test_without_a_server_the_client_is_let_go_and_control_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "none"
    with proxied(path) as bench:
        with pytest.raises(ConnectionClosedError):
            bench.primary()
        with pytest.raises(CommandError) as raised:
            bench.control()
        assert raised.value.errno == errno.ENOTCONN
        with RawPeer.connect(bench.control_path) as peer:
            peer.version()
    assert f"{path}: No such file or directory" in caplog.text


def test_a_server_that_dies_takes_its_client_along_and_the_next_one_has_another() -> None:
    with ServedDevice(Pad()) as served, proxied(served.path) as bench:
        control, raw = bench.control(), bench.raw()
        primary = bench.primary()
        path = served.path
        served.stop()
        wait_until(lambda: lost(primary))
        assert refusal(lambda: control.region_read(CONFIG, 0, 4)) == errno.ENOTCONN
        assert raw.refused(Command.DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0)) == errno.ENOTCONN
        path.parent.mkdir()
        with served_at(Pad(), path):
            assert bench.primary().region_read(CONFIG, 0, 2) == b"\x4f\x49"
            assert control.region_read(CONFIG, 0, 2) == b"\x4f\x49"
        path.parent.rmdir()


def test_a_server_that_went_while_nobody_was_there_is_connected_to_anew(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with proxied(path) as bench, contextlib.ExitStack() as stack:
        for value in (b"\1", b"\2"):
            pad = Pad()
            pad.value = value[0]
            stack.enter_context(served_at(pad, path))
            with ControlClient.connect(bench.control_path, TIMEOUT) as control:
                assert control.region_read(BAR0, VALUE, 1) == value
            stack.pop_all().close()


# By command


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(alive))
        listener.listen()
        for listen, control, reason in (
            (tmp_path / "no folder/s", tmp_path / "c", "no folder/s: No such file or directory"),
            (tmp_path / "s", alive, "alive: in use by another server"),
        ):
            command = [sys.executable, "-m", "vfio_user", "proxy", "up", "--socket-path", listen, "--control", control]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert reason in done.stderr
    assert list(tmp_path.iterdir()) == [alive]


@pytest.mark.parametrize("timeout", ["nan", "inf", "1e30", "0"])
def test_a_timeout_that_is_none_is_wrong_usage(timeout: str) -> None:
    done = command("proxy", "up", "--socket-path", "s", "--control", "c", "--timeout", timeout)
    assert (done.status, "is not in the range" in done.err) == (2, True), done.err


def test_who_insists_does_not_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hangs:
        hangs.bind(str(tmp_path / "up"))
        hangs.listen()
        places = [tmp_path / name for name in ("up", "s", "c")]
        words = [
            sys.executable,
            "-m",
            "vfio_user",
            "proxy",
            places[0],
            "--socket-path",
            places[1],
            "--control",
            places[2],
        ]
        with subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{places[0]} is served at {places[1]}, managed at {places[2]}\n"
            assert stat.S_IMODE(places[2].stat().st_mode) == 0o600
            with RawPeer.connect(places[1]), hangs.accept()[0] as peer:
                peer.settimeout(TIMEOUT)
                assert peer.recv(1)
                process.terminate()
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=TIMEOUT)
        assert said == "vfio-user: interrupted\n"
        assert not places[1].exists()
        assert not places[2].exists()


def test_nothing_that_a_server_must_keep_is_broken_on_the_way() -> None:
    with bench_before(Edu()) as bench:
        assert not_passed(check(bench.path, "info", "region", "feature", "logging")) == {}
