"""Requests and results of the commands that check and repair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...typed_json import INLINE, OPTIONAL
from ...watch.fields import Scrub
from .request import LookRequest, Request


@dataclass(frozen=True, slots=True)
class FsckResult:
    """The findings of a check of the tables, as sentences."""

    clean: bool
    findings: tuple[str, ...]
    left: tuple[str, ...]
    """The findings that were not mended."""
    hindrances: tuple[str, ...]
    """Of `left`: why nothing may be mended now, and what helps."""
    losses: int
    """Findings about what is lost: a repair only records them."""
    unreadable: tuple[str, ...]
    """What cannot be read although the tables agree; no change of them mends this."""
    strays: tuple[str, ...]
    """Files on nodes that are not of this store: they are ignored, and the store is clean."""
    files: int
    stripes: int
    """How many were checked."""
    lost_bytes: int
    lost: tuple[str, ...]
    """Sentences about the files with lost bytes."""


@dataclass(frozen=True, slots=True)
class FsckRequest(Request[FsckResult]):
    """Check the tables, and mend those of an unmounted store if asked."""

    command = "fsck"
    as_left = True
    repair: bool = False

    @property
    def only_looks(self) -> bool:
        """Whether it only checks."""
        return not self.repair


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """The plan of a repair."""

    node: str
    path: str
    stripes: int
    weak_stripes: int
    """Stripes that also lack other shards."""
    shards_to_rebuild: int
    bytes_to_rebuild: int
    bytes_to_check: int
    hopeless_shards: int
    reads: dict[str, int]
    """Bytes to read, by region."""


@dataclass(frozen=True, slots=True)
class RepairDone:
    """The result of a repair."""

    node: str
    shards_copied: int
    """From the old place of a node that moved."""
    shards_rebuilt: int
    bytes: int
    seconds: float
    away: tuple[str, ...]
    """The nodes that were not up at the end: they may have what could not be rebuilt."""
    stripes_lost: int
    unrepairable: tuple[str, ...]
    """The paths of files."""


@dataclass(frozen=True, slots=True)
class RepairResult:
    """The plan of a repair, and its result: None after a dry run."""

    plan: RepairPlan
    done: RepairDone | None = field(default=None, metadata=INLINE)


@dataclass(frozen=True, slots=True)
class RepairRequest(Request[RepairResult]):
    """Rebuild a node, in another directory if one is given."""

    command = "repair"
    node: str
    to: str | None = None
    dry_run: bool = False
    rate: float | None = None
    on_this_disk: bool = False
    """Rebuild an empty node although its disk is probably not mounted."""
    discard_history: bool = False
    """Give up the commits of another history that the node holds."""

    @property
    def only_looks(self) -> bool:
        """Whether it only asks for the plan."""
        return self.dry_run


@dataclass(frozen=True, slots=True)
class ModelRates:
    """The assumptions of the model of losses."""

    disk_failures: float
    """Failures per disk and year."""
    region_losses: float
    """Losses per region and year."""
    replace_hours: float
    """Hours from a failure to the beginning of its repair."""


@dataclass(frozen=True, slots=True)
class CodeLosses:
    """The expected losses of data a year with a code."""

    regions_borne: int
    disks_only: float
    with_regions: float


@dataclass(frozen=True, slots=True)
class LossModel:
    """The expected losses of data a year, and the assumptions."""

    disk_failures_a_year: float
    region_losses_a_year: float
    replace_hours: float
    repair_bytes_a_second: float
    measured: bool
    """Whether repairs of this store had that speed; otherwise it is assumed."""
    repair_seconds: float
    codes: dict[str, CodeLosses]


@dataclass(frozen=True, slots=True)
class RiskResult:
    """How many more losses the stripes would survive."""

    if_lost: tuple[str, ...]
    stripes: int
    codes: dict[str, int]
    """Stripes, by code."""
    by_shards: dict[str, int]
    by_regions: dict[str, int]
    """Stripes, by how many more shards, or regions, may be lost."""
    metadata_regions: int
    lost_stripes: int
    lost: tuple[str, ...]
    next_region_loses: tuple[str, ...]
    """The paths of files."""
    model: LossModel | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class RiskRequest(LookRequest[RiskResult]):
    """Count how many more losses the stripes would survive, without some regions."""

    command = "risk"
    if_lost: tuple[str, ...] = ()
    model: ModelRates | None = None


@dataclass(frozen=True, slots=True)
class DrillResult:
    """The result of reading without a region."""

    region: str
    stripes: int
    bytes: int
    seconds: float
    seed: int
    """The seed of the sample."""
    failed_stripes: int
    lost: tuple[str, ...]
    """The paths of files."""


@dataclass(frozen=True, slots=True)
class DrillRequest(LookRequest[DrillResult]):
    """Read a share of the stripes without a region."""

    command = "drill"
    region: str
    sample: float = 1.0
    rate: float | None = None


ScrubAction = Literal["start", "pause", "resume", "status"]


@dataclass(frozen=True, slots=True)
class ScrubRequest(Request[Scrub]):
    """Start, pause or resume a scrub, or ask for its progress."""

    command = "scrub"
    action: ScrubAction
    rate: float | None = None
    wait: bool = False
    """Answer when the scrub has ended or is paused."""

    @property
    def only_looks(self) -> bool:
        """Whether it only asks for the progress."""
        return self.action == "status"
