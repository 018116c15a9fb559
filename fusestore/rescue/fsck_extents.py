"""fsck: each extent lies in a file and in a stripe, and stripes name the owners of their bytes.

Extents whose rows are gone are restored if three rows agree: the inode counts more
bytes than it has, the stripe counts more live bytes than extents have, and the
stripe's owners name the range.
"""

from __future__ import annotations

import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..format import file_rows, stripe_rows
from ..format.file_rows import Extent, Inode
from ..format.stripe_rows import LOST_STRIPE, OWNER, Freed, Live
from ..limits import FILE_BYTES_MAX, STRIPE_BYTES
from .fsck_findings import Finding, Phase, finding
from .fsck_inodes import InodeCheck
from .fsck_view import StoreView


@dataclass(slots=True)
class ExtentCheck:
    """Checks extents, and counts the bytes of each stripe in files."""

    _store: StoreView
    _inodes: InodeCheck
    uses: Counter[int] = field(default_factory=Counter)
    """By stripe: its bytes in extents."""
    lost_bytes: int = 0
    """Bytes of extents that point at LOST_STRIPE."""
    _restored: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By inode: ranges whose extents can be restored."""

    def extents(self) -> Iterator[Finding]:
        """Each extent lies in its file, overlaps no other, and its stripe names the file."""
        owners = _Owners(self._store)
        ino, inode, end, held, trimmed = -1, None, 0, 0, False
        for key, value in self._store.table(b"E"):
            owner, extent = file_rows.decode_ino_key(key), Extent.decode(key, value)
            if owner != ino:
                if inode is not None:
                    yield from self._inodes.allocated(ino, inode, held)
                ino, inode, end, held = owner, self._store.inode(owner), 0, 0
                trimmed = self._store.has(file_rows.trim_key(ino))
            self.uses[extent.stripe] += extent.length
            problem = _misplaced(extent, inode, end, trimmed)
            # If it is too long, others are not judged by where it ends.
            if self._is_lost(extent) and _begins_right(extent, inode, end, trimmed):
                held += extent.length
                yield self._lost(ino, extent, owners)
                continue
            if problem:
                text = f"bytes {extent.offset} to {extent.end} of inode {ino} {problem}"
                yield finding(Phase.EXTENTS, "extents", text, "move_extent", ino, extent)
                continue
            end = extent.end
            held += extent.length
            yield from self._in_stripe(ino, extent, owners)
        if inode is not None:
            yield from self._inodes.allocated(ino, inode, held)

    def _in_stripe(self, ino: int, extent: Extent, owners: _Owners) -> Iterator[Finding]:
        if extent.stripe == LOST_STRIPE:
            self.lost_bytes += extent.length
        if extent.stripe not in self._store.unsealed and not owners.name(ino, extent):
            text = f"stripe {extent.stripe:#x} does not name inode {ino} as an owner"
            yield finding(Phase.DERIVED, "owners", text, "add_owner", ino, extent)

    def _lost(self, ino: int, extent: Extent, owners: _Owners) -> Finding:
        """Return a finding that cuts an extent down to what its stripe has, or gives it up."""
        end, stripe = owners.end(ino, extent), self._store.stripe(extent.stripe)
        length = end - extent.offset
        if stripe is not None and 0 < length <= stripe.length - extent.stripe_offset:
            text = (
                f"bytes {extent.offset} to {extent.end} of inode {ino} are more than stripe "
                f"{extent.stripe:#x} has of them, to {end}"
            )
            return finding(Phase.EXTENTS, "extents", text, "cut_extent", ino, extent, length)
        text = (
            f"bytes {extent.offset} to {extent.end} of inode {ino} are lost: stripe "
            f"{extent.stripe:#x} does not have them"
        )
        return finding(Phase.EXTENTS, "extents", text, "lose_extent", ino, extent)

    def _is_lost(self, extent: Extent) -> bool:
        """Return whether no stripe has the bytes, and the extent does not say so."""
        if extent.stripe == LOST_STRIPE or extent.stripe in self._store.unsealed:
            return False
        stripe = self._store.stripe(extent.stripe)
        return stripe is None or extent.stripe_offset + extent.length > stripe.length

    def owners(self) -> Iterator[Finding]:
        """A missing stripe has no owners, unless it is to be freed: then they are looked at."""
        last = -1
        freed = {Freed.decode(value).stripe for _, value in self._store.table(b"R")}
        for key, _ in self._store.table(b"O"):
            number = int(file_rows.decode_ino_key(key))
            if number in (last, LOST_STRIPE) or number in self._store.unsealed:
                continue
            last = number
            if self._store.stripe(number) is None and number not in freed:
                text = f"stripe {number:#x} does not exist"
                yield finding(Phase.DERIVED, "owners", text, "drop_owners", number)

    def live(self) -> Iterator[Finding]:
        """Each stripe counts its bytes in extents."""
        counted = {}
        for key, value in self._store.table(b"V"):
            counted[stripe_rows.decode_stripe_key(key)] = Live.decode(value)
        for number in sorted((counted.keys() | self.uses.keys()) - {LOST_STRIPE}, reverse=True):
            count, live = counted.get(number, Live(0)), self.uses[number]
            if count.live > live:
                yield from self._lost_extents(number, count.live - live)
            if count.live != live or not live:
                has = live or "none"
                text = f"stripe {number:#x} counts {count.live} live bytes, but has {has}"
                yield finding(Phase.DERIVED, "live", text, "set_live", number, live)
                continue
            stripe = self._store.stripe(number)
            if stripe is not None and stripe.length != count.length:
                text = f"stripe {number:#x} has {stripe.length} bytes, not {count.length}"
                yield finding(Phase.DERIVED, "live", text, "set_live", number, live)

    def _lost_extents(self, number: int, hidden: int) -> Iterator[Finding]:
        """Restore missing extents on which live bytes, allocated bytes and owners agree.

        Called for the newest stripe first: its bytes of a file were written last.
        """
        short = self._inodes.short
        owners = [
            owner
            for _, packed in self._store.table(stripe_rows.owners_prefix(number))
            for owner in OWNER.iter_unpack(packed)
            if owner[0] in short
        ]
        for ino, offset, length, at in reversed(owners):
            inode = self._store.inode(ino)
            assert inode is not None
            for start, end in list(self._gaps(ino, offset, min(offset + length, inode.size))):
                if end - start <= min(hidden, short[ino]):
                    hidden -= end - start
                    short[ino] -= end - start
                    extent = Extent(start, end - start, number, at + start - offset)
                    self._restored[ino].append((start, end))
                    text = (
                        f"bytes {start} to {end} of inode {ino} have no extent, but stripe "
                        f"{number:#x} has them"
                    )
                    yield finding(Phase.EXTENTS, "extents", text, "put_extent", ino, extent)

    def _gaps(self, ino: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a file's bytes start <= i < end without an extent."""
        taken = list(self._restored.get(ino, ()))
        for key, value in self._store.table(file_rows.extent_key(ino, 0)[:9]):
            extent = Extent.decode(key, value)
            taken.append((extent.offset, extent.end))
        for first, last in sorted(taken):
            if start >= end:
                return
            if last > start:
                if first > start:
                    yield start, min(first, end)
                start = max(start, last)
        if start < end:
            yield start, end


