"""A listening UNIX socket in the file system: made, with a stale one replaced, and removed again."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path


class BoundSocket:
    """A socket that listens at ``path``: a stale file there is replaced, a live server's is not.

    ``mode``: the permissions of the file, from its first moment on; by default what the umask leaves. Raises OSError,
    which names the path: EADDRINUSE if another server is alive there, or the file is no socket.
    """

    def __init__(self, path: str | os.PathLike[str], *, mode: int | None = None) -> None:
        self.path = Path(path)
        self.socket = _listen(self.path, mode)
        self._inode = self.path.stat().st_ino

    def remove(self) -> None:
        """Remove the file, if it still is that one: nobody finds this server any more."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


def _listen(path: Path, mode: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if mode is not None:
            os.fchmod(listener.fileno(), mode)  # bind(2) gives the file what the socket has, less the umask
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
    return listener


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
