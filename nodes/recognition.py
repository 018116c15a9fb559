"""The identity of a node, also if its `node.toml` is damaged.

`node.toml` is small and has one copy, but the records in the segments of a node prove which
node they belong to: the checksums of their headers are seeded with its store and its name.
A damaged `node.toml` therefore costs nothing while the records beside it can be read.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from ..config.node_identity import (
    IDENTITY_VERSION,
    NodeIdentity,
    read_identity,
    read_identity_in,
)
from ..errors import DamagedIdentityError, FormatError, NodeError, NodeIdentityError
from ..format.records import HEADER_BYTES, Header, Place
from ..format.segment_numbers import FOLDERS, segment_number
from ..system.beneath import Directory

_UNKNOWN = UUID(int=0)
"""The incarnation of a node whose `node.toml` is damaged."""


def recognize(
    directory: Directory, path: Path, store: UUID, name: str, region: str
) -> tuple[NodeIdentity, NodeError | None]:
    """Return the identity of an open node directory, and what is wrong with `node.toml`.

    One that is damaged, or cannot be read, counts as that of the node with this name if a
    segment has a record of it.  Errors as for `read_identity`.
    """
    try:
        return read_identity_in(directory, path), None
    except NodeError as error:
        is_read = not isinstance(error, DamagedIdentityError)
        if (isinstance(error, NodeIdentityError) and is_read) or not has_records(
            directory, store, name
        ):
            raise
        return NodeIdentity(store, name, region, _UNKNOWN, IDENTITY_VERSION), error


def identify(path: Path, store: UUID, name: str, region: str) -> NodeIdentity:
    """Return the identity of the node directory `path`; see `recognize`."""
    try:
        return recognize(Directory.at(path), path, store, name, region)[0]
    except OSError:
        return read_identity(path)  # for its error


def has_records(directory: Directory, store: UUID, name: str) -> bool:
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
                    Header.decode(head, Place(store, name, kind, number).seed(0))
                    return True
    return False
