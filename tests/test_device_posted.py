"""Work that threads post to a device: it is done by the thread that serves, while the device runs."""

from __future__ import annotations

import logging
import threading

import pytest

from vfio_user import Bar, Device, DeviceState, register

from .device_support import TIMEOUT, attached


class Worker(Device):
    vendor_id, device_id, workers = 0x494F, 0x9057, True
    bars = {0: Bar(16)}
    count = register(0)

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.done = threading.Semaphore(0)

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        self.threads.add(threading.get_ident())

    def work(self) -> None:
        self.threads.add(threading.get_ident())
        self.count += 1
        self.done.release()

    def wait(self, times: int) -> None:
        for _ in range(times):
            assert self.done.acquire(timeout=TIMEOUT)


def test_what_many_threads_post_is_done_by_the_one_that_serves() -> None:
    device = Worker()
    with attached(device) as client:
        client.region_write(0, 8, b"\0")
        threads = [threading.Thread(target=post_often, args=(device,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        device.wait(400)
        for thread in threads:
            thread.join()
        assert client.region_read(0, 0, 4) == (400).to_bytes(4, "little")
    assert len(device.threads) == 1


def post_often(device: Worker) -> None:
    for _ in range(100):
        device.post(device.work)


def test_a_device_without_workers_says_so() -> None:
    class Alone(Worker):
        workers = False

    with pytest.raises(RuntimeError, match="Alone has no workers: declare workers = True"):
        Alone().post(print)


def test_it_waits_for_a_client() -> None:
    device = Worker()
    device.post(device.work)
    assert device.count == 0
    with attached(device):
        device.wait(1)


def test_it_waits_while_the_device_is_stopped_and_is_done_before_it_stops() -> None:
    device = Worker()
    with attached(device) as client:
        client.migration_set_state(DeviceState.STOP)
        device.post(device.work)
        assert client.region_read(0, 0, 4) == bytes(4)
        client.migration_set_state(DeviceState.RUNNING)
        assert client.region_read(0, 0, 4) == b"\1\0\0\0"
    device.post(device.work)
    device.migration_set_state(DeviceState.STOP)
    assert device.count == 2


def test_work_that_fails_is_logged_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    device = Worker()

    def fail() -> None:
        raise RuntimeError("no luck")

    with attached(device), caplog.at_level(logging.ERROR):
        device.post(fail)
        device.post(device.work)
        device.wait(1)
    assert "no luck" in caplog.text


def test_why_a_migration_is_refused_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    device = Worker()
    with attached(device) as client:
        client.migration_set_state(DeviceState.RESUMING)
        with pytest.raises(OSError, match="refused"):
            client.migration_set_state(DeviceState.STOP)
        client.reset()
    assert "Worker: RESUMING -> STOP:" in caplog.text
