"""The asyncio twins of :class:`vfio_user.Client` and :class:`vfio_user.Server`: the same names, with ``await``."""

from vfio_user.client.aio import Client
from vfio_user.server.aio import Server, serve

__all__ = ["Client", "Server", "serve"]
