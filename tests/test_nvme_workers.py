"""The threads that wait for a storage, and what waits for them: nothing longer than it must."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from vfio_user import Client
from vfio_user.devices.nvme import execution, standstill
from vfio_user.devices.nvme.constants import ControllerStatus, IoOpcode, Register, Status
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.devices.nvme.storage.memory import MemoryStorage
from vfio_user.devices.nvme.workers import Job, Workers
from vfio_user.testing.guest import map_memory
from vfio_user.testing.nvme import Command, NvmeDriver, Ticket, io
from vfio_user.testing.nvme.commands import FUSED_FIRST, FUSED_SECOND
from vfio_user.testing.nvme.queues import QueuePair
from vfio_user.testing.nvme.workload import NvmeWorkload
from vfio_user.wire.constants import DeviceState

from .nvme_gate_support import TIMEOUT, Desk, GatedStorage, gated, until

pytestmark = pytest.mark.timeout(60)

THREADS = 8
MANY = 100
SOON = 0.2
ELSEWHERE, PAGE = 0x1000_0000, 4096
FLUSH = Command(IoOpcode.FLUSH, 1)
COMPARE_AND_WRITE = ((IoOpcode.COMPARE, FUSED_FIRST), (IoOpcode.WRITE, FUSED_SECOND))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that wait for a worker are interrupted soon, and who waits for those under way for ever fails soon."""
    monkeypatch.setattr(execution, "MAX_PATIENCE", SOON)
    monkeypatch.setattr(standstill, "QUIESCE_TIMEOUT", TIMEOUT)


class Payload:
    """Something that work holds."""


@contextlib.contextmanager
def one_worker() -> Iterator[tuple[Workers, threading.Event]]:
    """Who is busy until the gate is open."""
    workers, gate = Workers(1, lambda: None), threading.Event()
    workers.start(lambda: int(gate.wait(TIMEOUT)), lambda result, error: None)
    try:
        yield workers, gate
    finally:
        gate.set()
        workers.wait(TIMEOUT)
        workers.land()
        workers.close()


def waiting_job(workers: Workers) -> tuple[Job, weakref.ref[Payload]]:
    """A job, and what it holds."""
    payload = Payload()
    return workers.start(lambda: id(payload), lambda result, error: None), weakref.ref(payload)


def test_what_is_cancelled_is_forgotten_at_once() -> None:
    """Not when a worker comes by: a storage may hang for ever."""
    with one_worker() as (workers, _):
        for _ in range(3):
            job, payload = waiting_job(workers)
            assert payload() is not None
            assert workers.cancel(job)
            del job
            gc.collect()
            assert payload() is None
        assert len(workers) == 1


def test_what_waits_behind_a_cancelled_one_is_done() -> None:
    with one_worker() as (workers, gate):
        jobs = [waiting_job(workers)[0] for _ in range(4)]
        landed: list[int] = []
        workers.start(lambda: 7, lambda result, error: landed.append(result))
        assert all(workers.cancel(job) for job in jobs)
        workers.start(lambda: 8, lambda result, error: landed.append(result))
        assert not any(workers.cancel(job) for job in jobs)
        gate.set()
        workers.wait(TIMEOUT)
        workers.land()
        assert landed == [7, 8]


class Takers(SimpleQueue[bool]):
    """Of which a thread takes a call, and the job for it, at the very moment at which calls are counted."""

    def __init__(self, waiting: deque[Job]) -> None:
        super().__init__()
        self._waiting = waiting
        self.taken: list[Job] = []

    def qsize(self) -> int:
        size = super().qsize()
        if size and not self.taken:
            self.get()
            self.taken.append(self._waiting.popleft())
        return size


def test_who_takes_a_job_while_another_is_given_does_not_take_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else that would wait for a third one to come."""
    with one_worker() as (workers, _):
        until(lambda: not workers._waiting)
        takers = Takers(workers._waiting)
        monkeypatch.setattr(workers, "_calls", takers)
        first, second = (waiting_job(workers)[0] for _ in range(2))
        assert takers.taken == [first]
        assert (list(workers._waiting), takers.empty()) == ([second], False)
        assert workers.cancel(second)
        workers._under_way.discard(first)


def test_many_jobs_are_all_done() -> None:
    """Without anything that comes after them."""
    workers = Workers(THREADS, lambda: None)
    for _ in range(500):
        for _ in range(20):
            workers.start(lambda: 0, lambda result, error: None)
        workers.wait(TIMEOUT)
        workers.land()
    workers.close()


def test_what_has_landed_is_not_held() -> None:
    """The guest's memory, say, which would stay mapped until there is something else to do."""
    with one_worker() as (workers, gate):
        job, payload = waiting_job(workers)
        gate.set()
        workers.wait(TIMEOUT)
        workers.land()
        del job
        until(lambda: gc.collect() >= 0 and payload() is None)


