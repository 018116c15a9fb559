"""Stripes whose bytes are in memory, and their buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from ..format import stripe_rows
from ..format.erasure import Code
from ..format.records import Changes
from ..format.stripe_rows import OWNER
from ..limits import OWNERS_PER_ROW_MAX


@dataclass(slots=True)
class CommitBatch:
    """The contents of a commit: its changes, and the stripes that must be sealed for it."""

    number: int
    changes: dict[bytes, bytes | None]
    stripes: list[UnsealedStripe]
    frozen: bool
    """Whether this commit also set aside the changes since the last checkpoint."""


@dataclass(slots=True, eq=False)
class UnsealedStripe:
    """A stripe whose bytes are in memory: open, or being sealed."""

    number: int
    code: Code
    data: memoryview
    pooled: bool
    """Whether `data` goes back to the pool."""
    rewritten: bool = False
    """Whether it gets bytes of other stripes, which live long, instead of new ones."""
    position: int = 0
    """Bytes used."""
    committed: int = 0
    """Bytes that a commit holds as tails."""
    tails: list[int] = field(default_factory=list)
    """The stripe offsets of its rows of `tails`."""
    owners: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(ino, file offset, length, stripe offset) of owners that no commit holds."""
    owners_count: int = 0
    is_placed: bool = False
    """Whether its shards have places, so that the devices count them."""
    dead: bool = False
    """No file had bytes in the stripe when a commit took it: this commit frees its room."""
    batch: CommitBatch | None = None
    """The commit that waits for the stripe to be sealed."""
    is_sealing: bool = False
    """It is being coded or written, or was."""
    sealed: trio.Event = field(default_factory=trio.Event)

    def bytes(self, start: int, end: int) -> bytes:
        """Return a copy of its bytes start <= i < end."""
        return bytes(self.data[start:end])

    def begin_anew(self) -> None:
        """Belong to no commit, and be sealed once more."""
        self.batch, self.dead, self.sealed = None, False, trio.Event()
        self.is_placed = self.is_sealing = False

    def note_owner(self, ino: int, offset: int, length: int) -> None:
        """Record that the next `length` bytes belong to the file at `offset`."""
        if self.owners:
            last, start, size, at = self.owners[-1]
            if last == ino and start + size == offset and at + size == self.position:
                self.owners[-1] = (ino, start, size + length, at)
                return
        self.owners.append((ino, offset, length, self.position))
        self.owners_count += 1

    def take_owner_rows(self) -> Changes:
        """Return rows of the owners that no commit holds yet, and forget them."""
        rows = {}
        for start in range(0, len(self.owners), OWNERS_PER_ROW_MAX):
            part = self.owners[start : start + OWNERS_PER_ROW_MAX]
            key = stripe_rows.owners_key(self.number, part[0][3])
            rows[key] = b"".join(OWNER.pack(*owner) for owner in part)
        self.owners = []
        return rows


class Buffers:
    """A pool of memory for stripes; a new buffer holds arbitrary bytes."""

    def __init__(self, stripe_bytes: int) -> None:
        self._stripe_bytes = stripe_bytes
        self._data: dict[Code, list[bytearray]] = {}
        self._parity: dict[Code, list[bytearray]] = {}

    def data(self, code: Code) -> bytearray:
        """Return a buffer for the k data shards of a stripe."""
        free = self._data.setdefault(code, [])
        return free.pop() if free else bytearray(code.k * code.shard_length(self._stripe_bytes))

    def parity(self, code: Code) -> bytearray:
        """Return a buffer for the m parity shards of a stripe."""
        free = self._parity.setdefault(code, [])
        return free.pop() if free else bytearray(code.m * code.shard_length(self._stripe_bytes))

    def release(self, stripe: UnsealedStripe) -> None:
        """Return the buffer of a stripe to the pool."""
        if stripe.pooled:
            self._data[stripe.code].append(stripe.data.obj)  # type: ignore[arg-type]
        stripe.data = memoryview(b"")  # a commit may keep the stripe for long

    def release_parity(self, code: Code, buffer: bytearray) -> None:
        """Return a buffer of parity shards to the pool."""
        self._parity[code].append(buffer)
