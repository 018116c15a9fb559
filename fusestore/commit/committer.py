"""The commit: everything since the last one becomes durable with one parallel flush.

A commit takes the open stripes and the pending changes without an await in
between, waits until these stripes are sealed, appends one COMMIT record to the
journal of every node in sync, and flushes all nodes in parallel.  A stripe with few new
bytes stays open: they travel in the record as a tail.  A caller that
asks while no commit runs makes the commit itself; callers that ask during a commit
share the next one.

A node that fails leaves the set.  This is a change of its own: it is committed on
the remaining nodes and checkpointed before anything is acknowledged without the
node.

A checkpoint writes the changes that a flushed commit had set aside to the metadata
database.  Operations continue meanwhile.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import trio

from ..errors import InvariantError, NotDurableError, ShortageError
from ..format import keys, store_rows, stripe_rows
from ..format.records import (
    Commit,
    Header,
    Kind,
    checksum,
    encode_commit,
)
from ..format.segment_numbers import following, reachable
from ..format.store_rows import Descent, LogPosition, NodeRow
from ..format.stripe_rows import Stripe
from ..log.log import Log
from ..members.member import Member
from ..system import threads
from ..tally import Histogram
from ..write.stripes import CommitBatch
from ..write.writer import Writer
from .checkpoint import Checkpointer
from .journal_writer import JournalWriter

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Round:
    """The callers that wait for the same commit."""

    done: trio.Event = field(default_factory=trio.Event)
    error: str = ""
    shortage: str = ""
    """Why what was committed has fewer shards than it should."""
    reports: bool = False
    """A caller reports this to its user."""


class Committer:
    """Commits on request and every five seconds, and makes checkpoints."""

    def __init__(self, log: Log, nursery: trio.Nursery) -> None:
        self._log = log
        self._limits = log.limits
        self._nursery = nursery
        self.writer: Writer
        self._next: _Round | None = None
        self._wanted = trio.Event()
        self.lock = trio.Lock()
        """Held during a commit; only its holder may change the set of nodes in sync."""
        self.flushing: CommitBatch | None = None
        """What the running commit makes durable."""
        self._counters = b""
        self.rows: list[NodeRow] = []
        """The nodes in the last commit."""
        self._durable_through = 0
        self._uncovered = False
        """The last commit had changes, and no later commit records that it is durable."""
        self.epoch_base: int | None = None
        """Until an epoch's first commit: that commit repeats all changes after this one."""
        self.journal = JournalWriter(log)
        self.checkpointer = Checkpointer(log)
        self.commits = Histogram()
        """The duration of each, from the seal of its stripes until it was durable."""
        self.committed_at: float | None = None
        """When the last commit became durable, in seconds since the epoch."""
        self.on_commit: list[Callable[[], None]] = []

    # --- asking --------------------------------------------------------------

    def ask(self) -> None:
        """Ask for a commit soon."""
        self._wanted.set()

    async def commit(self, *, reports: bool = False) -> str:
        """Return when every change made before the call is durable; NotDurableError.

        Return why it has fewer shards than it should, or an empty string; again with the next
        commit unless the caller `reports` it.  ShortageError if it waits for room on the nodes.
        """
        if self._log.read_only:
            return ""
        if self._may_commit_here():
            self.lock.acquire_nowait()  # unlike `acquire`, without a turn of the loop
            before = self._log.position.commit
            try:
                await self.commit_now()
            finally:
                self.lock.release()
            if self._log.position.commit == before:  # a caller in a loop must let other tasks run
                await trio.lowlevel.checkpoint()
            return ""
        return await self.commit_apart(reports=reports)

    async def commit_apart(self, *, reports: bool = False) -> str:
        """Like `commit`; the commit is never made by the caller, who may thus be cancelled."""
        joined = self._next = self._next or _Round()
        joined.reports = joined.reports or reports
        self._wanted.set()
        while not joined.done.is_set():
            with trio.move_on_after(self._limits.full_seconds_max):
                await joined.done.wait()
            if self._log.room.waits and not joined.done.is_set():
                raise ShortageError(self._log.room.waits)
        if joined.error:
            raise NotDurableError(joined.error)
        return joined.shortage

    def _may_commit_here(self) -> bool:
        """Whether a caller may commit itself: nobody else does, and it cannot wait for room.

        It cannot if the commit stores no shard, and its record fits over zeros in the journals.
        """
        return (
            not self.lock.locked()
            and not self._wanted.is_set()
            and not self.writer.sealer.shortage
            and self.writer.unflushed <= self._limits.tail_bytes_max
            and any(member.journal_room is not None for member in self._log.members.in_sync)
        )

    async def run(self) -> None:
        """Commit every five seconds, and on request, until cancelled."""
        while True:
            with trio.move_on_after(self._limits.commit_seconds_max) as pause:
                await self._wanted.wait()
            async with self.lock:
                self._wanted = trio.Event()
                joined, self._next = self._next, None
                error = ""
                try:
                    await self.commit_now(cover=pause.cancelled_caught)
                except NotDurableError as failure:
                    error = str(failure)
            if joined is not None:
                joined.error, joined.shortage = error, self._shortage()
                if joined.reports:
                    self.writer.sealer.shortage = ""
                joined.done.set()

    def _shortage(self) -> str:
        """Return why there are fewer shards than there should be, unless they were healed since."""
        sealer = self.writer.sealer
        if sealer.shortage:
            prefixes = [stripe_rows.missing_prefix(m.id) for m in self._log.members.writable]
            scans = (self._log.engine.scan(prefix, keys.after(prefix)) for prefix in prefixes)
            if not any(next(rows, None) for rows in scans):
                sealer.shortage = ""
        return sealer.shortage

    # --- a new epoch ---------------------------------------------------------

    def begin_epoch(self, journals: Iterable[int]) -> None:
        """Continue in a new epoch, and in a journal segment that no node has.

        `journals` are the segments on the nodes.  The next commit must contain every change
        since the last checkpoint.
        """
        log, position = self._log, self._log.position
        row = log.engine.get(store_rows.LOG_KEY)
        base = LogPosition.decode(row) if row is not None else LogPosition()
        descent = Descent(base.commit, base.checksum, position.nonce)
        log.apply({store_rows.DESCENT_KEY: descent.encode()})
        log.position = replace(position, epoch=position.epoch + 1, nonce=os.urandom(16).hex())
        known = [position.journal_segment, self.journal.segment]
        self.journal.begin(following(known + reachable(journals, known)))
        self.epoch_base = self.checkpointer.reached

    async def resume(self, journals: Iterable[int]) -> None:
        """With the lock held, when enough nodes are back: commit everything that is in memory.

        Nobody knows which nodes hold the commit that failed.  Therefore its number is used
        again only in a new epoch, in new segments, as at a mount.  NotDurableError.
        """
        log = self._log
        self.begin_epoch(journals)
        if self.checkpointer.is_unflushed:
            log.engine.take_back()
        log.pending = log.engine.unstored()
        self.writer.sealer.seal_anew()
        log.broken = ""
        await self.commit_now(checkpoint=True)

    # --- a commit ------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Make a checkpoint of all commits so far, and hold up no commits; NotDurableError."""
        wanted = self._log.position.commit
        while self.checkpointer.reached < wanted:
            await self.checkpointer.write()
            async with self.lock:
                await self.commit_now(freeze=True)
            await self.checkpointer.write()

    async def commit_now(
        self, *, checkpoint: bool = False, cover: bool = False, freeze: bool = False
    ) -> None:
        """Make one commit, with the lock held, and its checkpoint if `checkpoint` is set.

        With `freeze`, the changes are set aside for a checkpoint that the caller makes.
        With `cover`, if there is nothing to commit, an empty commit records that all
        nodes flushed the last one, which then counts even if shards are lost later.
        NotDurableError if no sufficient set of nodes has flushed it.  A commit that has
        begun is not cancelled: the changes that it took must reach the journals.
        """
        self._log.refuse_read_only()
        with trio.CancelScope(shield=True):
            try:
                await self._commit_now(checkpoint, cover, freeze)
            except NotDurableError:
                raise
            except BaseException:
                # Its changes are not in the journals: no later commit may build on them.
                self._log.break_(
                    "A commit met an unexpected error: the mount is now read-only; mount it again.",
                    for_good=True,
                )
                raise

    async def _commit_now(self, checkpoint: bool, cover: bool, freeze: bool) -> None:
        while True:
            if self._log.broken:
                raise NotDurableError(self._log.broken)
            if self._note_nodes():
                self._log.needs_checkpoint = True
            checkpoint = checkpoint or self._log.needs_checkpoint
            if checkpoint:
                await self.checkpointer.write()  # so that this commit can set its changes aside
            unflushed = self.writer.unflushed
            batch = self.flushing = self._take(force=checkpoint or freeze, cover=cover)
            try:
                if batch is not None:
                    await self._flush(batch)
                    if batch.frozen:
                        self.checkpointer.flushed(self._log.position)
            finally:
                self.flushing = None
                self.writer.flushed(unflushed)
            if checkpoint:
                await self.checkpointer.write()
                self._log.needs_checkpoint = False
            elif self.checkpointer.is_owed:
                self._nursery.start_soon(self.checkpointer.write_later)
            for callback in self.on_commit:
                callback()
            if not self._left():
                return

    def _node_rows(self) -> list[NodeRow]:
        return [member.row() for member in self._log.members.all]

    def _left(self) -> list[Member]:
        """Nodes that are in the last commit and have failed since."""
        before = {row.id for row in self.rows if row.in_sync}
        return [
            member
            for member in self._log.members.all
            if (member.id in before and not member.in_sync)
            or (not member.writable and member.shards.unflushed)
        ]

    def _note_nodes(self) -> bool:
        """Log a changed set of nodes, and the shards that lost nodes lack."""
        for member in self._left():
            for stripe, index in member.shards.unflushed:
                if self._log.engine.get(stripe_rows.stripe_key(stripe)) is not None:
                    self._log.apply({stripe_rows.missing_key(member.id, stripe, index): b""})
            member.shards.nothing_unflushed()
        rows = self._node_rows()
        if rows == self.rows:
            return False
        if not self._log.members.can_store(self._log.code):
            self._log.break_(
                "Too few nodes are left to keep new data safe: the mount is read-only until "
                "enough of them are back."
            )
            raise NotDurableError(self._log.broken)
        self.rows = rows
        self._log.apply({store_rows.NODES_KEY: store_rows.encode_nodes(rows)})
        return True

    def _take(self, *, force: bool, cover: bool) -> CommitBatch | None:
        """The changes to commit, or None; no await in here."""
        log, engine = self._log, self._log.engine
        self.writer.settle()
        sealing = self.writer.being_sealed()
        for stripe in sealing:
            if engine.get(stripe_rows.live_key(stripe.number)) is None:
                stripe.dead = True
                log.counters.stripes -= 1
        counters = log.counters.encode()
        if counters != self._counters:
            self._counters = counters
            log.apply({store_rows.COUNTERS_KEY: counters})
        for member in log.members.all:
            for segment in member.shards.changed:
                found = member.shards.committed(segment)
                key = stripe_rows.segment_key(member.id, segment)
                log.apply({key: found.encode() if found else None})
            member.shards.changed.clear()
        due = force or self.checkpointer.is_due()
        nothing = not log.pending and not sealing and not (cover and self._uncovered)
        freeze = due and not engine.frozen and (not nothing or engine.changed_keys > 0 or force)
        log.room.taken()
        if freeze:
            engine.freeze()
            log.room.frozen()
            log.freed = 0
        if nothing:
            log.room.appended()
            if freeze:
                self.checkpointer.flushed(log.position)
            return None
        batch = CommitBatch(log.position.commit + 1, log.pending, sealing, freeze)
        log.pending = {}
        for stripe in sealing:
            stripe.batch = batch
        return batch

    async def _flush(self, batch: CommitBatch) -> None:
        log = self._log
        for stripe in batch.stripes:
            await stripe.sealed.wait()
        if log.broken:
            # The changes that were taken stay visible, but nothing more is acknowledged.
            raise NotDurableError(log.broken)
        began = time.perf_counter_ns()
        commit = Commit(
            batch.number,
            log.position.epoch,
            log.position.checksum,
            self._durable_through,
            batch.number - 1 if self.epoch_base is None else self.epoch_base,
            bytes.fromhex(log.position.nonce),
            tuple(member.id for member in log.members.in_sync),
            batch.changes,
        )
        if len(batch.changes) < self._limits.hop_changes_min:
            payload = encode_commit(commit)
        else:
            payload = await threads.call(encode_commit, commit)
        header = Header(
            Kind.COMMIT, len(payload), checksum(payload, len(payload)), commit.epoch, commit.number
        )
        await self.journal.append(header, payload)
        if log.broken:  # another mount has claimed a node
            raise NotDurableError(log.broken)
        if not self._is_held(batch):
            log.break_(
                "Too few nodes could take a commit: the mount is read-only until enough of them "
                "are back."
            )
            raise NotDurableError(log.broken)
        self._check_flushed(commit)
        self.writer.sealer.committed(batch.changes)
        log.position = replace(
            log.position,
            commit=commit.number,
            checksum=header.payload_checksum,
            journal_segment=self.journal.segment,
        )
        self.commits.add(time.perf_counter_ns() - began)
        self.committed_at = time.time()
        self._durable_through = commit.number
        self._uncovered = bool(batch.changes)
        self.epoch_base = None

    def _check_flushed(self, commit: Commit) -> None:
        """InvariantError unless every node in sync has flushed this commit and all before it."""
        log = self._log
        if commit.number != log.position.commit + 1:
            raise InvariantError(f"Commit {commit.number} follows commit {log.position.commit}.")
        for member in log.members.in_sync:
            if member.standing.holds != commit.number or member.id not in commit.in_sync:
                raise InvariantError(f"Node {member.name} has not flushed commit {commit.number}.")

    def _puts(self, batch: CommitBatch) -> list[bytes]:
        """Keys of the new stripes in a commit."""
        keys = map(stripe_rows.stripe_key, self.writer.sealer.fresh)
        return [key for key in keys if batch.changes.get(key) is not None]

    def _is_held(self, batch: CommitBatch) -> bool:
        """Return whether the nodes that flushed a commit suffice to count and checkpoint it."""
        members, engine = self._log.members, self._log.engine
        lost = {
            shard
            for member in members.all
            if not member.writable
            for shard in member.shards.unflushed
        }
        for key in self._puts(batch):
            number = stripe_rows.decode_stripe_key(key)
            row = Stripe.decode(batch.changes[key] or b"")
            good = [
                place.written
                and (number, index) not in lost
                and engine.get(stripe_rows.missing_key(place.node, number, index)) is None
                for index, place in enumerate(row.shards)
            ]
            if sum(good) < row.code.k:
                return False
        return members.can_store(self._log.code)
