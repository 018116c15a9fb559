"""Replay at the mount: from the last checkpoint to the last commit that counts.

1. Read the journals of all available nodes, from the checkpoint's segment on.
2. Follow the chain: each commit carries the checksum of the one before it.
3. Commits up to the `durable_through` of any record always count: a missing shard is
   damage.  Later commits count if each of their stripes has k intact shards.  All
   commits after the first that does not count are dropped.
   Shards are first flushed, then read past the page cache: a process that was killed
   may have left shards in the cache that are not on a disk yet.
4. Refuse if nodes that are away might make a commit count.  Also refuse if an unread
   range may hold an acknowledged commit: unreadable is not absent.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import FormatError, NodeError, ReplayError
from ..format import store_rows, stripe_rows
from ..format.records import HEADER_BYTES, Header, SegmentKind
from ..format.store_rows import CommitId, GivenUp, LogPosition
from ..format.stripe_rows import ShardPlace, Stripe
from ..log.journal import Entry, Journals, Unreadable, make_readable
from ..log.journal_scan import read_journals
from ..log.log import Log
from ..members.member import Member
from ..text import counted
from .commit_shards import UndecidedError, counts, flush_shards
from .histories import Histories

logger = logging.getLogger(__name__)

EPOCHS_SKIPPED = 1000
"""With accepted losses: epochs that missing nodes may have opened meanwhile."""


@dataclass(slots=True)
class Replayed:
    """The contents of the journals past the checkpoint."""

    position: LogPosition
    changes: dict[bytes, bytes | None] = field(default_factory=dict)
    doubtful: dict[bytes, bytes | None] = field(default_factory=dict)
    """The changes that some nodes may not have flushed."""
    commits: int = 0
    durable: int = 0
    """The last commit that every node in sync is known to hold."""
    durable_id: CommitId = CommitId(0, 0)  # noqa: RUF009
    dropped: list[int] = field(default_factory=list)
    """Commits that do not count."""
    lossy: bool = False
    """An acknowledged commit may have been dropped."""
    in_sync: frozenset[int] = frozenset()
    """Ids of the nodes that are in sync in the last commit."""
    reached: dict[int, int] = field(default_factory=dict)
    """By node: the last commit of the chain in its journal."""
    unknown: list[Unreadable] = field(default_factory=list)
    """Unread ranges that may have held an acknowledged commit after the last."""
    damaged: set[str] = field(default_factory=set)
    """Names of the nodes whose journals have unreadable ranges."""
    blind: frozenset[int] = frozenset()
    """Ids of the nodes whose journal past the last commit could not be read."""


def replay(
    log: Log,
    start: LogPosition,
    in_sync: Sequence[int],
    *,
    accept_loss: bool = False,
    how: str = "mount with -o accept_loss",
) -> Replayed:
    """Read the journals; blocks; ReplayError if the store must not be mounted like this.

    With `accept_loss`, undecided and lost commits are dropped instead; `how` tells
    people how to request this.
    """
    nodes = [(member.name, member.node) for member in log.members.all if member.is_open]
    journals = read_journals(log.store, nodes, start.journal_segment)
    for member in log.members.all:
        error = journals.failed.get(member.name)
        if error is not None:
            member.fail(error)
    return _Replay(log, start, journals, accept_loss, how).run(in_sync)


class _Replay:
    """The steps of `replay`, over journals that were read."""

    def __init__(
        self, log: Log, start: LogPosition, journals: Journals, accept_loss: bool, how: str
    ) -> None:
        self._log, self._start, self._journals = log, start, journals
        self._accept_loss, self._how = accept_loss, how
        self._before = journals.at(start)
        self._chain = [self._before] if self._before is not None else []
        """The commits that count; the first is the one at which the chain begins, if found."""
        journals.forget_before(start.epoch)

    def run(self, in_sync: Sequence[int]) -> Replayed:
        start, journals = self._start, self._journals
        result = Replayed(start, in_sync=frozenset(in_sync))
        histories = Histories(self._log, start, journals, self._before, result.in_sync)
        histories.refuse_another()
        chain = list(journals.chain(start))
        histories.refuse_old_metadata(chain)
        histories.refuse_fork(chain)
        durable = self._durable(chain)
        last = self._follow(result, chain, durable)
        result.durable = min(max(durable, start.commit), last.commit)
        result.durable_id = next(
            (entry.id for entry in self._chain if entry.number == result.durable),
            CommitId(start.commit, start.checksum),
        )
        result.dropped = sorted(number for number in journals.commits if number > last.commit)
        for member in self._log.members.all:
            result.reached[member.id] = self._reached(member.name)
        result.damaged = {lost.node for lost in journals.unreadable}
        self._refuse_unreadable_future(result)
        self._look_past(result, last.commit)
        if durable > last.commit:
            self._refuse_or_accept(
                result,
                f"Commit {last.commit + 1} was acknowledged, but no available node holds it",
            )
        elif result.unknown:
            self._refuse_or_accept(
                result, f"It is unknown whether a commit followed commit {last.commit}"
            )
        if result.dropped:
            one, many = "commit that was", "commits that were"
            dropped = counted(
                len(result.dropped),
                f"{one} never acknowledged is",
                f"{many} never acknowledged are",
            )
            logger.warning("%s dropped.", dropped)
        skipped = EPOCHS_SKIPPED if result.lossy else 0
        epoch = max(start.epoch, journals.epoch) + skipped
        if result.lossy:
            ends = [*self._log.given_up, GivenUp(last.commit, epoch)]
            result.changes[store_rows.GIVEN_UP_KEY] = store_rows.encode_given_up(ends)
        result.position = replace(last, epoch=epoch, doubt=last.doubt or self._doubt(result))
        return result

    def _doubt(self, result: Replayed) -> str:
        """Why segments in no table may not be deleted yet; empty if they may."""
        if result.lossy:
            return "losses were accepted"
        if result.blind or self._journals.failed:
            return "journals could not be read at a mount"
        return ""

    def _durable(self, chain: Sequence[Entry]) -> int:
        """The last commit that was certainly acknowledged, according to nodes of our history.

        Records of other histories on other nodes do not matter.
        """
        tip = chain[-1] if chain else self._before
        if tip is None:
            return self._journals.durable
        ours = {entry.id for entry in chain}
        return max(
            (
                entry.durable_through
                for entry in self._journals.entries()
                if entry.id in ours
                or any(self._journals.may_hold(name, tip) for name in entry.holders)
            ),
            default=0,
        )

    def _refuse_unreadable_future(self, result: Replayed) -> None:
        """ReplayError if available nodes do not suffice to read commits ahead of the database.

        A node in sync that lacks acknowledged commits was restored from an old copy, perhaps
        together with the database: then the stripes of the later commits lack shards.
        """
        members = self._log.members
        lacking = [
            member
            for member in members.all
            if member.is_open
            and not member.out_of_use
            and member.id in result.in_sync
            and result.reached[member.id] < result.durable
        ]
        if not lacking or result.durable <= self._start.commit or self._accept_loss:
            return
        bad = [
            key
            for key, value in result.changes.items()
            if key[:1] == b"S" and value is not None and not self._has_shards(key, value)
        ]
        if bad:
            ahead = [m.name for m in members.all if result.reached[m.id] >= result.durable]
            raise ReplayError(
                f"{', '.join(ahead)} {'is' if len(ahead) == 1 else 'are'} ahead of the metadata, "
                f"which is at commit {self._start.commit}: commits {self._start.commit + 1} "
                f"to {result.durable} were acknowledged, and {len(bad):,} of their stripes lack "
                f"shards, as {', '.join(m.name for m in lacking)} do not hold these commits. "
                "These nodes and the metadata were probably restored from an older copy. Bring the "
                f"newer ones back, or move {', '.join(ahead)} away, and mount the restored copy; "
                "nothing was changed."
            )

    def _has_shards(self, key: bytes, value: bytes) -> bool:
        """Return whether k shards of a stripe have their headers at their places."""
        number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
        there = 0
        for index, place in enumerate(row.shards):
            member = self._log.members.by_id.get(place.node)
            if not place.written or member is None:
                continue
            there += member.out_of_use or _has_header(self._log, member, place, number, index)
        return there >= row.code.k

    # --- commits that count ---------------------------------------------------------

    def _follow(self, result: Replayed, chain: Sequence[Entry], durable: int) -> LogPosition:
        """Take the commits that count, in order; the position of the last."""
        last = self._start
        for entry in chain:
            commit = entry.commit()
            if commit.number > durable:
                flush_shards(self._log, commit)
                try:
                    if not counts(self._log, commit):
                        break
                except UndecidedError as error:
                    self._refuse_or_accept(
                        result,
                        f"Whether commit {commit.number} counts depends on nodes that are away "
                        f"or cannot be read ({error})",
                        error.unread,
                    )
                    break
                result.doubtful.update(commit.changes)
            result.changes.update(commit.changes)
            result.in_sync = frozenset(commit.in_sync)
            result.commits += 1
            self._chain.append(entry)
            last = replace(
                last,
                nonce=commit.nonce.hex(),
                commit=commit.number,
                checksum=entry.header.payload_checksum,
            )
        return last

    def _reached(self, name: str) -> int:
        """The last commit of the chain that a node holds, or may hold in an unreadable range.

        A node in sync holds all acknowledged commits; its unreadable ranges are repaired later.
        """
        held = [entry.number for entry in self._chain if self._journals.may_hold(name, entry)]
        first = self._start.journal_segment
        if self._before is None and any(
            lost.node == name and lost.segment == first for lost in self._journals.unreadable
        ):
            held.append(self._start.commit)
        return max(held, default=0)

    def _look_past(self, result: Replayed, last: int) -> None:
        """Find ranges that no node could read and that may hold a commit after the last."""
        members = self._log.members.all
        end = (self._start.journal_segment, 0)
        if self._chain:
            entry = self._chain[-1]
            end = (entry.segment, entry.offset + entry.header.record_length)
        blind = {lost.node for lost in self._journals.unknown((), end)}
        result.blind = frozenset(member.id for member in members if member.name in blind)
        in_sync = {member.name: member.id for member in members if member.id in result.in_sync}
        epoch = self._journals.epoch
        if any(end.voids(last + 1, epoch) for end in self._log.given_up):
            return  # what may follow was given up before
        # A node that holds the last commit would hold the next if that was acknowledged.
        witnesses = {name for name, number in in_sync.items() if result.reached[number] == last}
        unknown = self._journals.unknown(witnesses, end)
        result.unknown = [lost for lost in unknown if lost.node in in_sync]

    def _refuse_or_accept(self, result: Replayed, what: str, unread: Sequence[str] = ()) -> None:
        """Continue with a loss if that was accepted; else ReplayError, with the remedy.

        The message never advises to give up data that may become readable again.
        """
        if self._accept_loss:
            result.lossy = True
            return
        unread = [
            *(lost.error for lost in result.unknown),
            *self._journals.complaints(),
            *unread,
        ]
        unread += [
            member.standing.error
            for member in self._log.members.all
            if member.out_of_use and member.standing.unread
        ]
        if unread:
            raise ReplayError(f"{what}. {make_readable(unread)}")
        raise ReplayError(
            f"{what}: bring the missing nodes back, or, if they are gone for good, {self._how}."
        )


def _has_header(log: Log, member: Member, place: ShardPlace, number: int, index: int) -> bool:
    """Return whether the header of the record at a place names this shard; blocks."""
    start = place.offset - HEADER_BYTES
    try:
        data = member.node.read(SegmentKind.SHARDS, place.segment, start, HEADER_BYTES)
        header = Header.decode(data, log.shards(member.name, place.segment).seed(start))
    except (NodeError, FormatError):
        return False
    return (header.number, header.index) == (number, index)
