"""What moves: the devices of one guest, which stop and go on together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from math import inf
from operator import methodcaller

from vfio_user.client import Client
from vfio_user.errors import CommandError, MigrationError
from vfio_user.live.memory import DeviceLog, MemoryRegion
from vfio_user.live.offer import DeviceOffer, Offer, check_state
from vfio_user.wire.constants import PAGE_SIZE, DeviceFeature, DeviceState, MigrationFlags

CHUNK = 2 << 20
"""Bytes of a migration stream that are read at once, and then written: of two messages, the destination has the second
when it is done with the first."""
AHEAD = 256 << 20
"""Bytes that one device may send ahead in a round: one that has new data faster than they move would never end it."""


class Source:
    """The devices behind ``clients``, and what the migration did to them so far."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients
        self._ahead: list[int] = []
        self._p2p = False
        self._buffer = bytearray(CHUNK)
        self.logging = False

    def offer(self, memory: Sequence[MemoryRegion]) -> Offer:
        """What there is to move. Raises MigrationError for a device that does not run."""
        offer = Offer(list(map(DeviceOffer.of, self._clients)), [(region.address, region.size) for region in memory])
        check_state(self._clients, "source", DeviceState.RUNNING)
        self._p2p = offer.all_have(MigrationFlags.P2P)
        return offer

    def start_logging(self, memory: Sequence[MemoryRegion]) -> int:
        """Have every device log what it writes; the page size of the logs, the largest that one of them wants."""
        ranges = [(region.address, region.size) for region in memory]
        self.logging = True  # even if an answer is lost: stopping a log that is off does no harm
        return max((client.dma_logging_start(PAGE_SIZE, ranges) for client in self._clients), default=PAGE_SIZE)

    def stop_logging(self) -> None:
        self._each(methodcaller("dma_logging_stop"))
        self.logging = False

    @property
    def logs(self) -> list[DeviceLog]:
        """The reports of the devices that log."""
        return [client.dma_logging_report for client in self._clients] if self.logging else []

    def start_ahead(self) -> None:
        """Have the devices that can send data ahead, while they run, begin with that."""
        for number, client in enumerate(self._clients):
            if client.migration_flags() & MigrationFlags.PRE_COPY:
                client.migration_set_state(DeviceState.PRE_COPY)
                self._ahead.append(number)

    def read_ahead(self) -> Iterator[tuple[int, memoryview]]:
        """What the running devices have for us now: (number, data), which is valid until the next."""
        for number in self._ahead:
            try:
                yield from self._read(number, AHEAD)
            except CommandError:
                self._check_ahead(number)
                raise

    def stop(self) -> None:
        """All stop: first their talk with each other, where every device can keep that apart, then all else."""
        for number in self._ahead:
            self._check_ahead(number)
        if self._p2p:
            for number, client in enumerate(self._clients):
                ahead = number in self._ahead
                client.migration_set_state(DeviceState.PRE_COPY_P2P if ahead else DeviceState.RUNNING_P2P)
        for client in self._clients:
            client.migration_set_state(DeviceState.STOP_COPY)

    def read_rest(self) -> Iterator[tuple[int, memoryview]]:
        """What the stopped devices have left."""
        for number in range(len(self._clients)):
            yield from self._read(number)

    def bytes_left(self) -> int:
        """About how much :meth:`read_rest` would give."""
        return sum(
            client.migration_data_size() for client in self._clients if client.probe(DeviceFeature.MIG_DATA_SIZE)
        )

    def run(self) -> None:
        """All go on as if nothing had been: each answers the others before one of them asks."""
        states = (DeviceState.RUNNING_P2P, DeviceState.RUNNING) if self._p2p else (DeviceState.RUNNING,)
        self._each(*(methodcaller("migration_set_state", state) for state in states))

    def leave(self) -> None:
        """All stay behind, stopped."""
        self._each(methodcaller("migration_set_state", DeviceState.STOP))

    def _check_ahead(self, number: int) -> None:
        """Raise MigrationError where a reset came in between: what was sent ahead is worth nothing then."""
        if self._clients[number].migration_get_state() is not DeviceState.PRE_COPY:
            raise MigrationError(f"device {number} of the source was reset while its state was sent ahead: try again")

    def _read(self, number: int, most: float = inf) -> Iterator[tuple[int, memoryview]]:
        done, count = 0, CHUNK
        while count == CHUNK and done < most:
            count = self._clients[number].migration_read_data_into(self._buffer)
            if count:
                yield number, memoryview(self._buffer)[:count]
            done += count

    def _each(self, *works: Callable[[Client], object]) -> None:
        """Do each of ``works`` with every device. What one of them raises is raised when all were tried."""
        with ExitStack() as calls:
            for work in reversed(works):
                for client in reversed(self._clients):
                    calls.callback(work, client)
