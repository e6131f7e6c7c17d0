"""What :func:`~vfio_user.tools.info.gather` found, in lines for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from vfio_user.tools.region_map import MARKS, Part, Span, draw

_WIDTH = 100
_INDENT = " " * 14
_MOST_PARTS = 32
"""Of a region that a server cuts to pieces, so many are listed."""
_PINS = ("none", "A", "B", "C", "D")


def describe(facts: Mapping[str, Any]) -> Iterator[str]:
    """All of it; what there is none of is left out."""
    yield f"version     {facts['version']}"
    yield from _wrapped("limits      ", ", ".join(_limits(facts["capabilities"])) or "defaults")
    yield from ["pci         no config space"] if facts["pci"] is None else _pci(facts["pci"])
    yield f"device      {' '.join(facts['device']['flags'])}"
    for region in facts["regions"]:
        if region["size"]:
            yield from _region(region)
    for irq in facts["irqs"]:
        if irq["count"]:
            yield f"irq {irq['index']}       {irq['name']:<7}{irq['count']:>12}  {' '.join(irq['flags'])}"
    yield f"migration   {_migration(facts['migration'])}"


def _pci(pci: Mapping[str, Any]) -> Iterator[str]:
    identity = f"{pci['vendor_id']}:{pci['device_id']} class {pci['class_code']} revision {pci['revision']}"
    yield f"pci         {identity}: {pci['class_name']}"
    yield f"subsystem   {pci['subsystem_vendor_id']}:{pci['subsystem_id']}"
    yield from _wrapped("command     ", fields(pci["command"]))
    yield from _wrapped("status      ", fields(pci["status"]))
    for bar in pci["bars"]:
        kind = "I/O ports" if bar["io"] else f"memory of {bar['bits']} bits{', prefetchable' * bar['prefetchable']}"
        yield f"bar{bar['index']}        {format(bar['address'], '#x') if bar['address'] else 'no address'} ({kind})"
    pin = pci["interrupt_pin"]
    if pin:
        yield f"intx        pin {_PINS[pin] if pin < len(_PINS) else pin}"
    for capability in (*pci["capabilities"], *pci["extended_capabilities"]):
        yield f"capability  [{capability['offset']:02x}] {capability['name']} (id {capability['id']:#04x})"
        yield from _wrapped(_INDENT, fields(pci["decoded"][f"{capability['offset']:02x}"]))
    for complaint in pci["complaints"]:
        yield f"wrong       {complaint}"


def fields(decoded: Mapping[str, bool | int | str]) -> str:
    """Names and values, as lspci has them: flags as ``name+`` and ``name-``."""
    return ", ".join(
        f"{name}{'+' if value else '-'}" if isinstance(value, bool) else f"{name} {value}"
        for name, value in decoded.items()
    )


def _limits(capabilities: Mapping[str, Any], head: str = "") -> Iterator[str]:
    for name, value in capabilities.items():
        if isinstance(value, Mapping):
            yield from _limits(value, f"{head}{name}.")
        else:
            yield f"{head}{name} {value}"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=_INDENT, break_on_hyphens=False)


def _region(region: Mapping[str, Any]) -> Iterator[str]:
    yield f"region {region['index']}    {region['name']:<7}{region['size']:>#12x}  {' '.join(region['flags'])}"
    parts = [Span(Part(one["part"]), one["offset"], one["size"]) for one in region["parts"]]
    if len(parts) == 1 and parts[0].part is Part.TRAPPED:
        return
    yield f"{_INDENT}|{draw(parts)}|"
    for one in parts[:_MOST_PARTS]:
        yield f"{_INDENT}{MARKS[one.part]} {one.part} {one.offset:#x}+{one.size:#x}"
    if len(parts) > _MOST_PARTS:
        yield f"{_INDENT}and {len(parts) - _MOST_PARTS} more parts"


def _migration(migration: Mapping[str, Any]) -> str:
    if not migration["supported"]:
        return "not supported"
    logging = "DMA logging" if migration["dma_logging"] else "no DMA logging"
    size = "" if migration["data_size"] is None else f", about {migration['data_size']} bytes of state"
    return f"{' '.join(migration['flags'])}, {migration['state']}, {logging}{size}"
