"""The state that a mount begins with: the last checkpoint, and what the journals add to it.

A store is not opened if it would begin empty although its nodes hold data, or if too few
nodes share its history.
"""

from __future__ import annotations

import json

from ..commit.replay import Replayed
from ..config.store_config import CONFIG_NAME, StoreConfig
from ..errors import ConfigError, MetadataError, NodeError, ReplayError, UsageError
from ..format import store_rows, stripe_rows, tables
from ..format.records import SegmentKind
from ..format.store_rows import CommitId, Counters, LogPosition, NodeRow
from ..format.stripe_rows import SegmentState
from ..log.log import Log
from ..metadata.engine import Engine
from ..system.files import sync_directory


def check_format(config: StoreConfig, engine: Engine) -> list[NodeRow]:
    """Return the nodes in the metadata; MetadataError if it belongs to another store."""
    value = engine.get(store_rows.FORMAT_KEY)
    if value is None:
        return []
    found = json.loads(value)
    if found["format"] != store_rows.FORMAT:
        raise MetadataError(
            f"The metadata in {config.metadata} has format {found['format']}; this fusestore "
            f"knows {store_rows.FORMAT}: use a newer fusestore."
        )
    if found["store"] != str(config.uuid):
        raise MetadataError(
            f"The metadata in {config.metadata} belongs to another store ({found['store']})."
        )
    nodes = engine.get(store_rows.NODES_KEY)
    return store_rows.decode_nodes(nodes) if nodes else []


def load_checkpoint(log: Log, config: StoreConfig) -> LogPosition:
    """In a thread: load the last checkpoint, or begin a new store."""
    engine, members = log.engine, log.members
    log_row = engine.get(store_rows.LOG_KEY)
    if log_row is not None:
        return LogPosition.decode(log_row)
    if log.read_only:
        raise UsageError("The store was never mounted: mount it read-write first.")
    for member in members.all:
        for run, what in ((SegmentKind.JOURNAL, "a journal"), (SegmentKind.SHARDS, "shards")):
            if member.is_open and member.node.segments(run):
                place, elsewhere = config.metadata, ""
                if not place.is_relative_to(config.store):
                    elsewhere = f"if the disk of {place} is not mounted, mount it; if it is lost, "
                raise MetadataError(
                    f"Node {member.name} holds {what}, but the metadata is gone: mounting would "
                    f"start an empty store; {elsewhere}run 'fusestore recover {config.store}'."
                )
    for member in members.all:
        if not member.is_open:
            raise NodeError(f"A new store needs all of its nodes: {member.standing.error}")
    # From here on the metadata names its store: a crash before the first checkpoint
    # leaves a journal that can be replayed.
    engine.apply(
        {store_rows.FORMAT_KEY: format_row(config), store_rows.LOG_KEY: LogPosition().encode()}
    )
    engine.freeze()
    engine.write()
    engine.thaw()
    sync_directory(config.metadata)
    return LogPosition()


def refuse_to_begin(log: Log, replayed: Replayed) -> None:
    """In a thread: refuse to begin a store with an empty database if its nodes hold data."""
    if replayed.position.commit > 0 or log.read_only:
        return
    for member in log.members.all:
        if not member.out_of_use and (replayed.dropped or member.node.segments(SegmentKind.SHARDS)):
            raise ReplayError(
                f"The metadata has no commit, but node {member.name} holds data: mounting "
                "would start an empty store. Move the metadata away, and run 'fusestore recover "
                f"{log.members.config.store}'."
            )


def format_row(config: StoreConfig) -> bytes:
    """Return the row that describes the store as a whole."""
    value = {"format": store_rows.FORMAT, "store": str(config.uuid), "code": str(config.code)}
    return json.dumps(value).encode()


def apply_replayed(log: Log, replayed: Replayed, suspects: dict[bytes, bytes | None]) -> None:
    """Apply the replayed changes, and set the state of each node."""
    engine = log.engine
    log.position = replayed.position
    log.apply(replayed.changes)
    log.apply(suspects)
    counters = engine.get(store_rows.COUNTERS_KEY)
    if counters is not None:
        log.counters = Counters.decode(counters)
    new = replayed.position.commit == 0
    for member in log.members.all:
        if member.out_of_use or member.standing.read_only:
            continue
        if new or (
            member.id in replayed.in_sync and replayed.reached[member.id] >= replayed.durable
        ):
            member.standing.confirmed()
        else:
            member.standing.missed()
    nodes = engine.get(store_rows.NODES_KEY)
    if not new:
        for member in log.members.all:
            member.standing.recorded(store_rows.NEVER_WHOLE)  # unless the log has a row of it
    for row in store_rows.decode_nodes(nodes) if nodes else ():
        owner = log.members.by_id.get(row.id)
        if owner is None:
            config = log.members.config
            raise ConfigError(
                f"{config.store / CONFIG_NAME} lacks node {row.name} (region {row.region}, at "
                f"{row.path}) of the store: put its lines back. To take a node out of the store, "
                "use 'fusestore node drain' and 'fusestore node remove'."
            )
        at = replayed.durable_id if row.in_sync else CommitId(row.holds, row.checksum)
        owner.standing.recorded(*at)
        if replayed.lossy and not owner.in_sync:
            owner.standing.recorded(store_rows.NEVER_WHOLE)
    for node, first in store_rows.decode_swept(engine.get(store_rows.SWEPT_KEY)).items():
        if node in log.members.by_id:
            log.members.by_id[node].shards.swept = first
    for key, value in engine.scan(stripe_rows.SEGMENTS_START, stripe_rows.SEGMENTS_END):
        if tables.readable(key, value):
            node, segment = stripe_rows.decode_segment_key(key)
            owner = log.members.by_id.get(node)
            if owner is not None:
                owner.shards.states[segment] = SegmentState.decode(value)
    if log.read_only:
        return
    if not log.members.in_sync:
        problems = " ".join(m.standing.error for m in log.members.all if m.standing.error)
        raise ReplayError(
            "No available node holds every commit: bring one back, then mount again. " + problems
        )


def refuse_without_foreign(log: Log) -> None:
    """ReplayError if too few nodes are left besides those of another history."""
    members = log.members
    if not members.foreign or members.can_store(log.code):
        return
    names = ", ".join(member.name for member in members.foreign)
    raise ReplayError(
        f"{names} {'hold' if len(members.foreign) > 1 else 'holds'} another history than the "
        "metadata, and too few other nodes are left. Bring the nodes of this history back; or "
        "move the metadata away, keep it, and run 'fusestore recover "
        f"{members.config.store}', which names the histories and lets you choose."
    )
