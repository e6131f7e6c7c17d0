"""What an answer may be. An expectation is data: it says what it wants, and finds what is wrong with what came."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vfio_user.tools.check.facts import Facts
from vfio_user.tools.check.model import Finding, Level
from vfio_user.tools.check.raw import NoMessageError, Received
from vfio_user.wire.constants import TYPE_MASK, HeaderFlags

_SUCCESS = int(HeaderFlags.REPLY)
_ERROR = int(HeaderFlags.REPLY | HeaderFlags.ERROR)

Findings = Iterator[Finding]
Look = Callable[[Received, Facts], Findings]
"""Looks at a successful reply."""


class Expectation(Protocol):
    def judge(self, answer: Received | NoMessageError, facts: Facts) -> Findings:
        """What is wrong with an answer, or with there being none."""
        ...

    def __str__(self) -> str: ...


def envelope(reply: Received, msg_id: int, command: int) -> Findings:
    """What holds for every reply: it repeats id and command, and its flags say reply and nothing else but error."""
    header = reply.header
    if header.flags & TYPE_MASK != HeaderFlags.REPLY:
        yield Finding("type", f"flags {header.flags:#x} do not say that this is a reply", value=header.flags)
    elif header.flags not in (_SUCCESS, _ERROR):
        yield Finding("flags", f"the reply has flags {header.flags:#x}", Level.SHOULD, header.flags)
    if header.msg_id != msg_id:
        yield Finding("id", f"the reply has id {header.msg_id}, the command {msg_id}", value=header.msg_id)
    if header.command != command:
        yield Finding("command", f"the reply is to command {header.command}, not {command}", value=header.command)
    if header.flags == _SUCCESS and header.error_no:
        yield Finding("error-field", f"a reply without error carries errno {header.error_no}", Level.SHOULD)


@dataclass(frozen=True, slots=True)
class Refused:
    """An error reply, of a header alone. ``errnos``: which ones fit; none given: any. ``strict``: they are a must.

    ``or_closed``: the server may close the connection instead.
    """

    errnos: tuple[int, ...] = (errno.EINVAL,)
    strict: bool = False
    or_closed: bool = False

    def __str__(self) -> str:
        names = " or ".join(errno.errorcode[number] for number in self.errnos) or "any errno"
        return f"an error reply without payload, {names}{', or the end' if self.or_closed else ''}"

    def judge(self, answer: Received | NoMessageError, facts: Facts) -> Findings:
        if isinstance(answer, NoMessageError):
            if not (self.or_closed and answer.code == "closed"):
                yield Finding(answer.code, f"no error reply: {answer}")
            return
        if not answer.is_error:
            yield Finding("accepted", "the command was accepted")
            return
        number = answer.header.error_no
        if self.errnos and number not in self.errnos:
            names = " or ".join(errno.errorcode[one] for one in self.errnos)
            came = errno.errorcode.get(number, str(number))
            yield Finding("errno", f"errno {came}, not {names}", Level.MUST if self.strict else Level.SHOULD, number)
        if answer.payload:
            yield Finding("error-payload", f"an error reply with {len(answer.payload)} bytes of payload")
        if answer.fds:
            yield Finding("fds", f"an error reply with {len(answer.fds)} file descriptors", value=len(answer.fds))


def _nothing_to_see(reply: Received, facts: Facts) -> Findings:
    return iter(())


@dataclass(frozen=True, slots=True)
class Served:
    """A successful reply. ``size`` of its payload; ``look`` finds what is wrong with its contents: ``text``."""

    text: str = "success"
    size: int | None = None
    look: Look = _nothing_to_see
    fds: bool = False

    def __str__(self) -> str:
        return f"{self.text}, {self.size} bytes" if self.size else self.text

    def judge(self, answer: Received | NoMessageError, facts: Facts) -> Findings:
        if isinstance(answer, NoMessageError):
            yield Finding(answer.code, f"no reply: {answer}")
            return
        if answer.is_error:
            number = answer.header.error_no
            yield Finding("refused", f"refused with {errno.errorcode.get(number, number)}", value=number)
            return
        if self.size is not None and len(answer.payload) != self.size:
            yield Finding(
                "size", f"a payload of {len(answer.payload)} bytes, not {self.size}", value=len(answer.payload)
            )
            return
        if answer.fds and not self.fds:
            yield Finding("fds", f"{len(answer.fds)} file descriptors came with the reply", value=len(answer.fds))
        yield from self.look(answer, facts)


@dataclass(frozen=True, slots=True)
class Answered:
    """Either: success, which ``served`` describes, or a refusal of any errno. But an answer."""

    served: Served = Served()

    def __str__(self) -> str:
        return f"{self.served}, or an error reply without payload"

    def judge(self, answer: Received | NoMessageError, facts: Facts) -> Findings:
        refused = isinstance(answer, Received) and answer.is_error
        return Refused(()).judge(answer, facts) if refused else self.served.judge(answer, facts)


def echoes(reply: bytes) -> Served:
    """Exactly these bytes."""

    def look(received: Received, facts: Facts) -> Findings:
        if received.payload != reply:
            yield Finding("echo", f"the payload is {received.payload.hex()}, not {reply.hex()}")

    return Served("the request's structure again", len(reply), look)


EMPTY = Served("success without payload", 0)
"""A reply of a header alone."""
