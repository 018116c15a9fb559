"""POSIX access control lists, in the format of the kernel.

The kernel checks access (`default_permissions`), and passes an ACL as the extended
attribute `system.posix_acl_access` or `system.posix_acl_default`.  The file system only
keeps ACLs and modes consistent.  This module does this: it changes the mode when an ACL
is set, changes the ACL after a chmod, and computes the ACLs of a new inode.

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
    """The kind of an entry."""

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
    """Parse and check an ACL; () for a list without entries.

    Raises InvalidError for another version, a size that is not a whole number of entries,
    and every list that `validate` refuses.
    """
    if len(value) < HEADER.size or (len(value) - HEADER.size) % ENTRY.size:
        raise InvalidError(f"An ACL cannot have {len(value)} bytes.")
    (version,) = HEADER.unpack_from(value)
    if version != VERSION:
        raise InvalidError(f"An ACL must have version {VERSION}, but has {version}.")
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
    """Encode an ACL for `parse`."""
    entries = (ENTRY.pack(entry.tag, entry.permission, entry.id) for entry in acl)
    return HEADER.pack(VERSION) + b"".join(entries)


def validate(acl: Acl) -> None:
    """Raise InvalidError unless the ACL is well-formed (`posix_acl_valid`).

    It needs owner, owning group and other exactly once, at most one mask, a mask if it names
    a user or group, the fixed order, and no permissions but rwx.
    """
    tags = [entry.tag for entry in acl]
    for entry in acl:
        if entry.permission & ~0o7:
            raise InvalidError(f"An ACL entry cannot have the permission {entry.permission:#o}.")
        if entry.tag in _NAMED and entry.id == UNDEFINED_ID:
            raise InvalidError("An ACL entry for a named user or group needs a valid id.")
    ranks = [_RANK[tag] for tag in tags]
    if ranks != sorted(ranks):
        raise InvalidError("The entries of the ACL are in the wrong order.")
    for tag in (Tag.USER_OBJ, Tag.GROUP_OBJ, Tag.OTHER):
        if tags.count(tag) != 1:
            raise InvalidError(f"An ACL needs exactly one entry {tag.name}.")
    named = any(tag in _NAMED for tag in tags)
    if tags.count(Tag.MASK) > 1 or (named and Tag.MASK not in tags):
        raise InvalidError("An ACL that names users or groups needs exactly one mask.")


def access_to_mode(value: bytes, mode: int) -> tuple[int, bytes | None]:
    """Return the mode after the access ACL `value` is set on an inode with `mode`.

    The owner, group and other bits follow the ACL; the group bits are those of the mask if
    there is one.  The other bits of `mode` do not change.  The second result is the ACL to
    store, or None if the mode is equivalent (`posix_acl_equiv_mode`).  An ACL without
    entries removes the stored ACL and does not change the mode.

    The caller decides whether the set-group-id bit must be dropped.  Raises InvalidError.
    """
    acl = parse(value)
    if not acl:
        return mode, None
    permissions = {entry.tag: entry.permission for entry in acl}
    group = permissions.get(Tag.MASK, permissions[Tag.GROUP_OBJ])
    bits = permissions[Tag.USER_OBJ] << 6 | group << 3 | permissions[Tag.OTHER]
    return mode & ~PERMISSIONS | bits, None if _says_no_more_than_a_mode(acl) else format(acl)


def chmod(value: bytes, mode: int) -> bytes:
    """Return the stored access ACL `value` after a chmod to `mode` (`__posix_acl_chmod`).

    The entries of owner and other follow the mode.  Its group bits set the mask if there is
    one, or else the owning group.  Raises InvalidError.
    """
    acl = parse(value)
    shares = _shares(acl, mode)
    return format(tuple(replace(e, permission=shares.get(e.tag, e.permission)) for e in acl))


def inherit(
    default: bytes, mode: int, is_directory: bool
) -> tuple[int, bytes | None, bytes | None]:
    """Return mode and ACLs of a new inode below a directory with the default ACL `default`.

    `mode` is the requested mode; the umask is *not* applied.  The result is the mode of the
    inode, its access ACL (None if the mode is equivalent) and its own default ACL
    (directories only), as in `posix_acl_create`.  The access ACL is the default ACL without
    the permissions that `mode` does not grant.  The mode loses the permissions that the ACL
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
    """Map the tags of `acl` that correspond to bits of a mode to these bits of `mode`."""
    group = Tag.MASK if any(entry.tag is Tag.MASK for entry in acl) else Tag.GROUP_OBJ
    return {Tag.USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, Tag.OTHER: mode & 7}


def _says_no_more_than_a_mode(acl: Acl) -> bool:
    return all(entry.tag in (Tag.USER_OBJ, Tag.GROUP_OBJ, Tag.OTHER) for entry in acl)
