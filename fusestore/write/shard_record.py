"""The record that a shard is on its node: header, payload, place."""

from __future__ import annotations

from typing_extensions import Buffer

from ..format.erasure import Code
from ..format.records import HEADER_BYTES, Header, Kind, Run, payload_checksum
from ..format.stripe_rows import ShardPlace
from ..log.log import Log
from ..members.member import Member

NOT_WRITTEN = 0
"""The segment of a shard that was never written."""


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
