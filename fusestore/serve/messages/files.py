"""Files and directories: what these commands are asked, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

from ...typed_json import OPTIONAL
from ...watch.fields import Recoding
from .request import Request


class ExtentPlace(TypedDict):
    """Where a range of a file lies."""

    offset: int
    length: int
    stripe: int
    stripe_offset: int


class ShardPlace(TypedDict):
    """Where a shard lies."""

    index: int
    node: str
    segment: str
    offset: int
    length: int
    state: str


class StripePlace(TypedDict):
    """A stripe, and where its shards lie."""

    length: int
    shard_length: int
    state: str
    shards: list[ShardPlace]


@dataclass(frozen=True, slots=True)
class LayoutResult:
    """Where a file lies."""

    code: str
    size: int
    extents: tuple[ExtentPlace, ...]
    stripes: dict[str, StripePlace]
    """By number."""
    next: int | None = field(default=None, metadata=OPTIONAL)
    """The first byte that is not told of; None: that is all."""


@dataclass(frozen=True, slots=True)
class LayoutRequest(Request[LayoutResult]):
    """Where does a file lie?"""

    command = "layout"
    inode: int


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """A quota, and what is used of it."""

    path: str
    state: str
    """counting, active or clearing."""
    bytes_max: int | None
    bytes_used: int
    files_max: int | None
    files_used: int


@dataclass(frozen=True, slots=True)
class QuotaResult:
    """The quotas that were asked for."""

    quotas: tuple[QuotaStatus, ...]


@dataclass(frozen=True, slots=True)
class QuotaRequest(Request[QuotaResult]):
    """Set or clear the quota of a directory, or say which hold for it, or which there are."""

    command = "quota"
    action: Literal["set", "clear", "get", "list"]
    inode: int
    bytes: int | None = None
    files: int | None = None
    """Limits; None: as it is."""


@dataclass(frozen=True, slots=True)
class RecodeRequest(Request[Recoding]):
    """Give a file, or all below a directory, another code; or end that."""

    command = "recode"
    inode: int
    to: str | None = None
    """None: the code of new files in the directory of each."""
    rate: float | None = None
    stop: bool = False
    wait: bool = False
