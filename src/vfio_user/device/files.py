"""Files in memory that clients map."""

from __future__ import annotations

import fcntl
import os

from vfio_user.fds import OwnedFd


def memory_file(name: str, size: int) -> OwnedFd:
    """A file of ``size`` bytes in memory whose size nobody can change: a client that maps it cannot harm us."""
    fd = OwnedFd(os.memfd_create(f"vfio-user-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
