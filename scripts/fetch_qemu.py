#!/usr/bin/env python3
"""Fetch a QEMU with the vfio-user-pci device into ``.qemu/``: no root, nothing of the system is touched.

With ``--guest`` a Linux kernel and busybox for it, too, and with ``--guest-tools`` what that guest needs to use a disk
(mkfs.ext4, e2fsck, nvme); with ``--lspci`` the lspci that reads what a guest saw, with ``--sshd`` an sshd for what goes
from host to host, with ``--tshark`` what reads our captures.

QEMU 11.1 and everything it needs, down to the C library, comes as Debian packages from the mirror that this
machine's own apt already uses. The packages are only unpacked, never installed. ``.qemu/qemu-system-x86_64``
is a wrapper that runs the result with the unpacked loader, so it does not matter how old the C library of
this machine is. The wrapper is written last: where it is, the fetch is whole. What is there stays, what is missing
is fetched; remove ``.qemu`` to fetch all anew.

Where the PATH already has a qemu-system-x86_64 that knows the device (10.1 and later), that one is used.

Exit status: 0 when there is a QEMU, 1 with one line on stderr when there is none to be had.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent / ".qemu"
BINARY = "qemu-system-x86_64"
DEVICE = "vfio-user-pci"

RELEASE, BACKPORTS = "trixie", "trixie-backports"
DEBIAN_SUITE = re.compile(
    r"(bullseye|bookworm|trixie|forky|duke|sid|oldoldstable|oldstable|stable|testing|unstable)(-updates|-backports)?"
)
INDEX_URI = re.compile(r"^'(?P<mirror>[^']+?)/dists/(?P<suite>[^/']+)/main/binary-", re.MULTILINE)
KEYRINGS = [Path(f"/usr/share/keyrings/debian-archive-keyring.{suffix}") for suffix in ("pgp", "gpg")]

# A whole private apt. An empty dpkg status makes it fetch the closure; #clear keeps the hooks of this machine
# from running; proxies, credentials and certificates of this machine still hold.
APT_CONF = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Default-Release;
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Debug::NoLocking "true";
Dir::Cache "{apt}/cache";
Dir::Log "{apt}/log";
Dir::State "{apt}/state";
Dir::State::status "{apt}/status";
"""
PRIVATE_SOURCES = """\
Dir::Etc::SourceList "{apt}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
"""
GUEST_TOOLS = ("e2fsprogs", "nvme-cli")
PRIVATE_DIRECTORIES = ("cache/archives/partial", "state/lists/partial", "log")

WRAPPER = """\
#!/bin/sh
# The unpacked program with its own loader and libraries, all found from where this file is: the tree may move.
root=$(dirname -- "$(readlink -f -- "$0")")/{root}
libraries=$root/{libraries}
export QEMU_MODULE_DIR="$libraries/qemu"
{before}exec "$root/{loader}" --library-path "$libraries" --argv0 {argv0} "$root/{program}" {options} "$@"
"""
PROGRAMS = ("usr/bin", "usr/sbin", "usr/lib/openssh")
"""Where a package has what is to be wrapped."""
QEMU_OPTIONS = '-L "$root/usr/share/qemu" -L "$root/usr/share/seabios"'
LSPCI_OPTIONS = '-i "$root/usr/share/misc/pci.ids"'
SSHD_HELPERS = ("sshd-session", "sshd-auth")
SSHD_OPTIONS = '-o SshdSessionPath="$root/../sshd-session" -o SshdAuthPath="$root/../sshd-auth"'
# Run by root it wants a user and a folder: here they are, for itself and what it starts alone.
SSHD_ROOM = """\
if [ "$(id -u)" = 0 ] && ! { [ -d /run/sshd ] && grep -q ^sshd: /etc/passwd; }; then
    exec unshare --mount sh -c 'mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/sshd &&
        cp /etc/passwd /run/passwd && echo sshd:x:65534:65534::/run/sshd:/bin/false >>/run/passwd &&
        mount --bind /run/passwd /etc/passwd && exec "$@"' sh "$(readlink -f -- "$0")" "$@"
fi
"""
TSHARK_SCRIPTS = "wireshark/plugins/init.lua"
"""Beside its libraries; what is in it, lets root's Wireshark load the scripts that it is told to."""


