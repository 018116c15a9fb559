"""Requests and results of the commands for nodes and their shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...typed_json import OPTIONAL
from .request import LookRequest, Request


@dataclass(frozen=True, slots=True)
class Rebalance:
    """The progress of a rebalance, or the result of the last one."""

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
    """About how many bytes must be moved."""
    error: str
    """A sentence that explains why shards to be moved cannot be moved now; or empty."""


RebalanceAction = Literal["start", "status", "stop"]


@dataclass(frozen=True, slots=True)
class RebalanceRequest(Request[Rebalance]):
    """Start or stop a rebalance, or ask for its progress."""

    command = "rebalance"
    action: RebalanceAction
    rate: float | None = None
    wait: bool = False
    """Answer when the rebalance has ended or was stopped."""

    @property
    def only_looks(self) -> bool:
        """Whether it only asks for the progress."""
        return self.action == "status"


@dataclass(frozen=True, slots=True)
class NodeShare:
    """A node, what it holds, and its share."""

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
    """The nodes, and how far they are off their shares."""

    nodes: tuple[NodeShare, ...]
    off_balance: float
    """The largest deviation of a node from its share, as a fraction of that share."""
    rebalance: Rebalance


@dataclass(frozen=True, slots=True)
class NodesRequest(LookRequest[NodesResult]):
    """Ask for the nodes and what they hold."""

    command = "nodes"


@dataclass(frozen=True, slots=True)
class NodeAdded:
    """A node that was added."""

    node: str
    region: str
    path: str
    weight: float


@dataclass(frozen=True, slots=True)
class NodeAddRequest(Request[NodeAdded]):
    """Add a node."""

    command = "node_add"
    node: str
    region: str
    path: str
    weight: float | None = None
    """None: by the size of its disk, compared with those of the region's other nodes."""


@dataclass(frozen=True, slots=True)
class NodeDrained:
    """The progress of draining a node."""

    node: str
    draining: bool
    drained: bool
    bytes: int | None = field(default=None, metadata=OPTIONAL)
    """Bytes moved off the node; None: draining was cancelled."""


@dataclass(frozen=True, slots=True)
class NodeDrainRequest(Request[NodeDrained]):
    """Start or cancel draining a node."""

    command = "node_drain"
    node: str
    cancel: bool = False
    wait: bool = True
    """Answer when the node has no shards left."""


@dataclass(frozen=True, slots=True)
class NodeRemoved:
    """A node that was removed."""

    node: str
    path: str
    emptied: bool


@dataclass(frozen=True, slots=True)
class NodeRemoveRequest(Request[NodeRemoved]):
    """Take a drained node out of the store."""

    command = "node_remove"
    node: str


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node that was taken offline, or is to be online again."""

    node: str
    path: str
    state: str
    problem: str
    """A sentence that explains why the node is not up; or empty."""


@dataclass(frozen=True, slots=True)
class NodeOfflineRequest(Request[NodeState]):
    """Take a node offline."""

    command = "node_offline"
    node: str
    force: bool = False
    """Even if the store cannot be written to without it."""


@dataclass(frozen=True, slots=True)
class NodeOnlineRequest(Request[NodeState]):
    """Use a node again."""

    command = "node_online"
    node: str
