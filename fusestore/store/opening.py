"""Opening a store: engine, nodes and log put together, replayed and ready to serve.

Opening replays the journals, logs their changes past the checkpoint again, and
opens a new epoch.  Closing commits and checkpoints everything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from ..commit.commit_shards import suspect_shards
from ..commit.committer import Committer
from ..commit.replay import replay
from ..config.owner_record import Mount
from ..config.store_config import StoreConfig
from ..errors import (
    FusestoreError,
    MetadataError,
    NodeBusyError,
    NodeError,
    NodeFencedError,
    NodeLacksError,
    NodeReadOnlyError,
    NotDurableError,
    StoreBusyError,
)
from ..format import erasure, store_rows, stripe_rows, tables
from ..format.erasure import Code
from ..format.records import SegmentKind
from ..log.log import Log
from ..members.member import Member
from ..members.members import Members
from ..members.opening import open_members, open_node
from ..metadata.engine import Engine
from ..metadata.environment import DATABASE, DATABASE_LOCK
from ..system import process_limits, threads
from ..system.io_uring import Ring
from .claims import Claims
from .first_state import (
    apply_replayed,
    check_format,
    format_row,
    load_checkpoint,
    refuse_to_begin,
    refuse_without_foreign,
)
from .node_contents import take_over, tidy
from .rows_at_mount import mend_rows
from .store import Store

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_store(
    config: StoreConfig,
    *,
    read_only: bool = False,
    background: bool = True,
    accept_loss: bool = False,
    take_over: bool = False,
) -> AsyncIterator[Store]:
    """Open a store whose lock the caller holds; FusestoreError if this fails.

    Without `background`, nothing is healed, reclaimed or dumped while it is open.  With
    `accept_loss`, commits that only missing nodes may hold are given up.  With
    `take_over`, the nodes are taken from a mount on another machine.  On leaving, everything is
    committed and checkpointed; NotDurableError if this fails.
    """
    erasure.self_check(config.code)
    mount = Mount.begin(take_over=take_over)
    config = replace(_within_limits(config, read_only), mount=mount)
    engine, is_new = _open_engine(config, read_only=read_only)
    members: Members | None = None
    try:
        threads.keep()
        mended = await mend_rows(config, engine, read_only=read_only)
        rows = check_format(config, engine)
        members = open_members(config, rows, opened=False)
        await _open_nodes(members, config, read_only=read_only)
        log = Log(engine, members, config.uuid, config.code, read_only=read_only)
        log.mended = tuple(map(str, mended.wrong))
        log.rows_mended = len(mended.wrong)
        log.rows_in_doubt = int(bool(mended.doubt))
        in_sync = [row.id for row in rows if row.in_sync]
        await _replay(log, config, mount, in_sync, accept_loss=accept_loss)
        log.position = replace(log.position, doubt=log.position.doubt or mended.doubt)
        async with trio.open_nursery() as nursery:
            store = await _begin(config, log, nursery)
            try:
                async with trio.open_nursery() as tasks:
                    if background and not read_only:
                        await store.comeback.catch_up(config.limits.catch_up_shards_max)
                        for run in store.tasks():
                            tasks.start_soon(run)
                        store.reclaimer.wake()
                    yield store
                    tasks.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        if not read_only:
                            await _finish(store)
                    finally:
                        nursery.cancel_scope.cancel()
    finally:
        threads.let_go()
        refused = is_new and engine.get(store_rows.LOG_KEY) is None
        engine.close()
        with trio.CancelScope(shield=True):
            await _close_nodes(members)
        if refused:  # files made in vain must not hinder `recover`
            for name in (DATABASE, DATABASE_LOCK):
                (config.metadata / name).unlink(missing_ok=True)


def _open_engine(config: StoreConfig, *, read_only: bool) -> tuple[Engine, bool]:
    """Open the metadata; return the engine, and whether there was none.  MetadataError."""
    try:
        os.makedirs(config.metadata, mode=0o700, exist_ok=True)
        is_new = not read_only and not (config.metadata / DATABASE).exists()
        if not read_only and os.statvfs(config.metadata).f_flag & os.ST_RDONLY:
            raise MetadataError(
                f"The metadata in {config.metadata} is on a read-only file system: only a mount "
                "with -o ro, or a command that changes nothing, can use it."
            )
    except OSError as error:
        raise MetadataError(
            f"The metadata in {config.metadata} cannot be opened: {error.strerror}."
        ) from error
    engine = Engine(
        config.metadata,
        read_only=read_only,
        limits=config.limits,
        owner=os.path.realpath(config.store),
        guard=store_rows.LOG_KEY,
    )
    return engine, is_new


async def _open_nodes(members: Members, config: StoreConfig, *, read_only: bool) -> None:
    """Open the nodes at the same time; StoreBusyError if another process uses one."""
    busy: list[NodeBusyError] = []
    async with trio.open_nursery() as nursery:
        for member in members.all:
            nursery.start_soon(_open, member, config, read_only, busy)
    if busy:  # a mount without the node would begin a second history
        raise StoreBusyError(str(busy[0]))


async def _replay(
    log: Log, config: StoreConfig, mount: Mount, in_sync: list[int], *, accept_loss: bool
) -> None:
    """Own the nodes and replay their journals."""
    claims = Claims(log.members, mount, read_only=log.read_only)
    await claims.before_replay()
    with log.members.watched():
        start = await threads.run_sync(load_checkpoint, log, config)
        replayed = await threads.run_sync(
            partial(replay, log, start, in_sync, accept_loss=accept_loss)
        )
        suspects = await threads.run_sync(suspect_shards, log, replayed.doubtful)
        await threads.run_sync(refuse_to_begin, log, replayed)
    await claims.after_replay()
    apply_replayed(log, replayed, suspects)
    log.unread_journals = replayed.damaged


async def _begin(config: StoreConfig, log: Log, nursery: trio.Nursery) -> Store:
    """Return the store, ready to serve."""
    ring = Ring.open()
    if ring is not None:
        nursery.start_soon(ring.run)
        for member in log.members.all:
            member.ring = ring
    store = Store(config, log, nursery)
    await log.sample_metadata()
    _adopt_tails(store)
    if log.read_only:
        await _look_at_nodes(store)
    else:
        await _begin_epoch(store)
        nursery.start_soon(store.committer.run)
        nursery.start_soon(store.committer.journal.watch)
    return store


def _within_limits(config: StoreConfig, read_only: bool) -> StoreConfig:
    """Fit the number of open files to the limits of this process; UsageError."""
    limits = config.limits
    if not read_only:
        process_limits.check_file_size(2 * limits.shard_segment_bytes)
    most = min(limits.open_segments_max, process_limits.segments_per_node(len(config.nodes)))
    return replace(config, limits=replace(limits, open_segments_max=most))


async def _look_at_nodes(store: Store) -> list[int]:
    """Continue with the nodes as they are; return the journal segments of all."""
    journals: list[int] = []
    for member in store.log.members.all:
        if not member.out_of_use:
            try:
                journals += take_over(store, member, await member.call(tidy, store, member))
            except FusestoreError as error:
                member.fail(error)
    return journals


async def _close_nodes(members: Members | None) -> None:
    """Close all nodes and release their locks, including nodes out of use."""
    for member in members.all if members is not None else ():
        try:
            if member.is_open and not member.out_of_use:
                await member.call(member.node.disown)
        except (NodeFencedError, NodeReadOnlyError):
            pass  # another mount owns it, or nothing was written since it became read-only
        except NodeError as error:
            logger.warning("%s", error)
        member.node.close()


async def _open(
    member: Member, config: StoreConfig, read_only: bool, busy: list[NodeBusyError]
) -> None:
    try:
        opened = await member.call(
            partial(open_node, config, member.config, read_only=read_only, refuse=False)
        )
        member.open(opened, await member.call(opened.space))
    except NodeReadOnlyError as error:
        await _open(member, config, True, busy)
        if member.is_open:
            member.only_read(None, error)
    except NodeError as error:
        member.standing.refused(error)
        if isinstance(error, NodeBusyError):
            busy.append(error)


def _adopt_tails(store: Store) -> None:
    """Load stripes that were open at a crash into memory."""
    tails: dict[tuple[int, Code], dict[int, bytes]] = {}
    for key, value in store.log.engine.scan(stripe_rows.TAILS_START, stripe_rows.TAILS_END):
        if not tables.readable(key, value):
            continue
        number, offset = stripe_rows.decode_tail_key(key)
        code, data = stripe_rows.decode_tail(value)
        tails.setdefault((number, code), {})[offset] = data
    for (number, code), parts in tails.items():
        store.writer.adopt(number, code, parts)


async def _begin_epoch(store: Store) -> None:
    """Log the replayed changes again, in a new epoch, and checkpoint them."""
    log, committer = store.log, store.committer
    journals = await _look_at_nodes(store)
    refuse_without_foreign(log)
    committer.begin_epoch(journals)
    if log.position.commit == 0 or log.engine.get(store_rows.FORMAT_KEY) != format_row(
        store.config
    ):
        codes = store_rows.encode_codes(log.codes())
        log.apply({store_rows.FORMAT_KEY: format_row(store.config), store_rows.CODES_KEY: codes})
    given_up = log.engine.get(store_rows.GIVEN_UP_KEY)
    if given_up is not None:  # recover writes it to the database only; the journals need it, too
        log.apply({store_rows.GIVEN_UP_KEY: given_up})
        if log.doubt:
            for key in (store_rows.NODES_KEY, *(key for key, _ in log.engine.scan(b"M", b"N"))):
                log.apply({key: log.engine.get(key)})
    store.writer.seal_all()
    try:
        async with committer.lock:
            await committer.commit_now(checkpoint=True)
    except NotDurableError as error:
        problems = " ".join(m.standing.error for m in log.members.all if m.standing.error)
        if store.config.spare_shards:
            problems += (
                " With `spare_shards`, a mount needs more nodes than the data: bring them back, or "
                f"rebuild one of them with 'fusestore repair {store.config.store} NODE'."
            )
        raise NotDurableError(f"The store cannot be mounted. {problems or error}") from error


async def _finish(store: Store) -> None:
    """Commit and checkpoint everything; NotDurableError."""
    committer = store.committer
    store.log.ends_at = trio.current_time() + store.log.limits.full_seconds_max
    async with committer.lock:
        store.writer.seal_all()
        store.reclaimer.strays.unmounting()
        try:
            await committer.commit_now()
            await committer.commit_now(checkpoint=True, cover=True)
        except NotDurableError as error:
            if store.log.broken or not store.log.metadata_error:
                raise
            raise NotDurableError(f"{error} {_without_checkpoint(store)}") from error
        for member in store.log.members.writable:
            try:
                await member.call(_trim, committer, member)
            except NodeLacksError:
                pass  # there was no room for the file
            except NodeError as error:
                logger.warning("%s", error)


def _without_checkpoint(store: Store) -> str:
    """Return what is true after a close that could not write the metadata, and what to do."""
    journals = "The store is closed, and the journals of its nodes hold everything that was written"
    if store.log.pending:
        journals += f" up to commit {store.log.position.commit}; any later change is lost"
    return (
        f"{journals}. If the metadata was moved away, move it back: the next mount reads the rest "
        "from the journals. If it is lost or damaged, move what remains of it away, and run "
        f"'fusestore recover {store.config.store}'."
    )


def _trim(committer: Committer, member: Member) -> None:
    """In a thread: release the room allocated ahead."""
    node = member.node
    if member.in_sync and committer.journal.offset:
        node.truncate(SegmentKind.JOURNAL, committer.journal.segment, committer.journal.offset)
    if member.shards.offset:
        node.truncate(SegmentKind.SHARDS, member.shards.current, member.shards.offset)
