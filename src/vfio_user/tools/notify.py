"""Tells a service manager how a service is, as sd_notify(3) says."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

logger = logging.getLogger("vfio_user.tools")

READY, STOPPING = "READY=1", "STOPPING=1"
PATIENCE = 1.0
"""Seconds that a service manager has to make room for a message."""
_VARIABLE = "NOTIFY_SOCKET"


class Notifier:
    """Sends states to the datagram socket at ``address``, a path or ``@`` and an abstract name; without one, nowhere.

    A service does not end because nobody hears how it is: what cannot be told is logged, and that is all.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address

    @classmethod
    def of_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Notifier:
        """For the socket that NOTIFY_SOCKET names, which is taken away: what is run from here is not the service."""
        return cls(environ.pop(_VARIABLE, None))

    def __call__(self, *states: str) -> None:
        """Send ``states``, such as :data:`READY` and ``"STATUS=..."``, at once."""
        if not self._address:
            return
        try:
            self._send("\n".join(" ".join(state.splitlines()) for state in states).encode(errors="replace"))
        except (OSError, ValueError) as error:  # ValueError: an address that is none, with a zero in it
            logger.warning("%s=%s: %s could not be told: %s", _VARIABLE, self._address, states[0], error)

    def _send(self, message: bytes) -> None:
        assert self._address is not None
        if self._address[0] not in "/@":
            raise OSError("neither a path nor @ and a name")
        address = self._address.replace("@", "\0", 1) if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            sock.sendto(message, address)
