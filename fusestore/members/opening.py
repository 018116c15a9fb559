"""Opening the nodes of a store: each must be there, and be itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ..config.store_config import NodeConfig, StoreConfig
from ..errors import NodeError, NodeIdentityError, NodeLacksError, NodeOfflineError
from ..format.records import SegmentKind
from ..format.store_rows import NodeRow
from ..nodes.base import Node
from ..nodes.directory import DirectoryNode
from ..nodes.recognition import identify
from ..nodes.unexpected import costs_only
from .member import Member
from .members import Members


def open_node(
    config: StoreConfig, node: NodeConfig, *, read_only: bool = False, refuse: bool = True
) -> DirectoryNode:
    """Open a node of the configuration; NodeError if it is missing, another node's, or in use.

    NodeOfflineError if an operator took it offline.

    If the node may be written, the owner record must permit it, or with `refuse` false,
    the caller checks this.  The caller claims the node.
    """
    if node.offline:
        raise offline_error(config, node)
    with costs_only(node.name):
        identity = identify(node.path, config.uuid, node.name, node.region)
        if (identity.store, identity.node) != (config.uuid, node.name):
            raise NodeIdentityError(
                f"{node.path} belongs to node {identity.node} of store {identity.store}, "
                f"not to node {node.name} of {config.store}."
            )
        opened = DirectoryNode(
            node.path,
            identity,
            read_only=read_only,
            limits=config.limits,
            owner=os.path.realpath(config.store),
            mount=config.mount,
        )
        if refuse and not read_only:
            try:
                opened.refuse_owner()
            except BaseException:
                opened.close()
                raise
        return opened


def offline_error(config: StoreConfig, node: NodeConfig) -> NodeOfflineError:
    """Return what is said of a node that an operator took offline."""
    return NodeOfflineError(
        f"Node {node.name} is offline: 'fusestore node online {config.store} {node.name}' brings "
        "it back."
    )


def node_ids(nodes: Iterable[NodeConfig], rows: Iterable[NodeRow]) -> dict[str, int]:
    """By name: the ids that the log knows; nodes that it does not know get the next, in order."""
    ids = {row.name: row.id for row in rows}
    for node in nodes:
        ids.setdefault(node.name, max(ids.values(), default=0) + 1)
    return ids


def shard_sizes(node: Node) -> dict[int, int]:
    """The bytes in each shard segment of a node; blocks; NodeError."""
    found = {}
    for segment in node.segments(SegmentKind.SHARDS):
        with suppress(NodeLacksError):  # it was reclaimed meanwhile
            found[segment] = node.size(SegmentKind.SHARDS, segment)
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
                member.open(opened_node, opened_node.space())
            except NodeError as error:
                member.standing.refused(error)
        members.append(member)
    return Members(members, config)
