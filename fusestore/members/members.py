"""All nodes of an open store: the configuration, placement of new shards, and room.

A node that is in sync holds every commit.  A commit is acknowledged only when all nodes
in sync have flushed it.  A failed node leaves this set until repair brings it back.  All
methods run on the event loop.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..config.store_config import CONFIG_NAME, NodeConfig, StoreConfig, load
from ..config.store_config_write import write_store_config
from ..errors import ConfigError
from ..format.erasure import Code
from ..format.placement import Placement, Site, losses_borne
from .member import Member
from .standing import State

logger = logging.getLogger(__name__)


class Members:
    """All nodes, in the order of the configuration."""

    def __init__(self, members: Sequence[Member], config: StoreConfig) -> None:
        self.all = list(members)
        self.config = config
        """The configuration as in the file; see `configure`."""
        self.by_id = {member.id: member for member in members}
        """All nodes, including those removed since the mount: a read may have an old row."""
        self._on_fenced: Callable[[str], None] = lambda reason: None
        self._taking: tuple[bool, ...] = ()
        self._takers: list[Member] = []
        self._placement: Placement | None = None
        self._loads_of: tuple[Any, Any] | None = None
        """The last result of `_loads`, and its arguments."""

    @property
    def regions(self) -> tuple[str, ...]:
        """The region of each node."""
        return tuple(member.config.region for member in self.all)

    def check_file(self) -> None:
        """Raise ConfigError if the file has other nodes than the open store; blocks."""
        if load(self.config.store).nodes != self.config.nodes:
            raise ConfigError(
                f"The nodes in {self.config.store / CONFIG_NAME} were edited since the store was "
                "opened: unmount the store and mount it again first."
            )

    def configure(self, nodes: tuple[NodeConfig, ...]) -> None:
        """Set the nodes of the configuration, and write its file; ConfigError; blocks.

        The caller changes `all`.
        """
        self.check_file()
        config = replace(self.config, nodes=nodes)
        write_store_config(config)
        self.config = config

    def on_fenced(self, function: Callable[[str], None]) -> None:
        """Set what is called with a sentence when another mount has claimed a node."""
        self._on_fenced = function
        for member in self.all:
            member.on_fenced = function

    def add(self, member: Member) -> None:
        """Add a node."""
        member.on_fenced = self._on_fenced
        self.all = [*self.all, member]
        self.by_id[member.id] = member
        self._placement = None

    def remove(self, member: Member) -> None:
        """Remove a node that nothing needs."""
        self.all = [other for other in self.all if other is not member]
        self._placement = None
        member.standing.removed()

    def reconfigured(self, member: Member, config: NodeConfig) -> None:
        """Record that the weight of a node, or whether it is drained, has changed."""
        member.config = config
        self._placement = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Enforce the deadlines of calls that a thread makes meanwhile."""
        nodes = [(member, member.node) for member in self.all if member.is_open]
        for member, _ in nodes:
            _, member.node = member.watched
        try:
            yield
        finally:
            for member, node in nodes:
                member.node = node

    def named(self, name: str) -> Member | None:
        """Return the member with this name."""
        return next((member for member in self.all if member.name == name), None)

    def place(self, code: Code, stripe: int) -> list[Member]:
        """Return the member for each shard of a new stripe."""
        placement = self.placement
        return [self._takers[i] for i in placement.place(code, stripe)]

    @property
    def placement(self) -> Placement:
        """The placement of new shards on `takers`."""
        taking = tuple(member.takes for member in self.all)
        if self._placement is None or taking != self._taking:
            self._taking, self._takers = taking, self._candidates()
            self._placement = Placement(
                [Site(m.name, m.config.region, m.config.weight) for m in self._takers]
            )
        return self._placement

    @property
    def takers(self) -> list[Member]:
        """The nodes on which new shards are placed.

        A region without a writable node keeps its share of new shards, for healing.
        """
        self.placement  # noqa: B018
        return self._takers

    def _candidates(self) -> list[Member]:
        there = {member.config.region for member in self.all if member.takes}
        staying = [member for member in self.all if not member.config.draining] or self.all
        return [member for member in staying if member.takes or member.config.region not in there]

    @property
    def in_sync(self) -> list[Member]:
        """The nodes that must flush a commit."""
        return [member for member in self.all if member.in_sync]

    @property
    def foreign(self) -> list[Member]:
        """The nodes with another history; data that this history may need is not freed."""
        return [member for member in self.all if member.state is State.FOREIGN]

    @property
    def writable(self) -> list[Member]:
        """The nodes to which shards can be written."""
        return [member for member in self.all if member.writable]

    def can_store(self, code: Code) -> bool:
        """Return whether each stripe of a code would get enough shards, and commits a node."""
        return bool(self.in_sync) and self.could_store(code, {m.id for m in self.all if m.takes})

    def could_store(self, code: Code, ids: Collection[int]) -> bool:
        """Return whether these nodes alone would get enough shards of each stripe of a code.

        One node of a region can store all shards that the region gets.
        """
        enough = min(code.k + self.config.spare_shards, code.n)
        regions = {member.config.region for member in self.all if member.id in ids}
        return self.placement.least(code, regions) >= enough

    def losses_borne(self, codes: Iterable[Code], lacking: Collection[int]) -> int:
        """Return how many more regions, no matter which, can be lost without the nodes `lacking`.

        Other nodes of their regions do not count either: until a rebalance, all shards of a
        stripe in a region may be on one node.
        -1: some stripes may already have fewer shards than they need.
        """
        regions = tuple(dict.fromkeys(self.regions))
        gone = frozenset(member.config.region for member in self.all if member.id in lacking)
        return min(losses_borne(code, regions, gone) for code in codes)

    def usable(self, code: Code) -> tuple[int, int]:
        """Return (total, free) bytes of file data that fit, without parity and the reserve.

        Data accepted between two commits is counted as if each of its stripes had the greatest
        possible number of shards on a device, so that no node is full unexpectedly.
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
            logger.error("The free space of the metadata is unknown: %s.", error.strerror)
        return min(totals, default=0), min(frees, default=0)

    def _loads(self, code: Code) -> dict[int, tuple[float, float]]:
        """Return the bytes that one byte of file data takes on each device: average, maximum."""
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
