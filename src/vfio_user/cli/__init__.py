"""The command ``vfio-user``: the only place that prints."""
