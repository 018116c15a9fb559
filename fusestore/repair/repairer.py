"""The repair path: a node that lost its data gets all of it back, verified.

1. The directory becomes the node again (a wiped one, or one with a damaged `node.toml`,
   gets a new incarnation), and new shards go there.  A node that moves first copies what
   can be read at its old place.
2. The journal is copied from the nodes in sync, read back and checked.
3. Every stripe with a shard on the node is checked, stripes that lack other shards
   first.  An intact shard stays.  Any other is computed from k others and written
   to its old place, or, if the node never had it, to a new one.  It counts after it
   was flushed, read back from the medium and checked.
4. Between two commits the rest of the journal is copied, and the node joins the
   nodes in sync.

Shards that cannot be rebuilt stay in `missing`, and repair reports each file with a
lost shard.  Repair may be killed at any moment and restarted: intact shards are not
rebuilt again.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from ..commit.committer import Committer
from ..config.store_config import NodeConfig, check_places
from ..errors import FusestoreError, InterruptedNodeError, NodeError, NodeFullError, UsageError
from ..format import store_rows
from ..format.store_rows import NEVER_WHOLE
from ..log.log import Log
from ..log.pace import Pace
from ..members.member import Member
from ..members.opening import node_ids, offline_error
from ..members.standing import State
from ..nodes.base import Node
from ..read.reader import Reader
from ..system import threads
from .claim import claim_directory
from .heal import Healer, Progress
from .place_room import check_room
from .rejoin import Rejoin
from .writing_again import Resumption

logger = logging.getLogger(__name__)


class Repairer:
    """Repairs nodes on request, and lets new ones join."""

    def __init__(
        self,
        log: Log,
        reader: Reader,
        committer: Committer,
        healer: Healer,
        rejoin: Rejoin,
        resumption: Resumption,
    ) -> None:
        self._log = log
        self._reader = reader
        self._committer = committer
        self.healer = healer
        self._rejoin = rejoin
        self._resumption = resumption

    def member(self, name: str) -> Member:
        """The node with this name; UsageError if there is none."""
        member = self._log.members.named(name)
        if member is None:
            known = ", ".join(m.name for m in self._log.members.all)
            raise UsageError(f"There is no node {name!r} in this store; there are {known}.")
        return member

    async def repair(
        self,
        name: str,
        progress: Progress,
        *,
        to: Path | None = None,
        rate: float | None = None,
        discard_history: bool = False,
    ) -> dict[str, Any]:
        """Bring a node back, at a new place if one is given; counts, and the paths of lost files.

        A node that holds another history is refused (NodeError) unless that is discarded.

        `rate` is in bytes of I/O a second.  UsageError if there is no such node, or the
        new place is invalid; NodeError if the place cannot be used.
        """
        pace = Pace(self._log, rate, polite=False)
        started = time.monotonic()
        if self.healer.busy.locked():
            progress({"phase": "waiting for other work on the nodes", "done": 0, "total": 1})
        async with self.healer.busy:
            member = self.member(name)
            await self.check_place(member, to)
            before = member.config
            moves = to is not None and to != before.path
            copied = (0, 0)
            if to is not None and moves:
                copied = await self._move(member, to, pace, progress)
            try:
                await self._begin(member, discard_history)
                shards, size = await self._complete(member, progress, pace)
                if moves:  # only now: until then a mount looks for the node where it was
                    await threads.call(self._members_with, member.config)
            except (FusestoreError, OSError) as error:
                member.config = before
                raise self._stopped(member, error) from error
            except BaseException:
                member.config = before
                if member.state is State.REBUILDING:
                    # The client disconnected: a node with only some of its shards must
                    # not be mistaken for one that was only away.
                    interrupted = InterruptedNodeError(f"Repair of node {name} was interrupted.")
                    self.healer.give_up(member, interrupted)
                raise
        seconds = time.monotonic() - started
        size += copied[1]
        self._remember(name, size, seconds)
        lost = set(self.healer.lacks(member))
        inos = {ino for number in lost for ino in self._reader.owners(number)}
        paths = sorted(set((await self._log.paths_of(inos)).values()))
        return {
            "node": name,
            "shards_copied": copied[0],
            "shards_rebuilt": shards,
            "bytes": size,
            "seconds": seconds,
            "away": [m.name for m in self._log.members.all if m.state is not State.UP],
            "stripes_lost": len(lost),
            "unrepairable": paths,
        }

    async def _complete(self, member: Member, progress: Progress, pace: Pace) -> tuple[int, int]:
        """Give a node all that it lacks, and let it join; (shards, bytes) rebuilt."""
        self.healer.rebuilder.told.clear()
        with self.healer.following(member, progress) as tell:
            await self._rejoin.copy_journal(member, tell)
            tell({"phase": "shards", "done": 0, "total": self._rejoin.total(member)})
            shards, size = await self._rejoin.rebuild_all(member, tell, pace)
            more = await self.healer.heal(member, pace)
            await self._rejoin.join(member, tell)
            await self._rejoin.fill_gaps()
        return shards + more[0], size + more[1]

    def _stopped(self, member: Member, error: Exception) -> NodeError:
        """Take a node out of use whose repair failed, unless it only lacks room; the reason."""
        reason = NodeError(f"Repair of node {member.name} stopped: {error}")
        if isinstance(error, NodeFullError) and member.state is State.UP:
            member.note_full(error)  # it serves what it has
        else:
            self.healer.give_up(member, reason)
        return reason

    def past(self) -> list[dict[str, Any]]:
        """The last repairs: `node`, `at` (seconds since the epoch), `bytes`, `seconds`."""
        value = self._log.engine.get(store_rows.REPAIRS_KEY)
        return json.loads(value) if value else []

    def _remember(self, name: str, size: int, seconds: float) -> None:
        """Record how long a repair took."""
        if size == 0:
            return
        known = self.past()
        known.append({"node": name, "at": time.time(), "bytes": size, "seconds": seconds})
        row = json.dumps(known[-self._log.limits.repairs_kept_max :]).encode()
        self._log.apply({store_rows.REPAIRS_KEY: row})

    async def _begin(self, member: Member, discard_history: bool) -> None:
        """Open or create the node's directory, and let new shards go there."""
        if member.state is State.UP:
            try:
                await member.call(member.node.check)
                return
            except NodeError as error:
                member.fail(error)
        node = await member.call(self.prepare_directory, member.config)
        if self._log.broken:  # the mount may be read-only for want of this very node
            node.close()
            await self._resumption.attempt_now()
            if member.writable:
                if member.standing.doubted:
                    member.standing.never_whole()
                return
            node = await member.call(self.prepare_directory, member.config)
        found = await self._rejoin.lineage(member, node)
        if found.foreign and member.standing.holds != NEVER_WHOLE and not discard_history:
            node.close()
            raise NodeError(found.problem(str(self._log.members.config.store), member.name))
        if found.foreign or found.last < max(member.standing.holds, 1):
            member.standing.never_whole()
        await member.call(node.claim)
        await self._rejoin.enter(member, node)

    async def check_place(self, member: Member, to: Path | None) -> None:
        """Check where a node is to be repaired, at another place if one is given.

        FusestoreError if the place cannot be used, or is too small.
        """
        moves = to is not None and to != member.config.path
        if member.config.offline:
            raise offline_error(self._log.members.config, member.config)
        if to is not None and moves:
            self._check_others(member)
            nodes = self._nodes_with(replace(member.config, path=to))
            seconds = self._log.limits.node_seconds_max
            await member.call(self._check_places, nodes, seconds=seconds)
        if member.state is State.DOWN and member.is_open:
            member.let_go()  # deleted files that it has open take room
        if moves or member.state is not State.UP:
            path = to or member.config.path
            await check_room(self._log, member, path, self._rejoin.total(member))

    def _check_others(self, member: Member) -> None:
        """UsageError if the store could not be written to while a node in use moves."""
        members = self._log.members
        others = [other for other in members.all if other is not member]
        away = [other.name for other in others if not other.in_sync]
        ids = {other.id for other in others if other.takes}
        enough = any(other.in_sync for other in others)
        if member.in_sync and not (enough and members.could_store(self._log.code, ids)):
            raise UsageError(
                f"Node {member.name} cannot move now, as {', '.join(away) or 'no other node'} "
                "is not up: the store could not be written to meanwhile. Bring that back first."
            )

    def _check_places(self, nodes: tuple[NodeConfig, ...]) -> None:
        """In a thread: UsageError or ConfigError if these cannot be the nodes of the store."""
        config = self._log.members.config
        problem = check_places(config.store, config.metadata, nodes)
        if problem:
            raise UsageError(problem)
        self._log.members.check_file()

    def _nodes_with(self, moved: NodeConfig) -> tuple[NodeConfig, ...]:
        nodes = self._log.members.config.nodes
        return tuple(moved if node.name == moved.name else node for node in nodes)

    def _members_with(self, moved: NodeConfig) -> None:
        """In a thread: write the new place of a node to the configuration."""
        self._log.members.configure(self._nodes_with(moved))

    async def _move(
        self, member: Member, to: Path, pace: Pace, progress: Progress
    ) -> tuple[int, int]:
        """Use another, empty place for a node from now on; (shards, bytes) copied there.

        The file follows later.

        While the old place can be read, the new one gets its shards: if shards of other
        nodes are bad, it has the only ones.
        """
        copied = (0, 0)
        moved = replace(member.config, path=to)
        node = await member.call(self.prepare_directory, moved)
        try:
            if not member.out_of_use:
                await member.call(node.claim)
                copied = await self._rejoin.copy_shards(member, node, pace, progress)
        except NodeError as error:
            raise NodeError(f"Node {member.name} stays where it is: {error}") from error
        finally:
            node.close()
        member.fail(NodeError(f"Node {member.name} moves to {to}."))
        member.config = moved
        return copied

    async def join(self, member: Member, node: Node, progress: Progress) -> None:
        """Let a new node take part; NodeError if it fails meanwhile.

        It is open and claimed, and the file already has its configuration.
        """
        async with self.healer.busy:
            async with self._committer.lock:
                # A mount from the metadata at this point would give it the same id.
                await self._committer.commit_now(checkpoint=True)
                nodes = self._log.members.config.nodes
                member.id = node_ids(nodes, self._committer.rows)[member.name]
                await self._rejoin.take_in(member, node)
                self._log.members.add(member)
            try:
                with self.healer.following(member, progress) as tell:
                    await self._rejoin.copy_journal(member, tell)
                    await self._rejoin.join(member, tell)
                    await self._rejoin.fill_gaps()
            except BaseException as error:
                # It is a node of the store from now on, and is brought back like any other.
                reason = NodeError(
                    f"Node {member.name} has not joined yet: {str(error).rstrip('.')}."
                )
                if isinstance(error, trio.Cancelled):
                    reason = InterruptedNodeError(f"Adding node {member.name} was interrupted.")
                self.healer.give_up(member, reason)
                raise

    def prepare_directory(self, node: NodeConfig) -> Node:
        """In a thread: open a node's directory, and recreate it if it is gone or wiped."""
        return claim_directory(self._log.members.config, node)
