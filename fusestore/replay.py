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
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import schema
from .errors import FormatError, NodeError, ReplayError
from .log import Log
from .members import Member
from .nodes.base import Node
from .read_path import verified
from .records import Commit, Kind, Run, decode_commit, records
from .schema import LogState, Stripe

log = logging.getLogger(__name__)


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
    dropped: int = 0
    """Commits that never counted."""
    in_sync: frozenset[int] = frozenset()
    """Ids of the nodes that the last commit counts as in sync."""
    reached: dict[int, int] = field(default_factory=dict)
    """By node: the last commit of the chain that its journal holds."""


def replay(state: Log, start: LogState, in_sync: Sequence[int]) -> Replayed:
    """Read the journals; blocks; ReplayError when the store must not be mounted so."""
    found, holders = _read_journals(state, start)
    durable = max(
        (commit.durable_through for commits in found.values() for commit, _ in commits), default=0
    )
    result = Replayed(start, in_sync=frozenset(in_sync))
    number, previous = start.commit + 1, start.checksum
    while True:
        chained = [c for c in found.get(number, []) if c[0].previous == previous]
        if not chained:
            break
        commit, digest = max(chained, key=lambda c: c[0].epoch)
        if number > durable:
            if not _counts(state, commit):
                break
            result.doubtful.update(commit.changes)
        result.changes.update(commit.changes)
        result.in_sync = frozenset(commit.in_sync)
        result.commits += 1
        previous = digest
        number += 1
    result.durable = max(durable, start.commit)
    result.dropped = sum(1 for later in found if later >= number)
    if durable >= number:
        raise ReplayError(
            f"Commit {number} was acknowledged, and no node that is there holds it: bring the "
            "missing nodes back, then mount again."
        )
    if result.dropped:
        log.warning("%d commits that were never acknowledged are dropped.", result.dropped)
    for member in state.members.all:
        chain = [n for n in holders.get(member.id, ()) if n < number]
        result.reached[member.id] = max(chain, default=0)
    epoch = max([start.epoch, *(c.epoch for commits in found.values() for c, _ in commits)])
    result.state = LogState(epoch, start.nonce, number - 1, previous, start.journal_segment)
    return result


def _read_journals(
    state: Log, start: LogState
) -> tuple[dict[int, list[tuple[Commit, int]]], dict[int, set[int]]]:
    """By number the commits past the checkpoint, with checksums; by node their numbers."""
    found: dict[int, list[tuple[Commit, int]]] = defaultdict(list)
    holders: dict[int, set[int]] = defaultdict(set)
    for member in state.members.all:
        if member.node is None:
            continue
        try:
            for segment in member.node.segments(Run.JOURNAL):
                if segment >= start.journal_segment:
                    _read_segment(state, member, segment, start.commit, found, holders)
        except NodeError as error:
            member.fail(error)
    return found, holders


def _read_segment(
    state: Log,
    member: Member,
    segment: int,
    after: int,
    found: dict[int, list[tuple[Commit, int]]],
    holders: dict[int, set[int]],
) -> None:
    assert member.node is not None
    data = member.node.read(Run.JOURNAL, segment, 0, member.node.size(Run.JOURNAL, segment))
    for _, header, payload in records(state.journal(member.name, segment), data):
        if header.kind is not Kind.COMMIT:
            continue
        holders[member.id].add(header.number)
        if header.number <= after:
            continue
        known = found[header.number]
        if any(digest == header.payload_checksum for _, digest in known):
            continue
        try:
            known.append((decode_commit(header, payload), header.payload_checksum))
        except FormatError as error:
            log.error("Journal segment %d of node %s: %s", segment, member.name, error)


def last_commit(state: Log, name: str, node: Node) -> int:
    """The number of the last commit in a node's journal, 0 for none; blocks; NodeError."""
    for segment in reversed(node.segments(Run.JOURNAL)):
        data = node.read(Run.JOURNAL, segment, 0, node.size(Run.JOURNAL, segment))
        found = records(state.journal(name, segment), data)
        numbers = [header.number for _, header, _ in found if header.kind is Kind.COMMIT]
        if numbers:
            return max(numbers)
    return 0


def _counts(state: Log, commit: Commit) -> bool:
    """Whether each stripe that a commit names has k intact shards; ReplayError if unknown."""
    for key, value in commit.changes.items():
        if key[:1] != b"S" or value is None:
            continue
        row = Stripe.decode(value)
        intact = away = 0
        for index, place in enumerate(row.shards):
            member = state.members.by_id.get(place.node)
            if not place.written:
                continue
            if member is None or member.node is None:
                away += 1
            elif shard_is_intact(member, row, index):
                intact += 1
        if intact >= row.code.k:
            continue
        if intact + away >= row.code.k:
            raise ReplayError(
                f"Whether commit {commit.number} counts depends on nodes that are away: "
                "bring them back, then mount again."
            )
        return False
    return True


def shard_is_intact(member: Member, row: Stripe, index: int) -> bool:
    """Read a whole shard and check it; blocks."""
    place = row.shards[index]
    assert member.node is not None
    try:
        data = member.node.read(Run.SHARDS, place.segment, place.offset, row.shard_length)
    except NodeError:
        return False
    return verified(row, index, 0, data)


def suspect_shards(state: Log, replayed: Replayed) -> dict[bytes, bytes | None]:
    """Rows of `missing` for shards of replayed commits that may not have reached their node."""
    rows: dict[bytes, bytes | None] = {}
    for key, value in replayed.doubtful.items():
        if key[:1] != b"S" or value is None:
            continue
        number, row = schema.decode_stripe_key(key), Stripe.decode(value)
        for index, place in enumerate(row.shards):
            member = state.members.by_id.get(place.node)
            if member is None or not place.written:
                continue
            # Of a node that is away nobody can tell: it may have flushed nothing of this.
            if member.node is None or not shard_is_intact(member, row, index):
                rows[schema.missing_key(place.node, number, index)] = b""
    return rows
