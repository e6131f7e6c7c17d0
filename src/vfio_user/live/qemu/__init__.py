"""A running guest of an unmodified QEMU 11 moves with its vfio-user devices, or into a folder and out of it again.

By QMP and control sockets.

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
from vfio_user.live.qemu.named_control import NamedControl
from vfio_user.live.qemu.places import ServedDevice
from vfio_user.live.qemu.plan import DevicePair, Plan
from vfio_user.live.qemu.snapshot import QemuRestore, QemuSave, SnapshotReport
from vfio_user.live.qemu.snapshot_plans import RestorePlan, SavePlan

__all__ = [
    "AbsentError",
    "ClosedError",
    "DevicePair",
    "EndedMonitor",
    "LateError",
    "Monitor",
    "MonitorError",
    "NamedControl",
    "Plan",
    "QemuMigration",
    "QemuRestore",
    "QemuSave",
    "RefusedError",
    "RestorePlan",
    "SavePlan",
    "ServedDevice",
    "SnapshotReport",
]
