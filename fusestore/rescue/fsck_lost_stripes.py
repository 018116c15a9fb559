"""fsck: a stripe whose row is missing or wrong, also in the journals, is rebuilt from its shards.

Each shard lies in a record.  Its header has the stripe, the index of the shard, the
code, the length, and a checksum of the payload.  k of them are therefore enough to
rebuild the row.
"""

from __future__ import annotations

import logging
from collections import defaultdict

from ..errors import NodeError
from ..format import erasure
from ..format.erasure import Code
from ..format.records import Header, SegmentKind, block_checksums, checksum
from ..format.stripe_rows import ShardPlace, Stripe
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import NOT_WRITTEN, headers
from .fsck_findings import Finding, Phase, finding
from .fsck_view import StoreView

logger = logging.getLogger(__name__)

_FoundShard = tuple[Member, ShardPlace, Header]


def lost_stripes(log: Log, view: StoreView, findings: list[Finding]) -> list[Finding]:
    """In a thread: findings that restore stripes which other findings report as lost."""
    wanted = {one.arguments[1].stripe for one in findings if one.fix == "lose_extent"}
    made = []
    for number, shards in _shards_of(log, wanted).items() if wanted else ():
        row, count = _row(log, number, shards)
        known = view.stripe(number)
        if row is not None and (known is None or not row.is_same(known)):
            what = "no row" if known is None else "a wrong row"
            text = f"stripe {number:#x} has {what}, and {count} of its shards are on the nodes"
            made.append(finding(Phase.EXTENTS, "stripes", text, "put_stripe", number, row))
    return made


def _shards_of(log: Log, wanted: set[int]) -> dict[int, list[_FoundShard]]:
    """Return the records of shards of some stripes, on all nodes that answer."""
    found: dict[int, list[_FoundShard]] = defaultdict(list)
    for member in log.members.all:
        if member.out_of_use:
            continue
        try:
            for segment in member.node.segments(SegmentKind.SHARDS):
                for offset, header in headers(log, member, segment):
                    if header.number in wanted:
                        place = ShardPlace(member.id, segment, offset)
                        found[header.number].append((member, place, header))
        except NodeError as error:
            logger.warning("%s", error)
    return found


def _row(log: Log, number: int, shards: list[_FoundShard]) -> tuple[Stripe | None, int]:
    """Rebuild a stripe's row from k complete, consistent shards; and their number."""
    payloads: dict[int, bytes] = {}
    places: dict[int, ShardPlace] = {}
    shapes = {(header.k, header.m, header.stripe_length) for _, _, header in shards}
    if len(shapes) != 1:
        return None, 0
    k, m, length = shapes.pop()
    code = Code(k, m)
    if not code.is_possible or length == 0:
        return None, 0
    for member, place, header in shards:
        payload = _payload(member, place, header, code.shard_length(length))
        if payload is not None and header.index < code.n:
            payloads.setdefault(header.index, payload)
            places.setdefault(header.index, place)
    if len(payloads) < k:
        return None, len(payloads)
    size, every = code.shard_length(length), list(range(code.n))
    decoded = erasure.rebuild(code, size, dict(list(payloads.items())[:k]), every)
    if any(decoded[index] != payload for index, payload in payloads.items()):
        return None, len(payloads)
    for index, member in enumerate(log.members.place(code, number)):
        places.setdefault(index, ShardPlace(member.id, NOT_WRITTEN, 0))
    row = Stripe(
        code,
        length,
        tuple(places[index] for index in every),
        tuple(block_checksums(decoded[index], size) for index in every),
    )
    return row, len(payloads)


def _payload(member: Member, place: ShardPlace, header: Header, length: int) -> bytes | None:
    """Return the payload of a record, if it matches its header."""
    try:
        data = member.node.read(
            SegmentKind.SHARDS, place.segment, place.offset, header.payload_length
        )
    except NodeError:
        return None
    whole = len(data) == length and checksum(data, length) == header.payload_checksum
    return data if whole else None
