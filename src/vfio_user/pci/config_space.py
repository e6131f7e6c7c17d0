"""PCI configuration space of an endpoint: type 0 header and capability list.

Sources: PCI Local Bus specification 3.0, chapter 6; ``linux/pci_regs.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntFlag

from vfio_user.pci.bars import NUM_BARS, Bar
from vfio_user.pci.capabilities import (
    MSI_ENABLE,
    MSIX_ENABLE,
    Capability,
    capability_registers,
    first_capability,
)
from vfio_user.pci.registers import Buffer, Register, RegisterFile

CONFIG_SIZE = 256
EXTENDED_CONFIG_SIZE = 4096

_BAR0 = 0x10


class PciCommand(IntFlag):
    """Bits of the command register that a guest can write."""

    IO = 0x1
    MEMORY = 0x2
    MASTER = 0x4
    PARITY = 0x40
    SERR = 0x100
    INTX_DISABLE = 0x400


class PciStatus(IntFlag):
    """Bits of the status register; those of the second group are cleared by writing one."""

    INTERRUPT = 0x8
    CAP_LIST = 0x10

    PARITY = 0x100
    SIG_TARGET_ABORT = 0x800
    REC_TARGET_ABORT = 0x1000
    REC_MASTER_ABORT = 0x2000
    SIG_SYSTEM_ERROR = 0x4000
    DETECTED_PARITY = 0x8000


_COMMAND_WRITABLE = sum(PciCommand)
_STATUS_W1C = sum(PciStatus) & 0xFF00


class ConfigSpace:
    """The configuration space of one PCI function, 256 or (PCI Express) 4096 bytes.

    ``class_code`` has 24 bits, base class highest. ``interrupt_pin``: 1 for INTA, 0 for none. ``bars`` goes
    by index, 0 to 5; a 64-bit one takes the next index too. ``on_command(old, new)`` follows every write that
    touches the command register, for what depends on its bits; :meth:`reset` and :meth:`load` do not call it.

    A guest may read and write any bytes of it at any time: what cannot be written is ignored. An access that
    leaves it raises OSError(EINVAL). The expansion ROM BAR reads 0: there is none.

    Raises ValueError for a declaration that cannot be carried out.
    """

    def __init__(
        self,
        vendor_id: int,
        device_id: int,
        *,
        revision: int = 0,
        class_code: int = 0xFF0000,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        interrupt_pin: int = 0,
        bars: Mapping[int, Bar] | None = None,
        capabilities: Sequence[Capability] = (),
        size: int = CONFIG_SIZE,
        on_command: Callable[[int, int], None] | None = None,
    ) -> None:
        if size not in (CONFIG_SIZE, EXTENDED_CONFIG_SIZE):
            raise ValueError(f"config space has {CONFIG_SIZE} or {EXTENDED_CONFIG_SIZE} bytes, not {size}")
        if not 0 <= interrupt_pin <= 4:
            raise ValueError(f"interrupt pin {interrupt_pin}: 0 for none, 1 to 4 for INTA to INTD")
        self.bars = dict(bars or {})
        self.capabilities = tuple(capabilities)
        for capability in self.capabilities:
            capability.check(self.bars)
        status = PciStatus.CAP_LIST if self.capabilities else 0
        self._registers = RegisterFile(
            size,
            [
                Register(0x00, 2, "vendor_id", vendor_id),
                Register(0x02, 2, "device_id", device_id),
                Register(0x04, 2, "command", writable=_COMMAND_WRITABLE, on_write=on_command),
                Register(0x06, 2, "status", status, w1c=_STATUS_W1C),
                Register(0x08, 1, "revision", revision),
                Register(0x09, 3, "class_code", class_code),
                Register(0x0C, 1, "cache_line_size", writable=0xFF),
                Register(0x0D, 1, "latency_timer", writable=0xFF),
                Register(0x0E, 1, "header_type"),
                *_bar_registers(self.bars),
                Register(0x2C, 2, "subsystem_vendor_id", subsystem_vendor_id),
                Register(0x2E, 2, "subsystem_id", subsystem_id),
                Register(0x34, 1, "capabilities_pointer", first_capability(self.capabilities)),
                Register(0x3C, 1, "interrupt_line", writable=0xFF),
                Register(0x3D, 1, "interrupt_pin", interrupt_pin),
                *capability_registers(self.capabilities),
            ],
        )

    def __len__(self) -> int:
        """The size in bytes."""
        return len(self._registers)

    def read_into(self, offset: int, data: memoryview) -> None:
        """Fill ``data`` with what stands at ``offset``."""
        self._registers.read_into(offset, data)

    def write(self, offset: int, data: Buffer) -> None:
        """Write ``data`` at ``offset``, as far as it can be written."""
        self._registers.write(offset, data)

    def get(self, name: str) -> int:
        """A register by name: ``"command"``, ``"bar0"``, ``"msix.control"``. Raises KeyError for others."""
        return self._registers.get(name)

    def set(self, name: str, value: int) -> None:
        """Change a register from the device's side, its read-only bits too."""
        self._registers.set(name, value)

    @property
    def io_enabled(self) -> bool:
        return self._command(PciCommand.IO)

    @property
    def memory_enabled(self) -> bool:
        return self._command(PciCommand.MEMORY)

    @property
    def bus_master(self) -> bool:
        """Whether the function may do DMA and send MSI and MSI-X messages."""
        return self._command(PciCommand.MASTER)

    @property
    def intx_disabled(self) -> bool:
        return self._command(PciCommand.INTX_DISABLE)

    @property
    def msi_enabled(self) -> bool:
        """Whether the guest enabled MSI; False without the capability."""
        return self._control("msi", MSI_ENABLE)

    @property
    def msix_enabled(self) -> bool:
        """Whether the guest enabled MSI-X; False without the capability."""
        return self._control("msix", MSIX_ENABLE)

    @property
    def interrupt_status(self) -> bool:
        """Status bit 3: the INTx cause stands, whether or not the command register lets it out.

        The device must drive it: without the bit Linux takes the interrupts for another device's and gives
        the line up.
        """
        return bool(self.get("status") & PciStatus.INTERRUPT)

    @interrupt_status.setter
    def interrupt_status(self, asserted: bool) -> None:
        others = self.get("status") & ~PciStatus.INTERRUPT
        self.set("status", others | PciStatus.INTERRUPT * asserted)

    def reset(self) -> None:
        """Back to what a guest finds at power-on: nothing enabled, no addresses."""
        self._registers.reset()

    def save(self) -> bytes:
        """All of it, ``len(self)`` bytes."""
        return self._registers.save()

    def load(self, data: Buffer) -> None:
        """Take over what :meth:`save` gave.

        Raises ValueError, with nothing changed, for another length or where a bit that neither guest nor
        device can change differs: the bytes are another device's.
        """
        if len(data) == len(self):
            self._check_constant_bits(data)
        self._registers.load(data)

    def _check_constant_bits(self, data: Buffer) -> None:
        for register in self._registers:
            value = int.from_bytes(data[register.offset : register.end], "little")
            if (value ^ register.reset) & ~_changeable_bits(register):
                raise ValueError(f"saved {register.name} is {value:#x}, this device has {register.reset:#x}")

    def _command(self, bit: PciCommand) -> bool:
        return bool(self.get("command") & bit)

    def _control(self, capability: str, bit: int) -> bool:
        present = any(capability == one.name for one in self.capabilities)
        return present and bool(self.get(f"{capability}.control") & bit)


def _changeable_bits(register: Register) -> int:
    driven = PciStatus.INTERRUPT if register.name == "status" else 0
    return register.writable | register.w1c | driven


def _bar_registers(bars: Mapping[int, Bar]) -> Iterator[Register]:
    """A 64-bit BAR is one register of 8 bytes: where it overlaps the next one, building the file says so."""
    for index, bar in bars.items():
        last = index + bar.width // 4 - 1
        if not 0 <= index <= last < NUM_BARS:
            raise ValueError(f"BAR {index} of {8 * bar.width} bits: indexes are 0 to 5, a 64-bit BAR takes two")
        yield Register(_BAR0 + 4 * index, bar.width, f"bar{index}", bar.flags, bar.address_mask)
