"""What the server says of itself: what the cases are about, and which of them can be asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from vfio_user.tools.check.raw import RawConnection, Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import (
    DEFAULT_DATA_XFER_SIZE,
    DEFAULT_MSG_FDS,
    Command,
    DeviceFeature,
    DeviceFlags,
    FeatureFlags,
    MigrationFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)

P = TypeVar("P", bound=m.Payload)

PROPOSAL: dict[str, Any] = {
    "max_msg_fds": 8,
    "max_data_xfer_size": DEFAULT_DATA_XFER_SIZE,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "write_multiple": True,
    "migration": {"pgsize": 4096},
}
"""The capabilities that are proposed wherever a case proposes no others."""
ROOM = 32
"""Spaces behind the JSON: the answer may not be longer."""
MAX_ENTRIES = 64
"""Regions and interrupt indexes that are looked at."""


def version_data(capabilities: object = PROPOSAL) -> bytes:
    """The version data that propose ``capabilities``."""
    return json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode() + b" " * ROOM + b"\0"


def told_capabilities(text: bytes) -> dict[str, Any]:
    """The capabilities in version data, {} where there are none.

    Raises ValueError for what is no JSON object, or has capabilities that are none. Unlike a peer of ours this takes
    values of any types, which are looked at one by one.
    """
    try:
        data = json.loads(text.rstrip(b"\0"))
    except RecursionError as error:
        raise ValueError("nested without end") from error
    capabilities = data.get("capabilities", {}) if isinstance(data, dict) else None
    if not isinstance(capabilities, dict):
        raise ValueError("not an object with an object of capabilities")
    return capabilities


def version(text: bytes, *, major: int = 0, minor: int = 2) -> bytes:
    """The payload of VERSION."""
    return m.Version(major, minor).pack() + text


@dataclass(frozen=True, slots=True)
class Facts:
    """The answers to GET_INFO, GET_REGION_INFO, GET_IRQ_INFO; config space; what migrates.

    ``capabilities``: the answered ones. Regions and interrupts that could not be asked for are empty ones.
    ``migration``: MigrationFlags; None: the device does not migrate.
    """

    capabilities: dict[str, Any]
    info: m.DeviceInfo
    regions: tuple[m.RegionInfo, ...] = ()
    irqs: tuple[m.IrqInfo, ...] = ()
    config: bytes = b""
    migration: int | None = None
    logging: bool = False

    def number(self, key: str, default: int) -> int:
        value = self.capabilities.get(key, default)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    @property
    def max_data(self) -> int:
        return self.number("max_data_xfer_size", DEFAULT_DATA_XFER_SIZE)

    @property
    def max_fds(self) -> int:
        return self.number("max_msg_fds", DEFAULT_MSG_FDS)

    @property
    def control(self) -> bool:
        """Whether this is a control socket (docs/control.md): what it takes is less than what a device takes."""
        return "x_control" in self.capabilities

    @property
    def write_multiple(self) -> bool:
        return self.capabilities.get("write_multiple") is True

    def region(self, index: int) -> m.RegionInfo:
        return self.regions[index] if index < len(self.regions) else m.RegionInfo(0, 0, index)

    def irq(self, index: int) -> m.IrqInfo:
        return self.irqs[index] if index < len(self.irqs) else m.IrqInfo(0, 0, index)

    @property
    def migration_flags(self) -> MigrationFlags:
        return MigrationFlags((self.migration or 0) & sum(MigrationFlags))

    @property
    def identity(self) -> str:
        if len(self.config) < 4:
            return "a device without config space"
        vendor, device = (int.from_bytes(self.config[at : at + 2], "little") for at in (0, 2))
        return f"{vendor:04x}:{device:04x}"


Need = Callable[[Facts], str]
"""Why a case cannot be asked of this server; "": it can."""


def needs_region(index: int, flags: int = RegionFlags.READ, least: int = 1) -> Need:
    def missing(facts: Facts) -> str:
        region = facts.region(index)
        if region.size < least:
            return f"no region {index}" if not region.size else f"region {index} has {region.size} bytes"
        return "" if region.flags & flags == flags else f"region {index} has flags {region.flags:#x}"

    return missing


def needs_config(facts: Facts) -> str:
    return "" if len(facts.config) >= 64 else "no config space"


def needs_irqs(index: int, least: int = 1) -> Need:
    def missing(facts: Facts) -> str:
        count = facts.irq(index).count
        return "" if count >= least else f"interrupt index {index} has {count} interrupts"

    return missing


def needs_migration(facts: Facts) -> str:
    return "the device does not migrate" if facts.migration is None else ""


def needs_pre_copy(facts: Facts) -> str:
    return needs_migration(facts) or ("" if facts.migration_flags & MigrationFlags.PRE_COPY else "no PRE_COPY")


def needs_logging(facts: Facts) -> str:
    return "" if facts.logging else "the device does not log its DMA"


def needs_write_multiple(facts: Facts) -> str:
    return "" if facts.write_multiple else "write_multiple was not granted"


def needs_reset(facts: Facts) -> str:
    return "" if facts.info.flags & DeviceFlags.RESET else "the device has no reset"


def gather(connection: RawConnection, capabilities: dict[str, Any]) -> Facts:
    """Ask for all of it. Raises NoMessageError when an answer does not come; refusals leave their part out."""
    info = _asked(connection, Command.DEVICE_GET_INFO, m.DeviceInfo(16).pack(), m.DeviceInfo) or m.DeviceInfo(0)
    regions = tuple(
        _asked(connection, Command.DEVICE_GET_REGION_INFO, m.RegionInfo(32, 0, index).pack(), m.RegionInfo)
        or m.RegionInfo(0, 0, index)
        for index in range(min(info.num_regions, MAX_ENTRIES))
    )
    irqs = tuple(
        _asked(connection, Command.DEVICE_GET_IRQ_INFO, m.IrqInfo(16, 0, index).pack(), m.IrqInfo)
        or m.IrqInfo(0, 0, index)
        for index in range(min(info.num_irqs, MAX_ENTRIES))
    )
    config_size = regions[PciRegion.CONFIG].size if len(regions) > PciRegion.CONFIG else 0
    migration = _feature(connection, FeatureFlags.GET | DeviceFeature.MIGRATION, 16)
    return Facts(
        capabilities,
        info,
        regions,
        irqs,
        _config(connection, min(config_size, 4096)),
        int.from_bytes(migration[:8], "little") if migration else None,
        _feature(connection, FeatureFlags.PROBE | FeatureFlags.SET | DeviceFeature.DMA_LOGGING_START, 8) is not None,
    )


def ask(connection: RawConnection, command: int, payload: bytes) -> Received | None:
    """The reply to a command, None when it is refused. Raises NoMessageError."""
    connection.post(command, payload)
    reply = connection.read()
    return None if reply.is_error else reply


def _asked(connection: RawConnection, command: int, payload: bytes, layout: type[P]) -> P | None:
    reply = ask(connection, command, payload)
    return layout.parse(reply.payload) if reply and len(reply.payload) >= layout.LAYOUT.size else None


def _config(connection: RawConnection, size: int) -> bytes:
    if not size:
        return b""
    reply = ask(connection, Command.REGION_READ, m.RegionAccess(0, PciRegion.CONFIG, size).pack())
    return reply.payload[m.RegionAccess.LAYOUT.size :] if reply else b""


def _feature(connection: RawConnection, flags: int, argsz: int) -> bytes | None:
    reply = ask(connection, Command.DEVICE_FEATURE, m.Feature(argsz, flags).pack())
    return reply.payload[m.Feature.LAYOUT.size :] if reply else None


MOST_IRQS = {PciIrq.INTX: 1, PciIrq.MSI: 32, PciIrq.MSIX: 2048, PciIrq.ERR: 1, PciIrq.REQ: 1}
"""How many interrupts an index of a PCI device can have."""
