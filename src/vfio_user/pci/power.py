"""The power management capability.

Source: PCI Bus Power Management Interface specification 1.2, section 3.2; ``linux/pci_regs.h`` (PCI_PM_*).
"""

from __future__ import annotations

from collections.abc import Sequence

from vfio_user.pci.capabilities import Capability
from vfio_user.pci.registers import Register

D0, D3HOT = 0, 3
"""The power states that every function with the capability has; D1 and D2 are optional, and not here."""
POWER_STATE = 0b11

_VERSION = 3
_NO_SOFT_RESET = 1 << 3


class PowerManagement(Capability):
    """D0 and D3hot, no wake-up events. The function comes back from D3hot as it was: nothing is reset."""

    def __init__(self) -> None:
        super().__init__(0x01, 8, "pm")

    def registers(self) -> Sequence[Register]:
        return (
            Register(2, 2, "capabilities", _VERSION),
            Register(4, 2, "control", _NO_SOFT_RESET, writable=POWER_STATE),
        )
