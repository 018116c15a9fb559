"""Emptying stripes: the bytes that files have in them move to new ones.

A batch fills whole stripes, because a commit would seal what is left over as a small one.  A
stripe with a shard on a node that is away is left alone: with the node it has more shards than
a new one would get.  So is a stripe whose count of live bytes is not that of its extents.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator

import trio

from ..errors import NoMemoryLeftError, NoSpaceError
from ..format import stripe_rows
from ..format.erasure import Code
from ..format.stripe_rows import LIVE_START, Live
from ..log.log import Log
from ..system import threads
from . import pinned
from .contents import Part
from .rewriter import Rewriter
from .victims import Rated, Victim, find_waste, look_at

VICTIMS_A_BATCH = 256

logger = logging.getLogger(__name__)


class Emptier:
    """Empties stripes, those first that give back most."""

    def __init__(self, log: Log, rewriter: Rewriter, free: Callable[[], Awaitable[bool]]) -> None:
        """`free` commits, and returns when the room of emptied stripes can be used again."""
        self._log = log
        self._limits = log.limits
        self._rewriter = rewriter
        self.free = free
        self._lock = trio.Lock()
        """Held while the victims of one batch are emptied."""
        self._counting = trio.Lock()
        """Held while the waste is counted: two that add the same difference add it twice."""
        self.absent: set[int] = set()
        """Stripes that are left alone, because they have shards on nodes that are away."""
        self.doubted: set[int] = set()
        """Stripes whose counts are not those of their extents."""
        self.unreadable: set[int] = set()
        """Stripes with bytes that cannot be read."""
        self._disagreed: set[int] = set()
        """Stripes whose counts did not agree when they were last looked at."""
        self._away: set[int] = set()
        """The nodes that were out of use at the last look, by id."""
        self._mended = log.rows_mended
        self.freed = 0
        """Bytes given back since the mount."""
        self.moved = 0
        """Bytes written for them."""
        self.pinned: int | None = None
        """Bytes that only the deletion of segments gives back, on all nodes; None: unknown."""
        self.waits_for = ""
        """Why nothing could be written at the last attempt; or empty."""

    @property
    def has_holes(self) -> bool:
        """Whether an emptied stripe gives room back, and not only an emptied segment."""
        return all(member.node.has_holes for member in self._log.members.writable)

    def look_again(self) -> bool:
        """Try again what was left alone, if its reason may be gone; return whether it may."""
        away = {member.id for member in self._log.members.all if member.out_of_use}
        changed = (away, self._log.rows_mended) != (self._away, self._mended)
        if changed:
            self._away, self._mended = away, self._log.rows_mended
            self.absent.clear()
            self.unreadable.clear()
            self.doubted.clear()
        return changed

    async def find(self, most: int, below: int | None = None) -> deque[int]:
        """Count the waste, and return the stripes that give back most, the best first.

        With `below`, only those with lower numbers.
        """
        async with self._counting:
            return deque(number for _, number in await self._count(most, below))

    async def _count(self, most: int, below: int | None) -> list[Rated]:
        log, total = self._log, 0
        start: bytes | None = LIVE_START
        emptiest, doubted, left = list[Rated](), set[int](), set[int]()
        before = log.waste
        alone = self._left_alone
        while start is not None:  # a slice after another, so that the store can be closed
            without = alone | set(log.unsealed)
            with log.engine.view(LIVE_START) as view:
                found = await threads.call(find_waste, view, start, most, without, below)
            total += found.total
            doubted |= found.doubted
            left |= found.left
            emptiest = heapq.nsmallest(most, emptiest + found.emptiest)
            start = found.end
            await trio.lowlevel.checkpoint()
        for numbers in (self.doubted, self.unreadable, self.absent):
            numbers -= alone - left  # files that were deleted had them
        log.waste += total - before  # and what changed meanwhile
        if not log.waste_counted:
            log.doubt_counts(doubted)
        log.waste_counted = True
        return emptiest

    async def find_pinned(
        self, enough: Callable[[int], int], below: int | None = None
    ) -> deque[int]:
        """Measure what is pinned, and return the stripes that pin `enough(it)` bytes of it.

        With `below`, only those with lower numbers.
        """
        found = await pinned.measure(self._log)
        self.pinned = sum(one.waste for one in found)
        chosen = dict[int, None]()  # a stripe has shards in segments of several nodes
        for one in pinned.emptiest(found, enough(self.pinned)):
            chosen |= dict.fromkeys(await pinned.stripes_in(self._log, one))
            if len(chosen) >= self._limits.victims_max:
                break
        left = self._left_alone
        return deque(
            number for number in chosen if number not in left and (below is None or number < below)
        )

    @property
    def _left_alone(self) -> set[int]:
        return self.doubted | self.unreadable | self.absent

    async def next(self, queue: deque[int]) -> list[Victim]:
        """Take stripes from the queue that together fill some new ones."""
        size, numbers = 0, list[int]()
        engine = self._log.engine
        while queue and size < self._limits.clean_bytes and len(numbers) < VICTIMS_A_BATCH:
            number = queue.popleft()
            value = engine.get(stripe_rows.live_key(number))
            if value is not None and number not in self._log.unsealed:
                size += Live.decode(value).live
                numbers.append(number)
        with engine.view() as view:
            found, wrong = await threads.call(look_at, view, numbers)
        for number, problem in wrong.items():
            self._doubt(number, problem)
        self._disagreed -= {victim.number for victim in found}
        return [victim for victim in found if self._is_here(victim)]

    def _doubt(self, number: int, problem: str) -> None:
        """Leave a stripe alone whose counts are wrong for the second time.

        A file that is being removed may explain the first time.
        """
        if number in self._disagreed:
            self._log.rows_in_doubt += 1
            self.doubted.add(number)
            logger.error(
                "Stripe %#x %s: it is not cleaned. Run 'fusestore fsck --repair'.", number, problem
            )
        self._disagreed.add(number)

    def _is_here(self, victim: Victim) -> bool:
        """Whether no shard of a stripe is on a node that is away; otherwise it is left alone."""
        for index, place in enumerate(victim.row.shards):
            member = self._log.members.by_id.get(place.node)
            if place.written and (member is None or member.out_of_use):
                key = stripe_rows.missing_key(place.node, victim.number, index)
                if self._log.engine.get(key) is None:
                    self.absent.add(victim.number)
                    return False
        return True

    async def empty(self, victims: list[Victim], *, always: bool = False) -> None:
        """Move the bytes of stripes of one code, if this gives something back, or always."""
        code = victims[0].row.code
        async with self._lock:
            extents = [item for victim in victims for item in victim.extents]
            parts, lost = await self._rewriter.read(extents)
            if lost:
                read = {part.extent.stripe for part in parts}
                self.unreadable |= {extent.stripe for _, extent in extents} - read
            chosen = parts
            self.waits_for = ""
            if not always:
                chosen = list(_whole(victims, parts, self._limits.stripe_bytes)) or parts
                if not _is_gain(victims, chosen, self._limits.stripe_bytes):
                    return
            for frees in (self.free, _frees_nothing):
                try:
                    in_reserve = always or self.has_holes
                    moved, freed = await self._rewriter.write(code, chosen, in_reserve=in_reserve)
                except NoMemoryLeftError as error:
                    self.waits_for = str(error)
                    return
                except NoSpaceError as error:
                    if not await frees():  # what was emptied before can be used now
                        self.waits_for = str(error)
                        return
                else:
                    self.moved += moved
                    self.freed += freed
                    return


async def _frees_nothing() -> bool:
    return False


def by_code(victims: Iterable[Victim]) -> list[list[Victim]]:
    """Return victims, those of one code together."""
    found: dict[Code, list[Victim]] = defaultdict(list)
    for victim in victims:
        found[victim.row.code].append(victim)
    return list(found.values())


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
            yield part if part.length <= left else part.first(left)
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
