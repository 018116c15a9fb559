"""The pace of background work: a set rate, and slower while users are busy."""

from __future__ import annotations

import trio

from .log import Log


class Pace:
    """Call `spend` before each piece of work with its bytes of I/O."""

    def __init__(self, log: Log, rate: float | None = None, *, polite: bool = True) -> None:
        """At most `rate` bytes a second; if polite, less while users read or write."""
        self._log = log
        self._polite = polite
        self._rate = rate
        self._next = 0.0

    async def spend(self, length: int) -> None:
        """Wait until `length` more bytes may be read or written."""
        now = trio.current_time()
        rate = self._rate
        if self._polite and now - self._log.used_at < self._log.limits.users_away_seconds:
            busy = self._log.limits.background_busy_rate
            rate = min(rate or busy, busy)
        start = max(self._next, now)
        self._next = start + (length / rate if rate else 0.0)
        await trio.sleep_until(start)
