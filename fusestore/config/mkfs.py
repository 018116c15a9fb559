"""Making a store: check everything, then make it, `fusestore.toml` last.

Therefore a store that has a `fusestore.toml` is complete.  After a failure, everything
that was made is removed.  The first mount makes the metadata database.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ..errors import FusestoreError, NodeIdentityError, UsageError
from ..format.erasure import Code
from ..format.placement import check_region_rule
from ..system.files import sync_directory
from . import store_config as names
from .node_identity import (
    IDENTITY_NAME,
    IDENTITY_VERSION,
    NodeIdentity,
    read_identity,
    write_identity,
)
from .store_config import NodeConfig, StoreConfig
from .store_config_write import write_store_config

logger = logging.getLogger(__name__)

REGIONS = ("us-east-1", "us-west-1", "eu-west-1")
"""The default regions of a store."""
CODE = Code(2, 1)
"""The default code of a store."""
JOURNAL_DIRECTORY = "journal"
SHARDS_DIRECTORY = "shards"

_HARMLESS = {"lost+found"}
"""Entries that an empty directory may contain, because a new file system has them."""


def make_store(
    store: Path,
    regions: Sequence[tuple[str, Path | None]] = (),
    code: Code = CODE,
    metadata: Path | None = None,
    allow_unsafe: bool = False,
) -> StoreConfig:
    """Make a store in the directory `store`, with one node in each of `regions`.

    A region is a name and a directory; the default is a directory below `store` with its
    name.  Without regions, the default three are made.  Directories must be missing or
    empty.  UsageError if an argument is refused, FusestoreError if the system fails; in
    both cases nothing is changed.
    """
    chosen = regions or [(name, None) for name in REGIONS]
    config = _plan(store, chosen, code, metadata, allow_unsafe)
    _check_names([node.name for node in config.nodes])
    _check_empty(config)
    problem = names.check_places(config.store, config.metadata, config.nodes)
    if problem:
        raise UsageError(problem)
    _check_owners(config)
    problem = check_region_rule(code, config.regions)
    if problem and not allow_unsafe:
        raise UsageError(f"{problem} Choose another code, or use --allow-unsafe.")
    try:
        with _undone_on_failure() as made:
            _make(config, made)
    except OSError as error:
        raise FusestoreError(
            f"The store {config.store} cannot be made: {error.strerror or error}"
            + (f" ({error.filename})." if error.filename else ".")
        ) from error
    return config


def _plan(
    store: Path,
    regions: Sequence[tuple[str, Path | None]],
    code: Code,
    metadata: Path | None,
    allow_unsafe: bool,
) -> StoreConfig:
    store = Path(os.path.realpath(store))
    nodes = tuple(
        NodeConfig(name, name, Path(os.path.realpath(path)) if path else store / name)
        for name, path in regions
    )
    place = Path(os.path.realpath(metadata)) if metadata else store / names.METADATA_NAME
    return StoreConfig(store, uuid4(), code, allow_unsafe, place, nodes)


# --- checking ----------------------------------------------------------------


def _check_names(chosen: Sequence[str]) -> None:
    for name in chosen:
        problem = names.check_name(name)
        if problem is None and chosen.count(name) > 1:
            problem = f"Region {name!r} is given {chosen.count(name)} times: give it once."
        if problem:
            raise UsageError(problem)


def _check_empty(config: StoreConfig) -> None:
    if os.path.exists(config.store / names.CONFIG_NAME):
        raise UsageError(f"{config.store} is already a store: mount it, or choose another place.")
    for node in config.nodes:
        if os.path.lexists(node.path / IDENTITY_NAME):
            raise UsageError(
                f"{node.path} already belongs to a store{_whose(node.path)}: choose another "
                f"place for region {node.name}, or empty it yourself if you do not need its data."
            )
    places = [("The store", config.store), ("The metadata directory", config.metadata)]
    places += [(f"Region {node.name}'s directory", node.path) for node in config.nodes]
    for what, path in places:
        try:
            found = sorted(set(os.listdir(path)) - _HARMLESS)
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            raise UsageError(f"{what} cannot be {path}: that is not a directory.") from None
        except OSError as error:
            raise UsageError(f"{what} {path} cannot be read: {error.strerror}.") from error
        if found:
            raise UsageError(
                f"{what} {path} is not empty (it contains {found[0]!r}): "
                "choose an empty or new directory."
            )


def _whose(path: Path) -> str:
    try:
        identity = read_identity(path)
    except NodeIdentityError:
        return ""
    return f" (it is node {identity.node} of store {identity.store})"


def _check_owners(config: StoreConfig) -> None:
    """Refuse places inside another store, or inside one of its nodes."""
    for path in (config.store, config.metadata, *(node.path for node in config.nodes)):
        check_owner(config.store, path)


def check_owner(store: Path, path: Path) -> None:
    """Raise UsageError for a place of `store` inside another store or inside one of its nodes."""
    for above in path.parents:
        if above == store:
            break
        if os.path.exists(above / names.CONFIG_NAME):
            raise UsageError(f"{path} lies inside the store {above}: choose another place.")
        if os.path.exists(above / IDENTITY_NAME) and _whose(above):
            raise UsageError(
                f"{path} lies inside {above}, which already belongs to a store"
                f"{_whose(above)}: choose another place."
            )


# --- making ------------------------------------------------------------------


def _make(config: StoreConfig, made: list[Path]) -> None:
    for path in (config.store, config.metadata):
        _make_directory(path, made)
    for node in config.nodes:
        _make_directory(node.path, made)
        for name in (JOURNAL_DIRECTORY, SHARDS_DIRECTORY):
            _make_directory(node.path / name, made)
        made.append(node.path / IDENTITY_NAME)
        write_identity(
            node.path,
            NodeIdentity(config.uuid, node.name, node.region, uuid4(), IDENTITY_VERSION),
        )
    made.append(config.store / names.CONFIG_NAME)
    write_store_config(config)


def _make_directory(path: Path, made: list[Path]) -> None:
    """Make a directory (mode 0700) and its missing parents, durable with their names."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        _make_directory(path.parent, made)
    path.mkdir(mode=0o700)
    made.append(path)
    sync_directory(path.parent)


@contextmanager
def _undone_on_failure() -> Iterator[list[Path]]:
    """Yield a list for paths that are made; if the body fails, remove them, newest first."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in reversed(made):
            try:
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s could not be removed after a failure: %s", path, error)
        raise
