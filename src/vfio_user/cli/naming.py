"""Whom an error names that names nobody itself."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(culprit: object) -> Iterator[None]:
    """An OSError within that names no file, as those of sockets do, names ``culprit``."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(culprit)) from error
