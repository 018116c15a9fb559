"""A walk through all inodes below a directory, in steps, while the tree changes.

The walk misses nothing.  A new entry is listed in its turn, or it lies in a directory
that was already listed and inherits the caller's change from it.  The tree reports
inodes that are moved, and the walk yields them again.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from itertools import islice
from typing import Self

from ..errors import StaleError
from .tree import Tree


class Walk:
    """A walk; use it as a context manager.

    If the caller awaits while it handles a step, entries of the step may be moved or
    removed meanwhile.  The walk yields moved entries again.
    """

    def __init__(self, tree: Tree, top: int) -> None:
        self._tree = tree
        self._top = top
        self._open: list[tuple[int, int]] = [(top, 0)]
        """Directories being listed, each with its last cookie; the deepest is the last."""
        self._moved: list[int] = []

    def __enter__(self) -> Self:
        self._tree.on_move.append(self._moved.append)
        return self

    def __exit__(self, *error: object) -> None:
        self._tree.on_move.remove(self._moved.append)

    def enter(self, ino: int) -> None:
        """List a directory next."""
        self._open.append((ino, 0))

    def steps(self) -> Iterator[list[tuple[int, int]]]:
        """Yield (directory, inode) of some entries at a time; the caller may `enter` them."""
        while self._open or self._moved:
            if self._moved:
                moved, self._moved[:] = self._moved[:], []
                yield list(self._again(moved))
                continue
            folder, cookie = self._open.pop()
            entries = list(islice(self._tree.entries(folder, cookie), self._tree.limits.walk_batch))
            if len(entries) == self._tree.limits.walk_batch:
                self._open.append((folder, entries[-1][0]))
            yield [(folder, ino) for _, ino, _ in entries]

    def _again(self, moved: list[int]) -> Iterator[tuple[int, int]]:
        for ino in dict.fromkeys(moved):
            if ino != self._top and self._tree.lies_below(ino, self._top):
                yield self._tree.inode(ino).parent, ino

    def files(self) -> Iterator[list[tuple[int, int]]]:
        """Enter all directories, and yield (directory, inode) of the other inodes.

        If the top is not a directory, yield the top.
        """
        try:
            top = self._tree.inode(self._top)
        except StaleError:
            return
        if not stat.S_ISDIR(top.mode):
            yield [(top.parent, self._top)]
            return
        for step in self.steps():
            found = []
            for folder, ino in step:
                try:
                    directory = stat.S_ISDIR(self._tree.inode(ino).mode)
                except StaleError:
                    continue
                if directory:
                    self.enter(ino)
                else:
                    found.append((folder, ino))
            yield found
