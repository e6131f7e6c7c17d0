"""What the tests of the proxy share: one before a server, and a server that is not as ours."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vfio_user import Client, ServerBackend
from vfio_user.errors import CommandError, ConnectionClosedError
from vfio_user.filters.base import Call, Filter
from vfio_user.testing.served import ServedDevice
from vfio_user.tools.proxy import ProxyBackend
from vfio_user.wire.constants import Command, DeviceState

from .control_support import CONFIG, Bench, bench_of
from .device_support import TIMEOUT


@contextlib.contextmanager
def proxied(path: Path, **options: Any) -> Iterator[Bench]:
    """A proxy for the server at ``path``, with its two sockets."""
    with (
        contextlib.closing(ProxyBackend(path, **{"timeout": TIMEOUT, **options})) as backend,
        bench_of(backend) as bench,
    ):
        yield bench


@contextlib.contextmanager
def bench_before(device: ServerBackend) -> Iterator[Bench]:
    """A proxy for the server of ``device``."""
    with ServedDevice(device) as served, proxied(served.path) as bench:
        yield bench


class Strict(Filter):
    """Takes while it stands what libvfio-user takes then (protocol.md, 8.3)."""

    def wants(self, hook: Any) -> bool:
        return hook.command in (Command.DMA_MAP, Command.DMA_UNMAP, Command.DEVICE_SET_IRQS) or hook.on_region

    def around(self, call: Call) -> Any:
        state = self.backend.migration_get_state()
        refused = (DeviceState.STOP_COPY,) if call.hook.on_region else (DeviceState.STOP, DeviceState.STOP_COPY)
        if state in refused:
            raise OSError(errno.EINVAL, "not while it stands")
        return call()


def lost(client: Client) -> bool:
    """Whether its connection has ended."""
    try:
        client.region_read(CONFIG, 0, 4)
    except CommandError:  # it is on its way out
        return False
    except ConnectionClosedError:
        return True
    return False
