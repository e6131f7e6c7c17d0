r"""Sums up guest memory by DMA, and says by MSI-X when it is done. A Linux has it sum up a page, behind an IOMMU:

vfio-user serve ./examples/checksum.py:Checksum --run 'vfio-user guest --iommu drive \
    "map 0x100000 0x1000" "fill 0x100000 0x1000 1" "irq msix 0 1" "write 0 0x0 8 0x100000" "write 0 0x8 4 0x1000" \
    "wait msix 0" "read 0 0xc 4" interrupts'
"""

from zlib import crc32

from vfio_user import Bar, Device, option, register
from vfio_user.pci import PcieEndpoint, PowerManagement


class Checksum(Device):
    vendor_id, device_id, class_code, msix_vectors = 0x494F, 0x0C5C, 0x120000, 1
    capabilities = (PowerManagement(), PcieEndpoint())  # D3hot, and a guest can reset it alone
    bars = {0: Bar(0x1000)}

    limit = option(1 << 20, "most bytes that are summed up at once")
    address = register(0x0, width=8, writable=2**64 - 1)
    length = register(0x8, writable=2**32 - 1)
    result = register(0xC)

    @length.on_write
    def start(self, old: int, new: int) -> None:
        self.defer(self.sum_up)  # reply first, DMA after: the client may be needed for it

    def sum_up(self) -> None:
        self.result = crc32(self.dma.read(self.address, min(self.length, self.limit)))
        self.irq.trigger()
