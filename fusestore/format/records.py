"""The records of segments: header, checksums, alignment.

Readers and writers share only this module.  FORMAT.md describes the same bytes in prose.
A record is a header of 64 bytes, a payload, and zeros up to the next multiple of 64.
The checksum of the header is seeded with the place of the record, so that a copy of a
record at another place is invalid.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

from typing_extensions import Buffer
from xxhash import xxh3_64_intdigest

from ..errors import BadMagicError, ChecksumError, TruncatedError, UnknownVersionError
from ..limits import BLOCK_BYTES, RECORD_ALIGN_BYTES

MAGIC = b"fsRC"
VERSION = 1
HEADER = struct.Struct("<4sBBBBBxxxIIIQQ16x")
"""magic, version, kind, index, k, m, payload length, stripe length, epoch, number,
payload checksum; the checksum of these 56 bytes follows."""
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = HEADER.size + _CHECKSUM.size
assert HEADER_BYTES == RECORD_ALIGN_BYTES == 64


class Kind(IntEnum):
    """The kind of a record."""

    COMMIT = 1
    METADATA_DUMP = 2
    SHARD = 3


class SegmentKind(IntEnum):
    """What a segment of a node holds: records of the journal, or shards."""

    JOURNAL = 1
    SHARDS = 2


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a record, which seeds the checksum of its header."""

    store: UUID
    node: str
    kind: SegmentKind
    segment: int

    def seed(self, offset: int) -> int:
        """Return the seed for a header at `offset` of the segment."""
        name = self.node.encode()
        return xxh3_64_intdigest(
            self.store.bytes
            + struct.pack("<BB", self.kind, len(name))
            + name
            + struct.pack("<IQ", self.segment, offset)
        )


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a record; `index`, `k`, `m` and `stripe_length` are 0 except for shards."""

    kind: Kind
    payload_length: int
    payload_checksum: int
    epoch: int
    number: int
    """The number of the commit, the metadata dump or the stripe."""
    index: int = 0
    k: int = 0
    m: int = 0
    stripe_length: int = 0

    @property
    def record_length(self) -> int:
        """Bytes from this header to the next."""
        return record_length(self.payload_length)

    def encode(self, seed: int) -> bytes:
        """Encode the 64 bytes of the header for the place with this seed."""
        head = HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.index,
            self.k,
            self.m,
            self.payload_length,
            self.stripe_length,
            self.epoch,
            self.number,
            self.payload_checksum,
        )
        return head + _CHECKSUM.pack(xxh3_64_intdigest(head, seed))

    @classmethod
    def decode(cls, data: bytes, seed: int) -> Header:
        """Decode a header; TruncatedError, BadMagicError, UnknownVersionError, ChecksumError."""
        if len(data) < HEADER_BYTES:
            raise TruncatedError("The segment ends inside the header of a record.")
        magic, version, kind, index, k, m, length, stripe, epoch, number, checksum = (
            HEADER.unpack_from(data)
        )
        if magic != MAGIC:
            raise BadMagicError("There is no record here.")
        expected = xxh3_64_intdigest(data[: HEADER.size], seed)
        if _CHECKSUM.unpack_from(data, HEADER.size)[0] != expected:
            raise ChecksumError("The header of a record does not match its checksum or its place.")
        # All versions have the same header length and checksum: unknown values are
        # no flipped bits, but were written this way.
        if version != VERSION or kind not in tuple(Kind):
            raise UnknownVersionError(
                f"A record has format version {version} and kind {kind}, which this fusestore "
                "does not know: use a newer one."
            )
        return cls(Kind(kind), length, checksum, epoch, number, index, k, m, stripe)


def record_length(payload_length: int) -> int:
    """Return the bytes of a record with this payload in its segment."""
    return (HEADER_BYTES + payload_length + RECORD_ALIGN_BYTES - 1) & -RECORD_ALIGN_BYTES


def block_checksums(payload: Buffer, length: int) -> bytes:
    """Return the xxh3-64 of each block of the payload's first `length` bytes, 8 bytes each."""
    view = memoryview(payload)[:length]
    digest = xxh3_64_intdigest
    sums = [digest(view[start : start + BLOCK_BYTES]) for start in range(0, length, BLOCK_BYTES)]
    return struct.pack(f"<{len(sums)}Q", *sums)


def payload_checksum(blocks: bytes) -> int:
    """Return the checksum of a payload: the xxh3-64 of its block checksums."""
    return xxh3_64_intdigest(blocks)


