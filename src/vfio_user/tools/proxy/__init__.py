"""A server in front of another one: it gives a device that is served elsewhere a control socket (docs/proxy.md)."""

from vfio_user.tools.proxy.backend import ProxyBackend

__all__ = ["ProxyBackend"]
