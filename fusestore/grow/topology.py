"""The nodes of a store: they are added, drained and removed while the store is in use.

`fusestore.toml` lists the nodes.  The log has them as rows, too: the nodes alone are
enough for a recovery.  The file never has fewer nodes than the rows: a new node enters
the file first, when its directory is claimed, and a removed node leaves the file last.
A kill at any moment therefore leaves a node that joins at the next mount, or one whose
removal is to be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import trio

from ..commit.committer import Committer
from ..config.mkfs import check_owner
from ..config.store_config import WEIGHTS, NodeConfig, StoreConfig, check_name, check_places
from ..errors import NodeError, NotDurableError, UsageError
from ..format import keys, store_rows, stripe_rows
from ..format.erasure import Code
from ..format.placement import check_region_rule
from ..format.records import SegmentKind
from ..format.segment_numbers import reachable
from ..log.background_job import LOOK_SECONDS
from ..log.log import Log
from ..members.member import Member
from ..members.opening import offline_error, open_node
from ..repair.comeback import Comeback
from ..repair.place_room import file_system_of
from ..repair.repairer import Repairer
from ..system import threads
from ..text import counted
from .balance import Census, take_census
from .rebalance import Rebalancer

logger = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


class Topology:
    """Changes the set of nodes, one change at a time."""

    def __init__(
        self,
        log: Log,
        committer: Committer,
        repairer: Repairer,
        rebalancer: Rebalancer,
        comeback: Comeback,
    ) -> None:
        self._log = log
        self._limits = log.limits
        self._committer = committer
        self._repairer = repairer
        self._rebalancer = rebalancer
        self._comeback = comeback
        self._changing = trio.Lock()

    # --- listing -------------------------------------------------------------

    async def list(self) -> dict[str, Any]:
        """The nodes, their load, and their shares."""
        census = await take_census(self._log)
        return {
            "nodes": [
                {
                    "name": member.name,
                    "region": member.config.region,
                    "path": str(member.config.path),
                    "weight": member.config.weight,
                    "state": str(member.state),
                    "draining": member.config.draining,
                    "drained": member.config.draining and not census.shards[member.id],
                    "problem": member.standing.error or self._rebalancer.stuck.get(member.id, ""),
                    "shards": census.shards[member.id],
                    "bytes": census.held[member.id],
                    "share_bytes": int(census.share[member.id]),
                    "bytes_free": member.space.free if member.space else 0,
                }
                for member in self._log.members.all
            ],
            "off_balance": census.off_balance,
            "rebalance": await self._rebalancer.command(
                "status", None, wait=False, progress=lambda message: None
            ),
        }

    # --- adding --------------------------------------------------------------

    async def add(
        self, name: str, region: str, path: Path, weight: float | None, progress: Progress
    ) -> dict[str, Any]:
        """Add a node; a repeated call continues an interrupted one.  UsageError, NodeError."""
        self._log.transaction()  # raises when nothing can be changed
        async with self._changing:
            members = self._log.members
            member = members.named(name)
            if member is not None:
                same = member.config.weight if weight is None else weight
                if member.config != NodeConfig(name, region, path, same):
                    raise UsageError(f"There is already a node {name!r}: choose another name.")
                if not member.in_sync:  # an earlier call was interrupted
                    await self._repairer.repair(name, progress)
            else:
                member = await self._new(name, region, path, weight)
                await self._join(member, progress)
        weight = member.config.weight
        return {"node": name, "region": region, "path": str(path), "weight": weight}

    async def _new(self, name: str, region: str, path: Path, weight: float | None) -> Member:
        """Return a new node, which is not of the store yet; UsageError if it cannot be."""
        problem = check_name(name) or check_name(region)
        if weight is not None and not WEIGHTS[0] <= weight <= WEIGHTS[1]:
            problem = f"A weight is a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}."
        if problem:
            raise UsageError(problem)
        config = NodeConfig(name, region, path, 1.0 if weight is None else weight)
        member = Member(0, config, self._limits, holds=store_rows.NEVER_WHOLE)
        member.ring = self._log.members.all[0].ring
        await member.call(self._check_place, config)
        if weight is None:
            member.config = replace(config, weight=await self._weight_by_size(member))
        return member

    async def _join(self, member: Member, progress: Progress) -> None:
        """Claim the directory of a new node, write it to the file, and let it take part."""
        members = self._log.members
        node = await member.call(self._repairer.prepare_directory, member.config)
        try:
            await member.call(node.claim)
            await threads.call(members.configure, self._with(member.config))
        except BaseException:
            node.close()
            raise
        await self._repairer.join(member, node, progress)

    def _with(self, new: NodeConfig) -> tuple[NodeConfig, ...]:
        others = (node for node in self._log.members.config.nodes if node.name != new.name)
        return (*others, new)

    async def _weight_by_size(self, new: Member) -> float:
        """Return the weight of a new node by the size of its disk and those in its region."""
        region = new.config.region
        there = [m for m in self._log.members.all if m.config.region == region and m.space]
        sizes = sum(member.space.total for member in there if member.space is not None)
        if not sizes:
            return 1.0
        found = await new.call(file_system_of, new.config.path)
        size = found.f_blocks * found.f_frsize
        weight = round(size * sum(member.config.weight for member in there) / sizes, 2)
        return min(max(weight, WEIGHTS[0]), WEIGHTS[1])

    def _check_place(self, node: NodeConfig) -> None:
        """In a thread: raise UsageError or ConfigError if a new node cannot be at its place."""
        config = self._log.members.config
        problem = check_places(config.store, config.metadata, self._with(node))
        if problem:
            raise UsageError(problem)
        check_owner(config.store, node.path)
        self._log.members.check_file()

    # --- draining ------------------------------------------------------------

    async def drain(
        self, name: str, *, cancel: bool, wait: bool, progress: Progress
    ) -> dict[str, Any]:
        """Give a node no new shards, and move its shards away; with `wait`, until it has none.

        It continues without the client, and after a restart.  UsageError if the store
        needs the node, NodeError if no more shards can be moved.
        """
        self._log.transaction()
        async with self._changing:
            member = self._repairer.member(name)
            if cancel:
                await self._set_draining(member, False)
                return {"node": name, "draining": False, "drained": False}
            census = await take_census(self._log)
            if not member.config.draining:
                self._check_without(member, self._codes(census))
                await self._check_room(member, census)
                await self._set_draining(member, True)
            self._rebalancer.stuck.pop(member.id, None)  # it is retried
            self._rebalancer.wake()
        before, total = self._rebalancer.moved[member.id], census.held[member.id]
        while wait and not self._is_drained(member):
            if not member.config.draining:
                raise UsageError(f"Draining {name} was cancelled.")
            stuck = self._rebalancer.stuck.get(member.id)
            if stuck:
                raise NodeError(f"{name} is not drained yet, and is retried automatically: {stuck}")
            done = min(self._rebalancer.moved[member.id] - before, total)
            progress({"phase": f"drain {name}", "done": done, "total": total})
            await trio.sleep(LOOK_SECONDS)
        return {
            "node": name,
            "draining": True,
            "drained": self._is_drained(member),
            "bytes": self._rebalancer.moved[member.id] - before,
        }

    def _is_drained(self, member: Member) -> bool:
        """Return whether a node has no shards left, or was removed."""
        return member.id in self._rebalancer.drained or member not in self._log.members.all

    async def _set_draining(self, member: Member, draining: bool) -> None:
        members, before = self._log.members, member.config
        after = replace(before, draining=draining)
        members.reconfigured(member, after)
        if not members.can_store(self._log.code):
            members.reconfigured(member, before)
            raise UsageError(
                f"{member.name} cannot be drained now: too few of the other nodes are up."
            )
        nodes = (after if node.name == after.name else node for node in members.config.nodes)
        try:
            await threads.call(members.configure, tuple(nodes))
        except BaseException:
            members.reconfigured(member, before)
            raise
        self._rebalancer.drained.discard(member.id)
        async with self._committer.lock:
            await self._committer.commit_now()

    def _codes(self, census: Census) -> set[Code]:
        """Codes that stripes have or new stripes may get."""
        return {*self._log.codes(), *census.codes}

    def _check_without(self, member: Member, codes: Iterable[Code]) -> None:
        """UsageError if, without a node, a code in use would not survive the loss of a region."""
        members = self._log.members
        regions = [
            other.config.region
            for other in members.all
            if other is not member and not other.config.draining
        ]
        if not regions:
            raise UsageError(f"{member.name} cannot leave the store: it is the last node.")
        for code in sorted(codes, key=str):
            problem = check_region_rule(code, regions)
            if problem and not members.config.allow_unsafe:
                raise UsageError(
                    f"{member.name} cannot leave the store, as it is the last node of region "
                    f"{member.config.region}: {problem[0].lower()}{problem[1:]}"
                )

    async def _check_room(self, member: Member, census: Census) -> None:
        """UsageError if the other nodes of a region have no room for the data of a node."""
        region = member.config.region
        others = [m for m in self._log.members.all if m is not member and m.takes]
        inside = [m for m in others if m.config.region == region] or others
        for other in inside:
            with suppress(NodeError):
                await other.call(other.sample)
        left = {m.space.device: self._log.room.left_on(m) for m in inside if m.space is not None}
        room = sum(max(0, size) for size in left.values())
        if room < census.held[member.id]:
            raise UsageError(
                f"The other nodes of region {region} have room for {room >> 20:,} MiB, and "
                f"{member.name} holds {census.held[member.id] >> 20:,} MiB: add a node first."
            )

    # --- offline ---------------------------------------------------------------

    async def offline(self, name: str, *, force: bool) -> dict[str, Any]:
        """Close a node until it is online again, also after a restart; UsageError.

        Without `force`, this is refused if the store could not be written to without the node.
        """
        members = self._log.members
        async with self._changing:
            member = self._repairer.member(name)
            others = [other for other in members.all if other is not member]
            enough = any(other.in_sync for other in others) and members.could_store(
                self._log.code, {other.id for other in others if other.takes}
            )
            used = member.takes or member.in_sync
            if used and not enough and not force and not member.config.offline:
                raise UsageError(
                    f"Without {name}, the store could not be written to: too few of the other "
                    "nodes are up. With --force, the mount is read-only until the node is back."
                )
            async with self._committer.lock:
                await self._commit_if_possible()  # the node has flushed what it was given
                await self._configure(member, replace(member.config, offline=True))
                error = offline_error(members.config, member.config)
                if member.out_of_use:
                    member.standing.refused(error)
                else:
                    member.fail(error)
                member.let_go()
                await self._commit_if_possible()
            await self._until_unused(member)
        return self._state(member)

    async def _until_unused(self, member: Member) -> None:
        """Wait until no attempt to bring the node back has its files open."""
        healer = self._repairer.healer
        if healer.running is not None and healer.running.node != member.id:
            return
        with trio.move_on_after(self._log.limits.node_seconds_max):
            async with healer.busy:
                pass

    async def online(self, name: str) -> dict[str, Any]:
        """Use a node again that was taken offline; UsageError."""
        async with self._changing:
            member = self._repairer.member(name)
            if member.config.offline:
                await self._configure(member, replace(member.config, offline=False))
        await self._comeback.bring_back_now(member)
        return self._state(member)

    async def _commit_if_possible(self) -> None:
        with suppress(NotDurableError):
            await self._committer.commit_now()

    async def _configure(self, member: Member, after: NodeConfig) -> None:
        """Change the configuration of a node, in the file, too; ConfigError."""
        members = self._log.members
        nodes = (after if node.name == after.name else node for node in members.config.nodes)
        await threads.call(members.configure, tuple(nodes))
        members.reconfigured(member, after)

    @staticmethod
    def _state(member: Member) -> dict[str, Any]:
        path, problem = str(member.config.path), member.standing.error
        return {"node": member.name, "path": path, "state": str(member.state), "problem": problem}

    # --- removing ------------------------------------------------------------

    async def remove(self, name: str) -> dict[str, Any]:
        """Remove a drained node from the store, and empty it; UsageError."""
        self._log.transaction()
        store = self._log.members.config.store
        async with self._changing, self._repairer.healer.busy:
            member = self._repairer.member(name)
            if not member.config.draining:
                raise UsageError(
                    f"Node {name} is in use: drain it first, with "
                    f"'fusestore node drain {store} {name}'."
                )
            await self._committer.commit()
            census = await take_census(self._log)
            if census.shards[member.id]:
                left = counted(census.shards[member.id], "shard")
                raise UsageError(
                    f"Node {name} still has {left}: wait until "
                    f"'fusestore node drain {store} {name}' has finished."
                )
            self._check_without(member, self._codes(census))
            members = self._log.members
            if not any(other.in_sync for other in members.all if other is not member):
                raise UsageError(f"{name} cannot be removed: no other node holds every commit.")
            await threads.call(members.check_file)
            await self._forget(member)
            rest = tuple(node for node in members.config.nodes if node.name != name)
            await threads.call(members.configure, rest)
            emptied = True
            try:
                journal, shards = self._committer.journal.segment, [*member.shards.states]
                await member.call(_clear, members.config, member.config, journal, shards)
            except NodeError as error:
                logger.warning("The data of removed node %s could not be deleted: %s", name, error)
                emptied = False
            member.node.close()
        return {"node": name, "path": str(member.config.path), "emptied": emptied}

    async def _forget(self, member: Member) -> None:
        """Delete all rows of a node; the metadata and all other nodes have flushed this."""
        engine = self._log.engine
        owed = stripe_rows.reclaim_key(member.id, 0, 0)[:3]
        missing = stripe_rows.missing_prefix(member.id)
        for prefix in (owed, missing):
            batch = self._limits.reclaim_batch
            while rows := list(islice(engine.scan(prefix, keys.after(prefix)), batch)):
                self._log.apply({key: None for key, _ in rows})
                await trio.lowlevel.checkpoint()
        async with self._committer.lock:
            await self._committer.commit_now()
            self._log.members.remove(member)
            for prefix in (owed, missing, stripe_rows.segment_key(member.id, 0)[:3]):
                rows = list(engine.scan(prefix, keys.after(prefix)))
                self._log.apply({key: None for key, _ in rows})
            await self._committer.commit_now(checkpoint=True, cover=True)
            await self._committer.commit_now(cover=True)


def _clear(config: StoreConfig, place: NodeConfig, journal: int, shards: list[int]) -> None:
    """In a thread: delete the segments of a node that the store can have made, then the node.

    `journal` is the current segment, `shards` are those with rows.  NodeError if the place
    has another node now, or has other files.
    """
    node = open_node(config, place)
    try:
        node.claim()
        for kind, known in ((SegmentKind.SHARDS, shards), (SegmentKind.JOURNAL, [journal])):
            for segment in reachable(node.segments(kind), [0, *known]):
                node.delete(kind, segment)
        node.remove()
    finally:
        node.close()
