"""What is behind a socket: everything that a server says of itself, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from vfio_user.client import Client
from vfio_user.errors import CommandError
from vfio_user.pci.capabilities import CONFIG_SIZE, EXTENDED_CONFIG_SIZE
from vfio_user.tools.config_space import Snapshot, bars, class_name, command_flags, status_flags
from vfio_user.tools.region_map import Span, spans, structures
from vfio_user.wire.constants import (
    DeviceFeature,
    DeviceFlags,
    IrqInfoFlags,
    MigrationFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)

_DWORD = 4


def gather(client: Client) -> dict[str, Any]:
    """Keys: version, capabilities, device, regions, irqs, pci, migration. Values are JSON's types."""
    snapshot = read_config(client)
    return {
        "version": "{}.{}".format(*client.version),
        "capabilities": msgspec.to_builtins(client.capabilities),
        "device": _device(client),
        "regions": _regions(client, {} if snapshot is None else structures(snapshot)),
        "irqs": irqs(client),
        "pci": None if snapshot is None else _pci(snapshot),
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


def _regions(client: Client, inside: Mapping[int, Sequence[Span]]) -> list[dict[str, Any]]:
    return [
        {
            "index": region.index,
            "name": name_of(PciRegion, region.index),
            "size": region.size,
            "flags": flag_names(region.flags, RegionFlags),
            "mmap_areas": [{"offset": offset, "size": size} for offset, size in region.mmap_areas],
            "parts": [one._asdict() for one in spans(region, inside.get(region.index, ()))],
        }
        for region in client.regions
    ]


def irqs(client: Client) -> list[dict[str, Any]]:
    """The interrupt indexes: index, name, count, flags."""
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


def read_config(client: Client) -> Snapshot | None:
    """Config space; None where there is none. A server that refuses to give it in one piece is asked for dwords."""
    if len(client.regions) <= PciRegion.CONFIG or client.regions[PciRegion.CONFIG].size < CONFIG_SIZE:
        return None
    size = EXTENDED_CONFIG_SIZE if client.regions[PciRegion.CONFIG].size >= EXTENDED_CONFIG_SIZE else CONFIG_SIZE
    try:
        return Snapshot(client.region_read(PciRegion.CONFIG, 0, size))
    except CommandError:
        dwords = (client.region_read(PciRegion.CONFIG, offset, _DWORD) for offset in range(0, size, _DWORD))
        return Snapshot(b"".join(dwords))


def _pci(snapshot: Snapshot) -> dict[str, Any]:
    """Identity and capabilities."""

    def field(offset: int, size: int) -> str:
        return f"{snapshot.value(offset, size):0{2 * size}x}"

    return {
        "vendor_id": field(0x00, 2),
        "device_id": field(0x02, 2),
        "class_code": field(0x09, 3),
        "revision": field(0x08, 1),
        "subsystem_vendor_id": field(0x2C, 2),
        "subsystem_id": field(0x2E, 2),
        "class_name": class_name(snapshot.value(0x09, 3)),
        "command": command_flags(snapshot),
        "status": status_flags(snapshot),
        "interrupt_pin": snapshot.value(0x3D, 1),
        "bars": [asdict(bar) for bar in bars(snapshot)],
        "capabilities": [{"offset": one.offset, "id": one.id, "name": one.kind.name} for one in snapshot.capabilities],
        "extended_capabilities": [
            {"offset": one.offset, "id": one.id, "version": one.version, "name": one.kind.name}
            for one in snapshot.extended_capabilities
        ],
        "decoded": {
            f"{one.offset:02x}": one.fields(snapshot)
            for one in (*snapshot.capabilities, *snapshot.extended_capabilities)
        },
        "complaints": snapshot.complaints,
    }


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
