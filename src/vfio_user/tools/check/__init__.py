"""A conformance report of any vfio-user peer: hundreds of cases from the specification, as data.

``model`` is what a report is made of, ``raw`` a connection that can say anything, ``facts`` what the peer says of
itself, ``expect`` and ``cases`` are what a case is written with, ``chapters`` the cases, ``engine`` runs them.
``client`` plays the server for clients.
"""

from vfio_user.tools.check.catalogue import Entry, client_entries, server_cases, server_entries
from vfio_user.tools.check.client.engine import ClientChecker, Launch, Running, ShellCommand
from vfio_user.tools.check.engine import Progress, Selection, ServerChecker, select
from vfio_user.tools.check.model import Finding, Level, Mode, Quirk, Report, Result, Verdict
from vfio_user.tools.check.quirks import CLIENT_QUIRKS, SERVER_QUIRKS
from vfio_user.tools.check.report import details, failures, junit

__all__ = [
    "CLIENT_QUIRKS",
    "SERVER_QUIRKS",
    "ClientChecker",
    "Entry",
    "Finding",
    "Launch",
    "Level",
    "Mode",
    "Progress",
    "Quirk",
    "Report",
    "Result",
    "Running",
    "Selection",
    "ServerChecker",
    "ShellCommand",
    "Verdict",
    "client_entries",
    "details",
    "failures",
    "junit",
    "select",
    "server_cases",
    "server_entries",
]
