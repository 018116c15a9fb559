"""The history that a node's journal belongs to: commits are compared by number and checksum.

A commit is ours if the chain leads back to it.  Another commit was certainly
acknowledged if a later one of its history records this.  Otherwise a node of its own
in-sync list that lacks the commit disproves it: a crash left it behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..format.store_rows import CommitId, GivenUp, LogPosition
from ..members.member import Member
from ..nodes.base import Node
from .journal import Entry, Journals, is_void
from .journal_scan import read_journals
from .log import Log


@dataclass(frozen=True, slots=True)
class Lineage:
    """A node's journal, compared with the history of the store."""

    last: int
    """Its last commit of the store's history, 0 for none."""
    foreign: tuple[int, int] | None = None
    """Its first and its last commit of another history."""
    older: bool = False
    """It ends before the journals here begin: its history is unknown."""

    def problem(self, store: str, name: str) -> str:
        """Return the message for a node that holds another history; else an empty string."""
        if self.foreign is None:
            return ""
        first, last = self.foreign
        what = f"It holds commits {first} to {last} of another history"
        why = "a copy of the store was used, or this store was restored from an older copy"
        if self.older:
            what = f"It holds commits {first} to {last}, but the journals here begin later"
            why = "it was restored from an old copy, perhaps one of another history"
        return (
            f"{what}: {why}. The node is not used or overwritten, and no node frees room "
            f"meanwhile. 'fusestore repair {store} {name} --discard-history' gives these "
            "commits up."
        )


def lineage(log: Log, given_up: Sequence[GivenUp], member: Member, node: Node) -> Lineage:
    """Compare the journal of `node` with the history of the log; blocks; NodeError of it.

    `node` is that of `member`, which is not in sync.  `given_up` is the log's, read on the event
    loop: the metadata must not be read in another thread meanwhile.
    """
    name, position = member.name, log.position
    holds = CommitId(member.standing.holds, member.standing.checksum)
    others = [(other.name, other.node) for other in log.members.in_sync]
    ids = {other.name: other.id for other in log.members.all}
    journals = read_journals(log.store, [*others, (name, node)])
    if name in journals.failed:
        raise journals.failed[name]
    ours = ancestry(journals, position)
    theirs = [e for e in journals.entries() if name in e.holders and not is_void(e, given_up)]
    known = {entry.id for entry in theirs}
    floor = holds.number if holds.checksum and holds in known else 0
    mine = {id_ for id_ in known if id_ in ours or id_.number <= floor}
    last = max((id_.number for id_ in mine), default=0)
    begin = min(id_.number for id_ in ours)
    strange = [e for e in theirs if e.number > floor and e.id not in ours]
    compared = [e for e in strange if e.number >= begin or e.number == holds.number]
    foreign = [e for e in compared if _counts_there(journals, e, compared, others, ids)]
    if foreign:
        return Lineage(last, (foreign[0].number, max(e.number for e in compared)))
    linked = name in journals.linked([other for other, _ in others])
    if strange and not mine and holds.checksum and not linked:
        numbers = [entry.number for entry in strange]
        return Lineage(0, (min(numbers), max(numbers)), older=True)
    return Lineage(last)


def ancestry(journals: Journals, position: LogPosition) -> set[CommitId]:
    """Return the commit at a position of the log, and all that the chain leads back to."""
    found = {CommitId(position.commit, position.checksum)}
    entry = journals.at(position)
    while entry is not None:
        found.add(entry.id)
        entry = journals.predecessor(entry)
    return found


def _counts_there(
    journals: Journals,
    entry: Entry,
    strange: Sequence[Entry],
    others: Sequence[tuple[str, Node]],
    ids: Mapping[str, int],
) -> bool:
    """Return whether a foreign commit was acknowledged, or this cannot be disproved."""
    if entry.number <= max(other.durable_through for other in strange):
        return True
    here = {name for name, _ in others if name not in journals.failed}
    unread = {lost.node for lost in journals.unreadable}
    lacking = here - entry.holders - unread
    disproved = any(ids[name] in entry.in_sync for name in lacking)
    return not disproved and not here <= entry.holders
