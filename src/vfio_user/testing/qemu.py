"""A QEMU process with vfio-user devices: found, started, spoken to by QMP, and ended.

What :mod:`~vfio_user.testing.qtest` (a machine without a guest) and :mod:`~vfio_user.testing.linux` (one that runs
Linux) have in common.

Sources: QEMU's ``docs/interop/qmp-spec`` (QMP) and ``qapi/qdev.json`` (plugging).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vfio_user.errors import VfioUserError
from vfio_user.fds import OwnedFd

BINARY = "qemu-system-x86_64"
DEVICE = "vfio-user-pci"
CHUNK = 64 * 1024

PluggedDevice = str | Path | Mapping[str, Any]
"""The socket path of a server, or properties of vfio-user-pci with the socket path as ``socket``."""


class QemuError(VfioUserError):
    """QEMU died, could not be started, or refused what the test asked; its stderr is in the message."""


class QemuTimeoutError(QemuError, TimeoutError):
    """What was waited for did not happen in time."""


class QmpError(QemuError):
    """QEMU answered a QMP command with an error; ``kind`` is its error class, such as ``CommandNotFound``."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QMP {command}: {kind}: {description}")
        self.kind = kind


def find_qemu() -> Path | None:
    """A QEMU that has the vfio-user-pci device, or None.

    Looked for in the environment variable ``VFIO_USER_QEMU``, as ``.qemu/qemu-system-x86_64`` (what
    ``scripts/fetch_qemu.py`` makes) in the current directory or one above it, and on PATH. Raises
    :class:`QemuError` when the variable names something that cannot be executed: a wish that is not met must
    not pass for no wish.
    """
    wished = os.environ.get("VFIO_USER_QEMU")
    if wished:
        return _executable(wished)
    for fetched in fetched_paths(BINARY):
        if os.access(fetched, os.X_OK):
            return fetched
    system = shutil.which(BINARY)
    return Path(system) if system and _has_device(system) else None


def fetched_paths(name: str) -> list[Path]:
    """Where something that ``scripts/fetch_qemu.py`` makes can be, seen from the current directory."""
    here = Path.cwd()
    return [folder / ".qemu" / name for folder in (here, *here.parents)]


def _executable(name: str) -> Path:
    path = shutil.which(name)
    if path is None:
        raise QemuError(f"VFIO_USER_QEMU={name} is not an executable")
    return Path(path)


