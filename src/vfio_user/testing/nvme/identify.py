"""What IDENTIFY and log pages give, as objects.

Source: NVM Express Base Specification 1.4, section 5.15.2 (figures 245, 247 and 249) and 5.14.1; fields have the
specification's short names. ``raw`` is all of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from vfio_user.devices.nvme.constants import AsyncEvent

IDENTIFY_SIZE = 4096

Layout = Mapping[str, tuple[int, str]]
"""By field, its offset in bytes and its format (struct)."""


def _unpacked(layout: Layout, raw: bytes) -> dict[str, Any]:
    values = {name: struct.unpack_from(f"<{code}", raw, offset)[0] for name, (offset, code) in layout.items()}
    return {name: _text(value) if isinstance(value, bytes) else value for name, value in values.items()}


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace").rstrip(" \0")


@dataclass(frozen=True, slots=True)
class IdentifyController:
    """What a controller is (CNS 01h)."""

    vid: int
    ssvid: int
    sn: str
    mn: str
    fr: str
    rab: int
    cmic: int
    mdts: int
    cntlid: int
    ver: int
    oaes: int
    oacs: int
    acl: int
    aerl: int
    frmw: int
    lpa: int
    elpe: int
    npss: int
    wctemp: int
    cctemp: int
    kas: int
    sqes: int
    cqes: int
    maxcmd: int
    nn: int
    oncs: int
    fuses: int
    fna: int
    vwc: int
    awun: int
    awupf: int
    sgls: int
    subnqn: str
    raw: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        return cls(**_unpacked(_CONTROLLER, raw), raw=raw)


_CONTROLLER: Layout = {
    "vid": (0, "H"),
    "ssvid": (2, "H"),
    "sn": (4, "20s"),
    "mn": (24, "40s"),
    "fr": (64, "8s"),
    "rab": (72, "B"),
    "cmic": (76, "B"),
    "mdts": (77, "B"),
    "cntlid": (78, "H"),
    "ver": (80, "I"),
    "oaes": (92, "I"),
    "oacs": (256, "H"),
    "acl": (258, "B"),
    "aerl": (259, "B"),
    "frmw": (260, "B"),
    "lpa": (261, "B"),
    "elpe": (262, "B"),
    "npss": (263, "B"),
    "wctemp": (266, "H"),
    "cctemp": (268, "H"),
    "kas": (320, "H"),
    "sqes": (512, "B"),
    "cqes": (513, "B"),
    "maxcmd": (514, "H"),
    "nn": (516, "I"),
    "oncs": (520, "H"),
    "fuses": (522, "H"),
    "fna": (524, "B"),
    "vwc": (525, "B"),
    "awun": (526, "H"),
    "awupf": (528, "H"),
    "sgls": (536, "I"),
    "subnqn": (768, "256s"),
}


@dataclass(frozen=True, slots=True)
class IdentifyNamespace:
    """What a namespace is (CNS 00h). One that is not active is all zeros."""

    nsze: int
    ncap: int
    nuse: int
    nsfeat: int
    nlbaf: int
    flbas: int
    mc: int
    dpc: int
    dps: int
    nmic: int
    dlfeat: int
    nsattr: int
    raw: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        return cls(**_unpacked(_NAMESPACE, raw), raw=raw)

    @property
    def formats(self) -> list[tuple[int, int]]:
        """Each LBA format's bytes of a block, 0 for one that is not there, and of its metadata."""
        entries = struct.unpack_from(f"<{self.nlbaf + 1}I", self.raw, 128)
        return [((1 << shift) * (shift > 0), entry & 0xFFFF) for entry in entries for shift in [entry >> 16 & 0xFF]]

    @property
    def block_size(self) -> int:
        """Bytes of a block, as it is formatted."""
        return self.formats[self.flbas & 0xF][0]


_NAMESPACE: Layout = {
    "nsze": (0, "Q"),
    "ncap": (8, "Q"),
    "nuse": (16, "Q"),
    "nsfeat": (24, "B"),
    "nlbaf": (25, "B"),
    "flbas": (26, "B"),
    "mc": (27, "B"),
    "dpc": (28, "B"),
    "dps": (29, "B"),
    "nmic": (30, "B"),
    "dlfeat": (33, "B"),
    "nsattr": (99, "B"),
}


def namespace_list(raw: bytes) -> list[int]:
    """The NSIDs of a list of them (CNS 02h and 10h, log page 04h), which ends with a zero or with its space."""
    numbers = struct.unpack(f"<{len(raw) // 4}I", raw)
    return list(numbers[: numbers.index(0)] if 0 in numbers else numbers)


def namespace_descriptors(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Each descriptor of a namespace (CNS 03h): its type (1: EUI64, 2: NGUID, 3: UUID) and the identifier."""
    at = 0
    while at + 4 <= len(raw) and raw[at]:
        kind, length = raw[at], raw[at + 1]
        yield kind, raw[at + 4 : at + 4 + length]
        at += 4 + length


@dataclass(frozen=True, slots=True)
class Event:
    """An asynchronous event: what it is (an :class:`AsyncEvent`, if it is known), and the log page that tells more."""

    what: int
    log_page: int

    @classmethod
    def parse(cls, result: int) -> Self:
        """From DW0 of the completion (figure 146)."""
        number = result >> 8 & 0xFF, result & 7
        return cls(number[0] << 8 | number[1], result >> 16 & 0xFF)

    @property
    def name(self) -> str:
        known = {int(event): event.name for event in AsyncEvent}
        return known.get(self.what, f"event {self.what:#06x}")
