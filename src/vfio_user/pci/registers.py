"""Registers are declared, not coded: reset value, masks of what a write does to each bit, hooks for their effects."""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter

Buffer = bytes | bytearray | memoryview

ReadHook = Callable[[], int]
WriteHook = Callable[[int, int], None]

_MAX_WIDTH = 1 << 16
"""Bytes: the largest is the table of MSI-X, which has half of that."""
_MASKS = ("writable", "w1c", "strobe")


@dataclass(frozen=True, slots=True)
class Register:
    """A little-endian register: ``width`` bytes at ``offset``.

    Every bit is read-only unless one of the masks has it: ``writable``; ``w1c``, write one to clear; ``strobe``, a bit
    that always reads 0 and whose ones only ``on_write`` sees. The device itself may change any of them; ``driven`` are
    those of config space that it does change, though no guest can: what else is read-only there is constant.

    ``on_read()`` gives the value that a read shows in place of the stored one, cut to the width. ``on_write(old, new)``
    is called after a write that touched the register, also where no bit changed: a doorbell is rung by any write.

    Raises ValueError for a declaration that cannot be meant.
    """

    offset: int
    width: int
    name: str
    reset: int = 0
    writable: int = 0
    w1c: int = 0
    strobe: int = 0
    driven: int = 0
    on_read: ReadHook | None = None
    on_write: WriteHook | None = None

    def __post_init__(self) -> None:
        if self.offset < 0 or not 1 <= self.width <= _MAX_WIDTH:
            raise ValueError(f"{self}: offsets start at 0, widths are 1 to {_MAX_WIDTH:#x} bytes")
        for what in ("reset", "driven", *_MASKS):
            value = getattr(self, what)
            if not 0 <= value < 1 << 8 * self.width:
                raise ValueError(f"{self}: {what} {value:#x} does not fit: widen the register or cut the value")
        for one, other in combinations(_MASKS, 2):
            if both := getattr(self, one) & getattr(self, other):
                raise ValueError(f"{self}: bits {both:#x} are in {one} and in {other}: choose one")
        if self.reset & self.strobe:
            raise ValueError(
                f"{self}: bits {self.reset & self.strobe:#x} of strobe always read 0: drop them from reset"
            )

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
        self._size = size
        self._registers = sorted(registers, key=attrgetter("offset"))
        _check_layout(size, self._registers)
        self._offsets = [register.offset for register in self._registers]
        self._ends = [register.end for register in self._registers]
        self._by_name = {register.name: register for register in self._registers}
        self._values = {register.name: register.reset for register in self._registers}

    def __len__(self) -> int:
        """The size in bytes."""
        return self._size

    def __iter__(self) -> Iterator[Register]:
        """The declared registers, by offset."""
        return iter(self._registers)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def touched(self, offset: int, length: int) -> Sequence[Register]:
        """The registers that an access to these bytes touches, by offset. Of no bytes: none."""
        if not length:
            return ()
        return self._registers[bisect_right(self._ends, offset) : bisect_left(self._offsets, offset + length)]

    def read_into(self, offset: int, data: memoryview) -> bool:
        """Fill ``data`` with what stands at ``offset``. False: that touches no register, it is all zeros."""
        self._check_inside(offset, len(data))
        touched = self.touched(offset, len(data))
        data[:] = bytes(len(data))
        for register in touched:
            shown = register.on_read() if register.on_read else self._values[register.name]
            content = (shown & (1 << 8 * register.width) - 1).to_bytes(register.width, "little")
            start, stop = _overlap(register, offset, len(data))
            data[start - offset : stop - offset] = content[start - register.offset : stop - register.offset]
        return bool(touched)

    def write(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` at ``offset`` as far as the masks let it, then call the hooks. False: it touches nothing."""
        self._check_inside(offset, len(data))
        touched = self.touched(offset, len(data))
        effects = []
        for register in touched:
            start, stop = _overlap(register, offset, len(data))
            shift = 8 * (start - register.offset)
            written = int.from_bytes(data[start - offset : stop - offset], "little") << shift
            old, new = self._store(register, written, ((1 << 8 * (stop - start)) - 1) << shift)
            if register.on_write is not None:
                effects.append((register.on_write, old, new))
        for effect, old, new in effects:
            effect(old, new)
        return bool(touched)

    def _store(self, register: Register, written: int, reached: int) -> tuple[int, int]:
        """Write the bits that were ``reached``; the values before and after, as a hook sees them."""
        old = self._values[register.name]
        writable = register.writable & reached
        self._values[register.name] = stored = old & ~writable & ~(written & register.w1c) | written & writable
        return old, stored | written & register.strobe

    def get(self, name: str) -> int:
        """The stored value of a register. Raises KeyError for an unknown name."""
        return self._values[name]

    def set(self, name: str, value: int) -> None:
        """Store a value from the device's own side: no mask holds. Raises ValueError for one that it cannot have."""
        self._values[name] = _possible(self._by_name[name], value)

    def reset(self) -> None:
        """Put every register back to its reset value."""
        self._values = {register.name: register.reset for register in self._registers}

    def save(self) -> dict[str, bytes]:
        """The stored values by name, each of the register's width."""
        return {name: value.to_bytes(self._by_name[name].width, "little") for name, value in self._values.items()}

    def load(self, saved: Mapping[str, bytes], *, complete: bool = True) -> None:
        """Take over what :meth:`save` gave; no mask holds.

        ``complete``: a register that is missing is an error; otherwise it gets its reset value. Raises ValueError,
        which names the register, with nothing changed.
        """
        values = {register.name: register.reset for register in self._registers}
        if complete and (missing := values.keys() - saved.keys()):
            raise ValueError(f"missing registers: {', '.join(sorted(missing))}")
        for name, content in saved.items():
            register = self._by_name.get(name)
            if register is None:
                raise ValueError(f"unknown register {name!r}")
            if len(content) != register.width:
                raise ValueError(f"{register}: saved are {len(content)} bytes")
            values[name] = _possible(register, int.from_bytes(content, "little"))
        self._values = values

    def _check_inside(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self._size:
            raise OSError(
                errno.EINVAL, f"{length} bytes at {offset:#x} are not inside the {self._size} bytes of registers"
            )


def _possible(register: Register, value: int) -> int:
    """A value that the register can have. Raises ValueError."""
    if not 0 <= value < 1 << 8 * register.width:
        raise ValueError(f"{register}: {value:#x} does not fit")
    if value & register.strobe:
        raise ValueError(f"{register}: bits {value & register.strobe:#x} of {value:#x} are strobes, which read 0")
    return value


def _overlap(register: Register, offset: int, length: int) -> tuple[int, int]:
    """From where to where an access touches a register."""
    return max(offset, register.offset), min(offset + length, register.end)


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
