"""The fields of `status`: an open store, and its mount, at one instant.

Times are in seconds since the epoch, sizes in bytes.  Nothing heavy is imported
here: commands start fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..typed_json import INLINE, OPTIONAL


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node, as it was last observed."""

    name: str
    region: str
    path: str
    weight: float
    draining: bool
    state: str
    in_sync: bool
    error: str
    """A sentence that explains why the node is not up; or empty."""
    bytes_used: int
    bytes_free: int
    bytes_total: int
    missing_shards: int
    checksum_failures: int


@dataclass(frozen=True, slots=True)
class RunningRepair:
    """The running repair."""

    node: str
    by_itself: bool
    phase: str
    unit: str
    """The unit of `done` and `total`: bytes or shards."""
    done: int
    total: int
    seconds: float
    eta_seconds: float | None
    """Estimated seconds until the phase ends; None: unknown."""


@dataclass(frozen=True, slots=True)
class PastRepair:
    """A repair that has ended."""

    node: str
    at: float
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Scrub:
    """The progress of a scrub, or the result of the last one."""

    state: str
    """never, running, paused or done."""
    position: str
    end: str
    """The key of the next stripe, and a key past the last stripe, in hexadecimal."""
    rate: float | None
    """Bytes a second; None: as fast as the I/O of users allows."""
    started: float
    finished: float
    stripes: int
    total: int
    """Stripes read, and about how many exist."""
    shards: int
    size: int
    """Shards read and verified, and their bytes."""
    skipped: int
    """Shards skipped because their node was not up."""
    found: int
    """Shards and records of journals that were bad or missing."""
    left: int
    """Shards still missing at the end."""
    unread: int
    """Places of journals that no node could read."""
    problem: str
    """Why it is paused although nobody paused it."""


@dataclass(frozen=True, slots=True)
class ScrubStatus(Scrub):
    """A scrub, and the estimated seconds until it ends."""

    eta_seconds: float | None


@dataclass(frozen=True, slots=True)
class Recoding:
    """The progress of a recoding, or the result of the last one."""

    state: str
    """never, running, stopped or done."""
    ino: int
    """A file, or a directory with all files below it."""
    path: str
    """The path of `ino` at the start."""
    to: str
    """The new code; empty: for each file the policy of its directory, or, if it is only
    defragmented, the code that it has."""
    defragment: bool
    """Whether fragmented parts of files are rewritten."""
    rate: float | None
    """Bytes of I/O a second; None: as fast as the I/O of users allows."""
    started: float
    finished: float
    files: int
    total_files: int
    size: int
    total: int
    """Files looked at, all files, and the bytes that each group holds."""
    recoded: int
    """Bytes rewritten since the start."""
    unreadable: int
    """Files with bytes that cannot be read; these bytes keep their place."""
    waits_for: str
    """A sentence that explains why it waits; or empty."""
    seconds_left: float | None
    """None: unknown."""
    unreadable_files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cleaning:
    """Garbage, and the cleaning that gives its room back."""

    state: str
    """idle, running, urgent (writers are held up) or waiting."""
    waits_for: str
    """A sentence that explains why there is more garbage than `bound`; or empty."""
    waste: int | None
    """Bytes of garbage; None: not counted, as on a read-only mount."""
    bound: int
    """Bytes of garbage above which cleaning runs."""
    pinned: int | None
    """Bytes that only the deletion of whole segments gives back, on all nodes; None: unknown."""
    freed: int
    moved: int
    """Bytes given back since the mount, and bytes written for them."""
    doubtful_stripes: int
    unreadable_stripes: int
    absent_stripes: int
    """Stripes left alone: by wrong counts, for bytes that cannot be read, for absent nodes."""
    held_writers: int
    """Writes that wait for cleaning now."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Segments that are kept although no table names them."""

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
    options: str = ""
    """The mount options, as after `-o`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """An open store."""

    summary: str = ""
    """A sentence that states whether the data is safe."""
    healthy: bool
    """Every node is up, and nothing is missing."""
    store: str
    uuid: str
    code: str
    unsafe_codes: tuple[str, ...]
    """Codes in use that do not survive the loss of a region."""
    regions_borne: int
    """How many more regions can be lost for certain; -1: files may be unreadable."""
    readable: bool
    read_only: bool
    error: str
    metadata_error: str
    files: int
    bytes: int
    bytes_total: int
    bytes_free: int
    full: str
    """Which disks leave no room for new data: a sentence, or empty."""
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
    lost_bytes: int
    """Bytes of files that are lost for good, as fsck found."""
    stripes_put_back: int
    repair: RunningRepair | None
    repairs: tuple[PastRepair, ...]
    """The last repairs, the newest at the end."""
    scrub: ScrubStatus
    nodes: tuple[NodeStatus, ...]
    quarantine: Quarantine | None = field(default=None, metadata=OPTIONAL)
    recode: Recoding | None = field(default=None, metadata=OPTIONAL)
    cleaning: Cleaning | None = field(default=None, metadata=OPTIONAL)
    mount: MountStatus | None = field(default=None, metadata=INLINE)
