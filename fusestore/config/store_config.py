"""What a store is: `fusestore.toml`, and each node's `node.toml`.

    STORE/fusestore.toml    regions, nodes, the default code; for people to read and edit
    STORE/fusestore.lock    locked while a process has the store open; holds its number
    STORE/control.sock      where the daemon listens (control.py)
    STORE/fusestore.log     what a daemon in the background says
    STORE/metrics.json      what operations were counted (counts.py)
    NODE/node.toml          which store and which node a directory is

Only this module knows these names.  Both TOML files are replaced whole, never
edited in place, so that a crash leaves the old one or the new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ..errors import ConfigError, NodeIdentityError, UsageError
from ..format.erasure import Code
from ..format.placement import check_region_rule
from ..limits import DEFAULTS, Limits
from ..system.strict_toml import Table, shown
from .mount_options import parse_address

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

CONFIG_NAME = "fusestore.toml"
LOCK_NAME = "fusestore.lock"
SOCKET_NAME = "control.sock"
LOG_NAME = "fusestore.log"
COUNTS_NAME = "metrics.json"
IDENTITY_NAME = "node.toml"
METADATA_NAME = "metadata"

CONFIG_VERSION = 1
IDENTITY_VERSION = 1

WEIGHTS = (0.001, 1_000_000.0)
"""The least and the greatest weight of a node."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RESERVED = {CONFIG_NAME, LOCK_NAME, SOCKET_NAME, LOG_NAME, COUNTS_NAME, METADATA_NAME}


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A place in a region that keeps shards: a directory."""

    name: str
    region: str
    path: Path
    """Absolute."""
    weight: float = 1.0
    """How much of its region's shards it gets, in proportion to the others there."""
    draining: bool = False
    """It gets no new shards, and gives away what it has."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """All that `fusestore.toml` says, with absolute paths."""

    store: Path
    uuid: UUID
    code: Code
    """The code of new files, unless their directory has one of its own."""
    allow_unsafe: bool
    """Codes that would not survive the loss of a region are taken."""
    metadata: Path
    nodes: tuple[NodeConfig, ...]
    spare_shards: int = 0
    """Shards more than k that each new stripe must find a place for."""
    scrub_days: int = 30
    """A scrub begins by itself when the last one ended so long ago; 0: never."""
    metrics: str = ""
    """Where a mount serves metrics and the status page, as in `parse_address`; empty: nowhere."""
    limits: Limits = field(default=DEFAULTS, compare=False)
    """Not in the file: what everything in the open store keeps to."""

    @property
    def regions(self) -> tuple[str, ...]:
        """The region of each node that is not drained, in the order of `nodes`."""
        staying = [node for node in self.nodes if not node.draining] or self.nodes
        return tuple(node.region for node in staying)

    @property
    def log_file(self) -> Path:
        """Where a daemon in the background logs to."""
        return self.store / LOG_NAME

    def node(self, name: str) -> NodeConfig:
        """The node called `name`; UsageError when there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise UsageError(f"{self.store} has no node {name!r}; its nodes are {known}.")


def check_name(name: str) -> str | None:
    """Say in a sentence why a region or node cannot be called `name`, or None."""
    if not _NAME.fullmatch(name):
        return (
            f"{name!r} is not a name for a region: "
            "use up to 63 letters, digits, dots, dashes and underscores, a letter or digit first."
        )
    if name in _RESERVED:
        return f"A region cannot be called {name!r}: the store has a file of that name."
    return None


def check_places(store: Path, metadata: Path, nodes: Sequence[NodeConfig]) -> str | None:
    """Say in a sentence which two of the store's places are equal or nested, or None.

    Symbolic links are resolved.  Nodes and metadata may lie below the store.
    """
    return next((what for _, what in _conflicts(store, metadata, nodes)), None)


def _conflicts(
    store: Path, metadata: Path, nodes: Sequence[NodeConfig]
) -> Iterator[tuple[int, str]]:
    """Each place that cannot be where it is: the number of its node, or -1; and why not."""
    store = Path(os.path.realpath(store))
    places = [("the metadata", Path(os.path.realpath(metadata)))]
    places += [(f"region {node.name}", Path(os.path.realpath(node.path))) for node in nodes]
    for i, (what, path) in enumerate(places):
        problems = []
        if store.is_relative_to(path):
            problems.append(f"{path}, the place of {what}, holds the store {store} itself")
        for other, there in places[:i]:
            if path == there:
                problems.append(f"{what} and {other} are both at {path}")
            elif path.is_relative_to(there) or there.is_relative_to(path):
                problems.append(f"{what} at {path} and {other} at {there} are nested")
        yield from ((i - 1, f"{problem}: each needs a place of its own.") for problem in problems)


