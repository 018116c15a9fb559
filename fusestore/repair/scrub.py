"""The scrub: every journal and every shard is read and verified, and damage is repaired.

A row of the metadata has its state, so it continues after a restart.  Shards are
read stripe by stripe.  Shards that are already known to be missing are left to
healing, and are no findings.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import trio

from ..commit.committer import Committer
from ..commit.row_keeper import RowKeeper
from ..errors import MetadataError, NodeError, NotDurableError, ReplayError, ShortageError
from ..format import keys, store_rows, stripe_rows
from ..format.stripe_rows import Stripe
from ..log.background_job import BackgroundJob, JobRow, Progress
from ..log.log import Log
from ..log.pace import Pace
from ..members.standing import State
from .heal import Healer
from .rebuild import not_intact
from .rejoin import Rejoin

logger = logging.getLogger(__name__)

DAY_SECONDS = 86_400
LOOK_SECONDS = 600.0
"""How often the schedule is compared with the clock."""

REFUSALS = {
    "begin": "A scrub is {state} already: pause, resume or wait for it.",
    "pause": "No scrub is running.",
    "resume": "No scrub is paused.",
}


@dataclass(slots=True)
class Scrub(JobRow):
    """The state of a scrub, or the result of the last one."""

    problem: str = ""
    """Why it is paused although nobody paused it: it continues when this may have passed."""
    position: str = ""
    """The key of the next stripe, in hexadecimal; empty while the journals are read."""
    end: str = ""
    """The first key past all stripes that existed when it began, in hexadecimal."""
    stripes: int = 0
    total: int = 0
    """Stripes read, and about how many exist."""
    shards: int = 0
    size: int = 0
    """Shards read and verified, and their bytes."""
    skipped: int = 0
    """Shards of nodes that were not up."""
    found: int = 0
    """Shards and journal records that were bad or gone."""
    left: int = 0
    """Shards that are still missing at the end."""
    unread: int = 0
    """Journal ranges that no node could read, and 1 if the metadata could not be mended."""


class Scrubber:
    """Runs a scrub in the background."""

    def __init__(
        self,
        log: Log,
        committer: Committer,
        healer: Healer,
        rejoin: Rejoin,
        rows: RowKeeper,
        every_days: int,
    ) -> None:
        self._rows = rows
        self._log = log
        self._limits = log.limits
        self._committer = committer
        self._healer = healer
        self._rejoin = rejoin
        self._every_days = every_days
        self.job = BackgroundJob(log, store_rows.SCRUB_KEY, Scrub, REFUSALS)
        self._walk_from = (0.0, 0)
        """When this run began, by the monotonic clock, and the stripes read before."""

    @property
    def scrub(self) -> Scrub:
        """The state of the current or last scrub."""
        return self.job.row

    def report(self) -> dict[str, Any]:
        """The state, and `eta_seconds`, the expected time to the end, or None if unknown."""
        scrub = self.scrub
        began, before = self._walk_from
        done = scrub.stripes - before
        eta = None
        if self.job.is_running and done > 0 and scrub.stripes < scrub.total:
            eta = (scrub.total - scrub.stripes) * (time.monotonic() - began) / done
        return {**asdict(scrub), "eta_seconds": eta}

    # --- commands ------------------------------------------------------------

    async def command(
        self, action: str, rate: float | None, *, wait: bool, alone: bool, progress: Progress
    ) -> dict[str, Any]:
        """Start, pause or resume a scrub, or report its state; with `wait`, after it ended.

        A start with `wait` joins a scrub that already runs.  `alone`: nothing else uses
        the store, and a scrub that was begun before continues.
        """
        begun = self.scrub.state in ("running", "paused")
        if alone and begun and action in ("start", "resume"):
            if not self.job.is_running:
                self._continue(None)
        elif action == "start" and not (wait and self.job.is_running):
            self.job.begin(Scrub(rate=rate))
        elif action == "pause" and self.scrub.state == "paused" and self.scrub.problem:
            self.scrub.problem = ""
            self.job.note()
        elif action == "pause":
            self.job.pause()
        elif action == "resume":
            self._continue(rate)
        if wait:
            await self.job.wait(self._progress, progress)
        return asdict(self.scrub)

    def _progress(self) -> dict[str, Any]:
        total = max(self.scrub.total, self.scrub.stripes)
        return {"phase": "stripes", "unit": "", "done": self.scrub.stripes, "total": total}

    # --- the work ------------------------------------------------------------

    async def run(self) -> None:
        """Scrub on request, and when the last scrub is too long ago, until cancelled."""
        if self.scrub.state == "never" and not self.scrub.finished:
            self.scrub.finished = time.time()  # the first one is due a while after this
            self.job.note()
        while True:
            if self.job.is_running:
                try:
                    await self._walk()
                except (NodeError, NotDurableError, MetadataError, ShortageError) as error:
                    logger.error("The scrub is paused: %s", error)
                    if self.job.is_running:
                        self.scrub.problem = str(error)
                        self.job.pause()
            if not self.job.is_running:
                # The clock may be set meanwhile, and does not run while the machine sleeps.
                await self.job.changed(min(self._until_due(), LOOK_SECONDS))
                if self.scrub.state in ("never", "done") and self._until_due() <= 0:
                    self.job.begin(Scrub())
                elif self._may_continue():
                    self._continue(None)

    def _may_continue(self) -> bool:
        """Whether a scrub that trouble had paused is to try again."""
        halted = self.scrub.state == "paused" and self.scrub.problem
        return bool(halted) and not self._log.broken

    def _continue(self, rate: float | None) -> None:
        self.scrub.problem = ""
        self.job.resume(rate)

    def _until_due(self) -> float:
        """Seconds until the next scrub by schedule."""
        if self.scrub.state == "paused" and self.scrub.problem:
            return self._limits.retry_seconds_max / 10
        if not self._every_days or self.scrub.state == "paused":
            return float("inf")
        # A scrub that skipped nodes is soon repeated: their shards are unverified.
        days = 1 if self.scrub.skipped else self._every_days
        # If the last one ended in the future, the clock was wrong then, or is wrong now.
        ended = min(self.scrub.finished, time.time())
        if ended < self.scrub.finished:
            self.scrub.finished = ended
            self.job.note()
        return max(0.0, ended + days * DAY_SECONDS - time.time())

    async def _walk(self) -> None:
        scrub = self.scrub
        pace = Pace(self._log, scrub.rate)
        if not scrub.position:
            await self._journals()
            await self._metadata()
            scrub.position = stripe_rows.STRIPES_START.hex()
            scrub.total = self._log.counters.stripes
            # Stripes written from now on wait for the next scrub; else this one might not end.
            scrub.end = self._log.stripes_end().hex()
        end = bytes.fromhex(scrub.end) or stripe_rows.STRIPES_END
        self._walk_from = (time.monotonic(), scrub.stripes)
        while self.job.is_current(scrub):
            start = bytes.fromhex(scrub.position)
            batch = next(self._log.batches(start, end, self._limits.repair_batch), [])
            await pace.spend(sum(row.shard_length * row.code.n for _, row in batch))
            await self._verify(batch)
            scrub.stripes += len(batch)
            if len(batch) < self._limits.repair_batch:
                await self._finish()
                return
            scrub.position = (stripe_rows.stripe_key(batch[-1][0]) + b"\0").hex()
            self.job.note_after(self._limits.scrub_note_seconds)

    async def _journals(self) -> None:
        """Compare the journals of the nodes in sync with each other, and repair them."""
        for member in self._log.members.in_sync:
            try:
                copied = await self._rejoin.mend_journal(member)
            except NodeError as error:
                member.fail(error)
                self._committer.ask()
                self.scrub.unread += 1
                continue
            except ReplayError as error:
                logger.error("Scrub: node %s cannot be compared: %s", member.name, error)
                self.scrub.unread += 1
                continue
            for lost in copied.unknown:
                logger.error("Scrub: a part of the journals cannot be read: %s", lost.error)
            self.scrub.unread += len(copied.unknown)
            self.scrub.found += max(copied.records, copied.mended)
        await self._rejoin.fill_gaps()

    async def _metadata(self) -> None:
        """Verify all rows of the metadata."""
        try:
            self.scrub.found += len(await self._rows.mend())
        except (MetadataError, ReplayError) as error:
            logger.error("The metadata cannot be mended: %s", error)
            self.scrub.unread += 1

    async def _verify(self, batch: list[tuple[int, Stripe]]) -> None:
        """Read all shards of some stripes, each node in its own thread."""
        async with trio.open_nursery() as nursery:
            for member in self._log.members.all:
                mine = [
                    (number, row, here)
                    for number, row in batch
                    if (here := [i for i, p in enumerate(row.shards) if p.node == member.id])
                ]
                if not mine:
                    continue
                if member.state is not State.UP:
                    self.scrub.skipped += sum(len(here) for _, _, here in mine)
                    continue
                nursery.start_soon(self._verify_node, member.id, mine)

    async def _verify_node(self, node: int, mine: list[tuple[int, Stripe, list[int]]]) -> None:
        member = self._log.members.by_id[node]
        try:
            bad = await member.call(not_intact, self._log, member, mine)
        except NodeError as error:
            member.fail(error)
            self._committer.ask()
            return
        for number, row, here in mine:
            new = sum(self._damaged(number, row, index) for index in bad.get(number, ()))
            count = len(here) - len(bad.get(number, ())) + new
            self.scrub.shards += count
            self.scrub.size += count * row.shard_length

    def _damaged(self, number: int, row: Stripe, index: int) -> bool:
        """Have a bad shard rebuilt; False if it was freed or moved, or is in `missing` already."""
        place = row.shards[index]
        now = self._log.stripe(number)
        key = stripe_rows.missing_key(place.node, number, index)
        if now is None or now.shards[index] != place or self._log.engine.get(key) is not None:
            return False
        logger.warning("Scrub: shard %d of stripe %#x is bad or gone.", index, number)
        self.scrub.found += 1
        self._log.apply({key: b""})
        return True

    async def _finish(self) -> None:
        await self._healer.heal_all()
        await self._committer.commit()
        self.scrub.left = sum(1 for _ in self._log.engine.scan(b"M", keys.after(b"M")))
        if self.job.is_running:
            self.job.end()
