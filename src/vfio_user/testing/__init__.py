"""For tests of devices, and of this package.

- :class:`FakeGuest` drives a device without a VMM: guest memory, register accesses, interrupts.
- :func:`recorded_interrupts` is the other end of its interrupts, without a client.
- ``simulator.GuestSimulator`` is a guest at work on two hosts, to migrate: what is lost is found.
- :func:`paired` connects both roles of the protocol without sockets.
- :func:`no_fd_leaks` fails when file descriptors are left over.
- ``pytest_plugin`` has the first and the last as fixtures; ``qtest`` drives a real QEMU, ``linux`` one that
  runs Linux.
"""

from vfio_user.testing.guest import FakeGuest
from vfio_user.testing.interrupts import RecordedInterrupts, recorded_interrupts
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.testing.pairs import End, paired

__all__ = ["End", "FakeGuest", "RecordedInterrupts", "no_fd_leaks", "paired", "recorded_interrupts"]
