"""The recovery path: the metadata made anew from what the nodes hold.

1. Find the nodes: the configuration names them, or, if it is gone too, their
   own `node.toml` does.
2. Index the journals.  What is rotten on one node is read from another.
3. Load the newest whole metadata dump, and every commit after it that was certainly
   acknowledged: that is what a checkpoint would hold.
4. See what the mount will make of the commits after that, and refuse when nodes
   that are not there might have gone on alone, or might decide.
5. Say which files cannot be read from the nodes that are there.

The nodes are only read.  The database is built in a directory of its own and
moved into place when it is whole, so an interrupted recovery is just begun
again; an existing database is never touched.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from ..commit.replay import EPOCHS_SKIPPED, Replayed, replay, suspect_shards
from ..config import store_config as names
from ..config.node_identity import IDENTITY_NAME, NodeIdentity, read_identity
from ..config.store_config import NodeConfig, StoreConfig
from ..config.store_config_write import write_store_config
from ..errors import FusestoreError, NodeError, ReplayError, UsageError
from ..files.tree import Tree
from ..format import file_rows, store_rows, stripe_rows
from ..format.erasure import Code
from ..format.placement import check_region_rule
from ..format.records import Changes, Run
from ..format.store_rows import Counters, LogState, NodeRow
from ..format.stripe_rows import Stripe
from ..limits import DEFAULTS, Limits
from ..log.journal import Entry, Journals, read_journals
from ..log.log import Log
from ..members.opening import open_members, shard_sizes
from ..metadata.engine import DATABASE, DATABASE_LOCK, Engine
from ..nodes.base import Node
from ..nodes.directory import DirectoryNode
from ..read.reader import Reader
from ..system.files import sync_directory

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]

HOW_TO_GIVE_UP = "say --accept-loss"
DRAFT_NAME = "recovering"
"""In the metadata directory, until the database in it is whole."""


@dataclass
class Found:
    """Where the nodes of a store are."""

    store: Path
    uuid: UUID
    config: StoreConfig | None
    places: dict[str, tuple[Path, NodeIdentity]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """By node: why it is not there."""

    def open(self) -> dict[str, Node]:
        """The nodes that are there, by name."""
        nodes: dict[str, Node] = {}
        for name, (path, identity) in self.places.items():
            try:
                nodes[name] = DirectoryNode(path, identity, read_only=True)
            except NodeError as error:
                self.problems[name] = str(error)
        return nodes


def recover(
    store: Path,
    extra: Sequence[Path],
    metadata: Path | None,
    *,
    accept_loss: bool,
    progress: Progress,
    limits: Limits = DEFAULTS,
) -> dict[str, Any]:
    """Make the metadata of a store from its nodes, of which `extra` lie elsewhere; what was found.

    The caller holds the store's lock.  UsageError when it makes no sense,
    ReplayError when something acknowledged might be lost by it.
    """
    started = time.monotonic()
    found = find_nodes(store, extra)
    target = Path(os.path.realpath(metadata)) if metadata else _metadata(found)
    nodes = found.open()
    if not nodes:
        problems = " ".join(found.problems.values())
        raise UsageError(f"No node of {store} is there: name their places with --from. {problems}")
    sizes = _journal_bytes(nodes)
    journals = read_journals(
        found.uuid,
        nodes.items(),
        progress=lambda done: progress({"phase": "journals", "done": done, "total": sizes}),
    )
    found.problems.update((name, str(error)) for name, error in journals.failed.items())
    journals.keep_latest()
    with _draft(target) as (draft, finish):
        engine = Engine(draft, limits=limits)
        try:
            checkpoint = _load(engine, journals, progress)
            known = _latest(engine, journals, checkpoint, store_rows.NODES_KEY)
            rows = store_rows.decode_nodes(known) if known else []
            about = _latest(engine, journals, checkpoint, store_rows.FORMAT_KEY)
            config = _config(found, rows, about, target)
            members = open_members(config, rows, read_only=True)
            state = Log(engine, members, config.uuid, config.code, read_only=True)
            in_sync = [row.id for row in rows if row.in_sync]
            replayed = replay(
                state, checkpoint, in_sync, accept_loss=accept_loss, how=HOW_TO_GIVE_UP
            )
            lossy = _may_lack(state, replayed, accept_loss) or replayed.lossy
            state.apply(replayed.changes)
            if lossy:
                _save(engine, {store_rows.LOG_KEY: _settle(state, replayed).encode()})
            # Else what came after the checkpoint is left to the next mount, as after a crash.
            result = _report(found, journals, state, replayed)
        finally:
            engine.close()
        finish()
    _write_config(found, config)
    seconds = time.monotonic() - started
    return {**result, "metadata": str(target), "journal_bytes": journals.size, "seconds": seconds}


# --- finding the nodes -------------------------------------------------------


def find_nodes(store: Path, extra: Sequence[Path]) -> Found:
    """Look for a store's nodes; UsageError when they do not belong together."""
    store = Path(os.path.realpath(store))
    config = names.load(store) if os.path.lexists(store / names.CONFIG_NAME) else None
    problems: dict[str, str] = {}
    candidates: list[tuple[Path, NodeIdentity]] = []
    for node in config.nodes if config else ():
        try:
            candidates.append((node.path, read_identity(node.path)))
        except NodeError as error:
            problems[node.name] = str(error)
    if config is None:
        if not store.is_dir():
            raise UsageError(f"There is no directory {store}.")
        for path in sorted(store.iterdir()):
            if os.path.lexists(path / IDENTITY_NAME):
                try:
                    candidates.append((path, read_identity(path)))
                except NodeError as error:
                    problems[path.name] = str(error)
    candidates += [(path, read_identity(path)) for path in map(Path.resolve, extra)]
    if not candidates:
        raise UsageError(
            f"{store} has no {names.CONFIG_NAME} and no node: name the places of the nodes "
            "with --from."
        )
    uuid = config.uuid if config else candidates[0][1].store
    found = Found(store, uuid, config, problems=problems)
    for path, identity in candidates:
        if identity.store != uuid:
            raise UsageError(f"{path} belongs to another store ({identity.store}): leave it out.")
        known = found.places.get(identity.node)
        if known is not None and known[0] != path:
            raise UsageError(
                f"{known[0]} and {path} both say that they are node {identity.node}: "
                "move the older one away."
            )
        found.places[identity.node] = (path, identity)
        found.problems.pop(identity.node, None)
    return found


