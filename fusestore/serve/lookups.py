"""The kernel's lookup count of each inode: replies with the inode, minus forgets.

A dict of a million inodes takes 100 MB.  These counters take 4 bytes per inode,
because inode numbers lie close together.
"""

from __future__ import annotations

from array import array

_SHIFT = 10
_MASK = (1 << _SHIFT) - 1
_USED = 1 << _SHIFT
"""The place behind the counters of a chunk: how many of them are not zero."""
_EMPTY = array("I", bytes(4 * (_USED + 1)))


class Lookups:
    """Counters by inode number, in chunks of 1024."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}

    def add(self, ino: int) -> None:
        """Count one more reply with an inode."""
        chunk = self._chunks.get(ino >> _SHIFT)
        if chunk is None:
            chunk = self._chunks[ino >> _SHIFT] = _EMPTY[:]
        if not chunk[ino & _MASK]:
            chunk[_USED] += 1
        chunk[ino & _MASK] += 1

    def forget(self, ino: int, count: int) -> bool:
        """Subtract `count` replies with an inode; return whether none are left."""
        chunk = self._chunks.get(ino >> _SHIFT)
        if chunk is None or not chunk[ino & _MASK]:
            return True
        left = chunk[ino & _MASK] - count
        chunk[ino & _MASK] = max(left, 0)
        if left > 0:
            return False
        chunk[_USED] -= 1
        if not chunk[_USED]:
            del self._chunks[ino >> _SHIFT]
        return True

    def __contains__(self, ino: int) -> bool:
        """Whether the kernel knows an inode."""
        chunk = self._chunks.get(ino >> _SHIFT)
        return chunk is not None and chunk[ino & _MASK] > 0

    def __len__(self) -> int:
        """How many inodes the kernel knows."""
        return sum(chunk[_USED] for chunk in self._chunks.values())
