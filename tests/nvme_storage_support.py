"""What the tests of storages share: pieces of memory, and data to put in them."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
from collections.abc import Iterable, Iterator

import pytest

from vfio_user.devices.nvme.storage import Storage

SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20


@functools.cache
def data(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def views(lengths: Iterable[int]) -> list[memoryview]:
    """Empty pieces of memory."""
    return [memoryview(bytearray(length)) for length in lengths]


def split(content: bytes, lengths: Iterable[int]) -> list[memoryview]:
    """``content`` in pieces of memory."""
    pieces = views(lengths)
    for piece in pieces:
        piece[:], content = content[: len(piece)], content[len(piece) :]
    assert not content
    return pieces


def read(storage: Storage, offset: int, length: int) -> bytes:
    (view,) = views([length])
    storage.read(offset, [view])
    return bytes(view)


def write(storage: Storage, offset: int, content: bytes) -> None:
    storage.write(offset, [memoryview(bytearray(content))])


def open_files() -> int:
    gc.collect()  # what tests before have left to it is not to be missed later
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def fails(number: int, *words: str) -> Iterator[None]:
    """Within, an OSError is raised that has this errno, and says all of these words."""
    with pytest.raises(
        OSError, check=lambda error: error.errno == number and all(word in str(error) for word in words)
    ):
        yield
