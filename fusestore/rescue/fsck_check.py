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
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import methodcaller
from typing import Any, NamedTuple

from ..bounded_cache import LeastRecentlyUsed
from ..format import file_rows, keys, stripe_rows, tables
from ..format.erasure import Code
from ..format.file_rows import ROOT, Extent, Inode, Quota, QuotaState
from ..format.records import HEADER_BYTES, record_length
from ..format.store_rows import Counters
from ..format.stripe_rows import LOST_STRIPE, OWNER, SegmentState, Stripe
from ..format.tables import TABLES
from ..limits import FILE_BYTES_MAX, NAME_BYTES_MAX, RECORD_ALIGN_BYTES, SHARD_SEGMENT_BYTES
from ..metadata.engine import View

_FILE_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK}
_FILE_TYPES |= {stat.S_IFCHR, stat.S_IFBLK}
_FORBIDDEN = {*b"/\0"}
_STRIPES_CACHED_MAX = 64

_Owners = dict[tuple[int, int], list[tuple[int, int]]]
"""A stripe's owners: sorted ranges (start, end) of files by inode and by the difference between a
byte's offset in the file and its offset in the stripe."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be."""

    phase: int
    table: str
    text: str
    fix: Callable[[Any], None]
    """Called with the Mender that mends it."""

    def __str__(self) -> str:
        return f"{self.table}: {self.text}"


def finding(phase: int, table: str, text: str, fix: str, *given: Any, **fields: Any) -> Finding:
    """A finding that is mended by a method of Mender, with what it is given."""
    return Finding(phase, table, text, methodcaller(fix, *given, **fields))


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
    shard_at: Callable[[int, int, int], tuple[int, int] | None]
    """The stripe and the index that a record says which has its payload at (node, segment,
    offset), if that can be told; blocks."""
    at_rest: bool
    """Nothing is on its way: what is counted must be exact."""


_Where = tuple[int, int]
"""A node and one of its shard segments."""


class _Shard(NamedTuple):
    """A record in a segment: from where to where, the stripe, which of its shards."""

    start: int
    end: int
    stripe: int
    which: int


