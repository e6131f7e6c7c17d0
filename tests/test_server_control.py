"""The control socket: what it takes and refuses, push, the access modes, and how it waits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfio_user import Client, DeviceState, Server, ServerBackend, aio
from vfio_user.client.control import AccessMode, ControlClient, ControlStatus
from vfio_user.errors import CommandError, NegotiationError
from vfio_user.server import Quiescing
from vfio_user.wire.commands import COMMANDS, CONTROL_COMMANDS, Role
from vfio_user.wire.constants import Command, ControlCommand, DeviceFeature, IrqSetFlags, PciIrq, PciRegion, RegionFlags

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
    bench_of,
    refusal,
    wait_until,
)
from .device_support import TIMEOUT, events, guest_memory
from .support import RawPeer, access, message

pytestmark = pytest.mark.timeout(60)

TRIGGER = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER


@pytest.fixture
def device() -> Pad:
    return Pad()


@pytest.fixture
def bench(device: Pad) -> Iterator[Bench]:
    with bench_of(device) as one:
        yield one


# The socket


def test_it_has_mode_0600_whatever_the_umask_and_is_removed(device: Pad) -> None:
    before = os.umask(0)
    try:
        with bench_of(device) as bench:
            assert stat.S_IMODE(bench.control_path.stat().st_mode) == 0o600
            assert stat.S_IMODE(bench.path.stat().st_mode) == 0o777
            folder = bench.path.parent
            bench.server.remove_socket()
            assert list(folder.iterdir()) == []
    finally:
        os.umask(before)


def test_a_stale_one_is_replaced_a_live_one_is_not(tmp_path: Path, device: Pad) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(tmp_path / "c"))
    stale.close()
    with Server(device, tmp_path / "s", control=tmp_path / "c"):
        with pytest.raises(OSError, match="in use") as raised:
            Server(device, tmp_path / "s2", control=tmp_path / "c")
        assert raised.value.errno == errno.EADDRINUSE
        assert not (tmp_path / "s2").exists()


def test_a_client_is_told_when_it_is_no_control_socket(bench: Bench) -> None:
    with pytest.raises(NegotiationError, match="no control socket"):
        ControlClient.connect(bench.path, TIMEOUT)
    assert bench.primary().capabilities.has_control is False


def test_it_is_served_without_a_primary_client_beside_one_and_after_it(bench: Bench) -> None:
    control = bench.control()
    assert control.status() == ControlStatus(AccessMode.PASS, 0, 0, 0, DeviceState.RUNNING, False)
    with bench.primary() as primary:
        primary.region_write(BAR0, VALUE, b"\x2a\0\0\0")
        assert control.region_read(BAR0, VALUE, 4) == b"\x2a\0\0\0"
        assert control.status().connected
    with bench.primary() as primary:
        assert primary.region_read(BAR0, VALUE, 4) == control.region_read(BAR0, VALUE, 4)
    assert control.region_read(CONFIG, 0, 4) == struct.pack("<HH", 0x494F, 0x0C0C)


def test_an_event_loop_serves_it_too(tmp_path: Path, device: Pad) -> None:
    with Server(device, tmp_path / "s", control=tmp_path / "c") as server:
        stop = threading.Event()

        def loop() -> None:
            poll = select.poll()
            poll.register(server.fileno(), select.POLLIN)
            while not stop.is_set():
                if poll.poll(20):
                    server.poll()

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            with ControlClient.connect(tmp_path / "c", TIMEOUT) as control:
                assert not control.status().connected
                with Client.connect(tmp_path / "s", TIMEOUT) as primary:
                    assert control.status().connected
                    primary.region_write(BAR0, VALUE, b"\x07\0\0\0")
                    assert control.region_read(BAR0, VALUE, 4) == b"\x07\0\0\0"
        finally:
            stop.set()
            thread.join(TIMEOUT)


async def test_the_asyncio_twins(tmp_path: Path, device: Pad) -> None:
    async with aio.Server(device, tmp_path / "s", control=tmp_path / "c") as server:
        serving = asyncio.create_task(server.serve_forever())
        try:
            async with await aio.ControlClient.connect(tmp_path / "c", TIMEOUT) as control:
                await control.set_access(AccessMode.DUMMY)
                assert (await control.status()).access is AccessMode.DUMMY
                with pytest.raises(CommandError):
                    await control.push()
        finally:
            server.shutdown()
            await serving


# What it takes


def test_regions_come_without_descriptors_and_only_to_be_read(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    assert [region.size for region in control.regions] == [region.size for region in primary.regions]
    assert {region.flags for region in control.regions} == {RegionFlags(0), RegionFlags.READ}
    assert control.irqs == primary.irqs
    assert control.info == primary.info


@pytest.mark.parametrize(
    "command", sorted(set(COMMANDS) - set(CONTROL_COMMANDS) - {Command.DMA_READ, Command.DMA_WRITE})
)
def test_what_is_the_vmms_is_refused(bench: Bench, command: int) -> None:
    row = COMMANDS[command]
    assert row.sender is Role.CLIENT
    peer = bench.raw()
    assert peer.refused(command, bytes(row.request.LAYOUT.size)) == errno.EPERM
    assert bench.device.accesses == []


@pytest.mark.parametrize("command", [0, 14, 99, 0x8000, 0x8004, 0xFFFF, Command.DMA_READ])
def test_what_is_no_command_is_refused(bench: Bench, command: int) -> None:
    assert bench.raw().refused(command, bytes(64)) in (errno.EINVAL, errno.EPERM)


@pytest.mark.parametrize("command", ControlCommand)
def test_the_extension_is_refused_unless_negotiated(bench: Bench, command: ControlCommand) -> None:
    assert bench.raw().refused(command, bytes(4)) == errno.ENOTSUP
    newer = b'{"capabilities":{"x_control":{"version":2}}}\0'
    assert bench.raw(newer).refused(command, bytes(4)) == errno.ENOTSUP
    assert bench.device.accesses == []


def test_the_primary_socket_knows_nothing_of_it(bench: Bench) -> None:
    with RawPeer.connect(bench.path) as peer:
        assert b"x_control" not in peer.version(b'{"capabilities":{"x_control":{"version":1}}}\0').payload
        assert [peer.refused(command, bytes(4)) for command in ControlCommand] == [errno.EINVAL] * 3


def test_descriptors_are_refused_and_closed(bench: Bench) -> None:
    peer = bench.raw()
    reader, writer = os.pipe()
    request = struct.pack("<IIIII", 20, ASSIGN, PciIrq.MSIX, 0, 1)
    assert peer.refused(Command.DEVICE_SET_IRQS, request, [writer]) == errno.EINVAL
    assert peer.refused(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0), [writer]) == errno.EINVAL
    os.close(writer)
    assert os.read(reader, 1) == b""  # the server's copies are closed, too
    os.close(reader)


@pytest.mark.parametrize(
    ("flags", "start", "count"),
    [
        (TRIGGER, 0, 0),  # that would take away all eventfds
        (ASSIGN, 0, 1),
        (IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK, 0, 1),
        (IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK, 0, 1),
        (IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_TRIGGER, 0, 1),
    ],
)
def test_interrupts_are_the_primarys(bench: Bench, flags: int, start: int, count: int) -> None:
    control = bench.control()
    assert refusal(lambda: control.set_irqs(PciIrq.MSIX, flags, start, count)) == errno.EPERM


def test_a_trigger_without_an_eventfd_is_pending_until_there_is_one(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    control.set_irqs(PciIrq.MSIX, TRIGGER, 1, 2)
    assert bench.device.irq.pba() == (0b110).to_bytes(8, "little")
    with events(4) as signals:
        primary.set_irqs(PciIrq.MSIX, ASSIGN, 0, 4, [signal.fd for signal in signals])
        assert [signal.take() for signal in signals] == [0, 1, 1, 0]
        control.set_irqs(PciIrq.MSIX, TRIGGER, 3, 1)
        assert signals[3].wait() == 1
    assert bench.device.irq.pba() == bytes(8)


def test_entering_running_raises_intx_again_while_its_cause_stands(bench: Bench) -> None:
    """What was asserted is never assumed to have arrived: nor at a destination that never saw it raised."""
    control, primary = bench.control(), bench.primary()
    with events(1) as (line,):
        primary.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [line.fd])
        primary.region_write(BAR0, LEVEL, b"\1")
        assert line.wait() == 1
        control.migration_set_state(DeviceState.STOP)
        assert line.take() == 0
        control.migration_set_state(DeviceState.RUNNING)
        assert line.wait() == 1
        control.migration_set_state(DeviceState.STOP_COPY)
        stream = control.migration_read_data(1 << 16)
        control.migration_set_state(DeviceState.RUNNING)
        assert line.wait() == 1
        primary.region_write(BAR0, LEVEL, b"\0")
        with bench_of(Pad()) as other, events(1) as (there,):
            destination, vmm = other.control(), other.primary()
            vmm.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [there.fd])
            destination.migration_set_state(DeviceState.RESUMING)
            destination.migration_write_data(stream)
            destination.migration_set_state(DeviceState.STOP)
            assert there.take() == 0
            destination.migration_set_state(DeviceState.RUNNING)
            assert there.wait() == 1
        control.migration_set_state(DeviceState.STOP)
        control.migration_set_state(DeviceState.RUNNING)
        assert line.take() == 0


def test_its_leaving_changes_nothing(bench: Bench) -> None:
    primary = bench.primary()
    shared = bench.memory(primary)
    with events(4) as signals:
        primary.set_irqs(PciIrq.MSIX, ASSIGN, 0, 4, [signal.fd for signal in signals])
        with bench.control() as control:
            control.dma_logging_start(PAGE)
            control.set_access(AccessMode.HOLD)
            control.migration_set_state(DeviceState.STOP)
            assert control.migration_get_state() is DeviceState.STOP
        again = bench.control()
        assert again.status() == ControlStatus(AccessMode.HOLD, 0, PAGE, 0, DeviceState.STOP, True)
        again.migration_set_state(DeviceState.RUNNING)
        bench.dirty(primary, RAM + 5)
        assert shared[5:13] == b"\xdd" * 8
        again.set_irqs(PciIrq.MSIX, TRIGGER, 2, 1)
        assert signals[2].wait() == 1


def test_a_running_device_is_saved_and_loaded_through_it(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    primary.region_write(BAR0, VALUE, b"\x2a\0\0\0")
    control.migration_set_state(DeviceState.STOP_COPY)
    assert refusal(lambda: primary.region_read(BAR0, VALUE, 4)) == errno.EINVAL  # its context follows
    stream = b""
    while part := control.migration_read_data(100):
        stream += part
    control.migration_set_state(DeviceState.RUNNING)
    primary.region_write(BAR0, VALUE, b"\x07\0\0\0")
    control.migration_set_state(DeviceState.RESUMING)
    control.migration_write_data(stream)
    control.migration_set_state(DeviceState.RUNNING)
    assert primary.region_read(BAR0, VALUE, 4) == b"\x2a\0\0\0"


def test_what_the_primary_mapped_is_reported(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    bench.memory(primary)
    control.dma_logging_start(PAGE)
    bench.dirty(primary, RAM + PAGE * 3)
    assert control.status().dirty_pages == 1
    assert control.status().dirty_bytes == PAGE
    assert control.dma_logging_report(RAM, 8 * PAGE, PAGE)[0] == 0b1000
    assert refusal(lambda: control.dma_logging_report(RAM + (1 << 30), PAGE, PAGE)) == errno.ENOENT
    control.dma_logging_stop()


# Push


def test_push_writes_a_byte_of_each_dirty_page_back_by_messages(bench: Bench) -> None:
    control = bench.control()
    with RawPeer.connect(bench.path) as primary, guest_memory(16 * PAGE) as fd:
        primary.version()
        primary.ok(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, RAM, 16 * PAGE), [fd])
        control.dma_logging_start(PAGE)
        for address in (RAM, RAM + 2 * PAGE - 4, RAM + 9 * PAGE + 8):
            primary.region_write(BAR0, DMA_TO, struct.pack("<Q", address))
        control.migration_set_state(DeviceState.STOP)
        os.pwrite(fd, b"\x01", 0)
        os.pwrite(fd, b"\x02", 9 * PAGE)
        counted: list[int] = []
        thread = threading.Thread(target=lambda: counted.append(control.push()))
        thread.start()
        writes = []
        while (request := primary.read()).command == Command.DMA_WRITE:
            address, count = struct.unpack("<QQ", request.payload[:16])
            writes.append((address, count, request.payload[16:], request.flags))
            if not request.flags:
                primary.check_alive()  # commands are served meanwhile
                primary.reply(request, request.payload[:16])
        assert request.command == Command.DMA_READ
        assert thread.is_alive()  # not before the barrier
        primary.reply(request, request.payload[:16] + b"\x01")
        thread.join(TIMEOUT)
        assert counted == [4]
        assert writes == [
            (RAM, 1, b"\x01", 0),
            (RAM + PAGE, 1, b"\0", 0x10),
            (RAM + 2 * PAGE, 1, b"\xdd", 0x10),
            (RAM + 9 * PAGE, 1, b"\x02", 0x10),
        ]
        assert control.status().dirty_pages == 0
        assert control.push() == 0


def test_push_tells_what_the_primary_refuses_and_keeps_the_log(bench: Bench) -> None:
    control = bench.control()
    with RawPeer.connect(bench.path) as primary, guest_memory(16 * PAGE) as fd:
        primary.version()
        primary.ok(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, RAM, 16 * PAGE), [fd])
        control.dma_logging_start(PAGE)
        primary.region_write(BAR0, DMA_TO, struct.pack("<Q", RAM))
        control.migration_set_state(DeviceState.STOP)
        failed: list[int] = []
        thread = threading.Thread(target=lambda: failed.append(refusal(control.push)))
        thread.start()
        primary.reply(primary.read(), flags=0x21, error=errno.ENODEV)
        thread.join(TIMEOUT)
        assert failed == [errno.ENODEV]
        assert control.status().dirty_pages == 1
        thread = threading.Thread(target=lambda: failed.append(refusal(control.push)))
        thread.start()
        primary.read()
        primary.close()  # in the middle of it
        thread.join(TIMEOUT)
    assert failed == [errno.ENODEV, errno.ENOTCONN]
    assert refusal(control.push) == errno.ENOTCONN


def test_push_refuses_what_makes_no_sense(bench: Bench) -> None:
    control = bench.control()
    assert refusal(control.push) == errno.ENOTCONN
    primary = bench.primary()
    assert refusal(control.push) == errno.ENODATA
    control.dma_logging_start(PAGE)
    assert refusal(control.push) == errno.EBUSY
    control.migration_set_state(DeviceState.STOP)
    assert control.push() == 0
    assert primary.migration_get_state() is DeviceState.STOP


def test_push_says_that_the_vmm_cannot_be_told_of_all(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    control.dma_logging_start(PAGE)
    with guest_memory(16 * PAGE) as fd, guest_memory(16 * PAGE) as other:
        primary.dma_map(RAM, 16 * PAGE, fd)
        bench.dirty(primary, RAM, RAM + 8 * PAGE)
        primary.dma_unmap(RAM, 16 * PAGE)
        control.migration_set_state(DeviceState.STOP)
        assert refusal(control.push) == errno.ENOTRECOVERABLE
        for offset, file in ((PAGE, fd), (0, other)):  # other memory at these addresses
            primary.dma_map(RAM, 8 * PAGE, file, offset=offset)
            assert control.status().dirty_pages == 0
            assert refusal(control.push) == errno.ENOTRECOVERABLE
            primary.dma_unmap(RAM, 8 * PAGE)
        for page in (0, 8):  # the same memory, in other regions
            primary.dma_map(RAM + page * PAGE, 8 * PAGE, fd, offset=page * PAGE, memory=bytearray(8 * PAGE))
        assert control.status().dirty_pages == 2
        with Answering(primary):
            assert control.push() == 2


def test_what_a_client_took_or_left_behind_does_not_keep_the_next_from_a_push(bench: Bench) -> None:
    control = bench.control()
    control.dma_logging_start(PAGE)
    with Client.connect(bench.path, TIMEOUT) as primary, guest_memory(PAGE) as fd:
        primary.dma_map(RAM, PAGE, fd)
        bench.dirty(primary, RAM)
        primary.dma_unmap(RAM, PAGE, page_size=PAGE)
        control.migration_set_state(DeviceState.STOP)
        assert control.push() == 0
        control.migration_set_state(DeviceState.RUNNING)
        primary.dma_map(RAM, PAGE, fd)
        bench.dirty(primary, RAM)
    bench.primary()
    control.migration_set_state(DeviceState.STOP)
    assert control.push() == 0


def test_push_of_a_backend_that_tells_nothing() -> None:
    with bench_of(ServerBackend()) as bench:
        bench.primary()
        control = bench.control()
        assert refusal(control.push) == errno.ENOTSUP
        assert control.status() == ControlStatus(AccessMode.PASS, 0, 0, 0, None, True)


def test_large_log_pages_are_pushed_in_pages_of_4_kib(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    bench.memory(primary, pages=64)
    control.dma_logging_start(16 * PAGE)
    bench.dirty(primary, RAM + PAGE)
    control.migration_set_state(DeviceState.STOP)
    with Answering(primary):
        assert control.push() == 16


def test_many_pages_are_pushed(bench: Bench) -> None:
    control, primary = bench.control(30.0), bench.primary()
    pages = 5000
    bench.memory(primary, pages)
    control.dma_logging_start(PAGE)
    bench.device.dma.log.mark(RAM, pages * PAGE)
    control.migration_set_state(DeviceState.STOP)
    with Answering(primary):
        assert control.push(30.0) == pages


def test_a_primary_that_does_not_answer_costs_the_push_only(device: Pad) -> None:
    with bench_of(device, dma_timeout=0.2) as bench:
        control, primary = bench.control(), bench.primary()
        bench.memory(primary)
        control.dma_logging_start(PAGE)
        bench.dirty(primary, RAM)
        control.migration_set_state(DeviceState.STOP)
        assert refusal(control.push) == errno.ETIMEDOUT
        assert control.status().dirty_pages == 1
        assert primary.region_read(CONFIG, 0, 2) == b"\x4f\x49"  # the late reply is dropped


def pushing(
    bench: Bench, primary: RawPeer, control: ControlClient, *, maps: int = 1
) -> tuple[threading.Thread, list[int]]:
    """A push of 1024 pages that are mapped so often has begun. It will be refused, with the errno in the list."""
    primary.version()
    size = 1024 * PAGE
    with guest_memory(size) as fd:
        for number in range(maps):
            primary.ok(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, RAM + number * size, size), [fd])
    control.dma_logging_start(PAGE)
    bench.device.dma.log.mark(RAM, maps * size)
    control.migration_set_state(DeviceState.STOP)
    refused: list[int] = []
    thread = threading.Thread(target=lambda: refused.append(refusal(control.push)))
    thread.start()
    return thread, refused


def test_a_primary_that_takes_no_more_is_let_go(device: Pad) -> None:
    """A part of a message is out: there is no way on with that connection."""
    with bench_of(device, dma_timeout=0.3) as bench:
        control, watcher = bench.control(), bench.control()
        with RawPeer.connect(bench.path) as primary:
            thread, refused = pushing(bench, primary, control, maps=128)
            request = primary.read()
            primary.reply(request, request.payload[:16])
            thread.join(TIMEOUT)
            assert refused == [errno.ETIMEDOUT]
            wait_until(lambda: not watcher.status().connected)


def test_a_primary_that_sends_accesses_instead_of_answering(bench: Bench) -> None:
    with RawPeer.connect(bench.path) as primary:
        control = bench.control()
        control.set_access(AccessMode.HOLD)
        thread, refused = pushing(bench, primary, control)
        primary.read()
        with contextlib.suppress(OSError):
            primary.send(message(1, Command.REGION_READ, struct.pack("<QII", 0, 0, 4)) * 2000)
        thread.join(TIMEOUT)
        assert refused == [errno.ENOTCONN]
        wait_until(lambda: not control.status().connected)


def test_what_was_held_goes_before_what_was_postponed(bench: Bench) -> None:
    """During a push an access is held, a later one waits behind a command that may not be served meanwhile."""
    pusher, control = bench.control(), bench.control()
    control.set_access(AccessMode.HOLD)
    with RawPeer.connect(bench.path) as primary:
        thread, refused = pushing(bench, primary, pusher)
        bench.device.accesses.clear()
        request = primary.read()
        get_state = struct.pack("<II", 16, 1 << 16 | DeviceFeature.MIG_DEVICE_STATE)
        primary.send(
            message(1, Command.REGION_WRITE, access(BAR0, VALUE, 4) + b"\1\0\0\0", 0x10)
            + message(2, Command.DEVICE_FEATURE, get_state)
            + message(3, Command.REGION_WRITE, access(BAR0, VALUE, 4) + b"\2\0\0\0", 0x10)
        )
        wait_until(lambda: control.status().held == 1)
        running = threading.Thread(target=lambda: control.migration_set_state(DeviceState.RUNNING))
        running.start()
        primary.reply(request, flags=0x21, error=errno.ENODEV)
        for one in (thread, running):
            one.join(TIMEOUT)
        assert refused == [errno.ENODEV]
        assert primary.read().command == Command.DEVICE_FEATURE
        primary.check_alive()
    assert bench.device.accesses == [("write", VALUE, 1), ("write", VALUE, 2)]


# Access modes


def stopped(bench: Bench, mode: AccessMode) -> tuple[ControlClient, Client]:
    control, primary = bench.control(), bench.primary()
    primary.region_write(BAR0, VALUE, b"\x2a\0\0\0")
    control.set_access(mode)
    assert primary.region_read(BAR0, VALUE, 4) == b"\x2a\0\0\0"  # it runs: the mode does nothing
    control.migration_set_state(DeviceState.STOP)
    bench.device.accesses.clear()
    return control, primary


def test_pass_has_the_device_serve_while_it_stands(bench: Bench) -> None:
    _, primary = stopped(bench, AccessMode.PASS)
    primary.region_write(BAR0, VALUE, b"\x07\0\0\0")
    assert primary.region_read(BAR0, VALUE, 4) == b"\x07\0\0\0"


@pytest.mark.parametrize("state", [DeviceState.STOP, DeviceState.STOP_COPY])
def test_dummy_answers_without_the_device(bench: Bench, state: DeviceState) -> None:
    control, primary = stopped(bench, AccessMode.DUMMY)
    control.migration_set_state(state)
    assert primary.region_read(BAR0, VALUE, 4) == bytes(4)
    primary.region_write(BAR0, VALUE, b"\x07\0\0\0")
    primary.region_write(BAR0, VALUE, b"\x08\0\0\0", posted=True)
    primary.region_write_multi([(BAR0, 0, b"\1\0\0\0"), (CONFIG, 0x3C, b"\x0b")])
    assert primary.region_read(CONFIG, 0x3C, 1) == b"\x0b"  # config space is served in every state
    assert refusal(lambda: primary.region_read(BAR0, 0xFFE, 4)) == errno.EINVAL
    assert refusal(lambda: primary.region_read(PciRegion.BAR5, 0, 4)) == errno.EINVAL
    assert bench.device.accesses == []
    control.migration_set_state(DeviceState.RUNNING)
    assert primary.region_read(BAR0, VALUE, 4) == b"\x2a\0\0\0"


def test_hold_keeps_accesses_until_the_device_runs(bench: Bench) -> None:
    control, primary = stopped(bench, AccessMode.HOLD)
    shared = bench.memory(primary)  # served in every state
    primary.region_write(CONFIG, 0x3C, b"\x0b")
    for value in (1, 2, 3):
        primary.region_write(BAR0, VALUE, value.to_bytes(4, "little"), posted=True)
    bench_read: list[bytes] = []
    thread = threading.Thread(target=lambda: bench_read.append(primary.region_read(BAR0, VALUE, 4)))
    thread.start()
    wait_until(lambda: control.status().held == 4)
    assert bench.device.accesses == []
    assert not bench_read
    control.migration_set_state(DeviceState.RUNNING)
    thread.join(TIMEOUT)
    assert bench_read == [b"\x03\0\0\0"]
    assert control.status().held == 0
    assert bench.device.accesses == [("write", 0, 1), ("write", 0, 2), ("write", 0, 3), ("read", 0, 4)]
    assert shared[0] == 0


@pytest.mark.parametrize("options", [{}, {"spin": 50e-6}])
def test_no_access_is_lost_or_overtaken_however_often_the_device_stops(device: Pad, options: dict[str, float]) -> None:
    """A vCPU that writes and reads on, with a hook that asks for DMA now and then, while the device stops and runs."""
    with bench_of(device, **options) as bench:
        control, primary = bench.control(), bench.primary()
        primary.dma_map(0, PAGE, memory=bytearray(PAGE))
        control.set_access(AccessMode.HOLD)
        count, read = 400, []

        def work() -> None:
            for value in range(1, count + 1):
                primary.region_write(BAR0, VALUE, value.to_bytes(4, "little"), posted=True)
                if value % 7 == 0:
                    primary.region_read(BAR0, ASK, 4)
                if value % 5 == 0:
                    read.append((value, int.from_bytes(primary.region_read(BAR0, VALUE, 4), "little")))

        worker = threading.Thread(target=work)
        worker.start()
        rounds = 0
        while worker.is_alive() or rounds < 20:
            control.migration_set_state(DeviceState.STOP)
            assert control.status().held <= 512
            control.migration_set_state(DeviceState.RUNNING)
            rounds += 1
        worker.join(TIMEOUT)
        assert all(wrote == seen for wrote, seen in read)
        assert [value for kind, offset, value in device.accesses if kind == "write"] == list(range(1, count + 1))


@pytest.mark.parametrize(("mode", "answer"), [(AccessMode.DUMMY, bytes(4)), (AccessMode.PASS, b"\x2a\0\0\0")])
def test_what_is_held_follows_another_mode(bench: Bench, mode: AccessMode, answer: bytes) -> None:
    control, primary = stopped(bench, AccessMode.HOLD)
    bench_read: list[bytes] = []
    thread = threading.Thread(target=lambda: bench_read.append(primary.region_read(BAR0, VALUE, 4)))
    thread.start()
    wait_until(lambda: control.status().held == 1)
    control.set_access(mode)
    thread.join(TIMEOUT)
    assert bench_read == [answer]


def test_a_reset_makes_what_is_held_undone(bench: Bench) -> None:
    control, primary = stopped(bench, AccessMode.HOLD)
    primary.region_write(BAR0, VALUE, b"\x01\0\0\0", posted=True)
    primary.reset()
    assert control.status().held == 0
    assert control.migration_get_state() is DeviceState.RUNNING
    assert bench.device.accesses == []
    assert bench.device.value == 0


def test_more_accesses_than_are_held_make_the_client_wait(bench: Bench) -> None:
    """A vCPU that writes on and on is slowed down; no write is lost."""
    control, primary = stopped(bench, AccessMode.HOLD)
    count = 20_000

    def write() -> None:
        for value in range(count):
            primary.region_write(BAR0, VALUE, value.to_bytes(4, "little"), posted=True)
        primary.region_read(BAR0, VALUE, 4)

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: control.status().held > 500)
    assert control.region_read(CONFIG, 0, 2) == b"\x4f\x49"
    control.migration_set_state(DeviceState.RUNNING)
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert [value for kind, _, value in bench.device.accesses if kind == "write"] == list(range(count))


@pytest.mark.parametrize("count", [1, 3000])
def test_the_primary_leaves_while_accesses_are_held(bench: Bench, count: int) -> None:
    control = bench.control()
    control.set_access(AccessMode.HOLD)
    control.migration_set_state(DeviceState.STOP)
    with RawPeer.connect(bench.path) as peer:
        peer.version()
        peer.send(message(1, Command.REGION_WRITE, struct.pack("<QIII", 0, 0, 4, 7), 0x10) * count)
        wait_until(lambda: control.status().held >= min(count, 512))
    wait_until(lambda: not control.status().connected)
    assert control.status().held == 0
    control.migration_set_state(DeviceState.RUNNING)
    assert bench.primary().region_read(BAR0, VALUE, 4) == bytes(4)


@pytest.mark.parametrize("number", [3, 0xFFFFFFFF])
def test_an_access_mode_that_is_none(bench: Bench, number: int) -> None:
    peer = bench.raw(b'{"capabilities":{"x_control":{"version":1}}}\0')
    assert peer.refused(ControlCommand.CONTROL_ACCESS, struct.pack("<I", number)) == errno.EINVAL
    assert peer.refused(ControlCommand.CONTROL_ACCESS, b"\0\0\0") == errno.EINVAL
    assert struct.unpack("<IIQQII", peer.ok(ControlCommand.CONTROL_STATUS))[0] == AccessMode.PASS


# Waiting


def test_a_state_that_must_wait_for_dma_waits_alone(bench: Bench) -> None:
    """Accesses are held until then, so that none starts DMA behind the quiesce; the rest is served."""
    control, other, primary = bench.control(), bench.control(), bench.primary()
    quiescing = bench.device.quiescing = Quiescing()
    stopping = threading.Thread(target=lambda: control.migration_set_state(DeviceState.STOP))
    stopping.start()
    assert bench.device.quiesced.wait(TIMEOUT)
    assert primary.region_read(CONFIG, 0, 2) == b"\x4f\x49"
    assert other.migration_get_state() is DeviceState.RUNNING
    primary.region_write(BAR0, VALUE, b"\x01\0\0\0", posted=True)
    wait_until(lambda: other.status().held == 1)
    assert bench.device.accesses == []
    quiescing.done()
    stopping.join(TIMEOUT)
    assert other.migration_get_state() is DeviceState.STOP
    assert primary.region_read(BAR0, VALUE, 4) == b"\x01\0\0\0"  # PASS


def test_a_state_whose_quiesce_fails(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    quiescing = bench.device.quiescing = Quiescing()
    quiescing.done(errno.EIO)
    assert refusal(lambda: control.migration_set_state(DeviceState.STOP)) == errno.EIO
    assert primary.region_read(BAR0, VALUE, 4) == bytes(4)


@pytest.mark.parametrize(("raised", "number"), [(OSError(errno.EBUSY, "busy"), errno.EBUSY), (KeyError(1), errno.EIO)])
def test_a_device_that_fails_to_quiesce(bench: Bench, raised: Exception, number: int) -> None:
    control, primary = bench.control(), bench.primary()

    def fail() -> None:
        raise raised

    bench.device.quiesce = fail  # type: ignore[method-assign]
    assert refusal(lambda: control.migration_set_state(DeviceState.STOP)) == number
    assert primary.region_read(BAR0, VALUE, 4) == bytes(4)
    del bench.device.quiesce
    control.migration_set_state(DeviceState.STOP)


def test_a_client_that_dies_while_its_state_waits(bench: Bench) -> None:
    primary, other = bench.primary(), bench.control()
    quiescing = bench.device.quiescing = Quiescing()
    with bench.raw() as peer:
        peer.post(Command.DEVICE_FEATURE, struct.pack("<IIIi", 16, 1 << 17 | DeviceFeature.MIG_DEVICE_STATE, 1, -1))
        assert bench.device.quiesced.wait(TIMEOUT)
    quiescing.done()
    wait_until(lambda: other.migration_get_state() is DeviceState.STOP)  # the command was whole: it is done
    assert primary.region_read(BAR0, VALUE, 4) == bytes(4)


def test_the_primarys_command_waits_and_control_is_served(bench: Bench) -> None:
    control, primary = bench.control(), bench.primary()
    bench.memory(primary)
    quiescing = bench.device.quiescing = Quiescing()
    unmapping = threading.Thread(target=lambda: primary.dma_unmap(RAM, 16 * PAGE))
    unmapping.start()
    assert bench.device.quiesced.wait(TIMEOUT)
    assert control.status().connected
    assert control.region_read(BAR0, VALUE, 4) == bytes(4)
    stopping = threading.Thread(target=lambda: control.migration_set_state(DeviceState.STOP))
    stopping.start()
    other = bench.control()
    assert other.region_read(CONFIG, 0, 2) == b"\x4f\x49"
    assert stopping.is_alive()
    quiescing.done()
    unmapping.join(TIMEOUT)
    stopping.join(TIMEOUT)
    assert other.migration_get_state() is DeviceState.STOP


def test_what_waited_for_the_primary_is_done_when_that_leaves(bench: Bench) -> None:
    class Heard(Quiescing):
        """Counts who waits for it: the command, then the end of the session."""

        waiting = threading.Semaphore(0)

        def on_done(self, wake: Callable[[], None]) -> None:
            super().on_done(wake)
            self.waiting.release()

    control = bench.control()
    quiescing = bench.device.quiescing = Heard()
    with RawPeer.connect(bench.path) as primary:
        primary.version()
        primary.post(Command.DEVICE_RESET)
        assert bench.device.quiesced.wait(TIMEOUT)
        stopping = threading.Thread(target=lambda: control.migration_set_state(DeviceState.STOP))
        stopping.start()
        assert bench.control().status().held == 0
        assert stopping.is_alive()
        assert quiescing.waiting.acquire(timeout=TIMEOUT)
    assert quiescing.waiting.acquire(timeout=TIMEOUT)
    quiescing.done()
    stopping.join(TIMEOUT)
    assert not stopping.is_alive()
    assert control.migration_get_state() is DeviceState.STOP


def test_it_is_served_while_the_device_waits_for_the_primary(bench: Bench) -> None:
    """A DMA request is under way in a hook: what is quick is served, what could ask for DMA itself waits for it."""
    control, other = bench.control(), bench.control()
    with RawPeer.connect(bench.path) as primary:
        primary.version()
        primary.ok(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, PAGE))
        primary.post(Command.REGION_READ, struct.pack("<QII", ASK, 0, 4))
        request = primary.read()
        assert request.command == Command.DMA_READ
        assert control.status().connected
        assert control.region_read(CONFIG, 0, 2) == b"\x4f\x49"
        stopping = threading.Thread(target=lambda: control.migration_set_state(DeviceState.STOP))
        stopping.start()
        assert other.region_read(CONFIG, 0, 2) == b"\x4f\x49"
        assert stopping.is_alive()
        assert bench.device.migration_get_state() is DeviceState.RUNNING
        primary.reply(request, request.payload[:16] + b"abcd")
        assert primary.read().payload[16:] == b"abcd"
        stopping.join(TIMEOUT)
        assert other.migration_get_state() is DeviceState.STOP
