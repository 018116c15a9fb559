"""Sealing: a full stripe is coded and checksummed, and its shards are written to nodes.

The event loop reserves the places, and one worker thread does the rest.  At any time a
stripe either is in memory or has a row.  There must be no await between the choice of a
shard's place and the start of the task that writes it, nor between the end of that thread
and the stripe's row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio
from outcome import Error, Outcome

from ..errors import InvariantError, NodeError, NodeFullError, NodeTimeoutError
from ..format import erasure, stripe_rows
from ..format.erasure import Code
from ..format.records import Changes, block_checksums, record_length
from ..format.stripe_rows import SegmentState, ShardPlace, Stripe
from ..log.log import Log, Transaction
from ..members.devices import Device
from ..members.member import Member
from ..system import threads
from .seal import Seal
from .shard_record import NOT_WRITTEN, shard_header, write_shard
from .stripes import Buffers, UnsealedStripe

logger = logging.getLogger(__name__)


class Sealer:
    """Seals stripes, several at a time."""

    def __init__(
        self, log: Log, nursery: trio.Nursery, buffers: Buffers, on_end: Callable[[], object]
    ) -> None:
        self._log = log
        self._nursery = nursery
        self._buffers = buffers
        self._on_end = on_end
        self.under_way = 0
        """Stripes being coded and written."""
        self.fresh: dict[int, UnsealedStripe] = {}
        """Sealed stripes that no durable commit contains yet; their bytes stay in memory."""
        self.shortage = ""
        """Why stripes got fewer shards although all nodes are up; the next `fsync` reports it."""

    def seal(self, stripe: UnsealedStripe) -> None:
        """Start sealing a stripe at which files point, or the running transaction does."""
        length = stripe.code.shard_length(stripe.position)
        targets: list[tuple[Member, ShardPlace]] = []
        charges = []
        for member in self._log.members.place(stripe.code, stripe.number):
            if member.writable:
                targets.append((member, member.reserve(length)))
                charges.append(member.device.place(record_length(length)))
            else:
                targets.append((member, ShardPlace(member.id, NOT_WRITTEN, 0)))
        self._log.counters.stripes += 1
        self.under_way += 1
        stripe.is_placed = True
        stripe.is_sealing = True
        self._nursery.start_soon(self._store, stripe, targets, charges)

    def committed(self, changes: Changes) -> None:
        """Release the bytes of stripes whose rows are in a durable commit."""
        done = [n for n in self.fresh if stripe_rows.stripe_key(n) in changes]
        for number in done:
            self._buffers.release(self.fresh.pop(number))

    async def idle(self) -> None:
        """Return when no stripe is being coded or written."""
        for stripe in list(self._log.unsealed.values()):
            if isinstance(stripe, UnsealedStripe) and stripe.is_sealing:
                await stripe.sealed.wait()

    def seal_anew(self) -> None:
        """Seal all stripes that no durable commit contains again, at other places.

        Nobody knows whether a node that failed holds what was written to it.
        """
        log = self._log
        for number, stripe in self.fresh.items():
            row = log.stripe(number)
            if row is None:  # freed meanwhile
                self._buffers.release(stripe)
                continue
            with Transaction(log) as txn:
                txn.delete(stripe_rows.stripe_key(number))
                txn.stripes -= 1
                txn.reclaim(number, row)
            log.unsealed[number] = stripe
        self.fresh.clear()
        for member in log.members.all:
            member.shards.unflushed = []
        for unsealed in list(log.unsealed.values()):
            if isinstance(unsealed, UnsealedStripe) and unsealed.sealed.is_set():
                unsealed.begin_anew()
                if log.engine.get(stripe_rows.live_key(unsealed.number)) is not None:
                    self.seal(unsealed)
                else:
                    self.forget(unsealed)
                    with Transaction(log) as txn:
                        txn.drop_owners(unsealed.number)

    def forget(self, stripe: UnsealedStripe) -> None:
        """Drop a stripe in memory, as no file points at it, or it has a row."""
        del self._log.unsealed[stripe.number]
        self._buffers.release(stripe)
        stripe.sealed.set()

    async def _store(
        self,
        stripe: UnsealedStripe,
        targets: list[tuple[Member, ShardPlace]],
        charges: list[Device],
    ) -> None:
        todo = list(range(len(targets)))[::-1]
        work = Seal(stripe, targets, self._buffers.parity(stripe.code), charges, todo)
        try:
            await self._run(work)
            while work.full and work.written < self._enough(stripe.code):
                if not await self._log.wait_for_room(work.full):
                    break
                work.again()
                await self._run(work)
            self._log.waited()
            if work.hung:
                stripe.pooled = False  # a thread that hangs still holds the buffers
            else:
                self._buffers.release_parity(stripe.code, work.parity)
            places = self._places(work)
            if sum(place.written for place in places) < stripe.code.k:
                # The bytes stay readable in memory; nothing is acknowledged.
                self._log.break_(
                    f"Fewer than {stripe.code.k} nodes could store the shards of a stripe: "
                    "the mount is read-only until enough of them are back."
                )
                self._give_up(stripe, places)
            else:
                checksums = tuple(work.checksums)
                self._sealed(stripe, Stripe(stripe.code, stripe.position, places, checksums))
                if stripe.number in self.fresh:
                    del self._log.unsealed[stripe.number]
                else:
                    self.forget(stripe)
        except BaseException:
            # Commits wait for the stripe even if this is cancelled: none may continue without it.
            self._log.break_(
                "Sealing a stripe failed with an unexpected error: the mount is now read-only; "
                "mount the store again.",
                for_good=True,
            )
            raise
        finally:
            for device in work.charges:
                device.land(record_length(stripe.code.shard_length(stripe.position)))
            self.under_way -= 1
            stripe.sealed.set()
            self._on_end()

    def _enough(self, code: Code) -> int:
        """The shards of a stripe that must be written, if others find no room for now."""
        return min(code.k + self._log.members.config.spare_shards, code.n)

    def _give_up(self, stripe: UnsealedStripe, places: Sequence[ShardPlace]) -> None:
        """Take back the places of a stripe that has too few; it is sealed again later."""
        length = stripe.code.shard_length(stripe.position)
        for index, place in enumerate(places):
            if place.written:
                member = self._log.members.by_id[place.node]
                member.shards.unflushed.remove((stripe.number, index))
                self._take_back(stripe, member, place, length)
        if not stripe.dead:
            self._log.counters.stripes -= 1

    def _places(self, work: Seal) -> tuple[ShardPlace, ...]:
        """Return the place of each shard; shards of failed nodes were never written."""
        stripe, places = work.stripe, []
        length = stripe.code.shard_length(stripe.position)
        for index, (member, place) in enumerate(work.targets):
            error = work.errors.get(index)
            if error is not None:
                if isinstance(error, NodeFullError):  # healing writes it when there is room
                    self._note_shortage(error)
                else:
                    member.fail(error)
            elif place.written and member.writable:
                member.shards.dirty.add(place.segment)
                member.shards.unflushed.append((stripe.number, index))
                places.append(place)
                continue
            # If the node failed during this write, the shard cannot be relied on.
            if place.written:
                self._take_back(stripe, member, place, length)
            places.append(ShardPlace(member.id, NOT_WRITTEN, 0))
        return tuple(places)

    def _note_shortage(self, error: NodeFullError) -> None:
        if not self.shortage:
            logger.error("%s What is written has fewer shards until there is room.", error)
        self.shortage = f"{error} What was written has fewer shards until there is room."

    def _sealed(self, stripe: UnsealedStripe, row: Stripe) -> None:
        log, number = self._log, stripe.number
        if stripe.dead:
            with Transaction(log) as txn:
                txn.reclaim(number, row)
                changes, txn.changes = txn.changes, {}
            self._amend(stripe, {**stripe.take_owner_rows(), **changes})
            return
        alive = log.engine.get(stripe_rows.live_key(number)) is not None
        if log.engine.get(stripe_rows.stripe_key(number)) is not None:
            raise InvariantError(f"Stripe {number:#x} is already sealed.")
        if alive or stripe.batch is not None:
            self.fresh[number] = stripe
            changes = {stripe_rows.stripe_key(number): row.encode()}
            changes.update(stripe.take_owner_rows())
            changes.update((stripe_rows.tail_key(number, offset), None) for offset in stripe.tails)
            for index, place in enumerate(row.shards):
                if not place.written:
                    changes[stripe_rows.missing_key(place.node, number, index)] = b""
            self._amend(stripe, changes)
        if not alive:
            # It lost its last extent meanwhile: its commit needs the row, the next one frees it.
            with Transaction(log) as txn:
                if stripe.batch is not None:
                    txn.let_go(number, 0)
                else:
                    txn.stripes -= 1
                    txn.reclaim(number, row)
                    txn.changes.update(stripe.take_owner_rows())

    def _take_back(
        self, stripe: UnsealedStripe, member: Member, place: ShardPlace, length: int
    ) -> None:
        """Record that a shard was not written at its place, also for the commit that counts it."""
        member.shards.release(place.segment, length)
        key = stripe_rows.segment_key(member.id, place.segment)
        value = stripe.batch.changes.get(key) if stripe.batch is not None else None
        if value is not None:
            counted = SegmentState.decode(value)
            counted.live -= record_length(length)
            self._amend(stripe, {key: counted.encode()})

    def _amend(self, stripe: UnsealedStripe, changes: Changes) -> None:
        """Add changes to the commit that waits for a stripe, or to the next one."""
        if stripe.batch is None:
            self._log.apply(changes)
            return
        if stripe.batch.frozen:
            self._log.engine.amend(changes)
        else:
            self._log.engine.apply(changes)
        stripe.batch.changes.update(changes)

    async def _run(self, work: Seal) -> None:
        """Code and write in a thread; continue in another if a node holds it up."""
        limits = self._log.limits
        await trio.lowlevel.checkpoint_if_cancelled()  # the store may be closing
        self._start(work)
        try:
            while work.runs or work.is_held:
                work.changed, before = trio.Event(), (work.turn, len(work.todo))
                with trio.move_on_after(min(limits.stall_seconds, limits.node_seconds_max / 4)):
                    await work.changed.wait()
                if not work.changed.is_set():
                    if (work.turn, len(work.todo)) == before:
                        self._overtake(work)
                    self._judge(work)
                if work.failure is not None:
                    raise work.failure
        finally:
            for index in work.held:
                work.leave(index)

    def _start(self, work: Seal) -> None:
        turn = work.turn

        def ended(outcome: Outcome[int | None]) -> None:
            if isinstance(outcome, Error):
                work.failure = outcome.error
            elif (index := outcome.unwrap()) is not None:
                work.returned(index)
            if work.turn == turn:
                work.runs = False
            work.changed.set()

        # While threads are short, one stripe at a time is sealed: each could hang at the same node.
        owner = self if turn == 0 else None
        work.job = threads.start(partial(self._write_shards, work, turn), ended, owner)

    def _overtake(self, work: Seal) -> None:
        """Let another thread write the other shards, if a node holds up this one."""
        with work.lock:
            index, work.writing = work.writing, None
            if index is None:
                return  # it is coding
            work.turn += 1
        calls = work.targets[index][0].calls
        begun = trio.current_time() - self._log.limits.stall_seconds
        work.held[index] = calls.begin(None, is_patient=True, begun=begun)
        work.held[index].job = work.job
        work.runs = bool(work.todo)
        if work.runs:
            self._start(work)

    def _judge(self, work: Seal) -> None:
        """Give up nodes that take too long for a shard, unless the store has to wait for them."""
        seconds = self._log.limits.node_seconds_max
        for index, call in work.held.items():
            member, _ = work.targets[index]
            late = trio.current_time() - call.begun >= seconds and member.may_give_up(call)
            if member.out_of_use or late:
                work.errors[index] = NodeTimeoutError(
                    f"Node {member.name} did not write a shard within {seconds:.0f} seconds."
                )
                work.leave(index)

    def _write_shards(self, work: Seal, turn: int) -> int | None:
        """Code, checksum and write; return the shard that held it up, if any; in a thread."""
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
        while (index := work.take(turn)) is not None:
            member, place = work.targets[index]
            if place.written and member.is_open:
                sums = work.checksums[index]
                header = shard_header(code, stripe.position, stripe.number, index, sums)
                try:
                    write_shard(self._log, member, place, header, shards[index])
                except NodeError as error:
                    work.errors.setdefault(index, error)
            if not work.finished(turn):
                return index
        return None
