"""The contents of a node when its store is opened, and the history of its journal."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..format import store_rows
from ..format.records import SegmentKind
from ..format.segment_numbers import reachable, segment_path
from ..log.journal_scan import SEARCHED_BYTES_MAX
from ..log.lineage import Lineage, lineage
from ..members.member import Member
from ..members.opening import shard_sizes
from ..members.standing import State
from ..text import counted
from .store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeContents:
    """The contents of a node when its store is opened."""

    journals: list[int]
    shards: dict[int, int]
    """Segments, and their bytes."""
    journal_bytes: int
    """Since the last metadata dump."""
    lineage: Lineage | None
    """The history of its journal; None for a node in sync."""


def tidy(store: Store, member: Member) -> NodeContents:
    """In a thread: examine a node, and release its room allocated ahead if it is writable."""
    node, reads_only = member.node, store.log.read_only or member.standing.read_only
    journals, shards = node.segments(SegmentKind.JOURNAL), shard_sizes(node)
    found = None if member.in_sync else lineage(store.log, store.log.given_up, member, node)
    if found is not None and _is_foreign(member, found):
        if not store.log.read_only:
            node.give_back()
        return NodeContents(journals, {}, 0, found)
    if reads_only:
        return NodeContents(journals, shards, 0, found)
    since = [segment for segment in journals if segment >= store.dumper.first_segment]
    size = sum(min(node.size(SegmentKind.JOURNAL, n), SEARCHED_BYTES_MAX) for n in since)
    for segment in list(shards)[-2:]:
        if segment in member.shards.states:
            node.truncate(SegmentKind.SHARDS, segment, node.size(SegmentKind.SHARDS, segment))
    for segment in journals[-2:]:
        node.truncate(SegmentKind.JOURNAL, segment, node.size(SegmentKind.JOURNAL, segment))
    return NodeContents(journals, shards, size, found)


def _is_foreign(member: Member, found: Lineage) -> bool:
    """Return whether a node holds another history that was not given up."""
    return found.foreign is not None and member.standing.holds != store_rows.NEVER_WHOLE


def take_over(store: Store, member: Member, found: NodeContents) -> list[int]:
    """Continue with a node in its present state; return its journal segments."""
    if found.lineage is not None and _is_foreign(member, found.lineage):
        problem = found.lineage.problem(str(store.config.store), member.name)
        logger.error("Node %s: %s", member.name, problem)
        member.standing.set_apart(problem)
        return found.journals
    if member.standing.read_only or store.log.read_only:
        member.shards.note_present(found.shards)
        if found.lineage is not None:
            member.standing.found(found.lineage.last)
        return found.journals
    if member.in_sync:
        store.committer.journal.commit_bytes = found.journal_bytes - store.dumper.last_bytes
    known = member.shards.known
    member.shards.begin_after(found.shards)
    member.shards.note_present(found.shards)
    if member.state is State.BEHIND:
        # Unless it is doubted, it lacks only the shards in `missing`.
        assert found.lineage is not None
        member.standing.found(found.lineage.last)
        member.standing.entered()
    states = member.shards.states
    near = reachable(found.shards, known)
    strays = {segment: found.shards[segment] for segment in near if segment not in states}
    store.reclaimer.strays.note(member, strays)
    far = sorted(found.shards.keys() - set(near))
    if far:
        logger.warning(
            "Node %s (%s) holds %s with numbers that this store has not reached, from %s to %s: "
            "ignored.",
            member.name,
            member.config.path,
            counted(len(far), "file"),
            segment_path(SegmentKind.SHARDS, far[0]),
            segment_path(SegmentKind.SHARDS, far[-1]),
        )
    return found.journals
