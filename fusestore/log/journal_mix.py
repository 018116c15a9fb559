"""Records that are damaged on every node, each at another place: they are put together.

The payload of a record is the same on all nodes.  Where the copies differ, combinations of
them are tried, the most frequent first; the checksum in the header identifies the right one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from math import prod

from ..errors import FormatError
from ..format.records import HEADER_BYTES, MAGIC, Header, Place, checksum
from ..limits import RECORD_ALIGN_BYTES

PIECE_BYTES = 512
"""Copies are compared in pieces of this size, the sector of a disk."""
COMBINATIONS_MAX = 4096
"""Combinations of pieces that are tried for a record, at least twelve damaged places."""


def mixed_records(
    images: Mapping[str, tuple[Place, bytes | bytearray]], known: set[int]
) -> Iterator[tuple[int, Header, bytes]]:
    """Yield (offset, header, payload) of each record that only several copies together give.

    `images` are the bytes of a segment by node, with the place that seeds their headers;
    `known` are the offsets of the records that a node has intact.
    """
    seen = set()
    for place, image in images.values():
        for offset, header in _headers(place, image):
            if offset in known or (offset, header) in seen:
                continue
            seen.add((offset, header))
            start = offset + HEADER_BYTES
            end = start + header.payload_length
            copies = [bytes(other[start:end]) for _, other in images.values() if len(other) >= end]
            payload = _mixed(copies, header)
            if payload is not None:
                yield offset, header, payload


def _headers(place: Place, image: bytes | bytearray) -> Iterator[tuple[int, Header]]:
    """Yield the headers at all places where a record may begin, whatever follows them."""
    found = image.find(MAGIC)
    while found >= 0:
        if found % RECORD_ALIGN_BYTES == 0:
            try:
                yield (
                    found,
                    Header.decode(bytes(image[found : found + HEADER_BYTES]), place.seed(found)),
                )
            except FormatError:
                pass
        found = image.find(MAGIC, found + 1)


def _mixed(copies: Sequence[bytes], header: Header) -> bytes | None:
    """Return the combination of the copies of a payload that matches its header, or None."""
    if not copies:
        return None
    pieces = list(_differing_pieces(copies))
    for ranges in (pieces, list(_runs(pieces))):
        choices = [_choices(copies, start, end) for start, end in ranges]
        tried = product(*choices) if prod(map(len, choices)) <= COMBINATIONS_MAX else []
        for chosen in chain([[choice[0] for choice in choices]], tried):
            payload = bytearray(copies[0])
            for (start, end), piece in zip(ranges, chosen, strict=True):
                payload[start:end] = piece
            if checksum(payload, len(payload)) == header.payload_checksum:
                return bytes(payload)
    return None


def _choices(copies: Sequence[bytes], start: int, end: int) -> list[bytes]:
    """Return the different copies of a range, the most frequent first."""
    return [piece for piece, _ in Counter(copy[start:end] for copy in copies).most_common()]


def _differing_pieces(copies: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the pieces in which copies differ."""
    size = len(copies[0])
    for start in range(0, size, PIECE_BYTES):
        end = min(start + PIECE_BYTES, size)
        if any(copy[start:end] != copies[0][start:end] for copy in copies[1:]):
            yield start, end


def _runs(pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield runs of adjacent pieces as one range each: damage may be longer than a piece."""
    for number, (start, end) in enumerate(pieces):
        if number and pieces[number - 1][1] == start:
            continue
        last = end
        for following, until in pieces[number + 1 :]:
            if following != last:
                break
            last = until
        yield start, last
