"""Counting operations: how many, how long each took, what became of it.

`Tally.add` runs once a request on the event loop and costs well under a
microsecond; everything that thinks about the numbers works on copies of them.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from operator import add, sub
from typing import Any, Self

_RENARD = (
    *(1.0, 1.12, 1.25, 1.4, 1.6, 1.8, 2.0, 2.24, 2.5, 2.8),
    *(3.15, 3.55, 4.0, 4.5, 5.0, 5.6, 6.3, 7.1, 8.0, 9.0),
)
_DECADES = 8

BOUNDS_NS: tuple[int, ...] = (
    *(round(1000 * step) * 10**decade for decade in range(_DECADES) for step in _RENARD),
    1000 * 10**_DECADES,
)
"""Upper ends of the buckets, in ns: 20 a decade (ISO 3, R20) from 1 µs to 100 s; then one more.

A percentile that is read from them is off by 6 % at most.
"""

FAILURES = {errno.EIO, errno.ENOSPC, errno.EROFS, errno.ETIMEDOUT}
"""Answers that say that the store could not; all other errors are what the caller asked for."""


class Histogram:
    """Durations, counted in buckets."""

    __slots__ = ("counts", "total_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.total_ns = 0

    def add(self, ns: int) -> None:
        """Count a duration in ns."""
        self.counts[bisect_left(BOUNDS_NS, ns)] += 1
        self.total_ns += ns

    @property
    def count(self) -> int:
        """How many durations there were."""
        return sum(self.counts)

    @property
    def seconds(self) -> float:
        """All durations together."""
        return self.total_ns / 1e9

    def plus(self, other: Histogram, sign: int = 1) -> Histogram:
        """What both have counted; with -1, what `other` has not."""
        result = Histogram()
        result.counts = list(map(add if sign == 1 else sub, self.counts, other.counts))
        result.total_ns = self.total_ns + sign * other.total_ns
        return result

    def copy(self) -> Histogram:
        """What was counted until now."""
        result = Histogram()
        result.counts, result.total_ns = self.counts.copy(), self.total_ns
        return result

    def percentile(self, share: float) -> float:
        """Seconds that a share of the durations did not exceed, interpolated in its bucket.

        0.0 when there were none; what is longer than the last bound counts as that.
        """
        left = share * self.count
        low = 0
        for bound, count in zip(BOUNDS_NS, self.counts, strict=False):
            if count and count >= left:
                return (low + (bound - low) * left / count) / 1e9
            left -= count
            low = bound
        return BOUNDS_NS[-1] / 1e9 if self.count else 0.0

    def cumulated(self, bounds_ns: Iterable[int]) -> list[int]:
        """How many did not exceed each of some of the bounds, which must be in BOUNDS_NS."""
        ends = [bisect_left(BOUNDS_NS, bound) + 1 for bound in bounds_ns]
        return [sum(self.counts[:end]) for end in ends]


class Tally:
    """What became of one kind of operation."""

    __slots__ = ("errors", "size", "times")

    def __init__(self) -> None:
        self.times = Histogram()
        self.size = 0
        """Bytes of file data read or written."""
        self.errors: dict[int, int] = {}
        """By errno: how often that was the answer."""

    def answered(self, number: int) -> None:
        """An operation ended with an error."""
        self.errors[number] = self.errors.get(number, 0) + 1

    def copy(self) -> Tally:
        """What was counted until now."""
        result = Tally()
        result.times, result.size = self.times.copy(), self.size
        result.errors = dict(self.errors)
        return result

    @property
    def failures(self) -> int:
        """Operations that the store could not do."""
        return sum(count for number, count in self.errors.items() if number in FAILURES)

    def plus(self, other: Tally, sign: int = 1) -> Tally:
        """What both have counted; with -1, what `other` has not."""
        result = self.copy()
        result.times = self.times.plus(other.times, sign)
        result.size += sign * other.size
        for number, count in other.errors.items():
            result.errors[number] = result.errors.get(number, 0) + sign * count
        return result

    def encode(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "counts": {str(i): count for i, count in enumerate(self.times.counts) if count},
            "total_ns": self.times.total_ns,
            "bytes": self.size,
            "errors": {str(number): count for number, count in self.errors.items() if count},
        }

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> Self:
        """From JSON; LookupError, TypeError or ValueError when it is none of ours."""
        result = cls()
        for index, count in value["counts"].items():
            result.times.counts[_count(int(index))] = _count(count)
        result.times.total_ns, result.size = _count(value["total_ns"]), _count(value["bytes"])
        result.errors = {int(number): _count(count) for number, count in value["errors"].items()}
        return result


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("it has a count that is none")
    return value


Tallies = dict[str, Tally]
"""By the name of the operation."""


def combined(one: Tallies, other: Tallies, sign: int = 1) -> Tallies:
    """What both have counted; with -1, what `other` has not."""
    names = [*one, *(name for name in other if name not in one)]
    return {name: one.get(name, Tally()).plus(other.get(name, Tally()), sign) for name in names}


def summary(tallies: Tallies, mounted_seconds: float) -> list[dict[str, Any]]:
    """One row an operation that happened, the most frequent first; all times in seconds."""
    rows = []
    for name, tally in sorted(tallies.items(), key=lambda item: -item[1].times.count):
        times = tally.times
        count = times.count
        if not count:
            continue
        rows.append(
            {
                "operation": name,
                "count": count,
                "per_second": count / mounted_seconds if mounted_seconds else 0.0,
                "bytes": tally.size,
                "bytes_per_busy_second": tally.size / times.seconds if times.seconds else 0.0,
                "success_rate": 1 - tally.failures / count,
                "errors": {
                    errno.errorcode.get(number, str(number)): times_
                    for number, times_ in sorted(tally.errors.items())
                    if times_
                },
                "mean": times.seconds / count,
                "median": times.percentile(0.5),
                "p95": times.percentile(0.95),
                "p99": times.percentile(0.99),
            }
        )
    return rows
