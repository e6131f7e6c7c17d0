"""The asyncio server, in one loop with its client."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user import aio
from vfio_user.client.core import PROPOSAL
from vfio_user.devices.edu import DMA_COMMAND, DMA_COUNT, DMA_DESTINATION, DMA_SOURCE, DMA_START, DMA_TO_GUEST, Edu
from vfio_user.errors import ConnectionClosedError
from vfio_user.server import Link
from vfio_user.testing import no_fd_leaks
from vfio_user.wire.capabilities import Capabilities

PATIENT = 20.0
BUFFER = 0x40000


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


async def write64(client: aio.Client, offset: int, value: int) -> None:
    await client.region_write(0, offset, value.to_bytes(8, "little"))


async def move(client: aio.Client, source: int, destination: int, count: int, command: int) -> None:
    """Have edu's DMA engine do its work, and wait for it as a driver does."""
    for register, value in ((DMA_SOURCE, source), (DMA_DESTINATION, destination), (DMA_COUNT, count)):
        await write64(client, register, value)
    await write64(client, DMA_COMMAND, command | DMA_START)
    async with asyncio.timeout(PATIENT):
        while int.from_bytes(await client.region_read(0, DMA_COMMAND, 4), "little") & DMA_START:
            pass


@pytest.mark.parametrize("twin", [True, False])
async def test_message_mode_dma_of_edu_with_its_client_in_the_same_loop(tmp_path: Path, twin: bool) -> None:
    path = tmp_path / "edu.sock"
    proposal = PROPOSAL if twin else Capabilities(max_data_xfer_size=1 << 20)
    async with aio.Server(Edu(), path) as server:
        serving = asyncio.create_task(server.serve_forever())
        async with await aio.Client.connect(path, PATIENT, proposal=proposal) as client:
            assert client.capabilities.wants_twin_socket is twin
            memory = bytearray(0x10000)
            memory[0x10:0x20] = b"sixteen bytes..."
            await client.dma_map(1 << 32, len(memory), memory=memory)
            await move(client, (1 << 32) + 0x10, BUFFER, 16, 0)
            await move(client, BUFFER, (1 << 32) + 0x8000, 16, DMA_TO_GUEST)
            assert memory[0x8000:0x8010] == b"sixteen bytes..."
        server.shutdown()
        await serving
    assert not path.exists()


async def test_clients_come_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "edu.sock"
    async with aio.Server(Edu(), path) as server:
        serving = asyncio.create_task(server.serve_forever())
        for value in (1, 2):
            async with await aio.Client.connect(path, PATIENT) as client:
                await client.region_write(0, 4, value.to_bytes(4, "little"))
                assert await client.region_read(0, 4, 4) == (~value & 0xFFFFFFFF).to_bytes(4, "little")
        server.shutdown()
        await serving


async def test_serving_a_connected_socket_ends_with_its_client() -> None:
    ours, theirs = socket.socketpair()
    async with aio.Server(Edu(), sock=theirs) as server:
        serving = asyncio.create_task(server.serve_forever())
        async with aio.Client(ours, PATIENT) as client:
            await client.start()
        async with asyncio.timeout(PATIENT):
            await serving


async def test_a_descriptor_instead_of_a_path() -> None:
    ours, theirs = socket.socketpair()
    async with aio.Server(Edu(), fd=theirs.detach()) as server:
        serving = asyncio.create_task(server.serve_forever())
        async with aio.Client(ours, PATIENT) as client:
            await client.start()
            assert client.info.num_regions == 9
        await serving


async def test_serve_forever_may_be_cancelled(tmp_path: Path) -> None:
    """Its client is told: the connection ends."""
    path = tmp_path / "edu.sock"
    async with aio.Server(Edu(), path) as server:
        serving = asyncio.create_task(server.serve_forever())
        async with await aio.Client.connect(path, PATIENT) as client:
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
            with pytest.raises(ConnectionClosedError):
                await client.reset()


async def test_serve_runs_until_it_is_cancelled_and_removes_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "edu.sock"
    serving = asyncio.create_task(aio.serve(Edu(), path))
    async with asyncio.timeout(PATIENT):
        while not path.exists():
            await asyncio.sleep(0.001)
    async with await aio.Client.connect(path, PATIENT) as client:
        await client.reset()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert not path.exists()


async def test_what_the_server_fails_with_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no more")

    async with aio.Server(Edu(), tmp_path / "edu.sock") as server:
        monkeypatch.setattr(server._server, "serve_forever", fail)
        with pytest.raises(RuntimeError, match="no more"):
            await server.serve_forever()


async def test_a_device_that_cannot_be_connected_costs_its_client_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Moody(Edu):
        moods = iter([True, False])

        def connected(self, link: Link) -> None:
            super().connected(link)
            if next(self.moods):
                raise RuntimeError("not today")

    path = tmp_path / "moody.sock"
    async with aio.Server(Moody(), path) as server:
        serving = asyncio.create_task(server.serve_forever())
        with pytest.raises(ConnectionClosedError):
            await aio.Client.connect(path, PATIENT)
        async with await aio.Client.connect(path, PATIENT) as client:
            await client.reset()
        server.shutdown()
        await serving
    assert "not today" in caplog.text


async def test_shutdown_before_serving(tmp_path: Path) -> None:
    async with aio.Server(Edu(), os.fspath(tmp_path / "edu.sock")) as server:
        server.shutdown()
        async with asyncio.timeout(PATIENT):
            await server.serve_forever()
