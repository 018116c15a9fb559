"""POSIX access control lists, in the form in which the kernel keeps them.

The kernel checks access (`default_permissions`) and hands an ACL over as the
extended attribute `system.posix_acl_access` or `system.posix_acl_default`.
What is left to a file system is arithmetic between an ACL and a mode, and this
module is all of it: what setting an ACL does to the mode, what a chmod does to
the ACL, and what a new inode inherits.

The form is that of `linux/posix_acl_xattr.h`, little-endian: a u32 version (2),
then for each entry a u16 tag, a u16 permission (rwx as 4, 2, 1) and a u32 id.
The order is fixed: owner, named users, owning group, named groups, mask, other.
The rules are those of `fs/posix_acl.c`; each function names its model there.
"""

from __future__ import annotations

import enum
import stat
import struct
from dataclasses import dataclass, replace
from typing import Final

from ..errors import InvalidError

ACCESS: Final = b"system.posix_acl_access"
DEFAULT: Final = b"system.posix_acl_default"

VERSION: Final = 2
HEADER: Final = struct.Struct("<I")
ENTRY: Final = struct.Struct("<HHI")

#: The id of an entry that names nobody.
UNDEFINED_ID: Final = 0xFFFF_FFFF

PERMISSIONS: Final = 0o777


class Tag(enum.IntEnum):
    """Whom an entry speaks of."""

    USER_OBJ = 0x01
    USER = 0x02
    GROUP_OBJ = 0x04
    GROUP = 0x08
    MASK = 0x10
    OTHER = 0x20


#: The place of each tag in a list, which must never go down.
_RANK: Final = {tag: rank for rank, tag in enumerate(Tag)}

_NAMED: Final = (Tag.USER, Tag.GROUP)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of an ACL.

    `permission` is rwx as 0 to 7; `id` is a uid or gid, UNDEFINED_ID unless the
    tag is USER or GROUP.
    """

    tag: Tag
    permission: int
    id: int = UNDEFINED_ID


Acl = tuple[Entry, ...]


def parse(value: bytes) -> Acl:
    """The entries of an ACL's bytes, checked; () for a list without entries.

    Raises InvalidError for another version, a size that is no whole number of
    entries, and whatever `validate` refuses.
    """
    if len(value) < HEADER.size or (len(value) - HEADER.size) % ENTRY.size:
        raise InvalidError(f"An ACL cannot have {len(value)} bytes.")
    (version,) = HEADER.unpack_from(value)
    if version != VERSION:
        raise InvalidError(f"An ACL of version {version} is not known here, only {VERSION} is.")
    entries = []
    for number, permission, identity in ENTRY.iter_unpack(value[HEADER.size :]):
        try:
            tag = Tag(number)
        except ValueError:
            raise InvalidError(f"An ACL entry cannot have the tag {number:#x}.") from None
        entries.append(Entry(tag, permission, identity if tag in _NAMED else UNDEFINED_ID))
    acl = tuple(entries)
    if acl:
        validate(acl)
    return acl


def format(acl: Acl) -> bytes:
    """The bytes of an ACL, as `parse` reads them."""
    entries = (ENTRY.pack(entry.tag, entry.permission, entry.id) for entry in acl)
    return HEADER.pack(VERSION) + b"".join(entries)


def validate(acl: Acl) -> None:
    """Raise InvalidError unless the ACL is well-formed (`posix_acl_valid`).

    That is: owner, owning group and other exactly once, at most one mask, a mask
    where anybody is named, all in the fixed order, no permission but rwx.
    """
    tags = [entry.tag for entry in acl]
    for entry in acl:
        if entry.permission & ~0o7:
            raise InvalidError(f"An ACL entry cannot have the permission {entry.permission:#o}.")
        if entry.tag in _NAMED and entry.id == UNDEFINED_ID:
            raise InvalidError("An ACL entry for a named user or group needs a valid id.")
    ranks = [_RANK[tag] for tag in tags]
    if ranks != sorted(ranks):
        raise InvalidError("The entries of the ACL are not in the order they must have.")
    for tag in (Tag.USER_OBJ, Tag.GROUP_OBJ, Tag.OTHER):
        if tags.count(tag) != 1:
            raise InvalidError(f"An ACL needs exactly one entry {tag.name}.")
    named = any(tag in _NAMED for tag in tags)
    if tags.count(Tag.MASK) > 1 or (named and Tag.MASK not in tags):
        raise InvalidError("An ACL that names users or groups needs exactly one mask.")


def access_to_mode(value: bytes, mode: int) -> tuple[int, bytes | None]:
    """The mode after the access ACL `value` was set on an inode with `mode`.

    The owner, other and group bits follow the ACL, where the group bits are the
    mask's if there is one; all else in `mode` stays.  The second result is what
    is to be stored: None if the mode says it all (`posix_acl_equiv_mode`).  An
    ACL without entries takes the stored one away and leaves the mode alone.

    Whether the set-group-id bit must go depends on who asks, and is not decided
    here.  Raises InvalidError.
    """
    acl = parse(value)
    if not acl:
        return mode, None
    permissions = {entry.tag: entry.permission for entry in acl}
    group = permissions.get(Tag.MASK, permissions[Tag.GROUP_OBJ])
    bits = permissions[Tag.USER_OBJ] << 6 | group << 3 | permissions[Tag.OTHER]
    return mode & ~PERMISSIONS | bits, None if _says_no_more_than_a_mode(acl) else format(acl)


def chmod(value: bytes, mode: int) -> bytes:
    """The stored access ACL `value` after a chmod to `mode` (`__posix_acl_chmod`).

    The owner's and the other's entry follow the mode; its group bits become the
    mask's where there is one, else the owning group's.  Raises InvalidError.
    """
    acl = parse(value)
    shares = _shares(acl, mode)
    return format(tuple(replace(e, permission=shares.get(e.tag, e.permission)) for e in acl))


def inherit(
    default: bytes, mode: int, is_directory: bool
) -> tuple[int, bytes | None, bytes | None]:
    """What a new inode gets below a directory whose default ACL is `default`.

    `mode` is what the maker asked for, the umask *not* applied.  The result is
    the inode's mode, its access ACL (None if the mode says it all) and its own
    default ACL (directories only): `posix_acl_create`.  The access ACL is the
    default one, less what the mode does not grant; the mode loses what the ACL
    does not grant.  A symbolic link inherits nothing.  Raises InvalidError.
    """
    acl = parse(default)
    if not acl or stat.S_ISLNK(mode):
        return mode, None, None
    shares = _shares(acl, mode)
    granted = tuple(
        replace(e, permission=e.permission & shares[e.tag]) if e.tag in shares else e for e in acl
    )
    mode, access = access_to_mode(format(granted), mode)
    return mode, access, format(acl) if is_directory else None


def _shares(acl: Acl, mode: int) -> dict[Tag, int]:
    """The tags of `acl` that stand for a part of a mode, with that part of `mode`."""
    group = Tag.MASK if any(entry.tag is Tag.MASK for entry in acl) else Tag.GROUP_OBJ
    return {Tag.USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, Tag.OTHER: mode & 7}


def _says_no_more_than_a_mode(acl: Acl) -> bool:
    return all(entry.tag in (Tag.USER_OBJ, Tag.GROUP_OBJ, Tag.OTHER) for entry in acl)
