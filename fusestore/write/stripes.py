"""Stripes whose bytes are in memory, and the buffers that they lie in."""

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
    """What a commit took: its changes, and the stripes that have to be sealed for it."""

    number: int
    changes: dict[bytes, bytes | None]
    stripes: list[UnsealedStripe]
    frozen: bool
    """Whether the changes since the last checkpoint were set aside with it."""


@dataclass(slots=True, eq=False)
class UnsealedStripe:
    """A stripe whose bytes are in memory: open, or being sealed."""

    number: int
    code: Code
    data: memoryview
    pooled: bool
    """Whether `data` goes back to the pool."""
    position: int = 0
    """Bytes used."""
    committed: int = 0
    """Bytes that a commit holds as tails."""
    tails: list[int] = field(default_factory=list)
    """Stripe offsets of its rows of `tails`."""
    owners: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(ino, file offset, length, stripe offset) that no commit holds."""
    owners_count: int = 0
    dead: bool = False
    """No file had bytes of it when a commit took it: that commit gives its room back."""
    batch: CommitBatch | None = None
    """The commit that waits for the stripe to be sealed."""
    sealed: trio.Event = field(default_factory=trio.Event)

    def bytes(self, start: int, end: int) -> bytes:
        """A copy of its bytes start <= i < end."""
        return bytes(self.data[start:end])

    def note_owner(self, ino: int, offset: int, length: int) -> None:
        """The next `length` bytes are to be those of the file at `offset`."""
        if self.owners:
            last, start, size, at = self.owners[-1]
            if last == ino and start + size == offset and at + size == self.position:
                self.owners[-1] = (ino, start, size + length, at)
                return
        self.owners.append((ino, offset, length, self.position))
        self.owners_count += 1

    def take_owner_rows(self) -> Changes:
        """Rows for the owners that no commit holds yet; forgets them."""
        rows = {}
        for start in range(0, len(self.owners), OWNERS_PER_ROW_MAX):
            part = self.owners[start : start + OWNERS_PER_ROW_MAX]
            key = stripe_rows.owners_key(self.number, part[0][3])
            rows[key] = b"".join(OWNER.pack(*owner) for owner in part)
        self.owners = []
        return rows


class Buffers:
    """Memory for stripes, which is reused; a buffer holds arbitrary bytes when it is handed out."""

    def __init__(self, stripe_bytes: int) -> None:
        self._stripe_bytes = stripe_bytes
        self._data: dict[Code, list[bytearray]] = {}
        self._parity: dict[Code, list[bytearray]] = {}

    def data(self, code: Code) -> bytearray:
        """Room for the k data shards of a stripe."""
        free = self._data.setdefault(code, [])
        return free.pop() if free else bytearray(code.k * code.shard_length(self._stripe_bytes))

    def parity(self, code: Code) -> bytearray:
        """Room for its m parity shards."""
        free = self._parity.setdefault(code, [])
        return free.pop() if free else bytearray(code.m * code.shard_length(self._stripe_bytes))

    def release(self, stripe: UnsealedStripe) -> None:
        """A stripe's bytes are needed no more."""
        if stripe.pooled:
            self._data[stripe.code].append(stripe.data.obj)  # type: ignore[arg-type]
        stripe.data = memoryview(b"")  # a commit may keep the stripe for long

    def release_parity(self, code: Code, buffer: bytearray) -> None:
        """Parity shards are on their nodes."""
        self._parity[code].append(buffer)
