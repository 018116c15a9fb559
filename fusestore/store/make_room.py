"""A request that found no room gets it from what was deleted before it.

Freed room can be used again after a commit, a checkpoint and the removal of the shards.
These happen by themselves within some seconds.  A request that would fail waits for them
instead, as it would on other file systems, and is then tried once more.  When several requests
wait, another one may take what was freed for this one: it is tried again while anything is being
freed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from ..commit.committer import Committer
from ..commit.metadata_dump import MetadataDumper
from ..commit.reclaim import Reclaimer
from ..errors import NodeError, NoSpaceError, NotDurableError
from ..log.log import Log
from ..members.member import Member


async def _no_cleaning() -> bool:
    return False


class RoomMaker:
    """Commits, reclaims and measures for requests that found no room."""

    def __init__(
        self,
        log: Log,
        committer: Committer,
        reclaimer: Reclaimer,
        dumper: MetadataDumper,
        nursery: trio.Nursery,
    ) -> None:
        self._log = log
        self._committer = committer
        self._reclaimer = reclaimer
        self._dumper = dumper
        self._nursery = nursery
        self.clean: Callable[[], Awaitable[bool]] = _no_cleaning
        """Empties stripes; returns whether this gives room back.  Cleaning sets this."""
        self._lock = trio.Lock()
        self._waiting = 0
        self._measured_at = self._paid_at = -math.inf
        """When the last measurement of all devices began, and when all that was owed had last been
        paid, by trio's clock."""

    async def make_room(self, *, removed: bool, asked: float, again: bool) -> bool:
        """Return whether a request that found no room should be tried again.

        `asked` is when it found none, by trio's clock, and `removed` is set if files were removed
        since.  With `again` it was tried again before: then something must be freed now, or have
        been freed since.
        """
        limits = self._log.limits
        if self._waiting >= limits.room_waits_max or self._log.broken:
            return False
        self._waiting += 1
        try:
            if self._log.room.waits:  # what was accepted before is tried again soon
                with trio.move_on_after(2 * limits.full_retry_seconds):
                    await self._log.room.waited.wait()
                if self._log.room.waits:
                    return False
            with trio.move_on_after(limits.full_seconds_max):
                async with self._lock:  # in order
                    if self._paid_at > asked:  # others have made room
                        return True
                    if again and not removed and not self._reclaimer.has_work:
                        return await self.clean() and await self.pay()
                    if removed or self._is_owed():
                        return await self.pay()
                    if self._measured_at < asked:
                        await self._measure()
                    return True
        finally:
            self._waiting -= 1
        return False

    async def catch_up(self) -> None:
        """Let a checkpoint write what waits in memory, if that is much; NoSpaceError."""
        with trio.move_on_after(self._log.limits.full_seconds_max):
            async with self._lock:
                while self._log.room.has_backlog and await self._checkpoint():
                    pass
        if self._log.room.has_backlog:
            raise NoSpaceError("The metadata database takes too long to write what waits for it.")

    async def _checkpoint(self) -> bool:
        """Wait for a commit and its checkpoint, which go on if the caller is cancelled."""
        done, succeeded = trio.Event(), False

        async def run() -> None:
            nonlocal succeeded
            try:
                async with self._committer.lock:
                    await self._committer.commit_now(checkpoint=True)
                succeeded = True
            except NotDurableError:
                pass  # every other caller of a commit learns it, too
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        return succeeded

    def _is_owed(self) -> bool:
        """Whether a commit, a checkpoint or the reclaimer may free room."""
        log = self._log
        return bool(
            log.pending
            or log.unsealed
            or log.engine.changed_keys
            or self._dumper.is_due
            or self._reclaimer.has_work
        )

    async def pay(self) -> bool:
        """Commit, and return when what was freed before can be used; False if this failed."""
        passes = self._reclaimer.passes
        if not await self._checkpoint():
            return False
        await self._reclaimer.passed(passes)
        await self._dumper.done()
        await self._measure()
        self._paid_at = trio.current_time()
        return True

    async def _measure(self) -> None:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for member in self._log.members.writable:
                nursery.start_soon(self._sample, member)
            nursery.start_soon(self._log.sample_metadata)
        self._log.room.refresh()
        self._measured_at = began

    @staticmethod
    async def _sample(member: Member) -> None:
        try:
            await member.call(member.sample)
        except NodeError as error:
            member.fail(error)
