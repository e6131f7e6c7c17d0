"""Filtered devices behind a socket: a real client, descriptors, migration, a client that leaves."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator

import pytest

from vfio_user import Client, DeviceState, ServerBackend
from vfio_user.devices.edu import Edu
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.errors import CommandError
from vfio_user.filters import Stats, apply_filters
from vfio_user.testing import no_fd_leaks
from vfio_user.wire.constants import IrqSetFlags, PciIrq, PciRegion

from .device_support import attached, events, guest_memory
from .support import MigratableBackend, RecordingBackend, dma_map, serving

ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
QUIET = ["trace", "stats", "delay:all=0", "error:all=0%"]
LIVENESS, FACTORIAL = 0x04, 0x08


def filtered(backend: ServerBackend, *specs: str) -> ServerBackend:
    return apply_filters(backend, specs)[0]


# Use


def test_a_filtered_device_is_used_as_a_bare_one() -> None:
    with (
        no_fd_leaks(),
        attached(filtered(Edu(), *QUIET)) as client,
        events(1) as (event,),
        guest_memory(4096) as memory,
    ):
        os.pwrite(memory, b"from the guest", 0x100)
        client.region_write(PciRegion.CONFIG, 4, b"\6\0")
        client.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
        client.dma_map(0x1000, 4096, memory)
        for register, value in ((0x80, 0x1100), (0x88, 0x40000), (0x90, 14), (0x98, 1 | 4)):
            client.region_write(0, register, value.to_bytes(8, "little"))
        event.wait()
        for register, value in ((0x80, 0x40000), (0x88, 0x1200), (0x90, 14), (0x98, 1 | 2)):
            client.region_write(0, register, value.to_bytes(8, "little"))
        assert client.region_read(0, 0x24, 4) == (0x100).to_bytes(4, "little")
        assert os.pread(memory, 14, 0x200) == b"from the guest"
        client.dma_unmap(0x1000, 4096)
        client.reset()


def test_a_refusal_reaches_the_client_as_its_errno() -> None:
    with attached(filtered(Edu(), "error:region_write=100%,errno=ENODEV,region=bar0")) as client:
        with pytest.raises(CommandError) as refused:
            client.region_write(0, LIVENESS, bytes(4))
        assert refused.value.errno == errno.ENODEV
        client.region_write(PciRegion.CONFIG, 4, b"\6\0")
        assert client.region_read(0, LIVENESS, 4) == bytes(4)


def test_memory_that_is_trapped_is_read_through_the_filters() -> None:
    with attached(Ivshmem(size=1 << 16)) as client:
        assert client.regions[2].fd is not None
    device, filters = apply_filters(Ivshmem(size=1 << 16), ["stats", "trap"])
    with attached(device) as client:
        assert client.regions[2].fd is None
        client.region_write(2, 0, b"data" * 0x1000)
        assert client.region_read(2, 0, 0x4000) == b"data" * 0x1000
    assert isinstance(filters[0], Stats)
    assert filters[0].summary()["region_read"].moved >= 0x4000


def test_a_readonly_device_over_the_wire() -> None:
    with attached(filtered(Edu(), "readonly")) as client:
        with pytest.raises(CommandError) as refused:
            client.region_write(0, LIVENESS, bytes(4))
        assert refused.value.errno == errno.EPERM
        client.region_write(0, LIVENESS, bytes(4), posted=True)
        assert client.region_read(0, LIVENESS, 4) == bytes(4)  # and not its complement
        client.region_write(PciRegion.CONFIG, 4, b"\6\0")
        assert client.region_read(PciRegion.CONFIG, 4, 2) == b"\6\0"
        with pytest.raises(CommandError):
            client.reset()


# Migration


def saved(client: Client) -> bytes:
    client.migration_set_state(DeviceState.STOP_COPY)
    stream = bytearray()
    while piece := client.migration_read_data(512):
        stream += piece
    return bytes(stream)


@pytest.mark.parametrize(("source", "target"), [(QUIET, []), ([], QUIET), (QUIET, ["stats"]), (["readonly"], ["trap"])])
def test_a_device_migrates_through_filters(source: list[str], target: list[str]) -> None:
    with attached(filtered(Edu(), *source)) as client, attached(Edu()) as bare:
        for one in (client, bare):
            if source != ["readonly"]:
                one.region_write(0, LIVENESS, b"\1\2\3\4")
        stream = saved(client)
        assert stream == saved(bare)
    device = Edu()
    with attached(filtered(device, *target)) as client:
        client.migration_set_state(DeviceState.RESUMING)
        client.migration_write_data(stream)
        client.migration_set_state(DeviceState.RUNNING)
        expected = bytes(4) if source == ["readonly"] else b"\xfe\xfd\xfc\xfb"
        assert client.region_read(0, LIVENESS, 4) == expected


def test_a_readonly_device_loads_nothing() -> None:
    with attached(filtered(Edu(), "readonly")) as client:
        with pytest.raises(CommandError) as refused:
            client.migration_set_state(DeviceState.RESUMING)
        assert refused.value.errno == errno.EPERM
        assert client.migration_get_state() == DeviceState.RUNNING


def test_a_migration_that_is_refused_leaves_the_device_running() -> None:
    with attached(filtered(Edu(), "error:migration_set_state=100%")) as client:
        with pytest.raises(CommandError):
            client.migration_set_state(DeviceState.STOP_COPY)
        assert client.migration_get_state() == DeviceState.RUNNING
        assert client.region_read(0, 0, 4) == b"\xed\0\0\1"


# Descriptors, and clients that leave


@pytest.fixture
def backend() -> Iterator[RecordingBackend]:
    with no_fd_leaks():
        made = RecordingBackend()
        yield made
        made.close()


def test_descriptors_of_a_refused_command_are_closed(backend: RecordingBackend) -> None:
    with serving(filtered(backend, *QUIET, "error:dma_map=100%,set_irqs=100%")) as served:
        peer = served.client()
        with guest_memory(4096) as memory, events(1) as (event,):
            for _ in range(20):
                assert peer.refused(2, dma_map(0, 4096, flags=7), [memory]) == errno.EIO
                assert peer.refused(8, _set_irqs(), [event.fd]) == errno.EIO
        with no_fd_leaks(), guest_memory(4096) as memory, events(1) as (event,):
            for _ in range(20):
                peer.refused(2, dma_map(0, 4096, flags=7), [memory])
                peer.refused(8, _set_irqs(), [event.fd])
        peer.check_alive()
    assert backend.fds == []


def _set_irqs() -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in (20, ASSIGN, 0, 0, 1))


def test_memory_of_a_client_that_left_is_taken_from_a_failing_device(backend: RecordingBackend) -> None:
    with serving(filtered(backend, "error:dma_unmap=100%,seed=1", "stats")) as served:
        peer = served.client()
        with guest_memory(4096) as memory:
            peer.ok(2, dma_map(0x1000, 4096, flags=7), [memory])
        peer.close()
        backend.wait_for("disconnected")
        assert [call[0] for call in backend.calls] == ["connected", "dma_map", "quiesce", "dma_unmap", "disconnected"]
        second = served.client()
        second.ok(2, dma_map(0x1000, 4096, flags=3))


def test_a_migration_view_behind_filters_is_read(backend: RecordingBackend) -> None:
    inner = MigratableBackend()
    inner.stream += bytes(range(200))
    with attached(filtered(inner, "stats")) as client:
        client.migration_set_state(DeviceState.STOP_COPY)
        assert client.migration_read_data(4096) == bytes(range(200))
    inner.close()


# Reports while it is served


def test_a_report_may_be_asked_for_from_anywhere_while_the_device_is_served() -> None:
    """From another thread, and from a signal handler that interrupts this one."""
    device, (stats,) = apply_filters(Edu(), ["stats"])
    reports: list[str] = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: reports.append(stats.report()))
    try:
        with attached(device) as client:
            for _ in range(50):
                client.region_read(0, 0, 4)
                os.kill(os.getpid(), signal.SIGUSR1)
                reports.append(stats.report())
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(reports) == 100
    counts = [int(next(line for line in report.splitlines() if "region_read" in line).split()[1]) for report in reports]
    assert counts == sorted(counts)
    assert counts[-1] >= 50


def test_a_slow_device_is_waited_for() -> None:
    with attached(filtered(Edu(), "delay:region_read=100ms,region=bar0")) as client:
        begin = time.monotonic()
        assert client.region_read(0, 0, 4) == b"\xed\0\0\1"
        assert time.monotonic() - begin >= 0.1
