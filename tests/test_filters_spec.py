"""Filters as they are written: ``error:region_read=10%,errno=EIO``."""

from __future__ import annotations

import contextlib
import errno
import inspect
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import ServerBackend
from vfio_user.errors import UsageError
from vfio_user.filters import FILTERS, filter_help, parse_filter
from vfio_user.filters.commands import COMMAND_NAMES
from vfio_user.wire.constants import PciRegion


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("stats", "stats", {}),
        ("delay:region_read=5ms,dma_map=100us", "delay", {"region_read": 0.005, "dma_map": 0.0001}),
        ("delay:all=1,jitter=0.5s,seed=7,region=rom", "delay", {"all": 1, "jitter": 0.5, "seed": 7, "region": 6}),
        ("delay:reset=60s", "delay", {"reset": 60}),
        ("delay:reset=250ns", "delay", {"reset": 2.5e-7}),
        ("error:region_read=10%,errno=EIO,seed=1", "error", {"region_read": 0.1, "errno": errno.EIO, "seed": 1}),
        ("error:all=0.25,errno=19", "error", {"all": 0.25, "errno": errno.ENODEV}),
        ("error:device_feature=100%,errno=enodev", "error", {"device_feature": 1.0, "errno": errno.ENODEV}),
        ("readonly:config=yes", "readonly", {"config": True}),
        ("trace:region=bar0,min_us=100", "trace", {"region": 0, "min_us": 100}),
        ("trace:region=7,bytes=0,tag=a:b", "trace", {"region": PciRegion.CONFIG, "bytes": 0, "tag": "a:b"}),
        ("trap", "trap", {}),
    ],
)
def test_what_is_written_is_what_the_constructor_gets(text: str, name: str, options: dict[str, Any]) -> None:
    spec = parse_filter(text)
    assert (spec.filter_class, dict(spec.options)) == (FILTERS[name], options)
    backend = ServerBackend()
    assert (spec(backend).backend, type(spec(backend))) == (backend, FILTERS[name])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no filter ''; there are: delay, error, readonly, stats, trace, trap"),
        ("Stats", "no filter 'Stats'; there are:"),
        ("stats:x=1", "no option of filter stats 'x'; there are: none"),
        ("stats:", "no option of filter stats ''"),
        ("trace:area=bar0", "no option of filter trace 'area'; there are: bytes, min_us, region, tag"),
        ("delay", "filter delay: name a command, or all"),
        ("delay:jitter=1ms", "filter delay: name a command, or all"),
        ("delay:region_read", "region_read: it has no value (how long"),
        ("delay:region_read=", "write a time like 5ms"),
        ("delay:region_read=5 ms", "write a time"),
        ("delay:region_read=-5ms", "write a time"),
        ("delay:region_read=5%", "write a time"),
        ("delay:region_read=inf", "write a time"),
        ("delay:region_read=nan", "write a time"),
        ("delay:region_read=1e9", "write a time"),
        ("delay:region_read=\u0665ms", "write a time"),
        ("delay:region_read=61s", "60s is the most"),
        ("delay:region_read=1ms,region_read=2ms", "region_read is given twice"),
        ("delay:all=1ms,seed=-1", "write a number"),
        ("delay:all=1ms,seed=" + "9" * 5000, "write a number"),
        ("delay:all=1ms,,", "no option of filter delay ''"),
        ("error:errno=EIO", "name a command, or all"),
        ("error:region_read=101%", "at most 100%"),
        ("error:region_read=10ms", "write a rate like 10%"),
        ("error:all=1,errno=EWHAT", "write an errno like EIO"),
        ("error:all=1,errno=0", "write an errno"),
        ("error:all=1,errno=errorcode", "write an errno"),
        ("error:all=1,errno=__name__", "write a"),
        ("error:all=1,region=bar6", "a region is one of bar0"),
        ("error:all=1,region=9", "a region is one of bar0"),
        ("error:all=1,region=-1", "a region is one of bar0"),
        ("readonly:config=maybe", "write yes or no"),
        ("trace:tag=", "write a text"),
    ],
)
def test_what_cannot_be_is_refused_and_says_what_can(text: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_filter(text)
    assert says in str(refused.value)


SAMPLES = {"TIME": "1ms", "RATE": "1%", "ERRNO": "EIO", "N": "1", "REGION": "bar0", "YES|NO": "no", "TEXT": "x"}


@pytest.mark.parametrize("name", FILTERS)
def test_every_option_in_the_table_is_one_of_the_constructor(name: str) -> None:
    for key, setting in FILTERS[name].options.items():
        needed = "all=0," if name in ("delay", "error") and key not in COMMAND_NAMES else ""
        assert parse_filter(f"{name}:{needed}{key}={SAMPLES[setting.form.metavar]}").options.keys() >= {key}


@pytest.mark.parametrize("name", FILTERS)
def test_every_option_of_the_constructor_is_in_the_table(name: str) -> None:
    parameters = inspect.signature(FILTERS[name]).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    per_command = set(COMMAND_NAMES) if any(p.kind is p.VAR_KEYWORD for p in parameters) else set()
    assert keywords | per_command == FILTERS[name].options.keys()


def test_the_help_has_every_filter_and_every_option() -> None:
    text = filter_help()
    assert max(map(len, text.splitlines())) <= 78
    sections = dict(re.findall(r"^(\w+): (.*\n?(?:  .*\n?)*)", text, re.MULTILINE))
    assert sections.keys() == FILTERS.keys()
    for name, section in sections.items():
        for key, setting in FILTERS[name].options.items():
            assert re.search(rf"\b{key}\b", section)
            assert setting.help in " ".join(section.split())


keys = st.sampled_from(sorted({key for one in FILTERS.values() for key in one.options} | {"", "x"}))
values = st.one_of(st.sampled_from([*SAMPLES.values(), "", "0", "=", "1" * 400]), st.text(max_size=6))
written = st.builds(
    lambda name, options: f"{name}:{','.join(f'{key}={value}' for key, value in options)}" if options else name,
    st.sampled_from([*FILTERS, "", "x"]),
    st.lists(st.tuples(keys, values), max_size=3),
)


@given(st.one_of(written, st.text(max_size=30)))
def test_any_text_is_a_filter_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_filter(text)(ServerBackend())
