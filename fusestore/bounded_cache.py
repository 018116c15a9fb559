"""A mapping of bounded size that lets go of the entry that was not used for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LeastRecentlyUsed(Generic[K, V]):
    """Keeps the `size_max` > 0 entries that were read or set last.

    Threads that share one hold a lock for every method but `peek`.
    """

    __slots__ = ("_entries", "_size_max")

    def __init__(self, size_max: int) -> None:
        assert size_max > 0
        self._size_max = size_max
        self._entries: OrderedDict[K, V] = OrderedDict()
        """From the one that was not used for longest to the one that was used last."""

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, key: K, value: V) -> None:
        """Set an entry, which is a use of it; the least recently used one may go."""
        entries = self._entries
        entries[key] = value
        entries.move_to_end(key)
        if len(entries) > self._size_max:
            entries.popitem(last=False)

    def get(self, key: K) -> V | None:
        """An entry's value, which is a use of it; None when there is none."""
        entries = self._entries
        try:
            entries.move_to_end(key)
        except KeyError:
            return None
        return entries[key]

    def peek(self, key: K) -> V | None:
        """An entry's value without using it; needs no lock."""
        return self._entries.get(key)

    def discard(self, key: K) -> None:
        """Remove an entry if it is there."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def items(self) -> ItemsView[K, V]:
        """All entries, the least recently used first; looking at them uses none."""
        return self._entries.items()
