"""A device behind a UNIX socket, one client at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
from pathlib import Path
from types import TracebackType

from vfio_user.server.backend import ServerBackend
from vfio_user.server.context import Limits
from vfio_user.server.session import DMA_TIMEOUT, Session

logger = logging.getLogger("vfio_user.server")


class Server:
    """Serves ``backend`` to one client after another.

    Give it one of ``path`` (a socket is made there: a stale one is replaced, a live one is not), ``sock`` or ``fd``
    (a listening socket, or one that is connected already: then serving ends with that client). ``spin``: seconds to
    look for the next message before sleeping, which saves the wake-up on a machine with cores to spare; a few tens of
    microseconds. ``max_data_xfer_size`` in bytes, ``max_dma_maps`` regions, ``dma_timeout`` in seconds for the
    client's answer to a DMA request.

    Use :meth:`serve_forever`, or put :meth:`fileno` into an event loop of your own and call :meth:`poll` whenever it
    is readable. Raises OSError when the socket cannot be made: EADDRINUSE if another server is alive at ``path``.
    """

    def __init__(
        self,
        backend: ServerBackend,
        path: str | os.PathLike[str] | None = None,
        *,
        sock: socket.socket | None = None,
        fd: int | None = None,
        spin: float = 0.0,
        max_data_xfer_size: int = Limits().data_xfer_size,
        max_dma_maps: int = Limits().dma_maps,
        dma_timeout: float = DMA_TIMEOUT,
    ) -> None:
        if sum(given is not None for given in (path, sock, fd)) != 1:
            raise ValueError("Server takes one of path, sock and fd")
        self.backend = backend
        self._limits = Limits(max_data_xfer_size, max_dma_maps)
        self._spin = spin
        self._dma_timeout = dma_timeout
        self._bound: tuple[Path, int] | None = None
        self._listener: socket.socket | None = None
        self._connected: socket.socket | None = None
        self._session: Session | None = None
        self._stopping = False
        self._closed = False
        if path is not None:
            sock = self._bind(Path(path))
        elif fd is not None:
            sock = socket.socket(fileno=fd)
        assert sock is not None
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setblocking(False)
            self._listener = sock
        else:
            self._connected = sock
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._listen(True)

    def _bind(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                listener.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    number = error.errno or errno.ENAMETOOLONG  # Python checks the length itself, and gives none
                    raise OSError(number, os.strerror(number), str(path)) from error
                _remove_stale(path)
                listener.bind(str(path))
            listener.listen()
        except BaseException:
            listener.close()
            raise
        self._bound = (path, path.stat().st_ino)
        return listener

    def _listen(self, listening: bool) -> None:
        """Watch for clients, or leave them waiting while one is served."""
        if self._listener is None:
            return
        if listening:
            self._epoll.register(self._listener, select.EPOLLIN)
        else:
            self._epoll.unregister(self._listener)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to serve: shut down, or the one connected client has left.

        A client that is there at a shutdown is served to its end first: an event loop goes on polling until then.
        """
        no_more_to_come = self._stopping or (self._listener is None and self._connected is None)
        return no_more_to_come and self._session is None

    def serve_forever(self) -> None:
        """Serve until :meth:`shutdown`, or until the client of a connected socket leaves."""
        while not self.finished:
            session = self._accept() or self._wait_for_client()
            if session is not None:
                session.serve()
                self._session_ended()

    def fileno(self) -> int:
        """A descriptor that is readable whenever :meth:`poll` has something to do."""
        return self._epoll.fileno()

    def poll(self) -> int:
        """Do what can be done without waiting: take a client, serve its messages. Returns the messages handled."""
        session = self._session or self._accept()
        if session is None:
            self._epoll.poll(0)
            self._drain_wake()
            return 0
        handled = session.step()
        if handled is None:
            self._session_ended()
        return handled or 0

    def shutdown(self) -> None:
        """Stop serving once everything that was received is answered. From any thread, or a signal handler."""
        self._stopping = True
        session = self._session
        if session is not None:
            session.stop()
        self._wake()

    def close(self) -> None:
        """Let the client go, remove the socket. After this the server is of no use."""
        if self._closed:
            return
        self._closed = self._stopping = True
        if self._session is not None:
            self._session.close()
        for sock in (self._listener, self._connected):
            if sock is not None:
                sock.close()
        self._epoll.close()
        os.close(self._wake_fd)
        self.remove_socket()

    def remove_socket(self) -> None:
        """Remove the socket file that was made here, if it still is that one: nobody finds this server any more."""
        if self._bound is not None:
            path, inode = self._bound
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_for_client(self) -> Session | None:
        self._epoll.poll()
        self._drain_wake()
        return self._accept()

    def _accept(self) -> Session | None:
        """The session of a client that is there, if any."""
        if self._stopping:
            return None
        sock, self._connected = self._connected, None
        if sock is None:
            sock = self._accept_socket()
        if sock is None:
            return None
        self._listen(False)
        self._session = Session(
            self.backend,
            sock,
            self._epoll,
            self._wake,
            limits=self._limits,
            spin=self._spin,
            dma_timeout=self._dma_timeout,
        )
        if self._stopping:  # shutdown() looked for a session before there was one
            self._session.stop()
        return self._session

    def _accept_socket(self) -> socket.socket | None:
        if self._listener is None:
            return None
        try:
            return self._listener.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            logger.warning("a client could not be accepted: %s", error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._pause(0.1)
            return None

    def _pause(self, seconds: float) -> None:
        """Let a shortage of descriptors pass, but not a shutdown."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.poll(seconds * 1000)

    def _session_ended(self) -> None:
        self._session = None
        self._listen(True)

    def _wake(self) -> None:
        if self._closed:  # the number may be another file's by now
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake_fd, 1)

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)


def _remove_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on. Raises OSError(EADDRINUSE) if somebody does, or it is none."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise OSError(errno.EADDRINUSE, "in use: it is no socket", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # a full backlog: alive
    raise OSError(errno.EADDRINUSE, "in use by another server", str(path))


def serve(backend: ServerBackend, path: str | os.PathLike[str]) -> None:
    """Serve ``backend`` at ``path`` until interrupted."""
    with Server(backend, path) as server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
