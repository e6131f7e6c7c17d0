"""Config space as it was read from somebody's device, decoded: header, capabilities, what is wrong with them.

Nothing here trusts the bytes: a chain that runs in a circle or leads nowhere ends, and is a complaint.

Sources: PCI Local Bus specification 3.0, chapter 6; PCI Express base specification 4.0, chapter 7; PCI Code and ID
Assignment specification 1.11; ``linux/pci_regs.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vfio_user.pci import PciCommand, PciStatus
from vfio_user.pci.bars import NUM_BARS
from vfio_user.pci.capabilities import CONFIG_SIZE, EXTENDED_CONFIG_SIZE

Value = bool | int | str
"""A field's: a flag, a number, or text."""

COMMAND, STATUS, HEADER_TYPE, BAR0, ROM, POINTER = 0x04, 0x06, 0x0E, 0x10, 0x30, 0x34
HEADER_SIZE = 0x40
MSI, MSIX = 0x05, 0x11

_ALIGNED = ~3
_MULTIFUNCTION = 0x80
_BAR_IO, _BAR_PREFETCH, _BAR_64 = 1, 8, 0b100


class Snapshot:
    """The bytes of config space, 256 or 4096 of them; what lies behind their end reads 0."""

    def __init__(self, data: bytes) -> None:
        self.data = data[:EXTENDED_CONFIG_SIZE]

    def value(self, offset: int, width: int) -> int:
        """``width`` bytes as a number."""
        return int.from_bytes(self.data[offset : offset + width], "little")

    @property
    def absent(self) -> bool:
        """Whether nobody answers: all bits of the ids are ones."""
        return self.value(0, 4) == 0xFFFF_FFFF

    @cached_property
    def capabilities(self) -> tuple[Found, ...]:
        """Those below 0x100, in the order of their chain."""
        return tuple(found for found in self._standard if isinstance(found, Found))

    @cached_property
    def extended_capabilities(self) -> tuple[Found, ...]:
        """Those of PCI Express, from 0x100 on."""
        return tuple(found for found in self._extended if isinstance(found, Found))

    @property
    def complaints(self) -> list[str]:
        """What is wrong with the chains."""
        return [found for found in (*self._standard, *self._extended) if isinstance(found, str)]

    @cached_property
    def _standard(self) -> tuple[Found | str, ...]:
        if self.absent:
            return ("config space reads as ones: nothing answers",)
        if not self.value(STATUS, 2) & PciStatus.CAP_LIST:
            return ()
        area = range(HEADER_SIZE, min(CONFIG_SIZE, len(self.data)))
        return tuple(_chain(self.value(POINTER, 1) & _ALIGNED, area, self._standard_at))

    @cached_property
    def _extended(self) -> tuple[Found | str, ...]:
        area = range(CONFIG_SIZE, len(self.data))
        if self.absent or self.value(CONFIG_SIZE, 4) in (0, 0xFFFF_FFFF):
            return ()
        return tuple(_chain(CONFIG_SIZE, area, self._extended_at))

    def _standard_at(self, offset: int) -> tuple[Found, int]:
        return Found(offset, self.value(offset, 1)), self.value(offset + 1, 1) & _ALIGNED

    def _extended_at(self, offset: int) -> tuple[Found, int]:
        header = self.value(offset, 4)
        return Found(offset, header & 0xFFFF, header >> 16 & 0xF), header >> 20 & _ALIGNED


@dataclass(frozen=True, slots=True)
class Found:
    """A capability: where, its id; ``version``, of an extended one."""

    offset: int
    id: int
    version: int | None = None

    @property
    def kind(self) -> Kind:
        """What its id stands for."""
        table = CAPABILITIES if self.version is None else EXTENDED_CAPABILITIES
        return table.get(self.id, _UNKNOWN)

    def fields(self, snapshot: Snapshot) -> dict[str, Value]:
        """What it says, by name."""
        kind = self.kind
        return {one.name: one.read(snapshot, self.offset) for one in kind.choose(snapshot, self.offset)}


def _chain(start: int, area: range, at: Callable[[int], tuple[Found, int]]) -> Iterator[Found | str]:
    """The capabilities from ``start`` on; last of all a complaint, if the chain does not end as it should."""
    offset, seen, before = start, set[int](), "the pointer to the first"
    while offset:
        if offset not in area:
            yield f"{before} capability leads to {offset:#x}, where none can be"
            return
        if offset in seen:
            yield f"{before} capability leads back to {offset:#x}: the chain is a circle"
            return
        seen.add(offset)
        found, offset = at(offset)
        yield found
        before = f"the {found.kind.name} ({found.offset:#x})"


