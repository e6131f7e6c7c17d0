"""What QEMU loses of a vfio-user device when it migrates: taken at the source, given at the destination.

Both guests stand still meanwhile. The device's own state is not here: it goes from server to server, or to a file.

Sources: PCI Local Bus Specification 3.0, sections 6.2.2 (COMMAND) and 6.8.2 (MSI-X table); QEMU's ``hw/vfio/pci.c``:
what of config space it answers itself, and that an MSI-X table is in QEMU alone.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vfio_user.client.control import ControlClient
from vfio_user.errors import CommandError, MigrationError
from vfio_user.live.qemu.config_image import (
    COMMAND,
    COMMAND_INTX_DISABLE,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    MSIX_ENABLE,
    MSIX_ENTRY,
    MSIX_FUNCTION_MASK,
    POWER_NO_SOFT_RESET,
    ConfigImage,
    ConfigWrite,
    MsixTable,
)
from vfio_user.live.qemu.machine import Machine, Path
from vfio_user.live.qemu.places import config_image, marked
from vfio_user.wire.constants import IrqSetFlags, PciIrq

WriteMemory = Callable[[int, bytes], None]
"""Writes guest-physical memory, registers of devices included."""

_ENTRY_MASKED = 1
_FRESH_ENTRY = bytes(12) + bytes([_ENTRY_MASKED, 0, 0, 0])
"""Of a table that no driver has written to."""


@dataclass(frozen=True, slots=True)
class Handover:
    """A device, but for its own state. ``table``: the bytes of its MSI-X table; none if no driver has set it up."""

    config: ConfigImage
    table: bytes


class SourceDevice:
    """A device whose guest is to leave: call these while it stands still, and its device, too."""

    def __init__(self, machine: Machine, path: Path, control: ControlClient) -> None:
        self.control = control
        self._machine = machine
        self._function = machine.locate(path)
        self._lowered: int | None = None  # COMMAND, as it was before

    def is_served(self) -> bool:
        """Whether the control socket is this very device's."""
        with self._machine.borrowed_ports():
            return all(marked(self._machine, self._function, [self.control]))

    def settle(self) -> None:
        """Return when the server has all that the guest wrote before it stopped."""
        self._machine.barrier(self._function)

    def push(self, timeout: float) -> int:
        """Have QEMU send what the device wrote; pages. Raises CommandError, MigrationError where it cannot be sent."""
        try:
            return self.control.push(timeout)
        except CommandError as error:
            if error.errno == errno.ENOTRECOVERABLE:
                raise MigrationError(
                    f"{error.command} refused: the device wrote to memory that is not mapped any more:"
                    " move it with --cold"
                ) from error
            if error.errno != errno.ENODEV:
                raise
        # The guest has switched its bus mastering off since: QEMU takes nothing from it then.
        with self._machine.commanded(self._function, config_image(self.control).command, COMMAND_MASTER):
            return self.control.push(timeout)

    def take(self) -> Handover:
        """What is to be given at the other side. The device's state must have been read before."""
        config = config_image(self.control)
        table = self._table(config)
        if config.has_intx and not config.command & COMMAND_INTX_DISABLE:
            # A line that is asserted now would stay so in the destination, where nobody knows who asserts it. (To read
            # from a BAR would lower it, too; but there must be one that is mapped, and servers that are not ours may
            # raise it again while the device stands.)
            self._set_command(config.command | COMMAND_INTX_DISABLE)
            self._lowered = config.command
        return Handover(config, table)

    def suspect_lowered(self) -> None:
        """Have :meth:`give_back` undo what another controller may have done: one interrupt too many does no harm."""
        config = config_image(self.control)
        if config.has_intx and not config.message_signalled and config.command & COMMAND_INTX_DISABLE:
            self._lowered = config.command & ~COMMAND_INTX_DISABLE

    def give_back(self) -> None:
        """Let the source's QEMU hear of interrupts again; one whose cause stands comes anew."""
        if self._lowered is not None:
            self._set_command(self._lowered)
            self._lowered = None

    def _set_command(self, value: int) -> None:
        with self._machine.borrowed_ports():
            self._machine.config_write(self._function, ConfigWrite(COMMAND, 2, value))

    def _table(self, config: ConfigImage) -> bytes:
        table = config.msix
        address = config.address_of(table.bar) if table else None
        if table is None or address is None:
            return b""
        if config.sleep and not config.sleep.value & POWER_NO_SOFT_RESET:
            return b""  # when it awakes it is reset, and the table with it
        with (
            self._machine.awake(self._function, config.sleep),
            self._machine.commanded(self._function, config.command, COMMAND_MEMORY),
        ):
            words = self._machine.memory_words(address + table.offset, table.size // 4)
        data = b"".join(word.to_bytes(4, "little") for word in words)
        return b"" if data == _FRESH_ENTRY * table.vectors else data


class DestinationDevice:
    """The device at the other side, once it has its state: call these while the guest stands still there."""

    def __init__(self, machine: Machine, path: Path, name: str, control: ControlClient) -> None:
        self.name = name
        self.control = control
        self._machine = machine
        self._path = path
        self._function = machine.locate(path)

    def program(self, handover: Handover, guest_address: int, write_memory: WriteMemory) -> None:
        """Tell QEMU what the guest had told it. ``guest_address``: what the guest's port 0xcf8 holds."""
        config, machine = handover.config, self._machine
        with machine.borrowed_ports(guest_address):
            for write in config.writes():
                machine.config_write(self._function, write)
        self._program_table(handover, write_memory)
        with machine.borrowed_ports(guest_address):
            for write in config.msix_control():
                machine.config_write(self._function, write)

    def verify(self, handover: Handover) -> None:
        """Raise MigrationError unless server and QEMU have what they must."""
        here = config_image(self.control)
        writes = [*handover.config.writes(), *handover.config.msix_control()]
        for write in writes:
            found = here.number(write.offset, write.width)
            if found != write.value:
                raise MigrationError(
                    f"{self.name}: config space at {write.offset:#x} is {found:#x} at the destination,"
                    f" not {write.value:#x}: is the control socket that of another device?"
                )
        if handover.config.command & COMMAND_MEMORY:
            self._verify_bars(handover.config)

    def put_to_sleep(self, handover: Handover) -> None:
        """After all else, which takes a device that is awake in QEMU's eyes: it was not, if the guest had it so."""
        if handover.config.sleep is not None:
            with self._machine.borrowed_ports():
                self._machine.config_write(self._function, handover.config.sleep)

    def mark_pending(self, handover: Handover) -> None:
        """Have masked MSI-X vectors that a driver has set up fire when they are unmasked.

        Whether they were pending only the source's QEMU knows; one interrupt too many is better than one too few.
        """
        table = handover.config.msix
        if table is None or not table.control & MSIX_ENABLE:
            return
        for vector in masked_vectors(table, handover.table):
            self.control.set_irqs(PciIrq.MSIX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, vector, 1)

    def _program_table(self, handover: Handover, write_memory: WriteMemory) -> None:
        config = handover.config
        table = config.msix
        address = config.address_of(table.bar) if table else None
        if table is None or address is None or not handover.table:
            return
        with self._machine.commanded(self._function, config.command, COMMAND_MEMORY):
            write_memory(address + table.offset, handover.table)
            words = self._machine.memory_words(address + table.offset, table.size // 4)
        if b"".join(word.to_bytes(4, "little") for word in words) != handover.table:
            raise MigrationError(f"{self.name}: the MSI-X table at the destination is not what was written to it")

    def _verify_bars(self, config: ConfigImage) -> None:
        missing = {bar.address for bar in config.bars if not bar.io} - self._machine.locate(self._path).bars
        if missing:
            places = ", ".join(f"{address:#x}" for address in sorted(missing))
            raise MigrationError(f"{self.name}: no BAR is mapped at {places} at the destination")


def masked_vectors(table: MsixTable, data: bytes) -> Iterator[int]:
    """The vectors of a table, ``data``, that a driver has set up and that are masked now."""
    for vector in range(table.vectors):
        entry = data[vector * MSIX_ENTRY : (vector + 1) * MSIX_ENTRY]
        masked = table.control & MSIX_FUNCTION_MASK or (entry[12:] and entry[12] & _ENTRY_MASKED)
        if masked and any(entry[:12]):
            yield vector
