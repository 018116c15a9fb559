"""Rows of stripes: places of shards, live bytes, owners, tails, and missing shards.

There is one function per key, and one dataclass per value.  `tables` lists all tables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from ..limits import (
    BLOCK_BYTES,
    RECORD_ALIGN_BYTES,
    SHARD_SEGMENT_BYTES,
    SMALL_STRIPE_BYTES,
    SMALL_STRIPE_WASTE,
    STRIPE_BYTES,
)
from .erasure import Code
from .keys import HI, HIQ, HQB, QI, Q


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """The place of a shard's payload; segment 0 means that the shard was never written."""

    node: int
    segment: int
    offset: int
    """The offset of the payload in the segment's file."""

    @property
    def written(self) -> bool:
        """Whether the shard was ever written to the node."""
        return self.segment != 0


@dataclass(frozen=True, slots=True)
class Stripe:
    """A sealed stripe: the places of its n shards, and the checksums of their blocks."""

    code: Code
    length: int
    """Bytes of file data, without padding."""
    shards: tuple[ShardPlace, ...]
    checksums: tuple[bytes, ...]
    """For each shard the xxh3-64 of each of its blocks, 8 bytes each."""

    _HEAD = struct.Struct("<BBII")
    _PLACE = struct.Struct("<HIQ")

    @property
    def shard_length(self) -> int:
        """The bytes of each shard."""
        return self.code.shard_length(self.length)

    def is_same(self, other: Stripe) -> bool:
        """Whether it is the same stripe, wherever its shards lie."""
        return (self.code, self.length, self.checksums) == (
            other.code,
            other.length,
            other.checksums,
        )

    def moved(self, index: int, place: ShardPlace) -> Stripe:
        """Return the same stripe with one shard at another place."""
        shards = (*self.shards[:index], place, *self.shards[index + 1 :])
        return replace(self, shards=shards)

    def encode(self) -> bytes:
        """The row's value."""
        return b"".join(
            (
                self._HEAD.pack(self.code.k, self.code.m, self.length, self.shard_length),
                *(self._PLACE.pack(s.node, s.segment, s.offset) for s in self.shards),
                *self.checksums,
            )
        )

    @classmethod
    def has_form(cls, value: bytes) -> bool:
        """Return whether a value has the form of a stripe's row; struct.error."""
        k, m, length, shard_length = cls._HEAD.unpack_from(value)
        code = Code(k, m)
        blocks = -(-shard_length // BLOCK_BYTES)
        return (
            code.is_possible
            and 0 < length <= STRIPE_BYTES
            and shard_length == code.shard_length(length)
            and len(value) == cls._HEAD.size + code.n * (cls._PLACE.size + 8 * blocks)
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        k, m, length, _ = cls._HEAD.unpack_from(value)
        code = Code(k, m)
        start = cls._HEAD.size + cls._PLACE.size * code.n
        places = cls._PLACE.iter_unpack(value[cls._HEAD.size : start])
        each = (len(value) - start) // code.n
        return cls(
            code,
            length,
            tuple(ShardPlace(*place) for place in places),
            tuple(value[start + i * each : start + (i + 1) * each] for i in range(code.n)),
        )


STRIPES_START, STRIPES_END = b"S", b"T"
LOST_STRIPE = 0
"""Not a stripe: fsck points extents with lost bytes at it, so that reading them is an error."""


def stripe_key(stripe: int) -> bytes:
    return b"S" + Q.pack(stripe)


def decode_stripe_key(key: bytes) -> int:
    return int(Q.unpack_from(key, 1)[0])


def live_key(stripe: int) -> bytes:
    return b"V" + Q.pack(stripe)


class Live(NamedTuple):
    """How much of a stripe is in use."""

    live: int
    """Bytes that extents point at; 0: unknown, and nothing is freed until fsck has counted."""
    length: int = 0
    """Bytes of file data in the stripe; 0 while more may follow."""

    @property
    def waste(self) -> int:
        """Bytes that cleaning gives back: those that no extent points at, and what a small
        stripe takes more than its bytes; 0 while more may follow, or if it is unknown."""
        if self.length == 0 or self.live == 0:
            return 0
        small = SMALL_STRIPE_WASTE if self.length < SMALL_STRIPE_BYTES else 0
        return max(self.length - self.live, 0) + small

    def encode(self) -> bytes:
        """The row's value."""
        return _LIVE.pack(*self)

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(*_LIVE.unpack(value))


_LIVE = struct.Struct("<QI")
LIVE_START, LIVE_END = b"V", b"W"


OWNER = struct.Struct("<QQII")
"""ino, file offset, length, stripe offset."""


def owners_key(stripe: int, stripe_offset: int) -> bytes:
    return b"O" + QI.pack(stripe, stripe_offset)


def owners_prefix(stripe: int) -> bytes:
    """Return what the keys of all owners' rows of a stripe begin with."""
    return owners_key(stripe, 0)[:9]


TAILS_START, TAILS_END = b"T", b"U"


def tail_key(stripe: int, stripe_offset: int) -> bytes:
    return b"T" + QI.pack(stripe, stripe_offset)


def tail_value(code: Code, data: bytes) -> bytes:
    return bytes((code.k, code.m)) + data


def decode_tail(value: bytes) -> tuple[Code, bytes]:
    """(code of the stripe, bytes)."""
    return Code(value[0], value[1]), value[2:]


def decode_tail_key(key: bytes) -> tuple[int, int]:
    """(stripe, stripe offset)."""
    return QI.unpack_from(key, 1)


def missing_key(node: int, stripe: int, index: int) -> bytes:
    return b"M" + HQB.pack(node, stripe, index)


def missing_prefix(node: int) -> bytes:
    return b"M" + struct.pack(">H", node)


def decode_missing_key(key: bytes) -> tuple[int, int, int]:
    """(node, stripe, index)."""
    return HQB.unpack_from(key, 1)


@dataclass(slots=True)
class SegmentState:
    """A shard segment: bytes used, and bytes of records with live shards."""

    size: int = 0
    live: int = 0

    _STRUCT = struct.Struct("<QQ")

    @property
    def is_possible(self) -> bool:
        """Whether a segment can have this length and this many live bytes."""
        return self.live <= self.size <= SHARD_SEGMENT_BYTES + RECORD_ALIGN_BYTES + STRIPE_BYTES

    def encode(self) -> bytes:
        """The row's value."""
        return self._STRUCT.pack(self.size, self.live)

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(*cls._STRUCT.unpack(value))


SEGMENTS_START, SEGMENTS_END = b"G", b"H"


def segment_key(node: int, segment: int) -> bytes:
    return b"G" + HI.pack(node, segment)


def decode_segment_key(key: bytes) -> tuple[int, int]:
    """(node, segment)."""
    return HI.unpack_from(key, 1)


RECLAIM_START, RECLAIM_END = b"R", b"S"


def reclaim_key(node: int, segment: int, offset: int) -> bytes:
    return b"R" + HIQ.pack(node, segment, offset)


class Freed(NamedTuple):
    """A shard whose room is to be freed."""

    length: int
    """Bytes of the payload."""
    stripe: int = LOST_STRIPE
    """Its stripe; LOST_STRIPE in rows of early versions, which do not say."""

    def encode(self) -> bytes:
        """The row's value."""
        return _FREED.pack(*self)

    @classmethod
    def has_form(cls, value: bytes) -> bool:
        """Return whether a value has the form of such a row."""
        return len(value) in (_FREED.size, _FREED_LENGTH_BYTES)

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        if len(value) == _FREED_LENGTH_BYTES:
            return cls(int.from_bytes(value, "little"))
        return cls(*_FREED.unpack(value))


_FREED = struct.Struct("<IQ")
_FREED_LENGTH_BYTES = 4


def reclaim_row(place: ShardPlace, length: int, stripe: int) -> tuple[bytes, bytes]:
    """Return the row that frees a shard of `length` bytes."""
    key = reclaim_key(place.node, place.segment, place.offset)
    return key, Freed(length, stripe).encode()


def decode_reclaim_key(key: bytes) -> tuple[int, int, int]:
    """(node, segment, payload offset)."""
    return HIQ.unpack_from(key, 1)
