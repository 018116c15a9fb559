"""The numbers that bound fusestore, each with its unit and its reason."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20

# --- coding ------------------------------------------------------------------
STRIPE_BYTES = MIB
"""File data that one stripe takes: the largest write request of the kernel."""
BLOCK_BYTES = 16 * KIB
"""What one checksum covers: the least that a read has to fetch and verify."""
SHARD_ALIGN_BYTES = 64
"""Shards are padded to this, the width of a vector register and a cache line."""
SHARDS_MAX = 64
"""k + m of a code."""
STRIPE_OWNERS_MAX = 8192
"""Extents in one stripe; a stripe is sealed when it has as many."""
OWNERS_PER_ROW_MAX = 2000
"""Keeps a row of `owners` below VALUE_BYTES_MAX."""

# --- segments and records ----------------------------------------------------
RECORD_ALIGN_BYTES = 64
SHARD_SEGMENT_BYTES = 64 * MIB
"""A shard segment is rolled once it is at least this long."""
JOURNAL_SEGMENT_BYTES = 8 * MIB
"""A journal segment is rolled once it is at least this long."""
SHARD_PREALLOCATE_BYTES = 4 * MIB
"""Room that is allocated in one step ahead of the end of a segment."""
JOURNAL_AHEAD_BYTES = MIB
"""Zeros that are written in one step behind the journal's end: what then takes their place is
flushed twice as fast as what makes a file longer."""
OPEN_SEGMENTS_MAX = 128
"""Descriptors that a node keeps for reading."""

# --- commit ------------------------------------------------------------------
TAIL_BYTES_MAX = 32 * KIB
"""New bytes of an open stripe that travel in the COMMIT record instead of sealing it."""
COMMIT_SECONDS_MAX = 5.0
DIRECT_RECORD_BYTES_MAX = 64 * KIB
"""Records of commits that may take the short way to the journals."""
UNFLUSHED_BYTES_MAX = 64 * MIB
"""File bytes accepted and not yet committed; a commit starts at half of it."""
BETWEEN_COMMITS_BYTES = 2 * UNFLUSHED_BYTES_MAX
"""More than is accepted before a commit looks how much room there is."""
SEALS_MAX = 8
"""Stripes being coded and written at a time; each holds one buffer."""
HOP_CHANGES_MIN = 500
"""Changes of a commit from which on encoding them is worth a thread hop."""
CHECKPOINT_SECONDS_MAX = 10.0
CHECKPOINT_CHANGES_MAX = 10_000
"""Changed keys that wait in memory for the metadata database."""
SNAPSHOT_JOURNAL_BYTES_MIN = 8 * MIB
"""Journal since the last snapshot below which no new one is taken."""
SNAPSHOT_PIECE_BYTES = 256 * KIB
SNAPSHOT_STEP_KEYS = 200
"""Keys that a snapshot reads before it lets the next request run: about a millisecond."""
RESERVE_BYTES = 32 * MIB
"""Kept free on every device for commits, deletes and checkpoints."""

# --- metadata ----------------------------------------------------------------
KEY_BYTES_MAX = 511
VALUE_BYTES_MAX = 64 * KIB
MAP_BYTES = 1 << 40
"""Address space reserved for the metadata database; the file grows as needed."""
METADATA_PREALLOCATE_BYTES = 8 * MIB
RECLAIM_BATCH = 256
"""Shards that are punched out in one thread hop and one transaction."""
CATCH_UP_SHARDS_MAX = 64
"""Shards that a node may lack to be brought back before the mount answers."""
NODE_SECONDS_MAX = 30.0
"""How long a node may take for a write or a flush before it is given up."""
READ_SECONDS_MAX = 3.0
"""How long a node may take for a read before others are read instead."""
SLOW_SECONDS = 30.0
"""How long a node that was too slow is then not read, if others will do."""
SAMPLE_SECONDS = 0.25
"""How old the free space of a node may be, and how long ago its directory was looked at as a whole,
when a commit is appended without a thread."""
READ_NOW_BYTES_MAX = 64 * KIB
"""Reads that are first tried from the page cache; longer ones may find a part of it there."""
NODE_THREADS_MAX = 12
"""Calls of one node at a time, so that one that hangs cannot take all threads."""
SUSPICIONS_MAX = 3
"""Failed attempts to bring a node back after which it is called down."""
PROBE_SECONDS = 10.0
"""How often nodes that are away are looked for."""
RETRY_SECONDS_MIN = 5.0
RETRY_SECONDS_MAX = 600.0
"""How long a node that failed while it was brought back is left alone."""
REPAIR_BATCH = 16
"""Stripes that repair rebuilds between two flushes."""
BALANCED = 0.02
"""A rebalance has ended when every node is so near to its share, or no move makes it nearer."""
BALANCE_SLACK = 0.01
"""A rebalance leaves a node alone that is so near to its share."""
SCRUB_NOTE_SECONDS = 10.0
"""How often a scrub notes where it stands."""
REPAIR_SCAN_ROWS = 256
REPAIRS_KEPT_MAX = 20
"""Repairs whose size and time are remembered."""
BACKGROUND_BUSY_RATE = 32 * MIB
"""Bytes a second of I/O that repair, healing and scrubbing do while users read or write."""
USERS_AWAY_SECONDS = 1.0
"""After the last read or write of a file the background may do as it likes."""
TAIL_EXTENTS_MAX = 1024
"""Files whose last written extent is remembered."""
REMOVAL_BATCH = 32
"""Deleted files whose rows one transaction removes."""
REMOVAL_PAUSE_SECONDS = 0.01
REMOVALS_MAX = 10_000
"""Deleted files wait until none came for so long, or until there are so many."""
TRIM_BATCH = 256
"""Extents that one transaction removes."""
WALK_BATCH = 128
"""Entries of a directory that one step of a walk through a tree takes."""
QUOTA_BLOCK_BYTES = 4 * KIB
"""A write that a quota cuts short ends at a multiple of this, a page of the kernel."""
RECODE_BYTES = 4 * MIB
RECODE_EXTENTS = 128
"""What one transaction of a recoding gives new places: smaller files go over in one."""
RECODE_RETRY_SECONDS = 5.0
"""How long a recoding waits for room, or for a node, before it tries again."""
RECODE_NOTE_SECONDS = 5.0
"""How often a recoding notes how far it is."""

CODES_CACHED_MAX = 10_000
"""Directories whose code for new files is remembered."""
STRIPES_CACHED_MAX = 512
"""Decoded rows of stripes that reads keep."""

READ_AHEAD_BYTES = 512 * KIB
"""What the kernel reads ahead of a file that is read in order, if it lets us say so."""
FUSE_TASKS_MAX = 32
"""Requests served at a time; each keeps a buffer of a write request's size."""

METADATA_ROW_BYTES = 1024
"""What an operation on names or attributes is counted as, its values aside."""
METADATA_SHARE = 16
"""File bytes that a byte of the metadata device must at least serve."""

# --- the file system ---------------------------------------------------------
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
assert TAIL_BYTES_MAX < VALUE_BYTES_MAX
