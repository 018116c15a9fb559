"""fsck: a stripe whose row is missing or wrong is rebuilt from its shards, if the journals fail."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass

import trio

from ..errors import NodeError
from ..format import stripe_rows
from ..format.records import Header, SegmentKind
from ..format.stripe_rows import ShardPlace
from ..log.log import Log
from ..members.member import Member
from ..read.stripe_from_shards import WholeShard, read_whole, restored_row
from ..write.shard_record import headers
from .fsck_findings import Finding, Phase, finding
from .fsck_readable import short_stripes
from .fsck_view import StoreView

logger = logging.getLogger(__name__)

_FoundShard = tuple[Member, ShardPlace, Header]


@dataclass(frozen=True, slots=True)
class Searched:
    """What the shards on the nodes tell about lost stripes."""

    findings: list[Finding]
    """Those that restore stripes."""
    unread: list[str]
    """Nodes that could not be read, if they may have shards of stripes that are still lost."""


def lost_stripes(log: Log, view: StoreView, findings: list[Finding]) -> Searched:
    """In a thread: findings that restore stripes which other findings report as lost."""
    lost = {one.arguments[1].stripe for one in findings if one.fix == "lose_extent"}
    wanted = lost | _too_few_left(view, findings)
    unread = [name for node, name in view.nodes.items() if node not in view.segment_bytes]
    if view.at_rest and not unread:
        wanted |= set(short_stripes(view))
    if not wanted:
        return Searched([], [])
    made = []
    for number, shards in _shards_of(log, wanted, unread).items():
        known = view.stripe(number)
        restored = restored_row(log, number, _whole(shards, unread), known)
        if restored is None:
            continue
        lost.discard(number)
        if restored.row == known:
            continue
        what, count = "no row" if known is None else "a wrong row", len(restored.whole)
        text = f"stripe {number:#x} has {what}, and {count} of its shards are on the nodes"
        row, whole = restored.row, restored.whole
        made.append(finding(Phase.EXTENTS, "stripes", text, "put_stripe", number, row, whole))
    return Searched(made, sorted(set(unread)) if lost else [])


def _too_few_left(view: StoreView, findings: list[Finding]) -> set[int]:
    """Return the stripes of which too few shards are where their rows say."""
    wrong: dict[int, set[int]] = defaultdict(set)
    for one in findings:
        if one.fix == "unwrite":
            wrong[one.arguments[0]].add(one.arguments[1])
        elif one.fix == "owe_all":
            for number, index in one.arguments[1]:
                wrong[number].add(index)
    found = set()
    for number, indices in wrong.items():
        row = view.stripe(number)
        if row is not None:
            good = [
                index
                for index, place in enumerate(row.shards)
                if index not in indices
                and place.written
                and not view.has(stripe_rows.missing_key(place.node, number, index))
            ]
            if len(good) < row.code.k:
                found.add(number)
    return found


def _shards_of(log: Log, wanted: set[int], unread: list[str]) -> dict[int, list[_FoundShard]]:
    """Return the records of shards of some stripes; nodes that fail are added to `unread`."""
    found: dict[int, list[_FoundShard]] = defaultdict(list)
    for member in log.members.all:
        if member.out_of_use:
            continue
        try:
            for segment in member.node.segments(SegmentKind.SHARDS):
                for offset, header in headers(log, member, segment):
                    trio.from_thread.check_cancelled()  # this may take long
                    if header.number in wanted:
                        place = ShardPlace(member.id, segment, offset)
                        found[header.number].append((member, place, header))
        except NodeError as error:
            logger.warning("%s", error)
            unread.append(member.name)
    return found


def _whole(shards: list[_FoundShard], unread: list[str]) -> list[WholeShard]:
    """Return the shards that match their headers; nodes that fail are added to `unread`."""
    found = []
    for member, place, header in shards:
        try:
            shard = read_whole(member, place, header)
        except NodeError as error:
            logger.warning("%s", error)
            unread.append(member.name)
            continue
        if shard is not None:
            found.append(shard)
    return found
