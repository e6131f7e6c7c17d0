"""Framing: bytes and file descriptors in, whole messages out.

A :class:`Framer` owns the buffer that a transport receives into (``space``, ``received``), and cuts messages from it
(``next_message``). A message is taken whole, with its file descriptors, before anyone looks inside; what is wrong
with it then costs one error reply, never the stream. Payloads are views of the buffer: nothing is copied.
"""

from __future__ import annotations

from collections import deque

from vfio_user.errors import FramingError
from vfio_user.fds import OwnedFd, close_all
from vfio_user.wire.commands import command_name
from vfio_user.wire.constants import HEADER_SIZE, MAX_MSG_FDS, TYPE_MASK, HeaderFlags
from vfio_user.wire.messages import Header

_HEADER = Header.LAYOUT
_REPLY, _NO_REPLY, _ERROR = int(HeaderFlags.REPLY), int(HeaderFlags.NO_REPLY), int(HeaderFlags.ERROR)

DISCARD_LIMIT = 64 << 20
"""A message that is larger than the buffer, but not larger than this, is skipped and refused; the stream lives."""


class Message:
    """One message as it came: the header's fields, the payload, the file descriptors.

    ``payload`` is a view of the receive buffer and valid until the handler returns. Whoever handles the message
    takes the descriptors that it wants out of ``fds``; :meth:`close` closes the rest. ``fault`` is why the message
    must be refused although its stream is intact (too large, descriptors lost), or None.
    """

    __slots__ = ("command", "error", "fault", "fds", "flags", "msg_id", "payload")

    def __init__(
        self,
        msg_id: int,
        command: int,
        flags: int,
        error: int,
        payload: memoryview,
        fds: list[OwnedFd] | None = None,
        fault: str | None = None,
    ) -> None:
        self.msg_id = msg_id
        self.command = command
        self.flags = flags
        self.error = error
        self.payload = payload
        self.fds = fds if fds is not None else []
        self.fault = fault

    @property
    def is_command(self) -> bool:
        return not self.flags & TYPE_MASK

    @property
    def is_reply(self) -> bool:
        return self.flags & TYPE_MASK == _REPLY

    @property
    def is_error(self) -> bool:
        return bool(self.flags & _ERROR)

    @property
    def wants_reply(self) -> bool:
        return not self.flags & _NO_REPLY

    def close(self) -> None:
        """Close the file descriptors that nobody took."""
        if self.fds:
            close_all(self.fds)
            self.fds.clear()

    def __repr__(self) -> str:
        kind = "reply" if self.is_reply else "command"
        return (
            f"<{command_name(self.command)} {kind} id={self.msg_id} flags={self.flags:#x} "
            f"payload={len(self.payload)} fds={len(self.fds)}>"
        )


