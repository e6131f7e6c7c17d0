"""What takes the time: one exchange after another, on one connection, and the device as it was afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter_ns
from typing import NamedTuple

from vfio_user.dma.bitmap import bitmap_size
from vfio_user.errors import CommandError, ConnectionClosedError, MessageError, MigrationError, VfioUserError
from vfio_user.fds import OwnedFd
from vfio_user.tools.bench.link import ROOM, Link, message
from vfio_user.tools.location import Location, region_name
from vfio_user.wire import messages as m
from vfio_user.wire.constants import (
    HEADER_SIZE,
    PAGE_SIZE,
    Command,
    DeviceFeature,
    DeviceState,
    DmaFlags,
    FeatureFlags,
    HeaderFlags,
    MigrationFlags,
)

POSTED, POSTED_BYTES = 100, 1 << 20
"""Most writes without a reply, and most bytes of them, before a read whose reply says that all of them were done."""
IOVA = 1 << 32
MAX_STATE = 256 << 20
"""Bytes of device state that are kept, to be written back."""

_READ_WRITE = int(DmaFlags.READ | DmaFlags.WRITE)


class LeftOutError(VfioUserError):
    """A server cannot do what a measure is about."""


class Sample(NamedTuple):
    """How long one message took, in nanoseconds, and how many bytes of data it carried."""

    duration: int
    size: int


class Probe:
    """Measures one thing on one connection."""

    def start(self) -> None:
        """What has to be done before. Raises LeftOutError or CommandError: the server cannot do it."""

    def once(self) -> Sample:
        """Do it once. Raises CommandError, and what ends the connection."""
        raise NotImplementedError

    def stop(self) -> None:
        """Leave the device as it was, also if start has failed."""


class Exchange(Probe):
    """One and the same message, again and again."""

    request = b""
    reply_size = 0
    size = 0

    def __init__(self, link: Link) -> None:
        self.link = link

    def once(self) -> Sample:
        return Sample(self.link.exchange(self.request, self.reply_size), self.size)


class Info(Exchange):
    """The least that a server can be asked for."""

    request = message(Command.DEVICE_GET_INFO, m.DeviceInfo(m.DeviceInfo.LAYOUT.size).pack())
    reply_size = HEADER_SIZE + m.DeviceInfo.LAYOUT.size


class Access(Exchange):
    """``size`` bytes at a place, in one message."""

    def __init__(self, link: Link, place: Location, size: int) -> None:
        super().__init__(link)
        self.place = place
        self.size = size
        self.head = m.RegionAccess(place.offset, place.region, size).pack()

    def start(self) -> None:
        regions = self.link.client.regions
        room = regions[self.place.region].size - self.place.offset if self.place.region < len(regions) else 0
        if self.size > room:
            raise LeftOutError(f"{region_name(self.place.region)} has no {self.size} bytes there")
        if self.size > self.link.limit:
            raise LeftOutError(f"{self.size} bytes are more than the {self.link.limit} of one message")


class Read(Access):
    def start(self) -> None:
        super().start()
        self.request = message(Command.REGION_READ, self.head)
        self.reply_size = HEADER_SIZE + len(self.head) + self.size


class Write(Access):
    """What it held before is written again."""

    def start(self) -> None:
        super().start()
        held = self.link.client.region_read(self.place.region, self.place.offset, self.size)
        self.request = message(Command.REGION_WRITE, self.head, held)
        self.reply_size = HEADER_SIZE + len(self.head)


class Posted(Access):
    """Writes without a reply, as many as there are between two reads; a sample is one of them."""

    fence = b""
    reply_size = HEADER_SIZE + m.RegionAccess.LAYOUT.size + 1

    def start(self) -> None:
        super().start()
        held = self.link.client.region_read(self.place.region, self.place.offset, self.size)
        self.count = max(1, min(POSTED, POSTED_BYTES // self.size))
        self.request = self.count * message(Command.REGION_WRITE, self.head, held, flags=HeaderFlags.NO_REPLY)
        one = m.RegionAccess(self.place.offset, self.place.region, 1)
        self.fence = message(Command.REGION_READ, one.pack())

    def once(self) -> Sample:
        begin = perf_counter_ns()
        self.link.send(self.request)
        self.link.exchange(self.fence, self.reply_size)
        return Sample((perf_counter_ns() - begin) // self.count, self.size)


class Mapping(Probe):
    """A file that is mapped and taken back again; ``size`` bytes, which nobody touches and so take no memory."""

    def __init__(self, link: Link, size: int) -> None:
        self.link = link
        self.size = size
        self.held = ExitStack()
        self.file = -1

    def start(self) -> None:
        file = self.held.enter_context(OwnedFd(os.memfd_create("bench", os.MFD_CLOEXEC)))
        self.file = file.fileno()
        os.ftruncate(self.file, self.size)

    def map(self) -> int:
        request = m.DmaMap(m.DmaMap.LAYOUT.size, _READ_WRITE, 0, IOVA, self.size)
        return self.link.exchange(message(Command.DMA_MAP, request.pack()), HEADER_SIZE, [self.file])

    def unmap(self) -> int:
        request = m.DmaUnmap(m.DmaUnmap.LAYOUT.size, 0, IOVA, self.size)
        return self.link.exchange(message(Command.DMA_UNMAP, request.pack()), HEADER_SIZE + request.LAYOUT.size)

    def undo(self, call: Callable[[], object]) -> None:
        """To be called in the end, unless the connection is of no use then."""
        self.held.callback(lambda: None if self.link.broken else call())

    def stop(self) -> None:
        self.held.close()


class Map(Mapping):
    def once(self) -> Sample:
        duration = self.map()
        self.unmap()
        return Sample(duration, 0)


class Unmap(Mapping):
    def once(self) -> Sample:
        self.map()
        return Sample(self.unmap(), 0)


class Report(Mapping):
    """Dirty pages of so much memory, of which the device has written none."""

    def start(self) -> None:
        client = self.link.client
        if not client.probe(DeviceFeature.DMA_LOGGING_START):
            raise LeftOutError("no DMA logging")
        super().start()
        self.map()
        self.undo(self.unmap)
        page = client.dma_logging_start(PAGE_SIZE, [(IOVA, self.size)])
        self.undo(client.dma_logging_stop)
        request = m.LoggingReport(IOVA, self.size, page).pack()
        self.bitmap = bitmap_size(self.size, page)
        if self.bitmap > ROOM:
            raise LeftOutError(f"pages of {page} bytes: the bitmap has {self.bitmap}")
        room = m.Feature.LAYOUT.size + len(request) + self.bitmap
        feature = m.Feature(room, FeatureFlags.GET | DeviceFeature.DMA_LOGGING_REPORT)
        self.request = message(Command.DEVICE_FEATURE, feature.pack(), request)
        self.reply_size = HEADER_SIZE + room

    def once(self) -> Sample:
        return Sample(self.link.exchange(self.request, self.reply_size), self.bitmap)


class Migration(Probe):
    """The device's own state. It stands still meanwhile, and runs afterwards with the state that it had."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.stopped = False

    def start(self) -> None:
        try:
            flags = self.link.client.migration_flags()
        except CommandError as error:
            raise LeftOutError("no migration") from error
        if not flags & MigrationFlags.STOP_COPY:
            raise LeftOutError("no STOP_COPY")
        state = self.link.client.migration_get_state()
        if state is not DeviceState.RUNNING:
            raise LeftOutError(f"the device is in state {state.name}, not RUNNING")
        self.stopped = True
        self.go(DeviceState.STOP)

    def go(self, *states: DeviceState) -> None:
        for state in states:
            self.link.client.migration_set_state(state)

    def stop(self) -> None:
        """Raises MigrationError, which says what to do, if the device cannot be brought back to where it was."""
        if not self.stopped:
            return
        try:
            self.settle()
            state = self.link.client.migration_get_state()
            if state not in (DeviceState.STOP, DeviceState.RUNNING):
                self.go(DeviceState.STOP)
            if state is not DeviceState.RUNNING:
                self.go(DeviceState.RUNNING)
        except (VfioUserError, OSError) as error:
            path = self.link.path
            raise MigrationError(f"{path}: {error}; the device may be stopped: vfio-user resume {path}") from error

    def settle(self) -> None:
        """Bring what was begun to its end. Raises ConnectionClosedError if nothing can be said any more."""
        if self.link.broken:
            raise ConnectionClosedError("the connection is lost")

    def read(self, size: int) -> tuple[int, memoryview]:
        """Nanoseconds and data of one MIG_DATA_READ; fewer bytes than were asked for are the last."""
        head = m.MigData.LAYOUT.size
        request = message(Command.MIG_DATA_READ, m.MigData(head + size, size).pack())
        duration = self.link.exchange(request, HEADER_SIZE + head + size)
        reply = self.link.reply()
        count = m.MigData.parse(reply).size
        if not count <= len(reply) - head <= size:
            raise MessageError(f"{self.link.path}: asked for {size} bytes of state, {count} announced")
        return duration, reply[head : head + count]


