"""The row of a stripe, made anew from the records of its shards.

The header of a record has the stripe, the index of the shard, the code, the length, and a
checksum of the payload.  k shards are therefore enough to rebuild the row.

Shards of another history of the store, or damaged ones with intact records, may have the
same stripe: of shards that do not fit together those are taken of which the most do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from ..errors import NodeLacksError
from ..format import erasure
from ..format.erasure import Code
from ..format.records import Header, SegmentKind, block_checksums, checksum
from ..format.stripe_rows import ShardPlace, Stripe
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import NOT_WRITTEN

_COMBINATIONS_MAX = 256
"""How many ways to take k of the shards of a stripe are tried, if they do not fit together."""


@dataclass(frozen=True, slots=True)
class WholeShard:
    """A shard that matches its header."""

    place: ShardPlace
    header: Header
    data: bytes


@dataclass(frozen=True, slots=True)
class RestoredStripe:
    """A row that the shards of a stripe give."""

    row: Stripe
    whole: tuple[ShardPlace, ...]
    """The places of the shards that give it."""


@dataclass(frozen=True, slots=True)
class _Payload:
    """Bytes of a shard, and all places that have them."""

    index: int
    data: bytes
    places: list[ShardPlace]


def read_whole(member: Member, place: ShardPlace, header: Header) -> WholeShard | None:
    """Return a shard if its payload matches its header, else None; NodeError; in a thread."""
    code, length = Code(header.k, header.m), header.stripe_length
    if not code.is_possible or length == 0 or header.index >= code.n:
        return None
    if header.payload_length != code.shard_length(length):
        return None
    try:
        data = member.node.read(
            SegmentKind.SHARDS, place.segment, place.offset, header.payload_length
        )
    except NodeLacksError:
        return None
    if checksum(data, len(data)) != header.payload_checksum:
        return None
    return WholeShard(place, header, data)


def restored_row(
    log: Log, number: int, shards: Sequence[WholeShard], known: Stripe | None = None
) -> RestoredStripe | None:
    """Return the row of a stripe by at least k shards that fit together, or None.

    The places of the row that is `known` come first.  Runs in a thread.
    """
    groups: dict[tuple[int, int, int], list[WholeShard]] = defaultdict(list)
    for shard in shards:
        groups[shard.header.k, shard.header.m, shard.header.stripe_length].append(shard)
    best: tuple[tuple[int, int], RestoredStripe] | None = None
    for (k, m, length), group in groups.items():
        code = Code(k, m)
        fitting = _fitting(_payloads(group), code, code.shard_length(length))
        if fitting is None:
            continue
        made = Stripe(code, length, (), fitting[1])
        restored = _with_places(log, number, made, fitting[0], known)
        rank = len(restored.whole), _of_the_tables(log, restored.whole)
        if best is None or rank > best[0]:
            best = rank, restored
    return best[1] if best is not None else None


def _payloads(shards: Sequence[WholeShard]) -> list[_Payload]:
    """Return the shards of one code and length; each payload once."""
    found: dict[tuple[int, int], _Payload] = {}
    for shard in shards:
        key = shard.header.index, shard.header.payload_checksum
        found.setdefault(key, _Payload(shard.header.index, shard.data, []))
        found[key].places.append(shard.place)
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
) -> RestoredStripe:
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
    return RestoredStripe(Stripe(code, made.length, shards, made.checksums), tuple(whole))


def _of_the_tables(log: Log, places: Sequence[ShardPlace]) -> int:
    """Return how many places are in segments that the tables have."""
    members = log.members.by_id
    return sum(place.segment in members[place.node].shards.states for place in places)
