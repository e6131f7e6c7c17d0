"""Features: what a host sets and gets (5.8, 5.21)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vfio_user.devices.nvme.command import CommandError, check
from vfio_user.devices.nvme.constants import Feature, Status
from vfio_user.devices.nvme.namespaces import MAX_NAMESPACES

MAX_QUEUES = 64
"""I/O queue pairs that there may be: each with a vector of its own, as the admin queues have."""

KELVIN = 273
TEMPERATURE = KELVIN + 25
WARNING_TEMPERATURE, CRITICAL_TEMPERATURE = TEMPERATURE + 45, TEMPERATURE + 60
"""Of a disk that has none, in Kelvin."""

_SENSOR, _THRESHOLD, UNDER_THRESHOLD = 0xF_0000, 3 << 20, 1 << 20
"""Of TEMPERATURE_THRESHOLD (5.21.1.4): there is the composite temperature only; what is above, and what is below it."""

CURRENT, DEFAULT, SAVED, CAPABILITIES = range(4)
"""What GET FEATURES is asked for (5.8, SEL)."""
_CHANGEABLE, _PER_NAMESPACE = 1 << 2, 1 << 1


@dataclass(frozen=True, slots=True)
class FeatureRule:
    """One feature: the value after a reset, the bits of dword 11 that can be set."""

    default: int
    settable: int
    per_namespace: bool = False
    selector: int = 0
    """Bits of dword 11 that say which of several values is meant: a vector, a sensor."""
    every: int = 0
    """Those that, all of them set, name every one: of which there is the first only. To be set, not to be asked."""
    defaults: Mapping[int, int] = field(default_factory=dict)
    """By selector, where they differ."""
    allowed: Callable[[int], bool] = lambda value: True

    def sound(self, selector: int, value: int) -> bool:
        """Whether a host could have set that."""
        if self.per_namespace:
            return 0 < selector <= MAX_NAMESPACES and not value & ~self.settable
        return not selector & ~self.selector and not value & ~self.settable and self.allowed(selector | value)

    @property
    def capabilities(self) -> int:
        return _CHANGEABLE * (self.settable > 0) | _PER_NAMESPACE * self.per_namespace


RULES = {
    Feature.ARBITRATION: FeatureRule(7, 0xFFFF_FF07),  # no limit to a burst
    Feature.POWER_MANAGEMENT: FeatureRule(0, 0xFF, allowed=lambda value: not value & 0x1F),  # one power state
    Feature.TEMPERATURE_THRESHOLD: FeatureRule(
        WARNING_TEMPERATURE,
        0xFFFF,
        selector=_SENSOR | _THRESHOLD,
        every=_SENSOR,
        defaults={UNDER_THRESHOLD: 0},
        allowed=lambda value: not value & _SENSOR and value & _THRESHOLD in (0, UNDER_THRESHOLD),
    ),
    # There is no error of deallocated blocks (DULBE).
    Feature.ERROR_RECOVERY: FeatureRule(0, 0xFFFF, per_namespace=True, allowed=lambda value: not value & 1 << 16),
    Feature.VOLATILE_WRITE_CACHE: FeatureRule(1, 1),
    Feature.NUMBER_OF_QUEUES: FeatureRule(0, 0xFFFF_FFFF, allowed=lambda v: v & 0xFFFF != 0xFFFF and v >> 16 != 0xFFFF),
    Feature.INTERRUPT_COALESCING: FeatureRule(0, 0xFFFF),
    Feature.INTERRUPT_VECTOR_CONFIGURATION: FeatureRule(0, 0x1_0000, selector=0xFFFF),
    Feature.WRITE_ATOMICITY_NORMAL: FeatureRule(0, 1),
    Feature.ASYNC_EVENT_CONFIGURATION: FeatureRule(0, 0x1FF),
    Feature.TIMESTAMP: FeatureRule(0, 1),
    Feature.KEEP_ALIVE_TIMER: FeatureRule(0, 0xFFFF_FFFF),
}
"""The value of TIMESTAMP alone is not dword 11."""

MAX_VALUES = len(RULES) + 1 + MAX_QUEUES + MAX_NAMESPACES
"""That a host can set: one of each feature, but a temperature's on either side, one for each vector, or namespace."""
TEMPERATURE_NOTICES, NAMESPACE_NOTICES = 1 << 1, 1 << 8
"""Of ASYNC_EVENT_CONFIGURATION: tell of a temperature that has passed its threshold, of changed namespaces."""


