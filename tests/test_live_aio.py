"""The asyncio twin of the engine: what only it has. The rest is in test_live."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from vfio_user import Client, DeviceState, aio, live
from vfio_user.devices import edu
from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError
from vfio_user.live import MemoryRegion, Round, Status, Step
from vfio_user.live.aio import Callback
from vfio_user.live.destination import nothing
from vfio_user.live.progress import Watch
from vfio_user.testing import no_fd_leaks

PAGE = 4096
MEMORY = 16 * PAGE
TIMEOUT = 20.0


class Side:
    """A device, its client, and guest memory that the device can reach."""

    def __init__(self, device: Edu, client: aio.Client, memory: memoryview) -> None:
        self.device, self.client, self.memory = device, client, memory

    async def write(self, register: int, value: int) -> None:
        await self.client.region_write(0, register, value.to_bytes(4, "little"))

    async def read(self, register: int) -> int:
        return int.from_bytes(await self.client.region_read(0, register, 4), "little")


@contextlib.asynccontextmanager
async def side(device: Edu, path: Path) -> AsyncIterator[Side]:
    async with aio.Server(device, path) as server:
        serving = asyncio.create_task(server.serve_forever())
        try:
            async with await aio.Client.connect(path, TIMEOUT) as client:
                memory = bytearray(MEMORY)
                await client.dma_map(0, MEMORY, memory=memory)
                yield Side(device, client, memoryview(memory))
        finally:
            server.shutdown()
            await asyncio.wait_for(serving, TIMEOUT)


@contextlib.asynccontextmanager
async def two_sides(path: Path) -> AsyncIterator[tuple[Side, Side]]:
    here, there = Edu(), Edu()  # what they have goes with them, later
    with no_fd_leaks():
        async with (
            asyncio.timeout(2 * TIMEOUT),
            side(here, path / "source") as source,
            side(there, path / "destination") as destination,
        ):
            yield source, destination
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("migration")]
    assert not left, left


@pytest.fixture
async def sides(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    async with two_sides(tmp_path) as both:
        yield both


def migration(source: Side, destination: Side, *, resumed: Callback = nothing, **options: Any) -> aio.Migration:
    """``resumed``: called when the guest goes on at the destination."""
    to = aio.LocalDestination([destination.client], [MemoryRegion(0, destination.memory)], resume=resumed)
    return aio.Migration([source.client], to, memory=[MemoryRegion(0, source.memory)], **options)


async def run(job: aio.Migration) -> list[Round]:
    return [done async for done in job.run()]


async def expect_source_runs_on(source: Side, destination: Side) -> None:
    assert await source.client.migration_get_state() == DeviceState.RUNNING
    assert not source.device.dma.log.active
    await source.write(edu.LIVENESS, 1)
    assert await source.read(edu.LIVENESS) == 0xFFFFFFFE
    assert await destination.client.migration_get_state() == DeviceState.RUNNING
    assert await destination.read(edu.LIVENESS) == 0


async def test_device_and_memory_arrive_by_way_of_coroutines(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    loop_thread = threading.get_ident()
    called: list[str] = []
    wrote: list[tuple[int, int]] = []

    async def dirty() -> list[tuple[int, int]]:
        await asyncio.sleep(0)
        return [wrote.pop()] if wrote else []

    async def pause() -> None:
        await source.write(edu.LIVENESS, 0x1234)  # the guest uses its device up to now, through the same client
        source.memory[5 * PAGE + 17] = 7
        wrote.append((5 * PAGE + 17, 1))
        called.append("pause")

    def resumed() -> None:
        assert threading.get_ident() == loop_thread
        called.append("resumed")

    source.memory[:5] = b"hello"
    job = migration(source, destination, pause=pause, guest_dirty=dirty, resumed=resumed)
    rounds = await run(job)
    assert [done.pages for done in rounds] == [16, 1]
    assert rounds == job.report.rounds
    assert called == ["pause", "resumed"]
    assert (job.report.status, job.pages_left) == (Status.COMPLETED, 0)
    assert destination.memory == source.memory
    assert await destination.read(edu.LIVENESS) == ~0x1234 & 0xFFFFFFFF
    assert await source.client.migration_get_state() == DeviceState.STOP
    assert await destination.client.migration_get_state() == DeviceState.RUNNING


async def test_blocking_clients_and_destinations_serve_too(tmp_path: Path) -> None:
    """Their servers are in the event loop: it must go on while the thread waits for them."""
    async with aio.Server(Edu(), tmp_path / "a") as here, aio.Server(Edu(), tmp_path / "b") as there:
        serving = [asyncio.create_task(server.serve_forever()) for server in (here, there)]
        clients = [await asyncio.to_thread(Client.connect, tmp_path / name, TIMEOUT) for name in "ab"]
        with clients[0] as source, clients[1] as destination:
            job = aio.Migration([source], live.LocalDestination([destination]))
            assert (await run(job))[-1].stopped
            assert destination.migration_get_state() == DeviceState.RUNNING
        for server in (here, there):
            server.shutdown()
        await asyncio.gather(*serving)


async def test_the_event_loop_goes_on_meanwhile(sides: tuple[Side, Side]) -> None:
    """Other tasks use the clients during a round: this one ends only when such a task has had its turn often enough."""
    source, destination = sides
    everything = [(0, MEMORY)]
    turns, paused = 0, asyncio.Event()
    job = migration(
        source,
        destination,
        guest_dirty=lambda: everything,
        max_rounds=1_000_000,
        downtime=0.0,
        pause=paused.set,
    )

    async def look() -> None:
        nonlocal turns
        watch = Watch(job.engine)
        while not paused.is_set():
            assert watch.look().pages <= MEMORY // PAGE
            await source.read(edu.LIVENESS)
            turns += 1
            if turns == 20:
                job.engine.downtime = float("inf")  # whatever is left now may be

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(look())
        tasks.create_task(run(job))
    assert turns >= 20


class TroubleError(Exception):
    pass


async def trouble() -> None:
    await asyncio.sleep(0)
    raise TroubleError


@pytest.mark.parametrize(("options", "step"), [({"pause": trouble}, Step.PAUSE), ({"resumed": trouble}, Step.START)])
async def test_what_a_coroutine_raises_is_rolled_back_and_passes(
    sides: tuple[Side, Side], options: dict[str, Any], step: Step
) -> None:
    resumed: list[bool] = []

    async def resume() -> None:
        await asyncio.sleep(0)
        resumed.append(True)

    job = migration(*sides, resume=resume, **options)
    with pytest.raises(TroubleError):
        await run(job)
    assert (job.report.status, job.report.step, resumed) == (Status.FAILED, step, [True])
    await expect_source_runs_on(*sides)


async def test_a_destination_that_is_gone_leaves_the_source_running(sides: tuple[Side, Side]) -> None:
    source, destination = sides
    job = migration(source, destination, pause=destination.client.close)
    with pytest.raises(MigrationError, match="stop-and-copy failed"):
        await run(job)
    assert await source.client.migration_get_state() == DeviceState.RUNNING
    assert not source.device.dma.log.active


# Cancelled


async def cancelled(job: aio.Migration, when: asyncio.Event) -> None:
    """Run it in a task, which is cancelled ``when``, and twice, as an impatient user does."""
    task = asyncio.create_task(run(job))
    await when.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_it_waits_for_the_guest(sides: tuple[Side, Side]) -> None:
    """A guest that never pauses: what the callback awaits is cancelled, and what undoes it is not."""
    waits = asyncio.Event()
    events: list[str] = []

    async def pause() -> None:
        waits.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            events.append("pause was cancelled")
            raise

    async def resume() -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        events.append("resumed")

    job = migration(*sides, pause=pause, resume=resume)
    await cancelled(job, waits)
    assert events == ["pause was cancelled", "resumed"]
    assert (job.report.status, job.report.step, job.report.error) == (Status.FAILED, Step.PAUSE, "it was cancelled")
    await expect_source_runs_on(*sides)


async def test_cancelled_within_a_round(sides: tuple[Side, Side]) -> None:
    """Of a guest whose pages are dirty for ever."""
    rounds = asyncio.Event()

    def dirty() -> list[tuple[int, int]]:
        if len(job.report.rounds) > 3:
            rounds.set()
        return [(0, MEMORY)]

    job = migration(*sides, guest_dirty=dirty, max_rounds=1_000_000, downtime=0.0)
    await cancelled(job, rounds)
    assert (job.report.status, job.report.step, job.report.error) == (Status.FAILED, Step.PRE_COPY, "it was cancelled")
    await expect_source_runs_on(*sides)


@pytest.mark.parametrize("calls", range(32))
async def test_cancelled_anywhere_exactly_one_side_runs(
    sides: tuple[Side, Side], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled at the n-th call of a client: a different place of the migration for each n, until there is no more."""
    source, destination = sides
    reached = asyncio.Event()
    left = calls

    def counting(transact: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                reached.set()
            return transact(*arguments)

        return counted

    for one in sides:
        monkeypatch.setattr(one.client, "_transact", counting(one.client._transact))
    job = migration(source, destination)
    task = asyncio.create_task(run(job))
    waiting = asyncio.create_task(reached.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if job.report.status is Status.COMPLETED:
        assert await source.client.migration_get_state() == DeviceState.STOP
        assert await destination.client.migration_get_state() == DeviceState.RUNNING
    else:
        await expect_source_runs_on(source, destination)


async def test_giving_up_the_iteration_is_rolled_back(sides: tuple[Side, Side]) -> None:
    job = migration(*sides)
    async with contextlib.aclosing(job.run()) as rounds:
        async for _ in rounds:
            assert await sides[0].client.migration_get_state() == DeviceState.PRE_COPY
            break
    assert (job.report.status, job.report.step) == (Status.FAILED, Step.PRE_COPY)
    await expect_source_runs_on(*sides)


def test_it_is_made_where_an_event_loop_runs() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        aio.Migration([], live.LocalDestination([]))


@pytest.mark.parametrize("name", ["Migration", "LocalDestination"])
def test_twins_take_the_same_parameters(name: str) -> None:
    def parameters(kind: Any) -> list[tuple[str, Any, Any]]:
        return [(one.name, one.kind, one.default) for one in inspect.signature(kind).parameters.values()]

    assert parameters(getattr(live, name)) == parameters(getattr(aio, name))
