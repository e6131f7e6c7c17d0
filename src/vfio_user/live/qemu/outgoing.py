"""The side that a guest leaves, or is saved from: stopped with its devices, and let run on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from vfio_user.client.control import AccessMode
from vfio_user.errors import MigrationError, VfioUserError
from vfio_user.live.qemu.handover import Handover, SourceDevice
from vfio_user.live.qemu.machine import Machine
from vfio_user.live.qemu.monitor import (
    ENDED,
    POLL,
    USUAL_CAPABILITIES,
    Capability,
    ClosedError,
    LateError,
    MigrationInfo,
    MonitorError,
)
from vfio_user.live.qemu.places import PlacedDevice, ServedDevice, find_used
from vfio_user.live.source import Source

_USUAL_PARAMETERS = {"downtime_limit": 300, "max_bandwidth": 128 << 20}
"""What a QEMU has before anybody asks for something else: as far as it is changed here."""


class Outgoing:
    """A QEMU with a guest, and its devices, ``served``.

    ``timeout`` in seconds bounds each wait but that for memory; ``check`` is called often, and may raise.
    """

    def __init__(
        self, machine: Machine, served: Sequence[ServedDevice], timeout: float, check: Callable[[], None]
    ) -> None:
        self.machine, self.monitor = machine, machine.monitor
        self.servers = Source([one.control for one in served])
        self.guest_runs = True
        self._served = served
        self._timeout = timeout
        self._check = check
        self._devices: list[SourceDevice] = []
        self._settings = ExitStack()

    def set_up(
        self, capabilities: Mapping[str, bool], parameters: Mapping[str, object], *, others: bool = True
    ) -> None:
        """Change QEMU's settings for migrations; :meth:`put_settings_back` has them as they were.

        Unless ``others`` may stay, the capabilities that are not named are switched off.
        """
        before = self.monitor.ask(list[Capability], "query-migrate-capabilities")
        wanted = dict(capabilities) if others else {**{one.capability: False for one in before}, **capabilities}
        changed = [one for one in before if wanted.get(one.capability, one.state) != one.state]
        old = self.monitor.ask(dict[str, object], "query-migrate-parameters")
        self._settings.callback(
            self.monitor.execute,
            "migrate-set-parameters",
            **{name: old[name] for name in parameters if name in old},
        )
        self._settings.callback(self.monitor.set_capabilities, {one.capability: one.state for one in changed})
        self.monitor.set_capabilities({one.capability: wanted[one.capability] for one in changed})
        self.monitor.execute("migrate-set-parameters", **parameters)

    def put_settings_back(self) -> None:
        """As they were before :meth:`set_up`."""
        self._settings.close()

    def see_guest(self) -> None:
        """Whether it runs, or sleeps; where QEMU has stopped it to switch over, whether it did when last seen."""
        status = self.monitor.status()
        if status.status != "finish-migrate":
            self.guest_runs = status.running or status.status == "suspended"

    def look(self) -> MigrationInfo:
        """How far QEMU's migration is. Raises MigrationError where it has failed."""
        self._check()
        info = self.monitor.migration()
        if info.status in ("failed", "cancelled", "cancelling"):
            raise MigrationError(f"the source QEMU's migration {info.status}: {info.error_desc or 'no reason given'}")
        return info

    def wait(self, what: str, condition: Callable[[], bool], *, forever: bool = False) -> None:
        """Return when ``condition`` holds. Raises MigrationError if it does not come to that in time."""
        deadline = float("inf") if forever else time.monotonic() + self._timeout
        while not condition():
            if time.monotonic() > deadline:
                raise MigrationError(f"the source QEMU: {what} not within {self._timeout:g} s")
            try:
                self.monitor.wait_event(POLL)
            except ClosedError:
                time.sleep(POLL)

    def stop_devices(self, devices: Sequence[PlacedDevice]) -> None:
        """All of them; the guest stands still already. Raises MigrationError where one is another guest's."""
        found = [SourceDevice(self.machine, one.function.path, one.served.control) for one in devices]
        for placed, device in zip(devices, found, strict=True):
            if not device.is_served():
                raise MigrationError(
                    f"{placed.served.name} is not {placed.function.name}, but another guest's that looks the same"
                )
        self._devices = found
        for device in found:
            device.settle()
            device.control.set_access(AccessMode.HOLD)
        self.servers.stop()

    def push(self) -> None:
        """Have QEMU send what the devices wrote."""
        for device in self._devices:
            device.push(self._timeout)

    def take(self) -> list[Handover]:
        """What QEMU would lose of each device; their states must have been read before."""
        return [device.take() for device in self._devices]

    # Afterwards

    def suspect(self) -> None:
        """Have :meth:`way_back` undo whatever another controller, which died, may have done."""
        plugged = self.machine.plugged()
        for one in self._served:
            for function in find_used(self.machine, one.control, plugged)[:1]:
                device = SourceDevice(self.machine, function.path, one.control)
                device.suspect_lowered()
                self._devices.append(device)
        self._settings.callback(self.monitor.execute, "migrate-set-parameters", **_USUAL_PARAMETERS)
        self._settings.callback(self.monitor.set_capabilities, dict.fromkeys(USUAL_CAPABILITIES, False))

    def way_back(self) -> Iterator[Callable[[], object]]:
        """What lets devices and guest run on as if nothing had been: to be done in order, all whatever fails.

        The devices run before the guest, which is what their accesses wait for.
        """
        deadline = time.monotonic() + self._timeout
        yield self.servers.run
        if self.servers.logging:
            yield self.servers.stop_logging
        yield from (partial(one.control.set_access, AccessMode.PASS) for one in self._served)
        yield partial(self._await_answer, deadline)
        yield from (device.give_back for device in self._devices)
        yield partial(self._let_guest_run, deadline)

    def release(self, *, quit_it: bool) -> None:
        """It is of no use any more, and must not run by mistake; what it answers is only noted."""
        self._settings.pop_all()
        parts: list[Callable[[], object]] = [self.servers.leave]
        if self.servers.logging:
            parts.append(self.servers.stop_logging)
        if quit_it:
            parts.append(self.monitor.quit)
        for part in parts:
            with suppress(VfioUserError, OSError):
                part()

    def _await_answer(self, deadline: float) -> None:
        """A QEMU that did not answer, because of a slow disk, say, gets this time to go on."""
        with suppress(ClosedError):  # which is told by what comes next
            while True:
                try:
                    self.monitor.status()
                    return
                except LateError:
                    if time.monotonic() > deadline:
                        return

    def _let_guest_run(self, deadline: float) -> None:
        last = ["cont"] if self.guest_runs else []
        try:
            self._end_migration(deadline)
            for command in last:
                self.monitor.execute(command)
        except ClosedError:
            raise
        except MonitorError as error:  # one that is late does what it was told when it goes on
            for command in ("migrate_cancel", *last):
                with suppress(MonitorError):
                    self.monitor.execute(command)
            raise MigrationError(f"{error}; where its guest does not go on, --recover lets it") from error

    def _end_migration(self, deadline: float) -> None:
        """QEMU's; one that answers late is asked again."""
        while True:
            try:
                if self.monitor.migration().status not in ENDED:
                    self.monitor.execute("migrate_cancel")
                while not self._has_ended() and time.monotonic() < deadline:
                    self.monitor.wait_event(POLL)
                return
            except LateError:
                if time.monotonic() > deadline:
                    raise

    def _has_ended(self) -> bool:
        """Whether QEMU's migration has. It says so a moment before it leaves the run state in which it refuses cont."""
        return self.monitor.migration().status in ENDED and self.monitor.status().status != "finish-migrate"


def do_all(parts: Sequence[Callable[[], object]]) -> list[str]:
    """Do ``parts`` in order, each whatever becomes of the others; what failed."""
    failures: list[str] = []
    with ExitStack() as stack:
        for part in reversed(parts):
            stack.callback(_try, part, failures)
    return failures


def _try(part: Callable[[], object], failures: list[str]) -> None:
    try:
        part()
    except (VfioUserError, OSError) as error:
        failures.append(str(error))
