"""PCI capabilities as declarations: what they put into config space, and where.

Here are the two lists, the one below 0x100 and that of the extended capabilities behind it; what stands in them is in
:mod:`~vfio_user.pci.msi`, :mod:`~vfio_user.pci.power` and :mod:`~vfio_user.pci.express`.

Sources: PCI Local Bus specification 3.0, section 6.7; PCI Express base specification 4.0, sections 7.6.1 and 7.9;
``linux/pci_regs.h``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from vfio_user.pci.bars import Bar
from vfio_user.pci.registers import Register

CONFIG_SIZE = 0x100
EXTENDED_CONFIG_SIZE = 0x1000

_FIRST = 0x40
_ALIGNMENT = 4


class Capability:
    """One capability of the list: ``length`` bytes that begin with its ``id`` and a pointer to the next.

    Subclasses declare what follows in :meth:`registers`. ``name`` goes before the names of these registers in
    config space, with a dot between: ``"msix.control"``.

    Raises ValueError for an id or a length that cannot be.
    """

    area: ClassVar[range] = range(_FIRST, CONFIG_SIZE)
    """Where in config space the list of this kind lies; its first capability is at the start."""
    header_size: ClassVar[int] = 2
    max_id: ClassVar[int] = 0xFF

    def __init__(self, id: int, length: int, name: str) -> None:
        if not 0 <= id <= self.max_id or not self.header_size <= length <= len(self.area):
            raise ValueError(
                f"capability {name!r}: ids are 0 to {self.max_id:#x}, not {id:#x}; lengths {self.header_size} to"
                f" {len(self.area)} bytes, not {length}"
            )
        self.id = id
        self.length = length
        self.name = name

    def header(self, following: int) -> int:
        """The header's value; ``following``: the offset of the next capability, 0 for none."""
        return self.id | following << 8

    def registers(self) -> Sequence[Register]:
        """The registers behind the header, with offsets from the start of the capability."""
        return ()

    def check(self, bars: Mapping[int, Bar]) -> None:
        """Raise ValueError if this capability does not go with the function's BARs."""


class ExtendedCapability(Capability):
    """One capability of PCI Express' list behind 0x100: its header has 4 bytes, with a ``version`` of 1 to 15."""

    area = range(CONFIG_SIZE, EXTENDED_CONFIG_SIZE)
    header_size = 4
    max_id = 0xFFFF

    def __init__(self, id: int, version: int, length: int, name: str) -> None:
        super().__init__(id, length, name)
        if not 1 <= version <= 15:
            raise ValueError(f"capability {name!r}: versions are 1 to 15, not {version}")
        self.version = version

    def header(self, following: int) -> int:
        return self.id | self.version << 16 | following << 20


class VendorSpecific(Capability):
    """A vendor's own bytes: ``body`` after id, pointer and length, of which a guest changes those bits that are in
    ``writable``, a mask of as many bytes; it stands in config space as one register, ``NAME.body``.

    Source: PCI Local Bus specification 3.0, appendix H.
    """

    def __init__(self, body: bytes, writable: bytes = b"", *, name: str = "vendor") -> None:
        super().__init__(0x09, 3 + len(body), name)
        self._registers = [Register(2, 1, "length", self.length), *body_register(3, body, writable)]

    def registers(self) -> Sequence[Register]:
        return self._registers


def body_register(offset: int, body: bytes, writable: bytes) -> Iterator[Register]:
    """A vendor's bytes as one register, none where there are no bytes. Raises ValueError for too long a mask."""
    if len(writable) > len(body):
        raise ValueError(f"a mask of {len(writable)} bytes for a body of {len(body)}: cut writable")
    if body:
        mask = int.from_bytes(writable, "little")
        everything = (1 << 8 * len(body)) - 1
        yield Register(offset, len(body), "body", int.from_bytes(body, "little"), writable=mask, driven=everything)


def first_capability(capabilities: Sequence[Capability]) -> int:
    """What the capabilities pointer holds; 0 without any capability."""
    return _FIRST if any(capability.area.start == _FIRST for capability in capabilities) else 0


def capability_registers(capabilities: Sequence[Capability]) -> Iterator[Register]:
    """The registers of all capabilities by offset in config space: in each list one behind the other, and chained.

    Raises ValueError if a list does not fit, or two capabilities have one name.
    """
    names = [capability.name for capability in capabilities]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"capability {name!r} is there twice: drop one, or tell them apart by name=")
    for area in (Capability.area, ExtendedCapability.area):
        yield from _chain([capability for capability in capabilities if capability.area == area], area)


def _chain(capabilities: Sequence[Capability], area: range) -> Iterator[Register]:
    offset = area.start
    for position, capability in enumerate(capabilities):
        end = -(-(offset + capability.length) // _ALIGNMENT) * _ALIGNMENT
        if end > area.stop:
            raise ValueError(f"capability {capability.name!r} ends at {end:#x}, behind {area.stop:#x}: drop one")
        following = end if position + 1 < len(capabilities) else 0
        yield Register(offset, capability.header_size, f"{capability.name}.header", capability.header(following))
        for register in capability.registers():
            yield _placed(capability, register, offset)
        offset = end


def _placed(capability: Capability, register: Register, base: int) -> Register:
    if register.offset < capability.header_size or register.end > capability.length:
        raise ValueError(f"{register} is not inside the {capability.length} bytes of {capability.name!r}")
    return replace(register, offset=base + register.offset, name=f"{capability.name}.{register.name}")
