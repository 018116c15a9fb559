"""recover: finding the nodes of a store, with or without its configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from ..config import store_config as names
from ..config.node_identity import IDENTITY_NAME, NodeIdentity, read_identity
from ..config.owner_record import Mount
from ..config.store_config import StoreConfig
from ..errors import NodeBusyError, NodeError, StoreBusyError, UsageError
from ..nodes.base import Node
from ..nodes.directory import DirectoryNode
from ..nodes.ownership import refusals
from ..nodes.recognition import identify
from ..nodes.unexpected import costs_only

logger = logging.getLogger(__name__)

Candidate = tuple[Path, NodeIdentity]
"""A directory with the identity of a node."""


@dataclass(slots=True)
class FoundNodes:
    """The places of a store's nodes."""

    store: Path
    uuid: UUID
    config: StoreConfig | None
    places: dict[str, Candidate] = field(default_factory=dict)
    """By node."""
    problems: dict[str, str] = field(default_factory=dict)
    """By node: why it is not available."""

    @property
    def metadata(self) -> Path:
        """The directory of the store's metadata."""
        return self.config.metadata if self.config else self.store / names.METADATA_NAME

    def open(self, until: ExitStack) -> dict[str, Node]:
        """Open the available nodes, by name, `until` closes them; UsageError if there are none."""
        nodes: dict[str, Node] = {}
        mount = Mount.begin(take_over=False)
        for name, (path, identity) in self.places.items():
            try:
                owner = os.path.realpath(self.store)
                with costs_only(name):
                    nodes[name] = DirectoryNode(
                        path, identity, read_only=True, owner=owner, mount=mount
                    )
                    close_node(until, nodes[name])
            except NodeBusyError as error:
                raise StoreBusyError(str(error)) from error
            except NodeError as error:
                self.problems[name] = str(error)
        if not nodes:
            raise UsageError(_none_available(self.store, self.problems))
        for refusal in refusals(mount, nodes).values():  # nothing is written; a mount refuses
            logger.warning("%s What is written there from now on is not recovered.", refusal)
        return nodes


def _none_available(store: Path, problems: dict[str, str]) -> str:
    reasons = " ".join(problems.values())
    return f"No node of {store} is available: name their places with --from. {reasons}"


def close_node(until: ExitStack, node: Node) -> None:
    """Have a node closed; that this fails is logged."""

    def close() -> None:
        try:
            node.close()
        except NodeError as error:
            logger.warning("%s", error)

    until.callback(close)


def find_nodes(store: Path, extra: Sequence[Path]) -> FoundNodes:
    """Find a store's nodes, also in `extra`; UsageError if they do not belong together."""
    store = Path(os.path.realpath(store))
    config = names.load(store) if os.path.lexists(store / names.CONFIG_NAME) else None
    problems: dict[str, str] = {}
    candidates = _configured(config, problems) if config else _below(store, problems)
    candidates += [(path, _identity(config, path)) for path in map(Path.resolve, extra)]
    if not candidates and config:
        raise UsageError(_none_available(store, problems))
    if not candidates:
        raise UsageError(
            f"{store} has no {names.CONFIG_NAME} and no node: name the places of the nodes "
            "with --from."
        )
    uuid = config.uuid if config else candidates[0][1].store
    found = FoundNodes(store, uuid, config, problems=problems)
    for path, identity in candidates:
        if identity.store != uuid:
            raise UsageError(f"{path} belongs to another store ({identity.store}): leave it out.")
        known = found.places.get(identity.node)
        if known is not None and known[0] != path:
            raise UsageError(
                f"{known[0]} and {path} are both node {identity.node}: move the older one away."
            )
        found.places[identity.node] = (path, identity)
        found.problems.pop(identity.node, None)
    return found


def _configured(config: StoreConfig, problems: dict[str, str]) -> list[Candidate]:
    """Return the available nodes of the configuration; problems of the others are noted."""
    candidates = []
    for node in config.nodes:
        try:
            identity = identify(node.path, config.uuid, node.name, node.region)
            candidates.append((node.path, identity))
        except NodeError as error:
            problems[node.name] = str(error)
    return candidates


def _identity(config: StoreConfig | None, path: Path) -> NodeIdentity:
    """Return the identity of a place that the user named; NodeError.

    If it is damaged, the records beside it may be those of any node of the configuration.
    """
    try:
        return read_identity(path)
    except NodeError:
        if config is not None:
            for node in config.nodes:
                with suppress(NodeError):
                    return identify(path, config.uuid, node.name, node.region)
        raise


def _below(store: Path, problems: dict[str, str]) -> list[Candidate]:
    """Return the nodes in the directory of a store without a configuration; UsageError."""
    if not store.is_dir():
        raise UsageError(f"There is no directory {store}.")
    candidates = []
    for path in sorted(store.iterdir()):
        if os.path.lexists(path / IDENTITY_NAME):
            try:
                candidates.append((path, read_identity(path)))
            except NodeError as error:
                problems[path.name] = str(error)
    return candidates
