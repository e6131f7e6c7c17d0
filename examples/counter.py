"""Counts. Boot a Linux that rings it twice by fives and reads the count, 0xa:

vfio-user serve ./examples/counter.py:Counter --run 'vfio-user guest bar0 w32:0x4=5 w32:0x8=1 w32:0x8=1 r32:0x0'
"""

from vfio_user import Bar, Device, register


class Counter(Device):
    vendor_id, device_id, msix_vectors = 0x494F, 0x0DC8, 1
    bars = {0: Bar(0x1000)}

    count = register(0x0)  # a guest reads it; zeroed by a reset, carried along by a live migration
    step = register(0x4, reset=1, writable=0xFFFF)
    bell = register(0x8, strobe=0xFFFFFFFF)  # reads 0: any write rings it

    @bell.on_write
    def ring(self, old: int, new: int) -> None:
        self.count = (self.count + self.step) % 2**32
        self.irq.trigger()
