"""``vfio-user trace`` as a library: a pass-through that others may look into, and what looks into it here.

:class:`Proxy` passes everything on and tells an :class:`Observer`; :class:`Tracer` is one that decodes, chooses,
prints, counts and captures. :func:`read_capture` gives the messages of a capture, which a Tracer can be told as well.
"""

from vfio_user.tools.trace.capture import CaptureWriter, dissector_path, read_capture
from vfio_user.tools.trace.choice import Choice, parse_command
from vfio_user.tools.trace.fields import Decoded, Field, decode
from vfio_user.tools.trace.names import RegisterNames
from vfio_user.tools.trace.pcapng import CaptureError
from vfio_user.tools.trace.proxy import Flow, Proxy, connect, listen
from vfio_user.tools.trace.seen import FdKind, Observer, Place, Seen, SeenFd
from vfio_user.tools.trace.session import Ends, TraceSession
from vfio_user.tools.trace.tracer import Manner, Tracer

__all__ = [
    "CaptureError",
    "CaptureWriter",
    "Choice",
    "Decoded",
    "Ends",
    "FdKind",
    "Field",
    "Flow",
    "Manner",
    "Observer",
    "Place",
    "Proxy",
    "RegisterNames",
    "Seen",
    "SeenFd",
    "TraceSession",
    "Tracer",
    "connect",
    "decode",
    "dissector_path",
    "listen",
    "parse_command",
    "read_capture",
]