def _misplaced(extent: Extent, inode: Inode | None, end: int, trimmed: bool) -> str:
    """Return why the place of an extent is impossible, or an empty string."""
    if inode is None:
        return "" if trimmed else "belong to no inode"
    if not stat.S_ISREG(inode.mode):
        return "belong to an inode that is not a file"
    if extent.length == 0:
        return "are an empty range"
    if extent.end > FILE_BYTES_MAX:
        return "lie past the end of the longest file"
    if extent.offset < end:
        return "overlap the extent before"
    if extent.end > inode.size and not trimmed:
        return f"lie past its end at {inode.size}"
    return ""


def _begins_right(extent: Extent, inode: Inode | None, end: int, trimmed: bool) -> bool:
    """Return whether an extent begins where one can, behind the end of the one before."""
    return (
        inode is not None
        and stat.S_ISREG(inode.mode)
        and extent.length > 0
        and end <= extent.offset <= FILE_BYTES_MAX - STRIPE_BYTES
        and (trimmed or extent.offset < inode.size)
    )


class _Owners:
    """Looks up whether a stripe's `owners` name an extent; stripes come in runs."""

    def __init__(self, store: StoreView) -> None:
        self._store = store
        self._stripes: dict[int, dict[tuple[int, int], list[tuple[int, int]]]] = {}

    def name(self, ino: int, extent: Extent) -> bool:
        """Return whether owners cover the extent, in one row or in several."""
        ranges = self._of(extent.stripe).get((ino, extent.offset - extent.stripe_offset), [])
        at = extent.offset
        for start, end in ranges:
            if start <= at < end:
                at = end
        return at >= extent.end

    def end(self, ino: int, extent: Extent) -> int:
        """Return where the range of the owners ends in which the extent begins; 0 if none."""
        ranges = self._of(extent.stripe).get((ino, extent.offset - extent.stripe_offset), [])
        return max((end for start, end in ranges if start <= extent.offset < end), default=0)

    def _of(self, stripe: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Return sorted ranges of files, by inode and distance of its offsets from the stripe's."""
        found = self._stripes.get(stripe)
        if found is None:
            if len(self._stripes) > 64:
                self._stripes.pop(next(iter(self._stripes)))
            found = self._stripes[stripe] = defaultdict(list)
            for _, packed in self._store.table(stripe_rows.owners_prefix(stripe)):
                for ino, offset, length, at in OWNER.iter_unpack(packed):
                    found[ino, offset - at].append((offset, offset + length))
            for ranges in found.values():
                ranges.sort()
        return found
