"""Sockets: messages with file descriptors over AF_UNIX, blocking (``blocking``) and asyncio (``aio``)."""
