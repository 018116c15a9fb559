"""Searching for the paths of inodes, for messages.

The table of inodes has the directory of an inode, but not its name there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice

from ..format import file_rows
from ..format.file_rows import ROOT, Inode
from ..log.log import Log

_DEPTH_MAX = 256


class PathSearch:
    """A search in steps; each looks at a bounded number of rows."""

    def __init__(self, log: Log, inos: Iterable[int]) -> None:
        self._log = log
        self._inos = set(inos)
        self._found: dict[int, tuple[int, bytes]] = {}
        """(directory, name) of inodes; directory 0 if it is unknown."""

    def steps(self) -> Iterator[None]:
        """Search; the tree may change between two steps."""
        wanted = self._inos - {ROOT}
        while wanted:
            below: dict[int, set[int]] = {}
            for count, ino in enumerate(wanted):
                value = self._log.engine.get(file_rows.inode_key(ino))
                parent = Inode.decode(value).parent if value is not None else 0
                self._found[ino] = parent, b"?"
                below.setdefault(parent, set()).add(ino)
                if count % self._log.limits.walk_batch == 0:
                    yield
            for parent, children in below.items():
                if parent:
                    yield from self._list(parent, children)
            wanted = below.keys() - self._found.keys() - {ROOT, 0}

    def at_once(self) -> dict[int, str]:
        """Search without a pause, and return the paths: for a store that serves nobody."""
        for _ in self.steps():
            pass
        return self.paths()

    def _list(self, parent: int, children: set[int]) -> Iterator[None]:
        """Find the names of some inodes in a directory."""
        start, end = file_rows.listing_key(parent, 0), file_rows.listing_key(parent + 1, 0)
        while children:
            rows = list(islice(self._log.engine.scan(start, end), self._log.limits.walk_batch))
            for key, value in rows:
                _, ino, name = file_rows.decode_listing(key, value)
                if ino in children:
                    self._found[ino] = parent, name
                    children.discard(ino)
            if len(rows) < self._log.limits.walk_batch:
                return
            start = rows[-1][0] + b"\0"
            yield

    def paths(self) -> dict[int, str]:
        """Return the paths of the inodes; `?` stands for unknown names."""
        return {ino: self._path(ino) for ino in self._inos}

    def _path(self, ino: int) -> str:
        parts: list[str] = []
        while ino in self._found and len(parts) < _DEPTH_MAX:
            ino, name = self._found[ino]
            parts.append(os.fsdecode(name))
        return "/" + "/".join(reversed(parts))
