"""vfio-user for Python: write a PCI device as a class, plug it into a VMM, live-migrate it.

The public names are loaded when they are first used, so that importing the package costs next to nothing.
``vfio_user.aio`` has the asyncio twins of Client and Server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfio_user.client import Client
    from vfio_user.device import Bar, Device, option, register, state
    from vfio_user.server import Irq, Region, RegionIoFd, Server, ServerBackend, serve
    from vfio_user.wire.constants import Command, DeviceFeature, DeviceState, MigrationFlags

_SOURCES = {
    "vfio_user.client": ("Client",),
    "vfio_user.device": ("Bar", "Device", "option", "register", "state"),
    "vfio_user.server": ("Irq", "Region", "RegionIoFd", "Server", "ServerBackend", "serve"),
    "vfio_user.wire.constants": ("Command", "DeviceFeature", "DeviceState", "MigrationFlags"),
}
_HOME = {name: module for module, names in _SOURCES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Bar",
    "Client",
    "Command",
    "Device",
    "DeviceFeature",
    "DeviceState",
    "Irq",
    "MigrationFlags",
    "Region",
    "RegionIoFd",
    "Server",
    "ServerBackend",
    "option",
    "register",
    "serve",
    "state",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
