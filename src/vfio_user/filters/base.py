"""The class :class:`Filter`, and the table of the hooks that it can stand around."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, Final

from vfio_user.filters.settings import Setting
from vfio_user.server.backend import ServerBackend
from vfio_user.wire.constants import Command

Arguments = tuple[Any, ...]
"""What a hook is called with, by position: the server has no other way."""


def _nothing(arguments: Arguments, result: Any) -> int:
    return 0


def _length_of(position: int) -> Callable[[Arguments, Any], int]:
    return lambda arguments, result: len(arguments[position])


@dataclass(frozen=True, slots=True)
class Hook:
    """One row of the table: a hook of :class:`~vfio_user.server.ServerBackend`.

    ``command`` is what the client sent; None: the server asks for itself, and no filter that counts commands or
    breaks them stands around it. ``moved`` gives the bytes of bulk data that a call moved, from its arguments and its
    result. ``view`` is the hook that hands out the same bytes without a copy.
    """

    name: str
    command: Command | None = None
    moved: Callable[[Arguments, Any], int] = _nothing
    view: str | None = None
    on_region: bool = False
    """Whether the first argument is a region."""


_ROWS = (
    Hook("connected"),
    Hook("disconnected"),
    Hook("quiesce"),
    Hook("look_for_work"),
    Hook("migration_flags"),
    Hook("migration_get_state"),
    Hook("region_read", Command.REGION_READ, _length_of(2), "region_view", on_region=True),
    Hook("region_write", Command.REGION_WRITE, _length_of(2), on_region=True),
    Hook("dma_map", Command.DMA_MAP),
    Hook("dma_unmap", Command.DMA_UNMAP),
    Hook("reset", Command.DEVICE_RESET),
    Hook("set_irqs", Command.DEVICE_SET_IRQS),
    Hook("migration_set_state", Command.DEVICE_FEATURE),
    Hook("migration_data_size", Command.DEVICE_FEATURE),
    Hook("migration_read_data", Command.MIG_DATA_READ, lambda arguments, result: result, "migration_view"),
    Hook("migration_write_data", Command.MIG_DATA_WRITE, _length_of(0)),
    Hook("dma_logging_start", Command.DEVICE_FEATURE),
    Hook("dma_logging_stop", Command.DEVICE_FEATURE),
    Hook("dma_logging_report", Command.DEVICE_FEATURE, _length_of(3)),
)

HOOKS: Final[Mapping[str, Hook]] = MappingProxyType({row.name: row for row in _ROWS})
COMMAND_HOOKS: Final[Mapping[str, Hook]] = MappingProxyType({row.name: row for row in _ROWS if row.command})
"""Those that a command of the client leads to."""


class Call:
    """A call of a hook on its way to the wrapped backend: calling this object makes it, and gives its result.

    What it raises is the wrapped backend's refusal, or its bug.
    """

    __slots__ = ("arguments", "hook", "inner")

    def __init__(self, hook: Hook, inner: Callable[..., Any], arguments: Arguments) -> None:
        self.hook = hook
        self.inner = inner
        self.arguments = arguments

    def __call__(self) -> Any:
        return self.inner(*self.arguments)

    @property
    def region(self) -> int | None:
        """The index of the region that is accessed; None for a call that is no access."""
        return int(self.arguments[0]) if self.hook.on_region else None


def live(value: Callable[[Any], Any], doc: str) -> Any:
    """An attribute of a backend that is worked out when it is asked for."""
    return property(value, doc=doc)


class Filter(ServerBackend):
    """A backend around another one that changes nothing, until a subclass says what.

    A subclass overrides :meth:`around`, and :meth:`wants` if that concerns some hooks only; or a hook itself, which
    then reaches the wrapped one as ``self.backend.that_hook(...)``. All other hooks are the wrapped backend's own
    bound methods and cost nothing. Its other attributes are there, too.

    A hook that refuses must do so before it calls the wrapped one, which may have kept the descriptors it was given.

    Raises UsageError for options that make no sense together.
    """

    name: ClassVar[str] = ""
    """What the filter is called on the command line."""
    options: ClassVar[Mapping[str, Setting]] = {}
    """What the constructor takes by keyword, as the command line has it."""

    regions = live(attrgetter("backend.regions"), "The wrapped backend's.")
    irqs = live(attrgetter("backend.irqs"), "The wrapped backend's.")
    resettable = live(attrgetter("backend.resettable"), "The wrapped backend's.")
    spin = live(attrgetter("backend.spin"), "The wrapped backend's.")
    dma = live(attrgetter("backend.dma"), "The wrapped backend's.")

    def __init__(self, backend: ServerBackend) -> None:
        self.backend = backend
        views = {hook.view for hook in HOOKS.values() if hook.view and self._stands_around(hook)}
        for name in (*HOOKS, *_VIEWS):
            # A view that is left out keeps ServerBackend's, which gives none: the bytes come through the filter.
            if name not in views and not _overridden(type(self), name):
                setattr(self, name, self._hook(name))

    def around(self, call: Call) -> Any:
        """Make ``call`` by calling it, return its result, and do the filter's work before or after it."""
        return call()

    def wants(self, hook: Hook) -> bool:
        """Whether :meth:`around` is to see the calls of a hook: by default of those that a command leads to."""
        return hook.command is not None

    def report(self) -> str:
        """What the filter has to say so far, in lines; "" for nothing. May be called at any time, from any thread."""
        return ""

    def _stands_around(self, hook: Hook) -> bool:
        return self.wants(hook) or _overridden(type(self), hook.name)

    def _hook(self, name: str) -> Callable[..., Any]:
        inner: Callable[..., Any] = getattr(self.backend, name)
        hook = HOOKS.get(name)
        if hook is None or not self.wants(hook):
            return inner

        # The server looks at a hook's __func__ to see whether the backend has it.
        @wraps(inner, assigned=("__name__", "__doc__", "__func__"), updated=())
        def filtered(*arguments: Any) -> Any:
            return self.around(Call(hook, inner, arguments))

        return filtered

    def __getattr__(self, name: str) -> Any:
        if name == "backend":  # asked for before it is set, by copy for example
            raise AttributeError(name)
        return getattr(self.backend, name)


_VIEWS = tuple(hook.view for hook in HOOKS.values() if hook.view)


def _overridden(filter_class: type[Filter], name: str) -> bool:
    return getattr(filter_class, name) is not getattr(ServerBackend, name)


def innermost(backend: ServerBackend) -> ServerBackend:
    """The backend inside all filters."""
    while isinstance(backend, Filter):
        backend = backend.backend
    return backend
