"""How many rounds a migration takes: what arithmetic says, on a clock of the test's own."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vfio_user import Client
from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Status, engine

from .device_support import attached, guest_memory

GIB = 1 << 30
MEMORY = 8 * GIB


class Link(LocalDestination):
    """A destination that takes memory at ``rate`` bytes per second of a clock that stands still otherwise."""

    def __init__(self, rate: float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.rate, self.now = rate, 0.0

    def write_memory(self, address: int, data: memoryview) -> None:
        self.now += len(data) / self.rate


@contextlib.contextmanager
def guest(size: int) -> Iterator[tuple[Client, Client, list[MemoryRegion]]]:
    """Source, destination, and memory that nobody looks into and which therefore takes none."""
    with guest_memory(size) as fd, attached(Edu()) as source, attached(Edu()) as other:
        source.dma_map(0, size, fd)
        yield source, other, [MemoryRegion(0, memoryview(mmap.mmap(fd, size)))]


@pytest.mark.parametrize(
    ("changes", "downtime"), [(0.01, 0.1), (0.01, 0.05), (0.01, 1e-4), (0.1, 0.01), (0.5, 0.05), (0.9, 1.0)]
)
def test_eight_gib_converge_in_as_many_rounds_as_arithmetic_predicts(
    changes: float, downtime: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all of the memory moves once, ``changes`` of it is dirtied: each round leaves that share of the last."""
    rate = float(GIB)
    with guest(MEMORY) as (source, other, regions):
        link = Link(rate, clients=[other], memory=regions)
        monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: link.now))
        seen = 0.0

        def guest_dirty() -> list[tuple[int, int]]:
            nonlocal seen
            elapsed, seen = link.now - seen, link.now
            size = int(elapsed * rate * changes)
            return [(0, size)] if size else []

        job = Migration([source], link, memory=regions, guest_dirty=guest_dirty, downtime=downtime, max_rounds=200)
        list(job.run())
    predicted = max(1, math.ceil(math.log(downtime * rate / MEMORY) / math.log(changes)))
    assert job.report.status is Status.COMPLETED
    assert abs(len(job.report.rounds) - 1 - predicted) <= (downtime * rate < 1 << 20)  # pages round up, state is not 0


def test_a_guest_as_fast_as_the_link_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    with guest(GIB) as (source, other, regions):
        link = Link(float(GIB), clients=[other], memory=regions)
        monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: link.now))
        job = Migration([source], link, memory=regions, guest_dirty=lambda: [(0, GIB)], max_rounds=5)
        with pytest.raises(MigrationError, match="does not converge: after 5 rounds 262144 pages are dirty again"):
            list(job.run())
