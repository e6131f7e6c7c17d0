"""Registers are declared, not coded: value, write mask, write-one-to-clear mask, hooks for their effects."""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Register:
    """A little-endian register: ``width`` bytes at ``offset``.

    Every bit is read-only unless ``writable`` or ``w1c`` (write one to clear) has it. ``on_read()`` gives the
    value that a read shows in place of the stored one. ``on_write(old, new)`` is called after a write that
    touched the register, also where no bit changed: a doorbell is rung by any write.

    Raises ValueError for a declaration that cannot be meant.
    """

    offset: int
    width: int
    name: str
    reset: int = 0
    writable: int = 0
    w1c: int = 0
    on_read: Callable[[], int] | None = None
    on_write: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.offset < 0 or self.width < 1:
            raise ValueError(f"{self}: offsets start at 0, widths at 1 byte")
        for what in ("reset", "writable", "w1c"):
            value = getattr(self, what)
            if not 0 <= value < 1 << 8 * self.width:
                raise ValueError(f"{self}: {what} {value:#x} does not fit: widen the register or cut the value")
        if both := self.writable & self.w1c:
            raise ValueError(f"{self}: bits {both:#x} are in writable and in w1c: choose one")

    @property
    def end(self) -> int:
        """The offset behind the register."""
        return self.offset + self.width

    def __str__(self) -> str:
        return f"register {self.name!r} ({self.width} bytes at {self.offset:#x})"


class RegisterFile:
    """``size`` bytes of registers, which answer accesses of any length at any offset.

    Bytes outside of the declared registers read 0 and ignore writes. An access that leaves the file raises
    OSError(EINVAL). Hooks run in the order of the offsets, after the whole write; :meth:`set`, :meth:`reset`
    and :meth:`load` are the device's own doing and call none.

    Raises ValueError when registers overlap, share a name or do not fit.
    """

    def __init__(self, size: int, registers: Iterable[Register]) -> None:
        self._registers = sorted(registers, key=attrgetter("offset"))
        _check_layout(size, self._registers)
        self._offsets = [register.offset for register in self._registers]
        self._ends = [register.end for register in self._registers]
        self._by_name = {register.name: register for register in self._registers}
        self._reset = _image(size, ((r, r.reset) for r in self._registers))
        self._writable = _image(size, ((r, r.writable) for r in self._registers))
        self._w1c = _image(size, ((r, r.w1c) for r in self._registers))
        self._values = bytearray(self._reset)

    def __len__(self) -> int:
        """The size in bytes."""
        return len(self._values)

    def __iter__(self) -> Iterator[Register]:
        """The declared registers, by offset."""
        return iter(self._registers)

    def read_into(self, offset: int, data: memoryview) -> None:
        """Fill ``data`` with what stands at ``offset``."""
        end = self._end(offset, len(data))
        data[:] = self._values[offset:end]
        for register in self._touched(offset, end):
            if register.on_read is not None:
                shown = register.on_read().to_bytes(register.width, "little")
                start, stop = max(offset, register.offset), min(end, register.end)
                data[start - offset : stop - offset] = shown[start - register.offset : stop - register.offset]

    def write(self, offset: int, data: Buffer) -> None:
        """Write ``data`` at ``offset`` as far as the masks let it, then call the hooks of what it touched."""
        end = self._end(offset, len(data))
        touched = [(hook, r, self._value(r)) for r in self._touched(offset, end) if (hook := r.on_write)]
        self._write_masked(slice(offset, end), int.from_bytes(data, "little"))
        for hook, old, new in [(hook, old, self._value(r)) for hook, r, old in touched]:
            hook(old, new)

    def get(self, name: str) -> int:
        """The stored value of a register. Raises KeyError for an unknown name."""
        return self._value(self._by_name[name])

    def set(self, name: str, value: int) -> None:
        """Store a value from the device's own side: no mask holds. Raises ValueError for one too large."""
        register = self._by_name[name]
        if not 0 <= value < 1 << 8 * register.width:
            raise ValueError(f"{register}: {value:#x} does not fit")
        self._values[register.offset : register.end] = value.to_bytes(register.width, "little")

    def reset(self) -> None:
        """Put every register back to its reset value."""
        self._values[:] = self._reset

    def save(self) -> bytes:
        """The stored values, ``len(self)`` bytes."""
        return bytes(self._values)

    def load(self, data: Buffer) -> None:
        """Take over what :meth:`save` gave; no mask holds.

        Raises ValueError, with nothing changed, for another length or values outside of the registers.
        """
        if len(data) != len(self):
            raise ValueError(f"saved registers of {len(data)} bytes, not of {len(self)}")
        undeclared = bytearray(data)
        for register in self._registers:
            undeclared[register.offset : register.end] = bytes(register.width)
        if any(undeclared):
            raise ValueError("saved registers have a value where no register is declared")
        self._values[:] = data

    def _end(self, offset: int, length: int) -> int:
        end = offset + length
        if offset < 0 or end > len(self._values):
            raise OSError(
                errno.EINVAL,
                f"{length} bytes at {offset:#x} are not inside the {len(self)} bytes of registers",
            )
        return end

    def _touched(self, offset: int, end: int) -> Sequence[Register]:
        if offset == end:
            return ()  # an access of no bytes touches nothing, inside a register either
        return self._registers[bisect_right(self._ends, offset) : bisect_left(self._offsets, end)]

    def _value(self, register: Register) -> int:
        return int.from_bytes(self._values[register.offset : register.end], "little")

    def _write_masked(self, span: slice, new: int) -> None:
        old = int.from_bytes(self._values[span], "little")
        writable = int.from_bytes(self._writable[span], "little")
        w1c = int.from_bytes(self._w1c[span], "little")
        value = (old & ~writable & ~(new & w1c)) | (new & writable)
        self._values[span] = value.to_bytes(span.stop - span.start, "little")


def _check_layout(size: int, registers: Sequence[Register]) -> None:
    names: set[str] = set()
    end, previous = 0, None
    for register in registers:
        if register.end > size:
            raise ValueError(f"{register} reaches past the end ({size} bytes): move it or enlarge the file")
        if register.offset < end:
            raise ValueError(f"{register} overlaps {previous}: move one of them")
        if register.name in names:
            raise ValueError(f"{register}: the name is taken: choose another")
        names.add(register.name)
        end, previous = register.end, register


def _image(size: int, fields: Iterable[tuple[Register, int]]) -> bytes:
    image = bytearray(size)
    for register, value in fields:
        image[register.offset : register.end] = value.to_bytes(register.width, "little")
    return bytes(image)