Effects = Mapping[Feature, Callable[[int], object]]
"""What is done with the value of a feature whenever it may be another."""


class Features:
    """The values of the features: ``values`` has those that were set, by feature and selector, or NSID."""

    def __init__(self, queues: int, effects: Effects) -> None:
        """``queues``: I/O queue pairs that there may be, as long as the host has not asked for a number."""
        self.values: dict[tuple[int, int], int] = {}
        self.timestamp = Timestamp()
        self._most_queues = (queues - 1) * 0x1_0001
        self._effects = effects

    def get(self, feature: Feature, selector: int = 0) -> int:
        """The current value, as dword 0 of a completion has it."""
        return self.values.get((feature, selector), self._default(feature, selector))

    def _default(self, feature: Feature, selector: int) -> int:
        if feature is Feature.NUMBER_OF_QUEUES:
            return self._most_queues
        rule = RULES[feature]
        return rule.defaults.get(selector, rule.default)

    def set(self, feature: Feature, dword: int, number: int = 0) -> None:
        """Set what dword 11 of the command says, of a namespace if it is one's. Raises CommandError for a value that it
        cannot have.
        """
        rule = RULES[feature]
        if rule.every and dword & rule.every == rule.every:
            dword &= ~rule.every
        check(rule.allowed(dword))
        self.values[feature, number or dword & rule.selector] = dword & rule.settable
        self.follow(feature)

    def forget(self, number: int) -> None:
        """A namespace is gone."""
        for feature, rule in RULES.items():
            if rule.per_namespace:
                self.values.pop((feature, number), None)

    def load(self, values: dict[tuple[int, int], int], timestamp: int) -> None:
        """Take over what another controller has."""
        self.values, self.timestamp.value = values, timestamp
        for feature in self._effects:
            self.follow(feature)

    def follow(self, feature: Feature) -> None:
        """Do what the value of a feature means, if it means something to be done."""
        if feature in self._effects:
            self._effects[feature](self.get(feature))

    def select(self, feature: Feature, select: int, dword: int, number: int = 0) -> int:
        """What GET FEATURES answers to SEL, of a namespace if it is one's. Raises CommandError for a reserved one."""
        check(select <= CAPABILITIES)
        rule = RULES[feature]
        check(rule.selector != _SENSOR | _THRESHOLD or rule.allowed(dword))
        which = dword & rule.selector
        if select == CAPABILITIES:
            return rule.capabilities
        return (self.get(feature, number or which) if select == CURRENT else self._default(feature, which)) | which

    @property
    def too_warm(self) -> bool:
        """Whether the temperature, which never changes, has passed a threshold of the host's (5.21.1.4)."""
        over, under = (self.get(Feature.TEMPERATURE_THRESHOLD, which) for which in (0, UNDER_THRESHOLD))
        return not under < TEMPERATURE < over

    def reset(self) -> None:
        self.load({}, timestamp=0)


def known_feature(number: int) -> Feature:
    """The feature of this identifier. Raises CommandError for one that is not supported."""
    try:
        return Feature(number)
    except ValueError:
        raise CommandError(Status.INVALID_FIELD) from None


_SET_BY_HOST, _STOOD_STILL = 1 << 1 << 48, 1 << 48
"""Of a timestamp: its origin, and that it may have stopped counting."""
_MILLISECONDS = (1 << 48) - 1


class Timestamp:
    """The timestamp feature (5.21.1.14): what the host set, which goes on by itself, unless the device stands still."""

    def __init__(self) -> None:
        self._goes = True
        self.value = 0

    @property
    def value(self) -> int:
        """Milliseconds and attributes, as GET FEATURES gives them."""
        elapsed = int((time.monotonic() - self._since) * 1000) if self._goes else 0
        return self._value & ~_MILLISECONDS | self._value + elapsed & _MILLISECONDS

    @value.setter
    def value(self, value: int) -> None:
        self._value, self._since = value, time.monotonic()

    def set(self, milliseconds: int) -> None:
        """The host sets it."""
        self.value = milliseconds | _SET_BY_HOST

    def run(self, on: bool) -> None:
        """Whether it goes on from now on."""
        if on != self._goes:
            self.value = self.value | _STOOD_STILL
            self._goes = on
