"""The limits of fusestore, each with its unit and its reason.

The constants are part of the format or of POSIX.  The values of `Limits` can be changed:
an open store gets one object with its configuration, and uses only this object.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
STRIPE_BYTES = MIB
"""File data in one stripe: the largest write request of the kernel."""
SMALL_STRIPE_BYTES, SMALL_STRIPE_WASTE = 64 * KIB, 16 * KIB
"""A stripe with less file data is merged with others; until then it counts as so much waste."""
BLOCK_BYTES = 16 * KIB
"""The bytes of one checksum: the least that a read must fetch and verify."""
SHARD_ALIGN_BYTES = 64
"""Shards are padded to this, the width of a vector register and a cache line."""
SHARDS_MAX = 64
"""The largest k + m of a code."""
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
XATTRS_BYTES_MAX = MIB
"""The names and values of all attributes of an inode: quotas do not count them."""

assert STRIPE_BYTES % BLOCK_BYTES == 0
assert BLOCK_BYTES % SHARD_ALIGN_BYTES == 0
assert SHARD_ALIGN_BYTES % RECORD_ALIGN_BYTES == 0
assert OWNERS_PER_ROW_MAX * 24 < VALUE_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of an open store; the defaults suit small boards and larger machines."""

    stripe_bytes: int = STRIPE_BYTES
    """File data in a new stripe."""
    shard_segment_bytes: int = SHARD_SEGMENT_BYTES
    solid_segment_bytes: int = 8 * MIB
    """The same on a node without holes."""
    """A shard segment is rolled once it is at least this long."""
    stripe_owners_max: int = 8192
    """Extents in one stripe; a stripe with this many is sealed."""
    journal_segment_bytes: int = 8 * MIB
    """A journal segment is rolled once it is at least this long."""
    shard_preallocate_bytes: int = 4 * MIB
    """Room that is allocated in one step ahead of the end of a segment."""
    journal_ahead_bytes: int = MIB
    """Zeros that are written in one step behind the journal's end: records that overwrite them are
    flushed twice as fast as records that extend a file."""
    open_segments_max: int = 128
    """Descriptors that a node keeps open for reading."""
    tail_bytes_max: int = 32 * KIB
    """New bytes of an open stripe that a COMMIT record stores, so that the stripe is not sealed."""
    commit_seconds_max: float = 5.0
    direct_record_bytes_max: int = 64 * KIB
    """Records of commits that may be written to the journals without a thread."""
    unflushed_bytes_max: int = 32 * MIB
    """File bytes accepted and not yet committed; a commit begins at half of this."""
    seals_max: int = 8
    """Stripes being coded and written at a time; each holds one buffer."""
    hop_changes_min: int = 500
    """A commit with at least this many changes is encoded in a thread."""
    checkpoint_seconds_max: float = 10.0
    checkpoint_changes_max: int = 10_000
    """Changed keys that wait in memory for the metadata database."""
    freed_bytes_max: int = 32 * MIB
    """Bytes on nodes that become free with a checkpoint; with more, and more than 1/64 of the
    files' bytes, one is due."""
    dump_journal_bytes_min: int = 8 * MIB
    """How much journal there must be since the last metadata dump before the next one."""
    dump_piece_bytes: int = 256 * KIB
    dump_step_keys: int = 200
    """Keys that a metadata dump reads before it yields to requests: about a millisecond."""
    reserve_bytes: int = 32 * MIB
    """Kept free on every device for commits, deletes and checkpoints."""
    scarce_bytes: int = 128 * MIB
    """A device with less free room than this gets nothing allocated ahead."""
    journal_reserve_bytes: int = 8 * MIB
    """Room that each node keeps for its journal by a file, so that nobody else can take it."""
    journal_reserve_below_bytes: int = 4096 * MIB
    """The file exists on devices with less free room than this."""
    full_retry_seconds: float = 0.5
    """How often a write that found a device full is tried again."""
    full_seconds_max: float = 10.0
    """How long a caller of fsync, or an unmount, waits for a device that is full."""
    room_waits_max: int = 24
    """Requests that wait at a time until freed room can be used again; more get ENOSPC, as others
    must be served meanwhile."""
    map_bytes: int = 1 << 40
    """Address space reserved for the metadata database; the file grows as needed."""
    metadata_preallocate_bytes: int = 8 * MIB
    rows_examined_at_mount_max: int = 250_000
    """Rows of the metadata that a mount verifies before it answers, at 2 µs each.  If there are
    more, it verifies only the rows that it needs, and scrubs verify the rest."""
    reclaim_batch: int = 256
    """Shards that are punched out in one thread call and one transaction."""
    catch_up_shards_max: int = 64
    """A node that lacks at most this many shards is brought back before the mount answers."""
    node_seconds_max: float = 30.0
    """How long a node may take for a write or a flush before the store stops using it."""
    patience_seconds: float = 300.0
    """How long the store waits for a node that it cannot do without, as when all disks hang."""
    stall_seconds: float = 1.0
    """When a node takes longer for a shard, the others get theirs meanwhile."""
    read_seconds_max: float = 3.0
    """How long a node may take for a read before others are read instead."""
    slow_seconds: float = 30.0
    """How long a node is not read after a slow read, if others suffice."""
    sample_seconds: float = 0.25
    """The greatest age of a node's free space, and of the last check of its directory, for a commit
    that is appended without a thread."""
    read_now_bytes_max: int = 64 * KIB
    """Reads that first try the page cache; of longer reads, only a part may be in it."""
    node_threads_max: int = 12
    """Concurrent calls of one node, so that a node that hangs cannot use all threads."""
    suspicions_max: int = 3
    """After this many failed attempts to bring a node back, its state is down."""
    probe_seconds: float = 10.0
    """How often the store looks for absent nodes."""
    retry_seconds_min: float = 5.0
    retry_seconds_max: float = 600.0
    """How long a node is left alone after a failed attempt to bring it back."""
    repair_batch: int = 16
    """Stripes that repair rebuilds between two flushes."""
    scrub_note_seconds: float = 10.0
    """How often a scrub records its progress."""
    repair_scan_rows: int = 256
    repairs_kept_max: int = 20
    """Past repairs whose size and time are kept."""
    background_busy_rate: int = 32 * MIB
    """Bytes a second of I/O by repair, healing and scrubs while users read or write."""
    users_away_seconds: float = 1.0
    """This long after the last read or write of a file, background I/O has no limit."""
    tail_extents_max: int = 1024
    """Files whose last written extent is cached."""
    removal_batch: int = 32
    """Deleted files whose rows one transaction removes."""
    removal_pause_seconds: float = 0.01
    removals_max: int = 10_000
    removal_bytes_max: int = 16 * MIB
    """Deleted files wait until no more follow for this long, or until they are many or large."""
    trim_batch: int = 256
    """Extents that one transaction removes."""
    walk_batch: int = 128
    """Entries of a directory in one step of a walk through a tree."""
    quota_block_bytes: int = 4 * KIB
    """A write that a quota cuts short ends at a multiple of this, a page of the kernel."""
    recode_bytes: int = 4 * MIB
    """What recoding reads before it writes it."""
    recode_extents: int = 128
    """It reads no more than so many extents if they fill a stripe, and 8 times as many if not."""
    recode_retry_seconds: float = 5.0
    """How long a recoding waits for room, or for a node, before it retries."""
    recode_note_seconds: float = 5.0
    """How often a recoding records its progress."""
    waste_percent_max: int = 15
    """Cleaning runs when waste exceeds this share of the files' bytes, and `waste_bytes_min`."""
    waste_bytes_min: int = 20 * MIB
    clean_rate: float | None = None
    """Bytes a second of I/O by cleaning; None: as much as the I/O of users allows."""
    clean_bytes: int = 4 * MIB
    """The live bytes that cleaning reads before it writes them."""
    rewrite_extents: int = 128
    """Extents that one transaction moves: a few milliseconds."""
    clean_bytes_at_once: int = 16 * MIB
    """What a request that found no room gives back before it is tried again."""
    hold_seconds_max: float = 2.0
    """How long a write waits for cleaning at most."""
    clean_look_seconds: float = 1.0
    clean_idle_seconds: float = 10.0
    """When nobody has used the mount for so long, it is cleaned to half of the bound."""
    pinned_look_seconds: float = 60.0
    """How often the room that segments hold is measured."""
    victims_max: int = 4096
    """Stripes that one walk chooses to clean."""
    codes_cached_max: int = 10_000
    """Directories whose code for new files is cached."""
    stripes_cached_max: int = 512
    """Decoded rows of stripes that reads cache."""
    read_ahead_bytes: int = 512 * KIB
    """The kernel's read-ahead for files that are read in order, if it can be set."""
    fuse_tasks_max: int = 32
    """Concurrent requests; each keeps a buffer with the size of a write request."""
    metadata_row_bytes: int = 1024
    """The assumed size of an operation on names or attributes in a commit, without its values."""
    metadata_page_bytes: int = 4096
    """By how much such an operation may let the metadata grow, without its values."""
    unwritten_bytes_max: int = 512 * MIB
    """By how much the metadata may grow in memory while its disk fails or hangs, as estimated."""
    unwritten_values_bytes_max: int = 32 * MIB
    """Names and values of attributes that may wait in memory for the metadata database."""
    metadata_share: int = 16
    """File bytes for each byte on the metadata device that must be free."""

    def __post_init__(self) -> None:
        assert 0 < self.stripe_bytes <= STRIPE_BYTES
        assert 0 < self.shard_segment_bytes <= SHARD_SEGMENT_BYTES
        assert self.tail_bytes_max < VALUE_BYTES_MAX
        assert self.unflushed_bytes_max >= self.stripe_bytes


DEFAULTS = Limits()