def _metadata(found: Found) -> Path:
    return found.config.metadata if found.config else found.store / names.METADATA_NAME


def _journal_bytes(nodes: dict[str, Node]) -> int:
    total = 0
    for node in nodes.values():
        try:
            total += sum(node.size(Run.JOURNAL, n) for n in node.segments(Run.JOURNAL))
        except NodeError as error:
            log.warning("%s", error)
    return total


# --- the tables --------------------------------------------------------------


def _load(engine: Engine, journals: Journals, progress: Progress) -> LogState:
    """Fill the database up to the last commit that was certainly acknowledged."""
    start, pieces = _newest_dump(journals)
    durable = journals.durable
    chain = [entry for entry in journals.chain(start) if entry.number <= durable]
    if not chain and start.commit == 0 and journals.commits:
        first = min(journals.commits)
        if first > 1:
            raise ReplayError(
                f"The journals that are there begin with commit {first}, and no metadata dump in "
                "them is whole: bring more nodes back, and name them with --from."
            )
    total = sum(entry.header.payload_length for entry in [*pieces, *chain])
    done = 0

    def load(entry: Entry, changes: Changes) -> None:
        nonlocal done
        engine.apply(changes)
        if engine.changed_keys >= engine.limits.checkpoint_changes_max:
            _save(engine)
        done += entry.header.payload_length
        progress({"phase": "metadata", "done": done, "total": total})

    for entry in pieces:
        load(entry, entry.piece())
    state = start
    for entry in chain:
        commit = entry.commit()
        load(entry, commit.changes)
        digest = entry.header.payload_checksum
        state = LogState(commit.epoch, commit.nonce.hex(), commit.number, digest, entry.segment)
    _save(engine, {store_rows.LOG_KEY: state.encode()})
    return state


