"""The log of an open store: changes on their way to the nodes, and the transactions.

Operations change metadata in transactions.  A transaction collects absolute
puts and deletes, and applies them together when it succeeds.  They are visible at
once, and wait in `pending` for the next commit.  There is no await inside a
transaction: each is atomic on the event loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Protocol, Self
from uuid import UUID

import trio

from ..errors import NodeFullError, NoSpaceError, ReadOnlyError
from ..format import store_rows, stripe_rows
from ..format.erasure import Code
from ..format.records import Changes, Place, SegmentKind, record_length
from ..format.store_rows import Counters, GivenUp, LogPosition
from ..format.stripe_rows import LOST_STRIPE, Live, ShardPlace, Stripe
from ..members.member import Member
from ..members.members import Members
from ..metadata.engine import Engine
from ..system import threads
from ..text import counted
from .owners import owners_keys
from .room import GROWS, REWRITES, Room

logger = logging.getLogger(__name__)


async def _unnamed(inos: Iterable[int]) -> dict[int, str]:
    return {ino: f"inode {ino}" for ino in inos}


class Unsealed(Protocol):
    """A stripe whose bytes are in memory; see `write`."""

    code: Code
    tails: list[int]
    is_sealing: bool

    def bytes(self, start: int, end: int) -> bytes:
        """A copy of its bytes start <= i < end."""


class Transaction:
    """Changes of one operation; use as a context manager.

    `get` sees the transaction's own changes, `scan` and `last` do not.
    """

    __slots__ = ("_log", "changes", "file_bytes", "files", "stripes", "waste")

    def __init__(self, log: Log) -> None:
        self._log = log
        self.changes: dict[bytes, bytes | None] = {}
        self.files = self.file_bytes = self.stripes = self.waste = 0
        """The changes of the counters."""

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
            self._log.waste += self.waste

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        if key in self.changes:
            return self.changes[key]
        return self._log.engine.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Set the value of a key."""
        self.changes[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key, if it exists."""
        self.changes[key] = None

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values with start <= key < end, in order, before this transaction."""
        return self._log.engine.scan(start, end)

    def last(self, start: bytes, end: bytes) -> tuple[bytes, bytes] | None:
        """The greatest key with start <= key <= end, before this transaction."""
        return self._log.engine.last(start, end)

    # --- stripes -------------------------------------------------------------

    def point_at(self, stripe: int, length: int) -> None:
        """Record that `length` bytes of a stripe became part of a file."""
        count = self.live(stripe)
        self.set_live(stripe, count._replace(live=count.live + length), count)
        self.file_bytes += length

    def complete(self, stripe: int, length: int) -> None:
        """Record that a stripe of which bytes are in use has `length` bytes, and gets no more."""
        count = self.live(stripe)
        if count.live == 0:
            self._log.doubt_count(stripe, "does not count its live bytes")
        self.set_live(stripe, count._replace(length=length), count)

    def let_go(self, stripe: int, length: int) -> None:
        """Record that `length` bytes of a stripe left a file; the last ones free the stripe."""
        self.file_bytes -= length
        if stripe == LOST_STRIPE:
            return  # it has no bytes, and is not counted
        count = self.live(stripe)
        left = count.live - length
        if left == 0:
            self.delete(stripe_rows.live_key(stripe))
            self.waste -= count.waste
            self._free(stripe)
            return
        if left < 0:
            # The count is wrong, so files may still need the stripe: 0 keeps it.
            self._log.doubt_count(stripe, f"counts {-left} too few live bytes")
            left = 0
        self.set_live(stripe, count._replace(live=left), count)

    def live(self, stripe: int) -> Live:
        """Return the count of a stripe; 0 if it has none."""
        value = self.get(stripe_rows.live_key(stripe))
        return Live.decode(value) if value else Live(0)

    def set_live(self, stripe: int, now: Live, before: Live) -> None:
        """Change the count of a stripe."""
        self.put(stripe_rows.live_key(stripe), now.encode())
        if now.length:
            self.waste += now.waste - before.waste

    def _free(self, stripe: int) -> None:
        value = self.get(stripe_rows.stripe_key(stripe))
        if value is not None:
            self.delete(stripe_rows.stripe_key(stripe))
            self.stripes -= 1
            self.reclaim(stripe, Stripe.decode(value))
            return
        unsealed = self._log.unsealed.get(stripe)
        if unsealed is not None:
            for offset in unsealed.tails:
                self.delete(stripe_rows.tail_key(stripe, offset))
            if unsealed.is_sealing:  # the sealer reclaims its shards
                return
        self.drop_owners(stripe)

    def drop_owners(self, stripe: int) -> None:
        """Forget which files had bytes in a stripe."""
        for key in owners_keys(self, stripe):
            self.delete(key)

    def reclaim(self, number: int, stripe: Stripe) -> None:
        """Free the room of a stripe's shards after the next checkpoint.

        Its owners stay: by them is seen before that whether a file has bytes in it after all.
        """
        for index, place in enumerate(stripe.shards):
            self.delete(stripe_rows.missing_key(place.node, number, index))
            if place.written:
                self.put(*stripe_rows.reclaim_row(place, stripe.shard_length, number))
                self._log.note_freed(record_length(stripe.shard_length))


class Log:
    """The state that the write path, the commit and the operations share."""

    def __init__(
        self, engine: Engine, members: Members, store: UUID, code: Code, *, read_only: bool
    ) -> None:
        self.engine = engine
        self.members = members
        self.limits = members.config.limits
        self.store = store
        self.code = code
        """The code of files below no directory with its own code."""
        self.counters = Counters()
        self.position = LogPosition()
        self.pending: dict[bytes, bytes | None] = {}
        """Changes that are not in a commit yet."""
        self.unsealed: dict[int, Unsealed] = {}
        """Stripes that are read from memory, by number."""
        self.read_only = read_only
        self.broken = ""
        """Why nothing can be committed now, and the mount is read-only; empty if it can."""
        self.broken_for_good = False
        """Only a new mount can continue."""
        self.on_break: Callable[[], None] = lambda: None
        """Called when nothing can be committed any more."""
        self._measuring = trio.CapacityLimiter(1)
        self._metadata_room_known = True
        self.metadata_error = ""
        """Why the last checkpoint failed; until one succeeds little may grow, to save memory."""
        self.metadata_stall = ""
        """A sentence while a checkpoint hangs; the same is true then."""
        self.needs_checkpoint = False
        """Nothing is acknowledged before the metadata has the set of nodes in sync."""
        self.rows_in_doubt = 0
        """Rows that differ from the nodes and could not be mended, since the mount."""
        self.doubted: set[int] = set()
        """Stripes whose counts of live bytes were found to be wrong, since the mount."""
        self.stripes_put_back = 0
        """Stripes that were to be freed although files had bytes in them, since the mount."""
        self.rows_mended = 0
        """Wrong rows that were mended, since the mount."""
        self.mended: tuple[str, ...] = ()
        """The wrong rows that were mended when the store was opened."""
        self.unread_journals: set[str] = set()
        """Names of the nodes whose journals had places that could not be read at the mount."""
        self.used_at = 0.0
        """When a file was last read or written, by trio's clock."""
        self.journals = trio.Lock()
        """Held while old journals are deleted, or journals are compared and repaired."""
        self.journal_gaps = 0
        """Parts of the journals that no node can read, as far as they were found since the last
        metadata dump; only the metadata has them until the next one."""
        self.waste = 0
        """Bytes that cleaning gives back, of all stripes, once `waste_counted` is set."""
        self.waste_counted = False
        self.freed = 0
        """Bytes on nodes that become free with the next checkpoint."""
        self.on_freed: Callable[[], None] = lambda: None
        """Called when these are many: a checkpoint is due."""
        self.room = Room(members, code)
        """What may be accepted."""
        self.paths_of: Callable[[Iterable[int]], Awaitable[dict[int, str]]] = _unnamed
        """Returns paths of inodes, for people; the file system sets this."""
        self.unwritten: Callable[[], int] = lambda: 0
        """Returns the bytes of file data that are not on the nodes yet; the writer sets this."""
        self.on_wait: Callable[[], object] = lambda: None
        """Called when something begins to wait for room; the writer wakes who waits for memory."""
        self.ends_at = math.inf
        """By trio's clock: when the store is closed, the end of all waiting for room."""
        self.on_damage: Callable[[], None] = lambda: None
        """Called when a row does not match its checksum; the store mends it."""
        self._next_stripe = 1
        members.on_fenced(partial(self.break_, for_good=True))

    @property
    def is_ending(self) -> bool:
        """Whether the store is being closed: what is in memory is gone soon."""
        return self.ends_at < math.inf

    @property
    def doubt(self) -> str:
        """Why segments that are in no table are kept; empty if they may be deleted."""
        return self.position.doubt

    @property
    def given_up(self) -> list[GivenUp]:
        """The histories that were given up: their commits are void."""
        return store_rows.decode_given_up(self.engine.get(store_rows.GIVEN_UP_KEY))

    @property
    def keeps_all(self) -> bool:
        """Whether no room may be freed: a node holds another history of the same shards."""
        return bool(self.members.foreign)

    def journal(self, node: str, segment: int) -> Place:
        """The place of a node's journal segment."""
        return Place(self.store, node, SegmentKind.JOURNAL, segment)

    def shards(self, node: str, segment: int) -> Place:
        """The place of a node's shard segment."""
        return Place(self.store, node, SegmentKind.SHARDS, segment)

    def transaction(self, grows: int = 0, *, rewrites: bool = False) -> Transaction:
        """Begin an operation that changes something; ReadOnlyError.

        `grows` are the bytes that it may add to the metadata; 0 if it adds none, and
        `rewrites` if it does not take away either: NoSpaceError when there is no room.
        """
        self.refuse_read_only()
        if self.broken:
            raise ReadOnlyError(self.broken)
        if grows or rewrites:
            self._check_room()
            self.room.take_rows(grows, GROWS if grows else REWRITES)
        else:
            self.room.note_rows()
        return Transaction(self)

    def refuse_read_only(self) -> None:
        """Raise ReadOnlyError if nothing may be written, whatever happens."""
        if self.read_only:
            raise ReadOnlyError(
                "The store is mounted read-only: unmount it, or mount it without 'ro'."
            )

    def apply(self, changes: Changes) -> None:
        """Make changes for the next commit; after RowTooLargeError none of them was made."""
        self.engine.apply(changes)  # first: refused rows must not reach the journals
        self.pending.update(changes)

    def note_freed(self, length: int) -> None:
        """Record that bytes on a node become free with the next checkpoint."""
        self.freed += length
        if self.frees_much:
            self.on_freed()

    @property
    def frees_much(self) -> bool:
        """Whether so much becomes free with the next checkpoint that one is due."""
        return self.freed >= max(self.limits.freed_bytes_max, self.counters.file_bytes // 64)

    def doubt_count(self, stripe: int, what: str) -> None:
        """Record that the count of a stripe's live bytes is wrong; the caller sets it to 0."""
        if stripe not in self.doubted:
            self._doubt({stripe})
            logger.error("Stripe %#x %s, and is kept: run 'fusestore fsck --repair'.", stripe, what)

    def doubt_counts(self, stripes: set[int]) -> None:
        """Record that stripes were found whose counts an earlier mount set to 0."""
        new = stripes - self.doubted
        if new:
            self._doubt(new)
            logger.error(
                "The live bytes of %s are unknown: nothing is freed of them. Run 'fusestore fsck "
                "--repair'.",
                counted(len(new), "stripe"),
            )

    def note_lost_row(self, stripe: int) -> None:
        """Record that a file has bytes in a stripe that has no row: fsck must look."""
        if stripe not in self.doubted:
            self._doubt({stripe})

    def _doubt(self, stripes: set[int]) -> None:
        self.doubted |= stripes
        self.rows_in_doubt += len(stripes)

    def next_stripe(self) -> int:
        """A stripe number that was never used: epoch and counter."""
        number = self.position.epoch << 40 | self._next_stripe
        self._next_stripe += 1
        return number

    def stripe(self, number: int) -> Stripe | None:
        """Return the current row of a sealed stripe."""
        value = self.engine.get(stripe_rows.stripe_key(number))
        return Stripe.decode(value) if value is not None else None

    def batches(
        self,
        start: bytes = stripe_rows.STRIPES_START,
        end: bytes = stripe_rows.STRIPES_END,
        count: int | None = None,
    ) -> Iterator[list[tuple[int, Stripe]]]:
        """Yield the sealed stripes in batches; other tasks may run in between."""
        count = count or self.limits.repair_scan_rows
        while rows := list(islice(self.engine.scan(start, end), count)):
            yield [
                (stripe_rows.decode_stripe_key(key), Stripe.decode(value)) for key, value in rows
            ]
            start = rows[-1][0] + b"\0"

    def stripes_end(self) -> bytes:
        """Return the first key past the existing stripes."""
        last = self.engine.last(stripe_rows.STRIPES_START, stripe_rows.STRIPES_END)
        return last[0] + b"\0" if last is not None else stripe_rows.STRIPES_START

    def break_(self, reason: str, *, for_good: bool = False) -> None:
        """Make the mount read-only: no promise can be kept now or, if `for_good`, ever."""
        if self.broken and (self.broken_for_good or not for_good):
            return
        self.broken, self.broken_for_good = reason, for_good
        if not for_good:  # what is for good is raised, too
            logger.error("%s", reason)
        self.on_break()

    def has_shard(self, number: int, index: int, place: ShardPlace) -> bool:
        """Return whether a shard is at its place, as far as is known without reading it."""
        member = self.members.by_id.get(place.node)
        return (
            place.written
            and member is not None
            and member.is_open
            and not member.out_of_use
            and place.segment not in member.shards.lost
            and self.engine.get(stripe_rows.missing_key(place.node, number, index)) is None
        )

    def codes(self) -> list[Code]:
        """Codes that files have or may get, that of new files first."""
        known = store_rows.decode_codes(self.engine.get(store_rows.CODES_KEY))
        row = self.engine.get(store_rows.FORMAT_KEY)  # fusestore.toml may have another code now
        before = [store_rows.format_code(row)] if row else []
        return list(dict.fromkeys([self.code, *before, *known]))

    # --- room ----------------------------------------------------------------

    def take_room(self, length: int, code: Code, *, in_reserve: bool = False) -> None:
        """Take room for `length` bytes of file data in their code; NoSpaceError.

        With `in_reserve`, half of the reserve may be used: other bytes become free for them.
        """
        self._check_room()
        self.room.take_bytes(length, code, REWRITES if in_reserve else GROWS)

    def _check_room(self) -> None:
        refusal = self._refusal()
        if refusal:
            raise NoSpaceError(refusal)

    def _refusal(self) -> str:
        """Return why nothing may grow now; empty if it may.

        While the metadata cannot be written the journals hold every change.  Therefore changes
        are taken until many wait in memory, unless commits wait for a checkpoint.
        """
        if self.room.waits:
            return self.room.waits
        if self.room.growth_unwritten > self.limits.unwritten_bytes_max:
            return self.metadata_error or self.metadata_stall
        return self.metadata_error if self.needs_checkpoint else ""

    def usable(self) -> tuple[int, int]:
        """Return (total, free) bytes of file data in the default code; see `Room.usable`."""
        total, free = self.room.usable(self.code)
        return total, 0 if self._refusal() else free

    def can_do_without(self, nodes: Collection[Member]) -> bool:
        """Whether commits and new stripes can do without these nodes."""
        others = [m for m in self.members.all if m.takes and m not in nodes]
        ids = {member.id for member in others}
        return any(m.in_sync for m in others) and self.members.could_store(self.code, ids)

    async def wait_for_room(self, full: Mapping[Member, NodeFullError]) -> bool:
        """Wait a moment for room on nodes that had none for what was accepted.

        False if nothing is to be waited for any more.
        """
        if self.broken or trio.current_time() > self.ends_at:
            return False
        error = next(iter(full.values()))
        if not self.room.waits:
            logger.error("%s What was accepted waits for room.", error)
            self.room.waited = trio.Event()
        self.room.waits = f"{error} What was accepted waits for room."
        self.on_wait()
        await trio.sleep(self.limits.full_retry_seconds)
        return True

    def waited(self) -> None:
        """Record that what waited for room was written, or given up."""
        if self.room.waits:
            self.room.waits = ""
            self.room.waited.set()
            logger.info("There is room again.")

    async def sample_metadata(self) -> None:
        """Measure the room for the metadata."""
        begun = self.members.devices.begin_sample()
        try:
            async with self._measuring:
                found = await threads.call(self.engine.space)
        except OSError as error:
            if self._metadata_room_known:  # not at each sample
                logger.error("The free space of the metadata is unknown: %s.", error.strerror)
            self._metadata_room_known = False
        else:
            self._metadata_room_known = True
            self.room.sampled_metadata(begun, found)
