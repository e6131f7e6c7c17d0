"""The device that the benchmarks talk to, behind ``vfio_user.Server``: ``device.py SOCKET [--spin MICROSECONDS]``.

Region 0 is 1 MiB of memory. Region 1 holds two registers of 8 bytes: writing a length to the first marks guest
memory from 0 to there dirty, as a device would that has just written all of it; the second counts the bytes that
went to region 2, a port of 1 MiB, and of migration data, and writing to it sets it. The port and RESUMING look at
no byte of what they are given, as the plain stream does not; migration data to be read is a pattern without end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from mmap import PAGESIZE, mmap

from vfio_user.dma import DirtyLog
from vfio_user.fds import OwnedFd
from vfio_user.server import Region, Server, ServerBackend
from vfio_user.wire.constants import DeviceState, MigrationFlags

MEMORY, CONTROL, PORT = 0, 1, 2
MEMORY_SIZE = 1 << 20
DIRTY_ALL, BYTES_TAKEN = 0, 8
PATTERN = bytes(range(251))
DATA_OFFSET = 24
"""Where migration data begins in its message, and so in its page here: see ServerBackend.migration_view."""


class BenchDevice(ServerBackend):
    regions = (Region(MEMORY_SIZE), Region(16), Region(MEMORY_SIZE))

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(MEMORY_SIZE))
        self.saved = memoryview(mmap(-1, MEMORY_SIZE + PAGESIZE))[DATA_OFFSET : DATA_OFFSET + MEMORY_SIZE]
        self.saved[:] = (PATTERN * (MEMORY_SIZE // len(PATTERN) + 1))[:MEMORY_SIZE]
        self.bytes_taken = 0
        self.state = DeviceState.RUNNING
        self.log = DirtyLog()

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        if region == MEMORY:
            data[:] = self.memory[offset : offset + len(data)]
        elif region == CONTROL and offset == BYTES_TAKEN:
            data[:] = self.bytes_taken.to_bytes(8, "little")

    def region_view(self, region: int, offset: int, count: int) -> memoryview | None:
        return self.memory[offset : offset + count] if region == MEMORY else None

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        if region == MEMORY:
            self.memory[offset : offset + len(data)] = data
        elif region == PORT:
            self.bytes_taken += len(data)
        elif offset == DIRTY_ALL:
            self.log.mark(0, int.from_bytes(data, "little"))
        elif offset == BYTES_TAKEN:
            self.bytes_taken = int.from_bytes(data, "little")

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        self.log.map(address, size)

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self.log.unmap(address, size)

    def migration_flags(self) -> MigrationFlags:
        return MigrationFlags.STOP_COPY

    def migration_get_state(self) -> DeviceState:
        return self.state

    def migration_set_state(self, state: DeviceState) -> None:
        self.state = state

    def migration_read_data(self, data: memoryview) -> int:
        data[:] = self.saved[: len(data)]
        return len(data)

    def migration_view(self, size: int) -> memoryview | None:
        return self.saved[:size]

    def migration_write_data(self, data: memoryview) -> None:
        self.bytes_taken += len(data)

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        return self.log.start(page_size, ranges)

    def dma_logging_stop(self) -> None:
        self.log.stop()

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        self.log.report(iova, length, page_size, bitmap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket")
    parser.add_argument("--spin", type=int, default=0, metavar="MICROSECONDS")
    arguments = parser.parse_args()
    Server(BenchDevice(), path=arguments.socket, spin=arguments.spin / 1e6).serve_forever()


if __name__ == "__main__":
    main()