def _newest_dump(journals: Journals) -> tuple[LogState, list[Entry]]:
    """Where the newest whole metadata dump begins, and its pieces; the very start without one."""
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
        start = LogState(0, "", row["commit"], row["checksum"], row["segment"])
        if (
            entry.number <= journals.durable
            and len(pieces) == row["pieces"]
            and any(found is entry for found in journals.chain(start))
        ):
            return start, pieces
    return LogState(), []


def _save(engine: Engine, changes: Changes | None = None) -> None:
    """Write what was applied to the database."""
    engine.freeze()
    engine.amend(changes or {})
    engine.write()
    engine.thaw()


def _latest(engine: Engine, journals: Journals, after: LogState, key: bytes) -> bytes | None:
    """A row as the last commit of the chain has it, whether that counts or not."""
    value = engine.get(key)
    for entry in journals.chain(after):
        value = entry.commit().changes.get(key, value)
    return value


def _config(
    found: Found, rows: Sequence[NodeRow], about: bytes | None, metadata: Path
) -> StoreConfig:
    """The configuration, with the nodes where they were found; made anew if it is gone."""
    known = found.config.nodes if found.config else ()
    names = {node.name for node in known}
    nodes = tuple(
        replace(node, path=found.places[node.name][0]) if node.name in found.places else node
        for node in (*known, *(_node(row) for row in rows if row.name not in names))
    )
    if found.config is not None:
        return replace(found.config, nodes=nodes, metadata=metadata)
    if about is None:
        raise ReplayError(
            "The journals that are there hold no commit: there is nothing to recover."
        )
    code = Code.parse(json.loads(about)["code"])
    config = StoreConfig(found.store, found.uuid, code, False, metadata, nodes)
    return replace(config, allow_unsafe=check_region_rule(code, config.regions) is not None)


def _node(row: NodeRow) -> NodeConfig:
    """A node as the log knows it."""
    return NodeConfig(row.name, row.region, Path(row.path), row.weight, row.draining)


def _write_config(found: Found, config: StoreConfig) -> None:
    """Write the configuration where it was gone or has changed; the old one is kept beside it."""
    if config == found.config:
        return
    file = config.store / names.CONFIG_NAME
    if found.config is not None:
        shutil.copy2(file, file.with_name(file.name + ".old"))
    write_store_config(config)


# --- what must not be lost ---------------------------------------------------


def _may_lack(state: Log, replayed: Replayed, accept_loss: bool) -> bool:
    """Whether nodes that are not there could have gone on without those that are; ReplayError."""
    vouching = {
        member.id
        for member in state.members.all
        if member.is_open and replayed.reached[member.id] >= replayed.durable
    }
    others = {member.id for member in state.members.all} - vouching
    if not others & replayed.in_sync or not state.members.could_store(state.code, others):
        return False
    if not accept_loss:
        away = ", ".join(m.name for m in state.members.all if m.id in others)
        raise ReplayError(
            f"Newer commits than {replayed.state.commit} may be on {away}: bring these nodes back "
            "and name their places with --from, or say --accept-loss if they are gone for good."
        )
    return True


def _settle(state: Log, replayed: Replayed) -> LogState:
    """Go on from what there is: whatever else turns up later, of this history, is void."""
    state.apply(suspect_shards(state, replayed))
    last = replayed.state.commit
    rows = []
    for member in state.members.all:
        whole = (
            member.is_open and member.id in replayed.in_sync and replayed.reached[member.id] >= last
        )
        holds = 0 if whole else store_rows.NEVER_WHOLE
        rows.append(replace(member.row(), in_sync=whole, holds=holds))
    state.apply({store_rows.NODES_KEY: store_rows.encode_nodes(rows)})
    return replace(replayed.state, epoch=replayed.state.epoch + EPOCHS_SKIPPED)


