"""Rows of the whole store: counters, the log, the nodes; their keys begin with `Z`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Self

from .erasure import Code
from .file_rows import FIRST_COOKIE, ROOT

CODES_KEY = b"Zcodes"
COUNTERS_KEY = b"Zcounters"
GIVEN_UP_KEY = b"Zgivenup"
DESCENT_KEY = b"Zdescent"
METADATA_DUMP_KEY = b"Zdump"
FORMAT_KEY = b"Zformat"
LOG_KEY = b"Zlog"
NODES_KEY = b"Znodes"
REBALANCE_KEY = b"Zrebalance"
RECODE_KEY = b"Zrecode"
REPAIRS_KEY = b"Zrepairs"
SCRUB_KEY = b"Zscrub"
SWEPT_KEY = b"Zswept"
FORMAT = 1


@dataclass(slots=True)
class Counters:
    """The next numbers to assign, and the totals of the store."""

    next_ino: int = ROOT + 1
    next_cookie: int = FIRST_COOKIE
    files: int = 1
    """Inodes of any kind."""
    file_bytes: int = 0
    """Bytes that extents hold."""
    stripes: int = 0
    """Stripes that are sealed or being sealed."""

    _STRUCT = struct.Struct("<QQqqq")

    def copy(self) -> Self:
        """Return a copy of the counters."""
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


def format_code(value: bytes) -> Code:
    """Return the code of new files at the last mount, from the row that describes the store."""
    return Code.parse(json.loads(value)["code"])


def decode_codes(value: bytes | None) -> list[Code]:
    """Decode the codes that were ever the default, set on a directory, or used to recode files."""
    return [Code.parse(text) for text in json.loads(value)] if value else []


def encode_swept(first: Mapping[int, int]) -> bytes:
    """Encode, by node, its first shard segment that no sweep has seen."""
    return json.dumps(sorted(first.items())).encode()


def decode_swept(value: bytes | None) -> dict[int, int]:
    """Decode, by node, its first shard segment that no sweep has seen; empty without the row."""
    return dict(json.loads(value)) if value else {}


@dataclass(slots=True)
class LogPosition:
    """The state of the log at a commit; JSON in the row."""

    epoch: int = 0
    nonce: str = ""
    """32 random hexadecimal digits, new in each epoch."""
    commit: int = 0
    checksum: int = 0
    """The checksum of the payload of that commit."""
    journal_segment: int = 1
    """Later commits are in this journal segment or a later one."""

    doubt: str = ""
    """Why data that no table names may be needed: it is kept until fsck finds nothing."""

    def encode(self) -> bytes:
        """The row's value."""
        row = {name: getattr(self, name) for name in self.__slots__}
        if not self.doubt:
            del row["doubt"]
        return json.dumps(row).encode()

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(**json.loads(value))


class CommitId(NamedTuple):
    """The identity of a commit: two histories of a store have commits with the same numbers."""

    number: int
    checksum: int
    """The checksum of its payload; 0: not known."""


class GivenUp(NamedTuple):
    """The end of a history: commits after `commit` in epochs before `epoch` are void."""

    commit: int
    epoch: int

    def voids(self, commit: int, epoch: int) -> bool:
        """Return whether a commit, made in an epoch, belongs to what was given up."""
        return commit > self.commit and epoch < self.epoch


def encode_given_up(ends: Sequence[GivenUp]) -> bytes:
    """The row's value."""
    return json.dumps(ends).encode()


def decode_given_up(value: bytes | None) -> list[GivenUp]:
    """Decode the ends of histories that were given up; none without the row."""
    return [GivenUp(*end) for end in json.loads(value)] if value else []


class Descent(NamedTuple):
    """What an epoch continues; in its first commit, which repeats all after `base`."""

    base: int
    """The number of the commit that the database had reached."""
    checksum: int
    """The checksum of that commit."""
    nonce: str
    """The nonce of the epoch that made the commit right before."""

    def encode(self) -> bytes:
        """The row's value."""
        return json.dumps(self._asdict()).encode()

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(**json.loads(value))


NEVER_WHOLE = 1 << 62
"""The value of `holds` for a node that may lack any data, whatever its journal contains."""


@dataclass(slots=True)
class NodeRow:
    """A node in the log; the row is a JSON list of all nodes."""

    id: int
    name: str
    region: str
    path: str
    in_sync: bool
    holds: int = 0
    """The last commit that a node which is not in sync is known to have flushed."""
    weight: float = 1.0
    draining: bool = False
    checksum: int = 0
    """The checksum of the commit `holds`; 0: not known."""


def encode_nodes(rows: list[NodeRow]) -> bytes:
    """Encode the rows of all nodes; defaults (weight 1, not draining) are omitted."""
    usual = {"weight": 1.0, "draining": False, "checksum": 0}
    return json.dumps(
        [
            {name: value for name, value in asdict(row).items() if usual.get(name, ...) != value}
            for row in rows
        ]
    ).encode()


def decode_nodes(value: bytes) -> list[NodeRow]:
    return [NodeRow(**row) for row in json.loads(value)]
