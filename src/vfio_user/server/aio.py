"""The asyncio server: the names of the blocking one, with ``await``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from types import TracebackType

from vfio_user.server import server as blocking
from vfio_user.server.backend import ServerBackend
from vfio_user.server.context import Limits
from vfio_user.server.dma_messages import DMA_TIMEOUT


class Server:
    """Serves ``backend`` to one client after another; the parameters are those of the blocking server.

    The hooks of a backend are plain functions, and one may wait for the client's memory (``Link.dma_read``). So they
    run in a thread of their own, the one that serves the connection, and the event loop never waits for a device.
    """

    def __init__(
        self,
        backend: ServerBackend,
        path: str | os.PathLike[str] | None = None,
        *,
        sock: socket.socket | None = None,
        fd: int | None = None,
        spin: float | None = None,
        max_data_xfer_size: int = Limits().data_xfer_size,
        max_dma_maps: int = Limits().dma_maps,
        dma_timeout: float = DMA_TIMEOUT,
        control: str | os.PathLike[str] | None = None,
    ) -> None:
        self._server = blocking.Server(
            backend,
            path,
            sock=sock,
            fd=fd,
            spin=spin,
            max_data_xfer_size=max_data_xfer_size,
            max_dma_maps=max_dma_maps,
            dma_timeout=dma_timeout,
            control=control,
        )

    async def serve_forever(self) -> None:
        """Serve until :meth:`shutdown`, or until the client of a connected socket leaves. May be cancelled."""
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()

        def finish(error: BaseException | None) -> None:
            if error is None:
                finished.set_result(None)
            else:
                finished.set_exception(error)

        def serve() -> None:
            error: BaseException | None = None
            try:
                self._server.serve_forever()
            except BaseException as raised:
                error = raised
            loop.call_soon_threadsafe(finish, error)

        thread = threading.Thread(target=serve, name="vfio-user server", daemon=True)
        thread.start()
        try:
            await asyncio.shield(finished)
        finally:
            self._server.shutdown()
            with contextlib.suppress(Exception):
                await finished
            thread.join()

    def shutdown(self) -> None:
        """Stop serving once everything that was received is answered. From any thread, or a signal handler."""
        self._server.shutdown()

    async def close(self) -> None:
        """Let the client go, remove the socket. After :meth:`serve_forever` has returned."""
        self._server.close()

    def remove_socket(self) -> None:
        """Remove the socket file that was made here, if it still is that one: nobody finds this server any more."""
        self._server.remove_socket()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def serve(backend: ServerBackend, path: str | os.PathLike[str]) -> None:
    """Serve ``backend`` at ``path`` until cancelled."""
    async with Server(backend, path) as server:
        await server.serve_forever()
