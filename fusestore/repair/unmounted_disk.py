"""A node without data whose disk is probably not mounted is not rebuilt below the mount point."""

from __future__ import annotations

import os
from pathlib import Path

from ..config.node_identity import IDENTITY_NAME
from ..errors import NodeError, UsageError
from ..members.member import Member
from ..members.members import Members


def check_disk(members: Members, member: Member) -> None:
    """Raise UsageError if a node is empty, and its place is on a disk of something else.

    Such a place is right if the node was there before, or if all nodes of other regions are
    on that disk, too, as in a store for trying out.  NodeError if the place cannot be looked
    at.  Blocks.
    """
    path = member.config.path
    try:
        if (path / IDENTITY_NAME).exists():
            return
        here = _device(path)
    except OSError as error:
        raise NodeError(f"{path} cannot be used: {error.strerror}.") from error
    if member.space is not None and member.space.device == here:
        return
    others = {
        other.space.device
        for other in members.all
        if other.config.region != member.config.region and other.space is not None
    }
    if others == {here} or here not in {*others, _device(members.config.store), _device(Path("/"))}:
        return
    store = members.config.store
    raise UsageError(
        f"{path} is empty or missing, and lies on the root disk, or on a disk that the store uses "
        f"for something else: the disk of node {member.name} is probably not mounted. Mount it. "
        f"To rebuild the node there all the same, use 'fusestore repair {store} {member.name} "
        "--on-this-disk', or give it another place with --to."
    )


def _device(path: Path) -> int:
    """Return the device of a path, or of the directory in which it would be created."""
    while not path.exists():
        path = path.parent
    return os.stat(path).st_dev
