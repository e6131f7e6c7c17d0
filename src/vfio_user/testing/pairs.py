"""Both roles of the protocol, connected without sockets."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType

from vfio_user.fds import OwnedFd, close_all
from vfio_user.protocol import Connection, Message, Outgoing
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import DEFAULT_DATA_XFER_SIZE, HEADER_SIZE
from vfio_user.wire.messages import Buffer

MAX_SIZE = DEFAULT_DATA_XFER_SIZE + 2 * HEADER_SIZE
"""The largest message, header included, unless something else is asked for."""


class End:
    """One of two ends: what it sends, the other receives. Descriptors travel as duplicates, as over a socket.

    ``connection`` is the protocol state of this end. ``piece``: most bytes that the other end's framer is given at
    once; None: each message whole. A context manager; :meth:`close` closes the descriptors that nobody took.
    """

    def __init__(self, role: Role, max_size: int = MAX_SIZE, piece: int | None = None) -> None:
        self.connection = Connection(role, max_size)
        self._piece = piece
        self._peer = self
        self._incoming: deque[tuple[memoryview, list[OwnedFd]]] = deque()

    def _connect(self, peer: End) -> None:
        self._peer, peer._peer = peer, self

    def send(self, outgoing: Outgoing) -> None:
        """Send a message as it was composed. Raises OSError(EBADF) for a descriptor that is none."""
        fds = [OwnedFd.duplicate(fd) for fd in outgoing.fds]
        self._peer._incoming.append((memoryview(b"".join(outgoing.buffers)), fds))

    def command(
        self, command: int, parts: Sequence[Buffer] = (), fds: Sequence[int] = (), *, posted: bool = False
    ) -> int:
        """Send a command, return its id. Unless ``posted``, its reply is awaited."""
        msg_id, outgoing = self.connection.command(command, parts, fds, posted=posted)
        self.send(outgoing)
        return msg_id

    def reply(self, request: Message, parts: Sequence[Buffer] = (), fds: Sequence[int] = ()) -> None:
        """Answer a command."""
        self.send(self.connection.reply(request, parts, fds))

    def refuse(self, request: Message, error: int) -> None:
        """Answer a command with an errno."""
        self.send(self.connection.error_reply(request, error))

    def receive(self) -> Message | None:
        """The next message, unchecked; None when there is no whole one. Its payload is valid until the next call.

        Raises FramingError where the stream cannot be framed.
        """
        framer = self.connection.framer
        while (message := framer.next_message()) is None and self._incoming:
            data, fds = self._incoming.popleft()
            room = min(len(framer.space()[0]), self._piece or len(data))
            framer.feed(data[:room], fds)
            if data[room:]:
                self._incoming.appendleft((data[room:], []))
        return message

    def receive_checked(self) -> Message:
        """The next message that this end has to look at.

        Raises ProtocolError for one that the other end may not send now, LookupError when there is none.
        """
        while (message := self.receive()) is not None:
            if self.connection.check(message):
                return message
            message.close()
        raise LookupError("no message has come")

    def close(self) -> None:
        for _, fds in self._incoming:
            close_all(fds)
        self._incoming.clear()
        self.connection.close()

    def __enter__(self) -> End:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def paired(*, max_size: int = MAX_SIZE, negotiated: bool = True, piece: int | None = None) -> tuple[End, End]:
    """A client's end and a server's. ``negotiated``: as if VERSION was exchanged already."""
    client, server = End(Role.CLIENT, max_size, piece), End(Role.SERVER, max_size, piece)
    client._connect(server)
    for end in (client, server):
        end.connection.negotiated = negotiated
    return client, server
