"""What a PCI function is made of: registers, config space, capabilities, BARs, interrupts."""

from vfio_user.pci.bars import Bar, MsixTable
from vfio_user.pci.capabilities import Capability, MsiCapability, MsixCapability
from vfio_user.pci.config_space import ConfigSpace, PciCommand, PciStatus
from vfio_user.pci.interrupts import Interrupts, InterruptState
from vfio_user.pci.registers import Register, RegisterFile

__all__ = [
    "Bar",
    "Capability",
    "ConfigSpace",
    "InterruptState",
    "Interrupts",
    "MsiCapability",
    "MsixCapability",
    "MsixTable",
    "PciCommand",
    "PciStatus",
    "Register",
    "RegisterFile",
]
