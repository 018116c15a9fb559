"""fsck: a stripe whose row is missing or wrong, also in the journals, is rebuilt from its shards.

Each shard lies in a record.  Its header has the stripe, the index of the shard, the
code, the length, and a checksum of the payload.  k of them are therefore enough to
rebuild the row.

Shards of another history of the store, or damaged ones with intact records, may have the
same stripe: of shards that do not fit together those are taken of which the most do.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import trio

from ..errors import NodeError, NodeLacksError
from ..format import erasure, stripe_rows
from ..format.erasure import Code
from ..format.records import Header, SegmentKind, block_checksums, checksum
from ..format.stripe_rows import ShardPlace, Stripe
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import NOT_WRITTEN, headers
from .fsck_findings import Finding, Phase, finding
from .fsck_readable import short_stripes
from .fsck_view import StoreView

logger = logging.getLogger(__name__)

_COMBINATIONS_MAX = 256
"""How many ways to take k of the shards of a stripe are tried, if they do not fit together."""

_FoundShard = tuple[Member, ShardPlace, Header]


@dataclass(frozen=True, slots=True)
class Searched:
    """What the shards on the nodes tell about lost stripes."""

    findings: list[Finding]
    """Those that restore stripes."""
    unread: list[str]
    """Nodes that could not be read, if they may have shards of stripes that are still lost."""


@dataclass(frozen=True, slots=True)
class _Payload:
    """Bytes of a shard, and all places that have them."""

    index: int
    data: bytes
    places: list[ShardPlace]


@dataclass(frozen=True, slots=True)
class _Restored:
    """A row that the shards of a stripe give."""

    row: Stripe
    whole: tuple[ShardPlace, ...]
    """The places of the shards that give it."""


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
        restored = _restored(log, number, shards, known, unread)
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


def _restored(
    log: Log,
    number: int,
    shards: list[_FoundShard],
    known: Stripe | None,
    unread: list[str],
) -> _Restored | None:
    """Return the row of a stripe by at least k intact shards that fit together, or None.

    Nodes that fail are added to `unread`.
    """
    groups: dict[tuple[int, int, int], list[_FoundShard]] = defaultdict(list)
    for shard in shards:
        header = shard[2]
        groups[header.k, header.m, header.stripe_length].append(shard)
    best: tuple[tuple[int, int], _Restored] | None = None
    for (k, m, length), group in groups.items():
        code = Code(k, m)
        if not code.is_possible or length == 0:
            continue
        payloads = _payloads(group, code, code.shard_length(length), unread)
        fitting = _fitting(payloads, code, code.shard_length(length))
        if fitting is None:
            continue
        restored = _with_places(
            log, number, Stripe(code, length, (), fitting[1]), fitting[0], known
        )
        rank = len(restored.whole), _of_the_tables(log, restored.whole)
        if best is None or rank > best[0]:
            best = rank, restored
    return best[1] if best is not None else None


def _payloads(
    shards: list[_FoundShard], code: Code, length: int, unread: list[str]
) -> list[_Payload]:
    """Read the shards of one code and length; each payload once."""
    found: dict[tuple[int, int], _Payload] = {}
    for member, place, header in shards:
        try:
            data = _payload(member, place, header, length)
        except NodeError as error:
            logger.warning("%s", error)
            unread.append(member.name)
            continue
        if data is not None and header.index < code.n:
            key = header.index, header.payload_checksum
            found.setdefault(key, _Payload(header.index, data, [])).places.append(place)
    return [found[key] for key in sorted(found)]


def _fitting(
    payloads: list[_Payload], code: Code, size: int
) -> tuple[list[_Payload], tuple[bytes, ...]] | None:
    """Return the most payloads that fit together, and the checksums of all shards, or None.

    k fit together whatever they are.  So if there are others, more than k must.
    """
    every = list(range(code.n))
    best: tuple[list[_Payload], tuple[bytes, ...]] | None = None
    for chosen in islice(_choices(payloads, code.k), _COMBINATIONS_MAX):
        decoded = erasure.rebuild(code, size, {one.index: one.data for one in chosen}, every)
        agreed = [one for one in payloads if decoded[one.index] == one.data]
        if best is None or len(agreed) > len(best[0]):
            best = agreed, tuple(block_checksums(decoded[index], size) for index in every)
        if len(agreed) == len(payloads):
            break
    if best is None or len(best[0]) == len(payloads) or len(best[0]) > code.k:
        return best
    return None


def _choices(payloads: list[_Payload], k: int) -> Iterator[Sequence[_Payload]]:
    for chosen in combinations(payloads, k):
        if len({one.index for one in chosen}) == k:
            yield chosen


def _with_places(
    log: Log, number: int, made: Stripe, agreed: list[_Payload], known: Stripe | None
) -> _Restored:
    """Complete a row with the places of its shards; those of the known row come first."""
    code = made.code
    if known is not None and known.is_same(made):
        places = dict(enumerate(known.shards))
    else:
        targets = enumerate(log.members.place(code, number))
        places = {index: ShardPlace(member.id, NOT_WRITTEN, 0) for index, member in targets}
    whole = []
    for one in agreed:
        place = places[one.index]
        if place not in one.places:
            place = max(one.places, key=lambda place: _of_the_tables(log, [place]))
        places[one.index] = place
        whole.append(place)
    shards = tuple(places[index] for index in range(code.n))
    return _Restored(Stripe(code, made.length, shards, made.checksums), tuple(whole))


def _of_the_tables(log: Log, places: Sequence[ShardPlace]) -> int:
    """Return how many places are in segments that the tables have."""
    members = log.members.by_id
    return sum(place.segment in members[place.node].shards.states for place in places)


def _payload(member: Member, place: ShardPlace, header: Header, length: int) -> bytes | None:
    """Return the payload of a record if it matches the header, else None; NodeError."""
    try:
        data = member.node.read(
            SegmentKind.SHARDS, place.segment, place.offset, header.payload_length
        )
    except NodeLacksError:
        return None
    whole = len(data) == length and checksum(data, length) == header.payload_checksum
    return data if whole else None
