"""Room for what is accepted: a ledger in raw bytes of each device, in the code of each file.

`members/devices` knows what is free, and what is on its way to each device.  To this, `Room`
adds what waits in memory: stripes that have no place yet, changes that no commit has taken,
and growth of the metadata that no checkpoint has written.  Something is accepted only if
afterwards each device still has its reserve, and on each node as much as one whole metadata
dump takes.  What changes rows without growing may use half of the reserve, and what deletes
may use all of it.

Most requests are granted from `_budget`, which counts as if one device got every shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import trio

from ..errors import BacklogError, NoSpaceError
from ..format.erasure import Code
from ..format.records import record_length
from ..members.devices import Begun
from ..members.member import Member
from ..members.members import Members
from ..nodes.base import Space

GROWS, REWRITES = 1.0, 0.5
"""The parts of the reserve that must be left after a request."""


@dataclass(slots=True, eq=False)
class _Load:
    """What the nodes of a store have on one device."""

    members: list[Member]
    most: dict[Code, int]
    """The greatest number of shards of a stripe that it may get, by code."""


class Room:
    """The ledger of an open store."""

    def __init__(self, members: Members, code: Code) -> None:
        self._members = members
        self._limits = members.config.limits
        self._code = code
        self.unplaced: Callable[[], Mapping[Code, int]] = dict
        """By code: bytes of one shard of each stripe that has no places yet; the writer tells."""
        self.within_reach: Callable[[], int] = int
        """Bytes that cleaning gives a request that finds no room; cleaning sets this."""
        self.rows_pending = 0
        """Estimated bytes of changes that no commit has taken; see `taken`."""
        self._rows_taken = 0
        self.dump_bytes = 0
        """The bytes of a metadata dump, if one were made now, at most."""
        self.metadata_pending = 0
        """Estimated growth of the metadata since the last freeze."""
        self._metadata_frozen = 0
        self._values_pending = self._values_frozen = 0
        """Bytes of names and values in memory, as for the metadata."""
        self._metadata: tuple[int, int] | None = None
        """The device of the metadata, and the free bytes within its file."""
        self.waits = ""
        """Why something that was accepted waits for room; empty if nothing does."""
        self.waited = trio.Event()
        """Set when that has ended."""
        self.is_short = False
        """Whether a quarter of the reserve of a device was used up at the last sample."""
        self._budget = 0
        self._metadata_budget = 0
        self._loads: dict[int, _Load] = {}
        self._loads_of: tuple[object, ...] = ()

    # --- what happened -------------------------------------------------------

    def sampled_metadata(self, begun: Begun, found: tuple[Space, int]) -> None:
        """Take over what `Engine.space` found, with what `Devices.begin_sample` returned."""
        space, spare = found
        self._members.devices.end_sample(begun, space)
        self._metadata = space.device, spare

    def taken(self) -> None:
        """Record that a commit took the pending changes."""
        self._rows_taken, self.rows_pending = self.rows_pending, 0

    def appended(self) -> None:
        """Record that the last commit that took changes is in the journals, and sampled."""
        self._rows_taken = 0

    def frozen(self) -> None:
        """Record that a checkpoint sets the changes so far aside."""
        self._metadata_frozen += self.metadata_pending
        self._values_frozen += self._values_pending
        self.metadata_pending = self._values_pending = 0

    def checkpointed(self) -> None:
        """Record that what was set aside is in the metadata; a sample follows."""
        self._metadata_frozen = self._values_frozen = 0

    @property
    def has_backlog(self) -> bool:
        """Whether too many values wait in memory for a checkpoint."""
        waiting = self._values_pending + self._values_frozen
        return waiting >= self._limits.unwritten_values_bytes_max

    @property
    def growth_unwritten(self) -> int:
        """Estimated growth of the metadata that no checkpoint has written, in bytes."""
        return self.metadata_pending + self._metadata_frozen

    # --- what is asked -------------------------------------------------------

    def take_bytes(self, length: int, code: Code, share: float = GROWS) -> None:
        """Take room for `length` bytes of a file in its code; NoSpaceError."""
        raw = length * code.n // code.k + 256
        rows = length // self._limits.metadata_share + 256
        if raw <= self._budget and rows <= self._metadata_budget:
            self._budget -= raw
            self._metadata_budget -= rows
        else:
            self._look(share, code, length, rows)
        self.metadata_pending += rows
        self.rows_pending += 256

    def note_rows(self) -> None:
        """Count a change that is always accepted, as it deletes."""
        self.rows_pending += 256

    def take_rows(self, length: int, share: float) -> None:
        """Take room for a change of rows with values of `length` bytes.

        NoSpaceError; BacklogError if a checkpoint must come first.
        """
        if self.has_backlog:
            raise BacklogError("Many changes wait for the metadata database.")
        record = self._limits.metadata_row_bytes + length
        growth = self._limits.metadata_page_bytes + length if share == GROWS else 0
        raw = record * len(self._members.all)
        if raw <= self._budget and growth <= self._metadata_budget:
            self._budget -= raw
            self._metadata_budget -= growth
        else:
            self._look(share, self._code, 0, growth, record)
        self.rows_pending += record
        self.metadata_pending += growth
        self._values_pending += length

    def refresh(self) -> None:
        """Compute anew what may be granted without a look; called after each sample."""
        self._budget = self._metadata_budget = 0
        for member in self._members.all:
            if member.is_full and self.left_on(member) > 2 * self._limits.unflushed_bytes_max:
                member.is_full = False
        left = self._left(GROWS, self._code, 0, 0, 0)
        self._grant(left)
        least = min(left.values(), default=0)
        self.is_short = least + self._limits.reserve_bytes // 4 < 0

    def has_for_dump(self) -> bool:
        """Whether a metadata dump fits on every device."""
        loads = self._current_loads(self._code).items()
        devices = self._members.devices
        return all(devices.at(d).room > len(at.members) * self.dump_bytes for d, at in loads)

    # --- the look ------------------------------------------------------------

    def _grant(self, left: Mapping[int, int]) -> None:
        """Let most of what is left be taken without a look."""
        whole = max(0, min(left.values(), default=0))
        metadata = left.get(self._metadata[0], whole) if self._metadata else whole
        shared = self._metadata is not None and self._metadata[0] in self._loads
        self._budget = whole // 2 if shared else whole
        self._metadata_budget = max(0, metadata) // 2 if shared else max(0, metadata)

    def _look(self, share: float, code: Code, length: int, growth: int, record: int = 0) -> None:
        """Look at each device; NoSpaceError if one would lack room."""
        while True:
            left = self._left(share, code, length, growth, record)
            short = [device for device, count in left.items() if count < 0]
            if not short:
                break
            if length == 0 or not self._avoid(short):
                raise NoSpaceError(
                    "The store is full: every device keeps "
                    f"{self._limits.reserve_bytes >> 20} MiB in reserve."
                )
        if share == GROWS:
            self._grant(left)

    def _left(
        self, share: float, code: Code, length: int, growth: int, record: int
    ) -> dict[int, int]:
        """Return what each device would have left above its reserve after a request."""
        limits, loads = self._limits, self._current_loads(code)
        waiting = dict(self.unplaced())
        if length:
            waiting[code] = waiting.get(code, 0) + record_length(code.shard_length(length))
        reserve = int(share * limits.reserve_bytes)
        journal = self.dump_bytes + self.rows_pending + self._rows_taken + record
        left = {}
        for number, load in loads.items():
            need = len(load.members) * journal
            for other, size in waiting.items():
                need += self._most(load, other) * size
            kept = reserve if self._takes(load) else min(reserve, limits.reserve_bytes // 2)
            left[number] = self._members.devices.at(number).room - kept - need
        if self._metadata is not None:
            number, spare = self._metadata
            need = self.metadata_pending + self._metadata_frozen + growth
            if number not in left:  # free pages within the file count for half of the reserve
                room = self._members.devices.at(number).room
                left[number] = room - reserve + min(spare, reserve // 2)
                spare = max(0, spare - reserve // 2)
            left[number] -= max(0, need - spare)
        return left

    def left_on(self, member: Member) -> int:
        """Return what the device of a node has left above its reserve, and what it owes."""
        left = self._left(GROWS, self._code, 0, 0, 0)
        return left.get(member.space.device, 0) if member.space is not None else 0

    def _current_loads(self, code: Code) -> dict[int, _Load]:
        members = self._members
        key = (
            members.placement,
            tuple(m.space.device if m.space and m.writable else None for m in members.all),
        )
        if self._loads_of != key:
            self._loads, self._loads_of = {}, key
            for member in members.writable:
                if member.space is not None:
                    load = self._loads.setdefault(member.space.device, _Load([], {}))
                    load.members.append(member)
        return self._loads

    def _most(self, load: _Load, code: Code) -> int:
        """The most shards of a stripe that a device may get, also if other nodes fail."""
        most = load.most.get(code)
        if most is None:
            takers = self._members.takers
            regions = {member.config.region for member in load.members if member in takers}
            in_region = self._members.placement.most_in_region(code)
            most = load.most[code] = min(len(regions) * in_region, code.n)
        return most

    def _takes(self, load: _Load) -> bool:
        """Whether a device gets shards: else it may use half of its reserve for journals."""
        return not all(member.is_full for member in load.members)

    def _avoid(self, short: list[int]) -> bool:
        """Let other nodes of their regions take the shards of devices that lack room."""
        takers = self._members.takers
        here = [m for m in takers if m.space is not None and m.space.device in short]
        others = {m.config.region for m in takers if m not in here and m.writable}
        if not here or any(member.config.region not in others for member in here):
            return False
        for member in here:
            member.is_full = True
        return True

    # --- for people ----------------------------------------------------------

    def usable(self, code: Code) -> tuple[int, int]:
        """Return (total, free) bytes of file data in a code, without parity and the reserve.

        What cleaning gives back when it is needed is free.  While too few nodes are up for the
        code, nothing is.
        """
        members = self._members
        left = self._left(GROWS, code, 0, 0, 0)
        known = {m.space.device: m.space.total for m in members.all if m.space is not None}
        staying = [member for member in members.all if not member.config.draining]
        total = self._fill(code, known, staying or members.all)
        free = 0
        if members.can_store(code):
            free = self._fill(code, left, members.takers)
            after = self._left(REWRITES, code, self._limits.clean_bytes, 0, 0)
            if min(after.values(), default=-1) >= 0:
                free += self.within_reach()  # else nothing can be moved
        if self._metadata is not None:
            free = min(free, max(0, left[self._metadata[0]]) * self._limits.metadata_share)
        return max(total, free), free

    def full(self) -> str:
        """Return a sentence about the disks that leave no room for new data; empty if none do."""
        if self.usable(self._code)[1] or not self._members.can_store(self._code):
            return ""
        left = self._left(GROWS, self._code, 0, 0, 0)
        short = {number for number, size in left.items() if size < self._limits.stripe_bytes}
        full = [m.name for m in self._members.all if m.space and m.space.device in short]
        if self._metadata is not None and self._metadata[0] in short:
            full.insert(0, "the metadata")
        return f"The store is full: there is no room on the disk of {', '.join(full)}."

    def _fill(self, code: Code, room: Mapping[int, int], nodes: list[Member]) -> int:
        """Return how much fits if each node that is full leaves its share to its region's others.

        Devices that are not in `room` have no end.
        """
        rest, filled = {number: max(0, size) for number, size in room.items()}, 0.0
        regions = {member.config.region for member in nodes}
        while regions == {member.config.region for member in nodes}:
            loads = self._average(code, nodes, rest)
            if not loads:
                break
            step = min(rest[device] / load for device, load in loads.items())
            full = min(loads, key=lambda device: rest[device] / loads[device])
            filled += step
            for device, load in loads.items():
                rest[device] -= int(step * load)
            nodes = [m for m in nodes if m.space is None or m.space.device != full]
        return int(filled)

    def _average(
        self, code: Code, nodes: list[Member], devices: Collection[int]
    ) -> dict[int, float]:
        """Return the bytes that a byte of file data takes on each device, on average."""
        found: defaultdict[int, float] = defaultdict(float)
        expected = self._members.placement_on(nodes).expected(code)
        for member, shards in zip(nodes, expected, strict=True):
            if member.space is not None and member.space.device in devices and shards > 0:
                found[member.space.device] += shards / code.k
        return found
