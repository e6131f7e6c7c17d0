"""Message in, reply out: which handler serves a command, and what an error becomes. No socket."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from vfio_user.errors import NegotiationError, ProtocolError, VfioUserError
from vfio_user.protocol import Connection, Message, Outgoing
from vfio_user.server import access, dma, info, irqs, migration
from vfio_user.server.backend import Quiescing, ServerBackend
from vfio_user.server.context import AccessGate, Context, Limits, Reply
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities, negotiate, pack_answer, parse_capabilities
from vfio_user.wire.commands import COMMANDS, CommandSpec, Role, command_name
from vfio_user.wire.constants import (
    DEFAULT_DATA_XFER_SIZE,
    HEADER_SIZE,
    VERSION_MAJOR,
    VERSION_MINOR,
    Command,
    ControlCommand,
)

logger = logging.getLogger("vfio_user.server")

Handler = Callable[[Context, Message], Reply]


def _reset(context: Context, message: Message) -> Reply:
    if not context.backend.resettable:
        raise ProtocolError("the device cannot be reset")
    try:
        context.backend.reset()
    finally:
        context.refresh_access()
    return Reply()


HANDLERS: Mapping[int, Handler] = MappingProxyType(
    {
        Command.DMA_MAP: dma.dma_map,
        Command.DMA_UNMAP: dma.dma_unmap,
        Command.DEVICE_GET_INFO: info.get_info,
        Command.DEVICE_GET_REGION_INFO: info.get_region_info,
        Command.DEVICE_GET_REGION_IO_FDS: info.get_region_io_fds,
        Command.DEVICE_GET_IRQ_INFO: info.get_irq_info,
        Command.DEVICE_SET_IRQS: irqs.set_irqs,
        Command.REGION_READ: access.region_read,
        Command.REGION_WRITE: access.region_write,
        Command.DEVICE_RESET: _reset,
        Command.REGION_WRITE_MULTI: access.region_write_multi,
        Command.DEVICE_FEATURE: migration.device_feature,
        Command.MIG_DATA_READ: migration.mig_data_read,
        Command.MIG_DATA_WRITE: migration.mig_data_write,
    }
)

DUMMY_HANDLERS: Mapping[int, Handler] = MappingProxyType(
    {
        Command.REGION_READ: access.dummy_read,
        Command.REGION_WRITE: access.dummy_write,
        Command.REGION_WRITE_MULTI: access.dummy_write_multi,
    }
)
"""Accesses to BARs of a device that stands still and is not to be touched."""

_VERSION, _DEVICE_FEATURE = int(Command.VERSION), int(Command.DEVICE_FEATURE)


def errno_of(error: Exception) -> int:
    """The errno that a reply carries for what a handler or a hook raised: EIO for what is no refusal."""
    number = getattr(error, "errno", None) if isinstance(error, (OSError, VfioUserError)) else None
    if isinstance(number, int) and 0 < number <= 0xFFFFFFFF:
        return number
    if isinstance(error, TimeoutError):
        return errno.ETIMEDOUT
    return errno.EIO


class Dispatcher:
    """Answers the commands of one client.

    ``offer_twin``, if given, makes a twin socket and returns the number of the client's end. After a message that
    ends the connection (failed negotiation, anything before VERSION) ``closing`` is true. ``commands`` and ``handlers``
    are another socket's than a VMM's.
    """

    def __init__(
        self,
        backend: ServerBackend,
        limits: Limits | None = None,
        *,
        offer_twin: Callable[[], int] | None = None,
        gate: AccessGate | None = None,
        commands: Mapping[int, CommandSpec] = COMMANDS,
        handlers: Mapping[int, Handler] = HANDLERS,
    ) -> None:
        limits = limits or Limits()
        # A limit for data below the default is none for other messages, which are bounded by what they contain.
        largest = max(limits.data_xfer_size, DEFAULT_DATA_XFER_SIZE)
        self.connection = Connection(Role.SERVER, HEADER_SIZE + m.RegionAccess.LAYOUT.size + largest, commands)
        self.context = Context(backend, limits, gate=gate or AccessGate())
        self.closing = False
        self._handlers = handlers
        self._offer_twin = offer_twin

    def quiesce(self, message: Message) -> Quiescing | None:
        """Have DMA stopped if ``message`` is a command that needs it. None: it can be handled now."""
        row = self.connection.commands[message.command]
        if row.quiesces or (message.command == _DEVICE_FEATURE and migration.quiesces(message)):
            return self.context.backend.quiesce()
        return None

    def handle(self, message: Message, handlers: Mapping[int, Handler] | None = None) -> Outgoing | None:
        """Serve a command that :meth:`Connection.check` let pass, by other ``handlers`` if given. Never raises.

        None where no reply is wanted.
        """
        try:
            if message.command == _VERSION:
                return self._version(message)
            reply = (handlers or self._handlers)[message.command](self.context, message)
        except Exception as error:
            return self.refuse(message, error)
        finally:
            message.close()
        return self.connection.reply(message, *reply) if message.wants_reply else None

    def refuse(self, message: Message, error: Exception) -> Outgoing | None:
        """The error reply for ``error``, which a peer's breach, a refusing hook or a bug in one raised."""
        message.close()
        number = errno_of(error)
        if isinstance(error, (OSError, VfioUserError)):
            logger.debug("%s refused: %s", command_name(message.command), error)
        else:
            logger.error("%s failed in the device", command_name(message.command), exc_info=error)
        if isinstance(error, NegotiationError) or not self.connection.negotiated:
            self.closing = True
            logger.warning("negotiation failed: %s", error)
        elif not message.wants_reply:
            return None
        return self.connection.error_reply(message, number)

    def _version(self, message: Message) -> Outgoing:
        """VERSION: NO_REPLY does not count here, and any failure ends the connection."""
        request = m.Version.parse(message.payload)
        text = bytes(message.payload[m.Version.LAYOUT.size :])
        if request.major != VERSION_MAJOR:
            raise NegotiationError(f"version {request.major}.{request.minor}: {VERSION_MAJOR}.x is served")
        proposed = parse_capabilities(text)
        limits = self.context.limits
        answer = negotiate(
            proposed,
            len(text),
            max_data_xfer_size=limits.data_xfer_size,
            max_dma_maps=limits.dma_maps,
            twin_socket=self._offer_twin is not None,
            control=ControlCommand.CONTROL_PUSH in self.connection.commands,
        )
        fds = [self._offer_twin()] if self._offer_twin and answer and answer.wants_twin_socket else []
        self.context.client = proposed or Capabilities()
        self.connection.negotiated = True
        version = m.Version(VERSION_MAJOR, min(request.minor, VERSION_MINOR)).pack()
        return self.connection.reply(message, (version, pack_answer(answer, len(text))), fds)

    def client_left(self) -> None:
        """Forget what the client brought: its interrupts and its memory. The device's state stays.

        Every hook is called, whatever the others raise.
        """
        context = self.context
        steps = [partial(irqs.disable, context, index) for index in sorted(context.irqs_in_use)]
        steps += [partial(dma.unmap, context, address, size) for address, size, _ in context.maps]
        for step in steps:
            try:
                step()
            except Exception as error:
                logger.log(
                    logging.DEBUG if isinstance(error, OSError) else logging.ERROR,
                    "after the client left: %s",
                    error,
                    exc_info=error,
                )
        self.connection.close()
