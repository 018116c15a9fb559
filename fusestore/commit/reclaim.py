"""Room of freed stripes goes back to the nodes, after the checkpoint that freed them.

Only rows of `reclaim` that a checkpoint holds are worked off: before that, a
replay might still want the shards.  A shard segment of which the tables say that
nothing else lives in it is deleted; else the dead payloads are punched out.
Headers are never punched.
A node that is away keeps its debt.

Segments that a crash left behind, of which no commit speaks, are deleted after
the mount, and only when no stripe has a shard in them: a lost row of `segments`
must not cost what it counts.  While the history is in doubt (`Log.doubt`) they are
in quarantine: kept, and shown by status; and a segment of which the tables say that
nothing lives in it is punched, not deleted.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import trio

from ..errors import NodeError
from ..format import keys, stripe_rows
from ..format.records import Run, record_length
from ..log.log import Log
from ..members.member import Member

log = logging.getLogger(__name__)

Debt = dict[int, list[tuple[int, int]]]
"""By segment: (payload offset, payload length)."""


class Reclaimer:
    """Works off `reclaim` in the background."""

    def __init__(self, state: Log) -> None:
        self._log = state
        self._limits = state.limits
        self._wake = trio.Event()
        self.strays: dict[int, dict[int, int]] = {}
        """By node: segments on it that the tables do not have, and their bytes."""

    def wake(self) -> None:
        """A checkpoint has been made."""
        self._wake.set()

    async def run(self) -> None:
        """Reclaim after each checkpoint, until cancelled."""
        while True:
            if self.strays and not self._log.doubt:
                await self._sweep()
            await self._wake.wait()
            self._wake = trio.Event()
            for member in self._log.members.writable:
                await self._reclaim(member)

    async def _sweep(self) -> None:
        """Delete the segments that no commit speaks of, once no stripe is found in them."""
        for batch in self._log.batches():
            if not any(self.strays.values()):
                break
            for _, row in batch:
                for place in row.shards:
                    strays = self.strays.get(place.node, {})
                    if place.written and place.segment in strays:
                        del strays[place.segment]
                        log.error(
                            "Segment %d of node %d is in use and not in the tables: run "
                            "'fusestore fsck --repair'.",
                            place.segment,
                            place.node,
                        )
            await trio.lowlevel.checkpoint()
        for member in self._log.members.writable:
            node = member.node
            try:
                for segment in self.strays.pop(member.id, ()):
                    await member.call(node.delete, Run.SHARDS, segment)
            except NodeError as error:
                member.fail(error)
        self.strays.clear()

    async def _reclaim(self, member: Member) -> None:
        engine = self._log.engine
        prefix = stripe_rows.reclaim_key(member.id, 0, 0)[:3]
        debt: Debt = defaultdict(list)
        for key, value in engine.scan_stored(prefix, keys.after(prefix)):
            if engine.get(key) is not None:
                _, segment, offset = stripe_rows.decode_reclaim_key(key)
                debt[segment].append((offset, int.from_bytes(value, "little")))
        for segment, shards in debt.items():
            dead = sum(record_length(length) for _, length in shards)
            state = member.shards.states.get(segment)
            try:
                if state is not None and state.live == dead and not self._log.doubt:
                    if segment == member.shards.current:
                        member.shards.roll()
                    await self._drop(member, segment, shards)
                else:
                    for start in range(0, len(shards), self._limits.reclaim_batch):
                        await self._punch(
                            member, segment, shards[start : start + self._limits.reclaim_batch]
                        )
            except NodeError as error:
                member.fail(error)
                return

    async def _drop(self, member: Member, segment: int, shards: list[tuple[int, int]]) -> None:
        """Delete a segment in which nothing lives."""
        await member.call(member.node.delete, Run.SHARDS, segment)
        self._paid(member, segment, shards)
        member.shards.states.pop(segment, None)

    async def _punch(self, member: Member, segment: int, shards: list[tuple[int, int]]) -> None:
        node = member.node

        def punch() -> None:
            for offset, length in shards:
                node.punch(segment, offset, length)

        await member.call(punch)
        self._paid(member, segment, shards)

    def _paid(self, member: Member, segment: int, shards: list[tuple[int, int]]) -> None:
        self._log.apply(
            {stripe_rows.reclaim_key(member.id, segment, offset): None for offset, _ in shards}
        )
        for _, length in shards:
            member.shards.release(segment, length)
        member.shards.changed.add(segment)
