"""fsck: files on nodes that are not of this store.  They are reported, and not changed."""

from __future__ import annotations

from ..errors import NodeError
from ..format.records import SegmentKind
from ..format.segment_numbers import GAP_MAX, segment_path
from ..members.member import Member
from ..nodes.base import Strays
from ..store.store import Store
from ..text import counted

_FAR_NAMED_MAX = 3
"""The most files with numbers out of reach that are named for each node."""


async def strays(store: Store) -> list[str]:
    """Return a sentence for each node with such files; nodes that do not answer are left out."""
    found = []
    for member in store.log.members.all:
        if member.out_of_use:
            continue
        known = {
            SegmentKind.JOURNAL: [store.committer.journal.segment],
            SegmentKind.SHARDS: member.shards.known,
        }
        try:
            others = await member.call(_strays_of, member, known)
        except NodeError:
            continue
        if others.count:
            more = ", …" if others.count > len(others.names) else ""
            files, are = counted(others.count, "file"), "is" if others.count == 1 else "are"
            found.append(
                f"node {member.name}: {files} in {member.config.path} {are} not of this store, and "
                f"{are} ignored: {', '.join(others.names)}{more}"
            )
    return found


def _strays_of(member: Member, known: dict[SegmentKind, list[int]]) -> Strays:
    """In a thread: files that are not segments, or have numbers the store has not reached."""
    others = member.node.strays()
    far = [
        ascii(segment_path(kind, number))
        for kind, numbers in known.items()
        for number in member.node.segments(kind)
        if number > max(numbers) + GAP_MAX
    ]
    return Strays(others.count + len(far), (*others.names, *far[:_FAR_NAMED_MAX]))