def test_aborted_commands_leave_nothing_behind() -> None:
    """The data of a COMPARE, say: a guest could have the server keep any number of them."""
    storage = GatedStorage(shut=True)
    with gated(storage, threads=THREADS) as desk, desk.driver.buffers.prp(PAGE) as buffer:
        queue = desk.driver.create_queue_pair(256)
        command = io(IoOpcode.COMPARE, 1, 0, PAGE // 512, buffer)
        queue.submit_many([command] * THREADS)
        storage.wait_for(THREADS)
        for _ in range(3):
            tickets = queue.submit_many([command] * MANY)
            until(lambda: len(desk.device.executor.workers) == THREADS + MANY)
            assert all(desk.driver.abort(ticket) for ticket in tickets)
            assert len(desk.device.executor.workers) == THREADS
        gc.collect()
        held = [held for held in gc.get_objects() if isinstance(held, Job)]
        assert len(held) == THREADS


# Who has all stand still


def other_memory(desk: Desk) -> None:
    """Map memory that no command knows of."""
    fd = os.memfd_create("elsewhere")
    os.ftruncate(fd, PAGE)
    desk.guest.client.dma_map(ELSEWHERE, PAGE, fd)
    os.close(fd)


def test_memory_does_not_wait_for_what_is_not_at_it(impatient: None) -> None:
    storage = GatedStorage(shut=True)
    with gated(storage) as desk:
        other_memory(desk)
        ticket = desk.driver.create_queue_pair().submit(FLUSH)
        storage.wait_for(1)
        desk.guest.client.dma_unmap(ELSEWHERE, PAGE)
        assert not ticket.done
        storage.gate.set()
        assert desk.driver.complete(ticket).status == "SUCCESS"


def test_a_controller_that_is_reset_does_not_wait_for_a_flush(impatient: None) -> None:
    storage = GatedStorage(shut=True)
    with gated(storage) as desk:
        desk.driver.create_queue_pair().submit(FLUSH)
        storage.wait_for(1)
        desk.guest.client.reset()
        assert desk.guest.read32(Register.CC) == 0


def statuses(desk: Desk, tickets: list[Ticket]) -> set[str]:
    return {desk.driver.complete(ticket).status for ticket in tickets}


def test_commands_that_no_worker_has_begun_are_interrupted(impatient: None) -> None:
    """The host sends them again (4.6.1.2.1, Command Interrupted): else a guest could refuse every migration."""
    storage = GatedStorage(shut=True)
    with gated(storage, threads=THREADS) as desk:
        tickets = desk.driver.create_queue_pair(256).submit_many([FLUSH] * MANY)
        until(lambda: len(desk.device.executor.workers) == MANY)
        storage.wait_for(THREADS)
        client = desk.guest.client
        stopped = threading.Thread(target=client.migration_set_state, args=[DeviceState.STOP])
        stopped.start()
        until(lambda: len(desk.device.executor.workers) <= THREADS)
        storage.gate.set()
        stopped.join(TIMEOUT)
        assert client.migration_get_state() is DeviceState.STOP
        client.migration_set_state(DeviceState.RUNNING)
        ended = [desk.driver.complete(ticket) for ticket in tickets]
        assert [one.status for one in ended].count("SUCCESS") == THREADS
        others = {(one.status, one.do_not_retry) for one in ended if one.status != "SUCCESS"}
        assert others == {("COMMAND_INTERRUPTED", False)}


def test_who_sends_them_again_loses_nothing(impatient: None) -> None:
    storage = GatedStorage()
    with gated(storage, threads=1) as desk:
        desk.driver.create_queue_pair(64)
        workload = NvmeWorkload(desk.driver, blocks=512, depth=32)
        workload.run(100)
        storage.gate.clear()
        workload.start()
        until(lambda: len(desk.device.executor.workers) > MANY // 10)
        stopped = threading.Thread(target=desk.guest.client.migration_set_state, args=[DeviceState.STOP])
        stopped.start()
        until(lambda: desk.device.logs.errors)  # of those at memory first, of all others later
        storage.gate.set()
        stopped.join(TIMEOUT)
        desk.guest.client.migration_set_state(DeviceState.RUNNING)
        workload.wait(workload.done + MANY)
        assert workload.verify() == []
        assert "COMMAND_INTERRUPTED" in {Status(error.status).name for error in desk.device.logs.errors}


class Verified(GatedStorage):
    """Of which one piece is let through the gate at a time."""

    def __init__(self) -> None:
        super().__init__(size=64 << 20)
        self.permits = threading.Semaphore(0)
        self.pieces = 0

    def read(self, offset: int, views: Views) -> None:
        assert self.permits.acquire(timeout=TIMEOUT)
        self.pieces += 1
        MemoryStorage.read(self, offset, views)


def test_a_verify_of_many_pieces_is_interrupted(impatient: None) -> None:
    storage = Verified()
    with gated(storage) as desk:
        ticket = desk.driver.create_queue_pair().submit(io(IoOpcode.VERIFY, 1, 0, 65536))
        until(lambda: len(desk.device.executor.workers) == 1)
        stopped = threading.Thread(target=desk.guest.client.migration_set_state, args=[DeviceState.STOP])
        stopped.start()
        until(lambda: desk.device.executor.hurried)
        storage.permits.release()
        stopped.join(TIMEOUT)
        assert not stopped.is_alive()
        desk.guest.client.migration_set_state(DeviceState.RUNNING)
        assert desk.driver.complete(ticket).status == "COMMAND_INTERRUPTED"
        assert storage.pieces == 1


@contextlib.contextmanager
def a_pair_that_waits(storage: GatedStorage) -> Iterator[tuple[Desk, Callable[[], Ticket], QueuePair, list[Ticket]]]:
    """Behind a read that the storage keeps: a desk, what reads once more, the pair's queue, the read and the pair."""
    with gated(storage) as desk, desk.driver.buffers.prp(512) as one, desk.driver.buffers.prp(512) as other:
        pairs, reads = desk.driver.create_queue_pair(), desk.driver.create_queue_pair()
        before = reads.submit(io(IoOpcode.READ, 1, 64, 1, other))
        storage.wait_for(1)
        fused = pairs.submit_many([io(opcode, 1, 0, 1, one, flags=flags) for opcode, flags in COMPARE_AND_WRITE])
        desk.nudge()
        yield desk, lambda: reads.submit(io(IoOpcode.READ, 1, 64, 1, other)), pairs, [before, *fused]


def test_nobody_overtakes_two_fused_commands_that_wait() -> None:
    """Reads of other blocks, one after the other, for ever."""
    storage = GatedStorage(shut=True)
    with a_pair_that_waits(storage) as (desk, read, _, tickets):
        tickets.append(read())
        desk.nudge()
        assert storage.calls == ["read"]
        storage.gate.set()
        assert statuses(desk, tickets) == {"SUCCESS"}
        assert storage.calls == ["read", "read", "write", "read"]


def test_two_fused_commands_that_wait_for_ever_go_with_their_queue() -> None:
    storage = GatedStorage(shut=True)
    with a_pair_that_waits(storage) as (desk, read, pairs, (before, *_)):
        desk.driver.delete_queue_pair(pairs)
        behind = read()
        storage.wait_for(2)
        storage.gate.set()
        assert statuses(desk, [before, behind]) == {"SUCCESS"}
        assert not desk.driver.status & ControllerStatus.CFS


# The end of a process


HANGING = """
import threading
from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.storage.memory import MemoryStorage

class Hanging(MemoryStorage):
    def flush(self):
        print("hangs", flush=True)
        threading.Event().wait()

class Stuck(Nvme):
    def __init__(self, **options):
        super().__init__(path="", **options)
        self.add_namespace(Hanging("hanging", size=1 << 20))
"""


def test_a_storage_that_hangs_keeps_no_process(tmp_path: Path) -> None:
    """SIGTERM ends a server whose worker never returns."""
    (tmp_path / "stuck.py").write_text(HANGING)
    path = tmp_path / "nvme"
    command = [sys.executable, "-m", "vfio_user", "serve", f"{tmp_path}/stuck.py:Stuck", "--socket-path", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        until(path.exists)
        with Client.connect(path) as client:
            driver = NvmeDriver.of_client(client, map_memory(client, 2 << 20))
            driver.enable()
            driver.create_queue_pair().submit(FLUSH)
            while "hangs" not in process.stdout.readline():
                pass
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(TIMEOUT) == 0
            finally:
                process.kill()
