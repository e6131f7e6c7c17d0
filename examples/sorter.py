r"""Sorts numbers in memory of its own, which the guest maps: writing them costs the device no message.

vfio-user serve ./examples/sorter.py:Sorter --run 'vfio-user guest bar0 \
    w32:0x1000=30 w32:0x1004=10 w32:0x1008=20 w32:0x0=3 r32:0x1000 r32:0x1004 r32:0x1008'
"""

from array import array

from vfio_user import Bar, Device, register

NUMBERS = 0x1000  # where they begin; the page before is trapped, as registers must be


class Sorter(Device):
    vendor_id, device_id, msix_vectors = 0x494F, 0x5057, 1
    bars = {0: Bar(0x10000, memory=True, trapped=((0, NUMBERS),))}

    count = register(0x0, writable=0x3FFF)

    @count.on_write
    def sort(self, old: int, new: int) -> None:
        numbers = self.memory[0][NUMBERS:].cast("I")[:new]
        numbers[:] = array("I", sorted(numbers))
        self.irq.trigger()
