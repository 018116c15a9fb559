"""The records in the journals of the nodes: an index, and the chain of commits.

Each node has all commits: a record that is damaged or unreadable on one node is read
from another.  Only the index is kept in memory (journal_scan makes it); the changes of
a commit are read when they are needed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import NodeError, ReplayError
from ..format import keys, store_rows, tables
from ..format.records import (
    HEADER_BYTES,
    Changes,
    Commit,
    Header,
    SegmentKind,
    decode_changes,
    decode_commit,
)
from ..format.records import checksum as checksum_of
from ..format.store_rows import CommitId, Descent, GivenUp, LogPosition
from ..metadata.engine import Engine
from ..nodes.base import Node

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A range start <= i < end of a node's journal segment that could not be read."""

    node: str
    segment: int
    start: int
    end: int | None
    """None: to its end, which is unknown."""
    error: str
    """The reason, in a sentence that names the node."""


@dataclass(slots=True, eq=False)
class Entry:
    """A record, and the nodes that hold it intact."""

    header: Header
    places: list[tuple[Node, int, int]] = field(default_factory=list)
    """(node, segment, offset of the payload)."""
    previous: int = 0
    durable_through: int = 0
    base: int = 0
    in_sync: tuple[int, ...] = ()
    nonce: bytes = b""
    descent: Descent | None = None
    """What its epoch continues, if it is the first commit of one."""
    dump: dict[str, Any] | None = None
    """The row of a finished metadata dump, if the commit names one."""
    holders: set[str] = field(default_factory=set)
    """Names of the nodes that hold it intact."""
    put_together: bytes | None = None
    """The payload, when no node can read all of it."""
    given_up: list[GivenUp] = field(default_factory=list)
    """The histories that the record gives up."""

    @property
    def id(self) -> CommitId:
        """The identity of the commit."""
        return CommitId(self.number, self.header.payload_checksum)

    @property
    def number(self) -> int:
        """The commit's number; for a piece of a metadata dump that of the commit it began at."""
        return self.header.number

    @property
    def segment(self) -> int:
        """The journal segment that contains it; the same on every node."""
        return self.places[0][1]

    @property
    def offset(self) -> int:
        """The offset of its header in the segment; the same on every node."""
        return self.places[0][2] - HEADER_BYTES

    def payload(self) -> bytes:
        """Return its payload from any node that still has it; ReplayError."""
        if self.put_together is not None:
            return self.put_together
        for node, segment, offset in self.places:
            try:
                data = node.read(SegmentKind.JOURNAL, segment, offset, self.header.payload_length)
            except NodeError as error:
                logger.warning("%s", error)
                continue
            if checksum_of(data, len(data)) == self.header.payload_checksum:
                return data
        raise ReplayError(f"Record {self.number} of the journal can no longer be read.")

    def commit(self) -> Commit:
        """Return its commit, without rows that the database would refuse; ReplayError."""
        commit = decode_commit(self.header, self.payload())
        return replace(commit, changes=self._fitting(commit.changes))

    def piece(self) -> Changes:
        """Return its piece of a dump, without rows that the database would refuse; ReplayError."""
        return self._fitting(decode_changes(self.payload()))

    def _fitting(self, changes: Changes) -> Changes:
        """Return the changes without rows that are too long.

        Early versions wrote such rows although they had refused the operation.
        """
        for key in [key for key, value in changes.items() if not tables.fits(key, value)]:
            logger.error(
                "Record %d of the journal has a row %s that is too long for the metadata: the row "
                "is ignored, as its operation was refused.",
                self.number,
                key[:16].hex(),
            )
            changes = {other: value for other, value in changes.items() if other != key}
        return changes


