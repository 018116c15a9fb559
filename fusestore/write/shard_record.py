"""The record of a shard on its node: header, payload, place.

The header names the stripe and the shard, and its checksum is seeded with the place.
Therefore a record can be identified without the metadata, which may be wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from typing_extensions import Buffer

from ..errors import (
    FormatError,
    NodeError,
    NodeIdentityError,
    NodeLacksError,
    NodeTimeoutError,
)
from ..format.erasure import Code
from ..format.records import (
    HEADER_BYTES,
    MAGIC,
    Header,
    Kind,
    Place,
    SegmentKind,
    checksum,
    payload_checksum,
)
from ..format.stripe_rows import ShardPlace, Stripe
from ..limits import RECORD_ALIGN_BYTES, SHARD_SEGMENT_BYTES, STRIPE_BYTES
from ..log.log import Log
from ..members.member import Member

logger = logging.getLogger(__name__)

NOT_WRITTEN = 0
"""The segment of a shard that was never written."""

_RECORD_BYTES_MAX = HEADER_BYTES + STRIPE_BYTES
"""The longest record of a shard: a record that begins this far before a place ends before it."""
_SEGMENT_BYTES_MAX = SHARD_SEGMENT_BYTES + _RECORD_BYTES_MAX
"""The longest shard segment: it was shorter than SHARD_SEGMENT_BYTES before its last record."""
_HEADER_SUM_BYTES = 8
"""The checksum at the end of a header."""
_PIECE_BYTES = 4096
"""A torn record consists of written pieces and zeros; rot costs pieces, too."""


def _identity(header: Header) -> tuple[int, ...]:
    """Return the fields of a header that identify a shard, without those of the payload."""
    return header.number, header.index, header.k, header.m, header.stripe_length


def shard_header(code: Code, length: int, number: int, index: int, checksums: bytes) -> Header:
    """Return the header of a shard's record; `length` is that of the stripe."""
    return Header(
        Kind.SHARD,
        code.shard_length(length),
        payload_checksum(checksums),
        number >> 40,
        number,
        index,
        code.k,
        code.m,
        length,
    )


def write_shard(
    log: Log, member: Member, place: ShardPlace, header: Header, payload: Buffer
) -> None:
    """Write a shard's record at its place; may block; NodeError."""
    start = place.offset - HEADER_BYTES
    seed = log.shards(member.name, place.segment).seed(start)
    member.node.write(SegmentKind.SHARDS, place.segment, start, [header.encode(seed), payload])


def whole_payload(log: Log, member: Member, number: int, row: Stripe, index: int) -> bytes | None:
    """Return a shard's payload if its own record is intact, whatever the row contains.

    None if there is no record of this shard at the place, or its payload does not match its
    header; NodeError.  Runs in a thread.
    """
    place = row.shards[index]
    start = place.offset - HEADER_BYTES
    size = HEADER_BYTES + row.shard_length
    data = member.node.read(SegmentKind.SHARDS, place.segment, start, size)
    header = _header(log.shards(member.name, place.segment), data, start)
    payload = data[HEADER_BYTES:]
    wanted = (number, index, row.code.k, row.code.m, row.length)
    if header is None or _identity(header) != wanted or header.payload_length != len(payload):
        return None
    return payload if checksum(payload, len(payload)) == header.payload_checksum else None


def may_overwrite(
    log: Log, member: Member, place: ShardPlace, header: Header, payload: Buffer
) -> bool:
    """Return whether a shard may be rewritten at a place; runs in a thread.

    It may if the place holds nothing, or a record of this shard, whether intact, torn or
    damaged: then most of its bytes are still right.  Otherwise, or if this is unknown, the
    row that names the place may be wrong.
    """
    start, end = place.offset - HEADER_BYTES, place.offset + header.payload_length
    at = log.shards(member.name, place.segment)
    try:
        size = member.node.size(SegmentKind.SHARDS, place.segment)
        if size <= start:
            return True
        before = max(0, start - _RECORD_BYTES_MAX)
        found = member.node.read(
            SegmentKind.SHARDS, place.segment, start, min(HEADER_BYTES, size - start)
        )
        lies_there = _header(at, found, start)
        if lies_there is not None:
            return _identity(lies_there) == _identity(header)
        found = member.node.read(SegmentKind.SHARDS, place.segment, before, min(end, size) - before)
    except NodeLacksError:
        return True
    except NodeError as error:
        logger.warning("%s", error)
        return False
    for offset in _magics(found):
        other = _header(at, found[offset : offset + HEADER_BYTES], before + offset)
        if other is not None and before + offset + other.record_length > start:
            return False  # a record that reaches into the place, or lies in it
    return _is_remnant(found[start - before :], header.encode(at.seed(start)) + bytes(payload))


def can_be_read(member: Member, place: ShardPlace, length: int) -> bool:
    """Return whether the record of a shard of `length` bytes can be read; runs in a thread.

    Bytes that are not there count as readable: nothing is unknown about them.  NodeError if
    the node is gone, or too late.
    """
    start = place.offset - HEADER_BYTES
    try:
        member.node.read(SegmentKind.SHARDS, place.segment, start, HEADER_BYTES + length)
    except (NodeIdentityError, NodeTimeoutError):
        raise
    except NodeLacksError:
        return True
    except NodeError as error:
        logger.warning("%s", error)
        return False
    return True


