"""All nodes of an open store: which take part, where new shards go, how much room there is.

A node that is in sync holds every commit, and a commit is acknowledged only
when all of them have flushed it.  One that failed leaves the set until repair
brings it back.  All methods run on the event loop.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
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

log = logging.getLogger(__name__)


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
        write_store_config(config)
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
        member.standing.removed()

    def reconfigured(self, member: Member, config: NodeConfig) -> None:
        """A node has another weight, or is drained now, or not any more."""
        member.config = config
        self._placement = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Meanwhile a thread that uses the nodes waits for none longer than its deadline."""
        nodes = [(member, member.node) for member in self.all if member.is_open]
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
    def foreign(self) -> list[Member]:
        """Those that hold another history; what that may need is freed nowhere."""
        return [member for member in self.all if member.state is State.FOREIGN]

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