@dataclass(slots=True)
class Check:
    """One run over all tables; `lost_bytes` is what extents point at LOST_STRIPE for."""

    view: View
    around: Around
    links: Counter[int] = field(default_factory=Counter)
    """By inode: how many names it has."""
    folders: dict[int, int] = field(default_factory=dict)
    """By directory: the directory that has it."""
    uses: Counter[int] = field(default_factory=Counter)
    """By stripe: the bytes of it that extents have."""
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
            self.quotas[file_rows.decode_ino_key(key)] = Quota.decode(value)
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
        for key, value in self.view.scan(prefix, keys.after(prefix)):
            if tables.readable(key, value):
                yield key, value

    def _get(self, key: bytes) -> bytes | None:
        """The value of a row, if it is there and can be read."""
        value = self.view.get(key)
        return value if value is not None and tables.readable(key, value) else None

    def _rows_are_readable(self) -> Iterator[Finding]:
        """Rows that cannot be read are reported once, and count as not there."""
        for key, value in self.view.scan(b"", b"\xff"):
            if key[:1] != b"Z" and not tables.readable(key, value):
                table = TABLES[key[:1]].name if key[:1] in TABLES else "rows"
                yield finding(1, table, f"row {key.hex()} cannot be read", "drop", key)

    def _inode(self, ino: int) -> Inode | None:
        value = self._get(file_rows.inode_key(ino))
        return Inode.decode(value) if value is not None else None

    # --- names ---------------------------------------------------------------

    def _names(self) -> Iterator[Finding]:
        folder, parent = ROOT, self._inode(ROOT)
        if parent is None or not stat.S_ISDIR(parent.mode):
            yield finding(1, "inodes", "there is no root directory", "make_root")
        for key, value in self._table(b"N"):
            (above, name), (ino, cookie) = (
                file_rows.decode_name_key(key),
                file_rows.decode_name(value),
            )
            self.last_cookie = max(self.last_cookie, cookie)
            if above != folder:
                folder, parent = file_rows.Ino(above), self._inode(above)
            if parent is None or not stat.S_ISDIR(parent.mode):
                text = f"{name!r} is in directory {above}, which is not there"
                yield finding(1, "names", text, "restore", above, stat.S_IFDIR)
                continue
            if (
                not name
                or name in (b".", b"..")
                or len(name) > NAME_BYTES_MAX
                or _FORBIDDEN & {*name}
            ):
                text = f"{name!r} in directory {above} cannot be a name"
                yield finding(1, "names", text, "unlink", above, name)
                continue
            inode = self._inode(ino)
            if inode is None:
                text = f"{name!r} in directory {above} is inode {ino}, which is not there"
                yield finding(1, "names", text, "restore", ino)
                continue
            self.links[ino] += 1
            if self.quotas:
                homes = self.homes.get(ino, frozenset()) | {parent.quota_root}
                self.homes[ino] = self.alike.setdefault(homes, homes)
            if stat.S_ISDIR(inode.mode) and (self.links[ino] > 1 or ino == ROOT):
                self.links[ino] -= 1
                text = f"directory {ino} has a second name, {name!r} in directory {above}"
                yield finding(1, "names", text, "unlink", above, name)
                continue
            if stat.S_ISDIR(inode.mode):
                self.folders[ino] = above
            if self.view.get(file_rows.listing_key(above, cookie)) != file_rows.listing_value(
                ino, name
            ):
                text = f"{name!r} in directory {above} is not in its listing"
                yield finding(1, "names", text, "list_again", above, name)

    def _listing(self) -> Iterator[Finding]:
        for key, value in self._table(b"L"):
            parent = file_rows.decode_ino_key(key)
            cookie, ino, name = file_rows.decode_listing(key, value)
            entry = self.view.get(file_rows.name_key(parent, name)) if name else b""
            if entry == file_rows.name_value(ino, cookie):
                continue
            text = f"directory {parent} lists {name!r} as inode {ino}, and has no such name"
            yield finding(1, "listing", text, "name_again", parent, cookie)

    # --- inodes --------------------------------------------------------------

    def _inodes(self) -> Iterator[Finding]:
        inside = Counter(self.folders.values())
        for key, value in self._table(b"I"):
            ino, inode = file_rows.decode_ino_key(key), Inode.decode(value)
            self.last_ino = max(self.last_ino, ino)
            self.files += 1
            kind = stat.S_IFMT(inode.mode)
            if kind not in _FILE_TYPES:
                text = f"inode {ino} has a type that there is not ({kind:#o})"
                yield finding(2, "inodes", text, "retype", ino)
                continue
            yield from self._inode_links(ino, inode, inside[ino])
            if self.quotas or inode.quota_root:
                yield from self._quota_root(ino, inode)
            if (
                inode.allocated
                and next(self._table(file_rows.extent_key(ino, 0)[:9]), None) is None
            ):
                yield from self._allocated(ino, inode, 0)
            yield from self._inode_form(ino, inode)

    def _inode_form(self, ino: int, inode: Inode) -> Iterator[Finding]:
        """Fields that must fit the type."""
        kind, code = stat.S_IFMT(inode.mode), Code(inode.k, inode.m)
        if not (code.is_possible or (kind != stat.S_IFREG and code.n == 0)):
            text = f"inode {ino} has a code that there is not ({code})"
            yield finding(4, "inodes", text, "recode", ino)
        if inode.size > FILE_BYTES_MAX:
            yield finding(2, "inodes", f"inode {ino} has {inode.size} bytes", "resize", ino)
        if kind == stat.S_IFLNK:
            target = self._get(file_rows.target_key(ino))
            if target is None:
                text = f"symbolic link {ino} has no target"
                yield finding(2, "targets", text, "lose_target", ino)
            elif len(target) != inode.size:
                text = f"symbolic link {ino} has {inode.size} bytes, and its target {len(target)}"
                yield finding(4, "inodes", text, "change", ino, size=len(target))

    def _inode_links(self, ino: int, inode: Inode, subdirectories: int) -> Iterator[Finding]:
        names = self.links[ino]
        orphan = self.view.get(file_rows.orphan_key(ino)) is not None
        if ino == ROOT:
            names = 1
        if names == 0:
            if not orphan:
                yield finding(2, "inodes", f"inode {ino} has no name", "attach", ino)
                return
            expected = 0
        else:
            expected = 2 + subdirectories if stat.S_ISDIR(inode.mode) else names
            if orphan:
                text = f"inode {ino} is to be removed, and has a name"
                yield finding(4, "orphans", text, "drop", file_rows.orphan_key(ino))
        if inode.nlink != expected:
            text = f"inode {ino} counts {inode.nlink} links, and has {expected}"
            yield finding(4, "inodes", text, "change", ino, nlink=expected)
        above = ROOT if ino == ROOT else self.folders.get(ino)
        if stat.S_ISDIR(inode.mode) and above is not None and inode.parent != above:
            text = f"directory {ino} says that it is in directory {inode.parent}, and is in {above}"
            yield finding(4, "inodes", text, "change", ino, parent=above)

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
            text = f"inode {ino} counts for the quota of {counts_in}, and lies in that of {home}"
            if own:
                yield finding(2, "quotas", text, "set_quota", ino, replace(own, outer=home))
            else:
                yield finding(2, "quotas", text, "change", ino, quota_root=home)
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
                yield finding(4, "quotas", text, "set_quota", ino, mended)

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
                text = f"directory {place} lies inside itself"
                yield finding(2, "names", text, "detach", self.folders[place], place)
            good.update(path)

    # --- extents -------------------------------------------------------------

    def _extents(self) -> Iterator[Finding]:
        owned = _Owned(self._table)
        ino, inode, end, held, trimmed = -1, None, 0, 0, False
        for key, value in self._table(b"E"):
            owner, extent = file_rows.decode_ino_key(key), Extent.decode(key, value)
            if owner != ino:
                yield from self._allocated(ino, inode, held)
                ino, inode, end, held = owner, self._inode(owner), 0, 0
                trimmed = self.view.get(file_rows.trim_key(ino)) is not None
            self.uses[extent.stripe] += extent.length
            problem = self._misplaced(extent, inode, end, trimmed)
            if problem:
                text = f"bytes {extent.offset} to {extent.end} of inode {ino} {problem}"
                yield finding(3, "extents", text, "move_extent", ino, extent)
                continue
            end = extent.end
            held += extent.length
            if extent.stripe == LOST_STRIPE:
                self.lost_bytes += extent.length
            elif not self._is_there(extent):
                text = (
                    f"bytes {extent.offset} to {extent.end} of inode {ino} are lost: they are not "
                    f"in stripe {extent.stripe:#x}"
                )
                yield finding(3, "extents", text, "lose_extent", ino, extent)
            elif extent.stripe not in self.around.unsealed and not owned.has(ino, extent):
                text = f"stripe {extent.stripe:#x} does not name inode {ino} as an owner"
                yield finding(4, "owners", text, "add_owner", ino, extent)
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
        row = self._stripe(extent.stripe)
        return row is not None and extent.stripe_offset + extent.length <= row.length

    def _allocated(self, ino: int, inode: Inode | None, held: int) -> Iterator[Finding]:
        if inode is not None and inode.allocated != held:
            if inode.allocated > held:
                self.short[ino] = inode.allocated - held
            text = f"inode {ino} counts {inode.allocated} bytes of extents, and has {held}"
            yield finding(4, "inodes", text, "change", ino, allocated=held)

    # --- attributes, and what is owed ----------------------------------------

    def _attributes(self) -> Iterator[Finding]:
        last = -1
        for letter in (b"X", b"Q"):
            for key, _ in self._table(letter):
                ino = file_rows.decode_ino_key(key)
                inode = self._inode(ino)
                wrong = inode is not None and letter == b"Q" and not stat.S_ISLNK(inode.mode)
                if ino != last and (inode is None or wrong):
                    what = "is no link" if wrong else "is not there"
                    fix = ("drop", key) if wrong else ("restore", ino)
                    text = f"a row belongs to inode {ino}, which {what}"
                    yield finding(2, TABLES[letter].name, text, *fix)
                last = ino

    def _owed(self) -> Iterator[Finding]:
        for key, _ in self._table(b"U"):
            if self._inode(file_rows.decode_ino_key(key)) is None:
                yield self._stale(key, f"inode {file_rows.decode_ino_key(key)} is not there")
        for key, value in self._table(b"D"):
            inode = self._inode(file_rows.decode_ino_key(key))
            size = inode.size if inode is not None else 0
            if int.from_bytes(value, "little") != size:
                yield self._stale(key, f"its inode ends at {size}")
        for key, _ in self._table(b"M"):
            node, number, index = stripe_rows.decode_missing_key(key)
            row = self._stripe(number)
            if row is None or index >= row.code.n or row.shards[index].node != node:
                yield self._stale(key, f"stripe {number:#x} has no shard {index} on node {node}")
        for key, _ in self._table(b"T"):
            number, _ = stripe_rows.decode_tail_key(key)
            if number not in self.around.unsealed:
                yield self._stale(key, f"stripe {number:#x} is not open")
        last = -1
        for key, _ in self._table(b"O"):
            number = int(file_rows.decode_ino_key(key))
            if number == last or number in self.around.unsealed:
                continue
            last = number
            if self._stripe(number) is None:
                text = f"stripe {number:#x} is not there"
                yield finding(4, "owners", text, "drop_owners", number)

    def _stale(self, key: bytes, why: str) -> Finding:
        return finding(4, TABLES[key[:1]].name, f"a row is out of date: {why}", "drop", key)

    def _stripe(self, number: int) -> Stripe | None:
        value = self._get(stripe_rows.stripe_key(number))
        return Stripe.decode(value) if value is not None else None

    # --- stripes and segments ------------------------------------------------

    def _stripes(self) -> Iterator[Finding]:
        places: dict[_Where, list[_Shard]] = defaultdict(list)
        for key, value in self._table(b"S"):
            number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
            self.stripes += 1
            if number not in self.uses:
                text = f"no file has bytes in stripe {number:#x}"
                yield finding(4, "stripes", text, "free", number)
            for index, place in enumerate(row.shards):
                start = place.offset - HEADER_BYTES
                nowhere = place.written and start not in range(
                    0, SHARD_SEGMENT_BYTES, RECORD_ALIGN_BYTES
                )
                if nowhere or place.node not in self.around.nodes:
                    text = f"shard {index} of stripe {number:#x} lies where none can"
                    yield finding(3, "stripes", text, "unwrite", number, index)
                elif place.written:
                    shard = _Shard(start, start + record_length(row.shard_length), number, index)
                    places[place.node, place.segment].append(shard)
                elif self.view.get(stripe_rows.missing_key(place.node, number, index)) is None:
                    text = f"shard {index} of stripe {number:#x} was never written, and is not owed"
                    yield finding(4, "missing", text, "owe", place.node, number, index)
        yield from self._live()
        yield from self._segments(places)

    def _live(self) -> Iterator[Finding]:
        counted = {}
        for key, value in self._table(b"V"):
            counted[stripe_rows.decode_stripe_key(key)] = stripe_rows.decode_live(value)
        for number in sorted(counted.keys() | self.uses.keys(), reverse=True):
            counts, live = counted.get(number, 0), self.uses[number]
            if counts > live:
                yield from self._lost_extents(number, counts - live)
            if counts != live:
                text = f"stripe {number:#x} counts {counts} live bytes, and has {live}"
                yield finding(4, "live", text, "set_live", number, live)

    def _lost_extents(self, number: int, hidden: int) -> Iterator[Finding]:
        """Rows of extents that are gone, where live bytes, allocated bytes and owners agree.

        Called for the newest stripe first: what it has of a file was written last.
        """
        prefix = stripe_rows.owners_key(number, 0)[:9]
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
                    text = (
                        f"bytes {start} to {end} of inode {ino} have no extent; stripe "
                        f"{number:#x} has them"
                    )
                    yield finding(3, "extents", text, "put_extent", ino, extent)

    def _gaps(self, ino: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Parts of a file's bytes start <= i < end that no extent has."""
        taken = list(self.restored.get(ino, ()))
        for key, value in self._table(file_rows.extent_key(ino, 0)[:9]):
            extent = Extent.decode(key, value)
            taken.append((extent.offset, extent.end))
        for first, last in sorted(taken):
            if last > start:
                if first > start:
                    yield start, min(first, end)
                start = max(start, last)
        if start < end:
            yield start, end

    def _segments(self, places: dict[_Where, list[_Shard]]) -> Iterator[Finding]:
        known, names = self.around.segments, self.around.nodes
        debts: dict[_Where, list[tuple[int, int, bytes]]] = defaultdict(list)
        for key, value in self._table(b"R"):
            node, segment, offset = stripe_rows.decode_reclaim_key(key)
            start = offset - HEADER_BYTES
            end = start + record_length(int.from_bytes(value, "little"))
            debts[node, segment].append((start, end, key))
        for key, _ in [*self._table(b"G"), *self._table(b"R")]:
            node, _ = stripe_rows.decode_segment_key(key)
            if node not in names:
                yield self._stale(key, f"there is no node {node}")
        for where in sorted(places.keys() | known.keys() | debts.keys()):
            if where[0] not in names:
                continue
            state = known.get(where, SegmentState())
            shards = sorted(places[where])
            yield from self._overlaps(where, shards)
            yield from self._freed_alive(shards, debts[where])
            yield from self._cut_off(where, shards)
            end = max((shard.end for shard in shards), default=0)
            live = sum(shard.end - shard.start for shard in shards)
            live += sum(stop - start for start, stop, _ in debts[where])
            if state.size < end or (self.around.at_rest and state.live != live):
                text = (
                    f"segment {where[1]} of node {names[where[0]]} counts {state.live} live bytes "
                    f"of {state.size}, and has {live} of {max(end, state.size)}"
                )
                yield finding(4, "segments", text, "set_segment", where, live, end)

    def _overlaps(self, where: _Where, shards: list[_Shard]) -> Iterator[Finding]:
        """Shards that lie where others do; what the node has there tells which is wrong."""

        def right(shard: _Shard) -> bool:
            offset = shard.start + HEADER_BYTES
            return self.around.shard_at(*where, offset) == (shard.stripe, shard.which)

        last: _Shard | None = None
        for shard in shards:
            wrong = None
            if last is not None and shard.start < last.end:
                wrong = last if right(shard) and not right(last) else shard
                text = f"shard {wrong.which} of stripe {wrong.stripe:#x} lies where another does"
                yield finding(3, "stripes", text, "unwrite", wrong.stripe, wrong.which)
            if wrong is not shard:
                last = shard

    @staticmethod
    def _freed_alive(
        shards: list[_Shard], debts: list[tuple[int, int, bytes]]
    ) -> Iterator[Finding]:
        """Room that is to be freed, and is in use."""
        for start, end, key in debts:
            before = bisect_left(shards, (end,)) - 1
            if before >= 0 and shards[before].end > start:
                text = f"a shard of stripe {shards[before].stripe:#x} lies in what is to be freed"
                yield finding(3, "reclaim", text, "drop", key)

    def _cut_off(self, where: _Where, shards: list[_Shard]) -> Iterator[Finding]:
        """Shards past the end of their segment's file, on a node that is there."""
        node, segment = where
        sizes = self.around.sizes.get(node)
        if sizes is None:
            return
        gone = [
            (shard.stripe, shard.which)
            for shard in shards
            if sizes.get(segment, 0) < shard.end
            and self.view.get(stripe_rows.missing_key(node, shard.stripe, shard.which)) is None
        ]
        if gone:
            name = self.around.nodes[node]
            text = f"segment {segment} of node {name} has lost {len(gone)} shards"
            yield finding(4, "segments", text, "owe_all", node, gone)

    # --- counters ------------------------------------------------------------

    def _counters(self) -> Iterator[Finding]:
        counters = self.around.counters
        wanted = {"files": self.files, "file_bytes": self.uses.total()}
        if self.around.at_rest:
            wanted["stripes"] = self.stripes
        for name, last in (("next_ino", self.last_ino), ("next_cookie", self.last_cookie)):
            wanted[name] = max(getattr(counters, name), last + 1)
        for name, value in wanted.items():
            if getattr(counters, name) != value:
                text = f"{name} is {getattr(counters, name)}, and should be {value}"
                yield finding(4, "counters", text, "count", name, value)


class _Owned:
    """Looks up whether a stripe's `owners` name an extent; stripes come in runs."""

    def __init__(self, table: Callable[[bytes], Iterator[tuple[bytes, bytes]]]) -> None:
        self._table = table
        self._stripes: LeastRecentlyUsed[int, _Owners] = LeastRecentlyUsed(_STRIPES_CACHED_MAX)

    def has(self, ino: int, extent: Extent) -> bool:
        """Whether owners cover the extent, in one row or in several."""
        ranges = self._owners(extent.stripe).get((ino, extent.offset - extent.stripe_offset), [])
        at = extent.offset
        for start, end in ranges:
            if start <= at < end:
                at = end
        return at >= extent.end

    def _owners(self, stripe: int) -> _Owners:
        found = self._stripes.get(stripe)
        if found is None:
            found = self._stripes[stripe] = defaultdict(list)
            prefix = stripe_rows.owners_key(stripe, 0)[:9]
            for _, packed in self._table(prefix):
                for ino, offset, length, at in OWNER.iter_unpack(packed):
                    found[ino, offset - at].append((offset, offset + length))
            for ranges in found.values():
                ranges.sort()
        return found
