"""The log of an open store: changes on their way to the nodes, and who may make them.

Operations change metadata in transactions.  A transaction collects absolute
puts and deletes and applies them together when it succeeded; they are seen at
once, and wait in `pending` for the next commit.  There is no await inside a
transaction, so each is atomic on the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Protocol, Self
from uuid import UUID

import trio

from ..errors import NoSpaceError, ReadOnlyError
from ..format import keys, store_rows, stripe_rows
from ..format.erasure import Code
from ..format.records import Changes, Place, SegmentKind
from ..format.store_rows import Counters, GivenUp, LogPosition
from ..format.stripe_rows import LOST_STRIPE, ShardPlace, Stripe
from ..members.members import Members
from ..metadata.engine import Engine

logger = logging.getLogger(__name__)


async def _unnamed(inos: Iterable[int]) -> dict[int, str]:
    return {ino: f"inode {ino}" for ino in inos}


class Unsealed(Protocol):
    """A stripe whose bytes are in memory; see `write`."""

    code: Code
    tails: list[int]

    def bytes(self, start: int, end: int) -> bytes:
        """A copy of its bytes start <= i < end."""


class Transaction:
    """Changes of one operation; use as a context manager.

    `get` sees the transaction's own changes, `scan` and `last` do not.
    """

    __slots__ = ("_log", "changes", "file_bytes", "files", "stripes")

    def __init__(self, log: Log) -> None:
        self._log = log
        self.changes: dict[bytes, bytes | None] = {}
        self.files = self.file_bytes = self.stripes = 0
        """What to add to the counters."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._log.apply(self.changes)  # RowTooLargeError: nothing has changed
            counters = self._log.counters
            counters.files += self.files
            counters.file_bytes += self.file_bytes
            counters.stripes += self.stripes

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        if key in self.changes:
            return self.changes[key]
        return self._log.engine.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Set the value of a key."""
        self.changes[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key, if it is there."""
        self.changes[key] = None

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values with start <= key < end, in order, before this transaction."""
        return self._log.engine.scan(start, end)

    def last(self, start: bytes, end: bytes) -> tuple[bytes, bytes] | None:
        """The greatest key with start <= key <= end, before this transaction."""
        return self._log.engine.last(start, end)

    # --- stripes -------------------------------------------------------------

    def point_at(self, stripe: int, length: int) -> None:
        """`length` bytes of a stripe came to be part of a file."""
        self.put(stripe_rows.live_key(stripe), stripe_rows.live_value(self._live(stripe) + length))
        self.file_bytes += length

    def let_go(self, stripe: int, length: int) -> None:
        """`length` bytes of a stripe are part of no file any more; the last free it."""
        self.file_bytes -= length
        if stripe == LOST_STRIPE:
            return  # it has no bytes, and is not counted
        left = self._live(stripe) - length
        if left == 0:
            self.delete(stripe_rows.live_key(stripe))
            self._free(stripe)
            return
        if left < 0:
            # The count is wrong, so nobody knows whether files still need the stripe.
            logger.error(
                "Stripe %#x counts %d live bytes too few: it is kept. Run 'fusestore fsck'.",
                stripe,
                -left,
            )
        self.put(stripe_rows.live_key(stripe), stripe_rows.live_value(max(left, 0)))

    def _live(self, stripe: int) -> int:
        live = self.get(stripe_rows.live_key(stripe))
        return stripe_rows.decode_live(live) if live else 0

    def _free(self, stripe: int) -> None:
        value = self.get(stripe_rows.stripe_key(stripe))
        if value is not None:
            self.delete(stripe_rows.stripe_key(stripe))
            self.stripes -= 1
            self.reclaim(stripe, Stripe.decode(value))
        unsealed = self._log.unsealed.get(stripe)
        if unsealed is not None:
            # Its shards, if it is being sealed, are reclaimed by the sealer.
            for offset in unsealed.tails:
                self.delete(stripe_rows.tail_key(stripe, offset))
        prefix = stripe_rows.owners_key(stripe, 0)[:9]
        for key, _ in self.scan(prefix, keys.after(prefix)):
            self.delete(key)

    def reclaim(self, number: int, stripe: Stripe) -> None:
        """Free the room of a stripe's shards after the next checkpoint."""
        for index, place in enumerate(stripe.shards):
            self.delete(stripe_rows.missing_key(place.node, number, index))
            if place.written:
                self.put(*stripe_rows.reclaim_row(place, stripe.shard_length))


