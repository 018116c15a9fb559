"""The shards of a commit on the disks: a commit counts if its stripes can be read."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..errors import NodeError, NodeLacksError
from ..format import stripe_rows
from ..format.records import Commit, SegmentKind
from ..format.stripe_rows import Stripe
from ..log.log import Log
from ..members.member import Member
from ..read.reader import verified

logger = logging.getLogger(__name__)


class UndecidedError(Exception):
    """The answer depends on nodes that are away, or on shards that cannot be read."""

    def __init__(self, nodes: Sequence[str], unread: Sequence[str]) -> None:
        super().__init__(", ".join(sorted(set(nodes))))
        self.unread = unread


def flush_shards(log: Log, commit: Commit) -> None:
    """Flush the shards of a commit to the disks: later reads then find durable bytes only.

    A node that cannot flush goes out of use.
    """
    wanted: dict[int, set[int]] = defaultdict(set)
    for key, value in commit.changes.items():
        if key[:1] == b"S" and value is not None:
            for place in Stripe.decode(value).shards:
                if place.written:
                    wanted[place.node].add(place.segment)
    for node, segments in wanted.items():
        member = log.members.by_id.get(node)
        for segment in sorted(segments) if member is not None else ():
            if member is None or member.out_of_use:
                break
            try:
                member.node.flush(SegmentKind.SHARDS, [segment])
            except NodeLacksError:
                continue
            except NodeError as error:
                member.fail(error)


def counts(log: Log, commit: Commit) -> bool:
    """Return whether each stripe in a commit has k intact shards; UndecidedError if unknown."""
    for key, value in commit.changes.items():
        if key[:1] != b"S" or value is None:
            continue
        row = Stripe.decode(value)
        intact, away, unread = 0, list[str](), list[str]()
        for index, place in enumerate(row.shards):
            member = log.members.by_id.get(place.node)
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
                logger.warning("%s", error)
                away.append(member.name)
                unread.append(str(error))
        if intact >= row.code.k:
            continue
        if intact + len(away) >= row.code.k:
            raise UndecidedError(away, unread)
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
    data = member.node.read(SegmentKind.SHARDS, place.segment, place.offset, row.shard_length)
    return verified(row, index, 0, data)


def suspect_shards(log: Log, doubtful: Mapping[bytes, bytes | None]) -> dict[bytes, bytes | None]:
    """Rows of `missing` for shards that may not have reached their node.

    `doubtful` are the changes of commits that some nodes may not have flushed.
    """
    rows: dict[bytes, bytes | None] = {}
    for key, value in doubtful.items():
        if key[:1] != b"S" or value is None:
            continue
        number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
        for index, place in enumerate(row.shards):
            member = log.members.by_id.get(place.node)
            if member is None or not place.written:
                continue
            # A node that is away may have flushed none of these shards.
            if member.out_of_use or not shard_is_intact(member, row, index):
                rows[stripe_rows.missing_key(place.node, number, index)] = b""
    return rows
