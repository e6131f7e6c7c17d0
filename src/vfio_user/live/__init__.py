"""The VMM's side of a live migration: the engine, destinations here and elsewhere, files, reports."""

from vfio_user.live.destination import Destination, LocalDestination, UnconfirmedError
from vfio_user.live.engine import Migration
from vfio_user.live.files import read_header, restore, save
from vfio_user.live.memory import DirtyMemory, MemoryRegion
from vfio_user.live.offer import DeviceOffer, Offer
from vfio_user.live.pipes import FdPipe, Pipe, SocketPipe, TlsPipe
from vfio_user.live.remote import Arrival, RemoteDestination, receive
from vfio_user.live.report import Report, Round, Status, Step

__all__ = [
    "Arrival",
    "Destination",
    "DeviceOffer",
    "DirtyMemory",
    "FdPipe",
    "LocalDestination",
    "MemoryRegion",
    "Migration",
    "Offer",
    "Pipe",
    "RemoteDestination",
    "Report",
    "Round",
    "SocketPipe",
    "Status",
    "Step",
    "TlsPipe",
    "UnconfirmedError",
    "read_header",
    "receive",
    "restore",
    "save",
]
