"""SET_IRQS: every rule of struct vfio_irq_set, checked before the backend hears of it."""

from __future__ import annotations

from collections.abc import Iterator

from vfio_user.errors import MessageError
from vfio_user.fds import is_eventfd
from vfio_user.protocol import Message
from vfio_user.server.context import Context, Reply, check_argsz
from vfio_user.wire import messages as m
from vfio_user.wire.constants import IRQ_ACTION_MASK, IRQ_DATA_MASK, IrqSetFlags, PciIrq

_DATA = (IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD)
_ACTIONS = (IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, IrqSetFlags.ACTION_TRIGGER)
_ERROR_INDEXES = (PciIrq.ERR, PciIrq.REQ)


def set_irqs(context: Context, message: Message) -> Reply:
    request = m.IrqSet.parse(message.payload)
    tail = message.payload[m.IrqSet.LAYOUT.size :]
    data = request.flags & IRQ_DATA_MASK
    action = request.flags & IRQ_ACTION_MASK
    check_argsz(request.argsz, m.IrqSet.LAYOUT.size)
    if request.flags & ~(IRQ_DATA_MASK | IRQ_ACTION_MASK) or data not in _DATA or action not in _ACTIONS:
        raise MessageError(f"SET_IRQS flags {request.flags:#x}: one DATA, one ACTION and nothing else")
    _check_vectors(context, request, data, action)
    _check_fds(message, request, data)
    backend = context.backend
    if data == IrqSetFlags.DATA_BOOL:
        if len(tail) != request.count:
            raise MessageError(f"{request.count} booleans announced, {len(tail)} came")
        flags = IrqSetFlags.DATA_NONE | action
        for first, count in _runs(tail):
            backend.set_irqs(request.index, flags, request.start + first, count, ())
        return Reply()
    fds, message.fds = message.fds, []
    try:
        backend.set_irqs(request.index, request.flags, request.start, request.count, fds)
    except BaseException:
        message.fds = fds
        raise
    if fds:
        context.irqs_in_use.add(request.index)
    return Reply()


def _check_vectors(context: Context, request: m.IrqSet, data: int, action: int) -> None:
    """The range exists, and where it is empty it means the whole index."""
    irq = context.irq(request.index)
    if request.start >= irq.count or request.count > irq.count - request.start:
        raise MessageError(f"vectors {request.start}+{request.count} of index {request.index}: it has {irq.count}")
    if request.index in _ERROR_INDEXES and (action != IrqSetFlags.ACTION_TRIGGER or request.count > 1):
        raise MessageError(f"index {request.index} takes ACTION_TRIGGER for its one interrupt")
    disables = data == IrqSetFlags.DATA_NONE and action == IrqSetFlags.ACTION_TRIGGER
    if request.count == 0 and (request.start or not disables):
        raise MessageError("a count of 0 goes with a start of 0, DATA_NONE and ACTION_TRIGGER")


def _check_fds(message: Message, request: m.IrqSet, data: int) -> None:
    if not message.fds:
        return
    if data != IrqSetFlags.DATA_EVENTFD:
        raise MessageError("file descriptors go with DATA_EVENTFD")
    if len(message.fds) != request.count:
        raise MessageError(f"{request.count} vectors, {len(message.fds)} file descriptors")
    if not all(is_eventfd(fd.fileno()) for fd in message.fds):
        raise MessageError("a file descriptor of SET_IRQS is no eventfd")


def _runs(booleans: memoryview) -> Iterator[tuple[int, int]]:
    """Runs of true bytes, (first, count) each."""
    first = None
    for position, value in enumerate(booleans):
        if value and first is None:
            first = position
        elif not value and first is not None:
            yield first, position - first
            first = None
    if first is not None:
        yield first, len(booleans) - first


def disable(context: Context, index: int) -> None:
    """Take away the eventfds of a client that left."""
    context.backend.set_irqs(index, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0, ())
