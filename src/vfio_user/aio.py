"""The asyncio twins of the blocking classes: the same names, with ``await``.

``Client`` and ``Server`` are those of :mod:`vfio_user`, ``ControlClient`` that of :mod:`vfio_user.client.control`,
``Migration`` and ``LocalDestination`` those of :mod:`vfio_user.live`.
"""

from vfio_user.client.aio import Client
from vfio_user.client.control_aio import ControlClient
from vfio_user.live.aio import LocalDestination, Migration
from vfio_user.server.aio import Server, serve

__all__ = ["Client", "ControlClient", "LocalDestination", "Migration", "Server", "serve"]
