"""The rounds of a benchmark: their number, their order, and their evaluation.

The first use of memory in a virtual machine is slow, and so is the first run of anything.
Therefore memory is touched beforehand, and the first round does not count.  In each round
every target runs once, each time beginning with another target, so that changes of the
machine affect all.  A figure is the median of its rounds.  The ratio of two targets is
the median of their ratios in each round.
"""

from __future__ import annotations

import mmap
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import FusestoreError
from ..limits import MIB
from . import store_workloads, workloads
from .children import isolated
from .measured import Goal, Limit, Measured
from .scale import Scale
from .targets import Target
from .watching import MemoryWatch, memory_mib
from .workloads import Place, Run

RUN_SECONDS_MAX = 900.0
"""A run that takes longer hangs, and is given up."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload, and how to run it."""

    name: str
    run: Run
    own: bool = False
    """It makes its own stores, once per round."""
    once: bool = False
    """It takes long: it runs only on request, for one round, which counts."""


WORKLOADS = (
    Workload("large", workloads.large),
    Workload("overwrite", workloads.overwrite),
    Workload("small", workloads.small),
    Workload("tree", workloads.tree),
    Workload("objects", workloads.objects),
    Workload("documents", workloads.documents),
    Workload("parallel", workloads.parallel),
    Workload("sizes", workloads.sizes),
    Workload("checkpoints", store_workloads.checkpoints),
    Workload("writeback", store_workloads.writeback, own=True),
    Workload("memory", store_workloads.memory, own=True),
    Workload("degraded", store_workloads.degraded, own=True),
    Workload("repair", store_workloads.repair, own=True),
    Workload("many", store_workloads.many, once=True),
)


@dataclass(slots=True)
class Row:
    """A figure of all targets, round by round."""

    workload: str
    figure: str
    unit: str
    is_rate: bool
    limit: Limit | None = None
    goal: Goal | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    """The values of each round by target; all targets have the same number of rounds."""

    def median(self, target: str) -> float:
        """Return the figure of a target."""
        return statistics.median(self.values[target])

    def ratio(self, target: str, other: str) -> float | None:
        """Return the ratio of the figures of two targets."""
        pairs = zip(self.values.get(target, ()), self.values.get(other, ()), strict=False)
        ratios = [one / two for one, two in pairs if two > 0]
        return statistics.median(ratios) if ratios else None

    def share(self, target: str, disk_share: float) -> float | None:
        """Return the share of its limit that a target reaches; `disk_share` of writes is data."""
        raw = self.ratio(target, "raw") if self.limit is not Limit.NULL else None
        if raw is not None and self.limit is Limit.WRITTEN:
            raw /= disk_share
        shares = [share for share in (raw, self.ratio(target, "null")) if share is not None]
        return max(shares) if self.limit and shares else None

    def goal_met(self, target: str) -> bool | None:
        """Return whether a target reaches the goal; None if this is unknown."""
        if self.goal is None or target not in self.values:
            return None
        if self.goal.times is None:
            return self.median(target) >= self.goal.least
        ratio = self.ratio(target, self.goal.times)
        return None if ratio is None else ratio >= self.goal.least


@dataclass(frozen=True, slots=True)
class Failure:
    """A workload that failed on a target."""

    workload: str
    target: str
    reason: str

    def __str__(self) -> str:
        return f"{self.workload} on {self.target}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Session:
    """Targets, and how to measure them."""

    targets: Sequence[Target]
    scale: Scale
    tarball: Path
    disk: Path | None
    """A directory for temporary stores; None if there are none."""
    files_in_store: int | None
    report_progress: Callable[[str], None]
    failures: list[Failure] = field(default_factory=list)

    def measure(self, chosen: Sequence[Workload]) -> Iterator[list[Row]]:
        """Yield the rows of one workload after the other, then those of the daemons."""
        warm_memory(self.scale.warm_mib)
        watches = {target.name: MemoryWatch(target.daemon) for target in self.targets}
        for workload in chosen:
            yield self._rounds(workload, watches)
        yield list(memory_rows(self.targets, watches))

    def _rounds(self, workload: Workload, watches: dict[str, MemoryWatch]) -> list[Row]:
        rows: dict[str, Row] = {}
        targets = list(self.targets[:1] if workload.own else self.targets)
        if workload.once:
            targets = [target for target in targets if target.name != "null"]
        dropped, rounds = (0, 1) if workload.once else (1, self.scale.rounds)
        for number in range(dropped + rounds):
            turn = number % max(1, len(targets))
            for target in targets[turn:] + targets[:turn]:
                self.report_progress(
                    f"{workload.name} on {target.name}, round {number + 1} of {dropped + rounds}"
                )
                try:
                    found = self._run(workload, target, watches[target.name])
                except (OSError, FusestoreError) as error:
                    self._failed(workload, target, error)
                    targets = [each for each in targets if each is not target]
                    for row in rows.values():
                        row.values.pop(target.name, None)
                    continue
                if number >= dropped:
                    collect(rows, workload, target, found)
        self.report_progress("")
        return [row for row in rows.values() if row.values]

    def _failed(self, workload: Workload, target: Target, error: OSError | FusestoreError) -> None:
        reason = str(error)
        if isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename else ""
            reason = f"{error.strerror or error}{where}."
        self.failures.append(Failure(workload.name, target.name, reason))

    def _run(self, workload: Workload, target: Target, watch: MemoryWatch) -> list[Measured]:
        """Run a workload once, in a new directory that is removed afterwards."""
        if workload.own:
            assert self.disk is not None
            return list(workload.run(Place(self.disk, self.scale, self.tarball)))
        top = target.top / workload.name
        place = Place(
            top, self.scale, self.tarball, target.daemon, target.store, self.files_in_store
        )

        def work() -> list[Measured]:
            top.mkdir()
            return list(workload.run(place))

        def clear() -> None:
            isolated(partial(shutil.rmtree, top, ignore_errors=True), watch.look, RUN_SECONDS_MAX)

        try:
            found = isolated(work, watch.look, None if workload.once else RUN_SECONDS_MAX)
        except Exception:  # after an interruption, the whole target is removed
            clear()
            raise
        clear()
        return found


def collect(
    rows: dict[str, Row], workload: Workload, target: Target, found: Sequence[Measured]
) -> None:
    """Add the results of one run."""
    for each in found:
        row = rows.setdefault(
            each.figure,
            Row(workload.name, each.figure, each.unit, each.is_rate, each.limit, each.goal),
        )
        row.values.setdefault(target.name, []).append(each.value)


def memory_rows(targets: Sequence[Target], watches: dict[str, MemoryWatch]) -> Iterator[Row]:
    """Yield the peak memory of the daemons over all workloads."""
    anonymous = Row("daemon", "memory of the daemon, most RssAnon", "MiB", False)
    resident = Row("daemon", "memory of the daemon, VmHWM", "MiB", False)
    for target in targets:
        if target.daemon is None:
            continue
        watches[target.name].look()
        most = memory_mib(target.daemon, "VmHWM")
        if most is not None:
            anonymous.values[target.name] = [watches[target.name].most_mib]
            resident.values[target.name] = [most]
    yield from (row for row in (anonymous, resident) if row.values)


def warm_memory(mib: int) -> None:
    """Touch memory once and free it; less if less is available."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) // 1024
    with mmap.mmap(-1, max(1, min(mib, available // 2)) * MIB) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1
