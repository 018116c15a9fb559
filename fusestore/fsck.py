"""The check of all tables against each other: what must hold, row by row.

A finding is one line, and knows how it is mended (fsck_repair.py).  Findings
have a phase: those of a later one may come from those of an earlier one, so
mending goes phase by phase.

    1  names and listings: each row can be read, each name has an inode, and is listed
    2  inodes: each has a name, no directory is inside itself
    3  extents: of a file, inside it, not overlapping, in a stripe that is there
    4  what is counted or derived: links, live bytes, owners, quotas, segments, counters

Everything is read from one view, so a mounted store is checked as it was at
one instant.  Stripes that are still in memory have no rows to check.
"""

from __future__ import annotations

import stat
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import methodcaller
from typing import TYPE_CHECKING

from . import schema
from .engine import View
from .errors import FusestoreError
from .limits import NAME_BYTES_MAX
from .records import HEADER_BYTES, record_length
from .schema import (
    LOST_STRIPE,
    OWNER,
    ROOT,
    Counters,
    Extent,
    Inode,
    Quota,
    QuotaState,
    SegmentState,
    Stripe,
)

if TYPE_CHECKING:
    from .fsck_repair import Mender

TABLES = {
    b"B": "quotas",
    b"D": "trims",
    b"E": "extents",
    b"G": "segments",
    b"I": "inodes",
    b"L": "listing",
    b"M": "missing",
    b"N": "names",
    b"O": "owners",
    b"Q": "targets",
    b"R": "reclaim",
    b"S": "stripes",
    b"T": "tails",
    b"U": "orphans",
    b"V": "live",
    b"X": "xattrs",
}
_FILE_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK}
_FILE_TYPES |= {stat.S_IFCHR, stat.S_IFBLK}
_FORBIDDEN = {*b"/\0"}
_UNREADABLE = (struct.error, ValueError, IndexError, FusestoreError)

