"""Automatic care of nodes: returning nodes are brought back, and nodes that are up are healed."""

from __future__ import annotations

import logging
from itertools import islice
from math import inf

import trio

from ..errors import (
    FusestoreError,
    MetadataError,
    NodeError,
    NodeFullError,
    NodeTimeoutError,
    ReplayError,
)
from ..format.records import SegmentKind
from ..format.store_rows import NEVER_WHOLE
from ..log.lineage import Lineage
from ..log.log import Log
from ..log.pace import Pace
from ..members.member import Member
from ..members.opening import open_node
from ..members.standing import State
from ..nodes.base import Node
from .heal import Healer
from .rejoin import Rejoin, try_to_write
from .writing_again import Resumption

logger = logging.getLogger(__name__)


class Comeback:
    """Checks and heals all nodes at intervals."""

    def __init__(self, log: Log, healer: Healer, rejoin: Rejoin, resumption: Resumption) -> None:
        self._log = log
        self._healer = healer
        self._rejoin = rejoin
        self._resumption = resumption
        log.on_break = self.wake
        self._wake = trio.Event()
        self._hangs: dict[int, int] = {}
        """By node: the calls that hung when it was last retried; it is retried when one ends."""

    def wake(self) -> None:
        """Check now: a node may lack shards."""
        self._wake.set()

    async def run(self) -> None:
        """Heal nodes, and bring back nodes that were away, at intervals, until cancelled."""
        await self._mend_journals()
        while True:
            await self._resumption.attempt()
            async with self._healer.busy:
                for member in self._log.members.all:
                    if member.state is State.UP and not self._log.broken:
                        try:
                            await self._look_after(member)
                        except MetadataError:
                            raise  # no node is to blame for it
                        except NodeFullError as error:
                            member.note_full(error)
                        except FusestoreError as error:
                            self._healer.give_up(member, error)
            if not self._log.broken:  # else each node that answers may still be read
                self._let_go()
            await self.catch_up(None)
            limits, broken = self._log.limits, bool(self._log.broken)
            with trio.move_on_after(limits.retry_seconds_min if broken else limits.probe_seconds):
                await self._wake.wait()
            self._wake = trio.Event()

    def _let_go(self) -> None:
        """Close the nodes that are out of use, so that their disks can be unmounted."""
        for member in self._log.members.all:
            if member.out_of_use and member.is_open:
                member.let_go()

    async def _mend_journals(self) -> None:
        """Rewrite journal segments that could not be read at the mount, from other nodes."""
        async with self._healer.busy:
            for member in self._log.members.in_sync:
                if member.name in self._log.unread_journals:
                    try:
                        await self._rejoin.mend_journal(member)
                        self._log.unread_journals.discard(member.name)
                    except NodeError as error:
                        self._healer.give_up(member, error)
                    except ReplayError as error:
                        logger.warning("The journal of node %s is damaged. %s", member.name, error)

    async def catch_up(self, shards_max: int | None) -> None:
        """Bring back each node that has returned, if it lacks at most `shards_max` shards."""
        for member in self._log.members.all:
            now = trio.current_time()
            if self._log.broken or (member.state is State.UP and shards_max is None):
                continue
            if shards_max is None and member.out_of_use and not member.standing.is_due(now):
                continue
            if member.out_of_use and self._still_hangs(member):
                continue
            if shards_max is not None:
                debt = islice(self._healer.lacks(member), shards_max + 1)
                if sum(1 for _ in debt) > shards_max:
                    continue
            async with self._healer.busy:
                if member not in self._log.members.all:
                    continue  # it was removed meanwhile
                if member.state is not State.UP:
                    await self._bring_back(member, shards_max is not None)
                    continue
                try:  # shards that the last crash tore
                    await self._healer.heal(member)
                except MetadataError:
                    raise  # no node is to blame for it
                except NodeFullError as error:
                    member.note_full(error)
                except FusestoreError as error:
                    member.fail(error)

    def _still_hangs(self, member: Member) -> bool:
        """Whether no call has returned since the last attempt, which hung, too."""
        left = member.calls.left_behind
        return left > 0 and left >= self._hangs.get(member.id, inf)

    async def bring_back_now(self, member: Member) -> None:
        """Bring a node back without a pause; its state tells whether this succeeded."""
        await self._resumption.attempt(now=True)
        async with self._healer.busy:
            if member.state is not State.UP and not self._log.broken:
                await self._bring_back(member, quick=False)

    async def _bring_back(self, member: Member, quick: bool) -> None:
        """Bring a node that was away back in sync; if this fails, try again later."""
        try:
            node = None
            if member.state is not State.REBUILDING:
                node = await member.call(open_node, self._log.members.config, member.config)
                found = await self._rejoin.lineage(member, node)
                if found.foreign and member.standing.holds != NEVER_WHOLE:
                    self._set_apart(member, node, found)
                    return
                await member.call(node.claim)
                on_disk = await member.call(node.segments, SegmentKind.SHARDS)
                if member.was_late:
                    member.shards.begin_after(on_disk)
                    await member.call(try_to_write, node, member.shards.current)
                member.shards.note_present(on_disk)
                member.standing.found(found.last)
            if quick and (member.standing.doubted or member.shards.lost):
                return
            if node is not None:
                await self._rejoin.enter(member, node)
        except MetadataError:
            raise  # no node is to blame for it
        except FusestoreError as error:
            await self._rejoin.refused(member, error)
            if isinstance(error, NodeTimeoutError):
                member.standing.leave_alone(trio.current_time())
                self._hangs[member.id] = member.calls.left_behind
            return
        logger.info("Node %s is back: it gets the data that it missed.", member.name)
        try:
            with self._healer.following(member) as progress:
                # The journal comes after the shards: were it complete, nobody would doubt them.
                if member.standing.doubted or member.shards.lost:
                    await self._rejoin.rebuild_all(member, progress)
                await self._rejoin.copy_journal(member, progress)
                await self._healer.heal(member, Pace(self._log))
                await self._rejoin.join(member, progress)
        except MetadataError:
            raise  # no node is to blame for it
        except FusestoreError as error:
            if not isinstance(error, NodeFullError):
                member.standing.leave_alone(trio.current_time())
            if isinstance(error, NodeTimeoutError):
                self._hangs[member.id] = member.calls.left_behind
            self._healer.give_up(member, error)
        else:
            logger.info("Node %s is up and in sync.", member.name)

    def _set_apart(self, member: Member, node: Node, found: Lineage) -> None:
        """Keep out a node of another history until an operator decides; it is still checked."""
        node.close()
        problem = found.problem(str(self._log.members.config.store), member.name)
        if member.state is not State.FOREIGN:
            logger.error("Node %s: %s", member.name, problem)
        member.standing.set_apart(problem)
        member.standing.leave_alone(trio.current_time())

    async def _look_after(self, member: Member) -> None:
        """Check that a node still answers, and rebuild the shards that it lacks; FusestoreError."""
        await member.call(member.sample)
        if member.shards.lost:
            with self._healer.following(member) as progress:
                await self._rejoin.rebuild_all(member, progress)
        await self._healer.heal(member, Pace(self._log))
        member.lacks_room = ""
