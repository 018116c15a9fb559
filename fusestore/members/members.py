"""The nodes of an open store: their state, and where each is written next.

A node that is in sync holds every commit, and a commit is acknowledged only
when all of them have flushed it.  One that failed leaves the set until repair
brings it back.  All methods run on the event loop, and only `call` awaits.

No call of a node is waited for longer than NODE_SECONDS_MAX: its thread is then
left to itself, and the node is given up.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache, partial
from typing import Any, TypeVar, cast

import trio
from typing_extensions import Buffer

from ..config.store_config import CONFIG_NAME, NodeConfig, StoreConfig, load, read_identity, write
from ..errors import (
    ConfigError,
    NodeError,
    NodeFullError,
    NodeIdentityError,
    NodeLacksError,
    NodeTimeoutError,
)
from ..format.erasure import Code
from ..format.placement import Placement, Site, losses_borne
from ..format.records import HEADER_BYTES, Run, record_length
from ..format.store_rows import NodeRow
from ..format.stripe_rows import SegmentState, ShardPlace
from ..limits import DEFAULTS, Limits
from ..nodes.base import Node, Segment, Space
from ..nodes.directory import DirectoryNode
from ..system.io_uring import Ring, read_operation
from ..tally import Histogram
from .journal_room import JournalRoom

log = logging.getLogger(__name__)

T = TypeVar("T")


@cache
def _zeros(length: int) -> bytes:
    return bytes(length)


class State(StrEnum):
    """What a node can be used for."""

    UP = "up"
    """Read and written."""
    REBUILDING = "rebuilding"
    """Read and written, while repair brings back what it lacks."""
    BEHIND = "behind"
    """Read: the mount is read-only, or only just begins."""
    SUSPECT = "suspect"
    """Not used: it failed, or did not answer in time; it is tried again by itself."""
    DOWN = "down"
    """Not used: it is gone, is not itself, or has failed again and again."""


@dataclass(slots=True, eq=False)
class Member:
    """One node of the store."""

    id: int
    config: NodeConfig
    limits: Limits
    node: Node | None = None
    state: State = State.DOWN
    in_sync: bool = False
    holds: int = 0
    """The last commit that the node is known to have flushed."""
    error: str = ""
    """Why the node is not up, for people."""
    slow_until: float = 0.0
    """By trio's clock: until then it is read only if others will not do."""
    suspicions: int = 0
    """How often in a row it could not be brought back."""
    space: Space | None = None
    """Room on its device, as of the last flush or probe."""
    journal_room: JournalRoom | None = None
    """Where small commits are written."""
    late_segment: int = 0
    """A journal segment that a write which was given up may still change."""
    sampled_at: float = 0.0
    """By trio's clock: when `space` was told."""
    ring: Ring | None = None
    """Reads and flushes without a thread, where the kernel has that."""
    used: int = 0
    """Bytes that it takes there, as of when that was last asked."""
    corrupt: int = 0
    """Reads whose bytes were not those that were written."""
    flushes: Histogram = field(default_factory=Histogram)
    """How long its part of a commit took."""
    calls: set[trio.CancelScope] = field(default_factory=set)
    """Of what is waited for; given up at once when the node fails."""
    threads: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(DEFAULTS.node_threads_max)
    )
    segment: int = 1
    """The shard segment being filled, and where it goes on."""
    offset: int = 0
    segments: dict[int, SegmentState] = field(default_factory=dict)
    doubted: bool = False
    """It lacks commits, so all its shards have to be looked at."""
    lost_segments: set[int] = field(default_factory=set)
    """Segments with live shards that are gone from the node."""
    changed: set[int] = field(default_factory=set)
    """Segments whose state differs from the last commit's."""
    unclaimed: Counter[int] = field(default_factory=Counter)
    """By segment: bytes reserved for shards that no row has yet; no commit counts them."""
    dirty: set[int] = field(default_factory=set)
    """Segments with bytes that are not flushed."""
    unflushed: list[tuple[int, int]] = field(default_factory=list)
    """(stripe, index) of the shards written since the last flush."""

    @property
    def name(self) -> str:
        """The node's name in the configuration."""
        return self.config.name

    @property
    def writable(self) -> bool:
        """Whether shards can be written there."""
        return self.state in (State.UP, State.REBUILDING)

    @property
    def takes(self) -> bool:
        """Whether new stripes get shards there."""
        return self.writable and not self.config.draining

    @property
    def unused(self) -> bool:
        """Whether nothing is asked of it."""
        return self.state in (State.SUSPECT, State.DOWN)

    async def call(
        self, function: Callable[..., T], *arguments: Any, seconds: float | None = None
    ) -> T:
        """Do something with the node in a thread; NodeTimeoutError when it takes too long."""
        seconds = self.limits.node_seconds_max if seconds is None else seconds
        with trio.move_on_after(seconds, shield=True) as scope:
            self.calls.add(scope)
            try:
                return await trio.to_thread.run_sync(
                    function, *arguments, abandon_on_cancel=True, limiter=self.threads
                )
            finally:
                self.calls.discard(scope)
        raise self.late(seconds)

    @property
    def watched(self) -> tuple[str, Node]:
        """Its name, and itself for a thread of trio's: no call takes longer than its deadline."""
        return self.name, cast("Node", _Watched(self))

    async def read(
        self, run: Run, segment: int, offset: int, length: int, seconds: float
    ) -> bytes | bytearray:
        """Exactly `length` bytes of a segment; NodeError, NodeTimeoutError."""
        node = self.node
        assert node is not None
        if self.ring is None or length <= self.limits.read_now_bytes_max:
            data = node.read_now(run, segment, offset, length)
            if data is not None:
                return data
        opened = node.opened(run, segment) if self.ring is not None else None
        if opened is not None:
            buffer = bytearray(length)
            if await self._fill(opened, offset, buffer, seconds):
                return buffer
        return await self.call(node.read, run, segment, offset, length, seconds=seconds)

    async def _fill(self, opened: Segment, offset: int, buffer: bytearray, seconds: float) -> bool:
        assert self.ring is not None
        operation, kept = read_operation(opened.fd, offset, buffer)
        batch = self.ring.start([operation], (kept, opened))
        if batch is None:
            return False
        if batch.left:
            with trio.move_on_after(seconds, shield=True) as scope:
                self.calls.add(scope)
                try:
                    await self.ring.wait(batch)
                finally:
                    self.calls.discard(scope)
            if batch.left:
                raise self.late(seconds)
        return batch.results[0] == len(buffer)

    def append(
        self, segment: int, offset: int, buffers: Sequence[Buffer], length: int, *, ahead: bool
    ) -> None:
        """In a thread: write a record of `length` bytes to the journal, and zeros behind it."""
        node = self.node
        assert node is not None
        end, room = offset + length, self.journal_room
        if room is None or not room.covers(segment, end):
            self.journal_room = room = None
        node.write(Run.JOURNAL, segment, offset, buffers)
        if ahead and room is None and self.node is node and self.in_sync:  # not given up
            with suppress(NodeFullError):
                zeros = _zeros(self.limits.journal_ahead_bytes)
                node.write(Run.JOURNAL, segment, end, [zeros])
                opened = node.opened(Run.JOURNAL, segment)
                if opened is not None:
                    room = JournalRoom(opened, segment, end + len(zeros), self.limits)
        if room is not None:
            lead = room.lead(end)
            room.begin(end, node.read(Run.JOURNAL, segment, end - lead, lead))
            self.journal_room = room

    def late(self, seconds: float) -> NodeTimeoutError:
        """What is said of a node that did not answer in time."""
        return NodeTimeoutError(f"Node {self.name} did not answer within {seconds:.0f} seconds.")

    def row(self, in_sync: bool, holds: int) -> NodeRow:
        """The node as the log knows it."""
        at = self.config
        place = (self.id, at.name, at.region, str(at.path))
        return NodeRow(*place, in_sync, holds, at.weight, at.draining)

    def take(self, node: Node, space: Space) -> None:
        """The node is there; what it lacks is still to be seen."""
        self.node, self.space, self.state = node, space, State.BEHIND

    def sample(self) -> None:
        """In a thread: see that the node is still there and itself, and how much room it has."""
        assert self.node is not None
        self.node.check()
        self.space = self.node.space()

    def reserve(self, payload_length: int) -> ShardPlace:
        """Take the next place for a shard; the caller then writes it."""
        if self.offset >= self.limits.shard_segment_bytes:
            self.roll()
        length = record_length(payload_length)
        reserved = ShardPlace(self.id, self.segment, self.offset + HEADER_BYTES)
        self.offset += length
        state = self.segments.setdefault(self.segment, SegmentState())
        state.size = self.offset
        state.live += length
        self.changed.add(self.segment)
        return reserved

    def claim(self, place: ShardPlace, payload_length: int, sign: int = 1) -> None:
        """A row has a shard that was rebuilt at a new place; with -1: it has it not yet."""
        self.unclaimed[place.segment] -= sign * record_length(payload_length)
        self.changed.add(place.segment)

    def committed(self, segment: int) -> SegmentState | None:
        """A segment's state for a commit."""
        state = self.segments.get(segment)
        if state is None:
            return None
        return SegmentState(state.size, max(0, state.live - self.unclaimed[segment]))

    def release(self, segment: int, payload_length: int) -> None:
        """A shard is no more: its record counts as dead."""
        state = self.segments.get(segment)
        if state is not None:
            state.live -= record_length(payload_length)
            self.changed.add(segment)

    def note_segments(self, on_disk: Iterable[int]) -> None:
        """Given the segments that the node has: note those that it lost."""
        living = {segment for segment, state in self.segments.items() if state.live > 0}
        self.lost_segments = living.difference(on_disk)

    def roll(self) -> None:
        """Go on in a new segment."""
        self.segment = max([self.segment, *self.segments]) + 1
        self.offset = 0

    def is_full(self, segment: int) -> bool:
        """Whether nothing more is going to be written to a segment."""
        return segment != self.segment

    def fail(self, error: Exception) -> None:
        """Take the node out of use; its unflushed shards are what it now lacks."""
        if self.unused:
            return
        log.error("%s It is out of use now; see 'fusestore status'.", error)
        gone = isinstance(error, NodeIdentityError) or self.suspicions >= self.limits.suspicions_max
        self.state = State.DOWN if gone else State.SUSPECT
        self.in_sync, self.error = False, str(error)
        for scope in list(self.calls):
            scope.cancel()