Fix = Callable[["Mender"], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be."""

    phase: int
    table: str
    text: str
    fix: Fix

    def __str__(self) -> str:
        return f"{self.table}: {self.text}"


@dataclass(slots=True)
class Around:
    """What the log knows besides the tables, as of the instant of the view."""

    counters: Counters
    segments: dict[tuple[int, int], SegmentState]
    """By node and segment."""
    unsealed: set[int]
    """Stripes that are in memory."""
    nodes: dict[int, str]
    """Names of the nodes, by id."""
    sizes: dict[int, dict[int, int]]
    """Of the nodes that are there: bytes by shard segment."""
    at_rest: bool
    """Nothing is on its way: what is counted must be exact."""


@dataclass(slots=True)
class _Use:
    """What extents have of a stripe."""

    live: int = 0
    end: int = 0


@dataclass(slots=True)
class Check:
    """One run over all tables; `lost_bytes` is what extents point at LOST_STRIPE for."""

    view: View
    around: Around
    links: Counter[int] = field(default_factory=Counter)
    """By inode: how many names it has."""
    folders: dict[int, int] = field(default_factory=dict)
    """By directory: the directory that has it."""
    uses: dict[int, _Use] = field(default_factory=lambda: defaultdict(_Use))
    files: int = 0
    stripes: int = 0
    lost_bytes: int = 0
    short: dict[int, int] = field(default_factory=dict)
    """By inode: bytes that it counts, and for which there are no extents."""
    restored: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By inode: ranges for which an extent can be made again."""
    last_ino: int = 0
    last_cookie: int = 0
    quotas: dict[int, Quota] = field(default_factory=dict)
    """By directory; with one at least, the next two are filled, too."""
    homes: dict[int, frozenset[int]] = field(default_factory=dict)
    """By inode: the quotas of the directories that have it."""
    alike: dict[frozenset[int], frozenset[int]] = field(default_factory=dict)
    """One object for all inodes that lie in the same quotas."""
    held: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """By quota: bytes and inodes that name it, those of inner quotas excluded."""

    def run(self) -> Iterator[Finding]:
        """All findings; read it to its end before using the counts."""
        yield from self._rows_are_readable()
        for key, value in self._table(b"B"):
            self.quotas[schema.decode_ino_key(key)] = Quota.decode(value)
        yield from self._names()
        yield from self._listing()
        yield from self._inodes()
        yield from self._loops()
        yield from self._extents()
        yield from self._attributes()
        yield from self._owed()
        yield from self._quotas()
        yield from self._stripes()
        yield from self._counters()

    # --- rows ----------------------------------------------------------------

    def _table(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The rows of a table, or of a part of it, that can be read."""
        for key, value in self.view.scan(prefix, schema.after(prefix)):
            try:
                _decode(prefix[:1], key, value)
            except _UNREADABLE:
                continue
            yield key, value

    def _rows_are_readable(self) -> Iterator[Finding]:
        """Rows that cannot be read are reported once, and count as not there."""
        for letter, table in TABLES.items():
            for key, value in self.view.scan(letter, schema.after(letter)):
                try:
                    _decode(letter, key, value)
                except _UNREADABLE:
                    yield Finding(
                        1,
                        table,
                        f"row {key[1:].hex()} cannot be read",
                        methodcaller("drop", key),
                    )

    def _inode(self, ino: int) -> Inode | None:
        value = self.view.get(schema.inode_key(ino))
        try:
            return Inode.decode(value) if value is not None else None
        except _UNREADABLE:
            return None

    # --- names ---------------------------------------------------------------

    def _names(self) -> Iterator[Finding]:
        folder, parent = ROOT, self._inode(ROOT)
        if parent is None or not stat.S_ISDIR(parent.mode):
            yield Finding(1, "inodes", "there is no root directory", methodcaller("make_root"))
        for key, value in self._table(b"N"):
            (above, name), (ino, cookie) = schema.decode_name_key(key), schema.decode_name(value)
            self.last_cookie = max(self.last_cookie, cookie)
            if above != folder:
                folder, parent = schema.Ino(above), self._inode(above)
            if parent is None or not stat.S_ISDIR(parent.mode):
                yield Finding(
                    1,
                    "names",
                    f"{name!r} is in directory {above}, which is not there",
                    methodcaller("restore", above, stat.S_IFDIR),
                )
                continue
            if (
                not name
                or name in (b".", b"..")
                or len(name) > NAME_BYTES_MAX
                or _FORBIDDEN & {*name}
            ):
                yield Finding(
                    1,
                    "names",
                    f"{name!r} in directory {above} cannot be a name",
                    methodcaller("unlink", above, name),
                )
                continue
            inode = self._inode(ino)
            if inode is None:
                yield Finding(
                    1,
                    "names",
                    f"{name!r} in directory {above} is inode {ino}, which is not there",
                    methodcaller("restore", ino),
                )
                continue
            self.links[ino] += 1
            if self.quotas:
                homes = self.homes.get(ino, frozenset()) | {parent.quota_root}
                self.homes[ino] = self.alike.setdefault(homes, homes)
            if stat.S_ISDIR(inode.mode) and (self.links[ino] > 1 or ino == ROOT):
                self.links[ino] -= 1
                yield Finding(
                    1,
                    "names",
                    f"directory {ino} has a second name, {name!r} in directory {above}",
                    methodcaller("unlink", above, name),
                )
                continue
            if stat.S_ISDIR(inode.mode):
                self.folders[ino] = above
            if self.view.get(schema.listing_key(above, cookie)) != schema.listing_value(ino, name):
                yield Finding(
                    1,
                    "names",
                    f"{name!r} in directory {above} is not in its listing",
                    methodcaller("list_again", above, name),
                )

    def _listing(self) -> Iterator[Finding]:
        for key, value in self._table(b"L"):
            parent = schema.decode_ino_key(key)
            cookie, ino, name = schema.decode_listing(key, value)
            entry = self.view.get(schema.name_key(parent, name)) if name else b""
            if entry == schema.name_value(ino, cookie):
                continue
            yield Finding(
                1,
                "listing",
                f"directory {parent} lists {name!r} as inode {ino}, and has no such name",
                methodcaller("name_again", parent, cookie),
            )

    # --- inodes --------------------------------------------------------------

    def _inodes(self) -> Iterator[Finding]:
        inside = Counter(self.folders.values())
        for key, value in self._table(b"I"):
            ino, inode = schema.decode_ino_key(key), Inode.decode(value)
            self.last_ino = max(self.last_ino, ino)
            self.files += 1
            kind = stat.S_IFMT(inode.mode)
            if kind not in _FILE_TYPES:
                yield Finding(
                    2,
                    "inodes",
                    f"inode {ino} has a type that there is not ({kind:#o})",
                    methodcaller("retype", ino),
                )
                continue
            yield from self._inode_links(ino, inode, inside[ino])
            if self.quotas or inode.quota_root:
                yield from self._quota_root(ino, inode)
            if inode.allocated and next(self._table(schema.extent_key(ino, 0)[:9]), None) is None:
                yield from self._allocated(ino, inode, 0)
            target = self.view.get(schema.target_key(ino))
            if kind == stat.S_IFLNK and target is None:
                yield Finding(
                    2,
                    "targets",
                    f"symbolic link {ino} has no target",
                    methodcaller("lose_target", ino),
                )

    def _inode_links(self, ino: int, inode: Inode, subdirectories: int) -> Iterator[Finding]:
        names = self.links[ino]
        orphan = self.view.get(schema.orphan_key(ino)) is not None
        if ino == ROOT:
            names = 1
        if names == 0:
            if not orphan:
                yield Finding(
                    2,
                    "inodes",
                    f"inode {ino} has no name",
                    methodcaller("attach", ino),
                )
                return
            expected = 0
        else:
            expected = 2 + subdirectories if stat.S_ISDIR(inode.mode) else names
            if orphan:
                yield Finding(
                    4,
                    "orphans",
                    f"inode {ino} is to be removed, and has a name",
                    methodcaller("drop", schema.orphan_key(ino)),
                )
        if inode.nlink != expected:
            yield Finding(
                4,
                "inodes",
                f"inode {ino} counts {inode.nlink} links, and has {expected}",
                methodcaller("change", ino, nlink=expected),
            )
        above = ROOT if ino == ROOT else self.folders.get(ino)
        if stat.S_ISDIR(inode.mode) and above is not None and inode.parent != above:
            yield Finding(
                4,
                "inodes",
                f"directory {ino} says that it is in directory {inode.parent}, and is in {above}",
                methodcaller("change", ino, parent=above),
            )

    def _quota_root(self, ino: int, inode: Inode) -> Iterator[Finding]:
        """Each inode names the quota that it counts for."""
        homes = frozenset({0}) if ino == ROOT else self.homes.get(ino, frozenset())
        walking = any(
            row.state in (QuotaState.COUNTING, QuotaState.CLEARING) for row in self.quotas.values()
        )
        own = self.quotas.get(ino) if inode.quota_root == ino else None
        counts_in = own.outer if own else inode.quota_root
        wrong = inode.quota_root not in (0, *self.quotas)
        if not wrong and not walking and homes and inode.quota_root not in homes:
            if own:
                wrong = own.outer not in homes
            elif stat.S_ISDIR(inode.mode):
                wrong = True
            else:  # else it had names on both sides when a quota was set
                wrong = all(inode.quota_root in [*self._outer(home), 0] for home in homes)
        if wrong:
            home = min(homes, default=0)
            fix = (
                methodcaller("set_quota", ino, replace(own, outer=home))
                if own
                else methodcaller("change", ino, quota_root=home)
            )
            text = f"inode {ino} counts for the quota of {counts_in}, and lies in that of {home}"
            yield Finding(2, "quotas", text, fix)
            return
        self.held[counts_in][0] += inode.allocated
        self.held[counts_in][1] += 1

    def _outer(self, root: int) -> list[int]:
        """A quota and those above it."""
        chain: list[int] = []
        while root in self.quotas and root not in chain:
            chain.append(root)
            root = self.quotas[root].outer
        return chain

    def _quotas(self) -> Iterator[Finding]:
        """Each quota counts what names it or one inside it, and is one of a directory."""
        sums: dict[int, list[int]] = {ino: [0, 0] for ino in self.quotas}
        for root, (size, files) in self.held.items():
            for ino in self._outer(root):
                sums[ino][0] += size
                sums[ino][1] += files
        for ino, row in self.quotas.items():
            size, files = sums[ino]
            inode = self._inode(ino)
            there = inode is not None and stat.S_ISDIR(inode.mode)
            text, mended = "", row
            if (row.bytes_used, row.files_used) != (size, files):
                text = (
                    f"the quota of {ino} counts {row.bytes_used} bytes and {row.files_used} "
                    f"inodes, and has {size} and {files}"
                )
                mended = replace(row, bytes_used=size, files_used=files)
            elif row.state is QuotaState.ACTIVE and not there:
                text = f"directory {ino}, which has a quota, is not there"
                mended = replace(row, state=QuotaState.GONE)
            elif row.state is QuotaState.ACTIVE and inode and inode.quota_root != ino:
                text = f"directory {ino} does not count for its own quota"
                mended = replace(row, state=QuotaState.COUNTING)
            elif row.state is QuotaState.GONE and files == 0:
                text = f"nothing counts for the quota of {ino}, which was cleared"
            if text:
                yield Finding(4, "quotas", text, methodcaller("set_quota", ino, mended))

    def _loops(self) -> Iterator[Finding]:
        """Directories that have a name, and still cannot be reached from the root."""
        good = {int(ROOT)}
        for ino in self.folders:
            path: list[int] = []
            place = ino
            while place not in good and place in self.folders and place not in path:
                path.append(place)
                place = self.folders[place]
            if place in path:
                yield Finding(
                    2,
                    "names",
                    f"directory {place} lies inside itself",
                    methodcaller("detach", self.folders[place], place),
                )
            good.update(path)

    # --- extents -------------------------------------------------------------

    def _extents(self) -> Iterator[Finding]:
        owned = _Owned(self.view)
        ino, inode, end, held, trimmed = -1, None, 0, 0, False
        for key, value in self._table(b"E"):
            owner, extent = schema.decode_ino_key(key), Extent.decode(key, value)
            if owner != ino:
                yield from self._allocated(ino, inode, held)
                ino, inode, end, held = owner, self._inode(owner), 0, 0
                trimmed = self.view.get(schema.trim_key(ino)) is not None
            use = self.uses[extent.stripe]
            use.live += extent.length
            use.end = max(use.end, extent.stripe_offset + extent.length)
            problem = self._misplaced(extent, inode, end, trimmed)
            if problem:
                yield Finding(
                    3,
                    "extents",
                    f"bytes {extent.offset} to {extent.end} of inode {ino} {problem}",
                    methodcaller("move_extent", ino, extent),
                )
                continue
            end = extent.end
            held += extent.length
            if extent.stripe == LOST_STRIPE:
                self.lost_bytes += extent.length
            elif not self._is_there(extent):
                yield Finding(
                    3,
                    "extents",
                    f"bytes {extent.offset} to {extent.end} of inode {ino} are lost: they are not "
                    f"in stripe {extent.stripe:#x}",
                    methodcaller("lose_extent", ino, extent),
                )
            elif extent.stripe not in self.around.unsealed and not owned.has(ino, extent):
                yield Finding(
                    4,
                    "owners",
                    f"stripe {extent.stripe:#x} does not name inode {ino} as an owner",
                    methodcaller("add_owner", ino, extent),
                )
        yield from self._allocated(ino, inode, held)

    @staticmethod
    def _misplaced(extent: Extent, inode: Inode | None, end: int, trimmed: bool) -> str:
        """Why an extent cannot be where it is, or nothing."""
        if inode is None:
            return "" if trimmed else "belong to no inode"
        if not stat.S_ISREG(inode.mode):
            return "belong to an inode that is no file"
        if extent.length == 0:
            return "are none"
        if extent.offset < end:
            return "overlap what lies before"
        if extent.end > inode.size and not trimmed:
            return f"lie past its end at {inode.size}"
        return ""

    def _is_there(self, extent: Extent) -> bool:
        if extent.stripe in self.around.unsealed:
            return True
        value = self.view.get(schema.stripe_key(extent.stripe))
        try:
            length = Stripe.decode(value).length if value is not None else 0
        except _UNREADABLE:
            length = 0
        return extent.stripe_offset + extent.length <= length

    def _allocated(self, ino: int, inode: Inode | None, held: int) -> Iterator[Finding]:
        if inode is not None and inode.allocated != held:
            if inode.allocated > held:
                self.short[ino] = inode.allocated - held
            yield Finding(
                4,
                "inodes",
                f"inode {ino} counts {inode.allocated} bytes of extents, and has {held}",
                methodcaller("change", ino, allocated=held),
            )

    # --- attributes, and what is owed ----------------------------------------

    def _attributes(self) -> Iterator[Finding]:
        last = -1
        for letter in (b"X", b"Q"):
            for key, _ in self._table(letter):
                ino = schema.decode_ino_key(key)
                inode = self._inode(ino)
                wrong = inode is not None and letter == b"Q" and not stat.S_ISLNK(inode.mode)
                if ino != last and (inode is None or wrong):
                    what = "is no link" if wrong else "is not there"
                    fix = methodcaller("drop", key) if wrong else methodcaller("restore", ino)
                    text = f"a row belongs to inode {ino}, which {what}"
                    yield Finding(2, TABLES[letter], text, fix)
                last = ino

    def _owed(self) -> Iterator[Finding]:
        for key, _ in self._table(b"U"):
            if self._inode(schema.decode_ino_key(key)) is None:
                yield self._stale(key, f"inode {schema.decode_ino_key(key)} is not there")
        for key, _ in self._table(b"M"):
            node, number, index = schema.decode_missing_key(key)
            row = self._stripe(number)
            if row is None or index >= row.code.n or row.shards[index].node != node:
                yield self._stale(key, f"stripe {number:#x} has no shard {index} on node {node}")
        for key, _ in self._table(b"T"):
            number, _ = schema.decode_tail_key(key)
            if number not in self.around.unsealed:
                yield self._stale(key, f"stripe {number:#x} is not open")
        last = -1
        for key, _ in self._table(b"O"):
            number = int(schema.decode_ino_key(key))
            if number == last or number in self.around.unsealed:
                continue
            last = number
            if self._stripe(number) is None:
                yield Finding(
                    4,
                    "owners",
                    f"stripe {number:#x} is not there",
                    methodcaller("drop_owners", number),
                )

    def _stale(self, key: bytes, why: str) -> Finding:
        return Finding(
            4, TABLES[key[:1]], f"a row is out of date: {why}", methodcaller("drop", key)
        )

    def _stripe(self, number: int) -> Stripe | None:
        value = self.view.get(schema.stripe_key(number))
        try:
            return Stripe.decode(value) if value is not None else None
        except _UNREADABLE:
            return None

    # --- stripes and segments ------------------------------------------------

    def _stripes(self) -> Iterator[Finding]:
        places: dict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
        for key, value in self._table(b"S"):
            number, row = schema.decode_stripe_key(key), Stripe.decode(value)
            self.stripes += 1
            if number not in self.uses:
                yield Finding(
                    4,
                    "stripes",
                    f"no file has bytes in stripe {number:#x}",
                    methodcaller("free", number),
                )
            for index, place in enumerate(row.shards):
                if place.written:
                    start = place.offset - HEADER_BYTES
                    end = start + record_length(row.shard_length)
                    places[place.node, place.segment].append((start, end, number, index))
                elif self.view.get(schema.missing_key(place.node, number, index)) is None:
                    yield Finding(
                        4,
                        "missing",
                        f"shard {index} of stripe {number:#x} was never written, and is not owed",
                        methodcaller("owe", place.node, number, index),
                    )
        yield from self._live()
        yield from self._segments(places)

    def _live(self) -> Iterator[Finding]:
        counted = {}
        for key, value in self._table(b"V"):
            counted[schema.decode_stripe_key(key)] = schema.decode_live(value)
        for number in sorted(counted.keys() | self.uses.keys(), reverse=True):
            found, live = counted.get(number, 0), self.uses[number].live
            if found > live:
                yield from self._lost_extents(number, found - live)
            if found != live:
                yield Finding(
                    4,
                    "live",
                    f"stripe {number:#x} counts {found} live bytes, and has {live}",
                    methodcaller("set_live", number, live),
                )

    def _lost_extents(self, number: int, hidden: int) -> Iterator[Finding]:
        """Rows of extents that are gone, where live bytes, allocated bytes and owners agree.

        Called for the newest stripe first: what it has of a file was written last.
        """
        prefix = schema.owners_key(number, 0)[:9]
        owners = [
            owner
            for _, packed in self._table(prefix)
            for owner in OWNER.iter_unpack(packed)
            if owner[0] in self.short
        ]
        for ino, offset, length, at in reversed(owners):
            inode = self._inode(ino)
            assert inode is not None
            for start, end in list(self._gaps(ino, offset, min(offset + length, inode.size))):
                if end - start <= min(hidden, self.short[ino]):
                    hidden -= end - start
                    self.short[ino] -= end - start
                    extent = Extent(start, end - start, number, at + start - offset)
                    self.restored[ino].append((start, end))
                    yield Finding(
                        3,
                        "extents",
                        f"bytes {start} to {end} of inode {ino} have no extent; stripe "
                        f"{number:#x} has them",
                        methodcaller("put_extent", ino, extent),
                    )

    def _gaps(self, ino: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Parts of a file's bytes start <= i < end that no extent has."""
        taken = list(self.restored.get(ino, ()))
        for key, value in self.view.scan(schema.extent_key(ino, 0), schema.extent_key(ino, end)):
            extent = Extent.decode(key, value)
            taken.append((extent.offset, extent.end))
        for first, last in sorted(taken):
            if last > start:
                if first > start:
                    yield start, min(first, end)
                start = max(start, last)
        if start < end:
            yield start, end

    def _segments(
        self, places: dict[tuple[int, int], list[tuple[int, int, int, int]]]
    ) -> Iterator[Finding]:
        debts: Counter[tuple[int, int]] = Counter()
        for key, value in self._table(b"R"):
            node, segment, _ = schema.decode_reclaim_key(key)
            debts[node, segment] += record_length(int.from_bytes(value, "little"))
        known = self.around.segments
        for where in sorted(places.keys() | known.keys() | debts.keys()):
            state = known.get(where, SegmentState())
            shards = sorted(places.get(where, ()))
            yield from self._overlaps(where, shards)
            yield from self._cut_off(where, shards)
            end = max((shard[1] for shard in shards), default=0)
            live = sum(shard[1] - shard[0] for shard in shards) + debts[where]
            if state.size < end or (self.around.at_rest and state.live != live):
                name = self.around.nodes.get(where[0], str(where[0]))
                yield Finding(
                    4,
                    "segments",
                    f"segment {where[1]} of node {name} counts {state.live} live bytes "
                    f"of {state.size}, and has {live} of {max(end, state.size)}",
                    methodcaller("set_segment", where, live, end),
                )

    def _overlaps(
        self, where: tuple[int, int], shards: list[tuple[int, int, int, int]]
    ) -> Iterator[Finding]:
        last = 0
        for start, end, number, index in shards:
            if start < last:
                yield Finding(
                    3,
                    "stripes",
                    f"shard {index} of stripe {number:#x} lies where another does",
                    methodcaller("unwrite", number, index),
                )
            last = max(last, end)

    def _cut_off(
        self, where: tuple[int, int], shards: list[tuple[int, int, int, int]]
    ) -> Iterator[Finding]:
        """Shards past the end of their segment's file, on a node that is there."""
        node, segment = where
        sizes = self.around.sizes.get(node)
        if sizes is None:
            return
        gone = [
            (number, index)
            for start, _, number, index in shards
            if sizes.get(segment, 0) <= start + HEADER_BYTES
            and self.view.get(schema.missing_key(node, number, index)) is None
        ]
        if gone:
            yield Finding(
                4,
                "segments",
                f"segment {segment} of node {self.around.nodes[node]} has lost {len(gone)} shards",
                methodcaller("owe_all", node, gone),
            )

    # --- counters ------------------------------------------------------------

    def _counters(self) -> Iterator[Finding]:
        found = self.around.counters
        file_bytes = sum(use.live for use in self.uses.values())
        wanted = {"files": self.files, "file_bytes": file_bytes}
        if self.around.at_rest:
            wanted["stripes"] = self.stripes
        for name, value in wanted.items():
            if getattr(found, name) != value:
                yield Finding(
                    4,
                    "counters",
                    f"{name} is {getattr(found, name)}, and should be {value}",
                    methodcaller("count", name, value),
                )
        for name, last in (("next_ino", self.last_ino), ("next_cookie", self.last_cookie)):
            if last >= getattr(found, name):
                yield Finding(
                    4,
                    "counters",
                    f"{name} is {getattr(found, name)}, and {last} is in use",
                    methodcaller("count", name, last + 1),
                )


class _Owned:
    """Looks up whether a stripe's `owners` name an extent; stripes come in runs."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._stripes: dict[int, dict[tuple[int, int], list[tuple[int, int]]]] = {}

    def has(self, ino: int, extent: Extent) -> bool:
        """Whether owners cover the extent, in one row or in several."""
        ranges = self._owners(extent.stripe).get((ino, extent.offset - extent.stripe_offset), [])
        at = extent.offset
        for start, end in ranges:
            if start <= at < end:
                at = end
        return at >= extent.end

    def _owners(self, stripe: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
        found = self._stripes.get(stripe)
        if found is None:
            if len(self._stripes) > 64:
                self._stripes.pop(next(iter(self._stripes)))
            found = self._stripes[stripe] = defaultdict(list)
            prefix = schema.owners_key(stripe, 0)[:9]
            for _, packed in self._view.scan(prefix, schema.after(prefix)):
                if len(packed) % OWNER.size == 0:
                    for ino, offset, length, at in OWNER.iter_unpack(packed):
                        found[ino, offset - at].append((offset, offset + length))
            for ranges in found.values():
                ranges.sort()
        return found


def _decode(letter: bytes, key: bytes, value: bytes) -> None:
    """Read a row; one of _UNREADABLE when it cannot be."""
    match letter:
        case b"I":
            schema.decode_ino_key(key), Inode.decode(value)
        case b"N":
            schema.decode_name_key(key), schema.decode_name(value)
        case b"L":
            schema.decode_listing(key, value)
        case b"E":
            Extent.decode(key, value)
        case b"S":
            schema.decode_stripe_key(key), Stripe.decode(value)
        case b"V":
            schema.decode_stripe_key(key), schema.decode_live(value)
        case b"O":
            schema.decode_ino_key(key), list(OWNER.iter_unpack(value))
        case b"T":
            schema.decode_tail_key(key), schema.decode_tail(value)
        case b"M":
            schema.decode_missing_key(key)
        case b"B":
            schema.decode_ino_key(key), Quota.decode(value)
        case b"G":
            schema.decode_segment_key(key), SegmentState.decode(value)
        case b"R":
            schema.decode_reclaim_key(key)
        case _:
            schema.decode_ino_key(key)
