"""Counts what is written to it. Serve it with

vfio-user serve ./examples/counter.py:Counter --socket-path /tmp/counter.sock
"""

from vfio_user import Bar, Device, state


class Counter(Device):
    vendor_id, device_id, msix_vectors = 0x494F, 0x0DC8, 1
    bars = {0: Bar(0x1000)}
    count = state(0)  # saved and restored by a live migration, zeroed by a reset

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        data[:] = self.count.to_bytes(8, "little")[: len(data)].ljust(len(data), b"\0")

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        self.count += 1
        self.irq.trigger(0)
