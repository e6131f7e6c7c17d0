"""Sums up guest memory by DMA: write an address to 0x0, a length to 0x8, read the CRC-32 at 0x10 after the interrupt.

vfio-user serve ./examples/checksum.py:Checksum --socket-path /tmp/checksum.sock
"""

from zlib import crc32

from vfio_user import Bar, Device, option, state

ADDRESS, LENGTH, RESULT = 0x0, 0x8, 0x10


class Checksum(Device):
    vendor_id, device_id, intx = 0x494F, 0x0C5C, True
    bars = {0: Bar(0x1000)}
    limit = option(1 << 20, "most bytes that are summed up at once")
    address = state(0)
    result = state(0)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        value = self.result if offset == RESULT else self.address if offset == ADDRESS else 0
        data[:] = value.to_bytes(8, "little")[: len(data)].ljust(len(data), b"\0")

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        value = int.from_bytes(data[:8], "little")
        if offset == ADDRESS:
            self.address = value
        elif offset == LENGTH:  # reply first, DMA after: the client may be needed for it
            self.defer(lambda: self.sum_up(min(value, self.limit)))

    def sum_up(self, length: int) -> None:
        self.result = crc32(self.dma.read(self.address, length))
        self.irq.trigger()
