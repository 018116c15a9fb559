"""The metadata tables: one function a key, one dataclass a value; nobody else knows bytes.

A key is the table's letter and big-endian numbers, so that keys sort by number.

    I ino                      inodes    Inode
    N parent name              names     ino, cookie
    L parent cookie            listing   ino, name          stable readdir
    E ino offset               extents   Extent             of file bytes
    S stripe                   stripes   Stripe             once it is sealed
    V stripe                   live      bytes that extents point at
    O stripe stripe-offset     owners    packed Owner; true only where extents agree
    T stripe stripe-offset     tails     code, bytes committed before the stripe was sealed
    X ino name                 xattrs    value
    Q ino                      targets   of a symbolic link
    M node stripe index        missing   nothing            what healing owes the node
    B ino                      quotas    Quota              of a directory
    U ino                      orphans   nothing            unlinked while still in use
    D ino                      trims     size               extents past it are to be removed
    G node segment             segments  SegmentState
    R node segment offset      reclaim   payload length     to free after the next checkpoint
    Z name                     super     counters, log, nodes, snapshot

A crash may leave: rows in `orphans`, `trims`, `tails` and `reclaim` that the
next mount works off.  `live`, `Inode.allocated`, what quotas count and the
counters are denormalised; fsck can count them anew.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import NewType, Self

from ..limits import BLOCK_BYTES, RECORD_ALIGN_BYTES, SHARD_SEGMENT_BYTES, STRIPE_BYTES
from .erasure import Code

Ino = NewType("Ino", int)
StripeNumber = NewType("StripeNumber", int)
NodeId = NewType("NodeId", int)

ROOT = Ino(1)
FIRST_COOKIE = 16
"""Cookies below belong to `.` and `..`."""

_Q = struct.Struct(">Q")
_QQ = struct.Struct(">QQ")
_QI = struct.Struct(">QI")
_HI = struct.Struct(">HI")
_HQB = struct.Struct(">HQB")
_HIQ = struct.Struct(">HIQ")


def after(prefix: bytes) -> bytes:
    """The least key that is greater than all that start with `prefix`."""
    return (int.from_bytes(prefix, "big") + 1).to_bytes(len(prefix), "big")


# --- inodes ------------------------------------------------------------------


@dataclass(slots=True)
class Inode:
    """Attributes of a file; times in ns since the epoch, sizes in bytes."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    allocated: int
    """Bytes that extents of this inode hold; holes excluded."""
    atime: int
    mtime: int
    ctime: int
    rdev: int = 0
    generation: int = 0
    parent: int = 0
    """A directory's parent; for others the directory that it was last linked in."""
    quota_root: int = 0
    """The nearest directory with a quota, for a directory itself included; 0: none."""
    k: int = 0
    m: int = 0
    """The code of new bytes, for a directory of new files; 0+0 is the store's default."""

    _STRUCT = struct.Struct("<IIIIQQqqqQIQQBB")

    def encode(self) -> bytes:
        """The row's value."""
        return self._STRUCT.pack(
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.size,
            self.allocated,
            self.atime,
            self.mtime,
            self.ctime,
            self.rdev,
            self.generation,
            self.parent,
            self.quota_root,
            self.k,
            self.m,
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(*cls._STRUCT.unpack(value))


def inode_key(ino: int) -> bytes:
    return b"I" + _Q.pack(ino)


# --- names -------------------------------------------------------------------


def name_key(parent: int, name: bytes) -> bytes:
    return b"N" + _Q.pack(parent) + name


def decode_name_key(key: bytes) -> tuple[int, bytes]:
    """(parent, name)."""
    return _Q.unpack_from(key, 1)[0], key[9:]


def name_value(ino: int, cookie: int) -> bytes:
    return _QQ.pack(ino, cookie)


def decode_name(value: bytes) -> tuple[int, int]:
    """(ino, cookie)."""
    return _QQ.unpack(value)


def listing_key(parent: int, cookie: int) -> bytes:
    return b"L" + _QQ.pack(parent, cookie)


def listing_value(ino: int, name: bytes) -> bytes:
    return _Q.pack(ino) + name


def decode_listing(key: bytes, value: bytes) -> tuple[int, int, bytes]:
    """(cookie, ino, name)."""
    return _Q.unpack_from(key, 9)[0], _Q.unpack_from(value)[0], value[8:]


# --- extents -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of a file at `offset` lie at `stripe_offset` of `stripe`."""

    offset: int
    length: int
    stripe: int
    stripe_offset: int

    _STRUCT = struct.Struct("<IQI")

    @property
    def end(self) -> int:
        """The offset of the first byte after it."""
        return self.offset + self.length

    def encode(self) -> bytes:
        """The row's value; the offset is in the key."""
        return self._STRUCT.pack(self.length, self.stripe, self.stripe_offset)

    @classmethod
    def decode(cls, key: bytes, value: bytes) -> Self:
        """Read a row."""
        return cls(_Q.unpack_from(key, 9)[0], *cls._STRUCT.unpack(value))

    def part(self, start: int, end: int) -> Extent:
        """The extent of what it has of the file's bytes start <= i < end."""
        first = max(start, self.offset)
        return Extent(
            first,
            min(end, self.end) - first,
            self.stripe,
            self.stripe_offset + first - self.offset,
        )


def extent_key(ino: int, offset: int) -> bytes:
    return b"E" + _QQ.pack(ino, offset)


# --- stripes -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """Where a shard's payload lies; segment 0 means that it was never written."""

    node: int
    segment: int
    offset: int
    """Of the payload, in the segment's file."""

    @property
    def written(self) -> bool:
        """Whether the node was ever given it."""
        return self.segment != 0


@dataclass(frozen=True, slots=True)
class Stripe:
    """A sealed stripe: where its n shards lie and what their blocks must hash to."""

    code: Code
    length: int
    """Bytes of file data, padding excluded."""
    shards: tuple[ShardPlace, ...]
    checksums: tuple[bytes, ...]
    """For each shard the xxh3-64 of each of its blocks, 8 bytes each."""

    _HEAD = struct.Struct("<BBII")
    _PLACE = struct.Struct("<HIQ")

    @property
    def shard_length(self) -> int:
        """Bytes of each shard."""
        return self.code.shard_length(self.length)

    def moved(self, index: int, place: ShardPlace) -> Stripe:
        """The same stripe with one shard elsewhere."""
        shards = (*self.shards[:index], place, *self.shards[index + 1 :])
        return replace(self, shards=shards)

    def encode(self) -> bytes:
        """The row's value."""
        return b"".join(
            (
                self._HEAD.pack(self.code.k, self.code.m, self.length, self.shard_length),
                *(self._PLACE.pack(s.node, s.segment, s.offset) for s in self.shards),
                *self.checksums,
            )
        )

    @classmethod
    def has_form(cls, value: bytes) -> bool:
        """Whether a value has the numbers and the length of a stripe's row; struct.error."""
        k, m, length, shard_length = cls._HEAD.unpack_from(value)
        code = Code(k, m)
        blocks = -(-shard_length // BLOCK_BYTES)
        return (
            code.is_possible
            and 0 < length <= STRIPE_BYTES
            and shard_length == code.shard_length(length)
            and len(value) == cls._HEAD.size + code.n * (cls._PLACE.size + 8 * blocks)
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        k, m, length, _ = cls._HEAD.unpack_from(value)
        code = Code(k, m)
        start = cls._HEAD.size + cls._PLACE.size * code.n
        places = cls._PLACE.iter_unpack(value[cls._HEAD.size : start])
        each = (len(value) - start) // code.n
        return cls(
            code,
            length,
            tuple(ShardPlace(*place) for place in places),
            tuple(value[start + i * each : start + (i + 1) * each] for i in range(code.n)),
        )


STRIPES_START, STRIPES_END = b"S", b"T"
LOST_STRIPE = 0
"""No stripe: fsck points extents at it whose bytes are nowhere, so that they are an error."""


def stripe_key(stripe: int) -> bytes:
    return b"S" + _Q.pack(stripe)


def decode_stripe_key(key: bytes) -> int:
    return int(_Q.unpack_from(key, 1)[0])


def live_key(stripe: int) -> bytes:
    return b"V" + _Q.pack(stripe)


def live_value(live: int) -> bytes:
    return _Q.pack(live)


def decode_live(value: bytes) -> int:
    return int(_Q.unpack(value)[0])


OWNER = struct.Struct("<QQII")
"""ino, file offset, length, stripe offset."""


def owners_key(stripe: int, stripe_offset: int) -> bytes:
    return b"O" + _QI.pack(stripe, stripe_offset)


TAILS_START, TAILS_END = b"T", b"U"


def tail_key(stripe: int, stripe_offset: int) -> bytes:
    return b"T" + _QI.pack(stripe, stripe_offset)


def tail_value(code: Code, data: bytes) -> bytes:
    return bytes((code.k, code.m)) + data


def decode_tail(value: bytes) -> tuple[Code, bytes]:
    """(code of the stripe, bytes)."""
    return Code(value[0], value[1]), value[2:]


def decode_tail_key(key: bytes) -> tuple[int, int]:
    """(stripe, stripe offset)."""
    return _QI.unpack_from(key, 1)


# --- attributes --------------------------------------------------------------


def xattr_key(ino: int, name: bytes) -> bytes:
    return b"X" + _Q.pack(ino) + name


def target_key(ino: int) -> bytes:
    return b"Q" + _Q.pack(ino)


# --- what is owed ------------------------------------------------------------


def missing_key(node: int, stripe: int, index: int) -> bytes:
    return b"M" + _HQB.pack(node, stripe, index)


def missing_prefix(node: int) -> bytes:
    return b"M" + struct.pack(">H", node)


def decode_missing_key(key: bytes) -> tuple[int, int, int]:
    """(node, stripe, index)."""
    return _HQB.unpack_from(key, 1)


ORPHANS_START, ORPHANS_END = b"U", b"V"


def orphan_key(ino: int) -> bytes:
    return b"U" + _Q.pack(ino)


TRIMS_START, TRIMS_END = b"D", b"E"


def trim_key(ino: int) -> bytes:
    return b"D" + _Q.pack(ino)


def decode_ino_key(key: bytes) -> Ino:
    """The inode of a row of `orphans`, `trims`, `quotas` or `inodes`."""
    return Ino(_Q.unpack_from(key, 1)[0])


# --- quotas ------------------------------------------------------------------

NO_LIMIT = (1 << 64) - 1


class QuotaState(IntEnum):
    """How far a quota is from being in force, or from being gone."""

    COUNTING = 1
    """What lies below its directory is being counted; it is not enforced yet."""
    ACTIVE = 2
    CLEARING = 3
    """What lies below its directory is being given back to the quota above."""
    GONE = 4
    """Kept for files without a name in its directory, until the last of them is removed."""


@dataclass(slots=True)
class Quota:
    """What may lie below a directory, and what does; that directory itself does not count."""

    bytes_max: int = NO_LIMIT
    files_max: int = NO_LIMIT
    bytes_used: int = 0
    """What extents of the files below hold, those below inner quotas included."""
    files_used: int = 0
    """Inodes of any kind."""
    outer: int = 0
    """The next directory above with a quota, which this one's use counts for, too; 0: none."""
    state: QuotaState = QuotaState.COUNTING

    _STRUCT = struct.Struct("<QQqqQB")

    def encode(self) -> bytes:
        """The row's value."""
        return self._STRUCT.pack(
            self.bytes_max,
            self.files_max,
            self.bytes_used,
            self.files_used,
            self.outer,
            self.state,
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        row = cls(*cls._STRUCT.unpack(value))
        row.state = QuotaState(row.state)
        return row


QUOTAS_START, QUOTAS_END = b"B", b"C"


def quota_key(ino: int) -> bytes:
    return b"B" + _Q.pack(ino)


@dataclass(slots=True)
class SegmentState:
    """A shard segment: bytes used, and bytes of records with something live in them."""

    size: int = 0
    live: int = 0

    _STRUCT = struct.Struct("<QQ")

    @property
    def is_possible(self) -> bool:
        """Whether a segment may be so long, and so much live in it."""
        return self.live <= self.size <= SHARD_SEGMENT_BYTES + RECORD_ALIGN_BYTES + STRIPE_BYTES

    def encode(self) -> bytes:
        """The row's value."""
        return self._STRUCT.pack(self.size, self.live)

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(*cls._STRUCT.unpack(value))


SEGMENTS_START, SEGMENTS_END = b"G", b"H"


def segment_key(node: int, segment: int) -> bytes:
    return b"G" + _HI.pack(node, segment)


def decode_segment_key(key: bytes) -> tuple[int, int]:
    """(node, segment)."""
    return _HI.unpack_from(key, 1)


RECLAIM_START, RECLAIM_END = b"R", b"S"


def reclaim_key(node: int, segment: int, offset: int) -> bytes:
    return b"R" + _HIQ.pack(node, segment, offset)


def reclaim_row(place: ShardPlace, length: int) -> tuple[bytes, bytes]:
    """The row that frees a shard of `length` bytes."""
    return reclaim_key(place.node, place.segment, place.offset), length.to_bytes(4, "little")


def decode_reclaim_key(key: bytes) -> tuple[int, int, int]:
    """(node, segment, payload offset)."""
    return _HIQ.unpack_from(key, 1)


# --- the form of rows --------------------------------------------------------

NUMBER_MAX = (1 << 63) - 1
"""Of inodes and cookies: what the kernel takes."""
_FORMS: dict[bytes, tuple[int, Callable[[bytes, bytes], bool]]] = {
    b"B": (9, lambda key, value: Quota.decode(value).state > 0 and _numbers(key[1:])),
    b"D": (9, lambda key, value: len(value) == 8 and _numbers(key[1:])),
    b"E": (17, lambda key, value: len(value) == 16 and _numbers(key[1:9])),
    b"G": (7, lambda key, value: SegmentState.decode(value).is_possible),
    b"I": (9, lambda key, value: len(value) == 86 and _numbers(key[1:])),
    b"L": (17, lambda key, value: len(value) > 8 and _numbers(key[1:] + value[:8])),
    b"M": (12, lambda key, value: True),
    b"N": (9, lambda key, value: len(value) == 16 and _numbers(key[1:9] + value)),
    b"O": (13, lambda key, value: len(value) % OWNER.size == 0 < len(value)),
    b"Q": (9, lambda key, value: len(value) > 0 and _numbers(key[1:])),
    b"R": (15, lambda key, value: len(value) == 4),
    b"S": (9, lambda key, value: Stripe.has_form(value)),
    b"T": (13, lambda key, value: len(value) > 2 and Code(value[0], value[1]).is_possible),
    b"U": (9, lambda key, value: _numbers(key[1:])),
    b"V": (9, lambda key, value: len(value) == 8),
    b"X": (10, lambda key, value: _numbers(key[1:9])),
}
"""By table: the length of its keys, for those that end with a name the least; a test of a row."""


def _numbers(packed: bytes) -> bool:
    return all(0 < number <= NUMBER_MAX for (number,) in _Q.iter_unpack(packed))


def readable(key: bytes, value: bytes) -> bool:
    """Whether a row of any table but `super` has the form of its table's rows."""
    form = _FORMS.get(key[:1])
    if form is None or len(key) < form[0] or (len(key) > form[0] and key[:1] not in (b"N", b"X")):
        return False
    try:
        return form[1](key, value)
    except (struct.error, ValueError):
        return False


# --- super -------------------------------------------------------------------

CODES_KEY = b"Zcodes"
COUNTERS_KEY = b"Zcounters"
FORMAT_KEY = b"Zformat"
LOG_KEY = b"Zlog"
NODES_KEY = b"Znodes"
REBALANCE_KEY = b"Zrebalance"
RECODE_KEY = b"Zrecode"
REPAIRS_KEY = b"Zrepairs"
SCRUB_KEY = b"Zscrub"
SNAPSHOT_KEY = b"Zsnapshot"
FORMAT = 1


@dataclass(slots=True)
class Counters:
    """What is handed out, and what there is."""

    next_ino: int = ROOT + 1
    next_cookie: int = FIRST_COOKIE
    files: int = 1
    """Inodes of any kind."""
    file_bytes: int = 0
    """Bytes that extents hold."""
    stripes: int = 0
    """Stripes that are sealed or about to be."""

    _STRUCT = struct.Struct("<QQqqq")

    def copy(self) -> Self:
        """The counters as they are now."""
        return replace(self)

    def encode(self) -> bytes:
        """The row's value."""
        return self._STRUCT.pack(
            self.next_ino, self.next_cookie, self.files, self.file_bytes, self.stripes
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(*cls._STRUCT.unpack(value))


def encode_codes(codes: list[Code]) -> bytes:
    return json.dumps([str(code) for code in codes]).encode()


def decode_codes(value: bytes | None) -> list[Code]:
    """Codes that directories were ever given, or files recoded to."""
    return [Code.parse(text) for text in json.loads(value)] if value else []


@dataclass(slots=True)
class LogState:
    """Where the log stood at a commit; JSON in the row."""

    epoch: int = 0
    nonce: str = ""
    """32 hexadecimal digits, drawn anew with each epoch."""
    commit: int = 0
    checksum: int = 0
    """Of the payload of that commit."""
    journal_segment: int = 1
    """Commits after it lie in this journal segment or a later one."""

    def encode(self) -> bytes:
        """The row's value."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}).encode()

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(**json.loads(value))


NEVER_WHOLE = 1 << 62
"""`holds` of a node that may lack anything, whatever its journal says."""


@dataclass(slots=True)
class NodeRow:
    """A node as the log knows it; the row holds a JSON list of all of them."""

    id: int
    name: str
    region: str
    path: str
    in_sync: bool
    holds: int = 0
    """For a node that is not in sync: the last commit that it is known to have flushed."""
    weight: float = 1.0
    draining: bool = False


def encode_nodes(rows: list[NodeRow]) -> bytes:
    """Weights of 1 and nodes that are not drained go without saying."""
    usual = {"weight": 1.0, "draining": False}
    return json.dumps(
        [
            {name: value for name, value in asdict(row).items() if usual.get(name, ...) != value}
            for row in rows
        ]
    ).encode()


def decode_nodes(value: bytes) -> list[NodeRow]:
    return [NodeRow(**row) for row in json.loads(value)]
