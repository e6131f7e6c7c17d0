"""What only the asyncio client has: tasks, cancellation, a loop that must go on. The rest is in test_client_*."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.hostile import (
    NO_REPLY,
    PATIENT,
    SET_UP,
    Answers,
    Peer,
    Request,
    ScriptedServer,
    message,
    pattern,
    prepared,
)
from vfio_user import aio
from vfio_user.errors import CallTimeoutError, ConnectionClosedError
from vfio_user.testing import no_fd_leaks
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


@contextlib.asynccontextmanager
async def scripted(
    answers: Answers | None = None, timeout: float = PATIENT
) -> AsyncIterator[tuple[aio.Client, ScriptedServer]]:
    server = ScriptedServer(answers or {})
    try:
        async with aio.Client(server.client_socket, timeout) as client:
            await client.start()
            yield client, server
    finally:
        server.finish()


def hold(peer: Peer, request: Request) -> None:
    """Not answered until the test is over."""
    peer.over.wait(PATIENT)


async def asked(server: ScriptedServer, command: int) -> None:
    """Wait until the server has seen a command."""
    while not server.of(command):
        await asyncio.sleep(0.001)


async def test_calls_of_several_tasks_do_not_mix() -> None:
    async with scripted() as (client, _):

        async def read(number: int) -> None:
            for offset in range(number * 100, number * 100 + 20):
                assert await client.region_read(0, offset, 16) == pattern(offset, 16)

        await asyncio.gather(*(read(number) for number in range(5)))


async def test_other_tasks_run_while_a_call_waits() -> None:
    answered = asyncio.Event()
    loop = asyncio.get_running_loop()

    def answer_when_told(peer: Peer, request: Request) -> None:
        loop.call_soon_threadsafe(answered.set)
        assert peer.over.wait(PATIENT)
        peer.reply(request)

    async with scripted({Command.DEVICE_RESET: answer_when_told}) as (client, server):
        call = asyncio.create_task(client.reset())
        await answered.wait()
        assert not call.done()
        server.peer.over.set()
        await call


async def test_other_tasks_run_while_the_server_asks_for_ever() -> None:
    """Its requests are always there, so that the client never has to wait; the loop goes on nevertheless."""

    def flood(peer: Peer, request: Request) -> None:
        burst = message(1, Command.DMA_WRITE, m.DmaAccess(0, 0).pack(), flags=NO_REPLY) * 500
        while not peer.over.is_set():
            peer.raw(burst)

    async with scripted({Command.DEVICE_RESET: flood}) as (client, server):
        call = asyncio.create_task(client.reset())
        await asked(server, Command.DEVICE_RESET)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        server.peer.over.set()


async def test_other_tasks_run_between_requests_that_came_at_once() -> None:
    burst = message(1, Command.DMA_READ, flags=NO_REPLY) * 1000
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    with prepared(*SET_UP, burst, message(5, Command.DEVICE_RESET)) as sock:
        async with aio.Client(sock, PATIENT) as client:
            await client.start()
            other = asyncio.create_task(tick())
            await client.reset()
            other.cancel()
    assert ticks > 500


async def test_a_cancelled_call_leaves_the_connection_as_it_was() -> None:
    """Its late answer is dropped."""
    held: list[Request] = []

    def late(peer: Peer, request: Request) -> None:
        held.append(request)

    def flush(peer: Peer, request: Request) -> None:
        for old in held:
            peer.reply(old, old.payload + b"late")
        peer.reply(request)

    async with scripted({Command.REGION_READ: late, Command.DEVICE_RESET: flush}) as (client, server):
        call = asyncio.create_task(client.region_read(0, 0, 4))
        await asked(server, Command.REGION_READ)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.reset()
        await client.region_write(0, 0, b"x")


async def test_a_call_that_is_cancelled_while_it_waits_for_its_turn_sends_nothing() -> None:
    async with scripted({Command.DEVICE_RESET: hold}) as (client, server):
        first = asyncio.create_task(client.reset())
        await asked(server, Command.DEVICE_RESET)
        second = asyncio.create_task(client.region_read(0, 0, 4))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        server.peer.over.set()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert server.of(Command.REGION_READ) == []


async def test_a_call_that_is_cancelled_in_mid_message_ends_the_connection() -> None:
    """A part of it is out: nothing else can follow."""
    async with scripted({Command.DEVICE_RESET: hold}) as (client, server):
        reset = asyncio.create_task(client.reset())
        await asked(server, Command.DEVICE_RESET)
        reset.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reset
        write = asyncio.create_task(client.region_write(0, 0, bytes(1 << 20), posted=True))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not write.done()
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        with pytest.raises(ConnectionClosedError):
            await client.region_read(0, 0, 4)
        server.peer.over.set()


async def test_close_ends_the_call_of_another_task_and_those_that_wait() -> None:
    async with scripted({Command.DEVICE_RESET: hold}) as (client, server):
        calls = [asyncio.create_task(client.reset()), asyncio.create_task(client.region_read(0, 0, 4))]
        await asked(server, Command.DEVICE_RESET)
        client.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [ConnectionClosedError] * 2
        assert server.client_socket.fileno() == -1
        server.peer.over.set()


async def test_serve_dma_leaves_the_loop_to_others_and_can_be_cancelled() -> None:
    async with scripted() as (client, _):
        idle = asyncio.create_task(client.serve_dma(PATIENT))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not idle.done()
        idle.cancel()
        with pytest.raises(asyncio.CancelledError):
            await idle
        await client.reset()


async def test_set_up_may_be_cancelled() -> None:
    server = ScriptedServer({Command.DEVICE_GET_INFO: hold})
    try:
        client = aio.Client(server.client_socket, PATIENT)
        start = asyncio.create_task(client.start())
        await asked(server, Command.DEVICE_GET_INFO)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert server.client_socket.fileno() == -1
    finally:
        server.finish()


async def test_a_callers_own_timeout_works() -> None:
    async with scripted({Command.DEVICE_RESET: hold}) as (client, server):
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.05):
                await client.reset()
        assert not isinstance(caught.value, CallTimeoutError)
        server.peer.over.set()


async def test_errors_are_those_of_the_blocking_client() -> None:
    async with scripted({Command.DEVICE_RESET: lambda peer, r: peer.refuse(r, errno.EBUSY)}) as (client, _):
        with pytest.raises(OSError, match="DEVICE_RESET refused") as caught:
            await client.reset()
        assert caught.value.errno == errno.EBUSY
