"""Reading `fusestore.toml`, the configuration of a store (written by store_config_write.py).

    STORE/fusestore.toml    regions, nodes, the default code; for people to read and edit
    STORE/fusestore.lock    locked while a process has the store open; holds its number
    STORE/control.sock      the socket of the daemon (control_server.py)
    STORE/fusestore.log     the log of a background daemon
    STORE/metrics.json      counts of operations (counts.py)

Only this module knows these names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import UUID

from ..errors import ConfigError, UsageError
from ..format.erasure import Code
from ..format.placement import check_region_rule
from ..format.store_rows import NEVER_WHOLE, NodeRow, encode_nodes
from ..limits import DEFAULTS, MIB, VALUE_BYTES_MAX, Limits
from ..system import mounts
from ..system.strict_toml import Table
from ..text import counted
from .mount_options import parse_address
from .owner_record import Mount

CONFIG_NAME = "fusestore.toml"
LOCK_NAME = "fusestore.lock"
SOCKET_NAME = "control.sock"
LOG_NAME = "fusestore.log"
COUNTS_NAME = "metrics.json"
METADATA_NAME = "metadata"

CONFIG_VERSION = 1

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
    """An absolute path."""
    weight: float = 1.0
    """Its share of the region's shards, relative to the weights of the region's other nodes."""
    draining: bool = False
    """The node gets no new shards, and its shards move to other nodes."""
    offline: bool = False
    """The node is not opened: an operator works on its disk."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The contents of `fusestore.toml`, with absolute paths."""

    store: Path
    uuid: UUID
    code: Code
    """The code of new files, unless their directory has its own."""
    allow_unsafe: bool
    """Codes that do not survive the loss of a region are accepted."""
    metadata: Path
    nodes: tuple[NodeConfig, ...]
    spare_shards: int = 0
    """How many shards more than k must find a place in each new stripe."""
    scrub_days: int = 30
    """A scrub begins by itself this many days after the last one; 0: never."""
    user_codes: tuple[Code, ...] = ()
    """The codes that users may set on their own directories; root may set any."""
    metrics: str = ""
    """The address for metrics and the status page (`parse_address`); empty: none."""
    limits: Limits = field(default=DEFAULTS, compare=False)
    """The limits of the open store; the file may set those of cleaning."""
    mount: Mount | None = field(default=None, compare=False)
    """The opening of the store for writing that this is for; not in the file."""

    @property
    def regions(self) -> tuple[str, ...]:
        """The region of each node that is not drained, in the order of `nodes`."""
        staying = [node for node in self.nodes if not node.draining] or self.nodes
        return tuple(node.region for node in staying)

    @property
    def log_file(self) -> Path:
        """The log file of a background daemon."""
        return self.store / LOG_NAME

    def node(self, name: str) -> NodeConfig:
        """Return the node called `name`; UsageError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise UsageError(f"{self.store} has no node {name!r}; its nodes are {known}.")


def check_name(name: str) -> str | None:
    """Return a sentence that explains why a region or node cannot be called `name`, or None."""
    if not _NAME.fullmatch(name):
        return (
            f"{name!r} is not a name for a region or a node: "
            "use up to 63 letters, digits, dots, dashes and underscores, beginning with a letter "
            "or digit."
        )
    if name in _RESERVED:
        return f"A region cannot be called {name!r}: the store has a file with this name."
    return None


def check_places(store: Path, metadata: Path, nodes: Sequence[NodeConfig]) -> str | None:
    """Return a sentence about a place that cannot be used, or about two equal or nested ones.

    None if all can be used.  Symbolic links are resolved.  Nodes and metadata may lie below the
    store, but not on a mount of it.  All nodes are one row of the metadata; a sentence also
    reports that this row would be too long.  Blocks, but never waits for a mount of the store.
    """
    for path in (metadata, *(node.path for node in nodes)):
        mountpoint = mounts.lies_on(store, path)
        if mountpoint is not None:
            return (
                f"{path} lies on {mountpoint}, a mount of this store itself: choose another place."
            )
    problem = next((what for _, what in _conflicts(store, metadata, nodes)), None)
    return problem or _too_long(nodes)


def _too_long(nodes: Sequence[NodeConfig]) -> str | None:
    """Return a sentence if the row of all nodes would be too long, or None."""
    rows = [
        NodeRow(
            0xFFFF, n.name, n.region, str(n.path), False, NEVER_WHOLE, n.weight, True, 2**64 - 1
        )
        for n in nodes
    ]
    length = len(encode_nodes(rows))
    if length <= VALUE_BYTES_MAX:
        return None
    return (
        f"The names and paths of {counted(len(nodes), 'node')} take {length:,} bytes, but a store "
        f"has only {VALUE_BYTES_MAX:,}: shorten them, or use fewer nodes."
    )


def _conflicts(
    store: Path, metadata: Path, nodes: Sequence[NodeConfig]
) -> Iterator[tuple[int, str]]:
    """Yield each conflicting place: the index of its node, or -1 for the metadata; the reason."""
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
        yield from ((i - 1, f"{problem}: each needs its own place.") for problem in problems)


def load(store: Path) -> StoreConfig:
    """Read the configuration of the store in the directory `store`; ConfigError."""
    file = Path(os.path.realpath(store)) / CONFIG_NAME
    config, problems = examine(file)
    if len(problems) > 1:
        rest = f"({len(problems) - 1} more: `fusestore config check {file.parent}`)"
        raise ConfigError(f"{problems[0].rstrip('.')} {rest}.")
    if problems:
        raise ConfigError(problems[0])
    return config


def examine(file: Path) -> tuple[StoreConfig, list[str]]:
    """Read a `fusestore.toml`; return its contents and its mistakes as `FILE:LINE: sentence`.

    Other values replace wrong ones.  ConfigError if the file is not TOML, or has a format that
    this version does not know.
    """
    store = file.parent
    try:
        table = Table.read(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{store} is not a store: it has no {CONFIG_NAME}. If there was one, mount its disk, "
            f"or write the file anew with 'fusestore recover {store}'. To make a new store, run "
            f"'fusestore mkfs {store}'."
        ) from None
    table.take_format(CONFIG_VERSION)
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
        user_codes=_user_codes(table),
        metrics=_address(table),
        limits=_limits(table),
    )
    table.end()
    for i, (node, row) in enumerate(zip(nodes, rows, strict=True)):
        if node.name in (earlier.name for earlier in nodes[:i]):
            row.bad("name", f"is {node.name!r}, the name of another node: each needs its own")
    sound = [(node, row) for node, row in zip(nodes, rows, strict=True) if row.is_good()]
    for i, problem in _conflicts(store, config.metadata, [node for node, _ in sound]):
        place, key = (sound[i][1], "path") if i >= 0 else (table, "metadata")
        place.bad(key, f"cannot be used: {problem.rstrip('.')}")
    too_long = _too_long(nodes)
    if too_long:
        table.bad("node", f"cannot be used: {too_long[0].lower()}{too_long[1:].rstrip('.')}")
    if table.is_good() and not config.allow_unsafe:
        unsafe = check_region_rule(config.code, config.regions)
        if unsafe:
            table.bad("code", f"cannot be used: {unsafe.rstrip('.')}")
    return config, table.problems()


# --- parts of the file -------------------------------------------------------


def _code(table: Table) -> Code:
    try:
        return Code.parse(table.take("code", str))
    except UsageError as error:
        table.bad("code", f"cannot be used: {str(error).rstrip('.')}")
        return Code(1, 0)


def _user_codes(table: Table) -> tuple[Code, ...]:
    codes = []
    for text in table.take("user_codes", list, []):
        try:
            codes.append(Code.parse(text if isinstance(text, str) else repr(text)))
        except UsageError as error:
            table.bad("user_codes", f"cannot be used: {str(error).rstrip('.')}")
    return tuple(codes)


def _address(table: Table) -> str:
    text = table.take("metrics", str, "")
    try:
        if text:
            parse_address(text)
    except UsageError as error:
        table.bad("metrics", f"cannot be used: {str(error).rstrip('.')}")
    return text


def _limits(table: Table) -> Limits:
    """Return the limits, with those of cleaning as the file has them."""
    percent = table.take_count("waste_percent", DEFAULTS.waste_percent_max, 1000, 10)
    mebibytes = table.take_count("waste_mib", DEFAULTS.waste_bytes_min // MIB, MIB, 8)
    rate = table.take_number("clean_rate", 0.0, 0.0, 1e6)
    return replace(
        DEFAULTS,
        waste_percent_max=percent,
        waste_bytes_min=mebibytes * MIB,
        clean_rate=rate * 1e6 if rate else None,
    )


def _node(store: Path, table: Table) -> NodeConfig:
    name = table.take("name", str)
    region = table.take("region", str, name)
    path = table.take_path("path", store, name)
    weight = table.take_number("weight", 1.0, *WEIGHTS)
    draining = table.take("draining", bool, False)
    offline = table.take("offline", bool, False)
    table.end()
    for key, text in (("name", name), ("region", region)):
        problem = check_name(text)
        if problem:
            table.bad(key, f"cannot be used: {problem.rstrip('.')}")
    return NodeConfig(name, region, path, weight, draining, offline)
