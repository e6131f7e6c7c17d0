"""What the tests of live migration share: clients that tell which call comes, so that anything can happen there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from vfio_user import Client
from vfio_user.testing.simulator import GuestSimulator

Happening = Callable[[str, int, str, tuple[Any, ...]], tuple[Any, ...] | None]
"""Called with the side ("source", "destination"), the device's number, the client's method and its arguments.

What it returns takes the place of these, if it is not None.
"""


class Watched:
    """A client whose every call is told of before it is made, and again when it has been answered."""

    def __init__(self, client: Client, side: str, number: int, before: Happening, after: Happening) -> None:
        self._client, self._side, self._number = client, side, number
        self._before, self._after = before, after

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute) or name == "close":
            return attribute

        @functools.wraps(attribute)
        def call(*arguments: Any) -> Any:
            arguments = self._before(self._side, self._number, name, arguments) or arguments
            result = attribute(*arguments)
            self._after(self._side, self._number, name, arguments)
            return result

        return call


def nothing_happens(side: str, number: int, name: str, arguments: tuple[Any, ...]) -> None:
    pass


def watch(guest: GuestSimulator, before: Happening = nothing_happens, after: Happening = nothing_happens) -> None:
    """Have the calls of all clients of a guest told of; those of the simulator itself, too."""
    for side, host in (("source", guest.here), ("destination", guest.there)):
        host.clients[:] = [
            cast(Client, Watched(client, side, number, before, after)) for number, client in enumerate(host.clients)
        ]
