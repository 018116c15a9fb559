"""How often the kernel has been told of each inode, less what it has forgotten.

A dict of a million inodes takes 100 MB; here they take 4 bytes each, as their
numbers lie close together.
"""

from __future__ import annotations

from array import array

_SHIFT = 10
_MASK = (1 << _SHIFT) - 1
_USED = 1 << _SHIFT
"""In each chunk the place behind its counters: how many of them are not zero."""
_EMPTY = array("I", bytes(4 * (_USED + 1)))


class Lookups:
    """Counters by inode number, in chunks of 1024."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}

    def add(self, ino: int) -> None:
        """The kernel is told of an inode once more."""
        chunk = self._chunks.get(ino >> _SHIFT)
        if chunk is None:
            chunk = self._chunks[ino >> _SHIFT] = _EMPTY[:]
        if not chunk[ino & _MASK]:
            chunk[_USED] += 1
        chunk[ino & _MASK] += 1

    def forget(self, ino: int, count: int) -> bool:
        """The kernel forgets `count` of them; whether that was all."""
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
