"""An NVMe controller: a disk that a guest uses, and that migrates while it does.

Source: NVM Express Base Specification 1.4, by whose sections the modules are commented.
"""

from vfio_user.devices.nvme.controller import Nvme

__all__ = ["Nvme"]
