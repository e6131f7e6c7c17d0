"""What a PCI function is made of: registers, config space, capabilities, BARs, interrupts."""

from vfio_user.pci.bars import Bar
from vfio_user.pci.capabilities import Capability, ExtendedCapability, VendorSpecific
from vfio_user.pci.config_space import ConfigSpace, PciCommand, PciStatus
from vfio_user.pci.express import AdvancedErrorReporting, DeviceSerialNumber, PcieEndpoint, VendorSpecificExtended
from vfio_user.pci.interrupts import Interrupts, InterruptState
from vfio_user.pci.msi import MsiCapability, MsixCapability, MsixTable
from vfio_user.pci.power import PowerManagement
from vfio_user.pci.registers import Register, RegisterFile

__all__ = [
    "AdvancedErrorReporting",
    "Bar",
    "Capability",
    "ConfigSpace",
    "DeviceSerialNumber",
    "ExtendedCapability",
    "InterruptState",
    "Interrupts",
    "MsiCapability",
    "MsixCapability",
    "MsixTable",
    "PciCommand",
    "PciStatus",
    "PcieEndpoint",
    "PowerManagement",
    "Register",
    "RegisterFile",
    "VendorSpecific",
    "VendorSpecificExtended",
]
