"""A report as JUnit XML, which build servers read: a suite per chapter, a test per case."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from xml.etree import ElementTree as Xml

from vfio_user.tools.check.model import Report, Result, Verdict

_FAILURES = frozenset({Verdict.MUST})
_STRICT_FAILURES = _FAILURES | {Verdict.SHOULD, Verdict.QUIRK}


def failures(report: Report, *, strict: bool = False) -> list[Result]:
    """What makes the check fail: a must; with ``strict`` everything that is not as expected."""
    wanted = _STRICT_FAILURES if strict else _FAILURES
    return [one for one in report.results if one.verdict in wanted]


def junit(report: Report, *, strict: bool = False) -> bytes:
    """The XML document. What is no failure, but not as expected, is in the test's output."""
    root = Xml.Element("testsuites", _counts(report.results, strict), name=f"vfio-user check {report.peer}")
    for chapter, results in groupby(report.results, key=lambda one: one.chapter):
        of_chapter = list(results)
        suite = Xml.SubElement(root, "testsuite", _counts(of_chapter, strict), name=chapter)
        for one in of_chapter:
            _test(suite, one, strict)
    Xml.indent(root)
    document: bytes = Xml.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _counts(results: Iterable[Result], strict: bool) -> dict[str, str]:
    results = list(results)
    wanted = _STRICT_FAILURES if strict else _FAILURES
    return {
        "tests": str(len(results)),
        "failures": str(sum(one.verdict in wanted for one in results)),
        "skipped": str(sum(one.verdict is Verdict.SKIPPED for one in results)),
        "time": f"{sum(one.seconds for one in results):.3f}",
    }


def _test(suite: Xml.Element, one: Result, strict: bool) -> None:
    test = Xml.SubElement(suite, "testcase", classname=one.chapter, name=one.name, time=f"{one.seconds:.3f}")
    if one.verdict is Verdict.SKIPPED:
        Xml.SubElement(test, "skipped", message=one.skipped)
        return
    if one.verdict is Verdict.PASSED:
        return
    text = "\n".join(details(one))
    if one.verdict in (_STRICT_FAILURES if strict else _FAILURES):
        failure = Xml.SubElement(test, "failure", type=str(one.verdict), message=one.findings[0].text)
        failure.text = text
    else:
        Xml.SubElement(test, "system-out").text = text


def details(one: Result) -> list[str]:
    """All that there is to know of a result, a line each."""
    return [
        f"section:  {one.section}",
        f"expected: {one.expected}",
        *(f"found:    {finding.text}" for finding in one.findings),
        *(f"quirk:    {quirk.peer}: {quirk.text}" for quirk in one.quirks),
        *(f"sent:     {line}" for line in one.sent),
        *(f"came:     {line}" for line in one.came),
    ]