class FetchError(Exception):
    """QEMU cannot be had; the message says why in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch a QEMU with the vfio-user-pci device into .qemu/.")
    parser.add_argument("--print", action="store_true", help="fetch nothing: print the path of the QEMU that is there")
    parser.add_argument("--guest", action="store_true", help="also fetch a Linux kernel and busybox into .qemu/guest/")
    parser.add_argument("--guest-tools", action="store_true", help="also fetch mkfs.ext4, e2fsck and nvme for it")
    parser.add_argument("--lspci", action="store_true", help="also fetch .qemu/lspci")
    parser.add_argument("--sshd", action="store_true", help="also fetch .qemu/sshd, OpenSSH's")
    parser.add_argument("--tshark", action="store_true", help="also fetch .qemu/tshark, Wireshark's")
    parser.add_argument("--mirror", metavar="URI", help="Debian mirror (default: those of this machine's apt)")
    options = parser.parse_args(arguments)
    wanted = [name for name in FETCHERS if name == BINARY or vars(options)[name.replace("-", "_")]]
    try:
        if not options.print:
            ensure(wanted, options.mirror)
        qemu = present()
    except (FetchError, OSError) as error:
        print(f"fetch_qemu: {error}", file=sys.stderr)
        return 1
    if qemu is None:
        print(f"fetch_qemu: no QEMU with {DEVICE} here; run this without --print", file=sys.stderr)
        return 1
    print(qemu)
    return 0


def present() -> Path | None:
    """The QEMU that is there without fetching: the fetched one, else one on PATH that has the device."""
    if os.access(HOME / BINARY, os.X_OK):
        return HOME / BINARY
    system = shutil.which(BINARY)
    return Path(system) if system and has_device(Path(system)) else None


def has_device(qemu: Path) -> bool:
    """Whether this QEMU starts and lists the vfio-user-pci device."""
    try:
        listing = run(qemu, "-machine", "none", "-device", "help", timeout=30)
    except FetchError:
        return False
    return f'"{DEVICE}"' in listing


def ensure(wanted: Sequence[str], mirror: str | None) -> None:
    """Fetch what is wanted, of the names in FETCHERS, and not there."""
    if not missing(wanted):
        return
    with only_one():
        names = missing(wanted)  # another process may have fetched some while this one waited
        if names:
            with private_apt(mirror) as apt:
                for name in names:
                    FETCHERS[name](apt)


def missing(wanted: Sequence[str]) -> list[str]:
    """What of it is not there."""
    return [name for name in wanted if not (present() if name == BINARY else (HOME / name).exists())]


def fetch_qemu(apt: Apt) -> None:
    """Unpack QEMU with its closure and, once it is seen to work, put the wrapper in place."""
    say("fetching QEMU and what it needs")
    # -t and not package/suite: the dependencies must come from backports, too.
    apt.get("install", "--yes", "--download-only", "--target-release", BACKPORTS, "qemu-system-x86")
    root = HOME / "root"
    unpack(apt.packages(), root)
    wrap(BINARY, root, QEMU_OPTIONS, has_device, f"does not start, or does not have {DEVICE}")


def fetch_guest(apt: Apt) -> None:
    """Unpack the kernel that Debian's cloud images run, and busybox: the guest needs nothing else."""
    say("fetching a guest's kernel and busybox")
    architecture = run("dpkg", "--print-architecture").strip()
    meta = apt.cache("depends", f"linux-image-cloud-{architecture}")
    kernel = re.search(r"Depends: (linux-image-\d\S+)", meta)
    if kernel is None:
        raise FetchError(f"linux-image-cloud-{architecture} depends on no kernel")
    apt.get("download", kernel[1], "busybox-static")
    partial = HOME / "guest.new"
    unpack(apt.packages(), partial)
    partial.replace(HOME / "guest")


def fetch_guest_tools(apt: Apt) -> None:
    """Unpack what makes, checks and looks into a disk, with its closure; the tests put the few files they use in."""
    say("fetching tools for the guest")
    apt.get("install", "--yes", "--download-only", *GUEST_TOOLS)
    partial = HOME / "guest-tools.new"
    unpack(apt.packages(), partial)
    partial.replace(HOME / "guest-tools")


