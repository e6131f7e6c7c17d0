"""``vfio-user check --client`` with QEMU: its report has no finding that is not known of it."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path

import pytest

from vfio_user.tools.check import CLIENT_QUIRKS, ClientChecker, Report, Selection, ShellCommand, Verdict
from vfio_user.tools.check.model import FATAL, Mode

pytestmark = pytest.mark.qemu

TIMEOUT = 30.0
"""Seconds for a run of QEMU: it waits 5 s itself for a reply that does not come."""


def command(qemu: Path) -> str:
    """A machine without a guest that plugs the device in, and quits."""
    device = json.dumps({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": "SOCKET"}})
    arguments = shlex.join(
        [
            *(str(qemu), "-accel", "qtest", "-display", "none", "-nodefaults", "-monitor", "stdio"),
            *("-object", "memory-backend-memfd,id=mem,size=16M,share=on", "-m", "16M"),
            *("-machine", "q35,memory-backend=mem", "-device", device),
        ]
    )
    # What the shell replaces must not stand in single quotes.
    return "printf 'quit\\n' | exec " + arguments.replace("SOCKET", "'\"$VFIO_USER_SOCKET\"'")


def check(qemu: Path, path: Path, *only: str) -> Report:
    checker = ClientChecker(path, partial(ShellCommand, command(qemu)), TIMEOUT, CLIENT_QUIRKS)
    return checker.run(Selection(frozenset({Mode.SAFE, Mode.HOSTILE}), only))


def test_qemu_works_with_every_honest_server_and_keeps_to_the_rules(qemu: Path, tmp_path: Path) -> None:
    report = check(qemu, tmp_path / "played.sock", "server", "client")
    unknown = {one.name: one for one in report.results if one.findings and one.verdict is not Verdict.QUIRK}
    assert unknown == {}
    found = {one.name: one.verdict for one in report.results}
    assert found["server/plain"] is Verdict.PASSED
    assert found["server/pieces-1"] is Verdict.QUIRK
    assert found["server/dma-read"] is Verdict.QUIRK  # there is no guest to turn bus mastering on
    assert found["server/dma-read-unmapped"] is Verdict.PASSED
    assert found["client/dma_map/range"] is Verdict.PASSED
    assert report.count(Verdict.PASSED) > 60


def test_qemu_crashes_on_a_reply_that_is_empty_and_the_report_says_of_whom_that_is_known(
    qemu: Path, tmp_path: Path
) -> None:
    """11.1 dereferences the region information that did not come. Where it does no more, this test has to change."""
    cases = ("broken/device_get_region_info/empty", "broken/device_get_info/error", "broken/version/major-1")
    report = check(qemu, tmp_path / "played.sock", *cases)
    empty, *others = sorted(report.results, key=lambda one: one.name not in cases[:1])
    assert {one.verdict for one in others} == {Verdict.PASSED}
    assert empty.verdict is Verdict.MUST
    assert {finding.code for finding in empty.findings} <= FATAL
    assert [quirk.peer for quirk in empty.quirks] == ["QEMU"]
