"""What a connection may say, without I/O: framing, and the connection's state for both roles."""

from vfio_user.protocol.connection import Connection, Outgoing
from vfio_user.protocol.framing import Framer, Message

__all__ = ["Connection", "Framer", "Message", "Outgoing"]
