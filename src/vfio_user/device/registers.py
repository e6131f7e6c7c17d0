"""Registers of BARs, declared in the body of a device class.

::

    class Timer(Device):
        bars = {0: Bar(0x1000)}
        control = register(0x00, writable=0x3)
        status = register(0x04, w1c=0x1)
        ticks = register(0x08, width=8)

        @control.on_write
        def start(self, old, new): ...

        @ticks.on_read
        def now(self): ...

To the device's code they are attributes, of type int: ``self.status |= 1``. They are reset and migrated like state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from vfio_user.errors import DeclarationError
from vfio_user.pci import Bar, MsixCapability, Register, RegisterFile

if TYPE_CHECKING:
    from vfio_user.device.device import Device

Hook = TypeVar("Hook", bound=Callable[..., Any])

_HOOK_OF = "_hook_of_register"
"""Attribute of a method that was decorated: the register."""

DOORBELL_WIDTHS = (1, 2, 4, 8)
"""Bytes that one access has."""


@dataclass(eq=False)
class BarRegister:
    """What :func:`register` declares: a descriptor whose value is the register's in that device."""

    bar: int
    doorbell: bool
    declared: dict[str, int]
    """Arguments of :class:`~vfio_user.pci.Register`; what they are worth is seen when the class is complete."""
    name: str = ""
    _owner: str = ""
    _read: Callable[..., Any] | None = None
    _written: Callable[..., Any] | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self._owner = name, owner.__name__

    @overload
    def __get__(self, device: None, owner: type) -> Self: ...
    @overload
    def __get__(self, device: Device, owner: type) -> int: ...
    def __get__(self, device: Device | None, owner: type) -> Self | int:
        return self if device is None else device.registers[self.bar].get(self.name)

    def __set__(self, device: Device, value: int) -> None:
        device.registers[self.bar].set(self.name, value)

    def on_read(self, method: Hook) -> Hook:
        """Decorator of the method that gives what a read shows, in place of the stored value."""
        self._read = self._hook(self._read, method)
        return method

    def on_write(self, method: Hook) -> Hook:
        """Decorator of the method that is called with (old, new) after every write that touched the register."""
        self._written = self._hook(self._written, method)
        return method

    def _hook(self, before: Callable[..., Any] | None, method: Hook) -> Hook:
        setattr(method, _HOOK_OF, self)
        if self.name:
            raise DeclarationError(
                f"register {self.name!r} is complete in {self._owner}: override its hook, or declare it anew"
            )
        if before is not None:
            raise DeclarationError(f"a register has one such hook, and {before.__name__!r} is it: do both in there")
        return method

    @property
    def hooks(self) -> Iterator[Callable[..., Any]]:
        """The methods as they were decorated."""
        return (hook for hook in (self._read, self._written) if hook is not None)

    def of(self, device: Device | None) -> Register:
        """The register itself, with the hooks of ``device``, looked up by name: a subclass may override them.

        Raises ValueError where the declaration cannot be meant.
        """
        for what, value in self.declared.items():
            if not isinstance(value, int):
                raise ValueError(f"register {self.name!r}: {what} is {value!r}: it must be an int")
        on_read, on_write = (
            getattr(device, hook.__name__) if device and hook else None for hook in (self._read, self._written)
        )
        return Register(name=self.name, on_read=on_read, on_write=on_write, **self.declared)


def register(
    offset: int,
    *,
    bar: int = 0,
    width: int = 4,
    reset: int = 0,
    writable: int = 0,
    w1c: int = 0,
    strobe: int = 0,
    doorbell: bool = False,
) -> BarRegister:
    """Declare a register of ``width`` bytes at ``offset`` of a BAR.

    ``writable``, ``w1c`` and ``strobe`` are masks of its bits, as in :class:`~vfio_user.pci.Register`.
    ``doorbell``: clients may write it without a message, by an ioeventfd whose value arrives in shared memory: of
    several writes in a row ``on_write`` then sees the last.
    """
    declared = {"offset": offset, "width": width, "reset": reset, "writable": writable, "w1c": w1c, "strobe": strobe}
    return BarRegister(bar, doorbell, declared)


def check_hooks(cls: type, declared: Iterable[BarRegister]) -> None:
    """Raise ValueError for hooks that no device of this class would have: they are looked up by name."""
    for name, value in vars(cls).items():
        if (hooked := getattr(value, _HOOK_OF, None)) is not None and not hooked.name:
            raise ValueError(f"hook {name!r} takes the place of its register: give it a name of its own")
    methods: dict[str, Callable[..., Any]] = {}
    for one in declared:
        for hook in one.hooks:
            name = hook.__name__
            _check_signature(one, hook)
            if not callable(getattr(cls, name, None)):
                raise ValueError(f"register {one.name!r}: its hook {name!r} is no such method: name it otherwise")
            if vars(cls).get(one.name) is one and methods.setdefault(name, hook) is not hook:
                raise ValueError(f"register {one.name!r}: its hook {name!r} is one of two: give each a name of its own")


def _check_signature(one: BarRegister, hook: Callable[..., Any]) -> None:
    called = "(self)" if hook is one._read else "(self, old, new)"
    try:
        inspect.signature(hook).bind(*called.split(","))
    except TypeError:
        raise ValueError(
            f"register {one.name!r}: its hook {hook.__name__!r} is called as {called}: declare it so"
        ) from None


def register_files(
    declared: Iterable[BarRegister], bars: Mapping[int, Bar], msix: MsixCapability | None, device: Device | None
) -> dict[int, RegisterFile]:
    """The registers of each BAR that has some. Raises ValueError for what does not fit there."""
    by_bar: dict[int, list[BarRegister]] = {}
    for one in declared:
        by_bar.setdefault(one.bar, []).append(one)
    for index, registers in by_bar.items():
        for one in registers:
            _check_place(one.of(None), index, bars, msix)
            _check_doorbell(one)
    return {i: RegisterFile(bars[i].size, [one.of(device) for one in registers]) for i, registers in by_bar.items()}


def _check_doorbell(one: BarRegister) -> None:
    if one.doorbell and one.declared["width"] not in DOORBELL_WIDTHS:
        raise ValueError(f"register {one.name!r}: a doorbell has 1, 2, 4 or 8 bytes: change its width")


def _check_place(register: Register, index: int, bars: Mapping[int, Bar], msix: MsixCapability | None) -> None:
    bar = bars.get(index)
    if bar is None:
        raise ValueError(f"{register}: there is no BAR {index}: add it to bars")
    if register.end > bar.size:
        raise ValueError(f"{register} reaches past the {bar.size:#x} bytes of BAR {index}: move it or enlarge the BAR")
    if not bar.traps(register.offset, register.width):
        raise ValueError(
            f"{register}: clients that map BAR {index} would bypass it:"
            f" add ({register.offset:#x}, {register.width:#x}) to its trapped ranges"
        )
    for what, at, offset, size in msix.structures() if msix else ():
        if at == index and register.offset < offset + size and offset < register.end:
            raise ValueError(f"{register} overlaps the {what} of MSI-X at {offset:#x}: move it, or set msix_bar")
