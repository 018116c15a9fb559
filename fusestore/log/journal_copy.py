"""Copying journals between nodes: a node gets records that it lacks or cannot read.

A segment is rewritten as a whole, and replaces the old one when it is durable.  An
unreadable block is therefore not overwritten: the new file lies elsewhere.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from ..errors import NodeError, NodeIdentityError, NodeTimeoutError, ReplayError
from ..format.records import HEADER_BYTES, Kind, Place, SegmentKind
from ..format.records import checksum as checksum_of
from ..format.store_rows import LogPosition
from ..nodes.base import Node
from .journal import Entry, Unreadable
from .journal_scan import read_journals
from .lineage import ancestry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of copying to a node's journal."""

    records: int
    """Records that were missing or damaged, and that the node now has."""
    mended: int
    """Segments that had unreadable blocks, and that were rewritten."""
    unknown: list[Unreadable] = field(default_factory=list)
    """Ranges that no node can read, or that still cannot be read after they were rewritten."""


def copy_journals(
    store: UUID,
    sources: Sequence[tuple[str, Node]],
    target: tuple[str, Node],
    first: int,
    before: int,
    position: LogPosition | None = None,
) -> Copied:
    """Give a node the records of others in the segments first <= n < before.

    With `position`, it lacks no commit in whose place the history up to there has another:
    a crash or a failure left such a commit on some nodes, and it does not count.
    Blocks; NodeError of the target, ReplayError if there are sources and none can be read.
    From a failing or damaged source, all readable records are taken.  Written records are
    read back from the medium and checked.
    """
    name, node = target
    journals = read_journals(store, [*sources, target], first)
    if name in journals.failed:
        raise journals.failed[name]
    if sources and journals.failed.keys() >= {source for source, _ in sources}:
        reasons = " ".join(map(str, journals.failed.values()))
        raise ReplayError(f"The journals of the other nodes cannot be read. {reasons}")
    whole: dict[int, list[Entry]] = defaultdict(list)
    for entry in [*journals.entries(), *journals.pieces.values()]:
        if entry.segment < before:
            whole[entry.segment].append(entry)
    unknown = [
        lost
        for lost in journals.unknown({source for source, _ in sources})
        if lost.node == name and lost.segment < before
    ]
    damaged = {lost.segment for lost in journals.unreadable if lost.node == name}
    kept = {lost.segment for lost in unknown}
    """Unknown ranges may become readable later: they are not replaced."""
    ours = {id_.number: id_ for id_ in ancestry(journals, position)} if position else {}
    count = mended = 0
    for segment in sorted((whole.keys() | {n for n in damaged if n < before}) - kept):
        lacking = [
            entry
            for entry in whole[segment]
            if name not in entry.holders
            and (
                entry.header.kind is not Kind.COMMIT or ours.get(entry.number, entry.id) == entry.id
            )
        ]
        if lacking or segment in damaged:
            place = Place(store, name, SegmentKind.JOURNAL, segment)
            try:
                count += _write_anew(place, node, whole[segment], lacking)
                mended += segment in damaged
            except _UnreadableError as error:
                logger.warning("%s", error)
                unknown.append(Unreadable(name, segment, 0, None, str(error)))
    return Copied(count, mended, unknown)


class _UnreadableError(Exception):
    """A segment was written anew, and still cannot be read: other nodes have its records."""


def _read_back(place: Place, node: Node, length: int) -> bytes:
    """Read a new segment back; NodeError if the node fails, _UnreadableError if a part does."""
    try:
        return node.read_back(SegmentKind.JOURNAL, place.segment, 0, length)
    except (NodeIdentityError, NodeTimeoutError):
        raise
    except NodeError as error:
        raise _UnreadableError(str(error)) from error


def _write_anew(place: Place, node: Node, entries: list[Entry], lacking: list[Entry]) -> int:
    """Rewrite a segment with these records; return how many lacking ones it now has."""
    content, written = bytearray(), list[Entry]()
    for entry in sorted(entries, key=lambda entry: (entry in lacking, entry.offset)):
        header, offset = entry.header, entry.offset
        end = offset + header.record_length
        if any(content[offset : min(end, len(content))]):
            continue  # another history wrote here, too: the node's bytes stay
        try:
            payload = entry.payload()
        except ReplayError as error:
            if any(
                place.segment in node.segments(SegmentKind.JOURNAL) for node, _, _ in entry.places
            ):
                raise NodeError(str(error)) from error
            continue  # a metadata dump has replaced it meanwhile
        content.extend(bytes(max(0, end - len(content))))
        content[offset : offset + HEADER_BYTES] = header.encode(place.seed(offset))
        content[offset + HEADER_BYTES : offset + HEADER_BYTES + len(payload)] = payload
        written.append(entry)
    if not written and lacking:
        return 0
    node.replace(SegmentKind.JOURNAL, place.segment, content)
    back = _read_back(place, node, len(content))
    for entry in written:
        header, start = entry.header, entry.offset + HEADER_BYTES
        payload = back[start : start + header.payload_length]
        if (
            back[entry.offset : start] != header.encode(place.seed(entry.offset))
            or checksum_of(payload, header.payload_length) != header.payload_checksum
        ):
            raise NodeError(
                f"Node {place.node} returned other bytes than were written: replace its disk."
            )
    return sum(entry in lacking for entry in written)
