"""The fields of `status`: an open store, and its mount, at one instant.

Times are in seconds since the epoch, sizes in bytes.  Nothing heavy is imported
here: commands start fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..typed_json import INLINE, OPTIONAL


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node, as of when it was last asked."""

    name: str
    region: str
    path: str
    weight: float
    draining: bool
    state: str
    in_sync: bool
    error: str
    """Why it is not up, for people."""
    bytes_used: int
    bytes_free: int
    bytes_total: int
    missing_shards: int
    checksum_failures: int


@dataclass(frozen=True, slots=True)
class RunningRepair:
    """The repair under way."""

    node: str
    by_itself: bool
    phase: str
    unit: str
    """Of `done` and `total`: bytes or shards."""
    done: int
    total: int
    seconds: float
    eta_seconds: float | None
    """When its phase should end, if known."""


@dataclass(frozen=True, slots=True)
class PastRepair:
    """A repair that has ended."""

    node: str
    at: float
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Scrub:
    """Where a scrub stands, or how the last one ended."""

    state: str
    """never, running, paused or done."""
    position: str
    end: str
    """The keys of the next stripe, and past the last, in hexadecimal."""
    rate: float | None
    """Bytes a second, None for as fast as users' own I/O allows."""
    started: float
    finished: float
    stripes: int
    total: int
    """Stripes read, and about how many there are."""
    shards: int
    size: int
    """Shards read and verified, and their bytes."""
    skipped: int
    """Shards of nodes that were not up."""
    found: int
    """Shards and records of journals that were bad or gone."""
    left: int
    """Shards that are still missing at the end."""
    unread: int
    """Places of journals that no node could read."""


@dataclass(frozen=True, slots=True)
class ScrubStatus(Scrub):
    """A scrub, and how long it will take."""

    eta_seconds: float | None


@dataclass(frozen=True, slots=True)
class Recoding:
    """What is recoded, and how far."""

    state: str
    """never, running, stopped or done."""
    ino: int
    """A file, or a directory with all below it."""
    path: str
    """Where that was when it was started."""
    to: str
    """The code; empty: that of new files in the directory of each file."""
    rate: float | None
    """Bytes of I/O a second, None for as fast as users' own I/O allows."""
    started: float
    finished: float
    files: int
    total_files: int
    size: int
    total: int
    """Files that were looked at, of how many, and the bytes that they hold."""
    recoded: int
    """Bytes that got another code, since it was started."""
    unreadable: int
    """Files with bytes that cannot be read; these keep their place."""
    waits_for: str
    seconds_left: float | None
    """None: unknown."""
    unreadable_files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quarantine:
    """What is kept although no table names it."""

    why: str
    segments: int
    bytes: int


@dataclass(frozen=True, slots=True)
class MountStatus:
    """The mount of a store."""

    mounted: bool
    mounted_at: float
    mountpoint: str
    pid: int
    metrics: str | None
    """The address of the status page, if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """An open store."""

    summary: str = ""
    """Whether the data is safe, in a sentence."""
    healthy: bool
    """Every node is up, and nothing is missing."""
    store: str
    uuid: str
    code: str
    unsafe_codes: tuple[str, ...]
    """Codes in use that do not survive the loss of a region."""
    regions_borne: int
    """How many more regions may certainly be lost; -1: files may be unreadable."""
    readable: bool
    read_only: bool
    error: str
    metadata_error: str
    files: int
    bytes: int
    bytes_total: int
    bytes_free: int
    stripes: int
    last_commit: int
    last_commit_at: float | None
    uncommitted_bytes: int
    checkpoint: int
    """The commit that the metadata database has reached."""
    epoch: int
    metadata_bytes: int
    degraded_reads: int
    failed_reads: int
    rows_mended: int
    rows_in_doubt: int
    repair: RunningRepair | None
    repairs: tuple[PastRepair, ...]
    """The last ones, the newest at the end."""
    scrub: ScrubStatus
    nodes: tuple[NodeStatus, ...]
    quarantine: Quarantine | None = field(default=None, metadata=OPTIONAL)
    recode: Recoding | None = field(default=None, metadata=OPTIONAL)
    mount: MountStatus | None = field(default=None, metadata=INLINE)
