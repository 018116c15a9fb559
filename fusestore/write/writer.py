"""The write path: file bytes go to open stripes, and full stripes to nodes.

`append` copies bytes to the open stripe of a code and returns their places; it does no
I/O.  A full stripe is sealed (see `sealer`).  At a commit, a few new bytes in an open stripe
become a tail of the record (`settle`); more are sealed.  A request that fills a whole
stripe is coded in place, without a copy.

There must be no await between `append` and the end of the transaction that points
extents at the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from typing_extensions import Buffer

from ..errors import NoSpaceError
from ..format import stripe_rows
from ..format.erasure import Code
from ..format.records import record_length
from ..log.log import Log, Transaction
from ..system.memory_reserve import MemoryReserve
from .sealer import Sealer
from .stripes import Buffers, UnsealedStripe


class Writer:
    """The open stripes, one per code, and the sealing of full stripes."""

    def __init__(self, log: Log, nursery: trio.Nursery, ask_commit: Callable[[], None]) -> None:
        self._log = log
        self._limits = log.limits
        self._ask_commit = ask_commit
        self._open: dict[tuple[Code, bool], UnsealedStripe] = {}
        """By code, and whether it gets rewritten bytes."""
        self._adopted: list[UnsealedStripe] = []
        """Stripes that the last mount left open."""
        log.unwritten = self._unwritten
        log.room.unplaced = self._unplaced
        self._waiting = trio.lowlevel.ParkingLot()
        """Tasks that wait for room in memory."""
        log.on_wait = self._waiting.unpark_all
        self._memory = MemoryReserve()
        self._buffers = Buffers(log.limits.stripe_bytes)
        self.sealer = Sealer(log, nursery, self._buffers, self._waiting.unpark_all)
        self.unflushed = 0
        """File bytes accepted since the last commit began, and those of a running commit."""

    async def room(self, length: int, *, extra: int = 0) -> None:
        """Wait until a request of `length` bytes may be accepted into memory.

        Rewriting may take `extra` more stripes, so that users do not take each place that it
        waits for.  NoSpaceError; NoMemoryLeftError.
        """
        self._memory.take(length)
        if self._has_room(extra):
            return
        self._ask_commit()
        while not self._has_room(extra):
            if self._log.room.waits:  # and so does the memory
                raise NoSpaceError(self._log.room.waits)
            await self._waiting.park()

    def _unwritten(self) -> int:
        return len(self._log.unsealed) * self._limits.stripe_bytes

    def _unplaced(self) -> dict[Code, int]:
        """Return the bytes of one shard of each stripe that has no places yet, by code."""
        found: dict[Code, int] = {}
        for stripe in self._log.unsealed.values():
            if isinstance(stripe, UnsealedStripe) and not stripe.is_placed and stripe.position:
                code = stripe.code
                size = record_length(code.shard_length(stripe.position))
                found[code] = found.get(code, 0) + size
        return found

    def _has_room(self, extra: int) -> bool:
        limits = self._limits
        return bool(self._log.broken) or (
            self.sealer.under_way < limits.seals_max + extra
            and self.unflushed < limits.unflushed_bytes_max + extra * limits.stripe_bytes
        )

    def flushed(self, length: int) -> None:
        """Record that a commit flushed `length` of the unflushed bytes."""
        self.unflushed -= length
        self._waiting.unpark_all()

    # --- appending -----------------------------------------------------------

    def append(
        self,
        txn: Transaction,
        code: Code,
        ino: int,
        offset: int,
        data: Buffer,
        *,
        rewritten: bool = False,
    ) -> list[tuple[int, int, int]]:
        """Append bytes of a file; return (stripe, stripe offset, length) of each piece.

        `rewritten` bytes come from other stripes, and do not mix with new ones.
        """
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
            self._seal(stripe, txn)
            return [(stripe.number, 0, length)]
        pieces = []
        done = 0
        while done < length:
            stripe = self._open.get((code, rewritten)) or self._begin(code, rewritten)
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
                self._seal(stripe, txn)
        return pieces

    @property
    def can_overwrite(self) -> bool:
        """Whether an open stripe has bytes that no commit holds yet."""
        return any(stripe.position > stripe.committed for stripe in self._open.values())

    def overwrite(self, stripe_number: int, stripe_offset: int, data: Buffer) -> bool:
        """Replace bytes in memory; False if they are not, or a commit already holds them."""
        stripe = self._log.unsealed.get(stripe_number)
        if (
            not isinstance(stripe, UnsealedStripe)
            or not self._is_open(stripe)
            or stripe_offset < stripe.committed
        ):
            return False
        stripe.data[stripe_offset : stripe_offset + len(memoryview(data))] = data
        return True

    def _is_open(self, stripe: UnsealedStripe) -> bool:
        return self._open.get((stripe.code, stripe.rewritten)) is stripe

    def _begin(self, code: Code, rewritten: bool) -> UnsealedStripe:
        buffer = memoryview(self._buffers.data(code))
        number = self._log.next_stripe()
        stripe = UnsealedStripe(number, code, buffer, pooled=True, rewritten=rewritten)
        self._open[code, rewritten] = stripe
        self._log.unsealed[stripe.number] = stripe
        return stripe

    def adopt(self, number: int, code: Code, tails: dict[int, bytes]) -> None:
        """Load a stripe that a crash left open from its tails in commits."""
        stripe = UnsealedStripe(number, code, memoryview(self._buffers.data(code)), pooled=True)
        for offset, value in tails.items():
            stripe.data[offset : offset + len(value)] = value
            stripe.position = max(stripe.position, offset + len(value))
        stripe.committed = stripe.position
        stripe.tails = list(tails)
        self._log.unsealed[number] = stripe
        self._adopted.append(stripe)

    # --- for the commit ------------------------------------------------------

    def settle(self) -> None:
        """Prepare written bytes for a commit: store few as tails, seal stripes with more."""
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
                self._log.apply({key: tail, **stripe.take_owner_rows()})
                stripe.tails.append(stripe.committed)
            stripe.committed = stripe.position

    def seal_all(self) -> None:
        """Seal all open stripes, however short: after a mount, and before the end."""
        for stripe in self._adopted:
            self._seal(stripe, is_kept=True)
        self._adopted.clear()
        for stripe in list(self._open.values()):
            self._seal(stripe)

    def being_sealed(self) -> list[UnsealedStripe]:
        """Return stripes being sealed that no commit waits for yet."""
        return [
            stripe
            for stripe in self._log.unsealed.values()
            if isinstance(stripe, UnsealedStripe)
            and stripe.batch is None
            and not self._is_open(stripe)
        ]

    def _seal(
        self, stripe: UnsealedStripe, txn: Transaction | None = None, *, is_kept: bool = False
    ) -> None:
        """Seal a stripe at which a transaction points, or which may have lost all its bytes.

        If `is_kept`, it has not: then its tails would be gone, too.
        """
        if self._is_open(stripe):
            del self._open[stripe.code, stripe.rewritten]
        key = stripe_rows.live_key(stripe.number)
        if txn is not None:
            txn.complete(stripe.number, stripe.position)
        elif is_kept or self._log.engine.get(key) is not None:
            with Transaction(self._log) as change:
                change.complete(stripe.number, stripe.position)
        else:
            self.sealer.forget(stripe)
            return
        self.sealer.seal(stripe)
