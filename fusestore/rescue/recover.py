"""The recovery path: the metadata is rebuilt from the nodes.

1. Find the nodes (recover_nodes): the configuration names them, or, if it is gone
   too, their own `node.toml` does.
2. Index the journals.  Records that are damaged on one node are read from another.
3. Load the newest complete metadata dump, and every commit after it that was certainly
   acknowledged (commit/load_tables).  This is the state of a checkpoint.
4. Determine which later commits the mount will count, and refuse if missing nodes
   might have newer commits, or might decide.
5. Report the files that cannot be read from the available nodes (recover_report).

The nodes are only read.  The database is built in its own directory, and moved into
place when it is complete (recover_output).  An interrupted recovery is simply run
again, and an existing database is never changed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..commit.commit_shards import suspect_shards
from ..commit.load_tables import Progress, latest_row, load_tables, save
from ..commit.replay import EPOCHS_SKIPPED, Replayed, replay
from ..config.store_config import StoreConfig
from ..errors import NodeError, ReplayError, UsageError
from ..format import store_rows, tables
from ..format.file_rows import Inode
from ..format.records import SegmentKind
from ..format.store_rows import CommitId, GivenUp, LogPosition
from ..limits import DEFAULTS, Limits
from ..log.journal import Entry, Journals, make_readable
from ..log.journal_scan import read_journals
from ..log.log import Log
from ..members.opening import open_members
from ..metadata.engine import Engine
from ..nodes.base import Node
from .recover_nodes import FoundNodes, close_node, find_nodes
from .recover_output import draft_database, recovered_config, write_config
from .recover_report import recovery_report

logger = logging.getLogger(__name__)

HOW_TO_GIVE_UP = "use --accept-loss"
_COMMITS_LOOKED_AT = 100
"""The last commits of a history, searched for the time of its last change."""


def recover(
    store: Path,
    extra: Sequence[Path],
    metadata: Path | None,
    *,
    accept_loss: bool,
    history: str = "",
    progress: Progress,
    limits: Limits = DEFAULTS,
) -> dict[str, Any]:
    """Rebuild the metadata of a store from its nodes, also those at `extra`; return a report.

    `history`: of several histories, use that of the node with this name; others are given up.
    The caller holds the store's lock.  UsageError if this is not possible, ReplayError if
    acknowledged commits might be lost.
    """
    started = time.monotonic()
    found = find_nodes(store, extra)
    target = Path(os.path.realpath(metadata)) if metadata else found.metadata
    with ExitStack() as nodes:
        journals, rivals = _read_journals(found, nodes, progress, history)
        draft, move_into_place = nodes.enter_context(draft_database(target))
        with closing(Engine(draft, limits=limits)) as engine:
            checkpoint = load_tables(engine, journals, progress)
            state, config, in_sync = _open_log(engine, found, journals, checkpoint, target)
            for member in state.members.all:
                close_node(nodes, member.node)
            replayed = replay(
                state, checkpoint, in_sync, accept_loss=accept_loss, how=HOW_TO_GIVE_UP
            )
            _refuse_nothing(state, journals, replayed)
            others = {name for entry in rivals for name in entry.holders} - {history}
            others |= _unconnected(engine, journals, history)
            lossy = _may_lack(state, journals, replayed, others, accept_loss)
            lossy = lossy or replayed.lossy or bool(others)
            state.apply(replayed.changes)
            if lossy:
                save(engine, {store_rows.LOG_KEY: _settle(state, replayed).encode()})
            # Otherwise the next mount handles later commits, as after a crash.
            result = recovery_report(found, journals, state, replayed)
        move_into_place()
    write_config(found, config)
    seconds = time.monotonic() - started
    return {**result, "metadata": str(target), "journal_bytes": journals.size, "seconds": seconds}


def _read_journals(
    found: FoundNodes, until: ExitStack, progress: Progress, history: str
) -> tuple[Journals, list[Entry]]:
    """Read the journals of all available nodes; errors go to `found.problems`.

    Also return the commits of another history, which `history` gives up; ReplayError if
    there is one and `history` is not given.
    """
    nodes = found.open(until)
    if history and history not in nodes:
        raise UsageError(f"Node {history} is not available: its history cannot be recovered.")
    total = _journal_bytes(nodes)
    journals = read_journals(
        found.uuid,
        nodes.items(),
        progress=lambda done: progress({"phase": "journals", "done": done, "total": total}),
    )
    found.problems.update((name, str(error)) for name, error in journals.failed.items())
    rivals = journals.keep_latest(history)
    if rivals and not history:
        first = min(entry.number for entry in rivals)
        ours = [entry for entry in journals.entries() if entry.number >= first]
        raise ReplayError(
            f"Two histories were acknowledged, and diverge before commit {first}: "
            f"{_history_text(ours)}; and {_history_text(rivals)}. Choose the right one with "
            "--history NODE: the other is then given up."
        )
    return journals, rivals


def _history_text(entries: Sequence[Entry]) -> str:
    """Describe a history: its commits, the nodes that hold it, and the time of its last change."""
    entries = sorted(entries, key=lambda entry: entry.number)
    if not entries:
        return "no commits"
    names = sorted({name for entry in entries for name in entry.holders})
    text = f"commits {entries[0].number} to {entries[-1].number} on {', '.join(names)}"
    changed = 0
    for entry in entries[-_COMMITS_LOOKED_AT:]:
        for key, value in entry.commit().changes.items():
            if key[:1] == b"I" and value is not None and tables.readable(key, value):
                changed = max(changed, Inode.decode(value).ctime)
    if changed:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(changed / 1e9))
        text += f" (last change {when})"
    return text


def _journal_bytes(nodes: dict[str, Node]) -> int:
    total = 0
    for node in nodes.values():
        try:
            total += sum(
                node.size(SegmentKind.JOURNAL, n) for n in node.segments(SegmentKind.JOURNAL)
            )
        except NodeError as error:
            logger.warning("%s", error)
    return total


def _open_log(
    engine: Engine,
    found: FoundNodes,
    journals: Journals,
    checkpoint: LogPosition,
    metadata: Path,
) -> tuple[Log, StoreConfig, list[int]]:
    """Return the log of the loaded tables, its configuration, and the ids of nodes in sync."""
    nodes_row = latest_row(engine, journals, checkpoint, store_rows.NODES_KEY)
    rows = store_rows.decode_nodes(nodes_row) if nodes_row else []
    format_row = latest_row(engine, journals, checkpoint, store_rows.FORMAT_KEY)
    config = recovered_config(found, rows, format_row, metadata)
    members = open_members(config, rows, read_only=True)
    log = Log(engine, members, config.uuid, config.code, read_only=True)
    return log, config, [row.id for row in rows if row.in_sync]


# --- refusals ---------------------------------------------------


def _unconnected(engine: Engine, journals: Journals, history: str) -> set[str]:
    """Return nodes whose commits cannot be linked to the recovered history.

    They hold an older copy of it, or another history; `history` gives them up, otherwise
    ReplayError.  A node whose last commit is in the tables was only away.
    """
    value = engine.get(store_rows.NODES_KEY)
    rows = {row.name: row for row in store_rows.decode_nodes(value)} if value else {}
    found = set()
    for name, held in journals.held.items():
        row = rows.get(name)
        if held & journals.latest or name in journals.same:
            continue
        if row is None or row.holds == store_rows.NEVER_WHOLE:
            continue
        if row.in_sync or (row.checksum and CommitId(row.holds, row.checksum) not in held):
            found.add(name)
    if found and not history:
        last = max(number for name in found for number, _ in journals.held[name])
        first = min(journals.latest).number
        raise ReplayError(
            f"{', '.join(sorted(found))} hold commits to {last}, but the latest history is known "
            f"only from commit {first} on: their commits may be an older copy of it, or another "
            "history. Choose the right one with --history NODE: the other is then given up."
        )
    return found


def _refuse_nothing(log: Log, journals: Journals, replayed: Replayed) -> None:
    """ReplayError if no commit was found: an empty store is not a recovery."""
    if replayed.position.commit > 0:
        return
    unread = journals.complaints()
    if unread:
        raise ReplayError(f"No commit can be read from the journals. {make_readable(unread)}")
    for member in log.members.all:
        if member.is_open and member.node.segments(SegmentKind.SHARDS):
            raise ReplayError(
                f"Node {member.name} holds shards, but no available journal holds a commit: "
                "bring more nodes back, and name them with --from."
            )
    raise ReplayError("The available journals hold no commit: there is nothing to recover.")


def _may_lack(
    log: Log, journals: Journals, replayed: Replayed, given_up: set[str], accept_loss: bool
) -> bool:
    """Return whether missing nodes may have newer commits; ReplayError."""
    vouching = {
        member.id
        for member in log.members.all
        if member.is_open
        and replayed.reached[member.id] >= replayed.durable
        and member.id not in replayed.blind
    }
    others = {m.id for m in log.members.all if m.name not in given_up} - vouching
    if not others & replayed.in_sync or not log.members.could_store(log.code, others):
        return False
    if not accept_loss:
        away = ", ".join(m.name for m in log.members.all if m.id in others)
        unread = [
            m.standing.error
            for m in log.members.all
            if m.id in others and m.out_of_use and m.standing.unread
        ]
        if replayed.blind or unread:
            raise ReplayError(
                f"Newer commits than {replayed.position.commit} may be on {away}. "
                f"{make_readable([*journals.complaints(), *unread])}"
            )
        raise ReplayError(
            f"Newer commits than {replayed.position.commit} may be on {away}: bring these nodes, "
            "or newer copies of them, back and name their places with --from, or use --accept-loss "
            "if they are gone for good."
        )
    return True


def _settle(log: Log, replayed: Replayed) -> LogPosition:
    """Continue from this position: commits of this history that are found later are void."""
    log.apply(suspect_shards(log, replayed.doubtful))
    last = replayed.position.commit
    rows = []
    for member in log.members.all:
        whole = (
            member.is_open and member.id in replayed.in_sync and replayed.reached[member.id] >= last
        )
        holds = 0 if whole else store_rows.NEVER_WHOLE
        rows.append(replace(member.row(), in_sync=whole, holds=holds))
    log.apply({store_rows.NODES_KEY: store_rows.encode_nodes(rows)})
    epoch = replayed.position.epoch + EPOCHS_SKIPPED
    ends = [*log.given_up, GivenUp(last, epoch)]
    log.apply({store_rows.GIVEN_UP_KEY: store_rows.encode_given_up(ends)})
    return replace(replayed.position, epoch=epoch, doubt="losses were accepted")
