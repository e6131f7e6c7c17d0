"""Why something failed, in one line that names the culprit."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vfio_user.errors import VfioUserError


@contextmanager
def naming(culprit: object) -> Iterator[None]:
    """An OSError within that names no file, as those of sockets do, names ``culprit``."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(culprit)) from error


def describe(error: Exception) -> str:
    """One line. What the operating system refused names the file that it was about."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, VfioUserError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
