"""recover: its output, the database and `fusestore.toml`, each put in place when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..commit.row_check import SCRATCH_NAME
from ..config.store_config import CONFIG_NAME, NodeConfig, StoreConfig
from ..config.store_config_write import write_store_config
from ..errors import FusestoreError, ReplayError, UsageError
from ..format.erasure import Code
from ..format.placement import check_region_rule
from ..format.store_rows import NodeRow
from ..metadata.environment import DATABASE, DATABASE_LOCK
from ..system.files import sync_directory
from .recover_nodes import FoundNodes

DRAFT_NAME = "recovering"
"""A directory in the metadata directory, until the database in it is complete."""


# --- the new database --------------------------------------------------------


@contextmanager
def draft_database(target: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a directory for the new database, and a function that moves it to `target`.

    UsageError if `target` is not empty, FusestoreError if a system call fails.
    """
    draft = target / DRAFT_NAME
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        present = set(os.listdir(target)) - {"lost+found", DRAFT_NAME, SCRATCH_NAME, DATABASE_LOCK}
        if present:
            raise UsageError(
                f"{target} is not empty (it has {sorted(present)[0]!r}), but recover makes new "
                f"metadata: move the old metadata away, for example with mv {target} {target}.old"
            )
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)

        def finish() -> None:
            os.replace(draft / DATABASE, target / DATABASE)
            sync_directory(target)

        try:
            yield draft, finish
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise FusestoreError(
            f"The metadata cannot be written to {target}: {error.strerror or error}."
        ) from error


# --- the configuration -------------------------------------------------------


def recovered_config(
    found: FoundNodes, rows: Sequence[NodeRow], format_row: bytes | None, metadata: Path
) -> StoreConfig:
    """Return the configuration with the nodes at their found places; recreated if it is gone."""
    known = found.config.nodes if found.config else ()
    listed = {node.name for node in known}
    nodes = tuple(
        replace(node, path=found.places[node.name][0]) if node.name in found.places else node
        for node in (*known, *(_node(row) for row in rows if row.name not in listed))
    )
    if found.config is not None:
        return replace(found.config, nodes=nodes, metadata=metadata)
    if format_row is None:
        raise ReplayError("The available journals hold no commit: there is nothing to recover.")
    code = Code.parse(json.loads(format_row)["code"])
    config = StoreConfig(found.store, found.uuid, code, False, metadata, nodes)
    return replace(config, allow_unsafe=check_region_rule(code, config.regions) is not None)


def _node(row: NodeRow) -> NodeConfig:
    """Return the configuration of a node from its row."""
    return NodeConfig(row.name, row.region, Path(row.path), row.weight, row.draining)


def write_config(found: FoundNodes, config: StoreConfig) -> None:
    """Write the configuration if it is gone or has changed; the old file is kept beside it."""
    if config == found.config:
        return
    file = config.store / CONFIG_NAME
    if found.config is not None:
        shutil.copy2(file, file.with_name(file.name + ".old"))
    write_store_config(config)
