"""DEVICE_SET_IRQS: protocol.md, section 4.5, and rows 14 and 27 of section 0."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from tests.support import (
    NO_REPLY,
    RawPeer,
    RecordingBackend,
    access,
    assert_quiet,
    eventfds,
    memfd,
    message,
    open_fds,
    recording,
    serving,
)
from vfio_user import Irq

SET_IRQS = 8
NONE, BOOL, EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 16, 32
INTX, MSI, MSIX, ERR, REQ = range(5)


@pytest.fixture
def backend() -> Iterator[RecordingBackend]:
    with recording(RecordingBackend()) as backend:
        yield backend


@pytest.fixture
def peer(backend: RecordingBackend, caplog: pytest.LogCaptureFixture) -> Iterator[RawPeer]:
    with serving(backend) as served:
        yield served.client()
    assert_quiet(caplog)


def irq_set(index: int, flags: int, start: int, count: int, data: bytes = b"", *, argsz: int | None = None) -> bytes:
    return struct.pack("<5I", 20 + len(data) if argsz is None else argsz, flags, index, start, count) + data


def calls(backend: RecordingBackend) -> list[tuple[int, ...]]:
    return [call[1:] for call in backend.called("set_irqs")]


@pytest.mark.parametrize("action", [MASK, UNMASK, TRIGGER])
@pytest.mark.parametrize(("index", "start", "count"), [(INTX, 0, 1), (MSI, 1, 3), (MSIX, 2047, 1), (MSIX, 0, 2048)])
def test_data_none(backend: RecordingBackend, peer: RawPeer, action: int, index: int, start: int, count: int) -> None:
    assert peer.ok(SET_IRQS, irq_set(index, NONE | action, start, count)) == b""
    assert calls(backend) == [(index, NONE | action, start, count, 0)]


@pytest.mark.parametrize("action", [MASK, UNMASK, TRIGGER])
def test_row14_data_eventfd(backend: RecordingBackend, peer: RawPeer, action: int) -> None:
    """One eventfd for each vector, in order, whatever the action; without descriptors they are taken away."""
    with eventfds(3) as fds:
        assert peer.ok(SET_IRQS, irq_set(MSI, EVENTFD | action, 1, 3), fds) == b""
        for value, own in enumerate(backend.fds, 1):
            os.eventfd_write(own.fileno(), value)
        assert [os.eventfd_read(fd) for fd in fds] == [1, 2, 3]
    peer.ok(SET_IRQS, irq_set(MSI, EVENTFD | action, 1, 3))
    assert calls(backend) == [(MSI, EVENTFD | action, 1, 3, 3), (MSI, EVENTFD | action, 1, 3, 0)]


@pytest.mark.parametrize("action", [MASK, UNMASK, TRIGGER])
@pytest.mark.parametrize(
    ("data", "runs"),
    [
        (b"\1\1\1\1", [(0, 4)]),
        (b"\0\0\0\0", []),
        (b"\1\0\0\1", [(0, 1), (3, 1)]),
        (b"\0\1\1\0", [(1, 2)]),
        (b"\1", [(0, 1)]),
        (b"\0\1", [(1, 1)]),
    ],
)
def test_row14_data_bool_is_done_per_element(
    backend: RecordingBackend, peer: RawPeer, action: int, data: bytes, runs: list[tuple[int, int]]
) -> None:
    assert peer.ok(SET_IRQS, irq_set(MSIX, BOOL | action, 7, len(data), data)) == b""
    assert calls(backend) == [(MSIX, NONE | action, 7 + first, count, 0) for first, count in runs]


def test_disable_an_index(backend: RecordingBackend, peer: RawPeer) -> None:
    assert peer.ok(SET_IRQS, irq_set(MSIX, NONE | TRIGGER, 0, 0)) == b""
    assert calls(backend) == [(MSIX, NONE | TRIGGER, 0, 0, 0)]


@pytest.mark.parametrize("index", [ERR, REQ])
def test_the_error_indexes(backend: RecordingBackend, peer: RawPeer, index: int) -> None:
    with eventfds(1) as fds:
        peer.ok(SET_IRQS, irq_set(index, EVENTFD | TRIGGER, 0, 1), fds)
        assert peer.refused(SET_IRQS, irq_set(index, EVENTFD | MASK, 0, 1), fds) == errno.EINVAL
    assert peer.refused(SET_IRQS, irq_set(index, NONE | UNMASK, 0, 1)) == errno.EINVAL
    assert peer.refused(SET_IRQS, irq_set(index, BOOL | MASK, 0, 1, b"\1")) == errno.EINVAL
    assert len(calls(backend)) == 1


def test_the_error_indexes_have_one_interrupt(backend: RecordingBackend, peer: RawPeer) -> None:
    """Whatever the backend says of them: a count above 1 is refused."""
    backend.irqs[ERR] = Irq(2)
    assert peer.refused(SET_IRQS, irq_set(ERR, NONE | TRIGGER, 0, 2)) == errno.EINVAL
    peer.ok(SET_IRQS, irq_set(ERR, NONE | TRIGGER, 1, 1))


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 0, 1)[:19], id="19 bytes"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 0, 1, argsz=19), id="argsz 19"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 0, 1, argsz=0), id="argsz 0"),
        pytest.param(irq_set(MSI, BOOL | TRIGGER, 0, 2, b"\1"), id="a bool too few"),
        pytest.param(irq_set(MSI, BOOL | TRIGGER, 0, 1, b"\1\1"), id="a bool too many"),
        pytest.param(irq_set(MSI, BOOL | TRIGGER, 0, 1), id="no bools"),
        pytest.param(irq_set(MSIX, BOOL | TRIGGER, 0, 2**32 - 1, b"\1"), id="4 Gi bools announced"),
        pytest.param(irq_set(5, NONE | TRIGGER, 0, 1), id="index 5"),
        pytest.param(irq_set(2**32 - 1, NONE | TRIGGER, 0, 0), id="index 2^32-1"),
        pytest.param(irq_set(MSI, NONE, 0, 1), id="no action"),
        pytest.param(irq_set(MSI, NONE | MASK | UNMASK, 0, 1), id="two actions"),
        pytest.param(irq_set(MSI, NONE | MASK | UNMASK | TRIGGER, 0, 1), id="three actions"),
        pytest.param(irq_set(MSI, TRIGGER, 0, 1), id="no data"),
        pytest.param(irq_set(MSI, NONE | BOOL | TRIGGER, 0, 1, b"\1"), id="two data"),
        pytest.param(irq_set(MSI, NONE | EVENTFD | TRIGGER, 0, 1), id="none and eventfd"),
        pytest.param(irq_set(MSI, 0, 0, 1), id="no flags"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 4, 1), id="start at the end"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 4, 0), id="start at the end, count 0"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 2**32 - 1, 1), id="start 2^32-1"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 0, 5), id="count 5 of 4"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 3, 2), id="range beyond the end"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 1, 2**32 - 1), id="range that wraps"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 2**32 - 1, 2**32 - 1), id="both at the limit"),
        pytest.param(irq_set(MSI, NONE | TRIGGER, 1, 0), id="count 0, start 1"),
        pytest.param(irq_set(MSI, NONE | MASK, 0, 0), id="count 0, mask"),
        pytest.param(irq_set(MSI, EVENTFD | TRIGGER, 0, 0), id="count 0, eventfd"),
        pytest.param(irq_set(MSI, BOOL | TRIGGER, 0, 0), id="count 0, bool"),
        pytest.param(irq_set(MSI, NONE | TRIGGER | 64, 0, 1), id="unknown bit 6"),
        pytest.param(irq_set(MSI, NONE | TRIGGER | 1 << 31, 0, 1), id="unknown bit 31"),
    ],
)
def test_row27_refused(backend: RecordingBackend, peer: RawPeer, payload: bytes) -> None:
    assert peer.refused(SET_IRQS, payload) == errno.EINVAL
    peer.check_alive()
    assert not calls(backend)


@pytest.mark.parametrize("index", [INTX, MSI, MSIX])
def test_an_index_without_vectors_always_fails(backend: RecordingBackend, peer: RawPeer, index: int) -> None:
    backend.irqs[index] = Irq(0)
    assert peer.refused(SET_IRQS, irq_set(index, NONE | TRIGGER, 0, 0)) == errno.EINVAL
    assert peer.refused(SET_IRQS, irq_set(index, NONE | TRIGGER, 0, 1)) == errno.EINVAL


@pytest.mark.parametrize(
    ("flags", "count", "fds", "data"),
    [
        (NONE | TRIGGER, 1, 1, b""),
        (NONE | TRIGGER, 0, 1, b""),
        (BOOL | TRIGGER, 1, 1, b"\1"),
        (EVENTFD | TRIGGER, 2, 1, b""),
        (EVENTFD | TRIGGER, 1, 2, b""),
        (EVENTFD | TRIGGER, 4, 200, b""),
    ],
)
def test_row27_descriptors_too_many_missing_or_uncalled_for(
    backend: RecordingBackend, peer: RawPeer, flags: int, count: int, fds: int, data: bytes
) -> None:
    with eventfds(1) as events:
        before = open_fds()
        assert peer.refused(SET_IRQS, irq_set(MSI, flags, 0, count, data), events * fds) == errno.EINVAL
        peer.check_alive()
        assert open_fds() <= before
    assert not calls(backend)


def test_row27_descriptors_that_are_no_eventfds(backend: RecordingBackend, peer: RawPeer) -> None:
    with eventfds(1) as good, memfd() as file:
        reader, writer = os.pipe()
        for bad in (file, reader, writer, peer.socket.fileno()):
            for fds in ([bad, *good], [*good, bad]):
                assert peer.refused(SET_IRQS, irq_set(MSI, EVENTFD | TRIGGER, 0, 2), fds) == errno.EINVAL
        os.close(reader)
        os.close(writer)
        peer.ok(SET_IRQS, irq_set(MSI, EVENTFD | TRIGGER, 0, 2), good * 2)
    assert len(calls(backend)) == 1


def test_as_many_descriptors_as_the_kernel_carries(backend: RecordingBackend, peer: RawPeer) -> None:
    with eventfds(1) as fds:
        peer.ok(SET_IRQS, irq_set(MSIX, EVENTFD | TRIGGER, 5, 253), fds * 253)
    assert len(backend.fds) == 253


@pytest.mark.parametrize("error", [errno.EPERM, 0xBEEF])
def test_the_hook_refuses(backend: RecordingBackend, peer: RawPeer, error: int) -> None:
    backend.fail["set_irqs"] = OSError(error, "no")
    with eventfds(2) as fds:
        before = open_fds()
        assert peer.refused(SET_IRQS, irq_set(MSI, EVENTFD | TRIGGER, 0, 2), fds) == error
        peer.check_alive()
        assert open_fds() <= before


def test_no_reply(backend: RecordingBackend, peer: RawPeer) -> None:
    with eventfds(1) as fds:
        peer.post(SET_IRQS, irq_set(INTX, EVENTFD | TRIGGER, 0, 1), fds, flags=NO_REPLY)
        peer.post(SET_IRQS, irq_set(INTX, EVENTFD | TRIGGER, 0, 2), fds, flags=NO_REPLY)
    peer.check_alive()
    assert calls(backend) == [(INTX, EVENTFD | TRIGGER, 0, 1, 1)]


def test_descriptors_reach_their_command_among_others(backend: RecordingBackend, peer: RawPeer) -> None:
    """Register accesses around SET_IRQS, all in the stream before the server looks: fds go to the right message."""
    with eventfds(2) as fds:
        for turn in range(50):
            peer.send(message(turn, 10, access(0, 0, 4) + b"data", NO_REPLY) * 3)
            peer.send(message(turn, SET_IRQS, irq_set(MSI, EVENTFD | TRIGGER, 0, 2)), fds)
            peer.send(message(turn, 9, access(0, 0, 4)))
        for turn in range(50):
            assert (peer.read()[1], peer.read()[1]) == (SET_IRQS, 9), turn
    assert calls(backend) == [(MSI, EVENTFD | TRIGGER, 0, 2, 2)] * 50
    assert len(backend.called("region_write")) == 150
