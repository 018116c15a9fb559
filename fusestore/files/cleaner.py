"""Cleaning: stripes that are mostly garbage are emptied, so that their room comes back.

A stripe is immutable, and goes when its last byte does.  Cleaning moves what is left of the
emptiest stripes to new ones.  `Log.waste` counts what it would give back.  It runs

- above the bound, a share of the files' bytes: at the pace of background work;
- above half the bound, while nobody uses the mount;
- above twice the bound, or when a request found no room: at once; writers then get room in
  memory only as fast as cleaning gives back.

A batch fills whole stripes, because a commit would seal what is left over as a small one.  A
stripe with a shard on a node that is away is left alone: with the node it has more shards than
a new one would get.  So is a stripe whose count of live bytes is not that of its extents.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator

import trio

from ..errors import FusestoreError, NoMemoryLeftError, NoSpaceError
from ..format import stripe_rows
from ..format.erasure import Code
from ..log.log import Log
from ..log.pace import Pace
from ..system import threads
from .contents import Part
from .rewriter import Rewriter
from .victims import Victim, Waste, find_waste, look_at

logger = logging.getLogger(__name__)


class Cleaner:
    """Empties stripes in the background, and on request."""

    def __init__(self, log: Log, rewriter: Rewriter, free: Callable[[], Awaitable[bool]]) -> None:
        """`free` commits, and returns when the room of emptied stripes can be used again."""
        self._log = log
        self._limits = log.limits
        self._rewriter = rewriter
        self._free = free
        self._lock = trio.Lock()
        self._wake = trio.Event()
        self._runs = False
        self._held = trio.lowlevel.ParkingLot()
        """Writers that wait for cleaning."""
        self._credit = 0
        """Bytes that held writers may write, because cleaning gave so many back."""
        self._fruitless_at = math.inf
        """While there is at most so much waste, no stripe gives back enough."""
        self.doubted: set[int] = set()
        """Stripes whose counts are not those of their extents."""
        self.unreadable: set[int] = set()
        """Stripes with bytes that cannot be read."""
        self._disagreed: set[int] = set()
        """Stripes whose counts did not agree when they were last looked at."""
        self.freed = 0
        """Bytes that cleaning gave back since the mount."""
        self.moved = 0
        """Bytes that it wrote for them."""
        self.waits_for = ""

    # --- the bound -----------------------------------------------------------

    @property
    def bound(self) -> int:
        """Bytes of waste above which cleaning runs."""
        share = self._log.counters.file_bytes * self._limits.waste_percent_max // 100
        return share + self._limits.waste_bytes_min

    @property
    def is_urgent(self) -> bool:
        """Whether writers are to be held up."""
        return self._log.waste > 2 * self.bound

    def within_reach(self) -> int:
        """Return the bytes, at least, that a request gets that finds no room."""
        if not self._log.waste_counted or not self._may_run() or self._is_fruitless():
            return 0
        if any(member.out_of_use for member in self._log.members.all):
            return 0
        return max(0, self._log.waste - self.bound // 2) * 7 // 8

    @property
    def _is_idle(self) -> bool:
        return trio.current_time() - self._log.used_at > self._limits.clean_idle_seconds

    @property
    def _goal(self) -> int:
        return self.bound // 2 if self._is_idle else self.bound

    def _is_due(self) -> bool:
        return self._log.waste > self._goal and not self._is_fruitless()

    def _is_done(self) -> bool:
        """Whether enough is given back; less than `_is_due`, so that walks are rare."""
        return self._log.waste <= self._goal * 7 // 8

    def _is_fruitless(self) -> bool:
        return self._log.waste <= self._fruitless_at < math.inf

    def _may_run(self) -> bool:
        log = self._log
        return not (log.read_only or log.broken or log.keeps_all or log.doubt or log.is_ending)

    # --- in the background ---------------------------------------------------

    async def run(self) -> None:
        """Clean whenever there is too much waste, until cancelled."""
        if self._log.read_only:
            return
        self._runs = True
        while True:
            try:
                if not self._log.waste_counted:
                    await self._find(1)
                if self._is_due() and self._may_run():
                    async with self._lock:
                        await self._clean(self._is_done, polite=True)
            except FusestoreError as error:
                logger.warning("Cleaning stopped: %s It is tried again.", error)
            self._held.unpark_all()
            with trio.move_on_after(self._limits.clean_look_seconds):
                await self._wake.wait()
            self._wake = trio.Event()

    async def hold_up(self, length: int) -> None:
        """Let a write of `length` bytes wait while there is far too much waste."""
        if not self.is_urgent:
            return
        with trio.move_on_after(self._limits.hold_seconds_max):
            while self._credit < length and self.is_urgent and self._is_at_work():
                self._wake.set()
                await self._held.park()
        self._credit = max(0, self._credit - length)

    def _is_at_work(self) -> bool:
        """Whether waiting for cleaning makes sense, and not too many do."""
        return (
            self._runs
            and self._may_run()
            and not self._is_fruitless()
            and len(self._held) < self._limits.fuse_tasks_max // 2
        )

    # --- on request ----------------------------------------------------------

    async def make_room(self) -> bool:
        """Clean for a request that found no room; return whether some was given back."""
        if not self._may_run():
            return False
        async with self._lock:
            before = self.freed
            goal = self._log.waste - self._limits.clean_bytes_at_once
            await self._clean(lambda: self._log.waste < goal, polite=False)
            return self.freed > before

    # --- the work ------------------------------------------------------------

    async def _find(self, most: int) -> list[int]:
        """Count the waste, and return the emptiest stripes."""
        log = self._log
        without = self.doubted | self.unreadable | set(log.unsealed)
        with log.engine.view() as view:
            before = log.waste
            found: Waste = await threads.run_sync(find_waste, view, most, without)
        log.waste += found.total - before  # and what changed meanwhile
        if not log.waste_counted:
            log.doubt_counts(found.doubted)
        log.waste_counted = True
        return found.emptiest

    async def _clean(self, is_enough: Callable[[], bool], *, polite: bool) -> None:
        """Empty stripes until there is enough, or no stripe gives back anything."""
        pace = Pace(self._log, self._limits.clean_rate)
        while self._may_run() and not is_enough():
            queue = deque(await self._find(self._limits.victims_max))
            before, tried = self._log.waste, False
            while queue and self._may_run() and not is_enough():
                victims = await self._next(queue)
                for code, same in _by_code(victims).items():
                    if polite and not self.is_urgent:
                        length = sum(victim.count.live for victim in same)
                        await pace.spend(length + length * code.n // code.k)
                    tried |= await self._empty(code, same)
                    if self.waits_for:
                        return
            if not tried:
                self._fruitless_at = max(before, self._log.waste) * 21 // 20
                return
        self._fruitless_at = math.inf

    async def _next(self, queue: deque[int]) -> list[Victim]:
        """Take stripes from the queue that together fill some new ones."""
        size, numbers = 0, list[int]()
        engine = self._log.engine
        while queue and size < self._limits.clean_bytes and len(numbers) < 256:
            number = queue.popleft()
            value = engine.get(stripe_rows.live_key(number))
            if value is not None and number not in self._log.unsealed:
                size += stripe_rows.Live.decode(value).live
                numbers.append(number)
        with engine.view() as view:
            found = await threads.run_sync(look_at, view, numbers)
        return [victim for victim in found if self._may_empty(victim)]

    def _may_empty(self, victim: Victim) -> bool:
        number = victim.number
        if not victim.agrees:
            if number in self._disagreed:  # a file that is being removed may explain the first time
                self._log.rows_in_doubt += 1
                self.doubted.add(number)
                logger.error(
                    "Stripe %#x counts %d live bytes, but files have %d: it is not cleaned. "
                    "Run 'fusestore fsck --repair'.",
                    number,
                    victim.count.live,
                    sum(extent.length for _, extent in victim.extents),
                )
            self._disagreed.add(number)
            return False
        self._disagreed.discard(number)
        for index, place in enumerate(victim.row.shards):
            member = self._log.members.by_id.get(place.node)
            if place.written and (member is None or member.out_of_use):
                key = stripe_rows.missing_key(place.node, number, index)
                if self._log.engine.get(key) is None:
                    return False
        return True

    async def _empty(self, code: Code, victims: list[Victim]) -> bool:
        """Move the bytes of some stripes, if this gives something back; return whether it did."""
        extents = [item for victim in victims for item in victim.extents]
        parts, lost = await self._rewriter.read(extents)
        if lost:
            unread = {extent.stripe for _, extent in extents} - {p.extent.stripe for p in parts}
            self.unreadable |= unread
        chosen = list(_whole(victims, parts, self._limits.stripe_bytes)) or parts
        if not _is_gain(victims, chosen):
            return False
        try:
            moved, freed = await self._rewriter.write(code, chosen, in_reserve=True)
        except NoMemoryLeftError as error:
            self.waits_for = str(error)
            return False
        except NoSpaceError as error:
            if not await self._free():  # what was emptied before can be used now
                self.waits_for = str(error)
            return False
        self.waits_for = ""
        self.moved += moved
        self.freed += freed
        self._credit = max(0, freed)
        self._held.unpark_all()
        return True


def _by_code(victims: Iterable[Victim]) -> dict[Code, list[Victim]]:
    found: dict[Code, list[Victim]] = defaultdict(list)
    for victim in victims:
        found[victim.row.code].append(victim)
    return found


def _whole(victims: Iterable[Victim], parts: Iterable[Part], stripe_bytes: int) -> Iterator[Part]:
    """Yield as many parts as fill whole stripes, those of one victim after those of another."""
    parts_of = defaultdict[int, list[Part]](list)
    for part in parts:
        parts_of[part.extent.stripe].append(part)
    left = sum(part.length for part in parts) // stripe_bytes * stripe_bytes
    for victim in victims:
        for part in parts_of[victim.number]:
            if left <= 0:
                return
            yield part.first(left)
            left -= part.length


def _is_gain(victims: Iterable[Victim], parts: Iterable[Part]) -> bool:
    """Return whether the victims that parts empty waste more than what they are moved to.

    A victim that is not emptied wastes what leaves it.
    """
    moved = Counter[int]()
    for part in parts:
        moved[part.extent.stripe] += part.length
    gain = 0
    for victim in victims:
        emptied = moved[victim.number] == victim.count.live
        gain += victim.count.waste if emptied else -moved[victim.number]
    length = moved.total()
    return gain > stripe_rows.Live(length, length).waste
