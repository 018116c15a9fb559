"""The scrub: every journal and every shard is read and verified, and what fails is repaired.

Where it stands is a row of the metadata, so it goes on where it was after a
restart.  Shards are walked stripe by stripe; what is already known to be missing
is left to healing and is no finding.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import trio

from ..commit.committer import Committer
from ..errors import NodeError, NotDurableError, UsageError
from ..format import keys, store_rows, stripe_rows
from ..format.stripe_rows import Stripe
from ..log.log import Log
from ..log.pace import Pace
from ..members.standing import State
from .rebuild import not_intact
from .repairer import Repairer

log = logging.getLogger(__name__)

DAY_SECONDS = 86_400
SCRUB_LOOK_SECONDS = 0.2
Progress = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Scrub:
    """Where a scrub stands, or how the last one ended; JSON in its row."""

    state: str = "never"
    """never, running, paused or done."""
    position: str = ""
    """The key of the next stripe, in hexadecimal; empty while the journals are read."""
    end: str = ""
    """The first key past those that there were when it began, in hexadecimal."""
    rate: float | None = None
    """Bytes a second, None for as fast as users' own I/O allows."""
    started: float = 0.0
    finished: float = 0.0
    """Seconds since the epoch."""
    stripes: int = 0
    total: int = 0
    """Stripes read, and about how many there are."""
    shards: int = 0
    size: int = 0
    """Shards read and verified, and their bytes."""
    skipped: int = 0
    """Shards of nodes that were not up."""
    found: int = 0
    """Shards and records of journals that were bad or gone."""
    left: int = 0
    """Shards that are still missing at the end."""
    unread: int = 0
    """Places of journals that no node could read."""

    def encode(self) -> bytes:
        """The row's value."""
        return json.dumps(asdict(self)).encode()


