"""Requests and results of the commands for files and directories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

from ...typed_json import OPTIONAL
from ...watch.fields import Recoding
from .request import LookRequest, Request


class ExtentPlace(TypedDict):
    """The place of a range of a file."""

    offset: int
    length: int
    stripe: int
    stripe_offset: int


class ShardPlace(TypedDict):
    """The place of a shard."""

    index: int
    node: str
    segment: str
    offset: int
    length: int
    state: str


class StripePlace(TypedDict):
    """A stripe, and the places of its shards."""

    length: int
    shard_length: int
    state: str
    shards: list[ShardPlace]


@dataclass(frozen=True, slots=True)
class LayoutResult:
    """The place of each byte of a file."""

    code: str
    size: int
    extents: tuple[ExtentPlace, ...]
    stripes: dict[str, StripePlace]
    """The stripes by number."""
    next: int | None = field(default=None, metadata=OPTIONAL)
    """The offset at which the next part begins; None: this is the last part."""


@dataclass(frozen=True, slots=True)
class LayoutRequest(LookRequest[LayoutResult]):
    """Ask for the place of each byte of a file."""

    command = "layout"
    inode: int


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """A quota and its current use."""

    path: str
    state: str
    """counting, active or clearing."""
    bytes_max: int | None
    bytes_used: int
    files_max: int | None
    files_used: int


@dataclass(frozen=True, slots=True)
class QuotaResult:
    """The requested quotas."""

    quotas: tuple[QuotaStatus, ...]


@dataclass(frozen=True, slots=True)
class QuotaRequest(Request[QuotaResult]):
    """Set or clear the quota of a directory; or ask which apply to an inode, or for all."""

    command = "quota"
    action: Literal["set", "clear", "get", "list"]
    inode: int
    bytes: int | None = None
    files: int | None = None
    """Limits; None: unchanged."""

    @property
    def only_looks(self) -> bool:
        """Whether it only asks."""
        return self.action in ("get", "list")


@dataclass(frozen=True, slots=True)
class RecodeRequest(Request[Recoding]):
    """Rewrite a file, or all files below a directory, or stop this."""

    command = "recode"
    inode: int
    to: str | None = None
    """The new code; None: for each file the policy of its directory, or, if it is only
    defragmented, the code that it has."""
    defragment: bool = False
    rate: float | None = None
    stop: bool = False
    wait: bool = False
