"""A mount that became read-only because too few nodes were left continues when they are back.

Everything since the last durable commit is still in memory, as nothing was acknowledged
since.  A node is used again as it is only if its own journal proves that it lacks nothing:
it holds the last acknowledged commit, was in sync with it, and holds nothing of a later
epoch, which another daemon would have begun.  Other nodes are brought back as at a mount.
Then a new epoch begins (`Committer.resume`).
"""

from __future__ import annotations

import logging

import trio

from ..commit.committer import Committer
from ..errors import NodeError, NotDurableError
from ..format.records import SegmentKind
from ..format.store_rows import NEVER_WHOLE
from ..log.journal_scan import read_journals
from ..log.log import Log
from ..members.member import Member
from ..members.opening import open_node
from ..members.standing import State
from .heal import Healer
from .rejoin import Rejoin, try_to_write

logger = logging.getLogger(__name__)

_WAIT_SECONDS_MAX = 30.0
_CALM_SECONDS = 60.0
"""A mount that becomes read-only again sooner than this waits longer before the next attempt."""


class Resumption:
    """Sees whether a read-only mount can continue, and lets it."""

    def __init__(self, log: Log, committer: Committer, healer: Healer, rejoin: Rejoin) -> None:
        self._log = log
        self._committer = committer
        self._healer = healer
        self._rejoin = rejoin
        self._resumed_at = float("-inf")
        self._wait = 0.0

    async def attempt(self, *, now: bool = False) -> None:
        """Continue if the mount is read-only, and enough nodes are back; `now`: without a pause."""
        if not now and trio.current_time() < self._resumed_at + self._wait:
            return
        async with self._healer.busy:
            await self.attempt_now()

    async def attempt_now(self) -> None:
        """Like `attempt`, with `Healer.busy` held."""
        log = self._log
        async with self._committer.lock:
            if not log.broken or log.broken_for_good or log.read_only:
                return
            await self._committer.writer.sealer.idle()
            async with trio.open_nursery() as nursery:
                for member in log.members.all:
                    nursery.start_soon(self._look, member)
            if log.members.in_sync and not log.members.can_store(log.code):
                for member in log.members.all:
                    if member.out_of_use and member.is_open:
                        await self._enter(member)
            if not log.members.can_store(log.code):
                return
            self._note_attempt()
            try:
                await self._committer.resume(await self._journals())
            except NotDurableError:
                return
        logger.info("Enough nodes are back: the mount is writable again.")

    def _note_attempt(self) -> None:
        limits, now = self._log.limits, trio.current_time()
        calm = now > self._resumed_at + self._wait + _CALM_SECONDS
        least = limits.retry_seconds_min
        self._wait = least if calm else min(2 * self._wait, _WAIT_SECONDS_MAX)
        self._resumed_at = now

    async def _look(self, member: Member) -> None:
        """Use a node again if it is there, and lacks nothing; see that one in use is there."""
        if member.state is State.UP:
            try:
                if not await member.call(self._lacks_nothing, member):
                    member.fail(NodeError(f"Node {member.name} does not hold the last commit."))
            except NodeError as error:
                member.fail(error)
        elif member.state in (State.SUSPECT, State.DOWN, State.BEHIND):
            try:
                await self._reopen(member)
            except NodeError as error:
                await self._rejoin.refused(member, error)

    async def _reopen(self, member: Member) -> None:
        node = await member.call(open_node, self._log.members.config, member.config)
        member.reopen(node)
        if await member.call(self._lacks_nothing, member):
            await member.call(node.claim)
            await member.call(member.sample)
            on_disk = await member.call(node.segments, SegmentKind.SHARDS)
            if member.was_late:
                member.shards.begin_after(on_disk)
                await member.call(try_to_write, node, member.shards.current)
            member.shards.note_present(on_disk)
            member.resume(on_disk)

    def _lacks_nothing(self, member: Member) -> bool:
        """Whether the journal of a node proves it; NodeError; in a thread."""
        position, standing = self._log.position, member.standing
        journals = read_journals(
            self._log.store, [(member.name, member.node)], position.journal_segment
        )
        if member.name in journals.failed:
            raise journals.failed[member.name]
        last = journals.at(position)
        return (
            last is not None
            and member.id in last.in_sync
            and journals.epoch <= position.epoch
            and (standing.in_sync or standing.holds == position.commit)
            and not standing.doubted
        )

    async def _enter(self, member: Member) -> None:
        """Give new shards to a node that is there, and lacks commits."""
        node = member.node
        try:
            found = await self._rejoin.lineage(member, node)
            if found.foreign and member.standing.holds != NEVER_WHOLE:
                member.standing.set_apart(
                    found.problem(str(self._log.members.config.store), member.name)
                )
                member.let_go()
                return
            await member.call(node.claim)
            await member.call(member.sample)
            on_disk = await member.call(node.segments, SegmentKind.SHARDS)
        except NodeError as error:
            member.standing.refused(error)
            return
        member.shards.note_present(on_disk)
        member.standing.found(found.last)
        member.enter(node, on_disk)

    async def _journals(self) -> list[int]:
        """The journal segments of the nodes that are used; one that cannot list them is not."""
        found: list[int] = []
        for member in self._log.members.writable:
            try:
                found += await member.call(member.node.segments, SegmentKind.JOURNAL)
            except NodeError as error:
                member.fail(error)
        return found
