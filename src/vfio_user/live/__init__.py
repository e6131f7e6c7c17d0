"""The VMM's side of a live migration."""

from vfio_user.live.engine import Migration, Report, Round, Step
from vfio_user.live.memory import MemoryCopy, MemoryRegion

__all__ = ["MemoryCopy", "MemoryRegion", "Migration", "Report", "Round", "Step"]