def fetch_lspci(apt: Apt) -> None:
    """Unpack lspci with its closure and, once it is seen to work, put the wrapper in place."""
    say("fetching lspci")
    apt.get("install", "--yes", "--download-only", "pciutils")
    root = HOME / "pciutils"
    unpack(apt.packages(), root)
    wrap("lspci", root, LSPCI_OPTIONS, reads_dumps, "does not start")


def fetch_sshd(apt: Apt) -> None:
    """Unpack sshd with its closure and, once it is seen to work, put the wrappers of its three programs in place."""
    say("fetching sshd")
    apt.get("install", "--yes", "--download-only", "openssh-server")
    root = HOME / "openssh"
    unpack(apt.packages(), root)
    for helper in SSHD_HELPERS:
        wrap(helper, root, "", Path.exists, "is not there")
    wrap("sshd", root, SSHD_OPTIONS, says_its_version, "does not start", before=SSHD_ROOM)


def fetch_tshark(apt: Apt) -> None:
    """Unpack tshark with its closure and, once it is seen to work, put the wrapper in place.

    It looks for its data from where the running program is, which is the loader: so that is put beside it.
    """
    say("fetching tshark")
    apt.get("install", "--yes", "--download-only", "tshark")
    root = HOME / "wireshark"
    unpack(apt.packages(), root)
    loader = loader_in(root)
    (loader.parent / TSHARK_SCRIPTS).write_text("run_user_scripts_when_superuser = true\n", encoding="utf-8")
    beside = root / "usr/bin" / loader.name
    beside.hardlink_to(loader)
    wrap("tshark", root, "", says_its_version, "does not start", loader=beside)


FETCHERS = {
    BINARY: fetch_qemu,
    "guest": fetch_guest,
    "guest-tools": fetch_guest_tools,
    "lspci": fetch_lspci,
    "sshd": fetch_sshd,
    "tshark": fetch_tshark,
}
"""By what they leave in ``.qemu`` when they are done."""


def wrap(
    binary: str,
    root: Path,
    options: str,
    works: Callable[[Path], bool],
    failure: str,
    *,
    before: str = "",
    loader: Path | None = None,
) -> None:
    """Write the wrapper of what was unpacked in ``root``, and put it in place once it is seen to work.

    ``before`` are lines of shell that it begins with; ``loader`` is what runs the program, if not the one in its place.
    """
    wrapper = HOME / f"{binary}.new"
    script = wrapper_script(binary, root, options, before, loader or loader_in(root))
    wrapper.write_text(script, encoding="utf-8")
    wrapper.chmod(0o755)
    if not works(wrapper):
        raise FetchError(f"the {binary} unpacked in {root} {failure}")
    wrapper.replace(HOME / binary)


def reads_dumps(lspci: Path) -> bool:
    """Whether this lspci starts, and finds nothing wrong with a dump of no devices."""
    try:
        run(lspci, "-F", os.devnull, timeout=30)
    except FetchError:
        return False
    return True


def says_its_version(program: Path) -> bool:
    """Whether this program starts."""
    try:
        run(program, "-V" if program.name.startswith("sshd") else "--version", timeout=30)
    except FetchError:
        return False
    return True


def wrapper_script(binary: str, root: Path, options: str, before: str, loader: Path) -> str:
    """The text of the wrapper for what was unpacked in ``root``."""
    program = next((path for folder in PROGRAMS if (root / (path := f"{folder}/{binary}")).exists()), None)
    if program is None:
        raise FetchError(f"no {binary} in {root}")
    return WRAPPER.format(
        root=root.name,
        libraries=loader_in(root).parent.relative_to(root),
        loader=loader.relative_to(root),
        program=program,
        argv0=binary if program.startswith("usr/bin") else f'"$root/{program}"',  # a daemon's must be absolute
        before=before,
        options=options,
    )


def loader_in(root: Path) -> Path:
    """The dynamic loader among what was unpacked in ``root``."""
    loader = next(root.glob("usr/lib/*-linux-*/ld-linux*.so.*"), None)
    if loader is None:
        raise FetchError(f"no dynamic loader in {root}")
    return loader


