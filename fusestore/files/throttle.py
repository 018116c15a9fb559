"""Writes are slowed down to what cleaning gives back, while there is far too much garbage.

Each write waits for its turn.  The turns follow each other as fast as cleaning gives back what
the writes before may turn into garbage, and the slower, the more there is too much.  So a small
write waits for the few that came before it, not for a batch of cleaning.
"""

from __future__ import annotations

import math

import trio

from ..limits import MIB

FIRST_RATE = 32 * MIB
"""Bytes a second that cleaning is expected to give back, before it gave back any."""
STEEPNESS = 8
"""With a third more garbage than is too much, writes are ten times as slow as cleaning."""


class Throttle:
    """Spaces writes."""

    def __init__(self, seconds_max: float) -> None:
        """No write waits longer than `seconds_max`."""
        self._seconds_max = seconds_max
        self._rate = float(FIRST_RATE)
        self._next = -math.inf
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def held(self) -> int:
        """How many writes wait."""
        return len(self._waiting)

    def release(self) -> None:
        """Let all that wait go on: nothing more is given back now."""
        self._next = -math.inf
        self._waiting.unpark_all()

    def gave_back(self, length: int, seconds: float) -> None:
        """Learn how long cleaning took to give back `length` bytes."""
        self._rate = (self._rate + length / max(seconds, 0.001)) / 2

    async def wait(self, length: int, excess: float) -> None:
        """Let a write wait for its turn; `excess` is the garbage as a multiple of what is too much.

        `length` is in bytes.
        """
        now = trio.current_time()
        start = max(self._next, now)
        pause = length * excess**STEEPNESS / self._rate
        self._next = min(start + pause, now + self._seconds_max)
        with trio.move_on_at(start):
            await self._waiting.park()
