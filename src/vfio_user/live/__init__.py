"""The VMM's side of a live migration."""

from vfio_user.live.destination import Destination, LocalDestination, UnconfirmedError
from vfio_user.live.engine import Migration
from vfio_user.live.memory import DirtyMemory, MemoryRegion
from vfio_user.live.offer import DeviceOffer, Offer
from vfio_user.live.report import Report, Round, Status, Step

__all__ = [
    "Destination",
    "DeviceOffer",
    "DirtyMemory",
    "LocalDestination",
    "MemoryRegion",
    "Migration",
    "Offer",
    "Report",
    "Round",
    "Status",
    "Step",
    "UnconfirmedError",
]
