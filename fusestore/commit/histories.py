"""One history: a mount is refused where the database and the nodes are of different ones.

A store can have had several: it was restored from a copy, a copy of it was used on its own, or
losses were accepted that could be read later.  Nodes may hold more than one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import ReplayError
from ..format.store_rows import CommitId, LogPosition
from ..log.journal import Entry, Journals, is_void
from ..log.journal_scan import read_journals
from ..log.log import Log


class Histories:
    """The commits on the nodes, compared with the one at which the database stands."""

    def __init__(
        self,
        log: Log,
        start: LogPosition,
        journals: Journals,
        before: Entry | None,
        in_sync: Collection[int],
    ) -> None:
        """`before` is the commit at the start, if a node holds it; `in_sync` are ids of nodes."""
        self._log, self._start, self._journals = log, start, journals
        self._before, self._in_sync = before, in_sync

    def refuse_another(self) -> None:
        """ReplayError if no node in sync holds the commit at which the database stands.

        Normally each of them holds it, in the segments that were read.  Otherwise the
        database or the nodes were restored from an old copy.
        """
        start, journals = self._start, self._journals
        names = {m.name for m in self._log.members.all if m.is_open and m.id in self._in_sync}
        names -= journals.failed.keys()
        if start.commit == 0 or self._before is not None or not names:
            return
        if any(lost.segment <= start.journal_segment for lost in journals.unreadable):
            return
        if next(journals.chain(start), None) is not None:
            return
        last = {name: journals.last(name) for name in sorted(names)}
        if not any(last.values()):  # all journals may end before the first segment that was read
            nodes = [(m.name, m.node) for m in self._log.members.all if m.name in names]
            older = read_journals(self._log.store, nodes)
            last = {name: older.last(name) for name in sorted(names)}
        if not any(last.values()):
            return
        held = ", ".join(f"{name} to commit {number}" for name, number in last.items())
        raise ReplayError(
            f"The metadata is at commit {start.commit}, which no node holds ({held}): the "
            "metadata or the nodes were restored from an old copy, or belong to a copy of the "
            "store that was used on its own. Move the metadata away, keep it, and run "
            f"'fusestore recover {self._log.members.config.store}'."
        )

    def refuse_old_metadata(self, chain: Sequence[Entry]) -> None:
        """ReplayError if the nodes have gone on without the commit at which the database stands.

        It was restored from a copy made before losses were accepted, or before another copy
        was restored.  If as many of the nodes in sync know nothing of that, or enough for the
        store, the others may belong to a copy of it that went on by itself: they become foreign.
        """
        start, journals = self._start, self._journals
        ours = {entry.id for entry in (self._before, *chain) if entry is not None}
        given_up = [*self._log.given_up, *(end for entry in chain for end in entry.given_up)]
        later = [
            entry
            for entry in journals.entries()
            if entry.id not in ours
            and (entry.header.epoch > start.epoch or entry.nonce.hex() != start.nonce)
            and not is_void(entry, given_up)
            and self._is_of_another_past(entry)
        ]
        through = max((entry.durable_through for entry in later), default=0)
        gone_on = [entry for entry in later if entry.number <= through]
        gone_on += [
            entry
            for entry in (*journals.entries(), *journals.pieces.values())
            if any(end.voids(start.commit, start.epoch) for end in entry.given_up)
        ]
        without = {name for entry in gone_on for name in entry.holders}
        members = self._log.members
        others = {
            member.id
            for member in members.all
            if member.is_open
            and member.id in self._in_sync
            and member.name not in (without | journals.failed.keys())
        }
        if len(without) > len(others) and not members.could_store(self._log.code, others):
            raise ReplayError(
                f"The metadata is at commit {start.commit} of a history that was given up: it was "
                f"restored from an old copy, and {', '.join(sorted(without))} went on without it, "
                f"to commit {max(entry.number for entry in gone_on)}. Move the metadata away, keep "
                f"it, and run 'fusestore recover {self._log.members.config.store}'."
            )

    def _is_of_another_past(self, entry: Entry) -> bool:
        """Return whether a commit certainly does not build on the one at the start."""
        start = self._start
        at: Entry | None = entry
        while at is not None and at.number > start.commit + 1:
            at = self._journals.predecessor(at)
        if at is None:
            return False
        if at.number > start.commit:
            return at.previous != start.checksum
        return at.id != CommitId(start.commit, start.checksum)

    def refuse_fork(self, chain: Sequence[Entry]) -> None:
        """ReplayError if two histories diverge after the start, and both were acknowledged."""
        ours = {entry.id for entry in chain}
        given_up = [*self._log.given_up, *(end for entry in chain for end in entry.given_up)]
        for entry in chain:
            for rival in self._journals.commits[entry.number]:
                if rival.previous != entry.previous or rival.id in ours:
                    continue
                after = [
                    e
                    for e in self._journals.entries()
                    if e.id not in ours and e.holders & rival.holders and e.number > rival.number
                ]
                through = max((e.durable_through for e in after), default=0)
                if through < rival.number or is_void(rival, given_up):
                    continue
                raise ReplayError(
                    f"Two histories diverge after commit {entry.number - 1}, and both were "
                    f"acknowledged: {_names(entry)} to commit {chain[-1].number}, "
                    f"{_names(rival)} to commit {max(e.number for e in after)}. Move the nodes "
                    "of the unwanted history away, and mount again; nothing was changed."
                )


def _names(entry: Entry) -> str:
    return ", ".join(sorted(entry.holders))
