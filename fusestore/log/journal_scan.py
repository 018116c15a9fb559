"""Reading the journals of the nodes: an unreadable block costs a block, not the node.

A segment is read in pieces.  A piece that fails is read again in halves, down to a
block.  An unreadable block is noted, and reads as zeros here; the scan continues at the
next record.  Such a block is *unknown*.  The end of a segment, or a missing segment, is
not unknown: it holds nothing.  A record that no node can read completely, or that is
damaged on all of them, is assembled from the parts of all: the payloads are equal on all
nodes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from typing_extensions import Buffer

from ..errors import (
    FormatError,
    NodeError,
    NodeIdentityError,
    NodeLacksError,
    NodeTimeoutError,
)
from ..format import store_rows
from ..format.records import (
    HEADER_BYTES,
    Changes,
    Header,
    Kind,
    Place,
    SegmentKind,
    decode_changes,
    decode_commit,
    records,
)
from ..format.segment_numbers import segment_path
from ..format.store_rows import Descent, GivenUp
from ..nodes.base import Node
from ..nodes.unexpected import costs_only
from .journal import Entry, Journals, Unreadable
from .journal_mix import mixed_records

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 4096
SEARCHED_BYTES_MAX = 64 << 20
"""Bytes without a record that are searched behind the last intact one; a segment that is not
longer is read completely."""
BARREN_BYTES_MAX = 256 << 20
"""Bytes without a record that are read from a node's journal; the rest counts as unread."""
SEGMENTS_MAX = 100_000
"""Journal segments of a node that are read, unless another node has half as many."""
_ZEROS_MAX = 2 << 20
"""Bytes without a record that a crash may leave behind in a segment: zeros and a torn record."""
BLOCKS_TRIED_MAX = 64
"""Blocks of a node that may fail before the rest of its journal is given up: each may take
the disk seconds."""