def load(store: Path) -> StoreConfig:
    """Read the configuration of the store in the directory `store`; ConfigError if it is bad."""
    file = Path(os.path.realpath(store)) / CONFIG_NAME
    config, problems = examine(file)
    if len(problems) > 1:
        rest = f"({len(problems) - 1} more: `fusestore config check {file.parent}`)"
        raise ConfigError(f"{problems[0].rstrip('.')} {rest}.")
    if problems:
        raise ConfigError(problems[0])
    return config


def examine(file: Path) -> tuple[StoreConfig, list[str]]:
    """What a `fusestore.toml` says, and all that is wrong with it, as `FILE:LINE: sentence`.

    What is wrong is replaced by something.  ConfigError when it is no TOML, or
    of a format that this version does not know.
    """
    store = file.parent
    try:
        table = Table.read(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{store} is not a store (it has no {CONFIG_NAME}): "
            f"make one with `fusestore mkfs {store}`."
        ) from None
    _check_version(table, CONFIG_VERSION)
    rows = table.take_tables("node")
    nodes = [_node(store, row) for row in rows]
    config = StoreConfig(
        store=store,
        uuid=table.take_uuid("uuid"),
        code=_code(table),
        allow_unsafe=table.take("allow_unsafe", bool, False),
        metadata=table.take_path("metadata", store, METADATA_NAME),
        nodes=tuple(nodes),
        spare_shards=table.take_count("spare_shards", 0, 63),
        scrub_days=table.take_count("scrub_days", 30, 36_500),
        metrics=_address(table),
    )
    table.end()
    for i, (node, row) in enumerate(zip(nodes, rows, strict=True)):
        if node.name in (earlier.name for earlier in nodes[:i]):
            row.bad("name", f"is {node.name!r}, like that of another node: each needs its own")
    sound = [(node, row) for node, row in zip(nodes, rows, strict=True) if row.is_good()]
    for i, problem in _conflicts(store, config.metadata, [node for node, _ in sound]):
        place, key = (sound[i][1], "path") if i >= 0 else (table, "metadata")
        place.bad(key, f"cannot be used: {problem.rstrip('.')}")
    if table.is_good() and not config.allow_unsafe:
        unsafe = check_region_rule(config.code, config.regions)
        if unsafe:
            table.bad("code", f"cannot be used: {unsafe.rstrip('.')}")
    return config, table.problems()


def _check_version(table: Table, known: int) -> None:
    """ConfigError unless the file is of the format that this version of fusestore knows."""
    version = table.take("format", int)
    if version > known:
        table.bad(
            "format",
            f"is {shown(version)}, and this fusestore knows {known}: use a newer fusestore",
        )
    elif version != known:
        table.bad("format", f"is {shown(version)}, and there is only {known}")
    _raise_first(table)


def _raise_first(table: Table) -> None:
    for problem in table.problems():
        raise ConfigError(problem)


def write(config: StoreConfig) -> None:
    """Write `fusestore.toml` as a whole, durably; ConfigError when it cannot be.

    Of one that is there, comments and all that is not changed stay as they are.
    """
    import tomlkit

    file = config.store / CONFIG_NAME
    try:
        text = file.read_text(encoding="utf-8") if os.path.lexists(file) else None
        document = tomlkit.parse(text) if text is not None else _new(config)
        place = _text(config.store, config.metadata)
        if document.get("metadata", METADATA_NAME) != place:
            document["metadata"] = place
        _sync_nodes(document, config)
        write_whole(file, tomlkit.dumps(document))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}.") from error


