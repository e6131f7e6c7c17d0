"""For tests of devices, and of this package.

- :class:`FakeGuest` drives a device without a VMM: guest memory, register accesses, interrupts.
- :func:`recorded_interrupts` is the other end of its interrupts, without a client.
- :class:`ServedDevice` serves one behind a socket of its own, :class:`AssignedInterrupts` listens for a client.
- ``simulator.GuestSimulator`` is a guest at work on two hosts, to migrate: what is lost is found.
- ``nvme`` is a driver for NVMe controllers, with a workload that knows what every block must hold.
- :func:`paired` connects both roles of the protocol without sockets.
- :func:`no_fd_leaks` fails when file descriptors are left over.
- ``pytest_plugin`` has most of it as fixtures; ``qtest`` drives a real QEMU, ``linux`` one that runs Linux.

The names are loaded when they are first used: pytest loads the plugin for everybody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfio_user.testing.guest import FakeGuest, map_memory
    from vfio_user.testing.interrupts import AssignedInterrupts, RecordedInterrupts, recorded_interrupts
    from vfio_user.testing.leaks import no_fd_leaks
    from vfio_user.testing.pairs import End, paired
    from vfio_user.testing.served import ServedDevice

_HOME = {
    "AssignedInterrupts": "interrupts",
    "End": "pairs",
    "FakeGuest": "guest",
    "RecordedInterrupts": "interrupts",
    "ServedDevice": "served",
    "map_memory": "guest",
    "no_fd_leaks": "leaks",
    "paired": "pairs",
    "recorded_interrupts": "interrupts",
}

__all__ = [
    "AssignedInterrupts",
    "End",
    "FakeGuest",
    "RecordedInterrupts",
    "ServedDevice",
    "map_memory",
    "no_fd_leaks",
    "paired",
    "recorded_interrupts",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
