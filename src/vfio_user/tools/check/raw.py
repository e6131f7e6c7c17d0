"""A connection that says what no honest peer would: any bytes, any descriptors, read message by message."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from types import TracebackType

from vfio_user.fds import OwnedFd, close_all
from vfio_user.transport.ancillary import ANCILLARY_SIZE, pack_fds, skip_sent, take_fds
from vfio_user.wire.commands import command_name
from vfio_user.wire.constants import HEADER_SIZE, HeaderFlags
from vfio_user.wire.messages import Header

MAX_MESSAGE = 64 << 20
"""Bytes of a message that is read; nothing that is asked for here has an answer as long as that."""
SHOWN_BYTES = 64
SHOWN_MESSAGES = 8


class NoMessageError(Exception):
    """No message came. ``code``: "silent" (in time), "closed" (the stream ended) or "garbled" (no frame)."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Received:
    """A message as it came. Its descriptors are closed with the connection, or by whoever takes them."""

    __slots__ = ("fds", "header", "payload")

    def __init__(self, header: Header, payload: bytes, fds: list[OwnedFd]) -> None:
        self.header = header
        self.payload = payload
        self.fds = fds

    @property
    def is_error(self) -> bool:
        return bool(self.header.flags & HeaderFlags.ERROR)

    def __str__(self) -> str:
        return describe(self.header, self.payload, len(self.fds))


def describe(header: Header, payload: bytes, fds: int) -> str:
    """A message in one line."""
    kind = "reply" if header.flags & HeaderFlags.REPLY else "command"
    name = errno.errorcode.get(header.error_no, str(header.error_no))
    error = f" errno {name}" if header.flags & HeaderFlags.ERROR else ""
    shown = payload[:SHOWN_BYTES].hex() + ("..." if len(payload) > SHOWN_BYTES else "")
    return (
        f"{command_name(header.command)} {kind} id={header.msg_id} size={header.msg_size} flags={header.flags:#x}"
        f"{error}{f' fds={fds}' if fds else ''}{f' payload={shown}' if shown else ''}"
    )


class Transcript:
    """What was sent and what came, the first messages of each in full."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {"sent": [], "came": []}
        self._counts = {"sent": 0, "came": 0}

    def note(self, direction: str, line: object) -> None:
        """``direction``: "sent" or "came"."""
        self._counts[direction] += 1
        if self._counts[direction] <= SHOWN_MESSAGES:
            self._lines[direction].append(str(line))

    def lines(self, direction: str) -> tuple[str, ...]:
        more = self._counts[direction] - SHOWN_MESSAGES
        return (*self._lines[direction], *([f"and {more} more"] if more > 0 else []))


class RawConnection:
    """The checker's end of a connection. Owns the socket and every descriptor that came; a context manager.

    ``timeout``: seconds for each message to come, and for each to be taken.
    """

    def __init__(self, sock: socket.socket, timeout: float, transcript: Transcript | None = None) -> None:
        sock.settimeout(timeout)
        self.socket = sock
        self.timeout = timeout
        self.transcript = transcript or Transcript()
        self._next_id = 0x100
        self._kept: list[OwnedFd] = []

    @classmethod
    def connect(cls, path: str, timeout: float, transcript: Transcript | None = None) -> RawConnection:
        """Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout, transcript)

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        close_all(self._kept)
        self._kept.clear()

    # Sending

    def next_id(self) -> int:
        msg_id = self._next_id
        self._next_id = self._next_id % 0xFFFF + 1
        return msg_id

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, the descriptors with the first of them. Raises NoMessageError when the peer is gone."""
        self.transcript.note("sent", _describe_bytes(data, len(fds)))
        rest = [memoryview(data)]
        try:
            sent = self.socket.sendmsg(rest, pack_fds(fds), socket.MSG_NOSIGNAL)
            while rest := skip_sent(rest, sent):
                sent = self.socket.sendmsg(rest, (), socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise NoMessageError("silent", f"{len(data)} bytes were not taken in {self.timeout:g} s") from None
        except OSError as error:
            raise NoMessageError("closed", f"closed while a message was sent ({error.strerror})") from None

    def post(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0, msg_id: int | None = None
    ) -> int:
        """Send a command; its id."""
        number = self.next_id() if msg_id is None else msg_id
        self.send(pack(number, command, payload, flags), fds)
        return number

    # Receiving

    def read(self) -> Received:
        """The next message. Raises NoMessageError."""
        deadline = time.monotonic() + self.timeout
        fds: list[OwnedFd] = []
        try:
            header = Header.parse(self._exactly(HEADER_SIZE, fds, deadline))
            size = header.msg_size - HEADER_SIZE
            if not 0 <= size <= MAX_MESSAGE:
                raise NoMessageError("garbled", f"a message of {header.msg_size} bytes is announced")
            message = Received(header, self._exactly(size, fds, deadline), fds)
        except NoMessageError as error:
            self.transcript.note("came", error)
            raise
        finally:
            self._kept += fds
        self.transcript.note("came", message)
        return message

    def _exactly(self, count: int, fds: list[OwnedFd], deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part, ancillary, _, _ = self.socket.recvmsg(
                    min(count - len(data), 1 << 20), ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                text = f"nothing more in {self.timeout:g} s" if data else f"nothing in {self.timeout:g} s"
                raise NoMessageError("silent", text) from None
            except OSError:
                part, ancillary = b"", []
            finally:
                self.socket.settimeout(self.timeout)
            fds += take_fds(ancillary)
            if not part:
                raise NoMessageError("closed", "closed in mid-message" if data else "closed")
            data += part
        return bytes(data)

    def at_end(self) -> bool:
        """Whether the peer closes without another word, in time."""
        try:
            self.read()
        except NoMessageError as error:
            return error.code == "closed"
        return False


def pack(msg_id: int, command: int, payload: bytes = b"", flags: int = 0, error: int = 0) -> bytes:
    """A whole message."""
    return Header(msg_id, command, HEADER_SIZE + len(payload), flags, error).pack() + payload


def _describe_bytes(data: bytes, fds: int) -> str:
    if len(data) < HEADER_SIZE:
        return f"{len(data)} bytes: {data.hex()}"
    header = Header.parse(data)
    whole = describe(header, data[HEADER_SIZE : max(HEADER_SIZE, header.msg_size)], fds)
    return whole if len(data) == header.msg_size else f"{whole} ({len(data)} bytes in all)"