def _new(config: StoreConfig) -> TOMLDocument:
    """A file without nodes."""
    import tomlkit

    document = tomlkit.document()
    for line in (
        "A fusestore store: how new files are coded, and where its regions keep their shards.",
        "Relative paths start at this file's directory.  Unmount the store before changing it.",
    ):
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    document.add("format", tomlkit.item(CONFIG_VERSION))
    document.add("uuid", tomlkit.item(str(config.uuid)))
    code = tomlkit.item(str(config.code))
    document.add("code", code.comment("of new files: data shards + parity shards"))
    unsafe = tomlkit.item(config.allow_unsafe)
    document.add(
        "allow_unsafe", unsafe.comment("true: take codes that do not survive the loss of a region")
    )
    document.add("metadata", tomlkit.item(_text(config.store, config.metadata)))
    spare = tomlkit.item(config.spare_shards)
    document.add(
        "spare_shards", spare.comment("new data is refused unless so many shards more than needed")
    )
    days = tomlkit.item(config.scrub_days)
    document.add("scrub_days", days.comment("everything is read and verified so often; 0: never"))
    if config.metrics:
        document.add("metrics", tomlkit.item(config.metrics))
    return document


def _sync_nodes(document: TOMLDocument, config: StoreConfig) -> None:
    """Make the `[[node]]` tables say what the configuration does, and touch nothing else."""
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
        ):
            if row.get(key, usual) != value or (key == "path" and key not in row):
                row[key] = value


# --- who a node is -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What `node.toml` says: which node of which store a directory is."""

    store: UUID
    node: str
    region: str
    incarnation: UUID
    """Changes when a node starts again from nothing."""
    version: int
    """Of the format of the journals and shards in the directory."""


def read_identity(path: Path) -> NodeIdentity:
    """Read the identity of the node directory `path`.

    NodeIdentityError when the directory or file is missing, foreign or unreadable.
    """
    file = path / IDENTITY_NAME
    try:
        table = Table.read(file)
        _check_version(table, IDENTITY_VERSION)
        identity = NodeIdentity(
            store=table.take_uuid("store"),
            node=table.take("node", str),
            region=table.take("region", str),
            incarnation=table.take_uuid("incarnation"),
            version=IDENTITY_VERSION,
        )
        table.end()
        _raise_first(table)
        return identity
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.isdir(path):
            raise NodeIdentityError(f"There is no directory {path}.") from None
        raise NodeIdentityError(
            f"{path} is not a node: it has no {IDENTITY_NAME} (is its disk mounted?)."
        ) from None
    except ConfigError as error:
        raise NodeIdentityError(str(error)) from None


def write_identity(path: Path, identity: NodeIdentity) -> None:
    """Write `node.toml` in the node directory `path`, durably; OSError when it cannot be."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment("Which node of which store this directory is: do not edit."))
    document.add("format", tomlkit.item(identity.version))
    document.add("store", tomlkit.item(str(identity.store)))
    document.add("node", tomlkit.item(identity.node))
    document.add("region", tomlkit.item(identity.region))
    document.add("incarnation", tomlkit.item(str(identity.incarnation)))
    write_whole(path / IDENTITY_NAME, tomlkit.dumps(document))


# --- files -----------------------------------------------------------------


def write_whole(file: Path, text: str, mode: int = 0o600) -> None:
    """Replace `file`, durable with its name; OSError when it fails."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            os.fchmod(fd, mode)
            stream.write(text)
            stream.flush()
            os.fsync(fd)
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(file.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; OSError when it fails."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- parts of the file -------------------------------------------------------


def _code(table: Table) -> Code:
    try:
        return Code.parse(table.take("code", str))
    except UsageError as error:
        table.bad("code", f"cannot be used: {str(error).rstrip('.')}")
        return Code(1, 0)


def _address(table: Table) -> str:
    text = table.take("metrics", str, "")
    try:
        if text:
            parse_address(text)
    except UsageError as error:
        table.bad("metrics", f"cannot be used: {str(error).rstrip('.')}")
    return text


def _node(store: Path, table: Table) -> NodeConfig:
    name = table.take("name", str)
    region = table.take("region", str, name)
    path = table.take_path("path", store, name)
    weight = table.take_number("weight", 1.0, *WEIGHTS)
    draining = table.take("draining", bool, False)
    table.end()
    for key, text in (("name", name), ("region", region)):
        problem = check_name(text)
        if problem:
            table.bad(key, f"cannot be used: {problem.rstrip('.')}")
    return NodeConfig(name, region, path, weight, draining)


def _text(store: Path, path: Path) -> str:
    """A path as the file has it: relative where it lies below the store."""
    text = os.fspath(path.relative_to(store) if path.is_relative_to(store) else path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path!r} is not UTF-8, and cannot stand in {CONFIG_NAME}: use another path."
        ) from None
    return text
