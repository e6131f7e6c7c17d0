"""How long the IOVA table takes to find a region, among few and among as many as a peer may map."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from vfio_user.dma.iova import IovaTable

FEW, MANY = 16, 65535
REGION_SIZE = 64 << 10
STRIDE = 2 * REGION_SIZE
"""Every other 64 KiB of the guest's memory is mapped: no two regions are neighbours."""
LOOK_UPS = 20_000


def look_ups(regions: int, distinct: int) -> Callable[[], float]:
    """A function that looks up ``distinct`` random addresses of ``regions`` regions, over and over.

    It returns nanoseconds per look-up. The loop and the call are in there, on both sides of a ratio.
    """
    table = IovaTable[None]()
    for index in range(regions):
        table.add(index * STRIDE, REGION_SIZE, None)
    pick = random.Random(1)
    some = [pick.randrange(regions) * STRIDE + pick.randrange(REGION_SIZE) for _ in range(distinct)]
    addresses = some * (LOOK_UPS // distinct)

    def measure() -> float:
        find = table.find
        start = time.perf_counter_ns()
        for address in addresses:
            find(address)
        return (time.perf_counter_ns() - start) / len(addresses)

    return measure