def _has_device(qemu: str) -> bool:
    command = [qemu, "-machine", "none", "-device", "help"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return f'"{DEVICE}"' in listing


def device_properties(device: PluggedDevice, **properties: Any) -> dict[str, Any]:
    """What ``-device`` and ``device_add`` take for a device; its own properties win over ``properties``."""
    own = device if isinstance(device, Mapping) else {"socket": device}
    address = {"type": "unix", "path": str(own["socket"])}
    return {**properties, **own, "driver": DEVICE, "socket": address}


class QemuMachine:
    """A QEMU process, its stderr and its QMP connection; a context manager.

    ``arguments`` say what the machine is. ``channels`` are connections besides QMP, each a chardev by its name and
    the option that takes it, such as ``{"qtest": "-qtest"}``; they are in ``channels`` by name. ``timeout`` in seconds
    bounds every wait for an answer of QEMU's.

    Any call raises :class:`QemuError` when QEMU dies and :class:`QemuTimeoutError` when it does not answer; the
    machine is closed then. QMP events that nobody took yet are kept in ``events``.
    """

    def __init__(
        self,
        qemu: str | Path,
        arguments: Sequence[str],
        *,
        channels: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        timeout: float = 10.0,
    ) -> None:
        self.timeout = timeout
        self.events: deque[dict[str, Any]] = deque()
        self._errors = Output()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as their_ends:
            undo.enter_context(self._errors)
            self._channels: dict[str, Lines] = {}
            command, fds = [str(qemu), *arguments], list(pass_fds)
            for name, option in {**(channels or {}), "QMP": "-qmp"}.items():
                ours, theirs = socket.socketpair()
                undo.enter_context(ours)
                their_ends.enter_context(theirs)
                self._channels[name] = Lines(ours, name)
                # Inherited descriptors: no paths to clean up, and QEMU's death ends the connections.
                command += ["-chardev", f"socket,id={name},fd={theirs.fileno()}", option, f"chardev:{name}"]
                fds.append(theirs.fileno())
            self._process = _spawn(command, fds, self._errors.fileno())
            self._undo = undo.pop_all()
        try:
            self._greet()
        except BaseException:
            self._dispose()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._dispose()  # what went wrong first is what the reader must see

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What QEMU wrote to its stderr so far; all of it, once the machine is closed."""
        return self._errors.text

    def close(self) -> None:
        """Have QEMU quit, and wait for that; closing twice is fine.

        Raises :class:`QemuError` when it dies instead, :class:`QemuTimeoutError` when it has to be killed.
        """
        if self._errors.closed:
            return
        self.qmp("quit")
        try:
            status = self._process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise self._fatal(f"QMP quit: not within {self.timeout} s", QemuTimeoutError) from None
        if status:
            raise self._fatal("QMP quit")
        self._dispose()

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """Execute a QMP command; returns what it returns. Raises :class:`QmpError` when QEMU refuses."""
        what, deadline = f"QMP {command}", Deadline(self.timeout)
        self._send("QMP", json.dumps({"execute": command, "arguments": arguments}), what, deadline)
        while True:
            answer = self._receive_qmp(what, deadline, fatal=True)
            if "error" in answer:
                raise QmpError(command, answer["error"]["class"], answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def wait_event(self, name: str, timeout: float | None = None, **data: Any) -> dict[str, Any]:
        """The oldest QMP event of this name, and with this in its data, that was not taken yet.

        Waits for one if there is none. Raises :class:`QemuTimeoutError` when none comes; the machine goes on.
        """
        deadline = Deadline(self.timeout if timeout is None else timeout)
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    self.events.remove(event)
                    return event
            self._receive_qmp(f"QMP event {name}", deadline, fatal=False)

    # For subclasses

    def _greet(self) -> None:
        """Begin to talk: after this the machine is usable."""
        self._receive_qmp("QMP greeting", Deadline(self.timeout), fatal=True)
        self.qmp("qmp_capabilities")

    def _receive_qmp(self, what: str, deadline: Deadline, *, fatal: bool) -> dict[str, Any]:
        """The next QMP message; an event is also kept in ``events``."""
        message: dict[str, Any] = json.loads(self._receive("QMP", what, deadline, fatal=fatal))
        if "event" in message:
            self.events.append(message)
        return message

    def _send(self, channel: str, line: str, what: str, deadline: Deadline) -> None:
        try:
            self._channels[channel].send(line, deadline)
        except TimeoutError:
            raise self._fatal(f"{what}: not taken within {deadline.seconds} s", QemuTimeoutError) from None
        except OSError as error:
            raise self._fatal(f"{what}: {error}", grace=self.timeout) from error

    def _receive(self, channel: str, what: str, deadline: Deadline, *, fatal: bool = True) -> str:
        """The next line; ``fatal``: if it does not come in time, no later answer could be told from it."""
        with self._receiving(what, deadline, fatal=fatal):
            return self._channels[channel].receive(deadline)

    def _receive_bytes(self, channel: str, size: int, what: str, deadline: Deadline) -> bytes:
        """The next ``size`` bytes."""
        with self._receiving(what, deadline, fatal=True):
            return self._channels[channel].take(size, deadline)

    @contextlib.contextmanager
    def _receiving(self, what: str, deadline: Deadline, *, fatal: bool) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            late = f"{what}: not within {deadline.seconds} s"
            raise (self._fatal if fatal else self._error)(late, QemuTimeoutError) from None
        except OSError as error:
            raise self._fatal(f"{what}: {error}", grace=self.timeout) from error

    def _report(self) -> str:
        """What to show with any error."""
        return f"QEMU's stderr: {self.stderr or 'empty'}"

    def _error(self, message: str, kind: type[QemuError] = QemuError) -> QemuError:
        return kind(f"{message}\n{self._report()}")

    def _fatal(self, message: str, kind: type[QemuError] = QemuError, *, grace: float = 0) -> QemuError:
        """An error after which the machine is closed, with how QEMU ended."""
        return self._error(f"{message} (QEMU: {self._dispose(grace)})", kind)

    def _dispose(self, grace: float = 0) -> str:
        """Let go of everything; kill QEMU if it does not end within ``grace`` seconds. Returns how it ended."""
        try:
            end = _how_it_ended(self._process.wait(grace))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()  # it ends, however busy the machine is
            end = "killed"
        self._undo.close()
        return end


def _how_it_ended(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.strsignal(-status) or f"signal {-status}"


def _spawn(command: list[str], fds: Sequence[int], stderr: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=fds
        )
    except OSError as error:
        raise QemuError(f"{command[0]} does not start: {error}") from error


class Output:
    """A file without a name that another process writes text to; a context manager. The text outlives it."""

    def __init__(self) -> None:
        fd, path = tempfile.mkstemp()
        os.unlink(path)
        self._file = OwnedFd(fd)
        self._last_words = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._last_words = self.text
        self._file.close()

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    @property
    def closed(self) -> bool:
        """Whether nobody looks for more."""
        return self._file.closed

    @property
    def text(self) -> str:
        """What was written so far; all of it, once this is closed."""
        if self._file.closed:
            return self._last_words
        size = os.fstat(self.fileno()).st_size
        # pread: the writer may share the file offset, which must not be moved.
        return os.pread(self.fileno(), size, 0).decode(errors="replace").replace("\r\n", "\n").strip()


class Deadline:
    """A moment ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._moment = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self._moment

    def arm(self, sock: socket.socket) -> None:
        """Give the next operation on a socket what is left of the time."""
        left = self._moment - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)


class Lines:
    """Lines of text over a stream socket, each way, and bytes in between."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._socket = sock
        self._name = name
        self._pending = bytearray()

    def send(self, line: str, deadline: Deadline) -> None:
        """Send a line."""
        deadline.arm(self._socket)
        self._socket.sendall(line.encode() + b"\n")

    def receive(self, deadline: Deadline) -> str:
        """The next line without its end; ConnectionError when no more will come."""
        while (end := self._pending.find(b"\n")) < 0:
            self._fill(deadline)
        return self._cut(end + 1).decode(errors="replace").rstrip("\r\n")

    def take(self, size: int, deadline: Deadline) -> bytes:
        """The next ``size`` bytes, whatever they are; ConnectionError when no more will come."""
        while len(self._pending) < size:
            self._fill(deadline)
        return self._cut(size)

    def _fill(self, deadline: Deadline) -> None:
        deadline.arm(self._socket)
        more = self._socket.recv(CHUNK)
        if not more:
            raise ConnectionError(f"QEMU closed its {self._name} connection")
        self._pending += more

    def _cut(self, size: int) -> bytes:
        taken = bytes(self._pending[:size])
        del self._pending[:size]
        return taken
