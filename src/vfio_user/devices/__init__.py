"""Real devices, by the names that ``vfio-user serve`` knows them by."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfio_user.device import Device

BUILT_IN = {"edu": "Edu", "gpio": "Gpio", "ivshmem": "Ivshmem", "nvme": "Nvme"}
"""Module of this package, and the class in it."""


def built_in(name: str) -> type[Device]:
    """The class of a built-in device. Raises KeyError for a name that is none."""
    class_name = BUILT_IN[name]
    device_class: type[Device] = getattr(import_module(f"{__name__}.{name}"), class_name)
    return device_class