class Framer:
    """Cuts a byte stream with file descriptors into messages.

    ``max_size`` is the largest message that is taken whole, header included. Larger ones, up to DISCARD_LIMIT, are
    skipped as they come and handed out with a ``fault``; a size below the header's, or above that limit, cannot be
    framed and raises FramingError: the stream is lost.
    """

    def __init__(self, max_size: int, *, max_fds: int = MAX_MSG_FDS) -> None:
        self.max_size = max_size
        self._max_fds = max_fds
        self._use_buffer(bytearray(max_size))
        self.start = 0
        self.end = 0
        self._base = 0  # position in the stream of the buffer's first byte
        self._fds: deque[tuple[int, list[OwnedFd], str | None]] = deque()
        self._discarding = 0
        self._discarded: Message | None = None
        self._held = 0

    def _use_buffer(self, buffer: bytearray) -> None:
        self.buffer = buffer
        self.view = memoryview(buffer)
        self._whole_space = [self.view]

    @property
    def mid_message(self) -> bool:
        """Whether a part of a message waits for its rest."""
        return self.end > self.start or self._discarding > 0

    @property
    def missing(self) -> int:
        """Bytes that the unfinished message at the front lacks; 0 where that is not known, or it is skipped."""
        have = self.end - self.start
        if have < HEADER_SIZE or self._discarding:
            return 0
        size: int = _HEADER.unpack_from(self.buffer, self.start)[2]
        return max(0, size - have) if size <= self.max_size else 0

    @property
    def has_fds(self) -> bool:
        """Whether descriptors wait for their message: who cuts messages from the buffer itself must not then."""
        return bool(self._fds)

    def space(self) -> list[memoryview]:
        """Where the next bytes go, ready for recvmsg_into. Never empty."""
        if self.start == self.end:
            self._base += self.start
            self.start = self.end = 0
            return self._whole_space
        if self.end + HEADER_SIZE > len(self.buffer) or self._tail_needs_room():
            self._compact()
        return [self.view[self.end :]]

    def _tail_needs_room(self) -> bool:
        if self.end - self.start < HEADER_SIZE:
            return False
        size = _HEADER.unpack_from(self.buffer, self.start)[2]
        return bool(self.start + size > len(self.buffer))

    def _compact(self) -> None:
        """Move the unfinished message to the front."""
        rest = self.end - self.start
        self.view[:rest] = self.view[self.start : self.end]
        self._base += self.start
        self.start, self.end = 0, rest

    def received(self, count: int, fds: list[OwnedFd] | None = None, *, truncated: bool = False) -> None:
        """``count`` bytes were put into :meth:`space`, and ``fds`` came with them.

        Descriptors ride on the first byte of what their sender gave to sendmsg, and one call to recvmsg never
        reads past the bytes that carried some: they belong to the last message that begins in this chunk.
        ``truncated``: the kernel dropped descriptors (MSG_CTRUNC).
        """
        begin = self.end
        self.end += count
        if fds or truncated:
            self._attach(begin, fds or [], truncated)

    def feed(self, data: bytes | bytearray | memoryview, fds: list[OwnedFd] | None = None) -> None:
        """Take ``data`` as if it had been received; at most what :meth:`space` holds, for tests and tools."""
        space = self.space()[0]
        space[: len(data)] = data
        self.received(len(data), fds)

    def _attach(self, begin: int, fds: list[OwnedFd], truncated: bool) -> None:
        position = self._base + self._last_message(begin)
        fault = "file descriptors were lost on the way" if truncated else None
        if self._fds and self._fds[-1][0] == position:
            _, earlier, earlier_fault = self._fds.pop()
            fds, fault = earlier + fds, earlier_fault or fault
        if len(fds) > self._max_fds:
            close_all(fds[self._max_fds :])
            del fds[self._max_fds :]
            fault = f"more than {self._max_fds} file descriptors"
        self._fds.append((position, fds, fault))

    def _last_message(self, begin: int) -> int:
        """Index where the last message that begins at or before the end of the chunk from ``begin`` on starts."""
        position = self.start + self._discarding if self._discarding else self.start
        if position >= self.end:
            return self.start  # all of the chunk belongs to the message that is being skipped
        while self.end - position > HEADER_SIZE:
            size = _HEADER.unpack_from(self.buffer, position)[2]
            if size < HEADER_SIZE or position + size >= self.end:
                break
            position += size
        return position

    def next_message(self) -> Message | None:
        """The next whole message, or None until more bytes have come. Raises FramingError."""
        if self._discarding and not self._discard():
            return None
        if self._discarded is not None:
            message, self._discarded = self._discarded, None
            return message
        start = self.start
        available = self.end - start
        if available < HEADER_SIZE:
            return None
        msg_id, command, size, flags, error = _HEADER.unpack_from(self.buffer, start)
        if size > available:
            return self._unfinished(msg_id, command, size, flags, error)
        if size < HEADER_SIZE:
            raise FramingError(f"a message of {size} bytes is smaller than its header")
        self.start = start + size
        message = Message(msg_id, command, flags, error, self.view[start + HEADER_SIZE : start + size])
        if self._fds:
            self._take_fds(message, self._base + start)
        return message

    def _unfinished(self, msg_id: int, command: int, size: int, flags: int, error: int) -> Message | None:
        if size <= self.max_size:
            return None
        if size > DISCARD_LIMIT:
            raise FramingError(f"a message of {size} bytes, at most {self.max_size} are taken")
        fault = f"a message of {size} bytes, at most {self.max_size} are taken"
        self._discarded = Message(msg_id, command, flags, error, self.view[:0], fault=fault)
        if self._fds:
            self._take_fds(self._discarded, self._base + self.start)
        self._discarding = size
        return self.next_message()

    def _discard(self) -> bool:
        """Drop what has come of a message that is too large. Returns whether it is wholly gone."""
        part = min(self._discarding, self.end - self.start)
        self.start += part
        self._discarding -= part
        while self._fds and self._fds[0][0] < self._base + self.start:
            close_all(self._fds.popleft()[1])
        return not self._discarding

    def _take_fds(self, message: Message, position: int) -> None:
        while self._fds and self._fds[0][0] <= position:
            where, fds, fault = self._fds.popleft()
            if where == position:
                message.fds, message.fault = fds, message.fault or fault
            else:
                close_all(fds)

    def reserve(self, size: int) -> None:
        """Take messages of up to ``size`` bytes from now on."""
        if size > self.max_size:
            self.max_size = size
            self.hold()

    def hold(self) -> None:
        """Keep the payloads handed out so far intact while more is received: move on to a new buffer."""
        rest = self.view[self.start : self.end]
        fresh = bytearray(self.max_size)
        fresh[: len(rest)] = rest
        self._base += self.start
        self.start, self.end = 0, len(rest)
        self._use_buffer(fresh)

    def close(self) -> None:
        """Close every descriptor that no message took with it, and let the buffer go: nothing comes any more."""
        for _, fds, _ in self._fds:
            close_all(fds)
        self._fds.clear()
        if self._discarded is not None:
            self._discarded.close()
            self._discarded = None
        self.start = self.end = 0
        self._use_buffer(bytearray())
