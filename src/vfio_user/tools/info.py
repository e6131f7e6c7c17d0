"""What is behind a socket: everything that a server says of itself, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from vfio_user.client import Client
from vfio_user.errors import CommandError
from vfio_user.wire.constants import (
    DeviceFeature,
    DeviceFlags,
    IrqInfoFlags,
    MigrationFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)

CAPABILITY_NAMES = {
    0x01: "power management",
    0x05: "MSI",
    0x09: "vendor specific",
    0x10: "PCI Express",
    0x11: "MSI-X",
}
_STATUS_CAPABILITIES = 0x10
_HEADER_SIZE = 0x40


def gather(client: Client) -> dict[str, Any]:
    """Keys: version, capabilities, device, regions, irqs, pci, migration. Values are JSON's types."""
    return {
        "version": "{}.{}".format(*client.version),
        "capabilities": msgspec.to_builtins(client.capabilities),
        "device": _device(client),
        "regions": _regions(client),
        "irqs": _irqs(client),
        "pci": _pci(client),
        "migration": _migration(client),
    }


def flag_names(flags: int, kind: type[DeviceFlags | RegionFlags | IrqInfoFlags | MigrationFlags]) -> list[str]:
    """The names of the bits that are set; a bit without one as hexadecimal digits."""
    names = [str(flag.name) for flag in kind if flags & flag]
    rest = flags & ~sum(kind)
    return [*names, hex(rest)] if rest else names


def _device(client: Client) -> dict[str, Any]:
    info = client.info
    return {
        "flags": flag_names(info.flags, DeviceFlags),
        "num_regions": info.num_regions,
        "num_irqs": info.num_irqs,
    }


def _regions(client: Client) -> list[dict[str, Any]]:
    return [
        {
            "index": region.index,
            "name": name_of(PciRegion, region.index),
            "size": region.size,
            "flags": flag_names(region.flags, RegionFlags),
            "mmap_areas": [{"offset": offset, "size": size} for offset, size in region.mmap_areas],
        }
        for region in client.regions
    ]


def _irqs(client: Client) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "name": name_of(PciIrq, index),
            "count": irq.count,
            "flags": flag_names(irq.flags, IrqInfoFlags),
        }
        for index, irq in enumerate(client.irqs)
    ]


def name_of(kind: type[PciRegion | PciIrq], index: int) -> str:
    """What a region or an interrupt index is called, in small letters; its number where it has no name."""
    return kind(index).name.lower() if index in set(kind) else str(index)


def _pci(client: Client) -> dict[str, Any] | None:
    """Identity and capabilities from config space; None where there is none to read."""
    if len(client.regions) <= PciRegion.CONFIG or client.regions[PciRegion.CONFIG].size < 256:
        return None
    config = client.region_read(PciRegion.CONFIG, 0, 256)

    def field(offset: int, size: int) -> str:
        return f"{int.from_bytes(config[offset : offset + size], 'little'):0{2 * size}x}"

    return {
        "vendor_id": field(0x00, 2),
        "device_id": field(0x02, 2),
        "class_code": field(0x09, 3),
        "revision": field(0x08, 1),
        "subsystem_vendor_id": field(0x2C, 2),
        "subsystem_id": field(0x2E, 2),
        "capabilities": [
            {"offset": offset, "id": config[offset], "name": CAPABILITY_NAMES.get(config[offset], "unknown")}
            for offset in _capability_offsets(config)
        ],
    }


def _capability_offsets(config: bytes) -> Iterator[int]:
    """Along the chain; one that runs in a circle ends where it closes."""
    offset = config[0x34] & ~3 if config[0x06] & _STATUS_CAPABILITIES else 0
    seen: set[int] = set()
    while offset >= _HEADER_SIZE and offset not in seen:
        seen.add(offset)
        yield offset
        offset = config[offset + 1] & ~3


def _migration(client: Client) -> dict[str, Any]:
    try:
        flags = client.migration_flags()
    except CommandError:
        return {"supported": False}
    state = client.migration_get_state()
    return {
        "supported": True,
        "flags": flag_names(flags, MigrationFlags),
        "state": state.name,
        "dma_logging": client.probe(DeviceFeature.DMA_LOGGING_START),
        "data_size": client.migration_data_size() if client.probe(DeviceFeature.MIG_DATA_SIZE) else None,
    }
