"""Writing `fusestore.toml`: comments and unchanged values stay as they are.

The file is replaced as a whole, never edited in place.  A crash leaves the old file or
the new one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..system.beneath import read_small
from ..system.files import write_whole
from ..system.strict_toml import FILE_BYTES_MAX
from .store_config import CONFIG_NAME, CONFIG_VERSION, METADATA_NAME, StoreConfig

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


def write_store_config(config: StoreConfig) -> None:
    """Write `fusestore.toml` durably; ConfigError if this fails.

    Comments and unchanged values of an existing file stay as they are.
    """
    import tomlkit

    file = config.store / CONFIG_NAME
    try:
        document = _parsed(file) if os.path.lexists(file) else _new(config)
        place = _text(config.store, config.metadata)
        if document.get("metadata", METADATA_NAME) != place:
            document["metadata"] = place
        _sync_nodes(document, config)
        write_whole(file, tomlkit.dumps(document))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}.") from error


def _parsed(file: Path) -> TOMLDocument:
    import tomlkit

    text = read_small(file, FILE_BYTES_MAX, follow=True).decode()
    return tomlkit.parse(text.replace("\r\n", "\n"))


def _new(config: StoreConfig) -> TOMLDocument:
    """Make a file without nodes."""
    import tomlkit

    document = tomlkit.document()
    for line in (
        "The configuration of a fusestore store.",
        "Relative paths start at this file's directory.  Unmount the store before you edit it.",
    ):
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    document.add("format", tomlkit.item(CONFIG_VERSION))
    document.add("uuid", tomlkit.item(str(config.uuid)))
    code = tomlkit.item(str(config.code))
    document.add("code", code.comment("of new files: data shards + parity shards"))
    unsafe = tomlkit.item(config.allow_unsafe)
    document.add(
        "allow_unsafe",
        unsafe.comment("true: accept codes that do not survive the loss of a region"),
    )
    document.add("metadata", tomlkit.item(_text(config.store, config.metadata)))
    spare = tomlkit.item(config.spare_shards)
    document.add(
        "spare_shards",
        spare.comment("each new stripe needs places for k shards and this many more"),
    )
    days = tomlkit.item(config.scrub_days)
    document.add(
        "scrub_days", days.comment("a scrub begins this many days after the last one; 0: never")
    )
    if config.metrics:
        document.add("metrics", tomlkit.item(config.metrics))
    return document


def _sync_nodes(document: TOMLDocument, config: StoreConfig) -> None:
    """Update the `[[node]]` tables to the configuration, and change nothing else."""
    import tomlkit

    rows: Any = document.setdefault("node", tomlkit.aot())
    names = [node.name for node in config.nodes]
    for index in reversed(range(len(rows))):
        if rows[index]["name"] not in names:
            del rows[index]
    known = {row["name"]: row for row in rows}
    for node in config.nodes:
        row = known.get(node.name)
        if row is None:
            row = tomlkit.table()
            row.add("name", node.name)
            row.add("region", node.region)
            rows.append(row)
        weight = int(node.weight) if node.weight.is_integer() else node.weight
        for key, value, usual in (
            ("path", _text(config.store, node.path), node.name),
            ("weight", weight, 1),
            ("draining", node.draining, False),
            ("offline", node.offline, False),
        ):
            if row.get(key, usual) != value or (key == "path" and key not in row):
                row[key] = value


def _text(store: Path, path: Path) -> str:
    """Format a path for the file: relative if it lies below the store."""
    text = os.fspath(path.relative_to(store) if path.is_relative_to(store) else path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path!r} is not UTF-8, and cannot be in {CONFIG_NAME}: use another path."
        ) from None
    return text
