"""Fragments: parts of a file that lie in many small pieces, so that reading them takes long.

A piece is a part of a file whose bytes follow each other in one stripe; holes do not end it.
Random overwrites, and several files that grow at the same time, leave small pieces.  Without a
cache, pieces of 256 KiB take twice as long to read as whole stripes, and pieces of 8 KiB six times
as long (docs/performance.md).  A run of pieces that are shorter than a stripe is fragmented if it
has at least two more than the stripes that it needs.  What is rewritten has at most one more, as
it may begin in the middle of a stripe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..format.file_rows import Extent
from ..format.stripe_rows import LOST_STRIPE
from ..limits import Limits


@dataclass(frozen=True, slots=True)
class Run:
    """Extents that follow each other in a file, as far as they are to be rewritten."""

    start: int
    end: int
    """File offsets; there may be holes between."""
    length: int
    """Bytes, without holes."""
    extents: int
    """Their number."""


def run_of(extents: Sequence[Extent], end: int | None = None) -> Run:
    """Return the run of these extents, up to `end`."""
    start, end = extents[0].offset, extents[-1].end if end is None else end
    parts = [extent.part(start, end) for extent in extents if extent.offset < end]
    return Run(start, end, sum(part.length for part in parts), len(parts))


def is_full(extents: int, length: int, limits: Limits) -> bool:
    """Whether one transaction should not rewrite more than so many extents, and bytes of them."""
    return (
        length >= limits.recode_bytes
        or (extents >= limits.recode_extents and length >= limits.stripe_bytes)
        or extents >= limits.recode_extents * 8
    )


def window(extents: Iterable[Extent], limits: Limits) -> tuple[list[Extent], bool]:
    """Take extents for one transaction, at least one; return them, and whether more follow."""
    found, length = list[Extent](), 0
    for extent in extents:
        too_long = found and length + extent.length > limits.recode_bytes
        if too_long or is_full(len(found), length, limits):
            return found, True
        found.append(extent)
        length += extent.length
    return found, False


def fragmented(extents: Sequence[Extent], limits: Limits, *, more: bool) -> tuple[list[Run], int]:
    """Return the fragmented runs of a window, and the offset up to which they were looked at.

    If `more` extents follow, a run that reaches the end of the window ends with a whole stripe, or
    is left to the next window.
    """
    runs, end = list[Run](), extents[-1].end
    for pieces in _short(extents, limits.stripe_bytes):
        found = [extent for piece in pieces for extent in piece]
        run = run_of(found)
        is_cut = more and run.end == end
        if is_cut and run.start > extents[0].offset:
            return runs, run.start
        if _is_fragmented(len(pieces), run.length, limits.stripe_bytes):
            if is_cut:
                run = _whole(found, limits.stripe_bytes) or run
                end = run.end
            runs.append(run)
    return runs, end


def _is_fragmented(pieces: int, length: int, stripe_bytes: int) -> bool:
    needed = -(-length // stripe_bytes)
    return pieces > needed + 1


def _whole(extents: Sequence[Extent], stripe_bytes: int) -> Run | None:
    """Return as much of a run as fills whole stripes."""
    left = sum(extent.length for extent in extents) // stripe_bytes * stripe_bytes
    if not left:
        return None
    for extent in extents:
        if extent.length >= left:
            return run_of(extents, extent.offset + left)
        left -= extent.length
    return None


def _short(extents: Iterable[Extent], stripe_bytes: int) -> Iterator[list[list[Extent]]]:
    """Yield groups of pieces that follow each other and are shorter than a stripe."""
    group = list[list[Extent]]()
    for piece in _pieces(extents):
        is_lost = piece[0].stripe == LOST_STRIPE
        if is_lost or sum(extent.length for extent in piece) >= stripe_bytes:
            if group:
                yield group
            group = []
        else:
            group.append(piece)
    if group:
        yield group


def _pieces(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    piece = list[Extent]()
    for extent in extents:
        if piece:
            last = piece[-1]
            follows = last.stripe_offset + last.length == extent.stripe_offset
            if extent.stripe != last.stripe or not follows:
                yield piece
                piece = []
        piece.append(extent)
    if piece:
        yield piece
