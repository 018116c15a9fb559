"""The write path: file bytes into open stripes, full stripes onto the nodes.

`append` copies bytes to the open stripe of a code and says where they lie; no
I/O.  A full stripe is sealed: coded, checksummed, and one shard appended to
each of its nodes, in a worker thread.  A request that fills a stripe by itself
is coded in place, without a copy.

Not to be interleaved with an await: from `append` to the end of the
transaction that points extents at the bytes, and from the choice of a shard's
place to the start of the task that writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from typing_extensions import Buffer

from ..errors import NodeError, NodeTimeoutError
from ..format import erasure, stripe_rows
from ..format.erasure import Code
from ..format.records import (
    HEADER_BYTES,
    Changes,
    Header,
    Kind,
    Run,
    block_checksums,
    payload_checksum,
    record_length,
)
from ..format.stripe_rows import OWNER, SegmentState, ShardPlace, Stripe
from ..limits import OWNERS_PER_ROW_MAX
from ..log.log import Log, Transaction
from ..members.member import Member

NOT_WRITTEN = 0
"""The segment of a shard that was never written."""


@dataclass(slots=True)
class Taken:
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
    taken: Taken | None = None
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


@dataclass(slots=True, eq=False)
class _Seal:
    """A stripe on its way to the nodes."""

    stripe: UnsealedStripe
    targets: list[tuple[Member, ShardPlace]]
    parity: bytearray
    checksums: list[bytes] = field(default_factory=list)
    errors: dict[int, NodeError] = field(default_factory=dict)
    next: int = 0
    """The shard that is being written."""
    attempt: int = 0
    """A thread of an earlier attempt is left to itself, and must not go on."""
    hung: bool = False

    def give_up(self) -> None:
        """Leave the node that is being written to, and its thread, to themselves."""
        member, _ = self.targets[self.next]
        seconds = member.limits.node_seconds_max
        self.errors[self.next] = NodeTimeoutError(
            f"Node {member.name} did not take a shard within {seconds:.0f} seconds."
        )
        self.hung = True
        self.attempt += 1
        self.next += 1


class Writer:
    """Open stripes, one a code, and the sealing of full ones."""

    def __init__(self, log: Log, nursery: trio.Nursery, ask_commit: Callable[[], None]) -> None:
        self._log = log
        self._limits = log.limits
        self._nursery = nursery
        self._ask_commit = ask_commit
        self._open: dict[Code, UnsealedStripe] = {}
        self._adopted: list[UnsealedStripe] = []
        """Stripes that the last mount left open."""
        self._pool: dict[Code, list[bytearray]] = {}
        self._parity: dict[Code, list[bytearray]] = {}
        self.fresh: set[int] = set()
        """Sealed stripes that no durable commit has yet."""
        self._seals = 0
        log.unwritten = self._unwritten
        self._waiting = trio.lowlevel.ParkingLot()
        """Those who wait for room in memory."""
        self.unflushed = 0
        """File bytes accepted since the last commit was taken, and by the one under way."""

    async def room(self) -> None:
        """Wait until a request's bytes may be taken into memory."""
        if self._has_room():
            return
        self._ask_commit()
        while not self._has_room():
            await self._waiting.park()

    def _unwritten(self) -> int:
        return len(self._log.unsealed) * self._limits.stripe_bytes

    def _has_room(self) -> bool:
        return bool(self._log.broken) or (
            self._seals < self._limits.seals_max
            and self.unflushed < self._limits.unflushed_bytes_max
        )

    def flushed(self, length: int) -> None:
        """A commit flushed `length` of the unflushed bytes."""
        self.unflushed -= length
        self._waiting.unpark_all()

    # --- appending -----------------------------------------------------------

    def append(
        self, txn: Transaction, code: Code, ino: int, offset: int, data: Buffer
    ) -> list[tuple[int, int, int]]:
        """Take a file's bytes; (stripe, stripe offset, length) of each piece, in order."""
        view = memoryview(data)
        length = len(view)
        self.unflushed += length
        if self.unflushed * 2 >= self._limits.unflushed_bytes_max:
            self._ask_commit()
        if length == self._limits.stripe_bytes == code.k * code.shard_length(length):
            stripe = UnsealedStripe(self._log.next_stripe(), code, view, pooled=False)
            stripe.note_owner(ino, offset, length)
            stripe.position = length
            self._log.unsealed[stripe.number] = stripe
            txn.point_at(stripe.number, length)
            self._seal(stripe, alive=True)
            return [(stripe.number, 0, length)]
        pieces = []
        done = 0
        while done < length:
            stripe = self._open.get(code) or self._begin(code)
            start = stripe.position
            part = min(length - done, self._limits.stripe_bytes - start)
            stripe.data[start : start + part] = view[done : done + part]
            stripe.note_owner(ino, offset + done, part)
            stripe.position += part
            txn.point_at(stripe.number, part)
            pieces.append((stripe.number, start, part))
            done += part
            if (
                stripe.position == self._limits.stripe_bytes
                or stripe.owners_count >= self._limits.stripe_owners_max
            ):
                self._seal(stripe, alive=True)
        return pieces

    @property
    def can_overwrite(self) -> bool:
        """Whether an open stripe has bytes that no commit holds yet."""
        return any(stripe.position > stripe.committed for stripe in self._open.values())

    def overwrite(self, stripe_number: int, stripe_offset: int, data: Buffer) -> bool:
        """Replace bytes that no commit holds yet, in memory; False when they are not such."""
        stripe = self._log.unsealed.get(stripe_number)
        if (
            not isinstance(stripe, UnsealedStripe)
            or stripe is not self._open.get(stripe.code)
            or stripe_offset < stripe.committed
        ):
            return False
        stripe.data[stripe_offset : stripe_offset + len(memoryview(data))] = data
        return True

    def _begin(self, code: Code) -> UnsealedStripe:
        buffer = memoryview(self._buffer(code))
        stripe = UnsealedStripe(self._log.next_stripe(), code, buffer, pooled=True)
        self._open[code] = stripe
        self._log.unsealed[stripe.number] = stripe
        return stripe

    def _buffer(self, code: Code) -> bytearray:
        """Room for a stripe's data; what it holds is of no meaning."""
        free = self._pool.setdefault(code, [])
        return (
            free.pop() if free else bytearray(code.k * code.shard_length(self._limits.stripe_bytes))
        )

    def adopt(self, number: int, code: Code, tails: dict[int, bytes]) -> None:
        """Take a stripe that a crash left open into memory, of what commits hold of it."""
        stripe = UnsealedStripe(number, code, memoryview(self._buffer(code)), pooled=True)
        for offset, value in tails.items():
            stripe.data[offset : offset + len(value)] = value
            stripe.position = max(stripe.position, offset + len(value))
        stripe.committed = stripe.position
        stripe.tails = list(tails)
        self._log.unsealed[number] = stripe
        self._adopted.append(stripe)

    # --- for the commit ------------------------------------------------------

    def settle(self) -> None:
        """Make all that was written ready for a commit: tails for a little, sealing for more."""
        for stripe in list(self._open.values()):
            fresh = stripe.position - stripe.committed
            if fresh == 0:
                continue
            if fresh > self._limits.tail_bytes_max:
                self._seal(stripe)
                continue
            if self._log.engine.get(stripe_rows.live_key(stripe.number)) is not None:
                key = stripe_rows.tail_key(stripe.number, stripe.committed)
                fresh_bytes = stripe.bytes(stripe.committed, stripe.position)
                tail = stripe_rows.tail_value(stripe.code, fresh_bytes)
                self._log.apply({key: tail, **self._owners(stripe)})
                stripe.tails.append(stripe.committed)
            stripe.committed = stripe.position

    def seal_all(self) -> None:
        """Seal what is open, however little it is: after a mount, and before the end."""
        for stripe in [*self._adopted, *self._open.values()]:
            self._seal(stripe)
        self._adopted.clear()

    def being_sealed(self) -> list[UnsealedStripe]:
        """Stripes under way to the nodes that no commit waits for yet."""
        return [
            stripe
            for stripe in self._log.unsealed.values()
            if isinstance(stripe, UnsealedStripe)
            and stripe.taken is None
            and self._open.get(stripe.code) is not stripe
        ]

    @staticmethod
    def _owners(stripe: UnsealedStripe) -> Changes:
        """Rows for the owners that no commit holds yet; forgets them."""
        rows = {}
        for start in range(0, len(stripe.owners), OWNERS_PER_ROW_MAX):
            part = stripe.owners[start : start + OWNERS_PER_ROW_MAX]
            key = stripe_rows.owners_key(stripe.number, part[0][3])
            rows[key] = b"".join(OWNER.pack(*owner) for owner in part)
        stripe.owners = []
        return rows

    # --- sealing -------------------------------------------------------------

    def _seal(self, stripe: UnsealedStripe, *, alive: bool | None = None) -> None:
        """Start the way of a stripe to its nodes; `alive` when a transaction points at it."""
        if self._open.get(stripe.code) is stripe:
            del self._open[stripe.code]
        if alive is None:
            alive = self._log.engine.get(stripe_rows.live_key(stripe.number)) is not None
        if not alive:
            self._forget(stripe)
            return
        length = stripe.code.shard_length(stripe.position)
        targets: list[tuple[Member, ShardPlace]] = []
        for member in self._log.members.place(stripe.code, stripe.number):
            if member.writable:
                targets.append((member, member.reserve(length)))
            else:
                targets.append((member, ShardPlace(member.id, NOT_WRITTEN, 0)))
        self._log.counters.stripes += 1
        self._seals += 1
        self._nursery.start_soon(self._store, stripe, targets)

    def _forget(self, stripe: UnsealedStripe) -> None:
        del self._log.unsealed[stripe.number]
        if stripe.pooled:
            self._pool[stripe.code].append(stripe.data.obj)  # type: ignore[arg-type]
        stripe.data = memoryview(b"")  # a commit may keep the stripe for long
        stripe.sealed.set()

    async def _store(
        self, stripe: UnsealedStripe, targets: list[tuple[Member, ShardPlace]]
    ) -> None:
        free = self._parity.setdefault(stripe.code, [])
        size = stripe.code.m * stripe.code.shard_length(self._limits.stripe_bytes)
        work = _Seal(stripe, targets, free.pop() if free else bytearray(size))
        await self._run(work)
        checksums, errors = work.checksums, work.errors
        if work.hung:
            stripe.pooled = False  # a thread that hangs still holds the buffers
        else:
            free.append(work.parity)
        places = []
        length = stripe.code.shard_length(stripe.position)
        for index, (member, place) in enumerate(targets):
            if index in errors:
                member.fail(errors[index])
                self._take_back(stripe, member, place, length)
                place = ShardPlace(member.id, NOT_WRITTEN, 0)
            elif place.written and member.writable:
                member.shards.dirty.add(place.segment)
                member.shards.unflushed.append((stripe.number, index))
            elif place.written:
                # It failed while this shard was on its way: do not count on the shard.
                self._take_back(stripe, member, place, length)
                place = ShardPlace(member.id, NOT_WRITTEN, 0)
            places.append(place)
        if sum(place.written for place in places) < stripe.code.k:
            # The bytes stay in memory, where they can be read; nothing is acknowledged.
            self._log.break_(
                f"Fewer than {stripe.code.k} nodes could take the shards of a stripe: "
                "the mount is read-only now; mend the nodes and mount again."
            )
        else:
            row = Stripe(stripe.code, stripe.position, tuple(places), tuple(checksums))
            self._sealed(stripe, row)
            self._forget(stripe)
        self._seals -= 1
        stripe.sealed.set()
        self._waiting.unpark_all()

    def _sealed(self, stripe: UnsealedStripe, row: Stripe) -> None:
        log, number = self._log, stripe.number
        if stripe.dead:
            with Transaction(log) as txn:
                txn.reclaim(number, row)
                changes, txn.changes = txn.changes, {}
            self._amend(stripe, changes)
            return
        alive = log.engine.get(stripe_rows.live_key(number)) is not None
        if alive or stripe.taken is not None:
            self.fresh.add(number)
            changes = {stripe_rows.stripe_key(number): row.encode()}
            changes.update(self._owners(stripe))
            changes.update((stripe_rows.tail_key(number, offset), None) for offset in stripe.tails)
            for index, place in enumerate(row.shards):
                if not place.written:
                    changes[stripe_rows.missing_key(place.node, number, index)] = b""
            self._amend(stripe, changes)
        if not alive:
            # It died on its way: the commit that took it needs the row, the next one frees it.
            with Transaction(log) as txn:
                if stripe.taken is not None:
                    txn.let_go(number, 0)
                else:
                    txn.stripes -= 1
                    txn.reclaim(number, row)

    def _take_back(
        self, stripe: UnsealedStripe, member: Member, place: ShardPlace, length: int
    ) -> None:
        """A shard did not get where its place was reserved, also for the commit that counts it."""
        member.shards.release(place.segment, length)
        key = stripe_rows.segment_key(member.id, place.segment)
        value = stripe.taken.changes.get(key) if stripe.taken is not None else None
        if value is not None:
            counted = SegmentState.decode(value)
            counted.live -= record_length(length)
            self._amend(stripe, {key: counted.encode()})

    def _amend(self, stripe: UnsealedStripe, changes: Changes) -> None:
        """Add to the commit that waits for a stripe, or to the next one."""
        if stripe.taken is None:
            self._log.apply(changes)
            return
        stripe.taken.changes.update(changes)
        if stripe.taken.frozen:
            self._log.engine.amend(changes)
        else:
            self._log.engine.apply(changes)

    async def _run(self, work: _Seal) -> None:
        """Code and write in one thread; go on in another when a node hangs in the first."""
        while work.next < len(work.targets):
            done = trio.Event()

            async def attempt(done: trio.Event = done) -> None:
                await trio.to_thread.run_sync(
                    self._write_shards, work, work.attempt, abandon_on_cancel=True
                )
                done.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(attempt)
                while not done.is_set():
                    before = work.next
                    with trio.move_on_after(self._limits.node_seconds_max):
                        await done.wait()
                    if not done.is_set() and work.checksums and work.next == before:
                        work.give_up()
                        nursery.cancel_scope.cancel()
                        break

    def _write_shards(self, work: _Seal, attempt: int) -> None:
        """In a thread: code, checksum and write."""
        stripe, code = work.stripe, work.stripe.code
        length = code.shard_length(stripe.position)
        shards = [stripe.data[i * length : (i + 1) * length] for i in range(code.k)]
        view = memoryview(work.parity)
        shards += [view[i * length : (i + 1) * length] for i in range(code.m)]
        if not work.checksums:
            padding = code.k * length - stripe.position
            if padding:
                stripe.data[stripe.position : stripe.position + padding] = bytes(padding)
            erasure.encode(code, length, shards[: code.k], shards[code.k :])
            work.checksums = [block_checksums(shard, length) for shard in shards]
        while work.attempt == attempt and work.next < len(work.targets):
            index = work.next
            member, place = work.targets[index]
            if place.written and member.is_open:
                sums = work.checksums[index]
                header = shard_header(code, stripe.position, stripe.number, index, sums)
                try:
                    write_shard(self._log, member, place, header, shards[index])
                except NodeError as error:
                    work.errors[index] = error
            if work.attempt == attempt:
                work.next += 1


def shard_header(code: Code, length: int, number: int, index: int, checksums: bytes) -> Header:
    """The header of a shard's record; `length` is the stripe's."""
    return Header(
        Kind.SHARD,
        code.shard_length(length),
        payload_checksum(checksums),
        number >> 40,
        number,
        index,
        code.k,
        code.m,
        length,
    )


def write_shard(
    log: Log, member: Member, place: ShardPlace, header: Header, payload: Buffer
) -> None:
    """Write a shard's record where it belongs; may block; NodeError."""
    start = place.offset - HEADER_BYTES
    seed = log.shards(member.name, place.segment).seed(start)
    member.node.write(Run.SHARDS, place.segment, start, [header.encode(seed), payload])
