"""What a device class declares wrongly fails with the class, the field and the remedy, before anything runs."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import pytest

from vfio_user import Bar, Device, MigrationFlags, option, register, state
from vfio_user.device import BarRegister
from vfio_user.errors import DeclarationError
from vfio_user.pci import (
    Capability,
    DeviceSerialNumber,
    MsiCapability,
    MsixCapability,
    PcieEndpoint,
    PowerManagement,
    VendorSpecific,
)


def declare(**declared: Any) -> type[Device]:
    """The class ``Wrong`` with these attributes and an identity; ``bars`` has a BAR0 unless it is given."""
    return type("Wrong", (Device,), {"vendor_id": 0x494F, "device_id": 1, "bars": {0: Bar(0x1000)}} | declared)


class Kind(enum.IntEnum):
    PLAIN = 1


def hooked(name: str, *, times: int = 1) -> BarRegister:
    """A register whose hook has this name."""
    one = register(0)
    for _ in range(times):

        def hook(device: Device, old: int, new: int) -> None: ...

        hook.__name__ = name
        one.on_write(hook)
    return one


def hook_alone() -> Callable[..., None]:
    """A hook whose register is nowhere: it has taken the place of it."""

    def count(device: Device, old: int, new: int) -> None: ...

    return register(0).on_write(count)


def short_hook() -> dict[str, Any]:
    """A register whose hook has too few arguments."""

    def rung(device: Device, new: int) -> None: ...

    one = register(0)
    return {"r": one, "rung": one.on_write(rung)}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    # identity
    "no vendor": ({"vendor_id": 0xFFFF}, "vendor_id is not set: give it one"),
    "no device": ({"device_id": 0xFFFF}, "device_id is not set: .*abstract=True"),
    "large vendor": ({"vendor_id": 1 << 16}, "vendor_id.*does not fit"),
    "an empty slot": ({"vendor_id": 0}, "vendor_id 0x0000 means an empty slot: choose another"),
    "class code": ({"class_code": 1 << 24}, "class_code 0x1000000 does not fit in 24 bits"),
    "hook in place of its register": ({"count": hook_alone()}, "hook .count. takes the place of its register"),
    "hook of wrong arguments": (short_hook(), "its hook .rung. is called as .self, old, new.: declare it so"),
    "large subsystem": ({"subsystem_id": 1 << 16}, "subsystem_id.*does not fit"),
    "large revision": ({"revision": 256}, "revision.*does not fit"),
    "large class": ({"class_code": 1 << 24}, "class_code.*does not fit"),
    "text for a number": ({"vendor_id": "8086"}, "vendor_id is '8086': it must be an int"),
    "text for a revision": ({"revision": "1"}, "revision is '1': it must be an int"),
    # BARs
    "a list of bars": ({"bars": [Bar(16)]}, r"bars is \[.*\]: it must be a Mapping"),
    "bars by name": ({"bars": {"bar0": Bar(16)}}, "bars: 'bar0'.*0 to 5"),
    "bars that are sizes": ({"bars": {0: 4096}}, r"bars: 0.*4096.*Bar\("),
    "bar 6": ({"bars": {6: Bar(16)}}, "BAR 6.*0 to 5"),
    "odd size": ({"bars": {0: Bar(100)}}, "BAR 0.*power of two"),
    "last bar of 64 bits": ({"bars": {5: Bar(16, bits64=True)}}, "BAR 5.*takes two"),
    "overlapping bars": ({"bars": {0: Bar(16, bits64=True), 1: Bar(16)}}, "BAR 0 of 64 bits takes index 1.*move"),
    "overlapping bars of 64 bits": (
        {"bars": {0: Bar(16, bits64=True), 1: Bar(16, bits64=True)}},
        "BAR 0 of 64 bits takes index 1.*move",
    ),
    "io with memory": ({"bars": {0: Bar(16, io=True, memory=True)}}, "BAR 0.*I/O.*drop"),
    "trapped all over": ({"bars": {0: Bar(4096, memory=True, trapped=((0, 1),))}}, "BAR 0.*no page.*drop memory"),
    "text for a rom": ({"rom": "BIOS"}, "rom is 'BIOS': it must be a bytes"),
    "a rom of 32 MiB": ({"rom": bytes((16 << 20) + 1)}, "expansion ROM.*power of two"),
    # interrupts
    "three pins": ({"intx": 3}, "3 INTX vectors: 0 to 1"),
    "msi of 3": ({"msi_vectors": 3}, "MSI vectors.*power of two"),
    "msi of 64": ({"msi_vectors": 64}, "MSI vectors.*1 to 32"),
    "msix of 2049": ({"msix_vectors": 2049}, "MSI-X vectors.*1 to 2048"),
    "negative msix": ({"msix_vectors": -1}, "MSI-X vectors.*1 to 2048"),
    "no bar left": ({"msix_vectors": 1, "bars": {i: Bar(16) for i in range(6)}}, "no BAR is left.*set msix_bar"),
    "msix in bar 6": ({"msix_vectors": 1, "msix_bar": 6}, "BAR 6"),
    "msix in half a bar": (
        {"msix_vectors": 1, "msix_bar": 1, "bars": {0: Bar(16, bits64=True)}},
        "BAR 0 of 64 bits takes index 1",
    ),
    "msix in a small bar": ({"msix_vectors": 1, "msix_bar": 0, "bars": {0: Bar(64)}}, "MSI-X PBA.*BAR 0"),
    "msix in io": ({"msix_vectors": 1, "msix_bar": 0, "bars": {0: Bar(256, io=True)}}, "memory BAR 0"),
    "msix in memory": (
        {"msix_vectors": 1, "msix_bar": 0, "bars": {0: Bar(8192, memory=True)}},
        r"MSI-X table.*BAR 0.*add \(0x0, 0x10\) to its trapped",
    ),
    # capabilities
    "no sequence": ({"capabilities": PowerManagement()}, "capabilities is .*: it must be a Sequence"),
    "a class": ({"capabilities": (PowerManagement,)}, "capabilities: .*PowerManagement.*instance"),
    "twice": ({"capabilities": (PowerManagement(), PowerManagement())}, "'pm' is there twice: drop one"),
    "two of a name": ({"capabilities": (VendorSpecific(b""), VendorSpecific(b""))}, "'vendor' is there twice.*name="),
    "extended": ({"capabilities": (DeviceSerialNumber(1),)}, "'serial'.*add PcieEndpoint"),
    "too much": ({"capabilities": [Capability(9, 180, "a"), Capability(9, 180, "b")]}, "'b' ends at.*drop one"),
    "msi by hand": ({"capabilities": [MsiCapability()]}, "capabilities: 'msi'.*msi_vectors"),
    "msix by hand": ({"capabilities": [MsixCapability(1, 0, 0, 0, 16)]}, "capabilities: 'msix'.*msix_vectors"),
    # registers
    "no such bar": ({"r": register(0, bar=1)}, "'r'.*no BAR 1: add it to bars"),
    "past the end": ({"r": register(0xFFE)}, "'r'.*past the 0x1000 bytes of BAR 0.*move"),
    "before the start": ({"r": register(-4)}, "'r'.*start at 0"),
    "no width": ({"r": register(0, width=0)}, "'r'.*1 to"),
    "large reset": ({"r": register(0, reset=1 << 32)}, "'r'.*reset.*widen"),
    "large mask": ({"r": register(0, width=1, writable=0x100)}, "'r'.*writable.*widen"),
    "two masks": ({"r": register(0, writable=3, w1c=2)}, "'r'.*bits 0x2.*choose one"),
    "a strobe that is set": ({"r": register(0, reset=1, strobe=1)}, "'r'.*strobe.*drop"),
    "text for a width": ({"r": register(0, width="4")}, "'r': width is '4': it must be an int"),  # type: ignore[arg-type]
    "overlapping registers": ({"a": register(0), "b": register(2)}, "'b'.*overlaps.*'a'.*move"),
    "register in memory": (
        {"r": register(8), "bars": {0: Bar(8192, memory=True)}},
        r"'r'.*BAR 0.*add \(0x8, 0x4\) to its trapped",
    ),
    "register half in memory": (
        {"r": register(4094), "bars": {0: Bar(8192, memory=True, trapped=((0, 4096),))}},
        r"'r'.*BAR 0.*add \(0xffe, 0x4\) to its trapped",
    ),
    "register in the table": ({"r": register(12), "msix_vectors": 1, "msix_bar": 0}, "'r'.*table of MSI-X.*move"),
    "register in the pba": ({"r": register(0x804), "msix_vectors": 1, "msix_bar": 0}, "'r'.*PBA of MSI-X.*move"),
    "wide doorbell": ({"r": register(0, width=16, doorbell=True)}, "'r'.*doorbell.*1, 2, 4 or 8"),
    "mangled hook": ({"r": hooked("__start")}, "'r'.*'__start'.*no such method"),
    "lambda": ({"r": hooked("<lambda>")}, "'r'.*'<lambda>'.*no such method"),
    # names
    **{
        f"{what} {name}": ({name: make()}, f"{what} '{name}'.*choose another")
        for what, make in (
            ("register", lambda: register(0)),
            ("state", lambda: state(0)),
            ("option", lambda: option(0, "")),
        )
        for name in ("irq", "memory", "msix", "link", "reset", "quiesce", "regions", "declared_state")
    },
    # state and options
    "state of a set": ({"s": state({1})}, "'s' holds a set.*declare"),
    "state of an enum": ({"s": state(Kind.PLAIN)}, "'s' holds a Kind"),
    "state of a tuple": ({"s": state((1, 2))}, "'s' holds a tuple"),
    "state that is large": ({"s": state(1 << 64)}, "'s'.*64 bits"),
    "state that nests a bytearray": ({"s": state([bytearray(1)])}, "'s' holds a bytearray"),
    "option of a list": ({"o": option([1], "numbers")}, "option 'o'.*list.*give it parse="),
    "option of nothing": ({"o": option(None, "none")}, "option 'o'.*NoneType.*give it parse="),
    # migration
    "version 0": ({"state_version": -1}, "state_version"),
    "version of 33 bits": ({"state_version": 1 << 32}, "state_version"),
    "pre-copy alone": ({"migration": MigrationFlags.PRE_COPY}, "migration.*add .*STOP_COPY"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_class_is_not_built(name: str) -> None:
    declared, message = WRONG[name]
    with pytest.raises(DeclarationError, match=f"^Wrong: .*{message}"):
        declare(**declared)


@pytest.mark.parametrize("name", [name for name, (declared, _) in WRONG.items() if "bars" in declared])
def test_where_options_decide_it_fails_when_a_device_is_made(name: str) -> None:
    declared, message = WRONG[name]
    bars = declared["bars"]

    def configure(self: Device) -> None:
        self.bars = bars

    made = declare(**declared | {"bars": {}, "configure": configure})
    with pytest.raises(DeclarationError, match=f"^Wrong: .*{message}"):
        made()


def test_a_base_may_be_incomplete_and_what_is_made_of_it_may_not() -> None:
    class Base(Device, abstract=True):
        control = register(0, bar=2)

    with pytest.raises(DeclarationError, match=r"^Half: .*'control'.*no BAR 2"):

        class Half(Base):
            vendor_id, device_id = 7, 2

    class Whole(Base):
        vendor_id, device_id = 7, 2
        bars = {2: Bar(16)}

    assert Whole().control == 0
    with pytest.raises(DeclarationError, match="Base: vendor_id is not set"):
        Base()


def test_two_hooks_of_one_name_would_be_one() -> None:
    with pytest.raises(DeclarationError, match=r"Twice: .*'_'.*two.*name"):

        class Twice(Device):
            vendor_id, device_id = 7, 2
            bars = {0: Bar(16)}
            a = register(0, writable=1)
            b = register(4, writable=1)

            @a.on_write
            def _(self, old: int, new: int) -> None: ...

            @b.on_write
            def _(self, old: int, new: int) -> None: ...


def test_one_method_may_be_the_hook_of_many_registers() -> None:
    class Both(Device):
        vendor_id, device_id = 7, 2
        bars = {0: Bar(16)}
        a = register(0, writable=1)
        b = register(4, writable=1)
        changes = state(0)

        @a.on_write
        @b.on_write
        def changed(self, old: int, new: int) -> None:
            self.changes += 1

    device = Both()
    device.region_write(0, 0, memoryview(bytes(8)))
    assert device.changes == 2


def test_a_second_hook_would_replace_the_first() -> None:
    one = hooked("first")
    with pytest.raises(DeclarationError, match=r"one such hook.*'first'"):
        one.on_write(lambda device, old, new: None)


def test_a_subclass_cannot_hook_into_its_base_behind_its_back() -> None:
    class Base(Device):
        vendor_id, device_id = 7, 2
        bars = {0: Bar(16)}
        control = register(0, writable=1)

    with pytest.raises(DeclarationError, match=r"'control'.*Base.*declare it anew"):

        class Child(Base):
            @Base.control.on_write
            def changed(self, old: int, new: int) -> None: ...

    Base().region_write(0, 0, memoryview(b"\1"))


def test_defaults_are_a_devices_own() -> None:
    class Listing(Device):
        vendor_id, device_id = 7, 2
        names = option(["a"], "names", lambda text: text.split(","))
        seen = state(["x"])

    one, other = Listing(), Listing()
    one.names.append("b")
    one.seen.append("y")
    assert (other.names, other.seen, Listing().names) == (["a"], ["x"], ["a"])


@pytest.mark.parametrize(
    "declared",
    [
        {"capabilities": (PcieEndpoint(), PowerManagement(), DeviceSerialNumber(1), VendorSpecific(b"", name="a"))},
        {"capabilities": [VendorSpecific(b"1", name="a"), VendorSpecific(b"2", name="b")], "msi_vectors": 32},
        {"bars": {0: Bar(8192, memory=True, trapped=((0, 4096),))}, "r": register(0xFFC), "s": register(0, width=8)},
        {"msix_vectors": 2048, "msix_bar": 0, "bars": {0: Bar(1 << 16)}, "r": register(0x8100)},
        {"r": register(0, width=8, doorbell=True), "s": register(8, width=1, doorbell=True)},
        {"rom": b"\x55\xaa", "intx": True, "migration": MigrationFlags(0)},
        {"s": state({"a": [1, b"2", 3.0, True, None]}), "b": state(bytearray(3)), "size": option(1.5, "a float")},
    ],
)
def test_what_is_right_is_built_and_made(declared: dict[str, Any]) -> None:
    make: Callable[[], Device] = declare(**declared)
    device = make()
    assert {region.size for region in device.regions} >= {len(device.config)}