# What a field is, and how it is shown


@dataclass(frozen=True, slots=True)
class Field:
    """``count`` bits from bit ``low`` on, at ``offset`` of a capability."""

    name: str
    offset: int
    low: int
    count: int
    show: Callable[[int], Value]

    def read(self, snapshot: Snapshot, base: int) -> Value:
        number = snapshot.value(base + self.offset, (self.low + self.count + 7) // 8)
        return self.show(number >> self.low & (1 << self.count) - 1)


class Kind(NamedTuple):
    """A kind of capability, and the fields of one."""

    name: str
    fields: Sequence[Field] = ()
    further: Callable[[Snapshot, int], Sequence[Field]] = lambda snapshot, offset: ()
    """Those that depend on what it holds."""

    def choose(self, snapshot: Snapshot, offset: int) -> Sequence[Field]:
        return (*self.fields, *self.further(snapshot, offset))


def _flag(name: str, offset: int, bit: int) -> Field:
    return Field(name, offset, bit, 1, bool)


def _number(name: str, offset: int, low: int, count: int, show: Callable[[int], Value] = int) -> Field:
    return Field(name, offset, low, count, show)


def _hex(name: str, offset: int, width: int) -> Field:
    return Field(name, offset, 0, 8 * width, lambda value: f"{value:#0{2 * width + 2}x}")


def _choice(name: str, offset: int, low: int, count: int, names: Mapping[int, str]) -> Field:
    return Field(name, offset, low, count, lambda value: names.get(value, f"reserved ({value})"))


def _bits(name: str, offset: int, count: int, names: Mapping[int, str]) -> Field:
    """``count`` bits, of which those that are set are listed."""

    def show(value: int) -> str:
        return " ".join(names.get(bit, f"bit{bit}") for bit in range(count) if value >> bit & 1) or "none"

    return Field(name, offset, 0, count, show)


def _bar_place(value: int) -> str:
    return f"bar{value & 7}+{value & ~7:#x}"


def _serial(value: int) -> str:
    return value.to_bytes(8, "big").hex("-")


def _power(value: int) -> str:
    return f"{1 << value}"


_PAYLOAD = {code: f"{128 << code} bytes" for code in range(6)}
_SPEEDS = {1: "2.5 GT/s", 2: "5 GT/s", 3: "8 GT/s", 4: "16 GT/s", 5: "32 GT/s", 6: "64 GT/s", 0: "none"}
_PORTS = {
    0: "endpoint",
    1: "legacy endpoint",
    4: "root port",
    5: "upstream port",
    6: "downstream port",
    7: "bridge to PCI",
    8: "bridge from PCI",
    9: "integrated endpoint",
    10: "event collector",
}
_UNCORRECTABLE = {
    4: "data_link",
    5: "surprise_down",
    12: "poisoned",
    13: "flow_control",
    14: "timeout",
    15: "completer_abort",
    16: "unexpected_completion",
    17: "overflow",
    18: "malformed",
    19: "ecrc",
    20: "unsupported",
    21: "acs",
    22: "internal",
}
_CORRECTABLE = {
    0: "receiver",
    6: "bad_tlp",
    7: "bad_dllp",
    8: "rollover",
    12: "timeout",
    13: "advisory",
    14: "internal",
    15: "log_overflow",
}


def _msi_message(snapshot: Snapshot, offset: int) -> Sequence[Field]:
    """The message, whose place depends on the width of its address; its masks, if it has any."""
    control = snapshot.value(offset + 2, 2)
    width = 8 if control & 1 << 7 else 4
    message = (_hex("address", 4, width), _hex("data", 4 + width, 2))
    masks = (_hex("mask", 8 + width, 4), _hex("pending", 12 + width, 4))
    return (*message, *masks) if control & 1 << 8 else message


def _vendor_body(snapshot: Snapshot, offset: int) -> Sequence[Field]:
    return _body(3, min(snapshot.value(offset + 2, 1), CONFIG_SIZE - offset) - 3)


def _body(offset: int, length: int, most: int = 16) -> Sequence[Field]:
    """The first bytes of what only a vendor knows, if there are any."""
    count = min(length, most)
    more = "..." if length > most else ""
    if count <= 0:
        return ()
    return (Field("body", offset, 0, 8 * count, lambda value: value.to_bytes(count, "little").hex() + more),)


def _vsec_body(snapshot: Snapshot, offset: int) -> Sequence[Field]:
    return _body(8, (snapshot.value(offset + 4, 4) >> 20) - 8)


_UNKNOWN = Kind("unknown")

CAPABILITIES: Mapping[int, Kind] = {
    0x01: Kind(
        "power management",
        [
            _number("version", 2, 0, 3),
            _flag("d1", 2, 9),
            _flag("d2", 2, 10),
            _choice("state", 4, 0, 2, {0: "D0", 1: "D1", 2: "D2", 3: "D3hot"}),
            _flag("no_soft_reset", 4, 3),
            _flag("pme_enable", 4, 8),
            _flag("pme_status", 4, 15),
        ],
    ),
    0x02: Kind("AGP"),
    0x03: Kind("vital product data"),
    0x04: Kind("slot identification"),
    MSI: Kind(
        "MSI",
        [
            _flag("enable", 2, 0),
            _number("vectors", 2, 1, 3, _power),
            _number("enabled_vectors", 2, 4, 3, _power),
            _flag("maskable", 2, 8),
            _flag("64bit", 2, 7),
        ],
        _msi_message,
    ),
    0x06: Kind("CompactPCI hot swap"),
    0x07: Kind("PCI-X"),
    0x08: Kind("HyperTransport"),
    0x09: Kind("vendor specific", [_number("length", 2, 0, 8)], _vendor_body),
    0x0A: Kind("debug port"),
    0x0C: Kind("hot plug"),
    0x0D: Kind("bridge subsystem"),
    0x10: Kind(
        "PCI Express",
        [
            _number("version", 2, 0, 4),
            _choice("type", 2, 4, 4, _PORTS),
            _flag("flr", 4, 28),
            _choice("max_payload_supported", 4, 0, 3, _PAYLOAD),
            _choice("max_payload", 8, 5, 3, _PAYLOAD),
            _choice("max_read_request", 8, 12, 3, _PAYLOAD),
            _flag("relaxed_ordering", 8, 4),
            _flag("extended_tags", 8, 8),
            _flag("no_snoop", 8, 11),
            _bits("reports", 8, 4, {0: "correctable", 1: "nonfatal", 2: "fatal", 3: "unsupported"}),
            _bits("errors", 0x0A, 4, {0: "correctable", 1: "nonfatal", 2: "fatal", 3: "unsupported"}),
            _flag("transactions_pending", 0x0A, 5),
            _choice("link_speed", 0x12, 0, 4, _SPEEDS),
            _number("link_width", 0x12, 4, 6, lambda value: f"x{value}"),
        ],
    ),
    MSIX: Kind(
        "MSI-X",
        [
            _flag("enable", 2, 15),
            _flag("masked", 2, 14),
            _number("vectors", 2, 0, 11, lambda value: value + 1),
            _number("table", 4, 0, 32, _bar_place),
            _number("pba", 8, 0, 32, _bar_place),
        ],
    ),
    0x12: Kind("SATA"),
    0x13: Kind("advanced features", [_flag("flr", 3, 1), _flag("transactions_pending", 5, 0)]),
    0x14: Kind("enhanced allocation"),
}
"""By id, those of the chain below 0x100."""

EXTENDED_CAPABILITIES: Mapping[int, Kind] = {
    0x01: Kind(
        "advanced error reporting",
        [
            _bits("uncorrectable", 0x04, 32, _UNCORRECTABLE),
            _bits("uncorrectable_masked", 0x08, 32, _UNCORRECTABLE),
            _bits("fatal", 0x0C, 32, _UNCORRECTABLE),
            _bits("correctable", 0x10, 32, _CORRECTABLE),
            _bits("correctable_masked", 0x14, 32, _CORRECTABLE),
            _number("first_error", 0x18, 0, 5),
        ],
    ),
    0x02: Kind("virtual channel"),
    0x03: Kind("device serial number", [_number("number", 4, 0, 64, _serial)]),
    0x04: Kind("power budgeting"),
    0x0B: Kind(
        "vendor specific",
        [_hex("vendor_id", 4, 2), _number("revision", 4, 16, 4), _number("length", 4, 20, 12)],
        _vsec_body,
    ),
    0x0D: Kind("access control services"),
    0x0E: Kind("alternative routing-id"),
    0x0F: Kind("address translation services"),
    0x10: Kind("single root I/O virtualization"),
    0x13: Kind("page request"),
    0x15: Kind("resizable BAR"),
    0x17: Kind("TPH requester"),
    0x18: Kind("latency tolerance reporting"),
    0x19: Kind("secondary PCI Express"),
    0x1B: Kind("PASID"),
    0x1E: Kind("L1 PM substates"),
    0x1F: Kind("precision time measurement"),
    0x23: Kind(
        "designated vendor specific", [_hex("vendor", 4, 2), _number("revision", 4, 16, 4), _hex("dvsec_id", 8, 2)]
    ),
    0x25: Kind("data link feature"),
    0x26: Kind("physical layer 16 GT/s"),
    0x27: Kind("lane margining"),
}
"""By id, those of the chain from 0x100 on."""

_BASE_CLASSES = {
    0x00: "unclassified device",
    0x01: "mass storage controller",
    0x02: "network controller",
    0x03: "display controller",
    0x04: "multimedia controller",
    0x05: "memory controller",
    0x06: "bridge",
    0x07: "communication controller",
    0x08: "system peripheral",
    0x09: "input device",
    0x0A: "docking station",
    0x0B: "processor",
    0x0C: "serial bus controller",
    0x0D: "wireless controller",
    0x0E: "intelligent I/O controller",
    0x0F: "satellite controller",
    0x10: "encryption controller",
    0x11: "signal processing controller",
    0x12: "processing accelerator",
    0x13: "non-essential instrumentation",
    0xFF: "device of no class",
}
_CLASSES = {
    0x0100: "SCSI storage controller",
    0x0101: "IDE interface",
    0x0104: "RAID bus controller",
    0x0106: "SATA controller",
    0x0107: "SAS controller",
    0x0108: "non-volatile memory controller",
    0x0200: "Ethernet controller",
    0x0280: "network controller",
    0x0300: "VGA compatible controller",
    0x0302: "3D controller",
    0x0380: "display controller",
    0x0400: "video controller",
    0x0401: "audio controller",
    0x0403: "audio device",
    0x0500: "RAM memory",
    0x0501: "flash memory",
    0x0502: "CXL memory",
    0x0600: "host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0700: "serial controller",
    0x0780: "communication controller",
    0x0800: "interrupt controller",
    0x0805: "SD host controller",
    0x0880: "system peripheral",
    0x0C03: "USB controller",
    0x0C05: "SMBus controller",
    0x1000: "network and computing encryption controller",
}
_PROGRAMMING = {0x010802: "NVM Express", 0x010601: "AHCI", 0x0C0330: "XHCI", 0x0C0320: "EHCI", 0x070002: "16550"}


def class_name(class_code: int) -> str:
    """What a class code of 24 bits stands for: the nearest that has a name."""
    base = _BASE_CLASSES.get(class_code >> 16, "unknown class")
    name = _CLASSES.get(class_code >> 8, base)
    return f"{name} ({_PROGRAMMING[class_code]})" if class_code in _PROGRAMMING else name


@dataclass(frozen=True, slots=True)
class BarAddress:
    """What config space holds of a BAR: ``address`` is 0 before a guest gives it one."""

    index: int
    address: int
    bits: int
    io: bool
    prefetchable: bool


def bars(snapshot: Snapshot) -> Iterator[BarAddress]:
    """The BARs whose registers are not 0, by index; of a bridge, which has two, none."""
    if snapshot.absent or snapshot.value(HEADER_TYPE, 1) & ~_MULTIFUNCTION:
        return
    index = 0
    while index < NUM_BARS:
        low = snapshot.value(BAR0 + 4 * index, 4)
        wide = not low & _BAR_IO and low & 0b110 == _BAR_64 and index + 1 < NUM_BARS
        if low & _BAR_IO:
            yield BarAddress(index, low & _ALIGNED, 32, True, False)
        elif low or wide:
            high = snapshot.value(BAR0 + 4 * index + 4, 4) if wide else 0
            yield BarAddress(index, high << 32 | low & ~0xF, 64 if wide else 32, False, bool(low & _BAR_PREFETCH))
        index += 2 if wide else 1


def command_flags(snapshot: Snapshot) -> dict[str, bool]:
    """The bits of the command register, by name."""
    return _flags(snapshot.value(COMMAND, 2), PciCommand)


def status_flags(snapshot: Snapshot) -> dict[str, bool]:
    """The bits of the status register, by name."""
    return _flags(snapshot.value(STATUS, 2), PciStatus)


def _flags(value: int, kind: type[PciCommand | PciStatus]) -> dict[str, bool]:
    return {str(flag.name).lower(): bool(value & flag) for flag in kind}
