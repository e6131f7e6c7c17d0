"""Fuzz a device server without sockets: any bytes, in any pieces, end in replies or in FramingError, nothing else.

The first byte says into pieces of how many bytes the rest is cut; the rest follows a negotiation that succeeded.
"""

from __future__ import annotations

from vfio_user.devices.edu import Edu
from vfio_user.errors import FramingError, ProtocolError
from vfio_user.protocol import Message
from vfio_user.server.dispatch import Dispatcher
from vfio_user.wire.messages import Header


def run(data: bytes) -> list[bytes]:
    """Serve ``data``; the replies."""
    piece = data[0] + 1 if data else 1
    dispatcher = Dispatcher(Edu())
    dispatcher.connection.negotiated = True
    framer = dispatcher.connection.framer
    replies: list[bytes] = []
    rest = data[1:]
    try:
        while rest:
            framer.feed(rest[:piece])
            rest = rest[piece:]
            while (message := framer.next_message()) is not None:
                reply = _serve(dispatcher, message)
                if reply is not None:
                    replies.append(reply)
    except FramingError:
        pass
    finally:
        dispatcher.client_left()
    return replies


def _serve(dispatcher: Dispatcher, message: Message) -> bytes | None:
    try:
        interesting = dispatcher.connection.check(message)
    except ProtocolError as error:
        outgoing = dispatcher.refuse(message, error)
    else:
        outgoing = dispatcher.handle(message) if interesting else None
    if outgoing is None:
        return None
    reply = b"".join(bytes(buffer) for buffer in outgoing.buffers)
    header = Header.parse(reply)
    if header.msg_size != len(reply):
        raise AssertionError(f"a reply of {len(reply)} bytes says that it has {header.msg_size}")
    return reply
