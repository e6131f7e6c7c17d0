"""A device with 1 MiB of state, for the row on downtime."""

from vfio_user import Device, state

SIZE = 1 << 20


class BigState(Device):
    vendor_id, device_id = 0x494F, 0xB165
    content = state(bytearray(b"\xa5" * SIZE))
