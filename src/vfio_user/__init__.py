"""vfio-user for Python."""
