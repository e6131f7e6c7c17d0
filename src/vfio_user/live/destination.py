"""Where a guest's devices and memory go to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from vfio_user.client import Client
from vfio_user.errors import MigrationError, VfioUserError
from vfio_user.live.memory import MemoryRegion, place
from vfio_user.live.offer import DeviceOffer, Offer, check_state
from vfio_user.wire.constants import DeviceState, MigrationFlags


def nothing() -> None:
    """What a callback does by default."""


class UnconfirmedError(MigrationError):
    """The destination was told to start, and whether it does is not known: the source must not go on."""


class Destination(Protocol):
    """What a migration asks of the other side, in this order; :meth:`abort` may come at any time before it runs.

    Every call raises MigrationError or OSError for what it cannot do.
    """

    def check(self, offer: Offer) -> None:
        """Does what is to move fit? Nothing changes."""

    def begin(self) -> None:
        """The devices take state from now on."""

    def write_memory(self, address: int, data: memoryview) -> None:
        """Guest memory, any number of times; ``data`` is the guest's and may change at any time."""

    def write_device(self, number: int, data: memoryview) -> None:
        """What comes next in the migration stream of a device."""

    def settle(self) -> None:
        """Return when all of the above has arrived."""

    def load(self) -> None:
        """All is there: the devices take it over, and stop."""

    def start(self) -> None:
        """The devices and the guest run. Raises UnconfirmedError where it is not known whether they do."""

    def abort(self) -> None:
        """Be as before, or at least without memory and interrupts, and raise what kept it from being as before.

        Raises UnconfirmedError, and changes nothing, where the devices and the guest may run already.
        """


class LocalDestination:
    """Devices of servers that this process is a client of, and guest memory that it has.

    ``connect`` is called before the devices run: the place to give them DMA maps and interrupts, if they have none
    yet. ``resume`` lets the guest go on.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        memory: Sequence[MemoryRegion] = (),
        *,
        connect: Callable[[], None] = nothing,
        resume: Callable[[], None] = nothing,
    ) -> None:
        self.clients = clients
        self._memory = memory
        self._connect = connect
        self._resume = resume
        self._began = self._started = self._p2p = False

    def check(self, offer: Offer) -> None:
        own = Offer(list(map(DeviceOffer.of, self.clients)), [(one.address, one.size) for one in self._memory])
        offer.check(own)
        self._p2p = own.all_have(MigrationFlags.P2P)
        # A device that was left behind, stopped, takes state as well: so a guest comes back.
        check_state(self.clients, "destination", DeviceState.RUNNING, DeviceState.STOP)

    def begin(self) -> None:
        self._began, self._started = True, False
        self._all(DeviceState.RESUMING)

    def write_memory(self, address: int, data: memoryview) -> None:
        place(self._memory, address, len(data))[:] = data

    def write_device(self, number: int, data: memoryview) -> None:
        self.clients[number].migration_write_data(data)

    def settle(self) -> None:
        """Nothing is on its way: what was written is there."""

    def load(self) -> None:
        self._connect()
        self._all(DeviceState.STOP)

    def start(self) -> None:
        if self._p2p:
            self._all(DeviceState.RUNNING_P2P)
        self._all(DeviceState.RUNNING)
        self._resume()
        self._started = True

    def abort(self) -> None:
        """A device that cannot be reset is disconnected: what it does then reaches no memory and no interrupt."""
        if self._started:
            raise UnconfirmedError("the guest goes on at the destination already")
        if not self._began:  # nothing has changed
            return
        failures: list[str] = []
        with ExitStack() as devices:  # all of them, whatever comes in between
            for client in reversed(self.clients):
                devices.callback(self._reset, client, failures)
        if failures:
            raise MigrationError(f"the destination cannot be reset and was left: {'; '.join(failures)}")

    @staticmethod
    def _reset(client: Client, failures: list[str]) -> None:
        try:
            client.reset()
        except BaseException as error:
            client.close()
            if not isinstance(error, (VfioUserError, OSError)):
                raise
            failures.append(str(error))

    def _all(self, state: DeviceState) -> None:
        for client in self.clients:
            client.migration_set_state(state)