def unpack(packages: Sequence[Path], root: Path) -> None:
    """Unpack Debian packages into a fresh folder, without the set-id bits that root would get."""
    if not packages:
        raise FetchError("apt downloaded no package")
    say(f"unpacking {len(packages)} packages")
    shutil.rmtree(root, ignore_errors=True)
    for package in packages:
        run("dpkg", "-x", package, root)
        package.unlink()
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))


class Apt:
    """apt with state, cache and sources of its own, all below one folder."""

    def __init__(self, home: Path) -> None:
        self._archives = home / "cache/archives"
        self._conf = home / "apt.conf"
        self._sources = home / "sources.list"
        for name in PRIVATE_DIRECTORIES:
            (home / name).mkdir(parents=True)
        (home / "status").touch()
        self._conf.write_text(APT_CONF.format(apt=home), encoding="utf-8")
        self._private_sources = PRIVATE_SOURCES.format(apt=home)

    def debian_mirrors(self) -> list[str]:
        """The mirrors that serve Debian to this machine, as apt itself reads its .sources and .list files."""
        uris = self.get("update", "--print-uris")
        found = [match["mirror"] for match in INDEX_URI.finditer(uris) if DEBIAN_SUITE.fullmatch(match["suite"])]
        return list(dict.fromkeys(found))

    def use(self, mirror: str) -> None:
        """Take packages from this mirror only, checked against Debian's own keys.

        Where Debian's keyring is not installed, apt's own trusted keys must do.
        """
        keyring = next((path for path in KEYRINGS if path.exists()), None)
        options = f"[signed-by={keyring}] " if keyring else ""
        lines = [f"deb {options}{mirror} {suite} main\n" for suite in (RELEASE, BACKPORTS)]
        self._sources.write_text("".join(lines), encoding="utf-8")
        with self._conf.open("a", encoding="utf-8") as conf:
            conf.write(self._private_sources)
        self.get("update")

    def get(self, *arguments: str) -> str:
        """Run apt-get; what it downloads lands where :meth:`packages` looks."""
        return run("apt-get", "--config-file", self._conf, "--quiet", *arguments, cwd=self._archives)

    def cache(self, *arguments: str) -> str:
        """Run apt-cache."""
        return run("apt-cache", "--config-file", self._conf, *arguments)

    def packages(self) -> list[Path]:
        """What was downloaded."""
        return sorted(self._archives.glob("*.deb"))


@contextmanager
def private_apt(mirror: str | None) -> Iterator[Apt]:
    """An apt in a temporary folder that has the package lists of the first mirror that works."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise FetchError(f"no {tool} on this machine: install QEMU 10.1 or later yourself and put it on PATH")
    with tempfile.TemporaryDirectory(prefix="apt-", dir=HOME) as folder:
        mirrors = [mirror] if mirror else Apt(Path(folder, "asking")).debian_mirrors()
        if not mirrors:
            raise FetchError("apt on this machine has no Debian mirror: name one with --mirror")
        yield first_that_works(mirrors, Path(folder))


def first_that_works(mirrors: Sequence[str], folder: Path) -> Apt:
    """An apt that has the lists of the first mirror that serves what is needed; else the last one's error."""
    failure = FetchError("no mirror")
    for number, mirror in enumerate(mirrors):
        apt = Apt(folder / str(number))
        try:
            apt.use(mirror)
        except FetchError as error:
            failure = error
        else:
            return apt
    raise failure


@contextmanager
def only_one() -> Iterator[None]:
    """Keep two of us from fetching into the same folder at the same time."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(*command: str | Path, cwd: Path | None = None, timeout: float = 600) -> str:
    """The standard output of a command; its own last error line if it fails."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    shown = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"{shown}: {error}") from error
    if done.returncode:
        raise FetchError(f"{shown}: {error_line(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def error_line(stderr: str) -> str:
    """The line of a command's complaints that says most: the first error of apt, or else the last line."""
    lines = stderr.strip().splitlines()
    return next((line for line in lines if line.startswith(("E:", "W: Failed"))), lines[-1] if lines else "")


def say(text: str) -> None:
    """Progress, on stderr: stdout has the path and nothing else."""
    print(f"fetch_qemu: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
