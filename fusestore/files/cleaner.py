"""Cleaning: stripes that are mostly garbage are emptied, so that their room comes back.

A stripe is immutable, and goes when its last byte does.  Cleaning moves what is left of the
emptiest stripes to new ones.  `Log.waste` counts what it would give back.  It runs

- above the bound, a share of the files' bytes: at the pace of background work;
- above half the bound, while nobody uses the mount;
- above one and a half times the bound, or when a request found no room: at once; writes are
  then slowed down to what cleaning gives back (throttle.py);
- when it is asked to compact: until no stripe gives back enough.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ..errors import FusestoreError, ReadOnlyError
from ..log.background_job import LOOK_SECONDS, Progress
from ..log.log import Log
from ..log.pace import Pace
from ..write.writer import Writer
from .emptier import Emptier, by_code
from .throttle import Throttle
from .victims import Victim

WAITING_PAUSES = 5
"""Cleaning that found no room looks again after so many of the usual pauses."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Compaction:
    """A request to clean until no stripe gives back enough, whatever the bound."""

    freed_before: int
    moved_before: int
    """The counts of the cleaner when it began."""
    below: int
    """It empties stripes with lower numbers, which were there when it began."""
    problem: str = ""
    """Why it has ended early; or empty."""
    ended: trio.Event = field(default_factory=trio.Event)


