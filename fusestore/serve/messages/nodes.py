"""Nodes and their shares: what these commands are asked, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...typed_json import OPTIONAL
from .request import LookRequest, Request


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Where a rebalance stands, or how the last one ended."""

    state: str
    """never, running, stopped or done."""
    rate: float | None
    started: float
    finished: float
    """Seconds since the epoch."""
    shards: int
    size: int
    """Shards moved, and their bytes."""
    total: int
    """About how many bytes there are to move."""
    error: str
    """Why nothing can be moved now though there is something to move, for people."""


RebalanceAction = Literal["start", "status", "stop"]


@dataclass(frozen=True, slots=True)
class RebalanceRequest(Request[Rebalance]):
    """Start or stop a rebalance, or say where it stands."""

    command = "rebalance"
    action: RebalanceAction
    rate: float | None = None
    wait: bool = False
    """Answer when it has ended or was stopped."""

    @property
    def only_looks(self) -> bool:
        """Whether it only asks where the rebalance stands."""
        return self.action == "status"


@dataclass(frozen=True, slots=True)
class NodeShare:
    """A node, what it holds, and what it should."""

    name: str
    region: str
    path: str
    weight: float
    state: str
    draining: bool
    drained: bool
    problem: str
    shards: int
    bytes: int
    share_bytes: int
    bytes_free: int


@dataclass(frozen=True, slots=True)
class NodesResult:
    """The nodes, and how even they are."""

    nodes: tuple[NodeShare, ...]
    off_balance: float
    """By what share of its own share a node is off at most."""
    rebalance: Rebalance


@dataclass(frozen=True, slots=True)
class NodesRequest(LookRequest[NodesResult]):
    """Which nodes are there, and what do they hold?"""

    command = "nodes"


@dataclass(frozen=True, slots=True)
class NodeAdded:
    """A node that takes part now."""

    node: str
    region: str
    path: str
    weight: float


@dataclass(frozen=True, slots=True)
class NodeAddRequest(Request[NodeAdded]):
    """Let one more node take part."""

    command = "node_add"
    node: str
    region: str
    path: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class NodeDrained:
    """How far draining a node is."""

    node: str
    draining: bool
    drained: bool
    bytes: int | None = field(default=None, metadata=OPTIONAL)
    """Moved off it; None: draining was cancelled."""


@dataclass(frozen=True, slots=True)
class NodeDrainRequest(Request[NodeDrained]):
    """Give a node's shards to others."""

    command = "node_drain"
    node: str
    cancel: bool = False
    wait: bool = True
    """Answer when it has none any more."""


@dataclass(frozen=True, slots=True)
class NodeRemoved:
    """A node that takes part no more."""

    node: str
    path: str
    emptied: bool


@dataclass(frozen=True, slots=True)
class NodeRemoveRequest(Request[NodeRemoved]):
    """Take a node that was drained out of the store."""

    command = "node_remove"
    node: str
