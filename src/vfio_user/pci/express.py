"""What makes a function a PCI Express one: the endpoint's capability, and extended capabilities behind 0x100.

Source: PCI Express base specification 4.0, sections 7.5.3 (PCI Express capability), 7.8.4 (advanced error reporting),
7.9.3 (device serial number) and 7.9.5 (vendor-specific); ``linux/pci_regs.h``.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfio_user.pci.capabilities import Capability, ExtendedCapability, body_register
from vfio_user.pci.registers import Register

INITIATE_FLR = 1 << 15
"""Of device control: writing one resets the function; it always reads 0."""

TRANSACTIONS_PENDING = 1 << 5
"""Of device status: requests of the function's own are under way."""

_ROLE_BASED_ERRORS, _FLR_CAPABLE = 1 << 15, 1 << 28
_LINK = 0x11
"""One lane, 2.5 GT/s: speed in bits 3:0, width from bit 4 on."""


class PcieEndpoint(Capability):
    """A PCI Express endpoint: config space has 4096 bytes. With ``flr`` a guest can reset the function alone.

    Of the link there is what software expects to find of one lane at 2.5 GT/s. The device writes error bits
    into ``pcie.device_status`` itself.
    """

    def __init__(self, *, flr: bool = True) -> None:
        super().__init__(0x10, 0x3C, "pcie")
        self.flr = flr

    def registers(self) -> Sequence[Register]:
        return (
            Register(0x02, 2, "capabilities", reset=2),  # version 2, type 0: endpoint
            Register(0x04, 4, "device_capabilities", reset=_ROLE_BASED_ERRORS | _FLR_CAPABLE * self.flr),
            # relaxed ordering, no snoop, reads of 512 bytes; all but phantom functions, extended tags and aux power
            Register(0x08, 2, "device_control", 0x2810, writable=0x78FF, strobe=INITIATE_FLR * self.flr),
            Register(0x0A, 2, "device_status", w1c=0xF, driven=TRANSACTIONS_PENDING),
            Register(0x0C, 4, "link_capabilities", reset=_LINK),
            Register(0x10, 2, "link_control", writable=0xCB),  # ASPM, read completion boundary, clock, sync
            Register(0x12, 2, "link_status", reset=_LINK),
            Register(0x24, 4, "device_capabilities_2", reset=1 << 4),  # completion timeout disable
            Register(0x28, 2, "device_control_2", writable=1 << 4),
            Register(0x2A, 2, "device_status_2"),
            Register(0x2C, 4, "link_capabilities_2", reset=1 << 1),  # speeds: 2.5 GT/s
            Register(0x30, 2, "link_control_2", reset=1, writable=0xF),  # target speed
            Register(0x32, 2, "link_status_2"),
        )


class DeviceSerialNumber(ExtendedCapability):
    """An EUI-64 that tells one board from another; ``serial``: 64 bits."""

    def __init__(self, serial: int) -> None:
        super().__init__(0x03, 1, 12, "serial")
        self.serial = serial

    def registers(self) -> Sequence[Register]:
        return (Register(4, 8, "number", self.serial),)


class AdvancedErrorReporting(ExtendedCapability):
    """The registers of advanced error reporting, with their masks and severities; the device sets the status bits."""

    def __init__(self) -> None:
        super().__init__(0x01, 2, 0x48, "aer")

    def registers(self) -> Sequence[Register]:
        uncorrectable, correctable = 0x007FF030, 0x0000F1C1
        return (
            Register(0x04, 4, "uncorrectable_status", w1c=uncorrectable),
            Register(0x08, 4, "uncorrectable_mask", 0x00400000, writable=uncorrectable),
            Register(0x0C, 4, "uncorrectable_severity", 0x00462030, writable=uncorrectable),
            Register(0x10, 4, "correctable_status", w1c=correctable),
            Register(0x14, 4, "correctable_mask", 0x0000E000, writable=correctable),
            Register(0x18, 4, "control", driven=0x1F),  # which error came first
            *(Register(0x1C + 4 * n, 4, f"header_log_{n}", driven=0xFFFF_FFFF) for n in range(4)),
        )


class VendorSpecificExtended(ExtendedCapability):
    """A vendor's own structure (VSEC): ``id`` (16 bits), ``revision`` (4 bits) and ``body``.

    A guest changes those bits of the body that are in ``writable``, a mask of as many bytes; it stands in config space
    as one register, ``NAME.body``.
    """

    def __init__(self, id: int, revision: int, body: bytes, writable: bytes = b"", *, name: str = "vsec") -> None:
        super().__init__(0x0B, 1, 8 + len(body), name)
        if not 0 <= id <= 0xFFFF or not 0 <= revision <= 0xF:
            raise ValueError(f"{name!r}: an id of 16 bits and a revision of 4, not {id:#x} and {revision:#x}")
        header = id | revision << 16 | self.length << 20
        self._registers = [Register(4, 4, "vendor_header", header), *body_register(8, body, writable)]

    def registers(self) -> Sequence[Register]:
        return self._registers
