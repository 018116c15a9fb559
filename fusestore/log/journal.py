"""What the journals of the nodes hold: an index of their records, and the chain of commits.

Each node has all commits, so what is rotten on one is read from another.  Only
the index is kept in memory; a commit's changes are read when it is its turn.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from ..errors import FormatError, NodeError, NodeLacksError, ReplayError
from ..format import keys, store_rows, tables
from ..format.records import (
    HEADER_BYTES,
    Changes,
    Commit,
    Header,
    Kind,
    Place,
    Run,
    decode_changes,
    decode_commit,
    records,
)
from ..format.records import checksum as checksum_of
from ..format.store_rows import LogState
from ..metadata.engine import Engine
from ..nodes.base import Node

log = logging.getLogger(__name__)


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

    @property
    def number(self) -> int:
        """The commit's number; for a piece of a metadata dump that of the commit it began at."""
        return self.header.number

    @property
    def segment(self) -> int:
        """The journal segment that it lies in; the same on every node."""
        return self.places[0][1]

    def payload(self) -> bytes:
        """Its payload, from whichever node still has it; ReplayError."""
        for node, segment, offset in self.places:
            try:
                data = node.read(Run.JOURNAL, segment, offset, self.header.payload_length)
            except NodeError as error:
                log.warning("%s", error)
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
            log.error(
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
    holders: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By node's name: the numbers of the commits that it holds."""
    failed: dict[str, NodeError] = field(default_factory=dict)
    """Nodes whose journal could not be read."""
    size: int = 0
    """Bytes read."""

    def keep_latest(self) -> None:
        """Leave out the commits of histories that were given up: the latest epoch decides.

        What is known of the latest history is followed backwards, and other commits
        from where that begins are left out.
        """
        at = max(self.entries(), key=lambda e: (e.header.epoch, e.number), default=None)
        kept: dict[int, Entry] = {}
        while at is not None:
            kept[at.number] = at
            at = self._predecessor(at)
        first = min(kept, default=0)
        for number in list(self.commits):
            if number >= first:
                if number in kept:
                    self.commits[number] = [kept[number]]
                else:
                    del self.commits[number]

    def _predecessor(self, entry: Entry) -> Entry | None:
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

    def entries(self) -> Iterator[Entry]:
        """All commits, in no order."""
        for entries in self.commits.values():
            yield from entries

    def chain(self, start: LogState) -> Iterator[Entry]:
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

    def _successor(self, number: int, digest: int, epoch: int) -> Entry | None:
        after = self.commits.get(number + 1, ())
        chained = [e for e in after if e.previous == digest and e.header.epoch >= epoch]
        if not chained:
            chained = [
                entry
                for entry in self.entries()
                if entry.base <= number < entry.number - 1 and entry.header.epoch > epoch
            ]
        return max(chained, key=lambda entry: entry.header.epoch, default=None)


def read_journals(
    store: UUID,
    nodes: Iterable[tuple[str, Node]],
    first: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Journals:
    """Index the journals of these nodes (by name) from segment `first` on; blocks."""
    found = Journals()
    for name, node in nodes:
        try:
            for segment in node.segments(Run.JOURNAL):
                if segment >= first:
                    try:
                        _read_segment(found, Place(store, name, Run.JOURNAL, segment), node)
                    except NodeLacksError as error:
                        # A metadata dump has replaced it meanwhile, or the file shrank under us.
                        log.info("%s", error)
                    progress(found.size)
        except NodeError as error:
            found.failed[name] = error
    return found


def _read_segment(found: Journals, place: Place, node: Node) -> None:
    segment = place.segment
    data = node.read(Run.JOURNAL, segment, 0, node.size(Run.JOURNAL, segment))
    found.size += len(data)
    for offset, header, payload in records(place, data):
        entry: Entry | None
        if header.kind is Kind.COMMIT:
            same = found.commits[header.number]
            found.holders[place.node].add(header.number)
            entry = next((e for e in same if e.header == header), None)
            if entry is None:
                entry = _commit_entry(header, payload)
                if entry is None:
                    continue
                same.append(entry)
        elif header.kind is Kind.METADATA_DUMP:
            key = (segment, offset, header.payload_checksum)
            entry = found.pieces.setdefault(key, Entry(header))
        else:
            continue
        entry.places.append((node, segment, offset + HEADER_BYTES))


def _commit_entry(header: Header, payload: memoryview) -> Entry | None:
    try:
        commit = decode_commit(header, payload)
    except FormatError as error:
        log.error("Commit %d: %s", header.number, error)
        return None
    row = commit.changes.get(store_rows.METADATA_DUMP_KEY)
    return Entry(
        header,
        [],
        commit.previous,
        commit.durable_through,
        commit.base,
        commit.in_sync,
        commit.nonce,
        json.loads(row) if row else None,
    )


def first_needed(engine: Engine) -> int:
    """The journal segment before which nothing is needed: where the last metadata dump begins.

    As the last checkpoint has it: a dump that is under way does not count yet.
    """
    rows = engine.scan_stored(
        store_rows.METADATA_DUMP_KEY, keys.after(store_rows.METADATA_DUMP_KEY)
    )
    return int(json.loads(rows[0][1])["segment"]) if rows else 0


def copy_journals(
    store: UUID,
    sources: Sequence[tuple[str, Node]],
    target: tuple[str, Node],
    first: int,
    before: int,
) -> int:
    """Give a node the records that others have in segments from `first` on and below `before`.

    Segments below `first` are of no use any more, and go.  How many it lacked.

    Blocks; NodeError.  What is written is read back from the medium and checked.
    """
    name, node = target
    for segment in node.segments(Run.JOURNAL):
        if segment < first:
            node.delete(Run.JOURNAL, segment)
    journals = read_journals(store, [*sources, target], first)
    for failed in (name, *(source for source, _ in sources)):
        if failed in journals.failed:
            raise journals.failed[failed]
    lacking: dict[int, list[Entry]] = defaultdict(list)
    for entry in [*journals.entries(), *journals.pieces.values()]:
        if entry.segment < before and all(place[0] is not node for place in entry.places):
            lacking[entry.segment].append(entry)
    for segment, entries in lacking.items():
        _copy_segment(Place(store, name, Run.JOURNAL, segment), node, entries)
    return sum(map(len, lacking.values()))


def _copy_segment(place: Place, node: Node, entries: list[Entry]) -> None:
    segment = place.segment
    written: list[tuple[int, Header]] = []
    for entry in sorted(entries, key=lambda entry: entry.places[0][2]):
        header, offset = entry.header, entry.places[0][2] - HEADER_BYTES
        try:
            payload = entry.payload()
        except ReplayError as error:
            if any(segment in source.segments(Run.JOURNAL) for source, _, _ in entry.places):
                raise NodeError(str(error)) from error
            continue  # a metadata dump has replaced it meanwhile
        padding = bytes(header.record_length - HEADER_BYTES - len(payload))
        encoded = header.encode(place.seed(offset))
        node.write(Run.JOURNAL, segment, offset, [encoded, payload, padding])
        written.append((offset, header))
    if not written:
        return
    node.truncate(Run.JOURNAL, segment, node.size(Run.JOURNAL, segment))
    back = memoryview(node.read_back(Run.JOURNAL, segment, 0, node.size(Run.JOURNAL, segment)))
    for offset, header in written:
        start = offset + HEADER_BYTES
        payload = back[start : start + header.payload_length].tobytes()
        if (
            back[offset:start] != header.encode(place.seed(offset))
            or checksum_of(payload, header.payload_length) != header.payload_checksum
        ):
            raise NodeError(
                f"Node {place.node} gives back other bytes than it was given: replace its disk."
            )


def last_commit(store: UUID, name: str, node: Node) -> int:
    """The number of the last commit in a node's journal, 0 for none; blocks; NodeError."""
    for segment in reversed(node.segments(Run.JOURNAL)):
        data = node.read(Run.JOURNAL, segment, 0, node.size(Run.JOURNAL, segment))
        found = records(Place(store, name, Run.JOURNAL, segment), data)
        numbers = [header.number for _, header, _ in found if header.kind is Kind.COMMIT]
        if numbers:
            return max(numbers)
    return 0
