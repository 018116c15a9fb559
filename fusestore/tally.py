"""Counts, durations and results of operations.

`Histogram.add` runs once per request on the event loop, and costs well under a
microsecond.  All evaluation works on copies.
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
"""Upper ends of the buckets, in ns: 20 per decade (ISO 3, R20) from 1 µs to 100 s; then one more.

A percentile computed from them is off by at most 6 %.
"""

FAILURES = {errno.EIO, errno.ENOSPC, errno.EROFS, errno.ETIMEDOUT}
"""Errors that are failures of the store; other errors are answers to the request."""


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
        """The number of durations."""
        return sum(self.counts)

    @property
    def seconds(self) -> float:
        """The sum of all durations."""
        return self.total_ns / 1e9

    def plus(self, other: Histogram, sign: int = 1) -> Histogram:
        """Return the sum of both; with the sign -1, the difference."""
        result = Histogram()
        result.counts = list(map(add if sign == 1 else sub, self.counts, other.counts))
        result.total_ns = self.total_ns + sign * other.total_ns
        return result

    def copy(self) -> Histogram:
        """Return a copy."""
        result = Histogram()
        result.counts, result.total_ns = self.counts.copy(), self.total_ns
        return result

    def percentile(self, share: float) -> float:
        """Return the seconds that a share of the durations did not exceed.

        The result is interpolated in its bucket.  0.0 if there are no durations; longer ones
        than the last bound count as the last bound.
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
        """Return the number of durations up to each bound, which must be in BOUNDS_NS."""
        ends = [bisect_left(BOUNDS_NS, bound) + 1 for bound in bounds_ns]
        return [sum(self.counts[:end]) for end in ends]


class Tally:
    """The counts of one kind of operation."""

    __slots__ = ("errors", "size", "times")

    def __init__(self) -> None:
        self.times = Histogram()
        self.size = 0
        """Bytes of file data read or written."""
        self.errors: dict[int, int] = {}
        """How often each errno was the answer."""

    def answered(self, number: int) -> None:
        """Count an operation that ended with an error."""
        self.errors[number] = self.errors.get(number, 0) + 1

    def copy(self) -> Tally:
        """Return a copy."""
        result = Tally()
        result.times, result.size = self.times.copy(), self.size
        result.errors = dict(self.errors)
        return result

    @property
    def failures(self) -> int:
        """The number of operations that the store failed."""
        return sum(count for number, count in self.errors.items() if number in FAILURES)

    def plus(self, other: Tally, sign: int = 1) -> Tally:
        """Return the sum of both; with the sign -1, the difference."""
        result = self.copy()
        result.times = self.times.plus(other.times, sign)
        result.size += sign * other.size
        for number, count in other.errors.items():
            result.errors[number] = result.errors.get(number, 0) + sign * count
        return result

    def encode(self) -> dict[str, Any]:
        """Encode as JSON."""
        return {
            "counts": {str(i): count for i, count in enumerate(self.times.counts) if count},
            "total_ns": self.times.total_ns,
            "bytes": self.size,
            "errors": {str(number): count for number, count in self.errors.items() if count},
        }

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> Self:
        """Decode from JSON; LookupError, TypeError or ValueError if it is invalid."""
        result = cls()
        for index, count in value["counts"].items():
            result.times.counts[_count(int(index))] = _count(count)
        result.times.total_ns, result.size = _count(value["total_ns"]), _count(value["bytes"])
        result.errors = {int(number): _count(count) for number, count in value["errors"].items()}
        return result


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("it has an invalid count")
    return value


Tallies = dict[str, Tally]
"""By the name of the operation."""


def combined(one: Tallies, other: Tallies, sign: int = 1) -> Tallies:
    """Return the sum of both; with the sign -1, the difference."""
    names = [*one, *(name for name in other if name not in one)]
    return {name: one.get(name, Tally()).plus(other.get(name, Tally()), sign) for name in names}


def summary(tallies: Tallies, mounted_seconds: float) -> list[dict[str, Any]]:
    """Return a row for each operation that occurred, most frequent first; times in seconds."""
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
