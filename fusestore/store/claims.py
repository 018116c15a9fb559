"""A mount becomes the owner of all nodes, so that what it reads of the journals is all there is.

If a record has not ended, its mount may still write: all nodes are claimed before a journal
is read.  Otherwise a mount that is refused leaves the nodes as they were: they are claimed
after the replay, and no journal segment may have appeared meanwhile, because each mount
begins new ones.  A damaged record counts as one that has not ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from ..config.owner_record import Mount
from ..errors import NodeBusyError, NodeError, StoreBusyError
from ..format.records import SegmentKind
from ..members.member import Member
from ..members.members import Members
from ..nodes.ownership import refusals
from ..nodes.unexpected import costs_only

logger = logging.getLogger(__name__)


class Claims:
    """The claims of one mount on the nodes that are open."""

    def __init__(self, members: Members, mount: Mount, *, read_only: bool) -> None:
        self._members, self._mount, self._read_only = members, mount, read_only
        self._busy: list[NodeBusyError] = []
        self._segments: dict[Member, list[int]] = {}
        """The journal segments before the replay, if the nodes are claimed after it."""

    async def before_replay(self) -> None:
        """Refuse nodes of another owner, and fence an owner that may still write; StoreBusyError.

        Nothing is written before the owners of all nodes are known.
        """
        there = {member.name: member for member in self._there()}
        refused = refusals(self._mount, {name: member.node for name, member in there.items()})
        for error in refused.values():
            if isinstance(error, NodeBusyError) and not self._read_only:
                raise StoreBusyError(str(error)) from error
        for name, error in refused.items():
            if not self._read_only:
                there[name].fail(error)
                continue
            logger.warning("%s This mount only reads, and may miss what is written there.", error)
        found = [member.node.found_owner for member in self._there()]
        if self._read_only:
            return
        if any(record is not None and not record.is_over for record in found):
            await self._each(lambda member: member.node.claim())
        else:
            await self._each(self._note_segments)

    async def after_replay(self) -> None:
        """Claim the nodes that are not claimed yet; StoreBusyError if another mount was quicker."""
        before, self._segments = self._segments, {}
        if not before:
            return
        await self._each(lambda member: member.node.claim())
        await self._each(self._note_segments)
        for member, segments in self._segments.items():
            if before.get(member, segments) != segments:
                raise StoreBusyError(
                    f"Another mount has begun to use node {member.name} at the same time: "
                    "try again."
                )

    def _note_segments(self, member: Member) -> None:
        """In a thread: list the journal segments."""
        self._segments[member] = member.node.segments(SegmentKind.JOURNAL)

    def _there(self) -> list[Member]:
        return [
            m
            for m in self._members.all
            if m.is_open and not m.out_of_use and not m.standing.read_only
        ]

    async def _each(self, step: Callable[[Member], None]) -> None:
        """Do something with each node in a thread; StoreBusyError.

        A node that fails is out of use.
        """
        async with trio.open_nursery() as nursery:
            for member in self._there():
                nursery.start_soon(self._try, member, step)
        if self._busy:
            raise StoreBusyError(str(self._busy[0]))

    async def _try(self, member: Member, step: Callable[[Member], None]) -> None:
        try:
            with costs_only(member.name):
                await member.call(step, member)
        except NodeBusyError as error:
            self._busy.append(error)
        except NodeError as error:
            member.fail(error)