def checksum(payload: Buffer, length: int) -> int:
    """Return the checksum of a payload without stored block checksums."""
    return payload_checksum(block_checksums(payload, length))


def records(place: Place, data: Buffer) -> Iterator[tuple[int, Header, memoryview]]:
    """Yield (offset, header, payload) of each intact record of a segment, from its start.

    Torn and damaged records are skipped, up to the next valid header.  UnknownVersionError
    is raised: a newer version wrote the segment.
    """
    raw = bytes(data)
    view = memoryview(raw)
    offset = 0
    while 0 <= offset < len(raw):
        try:
            header = Header.decode(raw[offset : offset + HEADER_BYTES], place.seed(offset))
            start = offset + HEADER_BYTES
            payload = view[start : start + header.payload_length]
            if (
                len(payload) == header.payload_length
                and checksum(payload, header.payload_length) == header.payload_checksum
            ):
                yield offset, header, payload
                offset += header.record_length
                continue
        except (TruncatedError, BadMagicError, ChecksumError):
            pass
        offset = _next_magic(raw, offset + RECORD_ALIGN_BYTES)


def _next_magic(data: bytes, start: int) -> int:
    """Return the next aligned offset from `start` on at which a record may begin, or -1."""
    found = data.find(MAGIC, start)
    while found % RECORD_ALIGN_BYTES and found > 0:
        found = data.find(MAGIC, found + 1)
    return found


# --- the payload of a COMMIT -------------------------------------------------

Changes = Mapping[bytes, bytes | None]
"""Absolute puts (bytes) and deletes (None) by key."""

_COMMIT = struct.Struct("<QQQ16sH")
"""checksum of the previous COMMIT's payload, durable_through, base, epoch nonce, nodes in sync."""
_NODE = struct.Struct("<H")
_CHANGE = struct.Struct("<HI")
_DELETE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Commit:
    """The contents of a COMMIT record."""

    number: int
    epoch: int
    previous: int
    durable_through: int
    base: int
    """The record has all changes since this commit: the previous commit, or for the first
    commit of an epoch the last checkpoint."""
    nonce: bytes
    in_sync: tuple[int, ...]
    """Ids of the nodes that had to flush this commit."""
    changes: Changes


def encode_changes(changes: Changes) -> bytes:
    """Encode changes one after the other: u16 and u32 lengths, key, value."""
    parts: list[bytes] = []
    pack = _CHANGE.pack
    for key, value in changes.items():
        if value is None:
            parts += (pack(len(key), _DELETE), key)
        else:
            parts += (pack(len(key), len(value)), key, value)
    return b"".join(parts)


def decode_changes(data: Buffer) -> dict[bytes, bytes | None]:
    """Decode the result of `encode_changes`; TruncatedError if it ends inside a change."""
    view = memoryview(data)
    changes: dict[bytes, bytes | None] = {}
    offset = 0
    while offset < len(view):
        if offset + _CHANGE.size > len(view):
            raise TruncatedError("A list of changes ends inside a change.")
        key_length, value_length = _CHANGE.unpack_from(view, offset)
        middle = offset + _CHANGE.size + key_length
        offset = middle if value_length == _DELETE else middle + value_length
        if offset > len(view):
            raise TruncatedError("A list of changes ends inside a change.")
        key = bytes(view[middle - key_length : middle])
        changes[key] = None if value_length == _DELETE else bytes(view[middle:offset])
    return changes


def encode_commit(commit: Commit) -> bytes:
    """Encode the payload of a COMMIT record; its header has the number and the epoch."""
    return b"".join(
        (
            _COMMIT.pack(
                commit.previous,
                commit.durable_through,
                commit.base,
                commit.nonce,
                len(commit.in_sync),
            ),
            *(_NODE.pack(node) for node in commit.in_sync),
            encode_changes(commit.changes),
        )
    )


def decode_commit(header: Header, payload: Buffer) -> Commit:
    """Decode the payload of a COMMIT record; TruncatedError if it is incomplete."""
    view = memoryview(payload)
    if len(view) < _COMMIT.size:
        raise TruncatedError("A COMMIT record is too short.")
    previous, durable, base, nonce, count = _COMMIT.unpack_from(view)
    end = _COMMIT.size + count * _NODE.size
    if len(view) < end:
        raise TruncatedError("A COMMIT record is too short.")
    nodes = tuple(n for (n,) in _NODE.iter_unpack(view[_COMMIT.size : end]))
    changes = decode_changes(view[end:])
    return Commit(header.number, header.epoch, previous, durable, base, nonce, nodes, changes)
