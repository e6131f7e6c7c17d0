"""Fuzz the client's reading of replies without sockets: any bytes end in a result or in a documented error.

The first byte chooses the call, the second the pieces that the rest, what the server sends, comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vfio_user.client.core import Call, ClientCore
from vfio_user.errors import VfioUserError
from vfio_user.protocol import Message

CALLS: tuple[Callable[[ClientCore], Call[Any]], ...] = (
    ClientCore.negotiate,
    ClientCore.discover,
    lambda core: core.get_region_info(0),
    lambda core: core.region_io_fds(0),
    lambda core: core.region_read_into(0, 0, memoryview(bytearray(8))),
    lambda core: core.region_write(0, 0, memoryview(b"12345678"), False),
    lambda core: core.region_write_multi([(0, 0, b"1234")]),
    lambda core: core.dma_unmap(0, 1 << 20, 4096),
    ClientCore.migration_flags,
    ClientCore.migration_get_state,
    lambda core: core.migration_read_data_into(memoryview(bytearray(64))),
    lambda core: core.dma_logging_start(4096, [(0, 4096)]),
    lambda core: core.dma_logging_report(0, 1 << 20, 4096),
)


def run(data: bytes) -> str:
    """Make a call and let ``data`` answer it: what became of it."""
    choice, piece, rest = data[0] if data else 0, data[1] + 1 if len(data) > 1 else 1, data[2:]
    core = ClientCore()
    call = CALLS[choice % len(CALLS)](core)
    try:
        requests = next(call)
        while True:
            for request in requests:
                core.connection.command(request.command, request.parts)
            message, rest = _next_reply(core, rest, piece)
            if message is None:
                return "more was needed"
            core.accept(message)
            requests = call.send([message])
    except StopIteration:
        return "done"
    except VfioUserError as error:
        return type(error).__name__
    finally:
        core.close()


def _next_reply(core: ClientCore, rest: bytes, piece: int) -> tuple[Message | None, bytes]:
    framer = core.connection.framer
    while True:
        while (message := framer.next_message()) is not None:
            if message.is_reply and core.connection.check(message):
                return message, rest
            if not message.is_reply:
                core.answer_command(message, core.connection)
        if not rest:
            return None, rest
        framer.feed(rest[:piece])
        rest = rest[piece:]
