"""The record of a node's owner: `owner` names the mount that uses the directory, or did last.

The file has a fixed length, so that a new owner can also write it in place: a machine
that holds the old file open sees that without looking its name up again.  It ends with a
checksum: a flipped bit must not look like another mount.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError, NodeError, UnreadOwnerError
from ..system.beneath import Directory
from ..system.machine import Process
from ..system.strict_toml import Table
from .text_checksum import is_intact, sealed

OWNER_NAME = "owner"
OWNER_VERSION = 1
OWNER_BYTES = 512
"""One sector of any disk, which is written as a whole or not at all."""
OWNER_UNKNOWN = (
    "Nobody knows which machine uses the node: if none does, mount once with -o take_over."
)
_NUMBER_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """The contents of `owner`."""

    mount: str
    """32 hexadecimal digits that each mount draws at random."""
    process: Process
    directory: int
    """The inode of the node's directory when the record was written: a copy has another."""
    since: str
    """When the mount began, in UTC."""
    ended: bool
    """Whether the mount has written its last byte."""
    is_intact: bool = field(default=True, compare=False)
    """Whether it matched its checksum when it was read."""

    @property
    def is_over(self) -> bool:
        """Whether it is sure that the mount has written its last byte."""
        return self.ended and self.is_intact

    def encode(self) -> bytes:
        """Return the file."""
        of = self.process
        lines = [
            "# The mount that uses this node, or did last.  Do not edit.",
            f"format = {OWNER_VERSION}",
            f'mount = "{self.mount}"',
            f'machine = "{of.machine}"',
            f'host = "{of.host}"',
            f'boot = "{of.boot}"',
            f"namespace = {of.namespace}",
            f"process = {of.number}",
            f"started = {of.started}",
            f"directory = {self.directory}",
            f'since = "{self.since}"',
            f"ended = {str(self.ended).lower()}",
        ]
        return sealed("\n".join([*lines, ""]).encode()).ljust(OWNER_BYTES, b"\n")


UNREAD = OwnerRecord("", Process("", "", "", 0, 0, 0), 0, "", ended=False, is_intact=False)
"""Stands for a record that cannot be read, or is too damaged for it."""


@dataclass(slots=True)
class Mount:
    """One opening of a store for writing, which owns the nodes that it uses."""

    nonce: str
    process: Process
    since: str
    take_over: bool
    """Nodes whose owner is gone for good are taken from it."""
    ended: set[str] = field(default_factory=set)
    """Nonces of mounts that are known to have ended, whatever a record of theirs says."""
    may_replace_unread: bool = False
    """Whether records of other nodes show that one which cannot be read may be replaced."""

    @classmethod
    def begin(cls, *, take_over: bool) -> Mount:
        """Return a new one of this process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(secrets.token_hex(16), Process.current(), since, take_over)

    def record(self, directory: int, *, ended: bool = False) -> OwnerRecord:
        """Return the record of a node of this mount, in the directory with this inode."""
        return OwnerRecord(self.nonce, self.process, directory & _NUMBER_MAX, self.since, ended)

    def note_ended(self, records: Iterable[OwnerRecord | None]) -> None:
        """Learn from the records of all nodes which mounts have ended."""
        self.ended.update(record.mount for record in records if record and record.is_over)


def open_past_cache(directory: Directory) -> int:
    """Open the record in a directory for reading from the server, if the file system can."""
    try:
        return directory.open(OWNER_NAME, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return directory.open(OWNER_NAME, os.O_RDONLY)


def read_past_cache(fd: int) -> bytes:
    """Read the whole record from its server or medium, as far as caches can be bypassed."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = mmap.mmap(-1, mmap.PAGESIZE)  # aligned, as O_DIRECT may need it
    return buffer[: os.preadv(fd, [buffer], 0)]


def read_owner(directory: Directory, path: Path, *, past_cache: bool = False) -> OwnerRecord | None:
    """Read the record in an open node directory, which errors call `path`; None: it has none.

    One with a wrong checksum is returned as far as it can be read, and is not `is_intact`.
    UnreadOwnerError if the file cannot be read, or is damaged; NodeError if another version
    wrote it.
    """
    intact: bool | None = None

    def opened() -> BinaryIO:
        nonlocal intact
        if past_cache:
            with open(open_past_cache(directory), "rb", buffering=0) as file:
                data = read_past_cache(file.fileno())
        else:
            with open(directory.open(OWNER_NAME, os.O_RDONLY), "rb") as file:
                data = file.read(OWNER_BYTES + 1)
        intact = is_intact(data)
        return BytesIO(data)

    try:
        record = _decode(Table.load(path / OWNER_NAME, opened, OWNER_BYTES))
        return record if intact is not False else replace(record, is_intact=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ConfigError as error:
        if not intact:
            raise UnreadOwnerError(str(error)) from None
        raise NodeError(f"{error} {OWNER_UNKNOWN}") from None


def _decode(table: Table) -> OwnerRecord:
    table.take_format(OWNER_VERSION)
    record = OwnerRecord(
        mount=table.take("mount", str),
        process=Process(
            machine=table.take("machine", str),
            host=table.take("host", str),
            boot=table.take("boot", str),
            namespace=table.take_count("namespace", 0, _NUMBER_MAX),
            number=table.take_count("process", 0, _NUMBER_MAX),
            started=table.take_count("started", 0, _NUMBER_MAX),
        ),
        directory=table.take_count("directory", 0, _NUMBER_MAX),
        since=table.take("since", str),
        ended=table.take("ended", bool),
    )
    table.end()
    table.raise_first()
    return record