class Cleaner:
    """Empties stripes in the background, and on request."""

    def __init__(self, log: Log, writer: Writer, emptier: Emptier) -> None:
        self._log = log
        self._limits = log.limits
        self._writer = writer
        self._emptier = emptier
        self._wake = trio.Event()
        self._runs = False
        self._passes = 0
        """How many clean now: the background, and requests that found no room."""
        self._throttle = Throttle(log.limits.hold_seconds_max)
        self._pacing = trio.CancelScope()
        """Cancelled when the background must not wait for its pace any more."""
        self._fruitless_at = -1
        """While there is at most so much waste, no stripe gives back enough."""
        self._measured_at = -math.inf
        """When the pinned bytes were last measured, by trio's clock; and the last commit then."""
        self._measured = -1
        self._compaction: Compaction | None = None

    # --- the bound -----------------------------------------------------------

    @property
    def bound(self) -> int:
        """Bytes of waste above which cleaning runs."""
        share = self._log.counters.file_bytes * self._limits.waste_percent_max // 100
        return share + self._limits.waste_bytes_min

    @property
    def _pinned_bound(self) -> int:
        """Bytes on all nodes that segments may pin before they are emptied."""
        code = self._log.code
        return self.bound * code.n // code.k

    def _is_measure_due(self) -> bool:
        is_late = trio.current_time() - self._measured_at > self._limits.pinned_look_seconds
        return is_late and self._log.position.commit != self._measured

    @property
    def _too_much(self) -> int:
        return self.bound * 3 // 2

    @property
    def is_urgent(self) -> bool:
        """Whether writers are to be held up."""
        return self._log.waste > self._too_much

    def within_reach(self) -> int:
        """Return the bytes, at least, that a request gets that finds no room."""
        if not self._log.waste_counted or not self._may_run() or self.is_fruitless():
            return 0
        if self._emptier.waits_for or not self._emptier.has_holes:
            return 0
        if any(member.out_of_use for member in self._log.members.all):
            return 0
        return max(0, self._log.waste - self.bound // 2) * 7 // 8

    @property
    def is_running(self) -> bool:
        """Whether stripes are being emptied."""
        return self._passes > 0 or self._compaction is not None

    @property
    def held_writers(self) -> int:
        """The number of writes that wait for cleaning."""
        return self._throttle.held

    @property
    def _is_idle(self) -> bool:
        return trio.current_time() - self._log.used_at > self._limits.clean_idle_seconds

    @property
    def _below(self) -> int | None:
        """The first stripe that is not to be emptied: a compaction ends while others write."""
        return self._compaction.below if self._compaction is not None else None

    @property
    def _goal(self) -> int:
        if self._compaction is not None:
            return 0
        return self.bound // 2 if self._is_idle else self.bound

    def _is_due(self) -> bool:
        return self._compaction is not None or (
            self._log.waste > self._goal and not self.is_fruitless()
        )

    def _is_done(self) -> bool:
        """Whether enough is given back; less than `_is_due`, so that walks are rare."""
        return self._log.waste <= self._goal * 7 // 8

    def is_fruitless(self) -> bool:
        """Return whether no stripe gave back enough when there was so much waste."""
        return self._log.waste <= self._fruitless_at

    def _may_run(self) -> bool:
        return not (self.hindrance() or self._log.is_ending)

    def hindrance(self) -> str:
        """Return a sentence that explains why nothing may be cleaned; or an empty text."""
        log = self._log
        if log.read_only:
            return "The mount is read-only."
        if log.keeps_all:
            return "A node holds another history: nothing is freed until you have decided."
        if log.doubt:
            return f"Nothing is freed, because {log.doubt}, until 'fusestore fsck' finds nothing."
        return log.broken

    # --- in the background ---------------------------------------------------

    async def run(self) -> None:
        """Clean whenever there is too much waste, until cancelled."""
        if self._log.read_only:
            return
        self._runs = True
        while True:
            compaction, problem = self._compaction, ""
            try:
                if self._emptier.look_again():
                    self._fruitless_at = -1
                if not self._log.waste_counted:
                    await self._emptier.find(1)
                if compaction is not None and self._may_run():
                    await self._emptier.free()  # all is sealed then
                if self._is_due() and self._may_run():
                    await self._clean(self._is_done, polite=True)
                if self._is_measure_due() and self._may_run():
                    await self._unpin(lambda pinned: pinned - self._pinned_bound, polite=True)
                if compaction is not None and self._may_run():
                    await self._emptier.free()
                    while self._may_run() and await self._unpin(_all, polite=True):
                        await self._emptier.free()
            except FusestoreError as error:
                problem = str(error)
                logger.warning("Cleaning stopped: %s It is tried again.", error)
            if compaction is not None:
                compaction.problem = problem or self.hindrance() or self._emptier.waits_for
                compaction.ended.set()
                self._compaction = None
                self._wake.set()  # what it left aside is looked at
            self._throttle.release()
            pauses = WAITING_PAUSES if problem or self._emptier.waits_for else 1
            with trio.move_on_after(self._limits.clean_look_seconds * pauses):
                await self._wake.wait()
            self._wake = trio.Event()

    async def hold_up(self, length: int) -> None:
        """Let a write of `length` bytes wait while there is far too much waste."""
        if self.is_urgent and self._is_at_work():
            self._wake.set()
            self._pacing.cancel()
            await self._throttle.wait(length, self._log.waste / self._too_much)

    def _is_at_work(self) -> bool:
        """Whether waiting for cleaning makes sense, and not too many do."""
        return (
            self._runs
            and self._may_run()
            and not self.is_fruitless()
            and not self._emptier.waits_for
            and self._throttle.held < self._limits.fuse_tasks_max // 2
        )

    # --- on request ----------------------------------------------------------

    async def make_room(self) -> bool:
        """Clean for a request that found no room; return whether some was given back."""
        if not self._may_run():
            return False
        before, at_once = self._emptier.freed, self._limits.clean_bytes_at_once
        if not self._emptier.has_holes and await self._unpin(lambda _: at_once, polite=False):
            return True
        goal = self._log.waste - at_once
        await self._clean(lambda: self._log.waste < goal, polite=False)
        if self._emptier.freed > before:
            return True
        return await self._unpin(lambda _: at_once, polite=False)

    def compact(self) -> Compaction:
        """Begin to clean until no stripe gives back enough, or join those who asked before.

        A compaction ends with the mount.  ReadOnlyError.
        """
        self._log.refuse_read_only()
        if self._log.broken:
            raise ReadOnlyError(self._log.broken)
        if self._compaction is None:
            emptier = self._emptier
            self._writer.seal_all()  # an open stripe has no garbage that is counted
            self._compaction = Compaction(emptier.freed, emptier.moved, self._log.next_stripe())
            self._emptier.unreadable.clear()
            self._wake.set()
        return self._compaction

    async def wait(self, compaction: Compaction, progress: Progress) -> None:
        """Report progress until a compaction has ended, and what it emptied is free."""
        while not compaction.ended.is_set():
            done = self._emptier.freed - compaction.freed_before
            progress({"phase": "cleaning", "done": done, "total": done + self._log.waste})
            with trio.move_on_after(LOOK_SECONDS):
                await compaction.ended.wait()

    async def _clean(self, is_enough: Callable[[], bool], *, polite: bool) -> None:
        """Empty stripes until there is enough, or no stripe gives back anything."""
        emptier = self._emptier
        pace = Pace(self._log, self._limits.clean_rate) if polite else None
        self._passes += 1
        try:
            while self._may_run() and not is_enough():
                absent, freed, waste = len(emptier.absent), emptier.freed, self._log.waste
                queue = await emptier.find(self._limits.victims_max, self._below)
                while queue and self._may_run() and not is_enough():
                    await self._empty_next(queue, pace)
                    if emptier.waits_for:
                        return
                if emptier.freed == freed and len(emptier.absent) <= absent:
                    if self._below is None:  # all were looked at
                        self._fruitless_at = max(waste, self._log.waste) * 21 // 20
                    return  # else others are looked at
            self._fruitless_at = -1
        finally:
            self._passes -= 1

    async def _unpin(self, enough: Callable[[int], int], *, polite: bool) -> bool:
        """Empty segments that pin `enough(pinned)` bytes; return whether any bytes were moved."""
        emptier = self._emptier
        self._measured_at, self._measured = trio.current_time(), self._log.position.commit
        pace = Pace(self._log, self._limits.clean_rate) if polite else None
        before = emptier.moved
        self._passes += 1
        try:
            queue = await emptier.find_pinned(enough, self._below)
            while queue and self._may_run() and not emptier.waits_for:
                await self._empty_next(queue, pace, always=True)
        finally:
            self._passes -= 1
        return emptier.moved > before

    async def _empty_next(
        self, queue: deque[int], pace: Pace | None, *, always: bool = False
    ) -> None:
        """Empty the next stripes of a queue; see `Emptier.empty`."""
        emptier = self._emptier
        for victims in by_code(await emptier.next(queue)):
            if pace is not None and not self.is_urgent:
                with trio.CancelScope() as self._pacing:
                    await pace.spend(_cost(victims))
            before, began = emptier.freed, trio.current_time()
            await emptier.empty(victims, always=always)
            if emptier.waits_for:
                return
            if emptier.freed > before:
                self._throttle.gave_back(emptier.freed - before, trio.current_time() - began)


def _all(pinned: int) -> int:
    return pinned


def _cost(victims: list[Victim]) -> int:
    """Return the bytes that are read and written to empty stripes of one code."""
    code, length = victims[0].row.code, sum(victim.count.live for victim in victims)
    return length + length * code.n // code.k
