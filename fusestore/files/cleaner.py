"""Cleaning: stripes that are mostly garbage are emptied, so that their room comes back.

A stripe is immutable, and goes when its last byte does.  Cleaning moves what is left of the
emptiest stripes to new ones.  `Log.waste` counts what it would give back.  It runs

- above the bound, a share of the files' bytes: at the pace of background work;
- above half the bound, while nobody uses the mount;
- above twice the bound, or when a request found no room: at once; writers then get room in
  memory only as fast as cleaning gives back;
- when it is asked to compact: until no stripe gives back enough.

A batch fills whole stripes, because a commit would seal what is left over as a small one.  A
stripe with a shard on a node that is away is left alone: with the node it has more shards than
a new one would get.  So is a stripe whose count of live bytes is not that of its extents.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

import trio

from ..errors import FusestoreError, NoMemoryLeftError, NoSpaceError, ReadOnlyError
from ..format import stripe_rows
from ..format.erasure import Code
from ..format.stripe_rows import LIVE_START, Live
from ..log.background_job import LOOK_SECONDS, Progress
from ..log.log import Log
from ..log.pace import Pace
from ..system import threads
from .contents import Part
from .rewriter import Rewriter
from .victims import Rated, Victim, find_waste, look_at

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Compaction:
    """A request to clean until no stripe gives back enough, whatever the bound."""

    freed_before: int
    moved_before: int
    """The counts of the cleaner when it began."""
    problem: str = ""
    """Why it has ended early; or empty."""
    ended: trio.Event = field(default_factory=trio.Event)


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
        self._fruitless_at = -1
        """While there is at most so much waste, no stripe gives back enough."""
        self._away: set[int] = set()
        """The nodes that were out of use when cleaning last looked, by id."""
        self.absent: set[int] = set()
        """Stripes that are left alone, because they have shards on these nodes."""
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
        """Why it could not write when it last tried; or empty."""
        self._compaction: Compaction | None = None

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
        if not self._log.waste_counted or not self._may_run() or self.is_fruitless():
            return 0
        if any(member.out_of_use for member in self._log.members.all):
            return 0
        return max(0, self._log.waste - self.bound // 2) * 7 // 8

    @property
    def is_running(self) -> bool:
        """Whether stripes are being emptied."""
        return self._lock.locked() or self._compaction is not None

    @property
    def held_writers(self) -> int:
        """The number of writes that wait for cleaning."""
        return len(self._held)

    @property
    def _is_idle(self) -> bool:
        return trio.current_time() - self._log.used_at > self._limits.clean_idle_seconds

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
                self._notice_nodes()
                if not self._log.waste_counted:
                    await self._find(1)
                if self._is_due() and self._may_run():
                    async with self._lock:
                        await self._clean(self._is_done, polite=True)
                if compaction is not None and self._may_run():
                    await self._free()
            except FusestoreError as error:
                problem = str(error)
                logger.warning("Cleaning stopped: %s It is tried again.", error)
            if compaction is not None:
                compaction.problem = problem or self.hindrance() or self.waits_for
                compaction.ended.set()
                self._compaction = None
            self._held.unpark_all()
            with trio.move_on_after(self._limits.clean_look_seconds):
                await self._wake.wait()
            self._wake = trio.Event()

    def _notice_nodes(self) -> None:
        """Try again what was left alone, when other nodes are out of use than before."""
        away = {member.id for member in self._log.members.all if member.out_of_use}
        if away != self._away:
            self._away = away
            self.absent.clear()
            self.unreadable.clear()
            self._fruitless_at = -1

    async def hold_up(self, length: int) -> None:
        """Let a write of `length` bytes wait while there is far too much waste."""
        if not self.is_urgent:
            return
        with trio.move_on_after(self._limits.hold_seconds_max):
            while self._credit < length and self._is_at_work():
                self._wake.set()
                await self._held.park()
        self._credit = max(0, self._credit - length)

    def _is_at_work(self) -> bool:
        """Whether waiting for cleaning makes sense, and not too many do."""
        return (
            self.is_urgent
            and self._runs
            and self._may_run()
            and not self.is_fruitless()
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

    def compact(self) -> Compaction:
        """Begin to clean until no stripe gives back enough, or join those who asked before.

        A compaction ends with the mount.  ReadOnlyError.
        """
        self._log.refuse_read_only()
        if self._log.broken:
            raise ReadOnlyError(self._log.broken)
        if self._compaction is None:
            self._compaction = Compaction(self.freed, self.moved)
            self.unreadable.clear()
            self.waits_for = ""
            self._wake.set()
        return self._compaction

    async def wait(self, compaction: Compaction, progress: Progress) -> None:
        """Report progress until a compaction has ended, and what it emptied is free."""
        while not compaction.ended.is_set():
            done = self.freed - compaction.freed_before
            progress({"phase": "cleaning", "done": done, "total": done + self._log.waste})
            with trio.move_on_after(LOOK_SECONDS):
                await compaction.ended.wait()

    # --- the work ------------------------------------------------------------

    async def _find(self, most: int) -> list[int]:
        """Count the waste, and return the emptiest stripes."""
        log, total = self._log, 0
        start: bytes | None = LIVE_START
        emptiest, doubted = list[Rated](), set[int]()
        before = log.waste
        while start is not None:  # a slice after another, so that the store can be closed
            without = self.doubted | self.unreadable | self.absent | set(log.unsealed)
            with log.engine.view(LIVE_START) as view:
                found = await threads.call(find_waste, view, start, most, without)
            total += found.total
            doubted |= found.doubted
            emptiest = heapq.nsmallest(most, emptiest + found.emptiest)
            start = found.end
            await trio.lowlevel.checkpoint()
        log.waste += total - before  # and what changed meanwhile
        if not log.waste_counted:
            log.doubt_counts(doubted)
        log.waste_counted = True
        return [number for _, number in emptiest]

    async def _clean(self, is_enough: Callable[[], bool], *, polite: bool) -> None:
        """Empty stripes until there is enough, or no stripe gives back anything."""
        pace = Pace(self._log, self._limits.clean_rate)
        while self._may_run() and not is_enough():
            absent = len(self.absent)
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
            if not tried and len(self.absent) <= absent:  # else others are looked at
                self._fruitless_at = max(before, self._log.waste) * 21 // 20
                return
        self._fruitless_at = -1

    async def _next(self, queue: deque[int]) -> list[Victim]:
        """Take stripes from the queue that together fill some new ones."""
        size, numbers = 0, list[int]()
        engine = self._log.engine
        while queue and size < self._limits.clean_bytes and len(numbers) < 256:
            number = queue.popleft()
            value = engine.get(stripe_rows.live_key(number))
            if value is not None and number not in self._log.unsealed:
                size += Live.decode(value).live
                numbers.append(number)
        with engine.view() as view:
            found = await threads.call(look_at, view, numbers)
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
                    self.absent.add(number)
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
        if not _is_gain(victims, chosen, self._limits.stripe_bytes):
            self.waits_for = ""
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


def _is_gain(victims: Iterable[Victim], parts: Iterable[Part], stripe_bytes: int) -> bool:
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
    full, rest = divmod(moved.total(), stripe_bytes)
    waste = full * Live(stripe_bytes, stripe_bytes).waste + Live(rest, rest).waste
    return gain > waste