# --- what there is -----------------------------------------------------------


def _report(found: Found, journals: Journals, state: Log, replayed: Replayed) -> dict[str, Any]:
    """What was found, and what was lost, by file."""
    tree, reader = Tree(state), Reader(state)
    counters = state.engine.get(store_rows.COUNTERS_KEY)
    known = Counters.decode(counters) if counters else Counters(files=0)
    sizes = _segment_sizes(state)
    lost = [number for number, row in _stripes(state) if not _readable(state, sizes, number, row)]
    return {
        "store": str(found.store),
        "commit": replayed.state.commit,
        "files": known.files,
        "bytes": known.file_bytes,
        "commits": sum(len(entries) for entries in journals.commits.values()),
        "dump_pieces": len(journals.pieces),
        "nodes": [
            {
                "name": member.name,
                "region": member.config.region,
                "path": str(member.config.path),
                "found": member.is_open,
                "last_commit": max(journals.holders.get(member.name, {0})),
                "problem": found.problems.get(member.name, member.standing.error),
            }
            for member in state.members.all
        ],
        "dropped": [_dropped(journals, tree, number) for number in replayed.dropped],
        "lost": sorted({tree.path(ino) for number in lost for ino in reader.owners(number)}),
    }


def _stripes(state: Log) -> Iterator[tuple[int, Stripe]]:
    for key, value in state.engine.scan(stripe_rows.STRIPES_START, stripe_rows.STRIPES_END):
        yield stripe_rows.decode_stripe_key(key), Stripe.decode(value)


def _segment_sizes(state: Log) -> dict[int, dict[int, int]]:
    """By node, and segment: the bytes that are there."""
    sizes: dict[int, dict[int, int]] = {}
    for member in state.members.all:
        if member.is_open:
            try:
                sizes[member.id] = shard_sizes(member.node)
            except NodeError as error:
                log.warning("%s", error)
    return sizes


def _readable(state: Log, sizes: dict[int, dict[int, int]], number: int, row: Stripe) -> bool:
    """Whether k shards of a stripe seem to be there; their bytes are not read."""
    there = 0
    for index, place in enumerate(row.shards):
        size = sizes.get(place.node, {}).get(place.segment, 0)
        missing = state.engine.get(stripe_rows.missing_key(place.node, number, index)) is not None
        there += place.written and not missing and size >= place.offset + row.shard_length
    return there >= row.code.k


def _dropped(journals: Journals, tree: Tree, number: int) -> dict[str, Any]:
    """A commit that does not count, and the names that it would have set or removed."""
    paths = set()
    for entry in journals.commits[number]:
        for key in entry.commit().changes:
            if key[:1] == b"N":
                parent, name = file_rows.decode_name_key(key)
                paths.add(tree.path(parent).rstrip("/") + "/" + name.decode(errors="replace"))
    return {"commit": number, "names": sorted(paths)}


# --- the new database --------------------------------------------------------


@contextmanager
def _draft(target: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A directory for the new database, and what moves the database into place."""
    draft = target / DRAFT_NAME
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        present = set(os.listdir(target)) - {"lost+found", DRAFT_NAME, DATABASE_LOCK}
        if present:
            raise UsageError(
                f"{target} is not empty (it has {sorted(present)[0]!r}), and recover makes new "
                f"metadata: move what is there away, for example with mv {target} {target}.old"
            )
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)

        def finish() -> None:
            os.replace(draft / DATABASE, target / DATABASE)
            sync_directory(target)

        try:
            yield draft, finish
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise FusestoreError(
            f"The metadata cannot be made in {target}: {error.strerror or error}."
        ) from error
