"""The identity of a node: `node.toml` names the store and the node of a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from ..errors import (
    ConfigError,
    DamagedIdentityError,
    NewerFormatError,
    NodeError,
    NodeIdentityError,
)
from ..system.beneath import Directory
from ..system.files import write_whole_in
from ..system.strict_toml import Table
from .text_checksum import is_intact, sealed

IDENTITY_NAME = "node.toml"
IDENTITY_VERSION = 1
IDENTITY_BYTES_MAX = 4096
"""The longest file that is read; `write_identity` writes a tenth of this."""


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """The contents of `node.toml`: the store and the node of a directory."""

    store: UUID
    node: str
    region: str
    incarnation: UUID
    """Changes when a node restarts from nothing."""
    version: int
    """The format of the journals and shards in the directory."""


def read_identity(path: Path) -> NodeIdentity:
    """Read the identity of the node directory `path`.

    NodeIdentityError if the directory or the file is missing, foreign, or of a newer
    version; DamagedIdentityError if the file is damaged, NodeError if it cannot be read.
    """
    return _read(path, lambda: Directory.at(path))


def read_identity_in(directory: Directory, path: Path) -> NodeIdentity:
    """Read the identity of an open node directory, which errors call `path`; as `read_identity`."""
    return _read(path, lambda: directory)


def _read(path: Path, directory: Callable[[], Directory]) -> NodeIdentity:
    intact: bool | None = None

    def opened() -> BinaryIO:
        nonlocal intact
        with open(directory().open(IDENTITY_NAME, os.O_RDONLY), "rb") as file:
            data = file.read(IDENTITY_BYTES_MAX + 1)
        intact = is_intact(data)
        return BytesIO(data)

    try:
        table = Table.load(path / IDENTITY_NAME, opened, IDENTITY_BYTES_MAX)
        table.take_format(IDENTITY_VERSION)
        identity = NodeIdentity(
            store=table.take_uuid("store"),
            node=table.take("node", str),
            region=table.take("region", str),
            incarnation=table.take_uuid("incarnation"),
            version=IDENTITY_VERSION,
        )
        table.end()
        table.raise_first()
        if intact is False:
            raise ConfigError(f"{path / IDENTITY_NAME} does not match its checksum.")
        return identity
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.isdir(path):
            raise NodeIdentityError(f"There is no directory {path}.") from None
        raise NodeIdentityError(
            f"{path} is not a node: it has no {IDENTITY_NAME} (is its disk mounted?)."
        ) from None
    except ConfigError as error:
        if isinstance(error.__cause__, OSError):
            raise NodeError(str(error)) from None
        is_foreign = intact or isinstance(error, NewerFormatError)
        raise (NodeIdentityError if is_foreign else DamagedIdentityError)(str(error)) from None


def write_identity(path: Path, identity: NodeIdentity) -> None:
    """Write `node.toml` in the node directory `path` durably; OSError if this fails."""
    write_identity_in(Directory.at(path), identity)


def write_identity_in(directory: Directory, identity: NodeIdentity) -> None:
    """Write `node.toml` in an open node directory durably; OSError if this fails."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment("The store and the node of this directory.  Do not edit."))
    document.add("format", tomlkit.item(identity.version))
    document.add("store", tomlkit.item(str(identity.store)))
    document.add("node", tomlkit.item(identity.node))
    document.add("region", tomlkit.item(identity.region))
    document.add("incarnation", tomlkit.item(str(identity.incarnation)))
    text = sealed(tomlkit.dumps(document).encode()).decode()
    write_whole_in(directory, IDENTITY_NAME, f"{text}\n")
