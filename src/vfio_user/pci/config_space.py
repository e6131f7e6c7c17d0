"""PCI configuration space of an endpoint: type 0 header and capability lists.

Sources: PCI Local Bus specification 3.0, chapter 6; ``linux/pci_regs.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntFlag

from vfio_user.pci.bars import NUM_BARS, Bar
from vfio_user.pci.capabilities import (
    CONFIG_SIZE,
    EXTENDED_CONFIG_SIZE,
    Capability,
    ExtendedCapability,
    capability_registers,
    first_capability,
)
from vfio_user.pci.express import INITIATE_FLR, TRANSACTIONS_PENDING, PcieEndpoint
from vfio_user.pci.msi import MSI_ENABLE, MSIX_ENABLE, MSIX_FUNCTION_MASK
from vfio_user.pci.power import D0, D3HOT, POWER_STATE
from vfio_user.pci.registers import Buffer, Register, RegisterFile

_BAR0, _ROM = 0x10, 0x30
_ROM_ENABLE, MIN_ROM, _MAX_ROM = 1, 1 << 11, 1 << 24


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
    """The configuration space of one PCI function: 256 bytes, 4096 with the capability of PCI Express.

    ``class_code`` has 24 bits, base class highest. ``interrupt_pin``: 1 for INTA, 0 for none. ``bars`` goes
    by index, 0 to 5; a 64-bit one takes the next index too. ``rom_size``: bytes of the expansion ROM, 0 for none.
    ``on_flr()`` is called when a guest asks for a function-level reset.

    A guest may read and write any bytes of it at any time: what cannot be written is ignored. An access that
    leaves it raises OSError(EINVAL).

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
        rom_size: int = 0,
        capabilities: Sequence[Capability] = (),
        on_flr: Callable[[], None] = lambda: None,
    ) -> None:
        if not 0 <= interrupt_pin <= 4:
            raise ValueError(f"interrupt pin {interrupt_pin}: 0 for none, 1 to 4 for INTA to INTD")
        self.bars = dict(bars or {})
        self.capabilities = tuple(capabilities)
        for index, bar in self.bars.items():
            _check_bar(index, bar)
            if bar.bits64 and index + 1 in self.bars:
                raise ValueError(f"BAR {index} of 64 bits takes index {index + 1}, too: move BAR {index + 1}")
        for capability in self.capabilities:
            capability.check(self.bars)
        self.rom_size = rom_size
        self._on_flr = on_flr
        status = PciStatus.CAP_LIST if self.capabilities else 0
        size = _size(self.capabilities)
        self._registers = RegisterFile(
            size,
            [
                Register(0x00, 2, "vendor_id", vendor_id),
                Register(0x02, 2, "device_id", device_id),
                Register(0x04, 2, "command", writable=_COMMAND_WRITABLE),
                Register(0x06, 2, "status", status, w1c=_STATUS_W1C, driven=PciStatus.INTERRUPT),
                Register(0x08, 1, "revision", revision),
                Register(0x09, 3, "class_code", class_code),
                Register(0x0C, 1, "cache_line_size", writable=0xFF),
                Register(0x0D, 1, "latency_timer", writable=0 if size == EXTENDED_CONFIG_SIZE else 0xFF),
                Register(0x0E, 1, "header_type"),
                *_bar_registers(self.bars),
                Register(0x2C, 2, "subsystem_vendor_id", subsystem_vendor_id),
                Register(0x2E, 2, "subsystem_id", subsystem_id),
                *_rom_register(rom_size),
                Register(0x34, 1, "capabilities_pointer", first_capability(self.capabilities)),
                Register(0x3C, 1, "interrupt_line", writable=0xFF),
                Register(0x3D, 1, "interrupt_pin", interrupt_pin),
                *map(self._with_effect, capability_registers(self.capabilities)),
            ],
        )

    def _with_effect(self, register: Register) -> Register:
        """A capability's register with what a write of it does here."""
        effects = {"pm.control": self._set_power_state, "pcie.device_control": self._control_device}
        return replace(register, on_write=effects.get(register.name))

    def _set_power_state(self, old: int, new: int) -> None:
        """A state that the function does not have is ignored (PCI PM 1.2, section 3.2.4)."""
        if new & POWER_STATE not in (D0, D3HOT):
            self.set("pm.control", old)

    def _control_device(self, old: int, new: int) -> None:
        if new & INITIATE_FLR:
            self._on_flr()

    def __len__(self) -> int:
        """The size in bytes."""
        return len(self._registers)

    def names(self, offset: int, length: int) -> list[str]:
        """The registers that an access to these bytes touches."""
        return [register.name for register in self._registers.touched(offset, length)]

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
        """Whether the guest lets the function do DMA and send MSI and MSI-X messages.

        VMMs see to that, as QEMU does; a device that is to be strict asks this before it does DMA.
        """
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
    def msix_masked(self) -> bool:
        """Whether the guest masks all vectors of MSI-X at once, by the function mask."""
        return self._control("msix", MSIX_FUNCTION_MASK)

    @property
    def msi_mask(self) -> int:
        """The vectors of MSI that the guest masks, bit n for vector n; 0 without per-vector masking."""
        return self.get("msi.mask") if "msi.mask" in self._registers else 0

    @property
    def asleep(self) -> bool:
        """Whether the guest put the function into D3hot, where it answers in config space only."""
        return "pm.control" in self._registers and self.get("pm.control") & POWER_STATE == D3HOT

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

    @property
    def transactions_pending(self) -> bool:
        """Whether requests of the function's own are under way; False without PCI Express."""
        return "pcie.device_status" in self._registers and bool(self.get("pcie.device_status") & TRANSACTIONS_PENDING)

    @transactions_pending.setter
    def transactions_pending(self, pending: bool) -> None:
        others = self.get("pcie.device_status") & ~TRANSACTIONS_PENDING
        self.set("pcie.device_status", others | TRANSACTIONS_PENDING * pending)

    def reset(self) -> None:
        """Back to what a guest finds at power-on: nothing enabled, no addresses."""
        self._registers.reset()

    def save(self) -> dict[str, bytes]:
        """All registers by name."""
        return self._registers.save()

    def load(self, saved: Mapping[str, bytes], *, complete: bool = True) -> None:
        """Take over what :meth:`save` gave; a register may be missing if the save is not ``complete``.

        Raises ValueError, which names the register, with nothing changed: also where a bit differs that neither
        guest nor device can change, for then it is another device's, or the guest would see this one change shape.
        """
        before = self._registers.save()
        self._registers.load(saved, complete=complete)
        try:
            self._check_constant_bits()
        except ValueError:
            self._registers.load(before)
            raise

    def _check_constant_bits(self) -> None:
        for register in self._registers:
            value = self.get(register.name)
            if (value ^ register.reset) & ~(register.writable | register.w1c | register.driven):
                raise ValueError(f"saved {register.name} is {value:#x}, this device has {register.reset:#x}")

    def _command(self, bit: PciCommand) -> bool:
        return bool(self.get("command") & bit)

    def _control(self, capability: str, bit: int) -> bool:
        name = f"{capability}.control"
        return name in self._registers and bool(self.get(name) & bit)


