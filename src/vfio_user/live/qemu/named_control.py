"""Control sockets whose errors say whose they are: several devices have two servers each."""

from __future__ import annotations

from errno import EINVAL
from typing import TypeVar

from vfio_user.client.control import ControlClient
from vfio_user.client.core import Call
from vfio_user.errors import CallTimeoutError, CommandError, ConnectionClosedError, ProtocolError

T = TypeVar("T")


class NamedControl(ControlClient):
    """A connection to a control socket. ``name`` is what errors call it, as soon as it is set."""

    name = ""

    def _run(self, call: Call[T], timeout: float | None = None) -> T:
        if not self.name:
            return super()._run(call, timeout)
        try:
            return super()._run(call, timeout)
        except CommandError as error:
            raise CommandError(error.errno or EINVAL, f"{self.name}: {error.command}") from error
        except (ProtocolError, CallTimeoutError, ConnectionClosedError) as error:
            raise type(error)(f"{self.name}: {error}") from error
