"""The metadata tables, and the form of their rows.

A key is the letter of its table and big-endian numbers, so that keys sort by number.

    I ino                      inodes    Inode
    N parent name              names     ino, cookie
    L parent cookie            listing   ino, name          stable readdir
    E ino offset               extents   Extent             of file bytes
    S stripe                   stripes   Stripe             once it is sealed
    V stripe                   live      Live               bytes that extents point at
    O stripe stripe-offset     owners    packed Owner; true only where extents agree
    T stripe stripe-offset     tails     code, bytes committed before the stripe was sealed
    X ino name                 xattrs    value
    Q ino                      targets   of a symbolic link
    M node stripe index        missing   nothing            a shard to be healed
    B ino                      quotas    Quota              of a directory
    U ino                      orphans   nothing            unlinked while still in use
    D ino                      trims     size               extents past it are to be removed
    G node segment             segments  SegmentState
    R node segment offset      reclaim   Freed              room to free after the next checkpoint
    Z name                     super     counters, log, nodes, dump

`file_rows`, `stripe_rows` and `store_rows` have one function per key and one dataclass
per value.  No other module knows these bytes.

A crash may leave rows in `orphans`, `trims`, `tails` and `reclaim`; the next mount
processes them.  `live`, `Inode.allocated`, the use of quotas, and the counters are
denormalised; fsck can recount them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import RowTooLargeError
from ..limits import KEY_BYTES_MAX, VALUE_BYTES_MAX
from .erasure import Code
from .file_rows import NUMBER_MAX, Quota
from .keys import Q
from .records import Changes
from .stripe_rows import OWNER, Freed, SegmentState, Stripe


@dataclass(frozen=True, slots=True)
class Table:
    """The form of the rows of a table."""

    letter: bytes
    name: str
    key_length: int
    """The length of keys; if keys end with a name, the least length."""
    has_form: Callable[[bytes, bytes], bool]
    """Checks a key of that length and its value; struct.error and ValueError also mean no."""
    named: bool = False
    """Keys end with a name."""


def _numbers(packed: bytes) -> bool:
    return all(0 < number <= NUMBER_MAX for (number,) in Q.iter_unpack(packed))


TABLES = {
    table.letter: table
    for table in (
        Table(b"B", "quotas", 9, lambda k, v: Quota.decode(v).state > 0 and _numbers(k[1:])),
        Table(b"D", "trims", 9, lambda k, v: len(v) == 8 and _numbers(k[1:])),
        Table(b"E", "extents", 17, lambda k, v: len(v) == 16 and _numbers(k[1:9])),
        Table(b"G", "segments", 7, lambda k, v: SegmentState.decode(v).is_possible),
        Table(b"I", "inodes", 9, lambda k, v: len(v) == 86 and _numbers(k[1:])),
        Table(b"L", "listing", 17, lambda k, v: len(v) > 8 and _numbers(k[1:] + v[:8])),
        Table(b"M", "missing", 12, lambda k, v: True),
        Table(b"N", "names", 9, lambda k, v: len(v) == 16 and _numbers(k[1:9] + v), named=True),
        Table(b"O", "owners", 13, lambda k, v: len(v) % OWNER.size == 0 < len(v)),
        Table(b"Q", "targets", 9, lambda k, v: len(v) > 0 and _numbers(k[1:])),
        Table(b"R", "reclaim", 15, lambda k, v: Freed.has_form(v)),
        Table(b"S", "stripes", 9, lambda k, v: Stripe.has_form(v)),
        Table(b"T", "tails", 13, lambda k, v: len(v) > 2 and Code(v[0], v[1]).is_possible),
        Table(b"U", "orphans", 9, lambda k, v: _numbers(k[1:])),
        Table(b"V", "live", 9, lambda k, v: len(v) == 12),
        Table(b"X", "xattrs", 10, lambda k, v: _numbers(k[1:9]), named=True),
    )
}
"""All tables except `super`, by letter."""


def fits(key: bytes, value: bytes | None) -> bool:
    """Return whether the database accepts a row; None is a deletion."""
    return 0 < len(key) <= KEY_BYTES_MAX and (value is None or len(value) <= VALUE_BYTES_MAX)


def check_lengths(changes: Changes) -> None:
    """Raise RowTooLargeError if the database would refuse one of these rows."""
    for key, value in changes.items():
        if not fits(key, value):
            table = TABLES[key[:1]].name if key[:1] in TABLES else "super"
            raise RowTooLargeError(
                f"A row of {table} would have a key of {len(key)} bytes and a value of "
                f"{len(value or b'')}: at most {KEY_BYTES_MAX} and {VALUE_BYTES_MAX} are possible."
            )


def readable(key: bytes, value: bytes) -> bool:
    """Return whether a row of any table except `super` has the form of its table."""
    table = TABLES.get(key[:1])
    if table is None or len(key) < table.key_length:
        return False
    if len(key) > table.key_length and not table.named:
        return False
    try:
        return table.has_form(key, value)
    except (struct.error, ValueError):
        return False
