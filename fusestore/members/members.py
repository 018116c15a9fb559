"""All nodes of an open store: the configuration, and placement of new shards.

A node that is in sync holds every commit.  A commit is acknowledged only when all nodes
in sync have flushed it.  A failed node leaves this set until repair brings it back.  All
methods run on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial

import trio

from ..config.store_config import CONFIG_NAME, NodeConfig, StoreConfig, load
from ..config.store_config_write import write_store_config
from ..errors import ConfigError
from ..format.erasure import Code
from ..format.placement import Placement, Site, losses_borne
from .devices import Devices
from .member import Member
from .standing import State


class Members:
    """All nodes, in the order of the configuration."""

    def __init__(self, members: Sequence[Member], config: StoreConfig) -> None:
        self.all = list(members)
        self.config = config
        """The configuration as in the file; see `configure`."""
        self.devices = Devices()
        for member in members:
            self._share_devices(member)
        self.by_id = {member.id: member for member in members}
        """All nodes, including those removed since the mount: a read may have an old row."""
        self._on_fenced: Callable[[str], None] = lambda reason: None
        self._nodes: list[tuple[int, State, bool, NodeConfig]] = []
        """What `_placement`, `_takers` and `_can_store` were computed from."""
        self._takers: list[Member] = []
        self._placement = self.placement_on([])
        self._can_store: dict[Code, bool] = {}
        for member in members:
            member.can_be_spared = partial(self.can_do_without, [member])

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
        self._share_devices(member)
        self.by_id[member.id] = member
        member.can_be_spared = partial(self.can_do_without, [member])

    def _share_devices(self, member: Member) -> None:
        member.devices = self.devices
        if member.space is not None:
            self.devices.end_sample(self.devices.begin_sample(), member.space)

    def remove(self, member: Member) -> None:
        """Remove a node that nothing needs."""
        self.all = [other for other in self.all if other is not member]
        member.standing.removed()

    def reconfigured(self, member: Member, config: NodeConfig) -> None:
        """Record that the weight of a node, or whether it is drained, has changed."""
        member.config = config

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Enforce the deadlines of calls that a thread makes meanwhile."""
        nodes = []
        for member in self.all:
            if member.is_open:
                _, watched = member.watched
                nodes.append((member, member.node, watched))
                member.node = watched
        try:
            yield
        finally:
            for member, node, watched in nodes:
                if member.node is watched:
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
        nodes = [(m.id, m.standing.state, m.is_full, m.config) for m in self.all]
        if nodes != self._nodes:
            self._nodes, self._takers = nodes, self._candidates()
            self._placement = self.placement_on(self._takers)
            self._can_store.clear()
        return self._placement

    @staticmethod
    def placement_on(nodes: Iterable[Member]) -> Placement:
        """Return the placement on these nodes."""
        return _placement(tuple(Site(m.name, m.config.region, m.config.weight) for m in nodes))

    @property
    def takers(self) -> list[Member]:
        """The nodes on which new shards are placed.

        A region without a writable node keeps its share of new shards, for healing.
        """
        self.placement  # noqa: B018
        return self._takers

    def _candidates(self) -> list[Member]:
        takes = [member for member in self.all if member.takes]
        there = {member.config.region for member in takes}
        roomy = {member.config.region for member in takes if not member.is_full}
        staying = [member for member in self.all if not member.config.draining] or self.all
        return [
            member
            for member in staying
            if member.config.region not in there
            or (member.takes and not (member.is_full and member.config.region in roomy))
        ]

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
        """Return whether stripes of a code would get enough shards, and a node can take commits."""
        self.placement  # noqa: B018
        if code not in self._can_store:
            takes = {member.id for member in self.all if member.takes}
            self._can_store[code] = bool(self.in_sync) and self.could_store(code, takes)
        return self._can_store[code]

    def can_do_without(self, late: Collection[Member]) -> bool:
        """Return whether the store can go on if nodes that do not answer are given up.

        Other nodes that have not answered for long do not count.  If the store cannot go on
        with the nodes either, nothing is gained by waiting for them.
        """
        code = self.config.code
        if not self.can_store(code):
            return True
        since = trio.current_time() - self.config.limits.node_seconds_max / 4
        rest = [
            member
            for member in self.all
            if member not in late and (member.calls.waiting_since() or since) >= since
        ]
        left = any(member.in_sync for member in rest)
        return left and self.could_store(code, {member.id for member in rest if member.takes})

    def waiting(self) -> str:
        """Return a sentence about the nodes that the store waits for; empty if there are none."""
        late = [member for member in self.all if member.calls.are_spared]
        if not late:
            return ""
        names = ", ".join(member.name for member in late)
        return f"The store waits for {names}, without which it cannot go on: writes hang."

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


@lru_cache(maxsize=64)
def _placement(sites: tuple[Site, ...]) -> Placement:
    return Placement(sites)
