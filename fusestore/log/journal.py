"""What the journals of the nodes hold: an index of their records, and the chain of commits.

Each node has all commits, so what is rotten on one, or cannot be read, is read from
another.  Only the index is kept in memory (journal_scan makes it); a commit's changes
are read when it is its turn.
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
from ..format.store_rows import CommitId, GivenUp, LogPosition
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
    """None: to its end, wherever that is."""
    error: str
    """Why, in a sentence that names the node."""


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
    dump: dict[str, Any] | None = None
    """The row of a finished metadata dump, if the commit names one."""
    holders: set[str] = field(default_factory=set)
    """Names of the nodes that hold it intact."""
    put_together: bytes | None = None
    """The payload, when no node can read all of it."""
    given_up: list[GivenUp] = field(default_factory=list)
    """The histories that were given up, if the record says so."""

    @property
    def id(self) -> CommitId:
        """Which commit it is."""
        return CommitId(self.number, self.header.payload_checksum)

    @property
    def number(self) -> int:
        """The commit's number; for a piece of a metadata dump that of the commit it began at."""
        return self.header.number

    @property
    def segment(self) -> int:
        """The journal segment that it lies in; the same on every node."""
        return self.places[0][1]

    @property
    def offset(self) -> int:
        """Where its header lies in the segment; the same on every node."""
        return self.places[0][2] - HEADER_BYTES

    def payload(self) -> bytes:
        """Its payload, from whichever node still has it; ReplayError."""
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
        raise ReplayError(f"Record {self.number} of the journal cannot be read any more.")

    def commit(self) -> Commit:
        """The commit that it holds, without rows that no database takes; ReplayError."""
        commit = decode_commit(self.header, self.payload())
        return replace(commit, changes=self._fitting(commit.changes))

    def piece(self) -> Changes:
        """The rows of a piece of a dump, without those that no database takes; ReplayError."""
        return self._fitting(decode_changes(self.payload()))

    def _fitting(self, changes: Changes) -> Changes:
        """The changes without rows that are too long.

        Early versions wrote such a row after they had refused the operation that made it.
        """
        for key in [key for key, value in changes.items() if not tables.fits(key, value)]:
            logger.error(
                "Record %d of the journal has a row %s that is too long for the metadata: "
                "it is left out, as its operation was refused.",
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
    """Nodes whose journal could not be read at all, or not to its end."""
    unreadable: list[Unreadable] = field(default_factory=list)
    """What could not be read of the others'."""
    size: int = 0
    """Bytes read."""
    latest: set[CommitId] = field(default_factory=set)
    """What is known of the history that `keep_latest` kept."""
    held: dict[str, set[CommitId]] = field(default_factory=dict)
    """By node's name: the commits that it holds, those that were left out, too."""

    def keep_latest(self, holder: str = "") -> list[Entry]:
        """Leave out the commits of other histories than the latest; those that may count.

        The latest epoch decides, or that of the node `holder`.  What is known of it is
        followed backwards, and other commits from where that begins are left out.  What
        is returned was acknowledged, and not given up since.
        """
        known = [e for e in self.entries() if not holder or holder in e.holders]
        at = max(known, key=lambda e: (e.header.epoch, e.number), default=None)
        kept = self._leading_to(at)
        self.latest = {entry.id for entry in kept.values()}
        for entry in self.entries():
            for name in entry.holders:
                self.held.setdefault(name, set()).add(entry.id)
        first = min(kept, default=0)
        others = [e for e in self.entries() if e.number >= first and kept.get(e.number) is not e]
        self._keep(kept)
        ends = [end for entry in (*kept.values(), *self.pieces.values()) for end in entry.given_up]
        rivals = [e for e in others if not is_void(e, ends)]
        through = max((e.durable_through for e in rivals), default=0)
        return [e for e in rivals if e.number <= through]

    def keep_history(self, at: Entry) -> None:
        """Leave out the commits of other histories than the one that leads to a commit."""
        self._keep(self._leading_to(at))

    def _leading_to(self, at: Entry | None) -> dict[int, Entry]:
        """A commit and those before it, followed backwards, by number."""
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
        """The commit that an entry was built on, or that its epoch began behind."""
        for before in self.commits.get(entry.number - 1, ()):
            if before.header.payload_checksum == entry.previous:
                return before
        earlier = [
            before
            for number in range(max(entry.base, 1), entry.number - 1)
            for before in self.commits.get(number, ())
            if before.header.epoch < entry.header.epoch
        ]
        return max(earlier, key=lambda e: (e.number, e.header.epoch), default=None)

    def at(self, position: LogPosition) -> Entry | None:
        """The commit at which the log stood so, if a node that could be read holds it."""
        return next(
            (
                entry
                for entry in self.commits.get(position.commit, ())
                if entry.header.payload_checksum == position.checksum
            ),
            None,
        )

    def may_hold(self, name: str, entry: Entry) -> bool:
        """Whether a node holds a commit, or cannot be read where it would stand."""
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
        """The last commit that was acknowledged for certain; 0 for none."""
        return max((e.durable_through for e in self.entries()), default=0)

    @property
    def epoch(self) -> int:
        """The latest epoch of any record."""
        return max((e.header.epoch for e in self.entries()), default=0)

    def last(self, name: str) -> int:
        """The number of the last commit that a node holds, 0 for none."""
        return max((e.number for e in self.entries() if name in e.holders), default=0)

    def entries(self) -> Iterator[Entry]:
        """All commits, in no order."""
        for entries in self.commits.values():
            yield from entries

    def unknown(
        self, witnesses: Collection[str] = (), after: tuple[int, int] = (0, 0)
    ) -> list[Unreadable]:
        """What may hold records that nobody has: the ranges that could not be read anywhere.

        Left out is what a record of another node fills, what lies before `after`
        (segment, offset), and what one of the witnesses could read: a node in sync
        has every record of the others.
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
        """A sentence for all that could not be read and that no other node has."""
        failed = [str(error) for error in self.failed.values()]
        return list(dict.fromkeys([lost.error for lost in self.unknown()] + failed))

    def _is_lost(self, name: str, range_: Unreadable) -> bool:
        """Whether a node cannot read all of a range, either."""
        return any(
            lost.node == name
            and lost.segment == range_.segment
            and lost.start < _end(range_)
            and range_.start < _end(lost)
            for lost in self.unreadable
        )

    def _not_filled(self, lost: Unreadable) -> Iterator[Unreadable]:
        """The parts of a range that no known record fills."""
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
        """The commits that follow the one at `start`, each built on the one before.

        The first commit of an epoch repeats what its mount replayed, so it also
        follows when the ones right before it are missing.
        """
        number, digest, epoch = start.commit, start.checksum, start.epoch
        while True:
            entry = self._successor(number, digest, epoch)
            if entry is None:
                return
            number, digest = entry.number, entry.header.payload_checksum
            epoch = entry.header.epoch
            yield entry

    def _contradicts(self, entry: Entry, number: int, digest: int) -> bool:
        """Whether all who hold a commit hold others than the one of this number and checksum."""
        there = self.commits.get(number, ())
        right = {n for e in there if e.header.payload_checksum == digest for n in e.holders}
        wrong = {n for e in there for n in e.holders} - right
        return entry.holders <= wrong

    def _successor(self, number: int, digest: int, epoch: int) -> Entry | None:
        after = self.commits.get(number + 1, ())
        chained = [e for e in after if e.previous == digest and e.header.epoch >= epoch]
        if not chained:
            chained = [
                entry
                for entry in self.entries()
                if entry.base <= number < entry.number - 1
                and entry.header.epoch > epoch
                and not self._contradicts(entry, number, digest)
            ]
        return max(chained, key=lambda entry: entry.header.epoch, default=None)


def make_readable(complaints: Collection[str]) -> str:
    """What to do about what cannot be read: never to give it up."""
    return (
        f"{' '.join(dict.fromkeys(complaints))} Make what cannot be read readable, for example "
        "by copying it to another disk, or bring another node back."
    )


def _end(lost: Unreadable) -> int:
    return sys.maxsize if lost.end is None else lost.end


def is_void(entry: Entry, given_up: Sequence[GivenUp]) -> bool:
    """Whether a commit is of a history that somebody decided to give up."""
    return any(entry.number > end.commit and entry.header.epoch < end.epoch for end in given_up)


def first_needed(engine: Engine) -> int:
    """The journal segment before which nothing is needed: where the last metadata dump begins.

    As the last checkpoint has it: a dump that is under way does not count yet.
    """
    rows = engine.scan_stored(
        store_rows.METADATA_DUMP_KEY, keys.after(store_rows.METADATA_DUMP_KEY)
    )
    return int(json.loads(rows[0][1])["segment"]) if rows else 0