def read_journals(
    store: UUID,
    nodes: Iterable[tuple[str, Node]],
    first: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Journals:
    """Index the journals of these nodes (by name) from segment `first` on; blocks.

    A node whose journal is unreadable, or that has far more segments than others, is in
    `failed`; unreadable ranges of the others are in `unreadable`.
    """
    found = Journals()
    whole: list[tuple[str, Node]] = []
    garbled = set[int]()
    nodes = list(nodes)
    listed = _listed(nodes, first, found.failed)
    for name, node in nodes:
        reader = _SegmentReader(name, node)
        try:
            with costs_only(name):
                for segment in listed.get(name, ()):
                    place = Place(store, name, SegmentKind.JOURNAL, segment)
                    if _index_segment(found, place, reader):
                        garbled.add(segment)
                    progress(found.size)
        except NodeError as error:
            found.failed[name] = error
        for problem in dict.fromkeys(lost.error for lost in reader.unreadable):
            logger.warning("%s", problem)
        found.unreadable += reader.unreadable
        if name not in found.failed and not reader.gave_up:
            whole.append((name, node))
    for segment in sorted({lost.segment for lost in found.unreadable}):
        _put_together(found, store, whole, segment)
    for segment in sorted(garbled):
        _mix(found, store, whole, segment)
    return found


def _listed(
    nodes: Sequence[tuple[str, Node]], first: int, failed: dict[str, NodeError]
) -> dict[str, list[int]]:
    """Return the segments from `first` on, by node; nodes that are not read go to `failed`.

    Nodes in sync have the same segments.  Their number has no fixed bound.
    """
    found: dict[str, list[int]] = {}
    for name, node in nodes:
        try:
            with costs_only(name):
                found[name] = [n for n in node.segments(SegmentKind.JOURNAL) if n >= first]
        except NodeError as error:
            failed[name] = error
    counts = {name: len(numbers) for name, numbers in found.items()}
    for name, count in counts.items():
        others = (counts[other] for other in counts if other != name)
        if count > max(SEGMENTS_MAX, 2 * max(others, default=count)):
            del found[name]
            failed[name] = NodeError(
                f"Node {name} has {count:,} files with the names of journal segments, far more "
                "than other nodes: remove files that do not belong to this store, or empty the "
                "node, and repair it."
            )
    return found


@dataclass(slots=True)
class _SegmentReader:
    """Reads the journal segments of a node, as far as possible."""

    name: str
    node: Node
    unreadable: list[Unreadable] = field(default_factory=list)
    _failed: int = 0
    _barren: int = 0
    """Bytes without a record, except those that crashes leave."""

    @property
    def gave_up(self) -> bool:
        """Whether the rest of the node is given up."""
        return self._failed >= BLOCKS_TRIED_MAX or self._barren >= BARREN_BYTES_MAX

    def indexed(self, size: int, records: int) -> None:
        """Count the bytes without records in a segment of this size."""
        self._barren += max(0, size - records - _ZEROS_MAX)

    def read(self, place: Place) -> bytearray:
        """Return a segment, with zeros where it is unreadable; NodeError if the node is gone."""
        segment = place.segment
        if self._barren >= BARREN_BYTES_MAX:
            self._note(
                segment,
                0,
                None,
                f"Node {self.name} has many journal segments without records, and was not read to "
                "the end: remove files that do not belong to this store, or empty the node, and "
                "repair it.",
            )
            return bytearray()
        try:
            size = self.node.size(SegmentKind.JOURNAL, segment)
        except NodeLacksError as error:  # a metadata dump has replaced it meanwhile
            logger.info("%s", error)
            return bytearray()
        except (NodeIdentityError, NodeTimeoutError):
            raise
        except NodeError as error:
            self._note(segment, 0, None, str(error))
            return bytearray()
        if size > SEARCHED_BYTES_MAX:
            end = self._end(place, size)
            if end < size:
                self._note(
                    segment,
                    end,
                    size,
                    f"Node {self.name}: {segment_path(SegmentKind.JOURNAL, segment)} is "
                    f"{size:,} bytes long, and no record was found in the last "
                    f"{SEARCHED_BYTES_MAX:,} bytes of the search: it is damaged.",
                )
                size = end
        data = bytearray(size)
        for start in range(0, size, _PIECE_BYTES):
            for piece in self._pieces(segment, start, min(start + _PIECE_BYTES, size)):
                data[piece[0] : piece[0] + len(piece[1])] = piece[1]
        return data

    def _end(self, place: Place, size: int) -> int:
        """Return where to stop in a segment that is longer than others.

        Its records may be long.  But if no record begins for so many bytes, no more
        follow: the size is wrong, or the file is not of this store.
        """
        offset = 0
        try:
            while offset < size:
                data = self.node.read(SegmentKind.JOURNAL, place.segment, offset, HEADER_BYTES)
                header = Header.decode(data, place.seed(offset))
                if header.record_length > size - offset:
                    break
                offset += header.record_length
        except (NodeIdentityError, NodeTimeoutError):
            raise
        except (NodeError, FormatError):
            pass
        return min(offset + SEARCHED_BYTES_MAX, size)

    def _pieces(self, segment: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of each readable part of start <= i < end."""
        if self.gave_up:
            self._note(segment, start, end, f"Node {self.name} has too many unreadable blocks.")
            return
        try:
            yield start, self.node.read(SegmentKind.JOURNAL, segment, start, end - start)
        except NodeLacksError:  # it became shorter meanwhile: its end was allocated ahead
            yield from self._rest(segment, start, end)
        except (NodeIdentityError, NodeTimeoutError):
            raise
        except NodeError as error:
            if end - start <= _BLOCK_BYTES:
                self._failed += 1
                self._note(segment, start, end, str(error))
                return
            middle = start + max((end - start) // 2 // _BLOCK_BYTES, 1) * _BLOCK_BYTES
            yield from self._pieces(segment, start, middle)
            yield from self._pieces(segment, middle, end)

    def _rest(self, segment: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield what there is now of start <= i < end, of which there was more before."""
        try:
            now = self.node.size(SegmentKind.JOURNAL, segment)
        except NodeLacksError as error:  # a metadata dump has replaced it
            logger.info("%s", error)
            return
        if start < now < end:
            yield from self._pieces(segment, start, now)
        elif now >= end:
            path = segment_path(SegmentKind.JOURNAL, segment)
            problem = f"Node {self.name} cannot read {path}: it ends before byte {end}."
            self._note(segment, start, end, problem)

    def _note(self, segment: int, start: int, end: int | None, error: str) -> None:
        last = self.unreadable[-1] if self.unreadable else None
        if last is not None and (last.segment, last.end) == (segment, start):
            self.unreadable[-1] = Unreadable(self.name, segment, last.start, end, last.error)
        else:
            self.unreadable.append(Unreadable(self.name, segment, start, end, error))


def _index_segment(found: Journals, place: Place, reader: _SegmentReader) -> bool:
    """Index a segment; return whether it has bytes besides its intact records."""
    data = reader.read(place)
    found.size += len(data)
    records_length = _index_records(found, place, reader.node, data)
    reader.indexed(len(data), records_length)
    return len(data.rstrip(b"\0")) > records_length


def _index_records(
    found: Journals, place: Place, node: Node, data: Buffer, *, held: bool = True
) -> int:
    """Add the records of a segment, and return their bytes.

    Not `held`: the node alone cannot read them.
    """
    size = 0
    for offset, header, payload in records(place, data):
        size += header.record_length
        entry = _entry(found, place.segment, offset, header, payload)
        if entry is None:
            continue
        if held:
            entry.places.append((node, place.segment, offset + HEADER_BYTES))
            entry.holders.add(place.node)
        elif not entry.places:
            entry.places.append((node, place.segment, offset + HEADER_BYTES))
            entry.put_together = bytes(payload)
    return size


def _entry(
    found: Journals, segment: int, offset: int, header: Header, payload: memoryview
) -> Entry | None:
    """Return the entry of a record, which is made if it is new; None for what is no entry."""
    if header.kind is Kind.COMMIT:
        same = found.commits[header.number]
        known = next((e for e in same if e.header == header), None)
        entry = known or _commit_entry(header, payload)
        if known is None and entry is not None:
            same.append(entry)
        return entry
    if header.kind is Kind.METADATA_DUMP:
        entry = found.pieces.setdefault((segment, offset, header.payload_checksum), Entry(header))
        if store_rows.GIVEN_UP_KEY in bytes(payload):
            entry.given_up = _given_up(decode_changes(payload))
        return entry
    return None


def _images(store: UUID, readers: dict[str, _SegmentReader], segment: int) -> dict[str, bytearray]:
    """Return a segment as each node has it, with zeros where it is unreadable."""
    images: dict[str, bytearray] = {}
    for name, reader in readers.items():
        try:
            with costs_only(name):
                images[name] = reader.read(Place(store, name, SegmentKind.JOURNAL, segment))
        except NodeError as error:
            logger.info("%s", error)
    return images


def _mix(found: Journals, store: UUID, nodes: Sequence[tuple[str, Node]], segment: int) -> None:
    """Find records of a segment that are damaged on every node, each at another place.

    Each node that should have such a record counts as unable to read it.
    """
    readers = {name: _SegmentReader(name, node) for name, node in nodes}
    images = {
        name: (Place(store, name, SegmentKind.JOURNAL, segment), image)
        for name, image in _images(store, readers, segment).items()
    }
    entries = [*found.entries(), *found.pieces.values()]
    known = {entry.offset for entry in entries if entry.places and entry.segment == segment}
    for place, image in images.values():  # a store in use has appended records meanwhile
        known.update(offset for offset, _, _ in records(place, image))
    for offset, header, payload in mixed_records(images, known):
        entry = _entry(found, segment, offset, header, memoryview(payload))
        if entry is None:
            continue
        end = offset + header.record_length
        for name, (_, image) in images.items():
            if len(image) >= end:
                where = f"{segment_path(SegmentKind.JOURNAL, segment)} at {offset}"
                error = f"Node {name}: the record in {where} is damaged."
                logger.warning("%s It is put together from several nodes.", error)
                found.unreadable.append(Unreadable(name, segment, offset, end, error))
                if not entry.places:
                    entry.places.append((readers[name].node, segment, offset + HEADER_BYTES))
        entry.put_together = payload


def _put_together(
    found: Journals, store: UUID, nodes: Sequence[tuple[str, Node]], segment: int
) -> None:
    """Find records of a damaged segment that only several nodes together can read."""
    readers = {name: _SegmentReader(name, node) for name, node in nodes}
    images = _images(store, readers, segment)
    bad = {
        name: {
            block
            for lost in readers[name].unreadable
            for block in range(lost.start, min(lost.end or 0, len(image)), _BLOCK_BYTES)
        }
        for name, image in images.items()
    }
    for name, image in images.items():
        whole = image[:]
        for block in bad[name]:
            for other in images:
                part = images[other][block : block + _BLOCK_BYTES]
                if block not in bad[other] and len(part) == len(whole[block:][:_BLOCK_BYTES]):
                    whole[block : block + _BLOCK_BYTES] = part
                    break
        _index_records(
            found,
            Place(store, name, SegmentKind.JOURNAL, segment),
            readers[name].node,
            whole,
            held=False,
        )


def _commit_entry(header: Header, payload: memoryview) -> Entry | None:
    try:
        commit = decode_commit(header, payload)
    except FormatError as error:
        logger.error("Commit %d: %s", header.number, error)
        return None
    row = commit.changes.get(store_rows.METADATA_DUMP_KEY)
    descent = commit.changes.get(store_rows.DESCENT_KEY)
    return Entry(
        header,
        previous=commit.previous,
        durable_through=commit.durable_through,
        base=commit.base,
        in_sync=commit.in_sync,
        nonce=commit.nonce,
        dump=json.loads(row) if row else None,
        descent=Descent.decode(descent) if descent else None,
        given_up=_given_up(commit.changes),
    )


def _given_up(changes: Changes) -> list[GivenUp]:
    return store_rows.decode_given_up(changes.get(store_rows.GIVEN_UP_KEY))
