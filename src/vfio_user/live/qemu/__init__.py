"""A running guest of an unmodified QEMU 11 moves with its vfio-user devices, by QMP and control sockets.

Needs ``qemu.qmp``: ``pip install vfio-user[qemu]``.
"""

from vfio_user.live.qemu.migration import QemuMigration
from vfio_user.live.qemu.monitor import (
    AbsentError,
    ClosedError,
    EndedMonitor,
    LateError,
    Monitor,
    MonitorError,
    RefusedError,
)
from vfio_user.live.qemu.plan import DevicePair, Plan

__all__ = [
    "AbsentError",
    "ClosedError",
    "DevicePair",
    "EndedMonitor",
    "LateError",
    "Monitor",
    "MonitorError",
    "Plan",
    "QemuMigration",
    "RefusedError",
]
