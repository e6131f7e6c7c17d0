"""``python -m vfio_user`` is the command ``vfio-user``."""

from vfio_user.cli.main import main

main()
