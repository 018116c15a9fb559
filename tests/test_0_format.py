"""The bytes on disk: records, changes, keys and rows."""

from __future__ import annotations

import struct
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fusestore.errors import BadMagicError, ChecksumError, TruncatedError, UnknownVersionError
from fusestore.format import file_rows, keys, store_rows, stripe_rows, tables
from fusestore.format.erasure import Code
from fusestore.format.records import (
    Commit,
    Header,
    Kind,
    Place,
    SegmentKind,
    block_checksums,
    checksum,
    decode_changes,
    decode_commit,
    encode_changes,
    encode_commit,
    payload_checksum,
    records,
)

STORE = UUID(int=0x1234)
PLACE = Place(STORE, "us-east-1", SegmentKind.SHARDS, 7)
HEADER = Header(Kind.SHARD, 640, 0xABCD, 3, 3 << 40 | 9, 2, 4, 2, 2500)


def test_a_header_is_64_bytes_at_known_offsets() -> None:
    data = HEADER.encode(PLACE.seed(128))
    assert len(data) == 64
    assert data[:4] == b"fsRC"
    assert struct.unpack_from("<BBBBB", data, 4) == (1, 3, 2, 4, 2)
    assert struct.unpack_from("<IIIQQ", data, 12) == (640, 2500, 3, 3 << 40 | 9, 0xABCD)
    assert data[40:56] == bytes(16)
    seed = xxh3_64_intdigest(STORE.bytes + b"\x02\x09us-east-1" + struct.pack("<IQ", 7, 128))
    assert struct.unpack_from("<Q", data, 56) == (xxh3_64_intdigest(data[:56], seed),)
    assert Header.decode(data, PLACE.seed(128)) == HEADER


def test_a_record_elsewhere_is_none() -> None:
    data = HEADER.encode(PLACE.seed(128))
    others = [
        PLACE.seed(192),
        replace(PLACE, segment=8).seed(128),
        replace(PLACE, node="us-east-2").seed(128),
        replace(PLACE, kind=SegmentKind.JOURNAL).seed(128),
        replace(PLACE, store=UUID(int=5)).seed(128),
    ]
    for seed in others:
        with pytest.raises(ChecksumError):
            Header.decode(data, seed)


def test_every_flaw_of_a_header_has_its_error() -> None:
    seed = PLACE.seed(0)
    good = HEADER.encode(seed)
    with pytest.raises(TruncatedError):
        Header.decode(good[:63], seed)
    with pytest.raises(BadMagicError):
        Header.decode(bytes(64), seed)
    newer = good[:4] + b"\x02" + good[5:56]
    with pytest.raises(UnknownVersionError):
        Header.decode(newer + struct.pack("<Q", xxh3_64_intdigest(newer, seed)), seed)
    for position in range(4, 64):
        flipped = bytearray(good)
        flipped[position] ^= 0x10
        with pytest.raises(ChecksumError):
            Header.decode(bytes(flipped), seed)


def test_a_payloads_checksum_is_the_hash_of_its_blocks_hashes() -> None:
    payload = bytes(range(256)) * 200
    blocks = [xxh3_64_intdigest(payload[i : i + 16384]) for i in range(0, len(payload), 16384)]
    assert block_checksums(payload, len(payload)) == struct.pack(f"<{len(blocks)}Q", *blocks)
    assert checksum(payload, len(payload)) == payload_checksum(
        block_checksums(payload, len(payload))
    )


def journal(payloads: list[bytes]) -> bytes:
    """A journal segment with these COMMIT payloads."""
    place = replace(PLACE, kind=SegmentKind.JOURNAL)
    data = b""
    for number, payload in enumerate(payloads):
        header = Header(Kind.COMMIT, len(payload), checksum(payload, len(payload)), 1, number)
        data += header.encode(place.seed(len(data))) + payload
        data += bytes(-len(data) % 64)
    return data


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.data())
def test_reading_passes_over_a_torn_record(payloads: list[bytes], data: st.DataObject) -> None:
    place = replace(PLACE, kind=SegmentKind.JOURNAL)
    whole = journal(payloads)
    assert [bytes(p) for _, _, p in records(place, whole)] == payloads
    torn = bytearray(whole)
    at = data.draw(st.integers(0, len(torn) - 1))
    torn[at] ^= 1 << data.draw(st.integers(0, 7))
    offsets = [o for o, _, _ in records(place, whole)]
    hurt = max(i for i, offset in enumerate(offsets) if offset <= at)
    found = {o: bytes(p) for o, _, p in records(place, torn)}
    intact = dict(zip(offsets, payloads, strict=True))
    assert found in (intact, {o: p for o, p in intact.items() if o != offsets[hurt]})
    cut = whole[:at]
    found = [bytes(p) for _, _, p in records(place, cut)]
    assert found == payloads[: len(found)]


