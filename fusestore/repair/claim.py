"""Claiming a directory for a node: an empty one, a wiped one, or one with a damaged `node.toml`.

`node.toml` is written anew if the records beside it are those of the node, even if it names
another: an operator repairs this very node.
"""

from __future__ import annotations

import logging
import os
from uuid import uuid4

from ..config.node_identity import (
    IDENTITY_NAME,
    IDENTITY_VERSION,
    NodeIdentity,
    read_identity_in,
    write_identity_in,
)
from ..config.owner_record import OWNER_NAME
from ..config.store_config import NodeConfig, StoreConfig
from ..errors import NodeError, NodeIdentityError
from ..members.opening import offline_error, open_node
from ..nodes.base import Node
from ..nodes.recognition import has_records
from ..system import mounts
from ..system.beneath import Directory
from ..system.files import sync_directory

logger = logging.getLogger(__name__)

_EMPTY = {"journal", "shards", "lost+found", OWNER_NAME}
"""Names that the directory of a wiped node may contain."""


def claim_directory(config: StoreConfig, node: NodeConfig) -> Node:
    """Open a node's directory; make it if it is gone, and its identity if that is lost; blocks.

    NodeError if the directory cannot be used, or may belong to something else.
    """
    path = node.path
    if node.offline:
        raise offline_error(config, node)
    if mounts.lies_on(config.store, path) is not None:
        raise NodeError(f"{path} lies on a mount of this store itself.")
    if not os.path.lexists(path):
        path.mkdir(mode=0o700, parents=True)
        sync_directory(path.parent)
    directory = Directory.at(path)  # the same directory is checked here and claimed below
    if not directory.has(IDENTITY_NAME):
        if any(entry.name not in _EMPTY for entry in directory.entries()):
            raise NodeIdentityError(
                f"{path} contains files that are not a node's: empty it, or give the node "
                "another place."
            )
        _write_identity(directory, config, node)
    elif not _is_identified(directory, config, node) and has_records(
        directory, config.uuid, node.name
    ):
        logger.warning(
            "%s is damaged, but the records in %s are those of node %s: it is written anew.",
            path / IDENTITY_NAME,
            path,
            node.name,
        )
        _write_identity(directory, config, node)
    return open_node(config, node)


def _write_identity(directory: Directory, config: StoreConfig, node: NodeConfig) -> None:
    identity = NodeIdentity(config.uuid, node.name, node.region, uuid4(), IDENTITY_VERSION)
    try:
        write_identity_in(directory, identity)
    except OSError as error:
        raise NodeIdentityError(
            f"{node.path / IDENTITY_NAME} cannot be replaced: {error.strerror}. Remove it, and "
            "repair the node again."
        ) from error


def _is_identified(directory: Directory, config: StoreConfig, node: NodeConfig) -> bool:
    try:
        identity = read_identity_in(directory, node.path)
    except NodeError as error:
        logger.warning("%s", error)
        return False
    return (identity.store, identity.node) == (config.uuid, node.name)