def _size(capabilities: Sequence[Capability]) -> int:
    if any(isinstance(capability, PcieEndpoint) for capability in capabilities):
        return EXTENDED_CONFIG_SIZE
    for capability in capabilities:
        if isinstance(capability, ExtendedCapability):
            raise ValueError(f"capability {capability.name!r} lies behind 0x100: add PcieEndpoint() to have such")
    return CONFIG_SIZE


def _rom_register(size: int) -> Iterator[Register]:
    if size and (size.bit_count() != 1 or not MIN_ROM <= size <= _MAX_ROM):
        raise ValueError(f"expansion ROM of {size:#x} bytes: a power of two, {MIN_ROM:#x} to {_MAX_ROM:#x}")
    if size:
        yield Register(_ROM, 4, "rom", writable=(1 << 32) - size | _ROM_ENABLE)


def _check_bar(index: int, bar: Bar) -> None:
    if not 0 <= index <= index + bar.width // 4 - 1 < NUM_BARS:
        raise ValueError(f"BAR {index} of {8 * bar.width} bits: indexes are 0 to 5, a 64-bit BAR takes two")
    try:
        bar.check()
    except ValueError as error:
        raise ValueError(f"BAR {index}: {error}") from None


def _bar_registers(bars: Mapping[int, Bar]) -> Iterator[Register]:
    """A 64-bit BAR is one register of 8 bytes: where it overlaps the next one, building the file says so."""
    for index, bar in bars.items():
        yield Register(_BAR0 + 4 * index, bar.width, f"bar{index}", bar.flags, bar.address_mask)