class MigrationRead(Migration):
    """MIG_DATA_READ of as much as one message carries; the state is read over and over."""

    def start(self) -> None:
        super().start()
        self.go(DeviceState.STOP_COPY)

    def once(self) -> Sample:
        duration, data = self.read(self.link.limit)
        if len(data) < self.link.limit:
            self.go(DeviceState.STOP, DeviceState.STOP_COPY)
        return Sample(duration, len(data))


class MigrationWrite(Migration):
    """MIG_DATA_WRITE of the state that was read, in the same pieces."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.pieces: list[bytes] = []
        self.next = 0

    def start(self) -> None:
        super().start()
        self.go(DeviceState.STOP_COPY)
        total = 0
        while True:
            _, data = self.read(self.link.limit)
            total += len(data)
            if total > MAX_STATE:
                raise LeftOutError(f"more than {MAX_STATE} bytes of state")
            if len(data):
                self.pieces.append(self._piece(data))
            if len(data) < self.link.limit:
                break
        self.go(DeviceState.STOP)
        if not self.pieces:
            raise LeftOutError("no state")

    @staticmethod
    def _piece(data: memoryview) -> bytes:
        head = m.MigData(m.MigData.LAYOUT.size + len(data), len(data))
        return message(Command.MIG_DATA_WRITE, head.pack(), bytes(data))

    def once(self) -> Sample:
        if not self.next:
            self.go(DeviceState.RESUMING)
        piece = self.pieces[self.next]
        duration = self.link.exchange(piece, HEADER_SIZE)
        self.next = (self.next + 1) % len(self.pieces)
        if not self.next:
            self.go(DeviceState.STOP)
        return Sample(duration, len(piece) - HEADER_SIZE - m.MigData.LAYOUT.size)

    def settle(self) -> None:
        """A state that was written in part is written to its end: the device would not take it otherwise."""
        super().settle()
        while self.next:
            self.once()
