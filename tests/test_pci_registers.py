"""Declared registers, against a model that knows nothing but single bits."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.pci import Register, RegisterFile


def read(registers: RegisterFile, offset: int, length: int) -> bytes:
    data = bytearray(b"\xee" * length)
    registers.read_into(offset, memoryview(data))
    return bytes(data)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Register]]:
    """A size and registers of odd widths, with holes."""
    registers, offset = [], 0
    for number in range(draw(st.integers(0, 6))):
        offset += draw(st.integers(0, 3))
        width = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
        bits = st.integers(0, (1 << 8 * width) - 1)
        writable = draw(bits)
        registers.append(
            Register(offset, width, f"r{number}", draw(bits), writable=writable, w1c=draw(bits) & ~writable)
        )
        offset += width
    return offset + draw(st.integers(0, 5)), draw(st.permutations(registers))


class BitModel:
    """Every bit by itself: what it is, and what a write makes of it."""

    def __init__(self, size: int, registers: list[Register]) -> None:
        self.bits = [0] * (8 * size)
        self.kind = ["fixed"] * (8 * size)
        for register in registers:
            for bit in range(8 * register.width):
                at = 8 * register.offset + bit
                self.bits[at] = register.reset >> bit & 1
                if register.writable >> bit & 1:
                    self.kind[at] = "writable"
                elif register.w1c >> bit & 1:
                    self.kind[at] = "w1c"

    def write(self, offset: int, data: bytes) -> None:
        for bit in range(8 * len(data)):
            at, new = 8 * offset + bit, data[bit // 8] >> bit % 8 & 1
            if self.kind[at] == "writable":
                self.bits[at] = new
            elif self.kind[at] == "w1c" and new:
                self.bits[at] = 0

    def read(self, offset: int, length: int) -> bytes:
        bits = self.bits[8 * offset : 8 * (offset + length)]
        return bytes(sum(bits[8 * byte + bit] << bit for bit in range(8)) for byte in range(length))


@given(layouts(), st.data())
def test_any_access_does_what_the_masks_of_its_bits_say(
    layout: tuple[int, list[Register]], data: st.DataObject
) -> None:
    size, declared = layout
    registers, model = RegisterFile(size, declared), BitModel(size, declared)
    for _ in range(data.draw(st.integers(1, 5))):
        offset = data.draw(st.integers(0, size))
        content = data.draw(st.binary(max_size=size - offset))
        registers.write(offset, memoryview(content))
        model.write(offset, content)
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        assert read(registers, start, stop - start) == model.read(start, stop - start)
    for register in declared:
        assert registers.save()[register.name] == model.read(register.offset, register.width)


@given(layouts())
def test_hooks_see_the_whole_registers_that_a_write_touched_and_no_others(
    layout: tuple[int, list[Register]],
) -> None:
    size, declared = layout
    calls: list[tuple[str, int, int]] = []

    def log(name: str) -> Callable[[int, int], None]:
        return lambda old, new: calls.append((name, old, new))

    hooked = [Register(r.offset, r.width, r.name, r.reset, r.writable, r.w1c, on_write=log(r.name)) for r in declared]
    for start in range(size):
        for stop in range(start, min(start + 5, size + 1)):
            registers = RegisterFile(size, hooked)
            registers.write(start, b"\xff" * (stop - start))
            touched = [r for r in sorted(declared, key=lambda r: r.offset) if r.offset < stop and start < r.end]
            touched = touched if stop > start else []
            assert calls == [(r.name, r.reset, registers.get(r.name)) for r in touched]
            calls.clear()


def test_a_hook_that_clears_a_bit_has_the_last_word() -> None:
    registers = RegisterFile(2, [Register(0, 2, "control", writable=0xFFFF, on_write=lambda old, new: clear())])

    def clear() -> None:
        registers.set("control", registers.get("control") & 0x7FFF)

    registers.write(0, b"\x01\x80")
    assert registers.get("control") == 1


def test_a_read_shows_what_the_read_hook_gives_and_keeps_what_is_stored() -> None:
    values = iter([0x11223344, 0x55667788])
    registers = RegisterFile(8, [Register(2, 4, "clock", reset=7, on_read=lambda: next(values))])
    assert read(registers, 3, 2) == b"\x33\x22"
    assert read(registers, 0, 8) == b"\0\0\x88\x77\x66\x55\0\0"
    assert read(registers, 0, 2) == read(registers, 6, 2) == b"\0\0"  # beside it: no call
    assert read(registers, 3, 0) == b""  # nothing of it: no call
    assert registers.get("clock") == 7


@given(layouts(), st.binary(min_size=1, max_size=64))
def test_save_load_and_reset(layout: tuple[int, list[Register]], content: bytes) -> None:
    size, declared = layout
    registers, other = RegisterFile(size, declared), RegisterFile(size, declared)
    initial = registers.save()
    registers.write(0, content[:size])
    other.load(registers.save())
    assert other.save() == registers.save()
    registers.reset()
    assert registers.save() == initial


def test_the_device_writes_read_only_bits_and_a_guest_does_not() -> None:
    registers = RegisterFile(4, [Register(0, 4, "status", reset=5)])
    registers.write(0, b"\xff" * 4)
    assert registers.get("status") == 5
    registers.set("status", 0xDEADBEEF)
    assert read(registers, 0, 4) == b"\xef\xbe\xad\xde"
    for unfit in (1 << 32, -1):
        with pytest.raises(ValueError, match="'status'"):
            registers.set("status", unfit)


@pytest.mark.parametrize(("offset", "length"), [(0, 17), (16, 1), (15, 2), (-1, 1), (1 << 63, 1), (17, 0)])
def test_an_access_that_leaves_the_file_is_refused(offset: int, length: int) -> None:
    registers = RegisterFile(16, [Register(0, 16, "all", writable=(1 << 128) - 1)])
    with pytest.raises(OSError, match="16 bytes") as caught:
        registers.read_into(offset, memoryview(bytearray(length)))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="16 bytes"):
        registers.write(offset, b"\xff" * length)
    assert registers.get("all") == 0


@pytest.mark.parametrize(
    ("saved", "culprit"),
    [
        ({"a": b"\2\0", "c": b"\0"}, "unknown register 'c'"),
        ({"a": b"\2"}, "'a'.*saved are 1 bytes"),
        ({"a": b"\2\0\0"}, "'a'.*saved are 3 bytes"),
        ({}, "missing registers: a"),
    ],
)
def test_saved_registers_that_are_not_ours_change_nothing(saved: dict[str, bytes], culprit: str) -> None:
    registers = RegisterFile(4, [Register(0, 2, "a", reset=1)])
    registers.set("a", 7)
    with pytest.raises(ValueError, match=culprit):
        registers.load(saved)
    assert registers.get("a") == 7


def test_a_register_that_an_older_save_does_not_know_gets_its_reset_value() -> None:
    registers = RegisterFile(4, [Register(0, 2, "a", reset=1), Register(2, 2, "b", reset=2)])
    registers.set("b", 9)
    registers.load({"a": b"\5\0"}, complete=False)
    assert (registers.get("a"), registers.get("b")) == (5, 2)


@pytest.mark.parametrize(
    ("build", "culprit", "remedy"),
    [
        (lambda: Register(0, 1, "a", reset=256), "'a'", "widen"),
        (lambda: Register(0, 2, "a", writable=1 << 16), "'a'", "widen"),
        (lambda: Register(0, 2, "a", w1c=-1), "'a'", "widen"),
        (lambda: Register(0, 1, "a", writable=3, w1c=2), "bits 0x2", "choose one"),
        (lambda: Register(-1, 1, "a"), "'a'", "start at 0"),
        (lambda: Register(0, 0, "a"), "'a'", "1 to"),
        (lambda: Register(0, 1 << 33, "a"), "'a'", "1 to"),
        (lambda: RegisterFile(4, [Register(1, 4, "a")]), "'a'", "enlarge"),
        (lambda: RegisterFile(4, [Register(1, 2, "b"), Register(0, 2, "a")]), "'b'.*overlaps.*'a'", "move"),
        (lambda: RegisterFile(4, [Register(0, 1, "a"), Register(1, 1, "a")]), "'a'", "choose another"),
    ],
)
def test_a_wrong_declaration_fails_when_built_and_says_what_to_do(
    build: Callable[[], object], culprit: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match=f"{culprit}.*{remedy}"):
        build()
