"""Building the tables of a checkpoint from the journals.

recover uses this to rebuild the database, and the row check to compare the database
with the journals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import ReplayError
from ..format import store_rows
from ..format.records import Changes
from ..format.store_rows import LogPosition
from ..log.journal import Entry, Journals, make_readable
from ..metadata.engine import Engine

Progress = Callable[[dict[str, Any]], None]
"""Called with a phase, the bytes done, and the total bytes."""


def load_tables(
    engine: Engine, journals: Journals, progress: Progress, at: LogPosition | None = None
) -> LogPosition:
    """Fill the database up to the last commit that was certainly acknowledged; ReplayError.

    With `at`, fill it up to that commit; ReplayError if the journals do not lead there.
    """
    end = journals.durable if at is None else at.commit
    start, pieces = _newest_dump(journals, end)
    chain = [entry for entry in journals.chain(start) if entry.number <= end]
    if at is not None:
        last = chain[-1].header.payload_checksum if chain else start.checksum
        if (chain[-1].number if chain else start.commit, last) != (at.commit, at.checksum):
            raise ReplayError(f"The available journals do not lead to commit {at.commit}.")
    if not chain and start.commit == 0 and journals.commits:
        first = min(journals.commits)
        unread = journals.complaints()
        if first > 1 and unread:
            raise ReplayError(
                f"The readable part of the journals begins with commit {first}, and has no "
                f"complete metadata dump. {make_readable(unread)}"
            )
        if first > 1:
            raise ReplayError(
                f"The available journals begin with commit {first}, and have no complete metadata "
                "dump: bring more nodes back, and name them with --from."
            )
    total = sum(entry.header.payload_length for entry in [*pieces, *chain])
    done = 0

    def load(entry: Entry, changes: Changes) -> None:
        nonlocal done
        engine.apply(changes)
        if engine.changed_keys >= engine.limits.checkpoint_changes_max:
            save(engine)
        done += entry.header.payload_length
        progress({"phase": "metadata", "done": done, "total": total})

    for entry in pieces:
        load(entry, entry.piece())
    position = start
    for entry in chain:
        commit = entry.commit()
        load(entry, commit.changes)
        digest = entry.header.payload_checksum
        position = LogPosition(
            commit.epoch, commit.nonce.hex(), commit.number, digest, entry.segment
        )
    position = replace(position, doubt="the metadata was recovered")
    save(engine, {store_rows.LOG_KEY: position.encode()})
    return position


def _newest_dump(journals: Journals, end: int) -> tuple[LogPosition, list[Entry]]:
    """The start of the newest metadata dump complete at commit `end`, and its pieces.

    Without a dump, the start of the log.
    """
    named = [e for entries in journals.commits.values() for e in entries if e.dump]
    for entry in sorted(named, key=lambda e: (e.number, e.header.epoch), reverse=True):
        row = entry.dump
        assert row is not None
        pieces = [
            piece
            for piece in journals.pieces.values()
            if piece.number == row["commit"]
            and piece.segment >= row["segment"]
            and piece.header.epoch == entry.header.epoch
        ]
        start = LogPosition(0, "", row["commit"], row["checksum"], row["segment"])
        if (
            entry.number <= end
            and len(pieces) == row["pieces"]
            and any(found is entry for found in journals.chain(start))
        ):
            return start, pieces
    return LogPosition(), []


def save(engine: Engine, changes: Changes | None = None) -> None:
    """Write the applied changes to the database."""
    engine.freeze()
    engine.amend(changes or {})
    engine.write()
    engine.thaw()


def latest_row(engine: Engine, journals: Journals, after: LogPosition, key: bytes) -> bytes | None:
    """Return a row at the last commit of the chain, whether or not that commit counts."""
    value = engine.get(key)
    for entry in journals.chain(after):
        value = entry.commit().changes.get(key, value)
    return value
