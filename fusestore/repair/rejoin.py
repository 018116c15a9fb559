"""How a node gets back in sync: its shards, its journal, and the last step.

1. `enter`: the loss is committed, so the metadata lists the shards that the node lacks.
   New shards go to the node from then on.
2. `copy_journal`: the node gets the journal as it is, while commits continue.
3. `rebuild_all`: every stripe with a shard on the node is checked, stripes that lack
   other shards first.  A node that was only away, and kept its shards, needs no such
   check when it comes back by itself (comeback.py).
4. `join`: between two commits the rest of the journal is copied, and the node is in
   sync.

The caller holds `Healer.busy`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

from ..commit.committer import Committer
from ..commit.metadata_dump import MetadataDumper
from ..errors import (
    FusestoreError,
    NodeError,
    NodeIdentityError,
    NodeReadOnlyError,
    NodeTimeoutError,
)
from ..format.records import HEADER_BYTES, SegmentKind
from ..format.segment_numbers import GAP_MAX
from ..format.store_rows import NEVER_WHOLE
from ..format.stripe_rows import ShardPlace, Stripe
from ..limits import RECORD_ALIGN_BYTES
from ..log.journal import first_needed
from ..log.journal_copy import Copied, copy_journals
from ..log.lineage import Lineage, lineage
from ..log.log import Log
from ..log.pace import Pace
from ..members.member import Member
from ..members.opening import open_node
from ..members.standing import State
from ..nodes.base import Node
from ..system import threads
from .heal import Healer, Progress
from .rebuild import StripeShards, not_intact

logger = logging.getLogger(__name__)


class Rejoin:
    """The steps that complete a node; comeback and repair use them."""

    def __init__(
        self, log: Log, committer: Committer, dumper: MetadataDumper, healer: Healer
    ) -> None:
        self._log = log
        self._committer = committer
        self._dumper = dumper
        self._healer = healer

    async def lineage(self, member: Member, node: Node) -> Lineage:
        """The history that the journal of a node which is not in sync belongs to; NodeError."""
        async with self._log.journals:
            return await member.call(lineage, self._log, self._log.given_up, member, node)

    async def refused(self, member: Member, error: FusestoreError) -> None:
        """Handle a node that cannot be used for writing: read it if possible, or close it."""
        if isinstance(error, NodeReadOnlyError) and member.state is not State.FOREIGN:
            try:
                if member.standing.read_only and not member.out_of_use:
                    await member.call(member.node.check)
                    return
                config = self._log.members.config
                node = await member.call(partial(open_node, config, member.config, read_only=True))
                member.only_read(node, error)
                return
            except NodeError as other:
                error = other
        if member.out_of_use:
            member.standing.refused(error)
        else:
            member.fail(error)
        if not isinstance(error, NodeTimeoutError):
            member.let_go()

    async def copy_shards(
        self, member: Member, target: Node, pace: Pace, progress: Progress
    ) -> tuple[int, int]:
        """Copy the shards of a node in use to a new place of it; (shards, bytes) copied.

        Nothing is verified, and shards that cannot be read are left out: `rebuild_all` examines
        them all.  If a batch takes too long, or the old place is gone, the rest is rebuilt:
        the node, which is let go next, is not failed for it.  NodeError of the new place.
        """
        shards = size = 0
        total = self.total(member)
        batches = self._log.batches(
            end=self._log.stripes_end(), count=self._log.limits.repair_batch
        )
        for rows in batches:
            mine = [
                (place, row.shard_length)
                for _, row in rows
                for place in row.shards
                if place.node == member.id and place.written
            ]
            await pace.spend(2 * sum(length for _, length in mine))
            if member.out_of_use:
                break
            try:
                copied = await member.call(_copy_shards, member.node, target, mine)
            except (NodeTimeoutError, _SourceError) as error:
                logger.warning("%s What was not copied yet is rebuilt from other nodes.", error)
                break
            shards, size = shards + len(copied), size + sum(copied)
            progress({"phase": "copy", "done": min(size, total), "total": total})
        return shards, size

    async def enter(self, member: Member, node: Node) -> None:
        """Let new shards go to a node that is not in sync yet."""
        async with self._committer.lock:
            # The loss itself is committed first, so that the missing shards are known.
            await self._committer.commit_now()
            await self.take_in(member, node)

    async def take_in(self, member: Member, node: Node) -> None:
        """Like `enter`, with `Committer.lock` held, and the loss committed."""
        await member.call(member.sample, node)
        member.enter(node, await member.call(node.segments, SegmentKind.SHARDS))

    async def rebuild_all(
        self, member: Member, progress: Progress, pace: Pace | None = None
    ) -> tuple[int, int]:
        """Go through all stripes, the weakest first; (shards, bytes) rebuilt."""
        pace = pace or Pace(self._log)
        shards = size = done = 0
        total = self.total(member)
        end = self._log.stripes_end()  # later ones are written to the node, or noted as missing
        for weak in (True, False):
            for batch in self._batches(member, weak, end):
                length = sum(row.shard_length for _, row, _ in batch)
                await pace.spend(length)
                bad = await member.call(not_intact, self._log, member, batch)
                await pace.spend(sum(self._healer.rebuilder.cost(number) for number in bad))
                more = await self._healer.rebuilder.rebuild(member, bad)
                shards, size = shards + more[0], size + more[1]
                done += sum(len(here) * row.shard_length for _, row, here in batch)
                progress({"phase": "shards", "done": min(done, total), "total": total})
        await self._forget_lost(member)
        return shards, size

    async def _forget_lost(self, member: Member) -> None:
        """Drop the record of lost segments, after all shards of a node were checked."""
        on_disk = await member.call(member.node.segments, SegmentKind.SHARDS)
        if next(self._healer.lacks(member), None) is None:
            for segment in member.shards.lost.difference(on_disk):
                member.shards.forget(segment)
        member.standing.looked_through()
        member.shards.lost.clear()

    def _batches(self, member: Member, weak: bool, end: bytes) -> Iterator[list[StripeShards]]:
        """Stripes before `end` with shards on a node, which lack, or do not lack, other shards.

        A batch may be empty, so that others can run.
        """
        for rows in self._log.batches(end=end):
            found = [
                (number, row, here)
                for number, row in rows
                if (here := [i for i, place in enumerate(row.shards) if place.node == member.id])
                and self._is_weak(number, row, member) is weak
            ]
            for first in range(0, max(len(found), 1), self._log.limits.repair_batch):
                yield found[first : first + self._log.limits.repair_batch]

    def _is_weak(self, number: int, row: Stripe, member: Member) -> bool:
        """Return whether a stripe lacks shards besides those on this node."""
        return any(
            place.node != member.id and not self._log.has_shard(number, index, place)
            for index, place in enumerate(row.shards)
        )

    def total(self, member: Member) -> int:
        """About how many bytes the node holds when it is complete."""
        return sum(max(state.live, 0) for state in member.shards.states.values())

    async def copy_journal(self, member: Member, progress: Progress) -> None:
        """Copy the journal as it is, while commits continue; `join` copies the rest."""
        if member.in_sync:
            return
        if member.standing.holds == NEVER_WHOLE:  # its journal may be of another history
            drop = _set_journals_aside if self._log.doubt else _drop_journals
            await member.call(drop, member.node, self._committer.journal.segment + GAP_MAX + 1)
        if member.late_segment:  # a new file, which no late write knows
            await member.call(member.node.delete, SegmentKind.JOURNAL, member.late_segment)
            member.late_segment = 0
        async with self._committer.lock:
            self._committer.journal.roll()
        await self._copy_journals(member, self._committer.journal.segment, progress)

    async def join(self, member: Member, progress: Progress) -> None:
        """Copy the rest of the journal between two commits; the node is then in sync."""
        async with self._committer.lock:
            await self._healer.heal(member)
            if not member.in_sync:
                self._committer.journal.roll()
                await self._copy_journals(member, self._committer.journal.segment, progress)
                if member.out_of_use:  # a shard could not be written meanwhile
                    raise NodeError(member.standing.error)
                member.standing.joined()
                if not self._log.doubt and not self._log.keeps_all:
                    await member.call(_drop_journals, member.node, first_needed(self._log.engine))
            await self._committer.commit_now(checkpoint=True)

    async def mend_journal(self, member: Member) -> Copied:
        """Give a node in sync the records that it lost or cannot read; NodeError of it.

        Records that no node can read are in the metadata: `fill_gaps` writes them anew.
        """
        async with self._committer.lock:
            self._committer.journal.roll()
            before = self._committer.journal.segment
        return await self._copied(member, before)

    async def fill_gaps(self) -> None:
        """Return when a metadata dump has replaced what no node can read, or has failed."""
        await self._dumper.fill_gaps()

    async def _copy_journals(self, target: Member, before: int, progress: Progress) -> None:
        """Give a node all journal segments below `before`."""
        progress({"phase": "journal", "done": 0, "total": 1})
        await self._copied(target, before)
        progress({"phase": "journal", "done": 1, "total": 1})

    async def _copied(self, target: Member, before: int) -> Copied:
        async with self._log.journals:
            others = [m.watched for m in self._log.members.in_sync if m is not target]
            first = first_needed(self._log.engine)
            copied = await threads.run_sync(
                copy_journals,
                self._log.store,
                others,
                target.watched,
                first,
                before,
                self._log.position,
            )
        self._log.journal_gaps += len(copied.unknown)
        return copied


class _SourceError(Exception):
    """The place that shards are copied from is gone, or does not answer."""


def _copy_shards(source: Node, target: Node, shards: list[tuple[ShardPlace, int]]) -> list[int]:
    """In a thread: copy the readable ones of some shards (place, length) durably; the lengths."""
    copied, written = list[int](), set[int]()
    for place, length in shards:
        start = place.offset - HEADER_BYTES
        try:
            data = source.read(SegmentKind.SHARDS, place.segment, start, HEADER_BYTES + length)
        except (NodeIdentityError, NodeTimeoutError) as error:
            raise _SourceError(str(error)) from error
        except NodeError as error:
            logger.warning("%s It is rebuilt from other nodes.", error)
            continue
        target.write(SegmentKind.SHARDS, place.segment, start, [data])
        copied.append(length)
        written.add(place.segment)
    target.flush(SegmentKind.SHARDS, sorted(written))
    return copied


def _drop_journals(node: Node, before: int) -> None:
    for segment in node.segments(SegmentKind.JOURNAL):
        if segment < before:
            node.delete(SegmentKind.JOURNAL, segment)


def _set_journals_aside(node: Node, before: int) -> None:
    for segment in node.segments(SegmentKind.JOURNAL):
        if segment < before:
            node.set_aside(SegmentKind.JOURNAL, segment)


def try_to_write(node: Node, segment: int) -> None:
    """Write to a new segment and remove it: a medium may read well while its writes hang."""
    node.write(SegmentKind.SHARDS, segment, 0, [bytes(RECORD_ALIGN_BYTES)])
    node.flush(SegmentKind.SHARDS, [segment])
    node.delete(SegmentKind.SHARDS, segment)
