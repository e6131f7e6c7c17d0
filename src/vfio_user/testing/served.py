"""A device behind a socket of its own, in this process: for tests that want a path to connect to."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from vfio_user.server import Server, ServerBackend


class ServedDevice:
    """Serves ``device`` at ``path``, in a temporary folder, by a thread; a context manager.

    ``options`` are those of :class:`~vfio_user.Server`. ``timeout``: seconds that the device has to let go.
    """

    def __init__(self, device: ServerBackend, *, timeout: float = 10.0, **options: Any) -> None:
        self.device = device
        self._timeout = timeout
        self._error: BaseException | None = None
        self._stopped = False
        self._folder = TemporaryDirectory(prefix="vfio-user-")  # not a test's own: the path of a socket is short
        self.path = Path(self._folder.name, "device.sock")
        try:
            self._server = Server(device, self.path, **options)
        except BaseException:
            self._folder.cleanup()
            raise
        self._thread = threading.Thread(target=self._serve, name=f"{type(device).__name__} served", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._server.serve_forever()
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        """Let the client go and remove the socket. Called again, it does nothing.

        Raises what the server's thread failed with, and TimeoutError when a hook of the device does not return.
        """
        if self._stopped:
            return
        self._stopped = True
        self._server.shutdown()
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{type(self.device).__name__} did not let go of its client in {self._timeout} s")
        self._server.close()
        self._folder.cleanup()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> ServedDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
