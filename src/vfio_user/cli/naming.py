"""Errors of sockets name them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vfio_user.client import Client


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
    with naming(path):
        return Client.connect(path, timeout)
