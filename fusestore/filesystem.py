"""The file system of an open store: names, attributes and contents put together."""

from __future__ import annotations

import trio

from .attributes import Attributes
from .contents import Contents
from .store import Store
from .tree import Tree


class FileSystem:
    """What a face needs: `tree`, `contents`, `attributes`, `commit` and `space`."""

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self.log = store.log
        self.tree = Tree(store.log)
        store.log.path_of = self.tree.path
        self.contents = Contents(store.log, store.reader, store.writer, nursery)
        self.attributes = Attributes(
            store.log, self.tree, store.reader, allow_unsafe=store.config.allow_unsafe
        )
        self.commit = store.committer.commit

    async def begin(self) -> None:
        """Make the root of a new store; end what the last mount left half done."""
        if not self.log.read_only:
            self.tree.make_root()
            await self.contents.resume()

    def space(self) -> tuple[int, int]:
        """(total, free) bytes of file data in the store's default code."""
        return self.log.members.usable(self.log.code, self.log.spaces())
