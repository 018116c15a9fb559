"""How fast work in the background goes: at a set rate, and slower while users are busy."""

from __future__ import annotations

import trio

from ..limits import BACKGROUND_BUSY_RATE, USERS_AWAY_SECONDS
from .log import Log


class Pace:
    """Call `spend` before each piece of work with its bytes of I/O."""

    def __init__(self, state: Log, rate: float | None = None, *, polite: bool = True) -> None:
        """At most `rate` bytes a second; if polite, less while users read or write."""
        self._log = state
        self._polite = polite
        self._rate = rate
        self._next = 0.0

    async def spend(self, length: int) -> None:
        """Wait until `length` more bytes may be read or written."""
        now = trio.current_time()
        rate = self._rate
        if self._polite and now - self._log.used_at < USERS_AWAY_SECONDS:
            rate = min(rate or BACKGROUND_BUSY_RATE, BACKGROUND_BUSY_RATE)
        start = max(self._next, now)
        self._next = start + (length / rate if rate else 0.0)
        await trio.sleep_until(start)
