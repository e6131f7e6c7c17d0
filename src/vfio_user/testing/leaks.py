"""File descriptors that a test leaves behind."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

_FDS = "/proc/self/fd"


def _open_fds() -> dict[int, str]:
    """What each open descriptor of this process is, as /proc names it."""
    found = {}
    for name in os.listdir(_FDS):
        with contextlib.suppress(FileNotFoundError):  # the one that reads the directory
            found[int(name)] = os.readlink(f"{_FDS}/{name}")
    return found


@contextlib.contextmanager
def no_fd_leaks() -> Iterator[None]:
    """Raise AssertionError, naming them, when descriptors are open at the end that were not open at the start.

    Everything that the block used must be closed in it. Threads that open descriptors of their own meanwhile are
    taken for leaks.
    """
    before = _open_fds()
    yield
    if _left_over(before):
        gc.collect()  # an exception that was caught keeps what its frames hold until then
    leaked = _left_over(before)
    if leaked:
        names = ", ".join(f"{fd} ({target})" for fd, target in sorted(leaked.items()))
        raise AssertionError(f"file descriptors were left open: {names}")


def _left_over(before: dict[int, str]) -> dict[int, str]:
    return dict(_open_fds().items() - before.items())
