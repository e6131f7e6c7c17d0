"""ServerBackend's defaults refuse cleanly, and what an exception becomes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from tests.support import RawPeer, access, assert_quiet, dma_map, serving
from vfio_user import Irq, Region, ServerBackend
from vfio_user.errors import ConnectionClosedError, MessageError, TransitionError
from vfio_user.server.dispatch import errno_of
from vfio_user.wire.constants import DeviceState

DEFAULTS: dict[str, Callable[[ServerBackend], object]] = {
    "region_read": lambda b: b.region_read(0, 0, memoryview(bytearray(4))),
    "region_write": lambda b: b.region_write(0, 0, memoryview(b"data")),
    "dma_map": lambda b: b.dma_map(3, 0, 0, 4096, None),
    "dma_unmap": lambda b: b.dma_unmap(0, 0, 4096),
    "reset": lambda b: b.reset(),
    "set_irqs": lambda b: b.set_irqs(0, 33, 0, 1, ()),
    "migration_flags": lambda b: b.migration_flags(),
    "migration_get_state": lambda b: b.migration_get_state(),
    "migration_set_state": lambda b: b.migration_set_state(DeviceState.STOP),
    "migration_read_data": lambda b: b.migration_read_data(memoryview(bytearray(4))),
    "migration_write_data": lambda b: b.migration_write_data(memoryview(b"data")),
    "migration_data_size": lambda b: b.migration_data_size(),
    "dma_logging_start": lambda b: b.dma_logging_start(4096, ()),
    "dma_logging_stop": lambda b: b.dma_logging_stop(),
    "dma_logging_report": lambda b: b.dma_logging_report(0, 4096, 4096, memoryview(bytearray(8))),
}


@pytest.mark.parametrize("hook", DEFAULTS)
def test_a_default_refuses(hook: str) -> None:
    with pytest.raises(OSError, match="ServerBackend has no") as caught:
        DEFAULTS[hook](ServerBackend())
    assert caught.value.errno == errno.EINVAL


def test_there_is_a_default_for_every_hook() -> None:
    others = {"connected", "disconnected", "quiesce", "look_for_work", "region_view", "migration_view"}
    hooks = {name for name, value in vars(ServerBackend).items() if callable(value) and not name.startswith("_")}
    assert hooks == set(DEFAULTS) | others
    assert ServerBackend().quiesce() is None
    assert ServerBackend().region_view(0, 0, 4) is None
    assert ServerBackend().migration_view(4) is None


class Empty(ServerBackend):
    """Has a region and an interrupt, and not one hook."""

    regions = (Region(0x100),)
    irqs = (Irq(1),)


def test_a_device_without_any_hook(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Empty()) as served:
        peer: RawPeer = served.client()
        assert peer.ok(4, struct.pack("<4I", 16, 0, 0, 0)) == struct.pack("<4I", 16, 2, 1, 1)
        refused = {
            2: dma_map(0, 0x1000),
            8: struct.pack("<5I", 20, 33, 0, 0, 1),
            9: access(0, 0, 4),
            10: access(0, 0, 4) + b"data",
            13: b"",
            16: struct.pack("<II", 16, 1 | 1 << 16),
            17: struct.pack("<II", 16, 8),
            18: struct.pack("<II", 16, 8) + bytes(8),
        }
        for command, payload in refused.items():
            assert peer.refused(command, payload) == errno.EINVAL
        peer.check_alive()
    assert_quiet(caplog)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENODEV, "x"), errno.ENODEV),
        (OSError(0xBEEF, "x"), 0xBEEF),
        (OSError(0xFFFFFFFF, "x"), 0xFFFFFFFF),
        (OSError(0, "x"), errno.EIO),
        (OSError(-5, "x"), errno.EIO),
        (OSError(1 << 32, "x"), errno.EIO),
        (OSError("no errno"), errno.EIO),
        (TimeoutError(), errno.ETIMEDOUT),
        (PermissionError(errno.EPERM, "x"), errno.EPERM),
        (ConnectionClosedError("gone"), errno.EIO),
        (MessageError("x", errno.ENOENT), errno.ENOENT),
        (TransitionError("x", errno.EBUSY), errno.EBUSY),
        (ValueError(5), errno.EIO),
        (KeyError("x"), errno.EIO),
    ],
)
def test_errno_of(error: Exception, number: int) -> None:
    assert errno_of(error) == number