def is_there(member: Member, place: ShardPlace) -> bool:
    """Return whether a segment reaches to the record of a shard, or beyond; runs in a thread."""
    try:
        return member.node.size(SegmentKind.SHARDS, place.segment) > place.offset
    except NodeLacksError:
        return False


def can_be_rewritten(member: Member, place: ShardPlace, length: int) -> bool:
    """Like `can_be_read`; but a segment that has other names (hard links) is not written to."""
    if not can_be_read(member, place, length):
        return False
    try:
        return not member.node.is_shared(SegmentKind.SHARDS, place.segment)
    except NodeLacksError:
        return True


def _header(at: Place, data: bytes, offset: int) -> Header | None:
    """Return the header of a shard's record at an offset of a segment, or None."""
    try:
        header = Header.decode(data[:HEADER_BYTES], at.seed(offset))
    except FormatError:
        return None
    return header if header.kind is Kind.SHARD else None


def header_at(log: Log, member: Member, segment: int, offset: int) -> Header | None:
    """Return the header of the record with its payload at an offset; NodeError; in a thread."""
    start = offset - HEADER_BYTES
    try:
        data = member.node.read(SegmentKind.SHARDS, segment, start, HEADER_BYTES)
    except NodeLacksError:
        return None
    return _header(log.shards(member.name, segment), data, start)


def is_whole(member: Member, segment: int, offset: int, header: Header) -> bool:
    """Return whether the payload at an offset matches its header; NodeError; in a thread."""
    try:
        data = member.node.read(SegmentKind.SHARDS, segment, offset, header.payload_length)
    except NodeLacksError:
        return False
    return checksum(data, len(data)) == header.payload_checksum


def headers(log: Log, member: Member, segment: int) -> Iterator[tuple[int, Header]]:
    """Yield (payload offset, header) of each shard's record in a segment; NodeError.

    Payloads are read only if a header is not at the end of the previous record.  What lies
    past the longest segment is not of this store.  Runs in a thread.
    """
    at = log.shards(member.name, segment)
    try:
        size = min(member.node.size(SegmentKind.SHARDS, segment), _SEGMENT_BYTES_MAX)
    except NodeLacksError:
        return
    offset = 0
    while offset + HEADER_BYTES <= size:
        found = _header(
            at, member.node.read(SegmentKind.SHARDS, segment, offset, HEADER_BYTES), offset
        )
        if found is None:
            offset = _next_header(member, at, offset + RECORD_ALIGN_BYTES, size)
            continue
        yield offset + HEADER_BYTES, found
        offset += found.record_length


def may_be_ours(log: Log, member: Member, segment: int) -> bool:
    """Return whether a segment begins as this store begins one; NodeError; in a thread.

    It begins with a record, or with a torn header, or with zeros, if a crash or a fault came
    before the record was on the disk.
    """
    try:
        size = member.node.size(SegmentKind.SHARDS, segment)
        data = member.node.read(SegmentKind.SHARDS, segment, 0, min(size, HEADER_BYTES))
    except NodeLacksError:
        return False
    return _is_torn_header(data) or _header(log.shards(member.name, segment), data, 0) is not None


def _is_torn_header(data: bytes) -> bool:
    """Return whether `data` is the first part of a header, at most, and zeros or nothing."""
    start = data.rstrip(b"\0")
    is_torn = len(data) < HEADER_BYTES or len(start) < HEADER_BYTES - _HEADER_SUM_BYTES
    return is_torn and MAGIC.startswith(start[: len(MAGIC)])


def _next_header(member: Member, at: Place, start: int, size: int) -> int:
    """Return the offset of the next header from `start` on, or the size of the segment."""
    while start < size:
        piece = member.node.read(
            SegmentKind.SHARDS, at.segment, start, min(STRIPE_BYTES, size - start)
        )
        for offset in _magics(piece):
            if _header(at, piece[offset : offset + HEADER_BYTES], start + offset) is not None:
                return start + offset
        start += len(piece)
    return size


def _magics(data: bytes) -> Iterator[int]:
    """Yield the offsets at which a record may begin; `data` begins at a multiple of 64."""
    found = data.find(MAGIC)
    while found >= 0:
        if found % RECORD_ALIGN_BYTES == 0:
            yield found
        found = data.find(MAGIC, found + 1)


def _is_remnant(found: bytes, record: bytes) -> bool:
    """Return whether `found` is what was left of `record`: zeros for some bytes, rot for few.

    A crash can also cut off a write within a piece.  The header is not compared: it is known
    not to be that of another shard.
    """
    right = rotten = 0
    for at in range(0, len(found), _PIECE_BYTES):
        start = max(at, HEADER_BYTES)
        piece, wanted = found[start : at + _PIECE_BYTES], record[start : at + _PIECE_BYTES]
        if piece.count(0) == len(piece):
            continue
        if piece == wanted:
            right += 1
        elif len(piece) > len(wanted) or any(
            a not in (0, b) for a, b in zip(piece, wanted, strict=False)
        ):
            rotten += 1
    return rotten <= right // 2
