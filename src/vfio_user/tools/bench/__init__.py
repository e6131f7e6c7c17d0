"""How fast a server answers: latencies and throughputs, of one or of two in turns."""

from vfio_user.tools.bench.cores import pinned
from vfio_user.tools.bench.engine import Report, Result, Settings, run
from vfio_user.tools.bench.link import Link
from vfio_user.tools.bench.measures import Choice, Measure, plan
from vfio_user.tools.bench.picture import picture

__all__ = ["Choice", "Link", "Measure", "Report", "Result", "Settings", "picture", "pinned", "plan", "run"]
