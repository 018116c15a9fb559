"""The repair path: a node that lost its data gets all of it again, and proves it.

1. The directory becomes the node again (a wiped one gets a new incarnation), and
   new shards go there.
2. The journal is copied from the nodes in sync, read back and checked.
3. Every stripe with a shard on the node, those that lack other shards first: a
   shard that is there and intact stays; any other is computed from k others and
   written where it was, or, if the node never had it, to a new place.  It counts
   when it was flushed, read back from the medium and checked.
   A node that was only away, and still holds what it held, is not read through:
   `missing` has what it lacks.
4. Between two commits the rest of the journal is copied, and the node joins those
   that are in sync.

What cannot be rebuilt stays in `missing` and is named, file by file.  Repair
may be killed at any moment and begun again: what is intact is not done twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio

from ..commit.committer import Committer
from ..config.store_config import (
    IDENTITY_NAME,
    IDENTITY_VERSION,
    NodeConfig,
    NodeIdentity,
    check_places,
    sync_directory,
    write_identity,
)
from ..errors import FusestoreError, NodeError, NodeIdentityError, NodeTimeoutError, UsageError
from ..format import keys, store_rows, stripe_rows
from ..format.records import Run
from ..format.stripe_rows import Stripe
from ..log.journal import copy_journals, first_needed, last_commit
from ..log.log import Log
from ..log.pace import Pace
from ..members.members import Member, State, node_ids, open_node
from ..nodes.base import Node
from ..read.reader import Reader
from .rebuild import Here, Rebuilder, not_intact

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Running:
    """A repair under way."""

    node: int
    by_itself: bool
    """Nobody asked for it: a node came back, or lacks some shards."""
    phase: str = "begin"
    """begin, journal, shards or healing."""
    since: float = 0.0
    """When the phase began, by the monotonic clock."""
    done: int = 0
    total: int = 0
    """Bytes of the phase; of healing: shards, and 0, as `missing` has what is left."""

    def enter(self, phase: str, done: int, total: int) -> None:
        """Say how far it is."""
        if phase != self.phase:
            self.phase, self.since = phase, time.monotonic()
        self.done, self.total = done, total


class Repairer:
    """Heals shards, and brings nodes back."""

    def __init__(self, state: Log, reader: Reader, committer: Committer) -> None:
        self._log = state
        self._limits = state.limits
        self._reader = reader
        self._committer = committer
        self.rebuilder = Rebuilder(state, reader)
        self.busy = trio.Lock()
        """Held while a node is brought back or shards are healed or moved."""
        self._wake = trio.Event()
        self._retry_at: dict[int, float] = {}
        self._retry_wait: dict[int, float] = {}
        self.running: Running | None = None
        """What repairs, or heals, right now: one node at a time."""

    @contextmanager
    def _following(self, member: Member, progress: Progress | None = None) -> Iterator[Progress]:
        """Let `running` say how far a repair is, besides whom the caller tells."""
        outer = self.running
        running = self.running = outer or Running(member.id, by_itself=progress is None)

        def tell(message: dict[str, Any]) -> None:
            running.enter(message["phase"], message["done"], message["total"])
            if progress is not None:
                progress(message)

        try:
            yield tell
        finally:
            self.running = outer

    # --- healing -------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to heal."""
        self._wake.set()

    async def run(self) -> None:
        """Heal, and bring back nodes that were away, now and then, until cancelled."""
        while True:
            async with self.busy:
                for member in self._log.members.all:
                    if member.state is State.UP:
                        try:
                            await self._look_after(member)
                        except FusestoreError as error:
                            member.fail(error)
                            self._committer.ask()
            await self.catch_up(None)
            with trio.move_on_after(self._limits.probe_seconds):
                await self._wake.wait()
            self._wake = trio.Event()

    async def catch_up(self, shards_max: int | None) -> None:
        """Bring back each node that was away and is there again, if it lacks at most that much."""
        for member in self._log.members.all:
            now = trio.current_time()
            if self._log.broken or (member.state is State.UP and shards_max is None):
                continue
            if shards_max is None and member.unused:
                # What has just failed is left alone for a while.
                at = self._retry_at.setdefault(member.id, now + self._limits.retry_seconds_min)
                if now < at:
                    continue
            debt = islice(self._lacks(member), None if shards_max is None else shards_max + 1)
            if shards_max is not None and sum(1 for _ in debt) > shards_max:
                continue
            async with self.busy:
                if member not in self._log.members.all:
                    continue  # it was removed meanwhile
                if member.state is not State.UP:
                    await self._bring_back(member, shards_max is not None)
                    continue
                try:  # shards that the last crash tore
                    await self._heal(member)
                except FusestoreError as error:
                    member.fail(error)

    async def _bring_back(self, member: Member, quick: bool) -> None:
        """Let a node that was away be in sync again; when it cannot be, try later."""
        try:
            node = None
            if member.state is not State.REBUILDING:
                node = await member.call(open_node, self._log.members.config, member.config)
                last = await member.call(last_commit, self._log.store, member.name, node)
                member.note_segments(await member.call(node.segments, Run.SHARDS))
                member.doubted = last < member.holds
            if quick and (member.doubted or member.lost_segments):
                return
            if node is not None:
                await self._enter(member, node)
        except FusestoreError as error:
            member.error = str(error)
            if isinstance(error, NodeIdentityError):
                member.state = State.DOWN
            elif isinstance(error, NodeTimeoutError):
                self._retry_later(member)
            return
        log.info("Node %s is there again: it gets what it missed.", member.name)
        try:
            with self._following(member) as progress:
                await self._journal_first(member, progress)
                if member.doubted or member.lost_segments:
                    await self._all_shards(member, progress)
                await self._heal(member, Pace(self._log))
                await self._join(member, progress)
        except FusestoreError as error:
            self._retry_later(member)
            member.fail(error)
            self._committer.ask()
        else:
            self._retry_wait.pop(member.id, None)
            self._retry_at.pop(member.id, None)
            member.suspicions = 0
            log.info("Node %s is up and in sync.", member.name)

    def _retry_later(self, member: Member) -> None:
        """Leave a node alone for a while, twice as long each time."""
        member.suspicions += 1
        wait = min(
            2 * self._retry_wait.get(member.id, self._limits.retry_seconds_min),
            self._limits.retry_seconds_max,
        )
        self._retry_wait[member.id] = wait
        self._retry_at[member.id] = trio.current_time() + wait

    async def heal(self) -> None:
        """Rebuild what nodes that are up lack."""
        async with self.busy:
            for member in self._log.members.all:
                if member.state is State.UP:
                    try:
                        await self._heal(member, Pace(self._log))
                    except FusestoreError as error:
                        member.fail(error)
                        self._committer.ask()

    async def look_at(self, member: Member) -> None:
        """Notice now whether a node is still there."""
        if member.node is not None and not member.unused:
            try:
                await member.call(member.sample)
            except NodeError as error:
                member.fail(error)
                self._committer.ask()

    async def _look_after(self, member: Member) -> None:
        """See that a node is still there, and give it what it lacks; FusestoreError."""
        assert member.node is not None
        await member.call(member.sample)
        if member.lost_segments:
            with self._following(member) as progress:
                await self._all_shards(member, progress)
        await self._heal(member, Pace(self._log))

    async def _heal(self, member: Member, pace: Pace | None = None) -> tuple[int, int]:
        """Rebuild what `missing` has of a node; (shards, bytes) rebuilt; NodeError."""
        if next(self._lacks(member), None) is None:
            return 0, 0
        with self._following(member):
            return await self._heal_all(member, pace)

    async def _heal_all(self, member: Member, pace: Pace | None) -> tuple[int, int]:
        shards = size = 0
        start = prefix = stripe_rows.missing_prefix(member.id)
        while True:
            if self.running is not None:
                self.running.enter("healing", shards, 0)
            rows = list(
                islice(
                    self._log.engine.scan(start, keys.after(prefix)),
                    self._limits.repair_batch,
                )
            )
            if not rows:
                return shards, size
            start = rows[-1][0] + b"\0"
            wanted: dict[int, list[int]] = {}
            for key, _ in rows:
                _, number, index = stripe_rows.decode_missing_key(key)
                row = self._log.stripe(number)
                here = [place.node for place in row.shards] if row is not None else []
                if here[index : index + 1] == [member.id]:
                    wanted.setdefault(number, []).append(index)
                else:  # it moved meanwhile
                    self._log.apply({key: None})
            if pace is not None:
                await pace.spend(sum(self.rebuilder.cost(number) for number in wanted))
            more = await self.rebuilder.rebuild(member, wanted)
            shards, size = shards + more[0], size + more[1]

    # --- a whole node --------------------------------------------------------

    def member(self, name: str) -> Member:
        """The node with this name; UsageError when there is none."""
        member = self._log.members.named(name)
        if member is None:
            known = ", ".join(m.name for m in self._log.members.all)
            raise UsageError(f"There is no node {name!r} in this store; there are {known}.")
        return member

    async def repair(
        self,
        name: str,
        progress: Progress,
        path_of: Callable[[int], str],
        *,
        to: Path | None = None,
        rate: float | None = None,
    ) -> dict[str, Any]:
        """Bring a node back, at a new place if one is given; counts, and the paths of what is lost.

        `rate` is in bytes of I/O a second.  UsageError when there is no such node, or
        the new place makes no sense; NodeError when its place cannot be used.
        """
        pace = Pace(self._log, rate, polite=False)
        started = time.monotonic()
        async with self.busy:
            member = self.member(name)
            if to is not None and to != member.config.path:
                await self._move(member, to)
            try:
                await self._begin(member)
                self.rebuilder.told.clear()
                with self._following(member, progress) as tell:
                    await self._journal_first(member, tell)
                    tell({"phase": "shards", "done": 0, "total": self._total(member)})
                    shards, size = await self._all_shards(member, tell, pace)
                    more = await self._heal(member, pace)
                    await self._join(member, tell)
            except (FusestoreError, OSError) as error:
                reason = NodeError(f"Repair of node {name} stopped: {error}")
                member.fail(reason)
                self._committer.ask()
                raise reason from error
            except BaseException:
                if member.state is State.REBUILDING:
                    # Who asked went away: a node with only a part of its shards must
                    # not be taken for one that was merely away.
                    member.fail(NodeError(f"Repair of node {name} was interrupted."))
                    self._committer.ask()
                raise
        seconds = time.monotonic() - started
        self._remember(name, size + more[1], seconds)
        lost = set(self._lacks(member))
        self._retry_wait.pop(member.id, None)
        self._retry_at.pop(member.id, None)
        paths = sorted({path_of(ino) for number in lost for ino in self._reader.owners(number)})
        return {
            "node": name,
            "shards_rebuilt": shards + more[0],
            "bytes": size + more[1],
            "seconds": seconds,
            "stripes_lost": len(lost),
            "unrepairable": paths,
        }

    def past(self) -> list[dict[str, Any]]:
        """The last repairs: `node`, `at` (seconds since the epoch), `bytes`, `seconds`."""
        value = self._log.engine.get(store_rows.REPAIRS_KEY)
        return json.loads(value) if value else []

    def _remember(self, name: str, size: int, seconds: float) -> None:
        """Keep how long repairs took."""
        if size == 0:
            return
        known = self.past()
        known.append({"node": name, "at": time.time(), "bytes": size, "seconds": seconds})
        row = json.dumps(known[-self._limits.repairs_kept_max :]).encode()
        self._log.apply({store_rows.REPAIRS_KEY: row})

    def _lacks(self, member: Member) -> Iterator[int]:
        """Stripes of which a node lacks a shard, as far as that is known."""
        prefix = stripe_rows.missing_prefix(member.id)
        for key, _ in self._log.engine.scan(prefix, keys.after(prefix)):
            yield stripe_rows.decode_missing_key(key)[1]

    def _total(self, member: Member) -> int:
        """About how many bytes the node holds when it is whole."""
        return sum(max(state.live, 0) for state in member.segments.values())

    async def _begin(self, member: Member) -> None:
        """Open or make the node's directory, and let new shards go there."""
        if member.state is State.UP and member.node is not None:
            try:
                await member.call(member.node.check)
                return
            except NodeError as error:
                member.fail(error)
        node = await member.call(self.claim, member.config)
        last = await member.call(last_commit, self._log.store, member.name, node)
        if last < max(member.holds, 1):
            member.holds = store_rows.NEVER_WHOLE  # until it is in sync again
            member.doubted = True
        await self._enter(member, node)

    async def _move(self, member: Member, to: Path) -> None:
        """Give a node another place, in the configuration, too; it is empty yet.

        FusestoreError when it cannot be there; nothing has changed then.
        """
        moved = replace(member.config, path=to)
        config = self._log.members.config
        nodes = tuple(moved if node.name == moved.name else node for node in config.nodes)
        problem = check_places(config.store, config.metadata, nodes)
        if problem:
            raise UsageError(problem)
        await member.call(self.claim, moved)
        await trio.to_thread.run_sync(self._log.members.configure, nodes)
        member.fail(NodeError(f"Node {member.name} moves to {to}."))
        member.config = moved

    async def _enter(self, member: Member, node: Node) -> None:
        """Let new shards go to a node that is not in sync yet."""
        async with self._committer.lock:
            # The loss itself is committed first, so that what it lacks is known.
            await self._committer.commit_now()
            await self._take_in(member, node)

    async def _take_in(self, member: Member, node: Node) -> None:
        on_disk = await member.call(node.segments, Run.SHARDS)
        if member.node is not None:
            member.node.close()
        member.node = node
        member.segment = max([0, member.segment, *member.segments, *on_disk]) + 1
        member.offset = 0
        member.dirty, member.unflushed = set(), []
        member.error = ""
        member.state = State.REBUILDING

    async def join(self, member: Member, progress: Progress) -> None:
        """Let a node that the store has not had take part; NodeError when it fails meanwhile.

        Its configuration is in the file already.
        """
        node = await member.call(self.claim, member.config)
        async with self.busy:
            async with self._committer.lock:
                # With what the metadata has then, a mount would give it the same id.
                await self._committer.commit_now(checkpoint=True)
                nodes = self._log.members.config.nodes
                member.id = node_ids(nodes, self._committer.rows)[member.name]
                await self._take_in(member, node)
                self._log.members.add(member)
            try:
                with self._following(member, progress) as tell:
                    await self._journal_first(member, tell)
                    await self._join(member, tell)
            except BaseException as error:
                # It is a node of the store from now on, and is brought back like any other.
                member.fail(NodeError(f"Node {member.name} has not joined yet: {error}."))
                self._committer.ask()
                raise

    def claim(self, node: NodeConfig) -> Node:
        """In a thread: open a node's directory, made anew if it is gone or wiped."""
        path = node.path
        if not os.path.lexists(path / IDENTITY_NAME):
            if path.is_dir() and set(os.listdir(path)) - {"journal", "shards", "lost+found"}:
                raise NodeIdentityError(
                    f"{path} holds other files than a node's: empty it, or give the node "
                    "another place."
                )
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(path.parent)
            identity = NodeIdentity(
                self._log.store, node.name, node.region, uuid4(), IDENTITY_VERSION
            )
            write_identity(path, identity)
        return open_node(self._log.members.config, node)

    async def _all_shards(
        self, member: Member, progress: Progress, pace: Pace | None = None
    ) -> tuple[int, int]:
        """Go through all stripes, the weakest first; (shards, bytes) rebuilt."""
        pace = pace or Pace(self._log)
        shards = size = done = 0
        total = self._total(member)
        end = self._log.stripes_end()  # later ones are written to the node, or noted as missing
        for weak in (True, False):
            for batch in self._batches(member, weak, end):
                length = sum(row.shard_length for _, row, _ in batch)
                await pace.spend(length)
                bad = await member.call(not_intact, member, batch)
                await pace.spend(sum(self.rebuilder.cost(number) for number in bad))
                more = await self.rebuilder.rebuild(member, bad)
                shards, size = shards + more[0], size + more[1]
                done += sum(len(here) * row.shard_length for _, row, here in batch)
                progress({"phase": "shards", "done": min(done, total), "total": total})
        await self._forget_lost(member)
        return shards, size

    async def _forget_lost(self, member: Member) -> None:
        """All shards of a node have been looked at: what is not there now counts for nothing."""
        assert member.node is not None
        on_disk = await member.call(member.node.segments, Run.SHARDS)
        if next(self._lacks(member), None) is None:
            for segment in member.lost_segments.difference(on_disk):
                member.segments.pop(segment, None)
                member.changed.add(segment)
        member.doubted = False
        member.lost_segments.clear()

    def _batches(self, member: Member, weak: bool, end: bytes) -> Iterator[list[Here]]:
        """Stripes before `end` with shards on a node that lack, or do not lack, shards elsewhere.

        A batch may be empty, so that others can run.
        """
        for rows in self._log.batches(end=end):
            found = [
                (number, row, here)
                for number, row in rows
                if (here := [i for i, place in enumerate(row.shards) if place.node == member.id])
                and self._is_weak(number, row, member) is weak
            ]
            for first in range(0, max(len(found), 1), self._limits.repair_batch):
                yield found[first : first + self._limits.repair_batch]

    def _is_weak(self, number: int, row: Stripe, member: Member) -> bool:
        """Whether a stripe lacks shards besides those on this node."""
        return any(
            place.node != member.id and not self._log.has_shard(number, index, place)
            for index, place in enumerate(row.shards)
        )

    async def _journal_first(self, member: Member, progress: Progress) -> None:
        """Copy the journal as it is, while commits go on; what comes later is copied at the end."""
        if member.in_sync:
            return
        assert member.node is not None
        if member.holds == store_rows.NEVER_WHOLE:  # what it has may be of another history
            await member.call(_drop_journals, member.node)
        if member.late_segment:  # a new file, which no late write knows
            await member.call(member.node.delete, Run.JOURNAL, member.late_segment)
            member.late_segment = 0
        async with self._committer.lock:
            self._committer.roll_journal()
        await self._copy_journals(member, self._committer.journal_segment, progress)

    async def _join(self, member: Member, progress: Progress) -> None:
        """Copy the rest of the journal between two commits, and let the node be in sync."""
        async with self._committer.lock:
            await self._heal(member)
            if not member.in_sync:
                self._committer.roll_journal()
                await self._copy_journals(member, self._committer.journal_segment, progress)
                member.state, member.in_sync, member.holds = State.UP, True, 0
            await self._committer.commit_now(checkpoint=True)

    async def _copy_journals(self, target: Member, before: int, progress: Progress) -> None:
        """Give a node all journal segments below `before`."""
        progress({"phase": "journal", "done": 0, "total": 1})
        await trio.to_thread.run_sync(
            copy_journals,
            self._log.store,
            [m.watched for m in self._log.members.in_sync if m is not target],
            target.watched,
            first_needed(self._log.engine),
            before,
        )
        progress({"phase": "journal", "done": 1, "total": 1})


def _drop_journals(node: Node) -> None:
    for segment in node.segments(Run.JOURNAL):
        node.delete(Run.JOURNAL, segment)
