"""Benchmarks: the server and the hot structures of vfio_user next to what C does for the same bytes."""
