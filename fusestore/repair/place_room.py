"""Whether a place has room for all that a node must hold, before anything is written there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import NodeError
from ..format.records import SegmentKind
from ..log.journal import first_needed
from ..log.log import Log
from ..members.member import Member
from ..nodes.base import Node


async def check_room(log: Log, member: Member, path: Path, shards: int) -> None:
    """Raise NodeError if a node with `shards` bytes of shards does not fit at a path."""
    need = shards + log.limits.reserve_bytes
    first = first_needed(log.engine)
    for other in log.members.in_sync:
        if other is not member:
            need += await other.call(_journal_bytes, other.node, first)
            break
    room = await member.call(_room_at, path)
    if room < need:
        raise NodeError(
            f"{path} has room for {room >> 20:,} MiB, and node {member.name} needs "
            f"{need >> 20:,} MiB: choose a larger disk."
        )


def _journal_bytes(node: Node, first: int) -> int:
    """Return the bytes of the journal that every node needs; in a thread."""
    segments = (n for n in node.segments(SegmentKind.JOURNAL) if n >= first)
    return sum(node.size(SegmentKind.JOURNAL, segment) for segment in segments)


def _room_at(path: Path) -> int:
    """Return the free bytes at a path, which need not exist, and those that it takes itself."""
    taken = 0
    with suppress(OSError):
        for directory, _, files in os.walk(path):
            taken += sum(os.lstat(os.path.join(directory, f)).st_blocks * 512 for f in files)
    found = file_system_of(path)
    return found.f_bavail * found.f_frsize + taken


def file_system_of(path: Path) -> os.statvfs_result:
    """Return the status of the file system of a path, which need not exist; NodeError; blocks."""
    there = path
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        return os.statvfs(there)
    except OSError as error:
        raise NodeError(f"{path} cannot be used: {error.strerror}.") from error