class Scrubber:
    """Runs a scrub in the background."""

    def __init__(
        self, state: Log, committer: Committer, repairer: Repairer, every_days: int
    ) -> None:
        self._log = state
        self._limits = state.limits
        self._committer = committer
        self._repairer = repairer
        self._every_days = every_days
        value = state.engine.get(store_rows.SCRUB_KEY)
        self.scrub = Scrub(**json.loads(value)) if value else Scrub()
        self._wake = trio.Event()
        self._walk_from = (0.0, 0)
        """When this walk began, by the monotonic clock, and the stripes read before."""

    def report(self) -> dict[str, Any]:
        """Where it stands, and `eta_seconds`, when it should end, if that can be told."""
        scrub = self.scrub
        began, before = self._walk_from
        done = scrub.stripes - before
        eta = None
        if scrub.state == "running" and done > 0 and scrub.stripes < scrub.total:
            eta = (scrub.total - scrub.stripes) * (time.monotonic() - began) / done
        return {**asdict(scrub), "eta_seconds": eta}

    # --- commands ------------------------------------------------------------

    async def command(
        self, action: str, rate: float | None, *, wait: bool, alone: bool, progress: Progress
    ) -> dict[str, Any]:
        """Start, pause or resume a scrub, or say where it stands; with `wait`, when it ended.

        A start that waits takes one that runs already for its own.  `alone`:
        nothing else uses the store, and one that was begun before goes on.
        """
        if alone and action in ("start", "resume") and self.scrub.state in ("running", "paused"):
            self.scrub.state = "running"
            self._note()
        elif action == "start" and not (wait and self.scrub.state == "running"):
            self.start(rate)
        elif action == "pause":
            self.pause()
        elif action == "resume":
            self.resume(rate)
        while wait and self.scrub.state == "running":
            done = {"done": self.scrub.stripes, "total": max(self.scrub.total, self.scrub.stripes)}
            progress({"phase": "stripes", "unit": "", **done})
            await trio.sleep(SCRUB_LOOK_SECONDS)
        return asdict(self.scrub)

    def start(self, rate: float | None) -> None:
        """Begin anew; UsageError when one is running."""
        if self.scrub.state in ("running", "paused"):
            raise UsageError(
                f"A scrub is {self.scrub.state} already: pause, resume or wait for it."
            )
        self.scrub = Scrub("running", rate=rate, started=time.time())
        self._note()

    def pause(self) -> None:
        """Stop after what is being read; UsageError when none is running."""
        self._expect("running")
        self.scrub.state = "paused"
        self._note()

    def resume(self, rate: float | None) -> None:
        """Go on; UsageError when none is paused."""
        self._expect("paused")
        self.scrub.state, self.scrub.rate = "running", rate or self.scrub.rate
        self._note()

    def _expect(self, state: str) -> None:
        if self.scrub.state != state:
            raise UsageError(f"No scrub is {state}.")

    def _note(self) -> None:
        self._log.apply({store_rows.SCRUB_KEY: self.scrub.encode()})
        self._wake.set()

    # --- the work ------------------------------------------------------------

    async def run(self) -> None:
        """Scrub when told to, and when the last one is too long ago, until cancelled."""
        if self.scrub.state == "never" and not self.scrub.finished:
            self.scrub.finished = time.time()  # the first one is due a while after this
            self._note()
        while True:
            if self.scrub.state == "running":
                try:
                    await self._walk()
                except (NodeError, NotDurableError) as error:
                    log.error("The scrub is paused: %s", error)
                    self.scrub.state = "paused"
                    self._note()
            self._wake = trio.Event()
            if self.scrub.state != "running":
                with trio.move_on_after(self._until_due()):
                    await self._wake.wait()
                if self.scrub.state in ("never", "done") and self._until_due() <= 0:
                    self.start(None)

    def _until_due(self) -> float:
        """Seconds until the next scrub by schedule."""
        if not self._every_days or self.scrub.state == "paused":
            return float("inf")
        return max(0.0, self.scrub.finished + self._every_days * DAY_SECONDS - time.time())

    async def _walk(self) -> None:
        scrub = self.scrub
        pace = Pace(self._log, scrub.rate)
        if not scrub.position:
            await self._journals()
            scrub.position = stripe_rows.STRIPES_START.hex()
            scrub.total = self._log.counters.stripes
            # What is written from now on is read when it is its turn, else there were no end.
            scrub.end = self._log.stripes_end().hex()
        end = bytes.fromhex(scrub.end) or stripe_rows.STRIPES_END
        noted = trio.current_time()
        self._walk_from = (time.monotonic(), scrub.stripes)
        while scrub.state == "running":
            start = bytes.fromhex(scrub.position)
            batch = next(self._log.batches(start, end, self._limits.repair_batch), [])
            await pace.spend(sum(row.shard_length * row.code.n for _, row in batch))
            await self._verify(batch)
            scrub.stripes += len(batch)
            if len(batch) < self._limits.repair_batch:
                await self._finish()
                return
            scrub.position = (stripe_rows.stripe_key(batch[-1][0]) + b"\0").hex()
            if trio.current_time() - noted > self._limits.scrub_note_seconds:
                noted = trio.current_time()
                self._note()

    async def _journals(self) -> None:
        """Verify the journals of the nodes in sync against each other, and mend them."""
        for member in self._log.members.in_sync:
            try:
                copied = await self._repairer.mend_journal(member)
            except NodeError as error:
                member.fail(error)
                self._committer.ask()
                self.scrub.unread += 1
                continue
            for lost in copied.unknown:
                log.error("Scrub: no node can read what was there: %s", lost.error)
            self.scrub.unread += len(copied.unknown)
            self.scrub.found += max(copied.records, copied.mended)

    async def _verify(self, batch: list[tuple[int, Stripe]]) -> None:
        """Read all shards of some stripes, every node in its own thread."""
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
            bad = await member.call(not_intact, member, mine)
        except NodeError as error:
            member.fail(error)
            self._committer.ask()
            return
        for number, row, here in mine:
            self.scrub.shards += len(here)
            self.scrub.size += len(here) * row.shard_length
            for index in bad.get(number, ()):
                self._damaged(number, row, index)

    def _damaged(self, number: int, row: Stripe, index: int) -> None:
        """Have a bad shard rebuilt, unless it was freed or moved meanwhile, or is owed anyway."""
        place = row.shards[index]
        now = self._log.stripe(number)
        key = stripe_rows.missing_key(place.node, number, index)
        if now is not None and now.shards[index] == place and self._log.engine.get(key) is None:
            log.warning("Scrub: shard %d of stripe %#x is bad or gone.", index, number)
            self.scrub.found += 1
            self._log.apply({key: b""})

    async def _finish(self) -> None:
        await self._repairer.healer.heal_all()
        await self._committer.commit()
        self.scrub.left = sum(1 for _ in self._log.engine.scan(b"M", keys.after(b"M")))
        self.scrub.state, self.scrub.finished = "done", time.time()
        self._note()
