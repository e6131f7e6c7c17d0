"""For tests of devices, and of this package.

- :class:`FakeGuest` drives a device without a VMM: guest memory, register accesses, interrupts.
- :func:`paired` connects both roles of the protocol without sockets.
- :func:`no_fd_leaks` fails when file descriptors are left over.
- ``pytest_plugin`` has the first and the last as fixtures; ``qtest`` drives a real QEMU.
"""

from vfio_user.testing.guest import FakeGuest
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.testing.pairs import End, paired

__all__ = ["End", "FakeGuest", "no_fd_leaks", "paired"]
