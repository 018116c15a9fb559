"""A clock for trio that stands still while the event loop does not run.

A process may be stopped: by SIGSTOP, a frozen container, a paused virtual machine, or a disk
from which the loop itself must read.  To the system's clock all deadlines have then passed,
although nobody had time to keep them.  By this clock, the time in which the loop did not run
does not count, so no deadline passes in it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import trio

logger = logging.getLogger(__name__)

LATE_SECONDS = 1.0
"""The loop is late when it wakes up this long after it should have."""
TOLD_SECONDS = 10.0
"""A pause of this length is logged."""


class LoopClock(trio.abc.Clock):
    """Seconds in which the loop ran, or slept as long as it wanted."""

    def __init__(self, monotonic: Callable[[], float] = time.perf_counter) -> None:
        self._monotonic = monotonic
        self._read_at = monotonic()
        self._now = 0.0
        self._sleep = 0.0
        """How long the loop wants to sleep."""

    def start_clock(self) -> None:
        """Forget the time until now."""
        self._read_at = self._monotonic()

    def current_time(self) -> float:
        """Return the loop's time, in seconds."""
        read_at = self._monotonic()
        passed = read_at - self._read_at
        self._read_at = read_at
        if passed > self._sleep + LATE_SECONDS:
            passed = self._counted(passed)
        self._sleep = 0.0
        self._now += passed
        return self._now

    def _counted(self, passed: float) -> float:
        """Return what counts of a time in which the loop was late.

        The next deadline is still ahead if it was, so that what happened meanwhile is seen
        first.  Some time must always pass, or a loop that is late again and again would wait
        forever.
        """
        counted = max(self._sleep - LATE_SECONDS, LATE_SECONDS)
        if passed - counted >= TOLD_SECONDS:
            logger.info("The daemon did not run for %.0f seconds.", passed - counted)
        return counted

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Return for how long the loop may sleep, in seconds."""
        seconds = deadline - self.current_time()
        self._sleep = max(0.0, seconds) if seconds < math.inf else math.inf
        return seconds