CHANGES = st.dictionaries(
    st.binary(min_size=1, max_size=40), st.none() | st.binary(max_size=200), max_size=20
)


@given(CHANGES)
def test_changes_read_as_they_are_written(changes: dict[bytes, bytes | None]) -> None:
    data = encode_changes(changes)
    assert decode_changes(data) == changes
    for cut in {1, 3, len(data) // 2} & set(range(1, len(data))):
        try:
            assert len(decode_changes(data[:cut])) < len(changes)
        except TruncatedError:
            pass


@given(CHANGES, st.lists(st.integers(0, 65535), max_size=5))
def test_commits_read_as_they_are_written(
    changes: dict[bytes, bytes | None], nodes: list[int]
) -> None:
    commit = Commit(12, 3, 99, 11, 10, bytes(range(16)), tuple(nodes), changes)
    payload = encode_commit(commit)
    header = Header(Kind.COMMIT, len(payload), 0, 3, 12)
    assert decode_commit(header, payload) == commit


NUMBER = st.integers(0, 2**63)


@given(NUMBER, NUMBER, NUMBER, NUMBER)
def test_keys_sort_as_their_numbers(a: int, b: int, c: int, d: int) -> None:
    assert (file_rows.extent_key(a, b) < file_rows.extent_key(c, d)) == ((a, b) < (c, d))
    assert (file_rows.listing_key(a, b) < file_rows.listing_key(c, d)) == ((a, b) < (c, d))


def test_rows_read_as_they_are_written() -> None:
    inode = file_rows.Inode(0o100644, 1, 2, 3, 2**63 - 1, 5, -6, 7, 8, 9, 10, 11, 12, 4, 2)
    assert file_rows.Inode.decode(inode.encode()) == inode
    extent = file_rows.Extent(2**62, 1 << 20, 5 << 40, 77)
    assert file_rows.Extent.decode(file_rows.extent_key(9, 2**62), extent.encode()) == extent
    shards = tuple(stripe_rows.ShardPlace(i, i + 1, i << 33) for i in range(6))
    sums = tuple(bytes([i]) * 8 * 17 for i in range(6))
    stripe = stripe_rows.Stripe(Code(4, 2), 1 << 20, shards, sums)
    assert stripe_rows.Stripe.decode(stripe.encode()) == stripe
    counters = store_rows.Counters(5, 6, 7, 8, -1)
    assert store_rows.Counters.decode(counters.encode()) == counters
    position = store_rows.LogPosition(1, "ab" * 16, 2, 2**64 - 1, 4)
    assert store_rows.LogPosition.decode(position.encode()) == position
    rows = [
        store_rows.NodeRow(1, "a", "r", "/a", True),
        store_rows.NodeRow(2, "b", "s", "/b", False, 17),
    ]
    assert store_rows.decode_nodes(store_rows.encode_nodes(rows)) == rows
    assert stripe_rows.decode_missing_key(stripe_rows.missing_key(3, 5 << 40, 2)) == (3, 5 << 40, 2)
    assert stripe_rows.decode_reclaim_key(stripe_rows.reclaim_key(3, 4, 5)) == (3, 4, 5)
    freed = stripe_rows.Freed(450_048, 5 << 40 | 7)
    assert stripe_rows.Freed.decode(freed.encode()) == freed
    early = (450_048).to_bytes(4, "little")
    assert stripe_rows.Freed.decode(early) == (450_048, stripe_rows.LOST_STRIPE)
    assert all(tables.readable(b"R" + bytes(14), value) for value in (early, freed.encode()))
    assert stripe_rows.decode_tail(stripe_rows.tail_value(Code(4, 2), b"xyz")) == (
        Code(4, 2),
        b"xyz",
    )


@given(st.binary(min_size=1, max_size=12))
def test_after_a_prefix_comes_the_next_key(prefix: bytes) -> None:
    if prefix != b"\xff" * len(prefix):
        assert prefix + b"\xff" * 40 < keys.after(prefix)
        assert keys.after(prefix) > prefix
