"""A server that looks around before it sleeps, and has its device look for work that nobody tells of."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator

import pytest

from vfio_user.server import ServerBackend

from .support import TIMEOUT, RecordingBackend, access, assert_quiet, recording, serving

READ, DMA_READ = 9, 11


class Looks:
    """What a backend does when it is to look: it finds work ``times`` times, and notes which looks were the last."""

    def __init__(self, times: int = 0) -> None:
        self.times = times
        self.last: list[bool] = []
        self.to_sleep = threading.Event()

    def __call__(self, last: bool) -> bool:
        self.last.append(last)
        self.times -= 1
        if last and self.times < 0:
            self.to_sleep.set()
        return self.times >= 0


@pytest.fixture
def backend() -> Iterator[RecordingBackend]:
    with recording(RecordingBackend()) as backend:
        yield backend


def test_it_looks_before_each_sleep(backend: RecordingBackend, caplog: pytest.LogCaptureFixture) -> None:
    looks = backend.looked = Looks(times=3)
    with serving(backend, spin=1e-3) as served:
        peer = served.client()
        assert looks.to_sleep.wait(TIMEOUT)
        looks.to_sleep.clear()
        peer.ok(READ, access(0, 0, 4))
        assert looks.to_sleep.wait(TIMEOUT)
    assert_quiet(caplog)


def test_one_that_does_not_spin_never_looks(backend: RecordingBackend) -> None:
    looks = backend.looked = Looks()
    with serving(backend) as served:
        served.client().ok(READ, access(0, 0, 4))
    assert looks.last == []


def test_one_that_is_polled_looks_before_it_returns(backend: RecordingBackend) -> None:
    """Whoever polls it may sleep then, so every look is the last."""
    looks = backend.looked = Looks(times=2)
    with serving(backend, polled=True, spin=1e-3) as served:
        served.client().ok(READ, access(0, 0, 4))
        assert looks.to_sleep.wait(TIMEOUT)
    assert looks.last == [True] * len(looks.last)


def test_one_that_is_polled_comes_back_for_more(backend: RecordingBackend) -> None:
    """A device that never has nothing to do keeps nobody from anything else: each turn is one look."""
    bell = os.eventfd(0)
    heard = threading.Event()
    looks: list[bool] = []

    def look(last: bool) -> bool:
        looks.append(last)
        if len(looks) == 3:
            os.eventfd_write(bell, 1)
        return not heard.is_set()

    def watch() -> None:
        assert backend.link is not None
        backend.link.watch(bell, heard.set)

    backend.looked = look
    backend.act["connected"] = watch
    try:
        with serving(backend, polled=True, spin=1e-3) as served:
            served.client().ok(READ, access(0, 0, 4))
            assert heard.wait(TIMEOUT)
    finally:
        os.close(bell)


@pytest.mark.parametrize("watching", [False, True], ids=["the socket alone", "among descriptors"])
def test_what_is_found_in_the_last_moment_puts_sleep_off(backend: RecordingBackend, watching: bool) -> None:
    looks: list[bool] = []
    to_sleep = threading.Event()

    def look(last: bool) -> bool:
        looks.append(last)
        if looks.count(True) > 1:
            to_sleep.set()
        return last and looks.count(True) == 1

    def watch() -> None:
        assert backend.link is not None
        backend.link.watch(bell, lambda: None)

    bell = os.eventfd(0)
    backend.looked = look
    if watching:
        backend.act["connected"] = watch
    try:
        with serving(backend, spin=1e-3) as served:
            served.client()
            assert to_sleep.wait(TIMEOUT)
    finally:
        os.close(bell)
    assert looks[looks.index(True) + 1] is False  # it spins again


def test_a_backend_says_how_long(backend: RecordingBackend) -> None:
    backend.spin = 1e-4
    for spin, expected in ((None, 1e-4), (0.0, 0.0), (2e-4, 2e-4)):
        with serving(backend, spin=spin) as served:
            served.client()
            assert backend.link is not None
            assert backend.link.spin == expected


def test_a_device_that_fails_to_look_is_served_all_the_same(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()

    def look(last: bool) -> bool:
        failed.set()
        raise ZeroDivisionError

    backend.looked = look
    with serving(backend, spin=1e-6) as served:
        peer = served.client()
        assert failed.wait(TIMEOUT)
        peer.ok(READ, access(0, 0, 4))
    assert "look_for_work" in caplog.text


def test_dma_by_messages_in_a_look(backend: RecordingBackend) -> None:
    """The client answers, or refuses, or leaves, and is served meanwhile."""
    wanted = threading.Event()
    found: list[object] = []

    def look(last: bool) -> bool:
        if not wanted.is_set() or backend.link is None:
            return False
        wanted.clear()
        data = bytearray(4)
        try:
            backend.link.dma_read(0x1000, memoryview(data))
        except OSError as error:
            found.append(error.errno)
        else:
            found.append(bytes(data))
        return True

    backend.looked = look
    with serving(backend, spin=1e-3) as served:
        peer = served.client()
        for payload, flags, error in ((struct.pack("<QQ", 0x1000, 4) + b"data", 1, 0), (b"", 0x21, errno.EPERM)):
            backend.act["region_read"] = wanted.set
            peer.ok(READ, access(0, 0, 4))
            backend.act.clear()
            request = peer.read()
            assert (request.command, request.payload) == (DMA_READ, struct.pack("<QQ", 0x1000, 4))
            peer.ok(READ, access(0, 0, 4))
            peer.reply(request, payload, flags=flags, error=error)
        backend.act["region_read"] = wanted.set
        peer.ok(READ, access(0, 0, 4))
        assert peer.read().command == DMA_READ
        peer.close()
        backend.wait_for("disconnected")
        served.client().check_alive()
    assert found[:2] == [b"data", errno.EPERM]


def test_by_default_there_is_nothing_to_look_for() -> None:
    assert ServerBackend().look_for_work(last=True) is False
