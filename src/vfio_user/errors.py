"""Everything that this package raises on purpose.

::

    VfioUserError
    ├── ProtocolError                  the peer broke a rule of the protocol
    │   ├── FramingError               a header that cannot be framed: the stream ends here
    │   ├── MessageError               a well-framed message with wrong contents
    │   ├── NegotiationError           the versions or the capabilities do not fit
    │   └── UnexpectedReplyError       a reply that answers nothing that was asked
    ├── CommandError (OSError)         the peer refused a command; ``errno`` is the reply's
    ├── CallTimeoutError (TimeoutError)    a call was not answered in time
    ├── ConnectionClosedError (ConnectionError)    the peer is gone
    ├── UsageError (ValueError)        the caller asked for something that cannot be sent
    ├── DeclarationError (ValueError)  a device class declares what cannot be carried out
    └── MigrationError                 device state cannot be saved, moved or restored
        ├── TransitionError (OSError)  no path leads from one device state to the other
        ├── UnrecoverableError (OSError)   an arc that failed and left the device in no known state
        └── StreamError (OSError)      a migration data stream that must not be loaded

A device says why it refuses by raising ``OSError(errno.X)``: that errno goes into the reply. Anything else that
a device raises is a bug of the device: it is logged with its traceback, the peer gets EIO and the connection lives.
"""

from __future__ import annotations

import errno
import os


class VfioUserError(Exception):
    """The root of everything that this package raises on purpose."""

    def __str__(self) -> str:
        """The reason alone, where OSError would put its number in front."""
        return str(getattr(self, "strerror", None) or super().__str__())


def reason_of(error: BaseException) -> str:
    """Why, in one line: what the operating system refused names the file that it was about."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, VfioUserError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class ProtocolError(VfioUserError):
    """The peer broke a rule of the protocol.

    ``errno`` is what a reply to the offending command carries.
    """

    def __init__(self, message: str, error: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = error


class FramingError(ProtocolError):
    """A header whose size cannot be framed: where the next message begins is unknown."""


class MessageError(ProtocolError):
    """A message that was framed, but whose contents break a rule."""


class NegotiationError(ProtocolError):
    """Version or capabilities of the two sides do not fit, or are malformed."""


class UnexpectedReplyError(ProtocolError):
    """A reply that does not belong to the command that awaits one."""


class CommandError(VfioUserError, OSError):
    """The peer refused a command.

    ``errno`` is the reply's; a reply that carries none, or one that is no errno, reads as EINVAL.
    """

    def __init__(self, error: int, command: str) -> None:
        super().__init__(error, f"{command} refused: {os.strerror(error)}")
        self.command = command


class CallTimeoutError(VfioUserError, TimeoutError):
    """A call was not answered within its timeout.

    An answer that comes later is dropped, and the connection lives; it is closed where a message was sent in part.
    """


class ConnectionClosedError(VfioUserError, ConnectionError):
    """The peer closed the connection, or this side did."""


class UsageError(VfioUserError, ValueError):
    """What the caller asked for cannot be sent: a count, an offset or a number of fds out of range."""


class DeclarationError(VfioUserError, ValueError):
    """A device class declares what cannot be carried out; the message says which, what and the remedy."""


class MigrationError(VfioUserError):
    """Device state cannot be saved, moved or restored."""


class TransitionError(MigrationError, OSError):
    """No path leads from one device state to another, or the device failed on the way."""

    def __init__(self, message: str, error: int = errno.EINVAL) -> None:
        super().__init__(error, message)


class UnrecoverableError(MigrationError, OSError):
    """Raised by a device on an arc that failed and from which no good state can be restored: ERROR follows."""

    def __init__(self, message: str, error: int = errno.EIO) -> None:
        super().__init__(error, message)


class StreamError(MigrationError, OSError):
    """A migration data stream that is damaged, incomplete, too long or for another device."""

    def __init__(self, message: str, error: int = errno.EINVAL) -> None:
        super().__init__(error, message)
