"""The fixes of fsck: no data is dropped; data without a place goes to lost+found.

Each fix is one transaction on the current rows.  A fix that an earlier one made
unnecessary does nothing.  Counts are left to the findings of phase 4.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Sequence

from ..files import quota
from ..format import file_rows, keys, stripe_rows
from ..format.erasure import Code
from ..format.file_rows import ROOT, Extent, Inode, Quota
from ..format.stripe_rows import LOST_STRIPE, OWNER, Live, SegmentState, ShardPlace, Stripe
from ..limits import FILE_BYTES_MAX, OWNERS_PER_ROW_MAX, STRIPE_BYTES
from ..log.log import Log, Transaction
from ..system import clock
from .fsck_findings import Finding

LOST_AND_FOUND = b"lost+found"
LOST_TARGET = b"(lost)"


class Mender:
    """Changes rows to mend findings; its public methods are the fixes."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._txn: Transaction

    def mend(self, finding: Finding) -> None:
        """Call the fix that a finding names."""
        with Transaction(self._log) as self._txn:
            getattr(self, finding.fix)(*finding.arguments, **finding.fields)

    # --- rows ----------------------------------------------------------------

    def drop(self, key: bytes) -> None:
        """Remove a row that is unreadable or wrong."""
        self._txn.delete(key)

    def _inode(self, ino: int) -> Inode | None:
        value = self._txn.get(file_rows.inode_key(ino))
        return Inode.decode(value) if value is not None else None

    def change(self, ino: int, **fields: int) -> None:
        """Set fields of an inode."""
        inode = self._inode(ino)
        if inode is not None:
            for name, value in fields.items():
                setattr(inode, name, value)
            self._txn.put(file_rows.inode_key(ino), inode.encode())

    def _first(self, prefix: bytes) -> tuple[bytes, bytes] | None:
        return next(self._txn.scan(prefix, keys.after(prefix)), None)

    # --- inodes --------------------------------------------------------------

    def make_root(self) -> None:
        """Make the root directory."""
        self.restore(ROOT, stat.S_IFDIR)
        self.change(ROOT, parent=ROOT)

    def restore(self, ino: int, kind: int = 0) -> None:
        """Remake an inode, with the type that fits its rows unless `kind` is given."""
        inode = self._inode(ino)
        if inode is not None:
            if kind and stat.S_IFMT(inode.mode) != kind:
                self.change(ino, mode=kind | stat.S_IMODE(inode.mode), size=0)
            return
        kind = kind or self._kind(ino)
        now = clock.now()
        mode = kind | (0o700 if kind == stat.S_IFDIR else 0o600)
        size = self._end(ino) if kind == stat.S_IFREG else 0
        code = self._code(kind)
        new = Inode(mode, 0, 0, 1, size, 0, now, now, now, parent=ROOT, k=code.k, m=code.m)
        self._txn.put(file_rows.inode_key(ino), new.encode())

    def _kind(self, ino: int) -> int:
        """Return the type that the remaining rows of an inode show."""
        if self._first(file_rows.name_key(ino, b"")) or self._first(
            file_rows.listing_key(ino, 0)[:9]
        ):
            return stat.S_IFDIR
        if self._txn.get(file_rows.target_key(ino)) is not None:
            return stat.S_IFLNK
        return stat.S_IFREG

    def _end(self, ino: int) -> int:
        """Return the end of an inode's last possible extent."""
        rows = self._txn.scan(file_rows.extent_key(ino, 0), file_rows.extent_key(ino + 1, 0))
        ends = (Extent.decode(key, value).end for key, value in rows)
        return max((end for end in ends if end <= FILE_BYTES_MAX), default=0)

    def _code(self, kind: int) -> Code:
        return self._log.code if kind == stat.S_IFREG else Code(0, 0)

    def recode(self, ino: int) -> None:
        """Give an inode a valid code."""
        inode = self._inode(ino)
        if inode is not None:
            code = self._code(stat.S_IFMT(inode.mode))
            self.change(ino, k=code.k, m=code.m)

    def resize(self, ino: int) -> None:
        """Set the end of a file to that of its last extent."""
        self.change(ino, size=self._end(ino))

    def retype(self, ino: int) -> None:
        """Give an inode a valid type."""
        inode = self._inode(ino)
        if inode is not None:
            self.change(ino, mode=self._kind(ino) | stat.S_IMODE(inode.mode))

    def lose_target(self, ino: int) -> None:
        """Mark the target of a symbolic link as lost."""
        self._txn.put(file_rows.target_key(ino), LOST_TARGET)

    # --- names ---------------------------------------------------------------

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name; an inode left without a name is attached in the next round."""
        value = self._txn.get(file_rows.name_key(parent, name))
        if value is not None:
            ino, cookie = file_rows.decode_name(value)
            self._txn.delete(file_rows.name_key(parent, name))
            key = file_rows.listing_key(parent, cookie)
            if self._txn.get(key) == file_rows.listing_value(ino, name):
                self._txn.delete(key)

    def detach(self, parent: int, ino: int) -> None:
        """Remove a directory from its parent."""
        prefix = file_rows.name_key(parent, b"")
        for key, value in list(self._txn.scan(prefix, keys.after(prefix))):
            if file_rows.decode_name(value)[0] == ino:
                self.unlink(parent, file_rows.decode_name_key(key)[1])

    def list_again(self, parent: int, name: bytes) -> None:
        """Put a name into its directory's listing."""
        value = self._txn.get(file_rows.name_key(parent, name))
        if value is not None:
            self._name(parent, name, *file_rows.decode_name(value))

    def name_again(self, parent: int, cookie: int) -> None:
        """Make the name of a row in a listing, or drop the row if the name exists."""
        key = file_rows.listing_key(parent, cookie)
        value = self._txn.get(key)
        if value is None:
            return
        _, ino, name = file_rows.decode_listing(key, value)
        self._txn.delete(key)
        folder = self._inode(parent)
        if folder is not None and not stat.S_ISDIR(folder.mode):
            return
        if self._txn.get(file_rows.name_key(parent, name)) is None:
            self.restore(parent, stat.S_IFDIR)
            self.restore(ino)
            self._name(parent, name, ino, cookie)

    def _name(self, parent: int, name: bytes, ino: int, cookie: int = 0) -> None:
        key = file_rows.listing_key(parent, cookie)
        if cookie < file_rows.FIRST_COOKIE or self._txn.get(key) is not None:
            cookie = self._unused("next_cookie", lambda n: file_rows.listing_key(parent, n))
            key = file_rows.listing_key(parent, cookie)
        self._txn.put(key, file_rows.listing_value(ino, name))
        self._txn.put(file_rows.name_key(parent, name), file_rows.name_value(ino, cookie))

    def _unused(self, counter: str, key: Callable[[int], bytes]) -> int:
        """Return the next unused number of a counter."""
        number: int = getattr(self._log.counters, counter)
        while self._txn.get(key(number)) is not None:
            number += 1
        setattr(self._log.counters, counter, number + 1)
        return number

    def attach(self, ino: int, name: bytes = b"") -> None:
        """Give an inode without a name one in lost+found."""
        folder = self._lost_and_found()
        name = name or b"#%d" % ino
        while self._txn.get(file_rows.name_key(folder, name)) is not None:
            name += b"+"
        self._name(folder, name, ino)
        self.change(ino, parent=folder)

    def _lost_and_found(self) -> int:
        name = LOST_AND_FOUND
        while (value := self._txn.get(file_rows.name_key(ROOT, name))) is not None:
            ino, _ = file_rows.decode_name(value)
            inode = self._inode(ino)
            if inode is not None and stat.S_ISDIR(inode.mode):
                return ino
            name += b"+"
        ino = self._unused("next_ino", file_rows.inode_key)
        self.restore(ino, stat.S_IFDIR)
        self._name(ROOT, name, ino)
        return ino

    def set_quota(self, ino: int, row: Quota) -> None:
        """Set the counts, the state, or the parent of a quota."""
        quota.put(self._txn, ino, row)

    # --- extents -------------------------------------------------------------

    def move_extent(self, ino: int, extent: Extent) -> None:
        """Move bytes at an impossible place to a file in lost+found."""
        if self._inode(ino) is None:
            self.restore(ino, stat.S_IFREG)
            return
        key = file_rows.extent_key(ino, extent.offset)
        if self._txn.get(key) != extent.encode():
            return
        self._txn.delete(key)
        if extent.length == 0:
            return
        new = self._unused("next_ino", file_rows.inode_key)
        length = min(extent.length, STRIPE_BYTES)
        moved = Extent(0, length, extent.stripe, extent.stripe_offset)
        self._txn.put(file_rows.extent_key(new, 0), moved.encode())
        self.restore(new, stat.S_IFREG)
        self.change(new, size=length)
        self.attach(new, b"#%d-%d" % (ino, extent.offset))

    def put_extent(self, ino: int, extent: Extent) -> None:
        """Restore a missing extent."""
        self._txn.put(file_rows.extent_key(ino, extent.offset), extent.encode())

    def lose_extent(self, ino: int, extent: Extent) -> None:
        """Mark bytes as lost: reading them is an error, and never returns zeros.

        They are no more than a stripe has.
        """
        length = self._possible(ino, extent, STRIPE_BYTES)
        lost = Extent(extent.offset, length, LOST_STRIPE, 0)
        key = file_rows.extent_key(ino, extent.offset)
        if self._txn.get(key) == extent.encode():
            self._txn.put(key, lost.encode())
            self.add_owner(ino, lost)

    def cut_extent(self, ino: int, extent: Extent, length: int) -> None:
        """Shorten an extent to the bytes that its stripe has of the file."""
        length = self._possible(ino, extent, length)
        cut = Extent(extent.offset, length, extent.stripe, extent.stripe_offset)
        key = file_rows.extent_key(ino, extent.offset)
        if self._txn.get(key) == extent.encode():
            self._txn.put(key, cut.encode())

    def _possible(self, ino: int, extent: Extent, length: int) -> int:
        """Return the length of an extent, at most to the next one and to the end of its file."""
        end = file_rows.extent_key(ino + 1, 0)
        start = file_rows.extent_key(ino, extent.offset) + b"\0"
        length, inode = min(extent.length, length), self._inode(ino)
        if inode is not None and inode.size > extent.offset:
            length = min(length, inode.size - extent.offset)
        following = next(self._txn.scan(start, end), None)
        if following is not None:
            length = min(length, Extent.decode(*following).offset - extent.offset)
        return length

    # --- stripes -------------------------------------------------------------

    def put_stripe(self, number: int, row: Stripe, whole: Sequence[ShardPlace]) -> None:
        """Restore a stripe's row from its shards; those that are not `whole` are rebuilt."""
        if self._txn.get(stripe_rows.stripe_key(number)) is None:
            self._txn.stripes += 1
        self._txn.put(stripe_rows.stripe_key(number), row.encode())
        for index, place in enumerate(row.shards):
            if not place.written:
                self.owe(place.node, number, index)
            elif place in whole:
                self._txn.delete(stripe_rows.missing_key(place.node, number, index))

    def add_owner(self, ino: int, extent: Extent) -> None:
        """Add a file to the owners of a stripe."""
        at = extent.stripe_offset
        while True:
            key = stripe_rows.owners_key(extent.stripe, at)
            packed = self._txn.get(key) or b""
            if len(packed) < OWNERS_PER_ROW_MAX * OWNER.size:
                break
            at += 1
        owner = OWNER.pack(ino, extent.offset, extent.length, extent.stripe_offset)
        self._txn.put(key, packed + owner)

    def drop_owners(self, number: int) -> None:
        """Remove the owners of a missing stripe."""
        self._txn.drop_owners(number)

    def set_live(self, number: int, live: int) -> None:
        """Set the live bytes of a stripe."""
        row = self._txn.get(stripe_rows.stripe_key(number))
        before = self._txn.live(number)
        length = Stripe.decode(row).length if row else before.length
        if live:
            self._txn.set_live(number, Live(live, length), before)
        else:
            self._txn.delete(stripe_rows.live_key(number))

    def free(self, number: int) -> None:
        """Free a stripe without bytes in files; its owners are looked at once more before."""
        value = self._txn.get(stripe_rows.stripe_key(number))
        if value is not None:
            self._txn.delete(stripe_rows.stripe_key(number))
            self._txn.delete(stripe_rows.live_key(number))
            self._txn.reclaim(number, Stripe.decode(value))

    def unwrite(self, number: int, index: int) -> None:
        """Mark a shard as not written, because it is not at its place; it is rebuilt elsewhere."""
        value = self._txn.get(stripe_rows.stripe_key(number))
        if value is not None:
            row = Stripe.decode(value)
            node, here = row.shards[index].node, Counter(place.node for place in row.shards)
            known = [member.id for member in self._log.members.all]
            if node not in known:
                node = min(known, key=lambda other: here[other])
            moved = row.moved(index, ShardPlace(node, 0, 0))
            self._txn.put(stripe_rows.stripe_key(number), moved.encode())
            self.owe(node, number, index)

    def owe(self, node: int, number: int, index: int) -> None:
        """Have a shard rebuilt."""
        self._txn.put(stripe_rows.missing_key(node, number, index), b"")

    def owe_all(self, node: int, shards: Sequence[tuple[int, int]]) -> None:
        """Have shards of a node rebuilt."""
        for number, index in shards:
            self.owe(node, number, index)

    def set_segment(self, where: tuple[int, int], live: int, end: int) -> None:
        """Set the counts of a segment; the next mount removes an empty one."""
        member = self._log.members.by_id.get(where[0])
        if member is None:
            return
        segment = where[1]
        if live == 0:
            if segment == member.shards.current:
                member.shards.roll()
            member.shards.states.pop(segment, None)
        else:
            size = member.shards.states.get(segment, SegmentState()).size
            member.shards.states[segment] = SegmentState(max(size, end), live)
        member.shards.changed.add(segment)

    # --- counters ------------------------------------------------------------

    def count(self, name: str, value: int) -> None:
        """Set a counter."""
        setattr(self._log.counters, name, value)
