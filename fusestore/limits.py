"""The numbers that bound fusestore, each with its unit and its reason.

The constants are part of the format or of POSIX.  `Limits` can be chosen: an open store is
handed one object of them with its configuration, and everything in it asks that object.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
STRIPE_BYTES = MIB
"""File data that one stripe takes: the largest write request of the kernel."""
BLOCK_BYTES = 16 * KIB
"""What one checksum covers: the least that a read has to fetch and verify."""
SHARD_ALIGN_BYTES = 64
"""Shards are padded to this, the width of a vector register and a cache line."""
SHARDS_MAX = 64
"""k + m of a code."""
OWNERS_PER_ROW_MAX = 2000
"""Keeps a row of `owners` below VALUE_BYTES_MAX."""
RECORD_ALIGN_BYTES = 64
SHARD_SEGMENT_BYTES = 64 * MIB
"""A shard segment is rolled once it is at least this long."""
KEY_BYTES_MAX = 511
VALUE_BYTES_MAX = 64 * KIB
NAME_BYTES_MAX = 255
TARGET_BYTES_MAX = 4095
LINKS_MAX = 65_000
FILE_BYTES_MAX = (1 << 63) - 1
XATTR_BYTES_MAX = 64 * KIB
XATTR_LIST_BYTES_MAX = 64 * KIB

assert STRIPE_BYTES % BLOCK_BYTES == 0
assert BLOCK_BYTES % SHARD_ALIGN_BYTES == 0
assert SHARD_ALIGN_BYTES % RECORD_ALIGN_BYTES == 0
assert OWNERS_PER_ROW_MAX * 24 < VALUE_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an open store keeps to; the defaults suit machines from a small board upwards."""

    stripe_bytes: int = STRIPE_BYTES
    """File data that a new stripe takes."""
    shard_segment_bytes: int = SHARD_SEGMENT_BYTES
    """A shard segment is rolled once it is at least this long."""
    stripe_owners_max: int = 8192
    """Extents in one stripe; a stripe is sealed when it has as many."""
    journal_segment_bytes: int = 8 * MIB
    """A journal segment is rolled once it is at least this long."""
    shard_preallocate_bytes: int = 4 * MIB
    """Room that is allocated in one step ahead of the end of a segment."""
    journal_ahead_bytes: int = MIB
    """Zeros that are written in one step behind the journal's end: what then takes their place is
    flushed twice as fast as what makes a file longer."""
    open_segments_max: int = 128
    """Descriptors that a node keeps for reading."""
    tail_bytes_max: int = 32 * KIB
    """New bytes of an open stripe that travel in the COMMIT record instead of sealing it."""
    commit_seconds_max: float = 5.0
    direct_record_bytes_max: int = 64 * KIB
    """Records of commits that may take the short way to the journals."""
    unflushed_bytes_max: int = 64 * MIB
    """File bytes accepted and not yet committed; a commit starts at half of it."""
    seals_max: int = 8
    """Stripes being coded and written at a time; each holds one buffer."""
    hop_changes_min: int = 500
    """Changes of a commit from which on encoding them is worth a thread hop."""
    checkpoint_seconds_max: float = 10.0
    checkpoint_changes_max: int = 10_000
    """Changed keys that wait in memory for the metadata database."""
    dump_journal_bytes_min: int = 8 * MIB
    """Journal since the last metadata dump below which no new one is made."""
    dump_piece_bytes: int = 256 * KIB
    dump_step_keys: int = 200
    """Keys that a metadata dump reads before it lets the next request run: about a millisecond."""
    reserve_bytes: int = 32 * MIB
    """Kept free on every device for commits, deletes and checkpoints."""
    map_bytes: int = 1 << 40
    """Address space reserved for the metadata database; the file grows as needed."""
    metadata_preallocate_bytes: int = 8 * MIB
    rows_examined_at_mount_max: int = 250_000
    """Rows of the metadata that a mount verifies before it answers, at 2 µs each; with more it
    verifies what it needs, and scrubs verify the rest."""
    reclaim_batch: int = 256
    """Shards that are punched out in one thread hop and one transaction."""
    catch_up_shards_max: int = 64
    """Shards that a node may lack to be brought back before the mount answers."""
    node_seconds_max: float = 30.0
    """How long a node may take for a write or a flush before it is given up."""
    read_seconds_max: float = 3.0
    """How long a node may take for a read before others are read instead."""
    slow_seconds: float = 30.0
    """How long a node that was too slow is then not read, if others will do."""
    sample_seconds: float = 0.25
    """How old the free space of a node may be, and how long ago its directory was looked at as a
    whole, when a commit is appended without a thread."""
    read_now_bytes_max: int = 64 * KIB
    """Reads that are first tried from the page cache; longer ones may find a part of it there."""
    node_threads_max: int = 12
    """Calls of one node at a time, so that one that hangs cannot take all threads."""
    suspicions_max: int = 3
    """Failed attempts to bring a node back after which it is called down."""
    probe_seconds: float = 10.0
    """How often nodes that are away are looked for."""
    retry_seconds_min: float = 5.0
    retry_seconds_max: float = 600.0
    """How long a node that failed while it was brought back is left alone."""
    repair_batch: int = 16
    """Stripes that repair rebuilds between two flushes."""
    scrub_note_seconds: float = 10.0
    """How often a scrub notes where it stands."""
    repair_scan_rows: int = 256
    repairs_kept_max: int = 20
    """Repairs whose size and time are remembered."""
    background_busy_rate: int = 32 * MIB
    """Bytes a second of I/O that repair, healing and scrubbing do while users read or write."""
    users_away_seconds: float = 1.0
    """After the last read or write of a file the background may do as it likes."""
    tail_extents_max: int = 1024
    """Files whose last written extent is remembered."""
    removal_batch: int = 32
    """Deleted files whose rows one transaction removes."""
    removal_pause_seconds: float = 0.01
    removals_max: int = 10_000
    """Deleted files wait until none came for so long, or until there are so many."""
    trim_batch: int = 256
    """Extents that one transaction removes."""
    walk_batch: int = 128
    """Entries of a directory that one step of a walk through a tree takes."""
    quota_block_bytes: int = 4 * KIB
    """A write that a quota cuts short ends at a multiple of this, a page of the kernel."""
    recode_bytes: int = 4 * MIB
    recode_extents: int = 128
    """What one transaction of a recoding gives new places: smaller files go over in one."""
    recode_retry_seconds: float = 5.0
    """How long a recoding waits for room, or for a node, before it tries again."""
    recode_note_seconds: float = 5.0
    """How often a recoding notes how far it is."""
    codes_cached_max: int = 10_000
    """Directories whose code for new files is remembered."""
    stripes_cached_max: int = 512
    """Decoded rows of stripes that reads keep."""
    read_ahead_bytes: int = 512 * KIB
    """What the kernel reads ahead of a file that is read in order, if it lets us say so."""
    fuse_tasks_max: int = 32
    """Requests served at a time; each keeps a buffer of a write request's size."""
    metadata_row_bytes: int = 1024
    """What an operation on names or attributes is counted as, its values aside."""
    metadata_share: int = 16
    """File bytes that a byte of the metadata device must at least serve."""

    @property
    def between_commits_bytes(self) -> int:
        """More than is accepted before a commit looks how much room there is."""
        return 2 * self.unflushed_bytes_max

    def __post_init__(self) -> None:
        assert 0 < self.stripe_bytes <= STRIPE_BYTES
        assert 0 < self.shard_segment_bytes <= SHARD_SEGMENT_BYTES
        assert self.tail_bytes_max < VALUE_BYTES_MAX
        assert self.unflushed_bytes_max >= self.stripe_bytes


DEFAULTS = Limits()
