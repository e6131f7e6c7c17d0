"""The server's side: the hooks of a device, dispatch, and a server on a UNIX socket."""

from vfio_user.server.backend import Irq, Link, Quiescing, Region, RegionIoFd, ServerBackend
from vfio_user.server.server import Server, serve

__all__ = ["Irq", "Link", "Quiescing", "Region", "RegionIoFd", "Server", "ServerBackend", "serve"]