class _Watched:
    """A node for work in a thread of trio's: no call of it takes longer than its deadline."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._node = member.node

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._node, name)
        return lambda *arguments: trio.from_thread.run(partial(self._ask, method, *arguments))

    async def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await self._member.call(method, *arguments)
        except NodeTimeoutError as error:
            self._member.fail(error)
            raise


class Members:
    """All nodes, in the order of the configuration."""

    def __init__(self, members: Sequence[Member], config: StoreConfig) -> None:
        self.all = list(members)
        self.config = config
        """As it is in the file; see `configure`."""
        self.by_id = {member.id: member for member in members}
        """Those that were removed since the store was opened, too: a read may have an old row."""
        self._taking: tuple[bool, ...] = ()
        self._takers: list[Member] = []
        self._placement: Placement | None = None
        self._loads_of: tuple[Any, Any] | None = None
        """What `_loads` found last, and for what."""

    @property
    def regions(self) -> tuple[str, ...]:
        """The region of each node."""
        return tuple(member.config.region for member in self.all)

    def check_file(self) -> None:
        """ConfigError when the nodes in the file are not those of the open store; blocks."""
        if load(self.config.store).nodes != self.config.nodes:
            raise ConfigError(
                f"The nodes in {self.config.store / CONFIG_NAME} were edited since the store was "
                "opened: unmount and mount it first."
            )

    def configure(self, nodes: tuple[NodeConfig, ...]) -> None:
        """Have other nodes in the configuration, and in its file; ConfigError; blocks.

        `all` is for the caller to change.
        """
        self.check_file()
        config = replace(self.config, nodes=nodes)
        write(config)
        self.config = config

    def add(self, member: Member) -> None:
        """There is one more node."""
        self.all = [*self.all, member]
        self.by_id[member.id] = member
        self._placement = None

    def remove(self, member: Member) -> None:
        """A node that nothing needs is not of the store any more."""
        self.all = [other for other in self.all if other is not member]
        self._placement = None
        member.state, member.in_sync = State.DOWN, False

    def reconfigured(self, member: Member, config: NodeConfig) -> None:
        """A node has another weight, or is drained now, or not any more."""
        member.config = config
        self._placement = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Meanwhile a thread that uses the nodes waits for none longer than its deadline."""
        nodes = [(member, member.node) for member in self.all if member.node is not None]
        for member, _ in nodes:
            _, member.node = member.watched
        try:
            yield
        finally:
            for member, node in nodes:
                member.node = node

    def named(self, name: str) -> Member | None:
        """The member with this name."""
        return next((member for member in self.all if member.name == name), None)

    def place(self, code: Code, stripe: int) -> list[Member]:
        """The member for each of a new stripe's shards."""
        placement = self.placement
        return [self._takers[i] for i in placement.place(code, stripe)]

    @property
    def placement(self) -> Placement:
        """Where new shards go, over `takers`."""
        taking = tuple(member.takes for member in self.all)
        if self._placement is None or taking != self._taking:
            self._taking, self._takers = taking, self._candidates()
            self._placement = Placement(
                [Site(m.name, m.config.region, m.config.weight) for m in self._takers]
            )
        return self._placement

    @property
    def takers(self) -> list[Member]:
        """The nodes that new shards are placed on.

        A region of which none can be written to keeps its part of them, for healing.
        """
        self.placement  # noqa: B018
        return self._takers

    def _candidates(self) -> list[Member]:
        there = {member.config.region for member in self.all if member.takes}
        staying = [member for member in self.all if not member.config.draining] or self.all
        return [member for member in staying if member.takes or member.config.region not in there]

    @property
    def in_sync(self) -> list[Member]:
        """Those that must flush a commit."""
        return [member for member in self.all if member.in_sync]

    @property
    def writable(self) -> list[Member]:
        """Those that shards can be written to."""
        return [member for member in self.all if member.writable]

    def can_store(self, code: Code) -> bool:
        """Whether every stripe of this code would get shards enough, and commits a node."""
        return bool(self.in_sync) and self.could_store(code, {m.id for m in self.all if m.takes})

    def could_store(self, code: Code, ids: Collection[int]) -> bool:
        """Whether these nodes alone would get enough shards of every stripe of this code.

        One node of a region is enough for all that the region gets.
        """
        enough = min(code.k + self.config.spare_shards, code.n)
        regions = {member.config.region for member in self.all if member.id in ids}
        return self.placement.least(code, regions) >= enough

    def losses_borne(self, codes: Iterable[Code], lacking: Collection[int]) -> int:
        """How many more regions may go, whichever, if these nodes are taken to have nothing.

        Nor is anything counted on that other nodes of their regions have: until a
        rebalance all that a stripe has in a region may be on one.
        -1: stripes may have fewer shards than they need already.
        """
        regions = tuple(dict.fromkeys(self.regions))
        gone = frozenset(member.config.region for member in self.all if member.id in lacking)
        return min(losses_borne(code, regions, gone) for code in codes)

    def usable(self, code: Code) -> tuple[int, int]:
        """(total, free) bytes of file data that fit, net of the code and of the reserve.

        So that no node is full before its time: what is accepted between two commits is
        counted as if each of its stripes had as many shards on a device as one may have.
        """
        spaces = {m.space.device: m.space for m in self.takers if m.space and m.writable}
        totals, frees = [], []
        for device, (average, worst) in self._loads(code).items():
            room = max(0, spaces[device].free - self.config.limits.reserve_bytes)
            soon = min(room / worst, self.config.limits.between_commits_bytes)
            frees.append(int(soon + (room - soon * worst) / average))
            totals.append(int(spaces[device].total / average))
        try:
            found = os.statvfs(self.config.metadata)
            room = found.f_bavail * found.f_frsize
            frees.append(
                max(0, room - self.config.limits.reserve_bytes) * self.config.limits.metadata_share
            )
        except OSError as error:
            log.error("The metadata's free space cannot be told: %s.", error.strerror)
        return min(totals, default=0), min(frees, default=0)

    def _loads(self, code: Code) -> dict[int, tuple[float, float]]:
        """By device: the bytes that one of file data takes there, on average and at most."""
        placement = self.placement
        devices = tuple(
            m.space.device if m.space is not None and m.writable else None for m in self._takers
        )
        key = (placement, code, devices)
        if self._loads_of is None or self._loads_of[0] != key:
            expected, most = placement.expected(code), placement.most(code)
            found: dict[int, tuple[float, float]] = {}
            for device in {device for device in devices if device is not None}:
                here = [i for i, other in enumerate(devices) if other == device]
                by_region: Counter[str] = Counter()
                for i in here:
                    by_region[self._takers[i].config.region] += most[i]
                limit = placement.most_in_region(code)
                worst = min(sum(min(count, limit) for count in by_region.values()), code.n)
                found[device] = (sum(expected[i] for i in here) / code.k, worst / code.k)
            self._loads_of = key, found
        loads: dict[int, tuple[float, float]] = self._loads_of[1]
        return loads


