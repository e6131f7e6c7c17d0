"""The client's side: what a VMM says to a device server."""

from vfio_user.client.client import Client
from vfio_user.client.regions import IoFdDescription, MappedArea, RegionDescription

__all__ = ["Client", "IoFdDescription", "MappedArea", "RegionDescription"]
