"""The side that a guest comes to, from another QEMU or from a file: given its devices' states, and started once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from vfio_user.errors import CallTimeoutError, CommandError, MigrationError, VfioUserError
from vfio_user.live.destination import UnconfirmedError
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.handover import DestinationDevice, Handover
from vfio_user.live.qemu.machine import Machine
from vfio_user.live.qemu.monitor import (
    USUAL_CAPABILITIES,
    Capability,
    ClosedError,
    LateError,
    MigrationInfo,
    MonitorError,
    RefusedError,
)
from vfio_user.live.qemu.places import PlacedDevice, ServedDevice
from vfio_user.wire.constants import DeviceState


class Incoming:
    """A QEMU that waits for a guest, and its devices, ``served``; ``debugger`` is for those that use MSI-X."""

    def __init__(self, machine: Machine, served: Sequence[ServedDevice], debugger: Debugger) -> None:
        self.machine, self.monitor = machine, machine.monitor
        self._served = served
        self._debugger = debugger
        self._capabilities: dict[str, bool] = {}

    def prepare(self) -> None:
        """The devices wait for their states."""
        for one in self._served:
            _set_state(one, DeviceState.RESUMING)

    def write(self, number: int, data: memoryview) -> None:
        """What comes next of a device's state."""
        one = self._served[number]
        try:
            one.control.migration_write_data(data)
        except CommandError as error:
            raise MigrationError(f"{one.name} does not take its state: {error}") from error

    def listen(self, uri: str, capabilities: Mapping[str, bool]) -> None:
        """QEMU takes memory and machine from ``uri``; :meth:`put_settings_back` has its capabilities as they were."""
        # A guest that arrives must wait for its devices: this is -S, said late.
        self.monitor.execute("stop")
        before = self.monitor.ask(list[Capability], "query-migrate-capabilities")
        self._capabilities = {one.capability: one.state for one in before if one.capability in capabilities}
        self.monitor.set_capabilities(capabilities)
        self.monitor.execute("migrate-incoming", uri=uri, exit_on_error=False)

    def look(self) -> MigrationInfo:
        """How far QEMU is with that. Raises MigrationError where it has failed."""
        info = self.monitor.migration()
        if info.status == "failed":
            raise MigrationError(f"the destination QEMU's migration failed: {info.error_desc or 'no reason given'}")
        return info

    def check_arrived(self) -> None:
        """Raise MigrationError unless the guest is there, and stands still."""
        status = self.monitor.status()
        if status.status != "paused":
            raise MigrationError(f"the destination QEMU is {status.status} after it has taken the guest, not paused")

    def load(self) -> None:
        """The devices take their states over."""
        for one in self._served:
            _set_state(one, DeviceState.STOP)

    def program(self, devices: Sequence[PlacedDevice], handovers: Sequence[Handover], guest_address: int) -> None:
        """Tell QEMU of each of ``devices`` what it has lost, and see whether it and the server have it."""
        for placed, handover in zip(devices, handovers, strict=True):
            device = DestinationDevice(self.machine, placed.function.path, placed.served.name, placed.served.control)
            device.program(handover, guest_address, self._debugger.write)
            device.verify(handover)
            device.mark_pending(handover)
            device.put_to_sleep(handover)

    def start(self, *, guest: bool) -> None:
        """The point of no return: the devices run, and with ``guest`` the guest.

        Raises UnconfirmedError where the guest may run.
        """
        self.monitor.status()  # it is there, and answers
        for one in self._served:
            try:
                _set_state(one, DeviceState.RUNNING)
            except CallTimeoutError as error:
                raise UnconfirmedError(f"{one.name} was told to run and did not answer: {error}") from error
        if not guest:
            return
        try:
            self.monitor.execute("cont")
        except RefusedError:
            raise
        except MonitorError as error:
            raise UnconfirmedError(f"the guest was told to go on and its QEMU did not answer: {error}") from error

    def suspect(self) -> None:
        """Have :meth:`put_settings_back` undo whatever another controller, which died, may have changed."""
        self._capabilities = dict.fromkeys(USUAL_CAPABILITIES, False)

    def put_settings_back(self) -> None:
        """As they were before :meth:`listen`, when the guest is there; what QEMU answers does not matter any more."""
        with suppress(MonitorError):
            self.monitor.set_capabilities(self._capabilities)

    def end(self, *, devices_ran: bool) -> None:
        """Its guest never ran, and must not. Raises MigrationError where that is not sure."""
        if devices_ran:
            for one in self._served:
                with suppress(VfioUserError, OSError):
                    one.control.migration_set_state(DeviceState.STOP)
        try:
            self.monitor.quit()
        except (ClosedError, LateError) as error:
            raise MigrationError(
                f"the {self.machine.name} QEMU may still be there: see that it ends, it must not run the guest"
            ) from error


def _set_state(one: ServedDevice, state: DeviceState) -> None:
    """Raises MigrationError for what the device refuses."""
    try:
        one.control.migration_set_state(state)
    except CommandError as error:
        raise MigrationError(f"{one.name}, asked for the state {state.name}: {error}") from error
