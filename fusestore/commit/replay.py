"""The mount's first work: from the last checkpoint to the last commit that counts.

1. Read the journals of all nodes that are there, from the checkpoint's segment on.
2. Follow the chain: each commit carries the checksum of the one before it.
3. Commits up to a `durable_through` that any record carries always count: a shard
   that they lack is damage.  Later ones count if each stripe that they name has
   k intact shards.  What comes after the first that does not count is dropped.
4. When nodes that are away might have made a commit count, refuse.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import NodeError, NodeLacksError, ReplayError
from ..format import stripe_rows
from ..format.records import Commit, Run
from ..format.store_rows import LogState
from ..format.stripe_rows import Stripe
from ..log.journal import read_journals
from ..log.log import Log
from ..members.member import Member
from ..read.reader import verified

log = logging.getLogger(__name__)

EPOCHS_SKIPPED = 1000
"""With accepted losses: epochs that nodes which are not there may have opened meanwhile."""


@dataclass(slots=True)
class Replayed:
    """What the journals hold past the checkpoint."""

    state: LogState
    changes: dict[bytes, bytes | None] = field(default_factory=dict)
    doubtful: dict[bytes, bytes | None] = field(default_factory=dict)
    """Of the changes those that not every node is known to have flushed."""
    commits: int = 0
    durable: int = 0
    """The last commit that every node in sync is known to hold."""
    dropped: list[int] = field(default_factory=list)
    """Commits that do not count."""
    lossy: bool = False
    """Something was dropped that may have been acknowledged."""
    in_sync: frozenset[int] = frozenset()
    """Ids of the nodes that the last commit counts as in sync."""
    reached: dict[int, int] = field(default_factory=dict)
    """By node: the last commit of the chain that its journal holds."""


class _UndecidedError(Exception):
    """Nodes that are away could decide."""


def replay(
    state: Log,
    start: LogState,
    in_sync: Sequence[int],
    *,
    accept_loss: bool = False,
    how: str = "mount with -o accept_loss",
) -> Replayed:
    """Read the journals; blocks; ReplayError when the store must not be mounted so.

    With `accept_loss` what cannot be decided, or is gone, is dropped instead; `how`
    tells people how to say that.
    """
    nodes = [(member.name, member.node) for member in state.members.all if member.is_open]
    journals = read_journals(state.store, nodes, start.journal_segment)
    for member in state.members.all:
        error = journals.failed.get(member.name)
        if error is not None:
            member.fail(error)
    journals.forget_before(start.epoch)
    durable = journals.durable
    result = Replayed(start, in_sync=frozenset(in_sync))
    last, digest = start.commit, start.checksum
    for entry in journals.chain(start):
        commit = entry.commit()
        if commit.number > durable:
            try:
                if not _counts(state, commit):
                    break
            except _UndecidedError as error:
                if not accept_loss:
                    raise ReplayError(
                        f"Whether commit {commit.number} counts depends on nodes that are away or "
                        f"cannot be read ({error}): bring them back, or, if they are gone for "
                        f"good, {how}."
                    ) from None
                result.lossy = True
                break
            result.doubtful.update(commit.changes)
        result.changes.update(commit.changes)
        result.in_sync = frozenset(commit.in_sync)
        result.commits += 1
        last, digest = commit.number, entry.header.payload_checksum
    result.durable = min(max(durable, start.commit), last)
    result.dropped = sorted(number for number in journals.commits if number > last)
    if durable > last:
        if not accept_loss:
            raise ReplayError(
                f"Commit {last + 1} was acknowledged, and no node that is there holds it: bring "
                f"the missing nodes back, or, if they are gone for good, {how}."
            )
        result.lossy = True
    if result.dropped:
        log.warning("%d commits that were never acknowledged are dropped.", len(result.dropped))
    for member in state.members.all:
        chain = [n for n in journals.holders.get(member.name, ()) if n <= last]
        result.reached[member.id] = max(chain, default=0)
    epoch = max(start.epoch, journals.epoch) + (EPOCHS_SKIPPED if result.lossy else 0)
    result.state = LogState(epoch, start.nonce, last, digest, start.journal_segment)
    return result


def _counts(state: Log, commit: Commit) -> bool:
    """Whether each stripe that a commit names has k intact shards; _UndecidedError if unknown."""
    for key, value in commit.changes.items():
        if key[:1] != b"S" or value is None:
            continue
        row = Stripe.decode(value)
        intact, away = 0, list[str]()
        for index, place in enumerate(row.shards):
            member = state.members.by_id.get(place.node)
            if not place.written:
                continue
            if member is None or member.out_of_use:
                away.append(member.name if member else str(place.node))
                continue
            try:
                intact += _verify(member, row, index)
            except NodeLacksError:
                continue
            except NodeError as error:
                log.warning("%s", error)
                away.append(member.name)
        if intact >= row.code.k:
            continue
        if intact + len(away) >= row.code.k:
            raise _UndecidedError(", ".join(sorted(set(away))))
        return False
    return True


def shard_is_intact(member: Member, row: Stripe, index: int) -> bool:
    """Read a whole shard and check it; blocks."""
    try:
        return _verify(member, row, index)
    except NodeError:
        return False


def _verify(member: Member, row: Stripe, index: int) -> bool:
    place = row.shards[index]
    data = member.node.read(Run.SHARDS, place.segment, place.offset, row.shard_length)
    return verified(row, index, 0, data)


def suspect_shards(state: Log, replayed: Replayed) -> dict[bytes, bytes | None]:
    """Rows of `missing` for shards of replayed commits that may not have reached their node."""
    rows: dict[bytes, bytes | None] = {}
    for key, value in replayed.doubtful.items():
        if key[:1] != b"S" or value is None:
            continue
        number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
        for index, place in enumerate(row.shards):
            member = state.members.by_id.get(place.node)
            if member is None or not place.written:
                continue
            # Of a node that is away nobody can tell: it may have flushed nothing of this.
            if member.out_of_use or not shard_is_intact(member, row, index):
                rows[stripe_rows.missing_key(place.node, number, index)] = b""
    return rows
