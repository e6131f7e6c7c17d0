"""A PCI device as a class.

::

    class Counter(Device):
        vendor_id, device_id, msix_vectors = 0x494F, 0x0DC8, 1
        bars = {0: Bar(0x1000)}
        count = state(0)

        def bar_read(self, bar, offset, data):
            data[:] = self.count.to_bytes(8, "little")[: len(data)].ljust(len(data), b"\\0")

        def bar_write(self, bar, offset, data):
            self.count += 1
            self.irq.trigger(0)

What a class declares, :class:`Device` turns into config space, regions, interrupts and a migration stream. A
subclass says what the device does, and asks for what is special: ``save``, ``load``, ``pre_copy``, ``quiesce``.
"""

from vfio_user.device.declarations import Option, State, option, parse_size, state
from vfio_user.device.device import Device
from vfio_user.device.registers import BarRegister, register
from vfio_user.pci.bars import Bar

__all__ = ["Bar", "BarRegister", "Device", "Option", "State", "option", "parse_size", "register", "state"]
