"""Errors of sockets name them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vfio_user.client import Client
from vfio_user.errors import CallTimeoutError, FramingError


@contextmanager
def naming(culprit: object) -> Iterator[None]:
    """An OSError within that names no file, as those of sockets do, names ``culprit``."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(culprit)) from error


def connect(path: str, timeout: float) -> Client:
    """A client of the server at ``path``; what fails names it."""
    with meeting(path):
        return Client.connect(path, timeout)


@contextmanager
def meeting(path: str) -> Iterator[None]:
    """A connection to the server at ``path`` is made within; what fails names it, and says what that may come of."""
    with naming(path):
        try:
            yield
        except CallTimeoutError as error:
            hint = "does it serve another client? A control socket, of serve --control, takes several"
            raise CallTimeoutError(f"{error}: {hint}") from error
        except FramingError as error:
            raise FramingError(f"{path}: no server of vfio-user: {error}") from error
