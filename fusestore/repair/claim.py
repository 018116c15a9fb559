"""Claiming a directory for a node: an empty one, a wiped one, or one with a damaged `node.toml`.

`node.toml` is small and has one copy, but the records in the segments of a node prove which
node they belong to: the checksums of their headers are seeded with it.  A damaged
`node.toml` therefore does not cost the data beside it.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
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
from ..errors import FormatError, NodeError, NodeIdentityError
from ..format.records import HEADER_BYTES, Header, Place
from ..format.segment_numbers import FOLDERS, segment_number
from ..members.opening import offline_error, open_node
from ..nodes.base import Node
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
    elif not _is_identified(directory, config, node) and _has_records(directory, config, node):
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


def _has_records(directory: Directory, config: StoreConfig, node: NodeConfig) -> bool:
    """Return whether a segment begins with a record of this very node."""
    for kind, (folder, ending) in FOLDERS.items():
        with suppress(OSError):
            segments = directory.folder(folder)
            for entry in segments.entries():
                number = segment_number(entry.name, ending)
                if number is None:
                    continue
                with suppress(OSError, FormatError):
                    fd = segments.open(entry.name, os.O_RDONLY)
                    try:
                        head = os.pread(fd, HEADER_BYTES, 0)
                    finally:
                        os.close(fd)
                    Header.decode(head, Place(config.uuid, node.name, kind, number).seed(0))
                    return True
    return False
