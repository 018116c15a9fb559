"""Extended attributes: stored ones, POSIX ACLs, and the virtual `user.fusestore.*`.

Virtual attributes answer getxattr and are not listed, so that tools that copy
attributes do not see them:

    user.fusestore.code        a directory's code for new files (settable); a file's code
    user.fusestore.policy      JSON: that code, where it was set, and what it survives; read-only
    user.fusestore.layout      JSON: the place of each byte of a file; read-only
    user.fusestore.layout.N    the same from byte N of the file on

A layout that is too long for an attribute ends with `next`, the N of the part that
follows.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from ..errors import (
    AttributeTooLargeError,
    InvalidError,
    NoAttributeError,
    NotPermittedError,
    NotSupportedError,
    StaleError,
    UsageError,
)
from ..format import acl, file_rows, keys, stripe_rows
from ..format.erasure import Code
from ..format.file_rows import Inode
from ..format.placement import check_region_rule, regions_borne
from ..format.records import SegmentKind
from ..format.segment_numbers import segment_path
from ..limits import FILE_BYTES_MAX, XATTR_BYTES_MAX, XATTR_LIST_BYTES_MAX, XATTRS_BYTES_MAX
from ..log.log import Log
from ..read.reader import Reader
from ..system import clock
from .tree import Tree

_NAMESPACES = (b"user.", b"trusted.", b"security.")
VIRTUAL = b"user.fusestore."
CODE = VIRTUAL + b"code"
CAPABILITY = b"security.capability"
POLICY = VIRTUAL + b"policy"
LAYOUT = VIRTUAL + b"layout"
_LAYOUT_BYTES_MAX = 48 << 10


class Attributes:
    """The extended attributes of an open store."""

    def __init__(self, log: Log, tree: Tree, reader: Reader, *, allow_unsafe: bool) -> None:
        self._log = log
        self._tree = tree
        self._reader = reader
        self._allow_unsafe = allow_unsafe

    def get(self, ino: int, name: bytes) -> bytes:
        """Return the value of an attribute but POLICY; NoAttributeError."""
        if name.startswith(VIRTUAL):
            return self._virtual(ino, name)
        self._check_namespace(name)
        value = self._log.engine.get(file_rows.xattr_key(ino, name))
        if value is None:
            raise NoAttributeError("There is no such attribute.")
        return value

    def names(self, ino: int) -> list[bytes]:
        """Return the names of the stored attributes."""
        prefix = file_rows.xattr_key(ino, b"")
        rows = self._log.engine.scan(prefix, keys.after(prefix))
        return [key[len(prefix) :] for key, _ in rows]

    def set(self, ino: int, name: bytes, value: bytes, *, may_keep_sgid: bool = True) -> None:
        """Set an attribute; an access ACL also changes the mode.

        `may_keep_sgid` is false for a caller who may not set set-group-id bits here.
        """
        if name == CODE:
            self._tree.codes.set(ino, self.parse_code(value.decode(errors="replace")))
            return
        if name.startswith(VIRTUAL):
            raise NotPermittedError("This attribute cannot be set.")
        if len(value) > XATTR_BYTES_MAX:
            raise AttributeTooLargeError(f"A value may have at most {XATTR_BYTES_MAX} bytes.")
        self._check_namespace(name)
        with self._log.transaction(grows=len(name) + len(value)) as txn:
            key = file_rows.xattr_key(ino, name)
            inode = self._inode(ino)
            stored: bytes | None = value
            if name == acl.ACCESS:
                inode.mode, stored = acl.access_to_mode(value, inode.mode)
                if not may_keep_sgid:
                    inode.mode &= ~stat.S_ISGID
            elif name == acl.DEFAULT:
                if not stat.S_ISDIR(inode.mode):
                    raise NotPermittedError("Only a directory can have a default ACL.")
                stored = value if acl.parse(value) else None
            old = txn.get(key)
            if stored is not None and (old is None or len(stored) > len(old)):
                self._check_room(ino, name, stored)
            inode.ctime = clock.now()
            txn.put(file_rows.inode_key(ino), inode.encode())
            if stored is None:
                txn.delete(key)
            else:
                txn.put(key, stored)

    def check_setter(self, ino: int, uid: int, code: bytes | None) -> None:
        """Raise NotPermittedError unless a user may give a directory this code, or clear its own.

        Root, and the user of the mount, may set any; owners may change between `user_codes`.
        """
        if uid in (0, os.getuid()):
            return
        inode = self._inode(ino)
        if uid != inode.uid:
            raise NotPermittedError("Only root and its owner may set the code of a directory.")
        codes = [Code(inode.k, inode.m)] if inode.k else []
        if code is not None:
            codes.append(self.parse_code(code.decode(errors="replace")))
        for found in codes:
            if found not in self._log.members.config.user_codes:
                raise NotPermittedError(f"Code {found} is not among the `user_codes` of the store.")

    def _check_room(self, ino: int, name: bytes, value: bytes) -> None:
        """Raise AttributeTooLargeError if the inode's attributes would become too large."""
        prefix = file_rows.xattr_key(ino, b"")
        names, values = len(name) + 1, len(value)
        for key, other in self._log.engine.scan(prefix, keys.after(prefix)):
            if key[len(prefix) :] != name:
                names += len(key) - len(prefix) + 1
                values += len(other)
        if names > XATTR_LIST_BYTES_MAX or names + values > XATTRS_BYTES_MAX:
            raise AttributeTooLargeError("The inode has too many attributes.")

    def drop_capability(self, ino: int) -> None:
        """Remove a file's capability, as the kernel does before a change if attributes are on."""
        if self._log.engine.get(file_rows.xattr_key(ino, CAPABILITY)) is not None:
            self.remove(ino, CAPABILITY)

    def remove(self, ino: int, name: bytes) -> None:
        """Remove an attribute; NoAttributeError, but not for an ACL: without one it is empty."""
        if name == CODE:
            self._tree.codes.set(ino, None)
            return
        if name.startswith(VIRTUAL):
            raise NotPermittedError("This attribute cannot be removed.")
        self._check_namespace(name)
        with self._log.transaction() as txn:
            key = file_rows.xattr_key(ino, name)
            if txn.get(key) is None:
                if name in (acl.ACCESS, acl.DEFAULT):
                    return
                raise NoAttributeError("There is no such attribute.")
            inode = self._inode(ino)
            inode.ctime = clock.now()
            txn.put(file_rows.inode_key(ino), inode.encode())
            txn.delete(key)

    @staticmethod
    def _check_namespace(name: bytes) -> None:
        if name in _NAMESPACES:
            raise InvalidError("The name of an attribute has a part after its namespace.")
        if not name.startswith(_NAMESPACES) and name not in (acl.ACCESS, acl.DEFAULT):
            raise NotSupportedError("Only the namespaces user, trusted and security exist.")

    def _inode(self, ino: int) -> Inode:
        value = self._log.engine.get(file_rows.inode_key(ino))
        if value is None:
            raise StaleError(f"There is no inode {ino}.")
        return Inode.decode(value)

    def parse_code(self, text: str) -> Code:
        """Parse a code that this store accepts; InvalidError."""
        try:
            code = Code.parse(text)
        except UsageError as error:
            raise InvalidError(str(error)) from None
        broken = check_region_rule(code, self._log.members.config.regions)
        if broken and not self._allow_unsafe:
            raise InvalidError(broken)
        return code

    # --- virtual -------------------------------------------------------------

    def _virtual(self, ino: int, name: bytes) -> bytes:
        if name == CODE:
            return str(self._tree.codes.of(ino)).encode()
        start = 0
        if name.startswith(LAYOUT + b"."):
            digits = name[len(LAYOUT) + 1 :]
            if not digits.isdigit() or int(digits) > FILE_BYTES_MAX:
                raise NoAttributeError("There is no such attribute.")
            start = int(digits)
        elif name != LAYOUT:
            raise NoAttributeError("There is no such attribute.")
        if not stat.S_ISREG(self._inode(ino).mode):
            raise NoAttributeError("Only a file has a layout.")
        return json.dumps(
            self.layout(ino, start, _LAYOUT_BYTES_MAX), separators=(",", ":")
        ).encode()

    async def policy(self, ino: int) -> bytes:
        """Describe the code of new files below a directory, or of new bytes of a file: JSON."""
        code, origin = self._tree.codes.policy(ino)
        regions = len(set(self._log.members.config.regions))
        found = {
            "code": str(code),
            "set_on": (await self._tree.paths([origin]))[origin] if origin else None,
            "inherited": origin != ino,
            "shards_borne": code.m,
            "regions_borne": regions_borne(code, regions),
            "regions": regions,
        }
        return json.dumps(found).encode()

    def layout(self, ino: int, start: int, room: int | None) -> dict[str, Any]:
        """Return the place of each byte of a file from `start` on.

        The result ends early, with `next`, when it has about `room` bytes of JSON.
        """
        inode = self._inode(ino)
        extents: list[dict[str, int]] = []
        stripes: dict[str, Any] = {}
        used = 0
        following: int | None = None
        for extent in self._reader.extents(ino, start, inode.size):
            if room is not None and used >= room:
                following = extent.offset
                break
            extents.append(
                {
                    "offset": extent.offset,
                    "length": extent.length,
                    "stripe": extent.stripe,
                    "stripe_offset": extent.stripe_offset,
                }
            )
            number = str(extent.stripe)
            if number not in stripes:
                stripes[number] = self._stripe(extent.stripe)
                used += 80 + 130 * len(stripes[number]["shards"])
            used += 90
        code = str(self._tree.codes.of(ino))
        found = {"code": code, "size": inode.size, "extents": extents, "stripes": stripes}
        return found if following is None else {**found, "next": following}

    def _stripe(self, number: int) -> dict[str, Any]:
        row = None if number in self._log.unsealed else self._reader.stripe(number)
        if row is None:
            state = "open" if number in self._log.unsealed else "lost"
            return {"length": 0, "shard_length": 0, "state": state, "shards": []}
        shards = []
        for index, place in enumerate(row.shards):
            member = self._log.members.by_id[place.node]
            missing = self._log.engine.get(stripe_rows.missing_key(place.node, number, index))
            here = place.written and missing is None and not member.out_of_use
            shards.append(
                {
                    "index": index,
                    "node": member.name,
                    "segment": segment_path(SegmentKind.SHARDS, place.segment),
                    "offset": place.offset,
                    "length": row.shard_length,
                    "state": "present" if here else "missing",
                }
            )
        return {
            "code": str(row.code),
            "length": row.length,
            "shard_length": row.shard_length,
            "state": "sealed",
            "shards": shards,
        }