def open_node(config: StoreConfig, node: NodeConfig, *, read_only: bool = False) -> Node:
    """Open a node of the configuration; NodeError when it is not there or not itself."""
    identity = read_identity(node.path)
    if (identity.store, identity.node) != (config.uuid, node.name):
        raise NodeIdentityError(
            f"{node.path} belongs to node {identity.node} of store {identity.store}, "
            f"not to node {node.name} of {config.store}."
        )
    return DirectoryNode(node.path, identity, read_only=read_only, limits=config.limits)


def node_ids(nodes: Iterable[NodeConfig], rows: Iterable[NodeRow]) -> dict[str, int]:
    """By name: the ids that the log knows; nodes that it does not know get the next, in order."""
    ids = {row.name: row.id for row in rows}
    for node in nodes:
        ids.setdefault(node.name, max(ids.values(), default=0) + 1)
    return ids


def shard_sizes(node: Node) -> dict[int, int]:
    """The bytes in each shard segment of a node; blocks; NodeError."""
    found = {}
    for segment in node.segments(Run.SHARDS):
        with suppress(NodeLacksError):  # it was reclaimed meanwhile
            found[segment] = node.size(Run.SHARDS, segment)
    return found


def open_members(
    config: StoreConfig,
    rows: Sequence[NodeRow],
    *,
    read_only: bool = False,
    opened: bool = True,
) -> Members:
    """The nodes of a store; `rows` are those that the log knows."""
    ids = node_ids(config.nodes, rows)
    members = []
    for node in config.nodes:
        member = Member(ids[node.name], node, config.limits)
        if opened:
            try:
                opened_node = open_node(config, node, read_only=read_only)
                member.take(opened_node, opened_node.space())
            except NodeError as error:
                member.error = str(error)
        members.append(member)
    return Members(members, config)