class Log:
    """State that the write path, the commit and the operations share."""

    def __init__(
        self, engine: Engine, members: Members, store: UUID, code: Code, *, read_only: bool
    ) -> None:
        self.engine = engine
        self.members = members
        self.limits = members.config.limits
        self.store = store
        self.code = code
        """For files below no directory with a code of its own."""
        self.counters = Counters()
        self.position = LogPosition()
        self.pending: dict[bytes, bytes | None] = {}
        """Changes that no commit has taken yet."""
        self.unsealed: dict[int, Unsealed] = {}
        """Stripes that are read from memory, by number."""
        self.read_only = read_only
        self.broken = ""
        """Why nothing can be committed any more; the mount is read-only then."""
        self.metadata_error = ""
        """Why the last checkpoint failed; nothing may grow until one succeeds."""
        self.rows_in_doubt = 0
        """Rows that the nodes contradict, and that could not be mended, since the mount."""
        self.rows_mended = 0
        """Rows that were wrong, and are right again, since the mount."""
        self.mended: tuple[str, ...] = ()
        """What was wrong in the database when the store was opened, and was mended."""
        self.used_at = 0.0
        """When a file was last read or written, by trio's clock."""
        self.journals = trio.Lock()
        """Held while old journal is deleted, or journals are compared and mended."""
        self.dump_wanted = False
        """A part of the journals cannot be read on any node: a metadata dump takes its place."""
        self._room = 0
        self.paths_of: Callable[[Iterable[int]], Awaitable[dict[int, str]]] = _unnamed
        """Paths of inodes, for people; the file system tells."""
        self.unwritten: Callable[[], int] = lambda: 0
        """Bytes of file data that are not on the nodes yet; the writer tells."""
        self.on_damage: Callable[[], None] = lambda: None
        """Called by who met a row that does not match its checksum; the store mends it."""
        self._next_stripe = 1

    @property
    def doubt(self) -> str:
        """Why what no table names is kept; empty when it may be deleted."""
        return self.position.doubt

    @property
    def given_up(self) -> list[GivenUp]:
        """The histories that were given up: their commits are void."""
        return store_rows.decode_given_up(self.engine.get(store_rows.GIVEN_UP_KEY))

    @property
    def keeps_all(self) -> bool:
        """Whether nothing at all may be freed: a node holds another history of the same shards."""
        return bool(self.members.foreign)

    def journal(self, node: str, segment: int) -> Place:
        """The place of a node's journal segment."""
        return Place(self.store, node, SegmentKind.JOURNAL, segment)

    def shards(self, node: str, segment: int) -> Place:
        """The place of a node's shard segment."""
        return Place(self.store, node, SegmentKind.SHARDS, segment)

    def transaction(self, grows: int = 0) -> Transaction:
        """Begin an operation that changes something; ReadOnlyError.

        `grows` are the bytes that it may add to the metadata, 0 for one that only
        takes away: NoSpaceError when there is no room for them.
        """
        if self.read_only:
            raise ReadOnlyError("The store is mounted read-only.")
        if self.broken:
            raise ReadOnlyError(self.broken)
        if grows:
            self.take_room(
                max(self.code.k, self.limits.metadata_share)
                * (self.limits.metadata_row_bytes + grows)
            )
        return Transaction(self)

    def apply(self, changes: Changes) -> None:
        """Make changes that the next commit takes; RowTooLargeError: none of them was made."""
        self.engine.apply(changes)  # first: what it refuses must not reach the journals
        self.pending.update(changes)

    def next_stripe(self) -> int:
        """A stripe number that was never used: epoch and counter."""
        number = self.position.epoch << 40 | self._next_stripe
        self._next_stripe += 1
        return number

    def stripe(self, number: int) -> Stripe | None:
        """A sealed stripe's row, as it is now."""
        value = self.engine.get(stripe_rows.stripe_key(number))
        return Stripe.decode(value) if value is not None else None

    def batches(
        self,
        start: bytes = stripe_rows.STRIPES_START,
        end: bytes = stripe_rows.STRIPES_END,
        count: int | None = None,
    ) -> Iterator[list[tuple[int, Stripe]]]:
        """The sealed stripes, some at a time; others may run in between."""
        count = count or self.limits.repair_scan_rows
        while rows := list(islice(self.engine.scan(start, end), count)):
            yield [
                (stripe_rows.decode_stripe_key(key), Stripe.decode(value)) for key, value in rows
            ]
            start = rows[-1][0] + b"\0"

    def stripes_end(self) -> bytes:
        """The first key past those of the stripes that there are now."""
        last = self.engine.last(stripe_rows.STRIPES_START, stripe_rows.STRIPES_END)
        return last[0] + b"\0" if last is not None else stripe_rows.STRIPES_START

    def break_(self, reason: str) -> None:
        """Turn read-only for good: what was promised cannot be kept."""
        self.broken = self.broken or reason

    def has_shard(self, number: int, index: int, place: ShardPlace) -> bool:
        """Whether a shard is where it should be, as far as is known without reading it."""
        member = self.members.by_id.get(place.node)
        return (
            place.written
            and member is not None
            and member.is_open
            and not member.out_of_use
            and place.segment not in member.shards.lost
            and self.engine.get(stripe_rows.missing_key(place.node, number, index)) is None
        )

    # --- room ----------------------------------------------------------------

    def refresh_room(self) -> None:
        """Ask the devices what fits; called at each commit."""
        _, room = self.members.usable(self.code)
        self._room = room - self.unwritten()

    def take_room(self, length: int) -> None:
        """Take room for `length` bytes of file data; NoSpaceError.

        What is taken counts until the next commit asks the devices again, with what
        is still in memory taken off.
        """
        if self.metadata_error:
            raise NoSpaceError(self.metadata_error)
        if length > self._room:
            self.refresh_room()
            if length > self._room:
                raise NoSpaceError(
                    "The store is full: every device keeps "
                    f"{self.limits.reserve_bytes >> 20} MiB in reserve."
                )
        self._room -= length
