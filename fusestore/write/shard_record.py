"""The record that a shard is on its node: header, payload, place.

A header says which shard it is of which stripe, and its checksum is seeded with the place.
So a record can be asked what it is without the metadata, which may be wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from typing_extensions import Buffer

from ..errors import FormatError, NodeError, NodeLacksError
from ..format.erasure import Code
from ..format.records import (
    HEADER_BYTES,
    MAGIC,
    Header,
    Kind,
    Place,
    Run,
    checksum,
    payload_checksum,
)
from ..format.stripe_rows import ShardPlace, Stripe
from ..limits import RECORD_ALIGN_BYTES, STRIPE_BYTES
from ..log.log import Log
from ..members.member import Member

logger = logging.getLogger(__name__)

NOT_WRITTEN = 0
"""The segment of a shard that was never written."""

_RECORD_BYTES_MAX = HEADER_BYTES + STRIPE_BYTES
"""Of a shard; before a place no record that begins earlier can reach into it."""
_PIECE_BYTES = RECORD_ALIGN_BYTES
"""A torn record has pieces that were written, and zeros.  Disks write larger ones, at their
own bounds: a record begins at any multiple of this."""


def _identity(header: Header) -> tuple[int, ...]:
    """What a header says of a shard, its payload aside."""
    return header.number, header.index, header.k, header.m, header.stripe_length


def shard_header(code: Code, length: int, number: int, index: int, checksums: bytes) -> Header:
    """The header of a shard's record; `length` is the stripe's."""
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
    """Write a shard's record where it belongs; may block; NodeError."""
    start = place.offset - HEADER_BYTES
    seed = log.shards(member.name, place.segment).seed(start)
    member.node.write(Run.SHARDS, place.segment, start, [header.encode(seed), payload])


def whole_payload(log: Log, member: Member, number: int, row: Stripe, index: int) -> bytes | None:
    """In a thread: a shard's payload if its own record vouches for it, whatever the row says.

    None when no record of that very shard lies there, or its payload is not what its
    header says; NodeError.
    """
    place = row.shards[index]
    start = place.offset - HEADER_BYTES
    size = HEADER_BYTES + row.shard_length
    data = member.node.read(Run.SHARDS, place.segment, start, size)
    header = _header(log.shards(member.name, place.segment), data, start)
    payload = data[HEADER_BYTES:]
    wanted = (number, index, row.code.k, row.code.m, row.length)
    if header is None or _identity(header) != wanted or header.payload_length != len(payload):
        return None
    return payload if checksum(payload, len(payload)) == header.payload_checksum else None


def may_overwrite(
    log: Log, member: Member, place: ShardPlace, header: Header, payload: Buffer
) -> bool:
    """In a thread: whether a shard may be written anew at a place.

    It may where a record of that very shard lies, whole, torn or rotten, or nothing.  Where
    anything else does, or nobody can tell, the row that names the place may be wrong.
    """
    start, end = place.offset - HEADER_BYTES, place.offset + header.payload_length
    at = log.shards(member.name, place.segment)
    try:
        size = member.node.size(Run.SHARDS, place.segment)
        if size <= start:
            return True
        before = max(0, start - _RECORD_BYTES_MAX)
        found = member.node.read(Run.SHARDS, place.segment, start, min(HEADER_BYTES, size - start))
        lies_there = _header(at, found, start)
        if lies_there is not None:
            return _identity(lies_there) == _identity(header)
        found = member.node.read(Run.SHARDS, place.segment, before, min(end, size) - before)
    except NodeLacksError:
        return True
    except NodeError as error:
        logger.warning("%s", error)
        return False
    for offset in _magics(found):
        other = _header(at, found[offset : offset + HEADER_BYTES], before + offset)
        if other is not None and before + offset + other.record_length > start:
            return False  # a record that reaches into the place, or lies in it
    return _is_torn(found[start - before :], header.encode(at.seed(start)) + bytes(payload))


def _header(at: Place, data: bytes, offset: int) -> Header | None:
    """The header of a shard's record at an offset of a segment, or None."""
    try:
        header = Header.decode(data[:HEADER_BYTES], at.seed(offset))
    except FormatError:
        return None
    return header if header.kind is Kind.SHARD else None


def header_at(log: Log, member: Member, segment: int, offset: int) -> Header | None:
    """In a thread: the header of the record whose payload lies at an offset; NodeError."""
    start = offset - HEADER_BYTES
    try:
        data = member.node.read(Run.SHARDS, segment, start, HEADER_BYTES)
    except NodeLacksError:
        return None
    return _header(log.shards(member.name, segment), data, start)


def is_whole(member: Member, segment: int, offset: int, header: Header) -> bool:
    """In a thread: whether the payload at an offset is what its header says; NodeError."""
    try:
        data = member.node.read(Run.SHARDS, segment, offset, header.payload_length)
    except NodeLacksError:
        return False
    return checksum(data, len(data)) == header.payload_checksum


def headers(log: Log, member: Member, segment: int) -> Iterator[tuple[int, Header]]:
    """In a thread: (payload offset, header) of each shard's record in a segment; NodeError.

    Payloads are not read, but where a header is not where the one before ends.
    """
    at = log.shards(member.name, segment)
    try:
        size = member.node.size(Run.SHARDS, segment)
    except NodeLacksError:
        return
    offset = 0
    while offset + HEADER_BYTES <= size:
        found = _header(at, member.node.read(Run.SHARDS, segment, offset, HEADER_BYTES), offset)
        if found is None:
            offset = _next_header(member, at, offset + RECORD_ALIGN_BYTES, size)
            continue
        yield offset + HEADER_BYTES, found
        offset += found.record_length


def _next_header(member: Member, at: Place, start: int, size: int) -> int:
    """The offset of the next header from `start` on; the size of the segment without one."""
    while start < size:
        piece = member.node.read(Run.SHARDS, at.segment, start, min(STRIPE_BYTES, size - start))
        for offset in _magics(piece):
            if _header(at, piece[offset : offset + HEADER_BYTES], start + offset) is not None:
                return start + offset
        start += len(piece)
    return size


def _magics(data: bytes) -> Iterator[int]:
    """Offsets at which a record might begin; that of the data is a multiple of 64."""
    found = data.find(MAGIC)
    while found >= 0:
        if found % RECORD_ALIGN_BYTES == 0:
            yield found
        found = data.find(MAGIC, found + 1)


def _is_torn(found: bytes, record: bytes) -> bool:
    """Whether what was found is nothing, or a record of which pieces were not written.

    Its header may be anything: it is known to be nobody's.
    """
    for at in range(0, len(found), _PIECE_BYTES):
        start = max(at, HEADER_BYTES)
        piece = found[start : at + _PIECE_BYTES]
        if piece.count(0) != len(piece) and piece != record[start : start + len(piece)]:
            return False
    return True
