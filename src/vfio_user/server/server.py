"""A device behind a UNIX socket, one client at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
from types import TracebackType

from vfio_user.server.backend import ServerBackend
from vfio_user.server.context import Limits
from vfio_user.server.control import Control
from vfio_user.server.dma_messages import DMA_TIMEOUT
from vfio_user.server.session import Session
from vfio_user.transport.listener import BoundSocket

logger = logging.getLogger("vfio_user.server")


class Server:
    """Serves ``backend`` to one client after another.

    Give it one of ``path`` (a socket is made there: a stale one is replaced, a live one is not), ``sock`` or ``fd``
    (a listening socket, or one that is connected already: then serving ends with that client). ``spin``: seconds to
    look for the next message before sleeping, which saves the wake-up on a machine with cores to spare: a few tens of
    microseconds; by default what the backend asks for. ``max_data_xfer_size`` in bytes, ``max_dma_maps`` regions,
    ``dma_timeout`` in seconds for the client's answer to a DMA request. ``control``: a socket is made there, as at
    ``path`` but with mode 0600, for those who manage the device while a client uses it (docs/control.md).

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
        spin: float | None = None,
        max_data_xfer_size: int = Limits().data_xfer_size,
        max_dma_maps: int = Limits().dma_maps,
        dma_timeout: float = DMA_TIMEOUT,
        control: str | os.PathLike[str] | None = None,
    ) -> None:
        if sum(given is not None for given in (path, sock, fd)) != 1:
            raise ValueError("Server takes one of path, sock and fd")
        self.backend = backend
        self._limits = Limits(max_data_xfer_size, max_dma_maps)
        self._spin = backend.spin if spin is None else spin
        self._dma_timeout = dma_timeout
        self._listener: socket.socket | None = None
        self._connected: socket.socket | None = None
        self._session: Session | None = None
        self._stopping = False
        self._closed = False
        self._made: list[BoundSocket] = []
        if path is not None:
            sock = self._bind(path)
        elif fd is not None:
            sock = socket.socket(fileno=fd)
        assert sock is not None
        self._control: Control | None = None
        if control is not None:
            self._control = Control(backend, self._bind(control, mode=0o600), self._limits)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setblocking(False)
            self._listener = sock
        else:
            self._connected = sock
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._listen(True)

    def _bind(self, path: str | os.PathLike[str], *, mode: int | None = None) -> socket.socket:
        try:
            made = BoundSocket(path, mode=mode)
        except BaseException:
            self._let_go()
            raise
        self._made.append(made)
        return made.socket

    def _let_go(self) -> None:
        """Close the sockets that were made here, and remove their files."""
        self.remove_socket()
        for made in self._made:
            made.socket.close()

    def _listen(self, listening: bool) -> None:
        """Watch for clients, and for control clients; or leave those waiting, and these to the session of one."""
        for watched in (self._listener, self._control):
            if watched is None:
                continue
            if listening:
                self._epoll.register(watched, select.EPOLLIN)
            else:
                self._epoll.unregister(watched)

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
            self._serve_others(0)
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
        for one in (self._listener, self._connected, self._control):
            if one is not None:
                one.close()
        self._epoll.close()
        os.close(self._wake_fd)
        self.remove_socket()

    def remove_socket(self) -> None:
        """Remove the socket files that were made here, if they still are those: nobody finds this server any more."""
        for made in self._made:
            made.remove()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_for_client(self) -> Session | None:
        self._serve_others(None)
        return self._accept()

    def _serve_others(self, timeout: float | None) -> None:
        """Wait for a client that is to be accepted, up to ``timeout`` seconds; serve those of the control socket."""
        self._epoll.poll(timeout)
        self._drain_wake()
        if self._control is not None:
            self._control.serve()

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
            control=self._control,
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


def serve(backend: ServerBackend, path: str | os.PathLike[str]) -> None:
    """Serve ``backend`` at ``path`` until interrupted."""
    with Server(backend, path) as server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