@dataclass(slots=True)
class Journals:
    """The records of all journals, from some segment on."""

    commits: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    """By number; commits of one number differ in their epoch."""
    pieces: dict[tuple[int, int, int], Entry] = field(default_factory=dict)
    """Of metadata dumps, by segment, offset and checksum."""
    failed: dict[str, NodeError] = field(default_factory=dict)
    """Nodes whose journal could not be read, or not to its end, with the reason."""
    unreadable: list[Unreadable] = field(default_factory=list)
    """The unreadable ranges of the other nodes."""
    size: int = 0
    """Bytes read."""
    latest: set[CommitId] = field(default_factory=set)
    """The known commits of the history that `keep_latest` kept."""
    held: dict[str, set[CommitId]] = field(default_factory=dict)
    """By name of node: all its commits, including those that were left out."""
    same: set[str] = field(default_factory=set)
    """Names of nodes that a dump links to the latest history."""

    def keep_latest(self, holder: str = "") -> list[Entry]:
        """Leave out all histories but the latest; return those of their commits that may count.

        The latest history is that of the latest epoch, or that of the node `holder`.  It
        is followed backwards, and other commits from its beginning on are left out.  The
        returned commits were acknowledged, and not given up since.
        """
        known = [e for e in self.entries() if not holder or holder in e.holders]
        at = max(known, key=lambda e: (e.header.epoch, e.number), default=None)
        kept = self._leading_to(at)
        self.latest = {entry.id for entry in kept.values()}
        for entry in self.entries():
            for name in entry.holders:
                self.held.setdefault(name, set()).add(entry.id)
        self.same = self.linked(at.holders if at is not None else ())
        first = min(kept, default=0)
        others = [e for e in self.entries() if e.number >= first and kept.get(e.number) is not e]
        self._keep(kept)
        ends = [end for entry in (*kept.values(), *self.pieces.values()) for end in entry.given_up]
        rivals = [e for e in others if not is_void(e, ends)]
        through = max((e.durable_through for e in rivals), default=0)
        return [e for e in rivals if e.number <= through]

    def linked(self, witnesses: Collection[str]) -> set[str]:
        """Return nodes whose last commit precedes a part of a dump that a witness has, too.

        The part is at the same place on both, so the history before it is the same.
        """
        ends: dict[str, tuple[int, int]] = {}
        for entry in self.entries():
            for name in entry.holders:
                ends[name] = max(ends.get(name, (0, 0)), (entry.segment, entry.offset))
        return {
            name
            for piece in self.pieces.values()
            if not piece.holders.isdisjoint(witnesses)
            for name in piece.holders & ends.keys()
            if ends[name] < (piece.segment, piece.offset)
        }

    def keep_history(self, at: Entry) -> None:
        """Leave out all histories but the one that leads to a commit."""
        self._keep(self._leading_to(at))

    def _leading_to(self, at: Entry | None) -> dict[int, Entry]:
        """Return a commit and its predecessors, by number."""
        kept: dict[int, Entry] = {}
        while at is not None:
            kept[at.number] = at
            at = self.predecessor(at)
        return kept

    def _keep(self, kept: dict[int, Entry]) -> None:
        first = min(kept, default=0)
        for number in list(self.commits):
            if number >= first:
                if number in kept:
                    self.commits[number] = [kept[number]]
                else:
                    del self.commits[number]

    def predecessor(self, entry: Entry) -> Entry | None:
        """Return the commit before an entry, or the one after which its epoch began."""
        for before in self.commits.get(entry.number - 1, ()):
            if before.header.payload_checksum == entry.previous:
                return before
        earlier = [
            before
            for number in range(max(entry.base, 1), entry.number - 1)
            for before in self.commits.get(number, ())
            if before.header.epoch < entry.header.epoch
            and self._descends(entry, before.id, before.nonce.hex())
        ]
        return max(earlier, key=lambda e: (e.number, e.header.epoch), default=None)

    def at(self, position: LogPosition) -> Entry | None:
        """Return the commit at a position of the log, if a readable node holds it."""
        return next(
            (
                entry
                for entry in self.commits.get(position.commit, ())
                if entry.header.payload_checksum == position.checksum
            ),
            None,
        )

    def may_hold(self, name: str, entry: Entry) -> bool:
        """Return whether a node holds a commit, or cannot be read at its place."""
        record = Unreadable(
            "", entry.segment, entry.offset, entry.offset + entry.header.record_length, ""
        )
        return name in entry.holders or self._is_lost(name, record)

    def forget_before(self, epoch: int) -> None:
        """Leave out the commits of earlier epochs."""
        for number, entries in list(self.commits.items()):
            entries[:] = [entry for entry in entries if entry.header.epoch >= epoch]
            if not entries:
                del self.commits[number]

    @property
    def durable(self) -> int:
        """The last commit that was certainly acknowledged; 0 for none."""
        return max((e.durable_through for e in self.entries()), default=0)

    @property
    def epoch(self) -> int:
        """The latest epoch of any record."""
        return max((e.header.epoch for e in self.entries()), default=0)

    def last(self, name: str) -> int:
        """The number of the last commit that a node holds, 0 for none."""
        return max((e.number for e in self.entries() if name in e.holders), default=0)

    def entries(self) -> Iterator[Entry]:
        """Return all commits, in no order."""
        for entries in self.commits.values():
            yield from entries

    def unknown(
        self, witnesses: Collection[str] = (), after: tuple[int, int] = (0, 0)
    ) -> list[Unreadable]:
        """Return ranges that no node could read, and that may hold unknown records.

        Left out are ranges that a record of another node fills, that lie before `after`
        (segment, offset), or that one of the witnesses could read: a node in sync has
        every record of the others.
        """
        found = [part for lost in self.unreadable for part in self._not_filled(lost)]
        return [
            lost
            for lost in found
            if (lost.segment, _end(lost)) > after
            and not any(
                name != lost.node and name not in self.failed and not self._is_lost(name, lost)
                for name in witnesses
            )
        ]

    def complaints(self) -> list[str]:
        """Return a sentence for each unreadable range that no other node has."""
        failed = [str(error) for error in self.failed.values()]
        return list(dict.fromkeys([lost.error for lost in self.unknown()] + failed))

    def _is_lost(self, name: str, range_: Unreadable) -> bool:
        """Return whether a node, too, cannot read all of a range."""
        return any(
            lost.node == name
            and lost.segment == range_.segment
            and lost.start < _end(range_)
            and range_.start < _end(lost)
            for lost in self.unreadable
        )

    def _not_filled(self, lost: Unreadable) -> Iterator[Unreadable]:
        """Yield the parts of a range that no known record fills."""
        known = sorted(
            (entry.offset, entry.offset + entry.header.record_length)
            for entry in (*self.entries(), *self.pieces.values())
            if entry.segment == lost.segment
        )
        at = lost.start
        for start, end in known:
            if start >= _end(lost):
                break
            if start > at:
                yield replace(lost, start=at, end=start)
            at = max(at, end)
        if at < _end(lost):
            yield replace(lost, start=at)

    def chain(self, start: LogPosition) -> Iterator[Entry]:
        """Yield the commits that follow the one at `start`, each built on the one before.

        The first commit of an epoch repeats the changes that its mount replayed.  It
        therefore also follows when the commits right before it are missing.
        """
        at, epoch, nonce = CommitId(start.commit, start.checksum), start.epoch, start.nonce
        while True:
            entry = self._successor(at, epoch, nonce)
            if entry is None:
                return
            at, epoch, nonce = entry.id, entry.header.epoch, entry.nonce.hex()
            yield entry

    def _descends(self, entry: Entry, at: CommitId, nonce: str) -> bool:
        """Return whether an epoch that repeats all after a base continues from a later commit.

        It does from its base, and from what the epoch before it made.  Where this is not
        known, nodes that hold another commit of that number contradict.
        """
        found = entry.descent
        if found is not None and at.number == found.base and found.checksum:
            return at.checksum == found.checksum
        if found is not None and nonce and found.nonce:
            return nonce == found.nonce
        there = self.commits.get(at.number, ())
        right = {n for e in there if e.id == at for n in e.holders}
        wrong = {n for e in there for n in e.holders} - right
        return not entry.holders <= wrong

    def _successor(self, at: CommitId, epoch: int, nonce: str) -> Entry | None:
        after = self.commits.get(at.number + 1, ())
        chained = [e for e in after if e.previous == at.checksum and e.header.epoch >= epoch]
        if not chained:
            chained = [
                entry
                for entry in self.entries()
                if entry.base <= at.number < entry.number - 1
                and entry.header.epoch > epoch
                and self._descends(entry, at, nonce)
            ]
        return max(chained, key=lambda entry: entry.header.epoch, default=None)


def make_readable(complaints: Collection[str]) -> str:
    """Return the complaints and the remedy, which is never to give up the data."""
    return (
        f"{' '.join(dict.fromkeys(complaints))} Make the unreadable data readable, for example "
        "by copying it to another disk, or bring another node back."
    )


def _end(lost: Unreadable) -> int:
    return sys.maxsize if lost.end is None else lost.end


def is_void(entry: Entry, given_up: Sequence[GivenUp]) -> bool:
    """Return whether a commit belongs to a history that was given up."""
    return any(end.voids(entry.number, entry.header.epoch) for end in given_up)


def first_needed(engine: Engine) -> int:
    """Return the first journal segment that is needed: there the last metadata dump begins.

    This is the dump in the last checkpoint; a running dump does not count yet.
    """
    rows = engine.scan_stored(
        store_rows.METADATA_DUMP_KEY, keys.after(store_rows.METADATA_DUMP_KEY)
    )
    return int(json.loads(rows[0][1])["segment"]) if rows else 0
