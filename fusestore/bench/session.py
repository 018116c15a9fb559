"""A run of the benchmark, from its options to its reports."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config.store_config import load
from ..errors import FusestoreError, UsageError
from . import interrupts, plot, report, targets
from .report import Report
from .rounds import WORKLOADS, Row, Session, Workload
from .scale import FULL, QUICK, Scale
from .surroundings import file_system, surroundings
from .targets import Target

ROOM_FACTOR = 8
"""Temporary stores need this many times the room of the largest workload, for parity and for
room that is freed later."""
ROOM_BYTES_MIN = 256 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command."""

    directory: Path | None = None
    against: tuple[Path, ...] = ()
    null: bool = False
    disk: Path | None = None
    quick: bool = False
    rounds: int | None = None
    only: tuple[str, ...] = ()
    files_in_store: int | None = None
    json_file: Path | None = None
    csv_file: Path | None = None
    plot: Path | None = None

    def scale(self) -> Scale:
        """The amount of work."""
        scale = QUICK if self.quick else FULL
        return replace(scale, rounds=self.rounds) if self.rounds else scale

    def workloads(self) -> list[Workload]:
        """Return the chosen workloads; UsageError for unknown or unsuitable ones."""
        known = {workload.name: workload for workload in WORKLOADS}
        for name in self.only:
            if name not in known:
                raise UsageError(
                    f"There is no workload {name!r}; the workloads are {', '.join(known)}."
                )
            if known[name].own and self.directory is not None:
                raise UsageError(f"The workload {name} needs a temporary store: omit DIR.")
        if "many" in self.only and self.files_in_store is None:
            raise UsageError("The workload many needs --files-in-store.")
        chosen = []
        for name, workload in known.items():
            wanted = name in self.only if self.only else not workload.own or self.directory is None
            if workload.once:
                wanted = self.files_in_store is not None and (not self.only or wanted)
            if wanted:
                chosen.append(workload)
        return chosen

    def check(self) -> None:
        """Raise UsageError for impossible options, before anything is measured."""
        if self.directory is not None and self.disk is not None:
            raise UsageError("--disk is only for a temporary store: omit --disk, or DIR.")
        for path in (self.directory, self.disk, *self.against):
            if path is not None and not path.is_dir():
                raise UsageError(f"{path} is not a directory.")
        if self.plot is not None:
            plot.check(self.plot)
        for path in filter(None, (self.json_file, self.csv_file, self.plot)):
            there = os.path.lexists(path)
            try:
                path.open("ab").close()
            except OSError as error:
                raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
            if not there:
                path.unlink()


def run(options: Options, echo: Callable[[str], None], scale: Scale | None = None) -> None:
    """Measure, print a table with `echo`, and write the requested files.

    UsageError before anything is measured; FusestoreError if a workload failed.
    """
    chosen = options.workloads()
    options.check()
    scale = scale or options.scale()
    with interrupts.caught(), contextlib.ExitStack() as stack:
        stack.callback(_progress, "")
        disk = options.disk or targets.working_directory()
        work = stack.enter_context(targets.scratch(disk))
        needed = scale.bytes_max(workload.name for workload in chosen)
        measured = list(_targets(options, disk, needed, stack))
        own = measured[0].store
        reported = Report(measured, _disk_share(own))
        about = surroundings()
        for line in _head(about, reported):
            echo(line)
        tarball = work / "source.tar"
        make_tarball(tarball, scale.tree_files)
        session = Session(
            measured, scale, tarball, work if own else None, options.files_in_store, _progress
        )
        rows = _measure(session, chosen, reported, echo)
    _write(options, rows, reported, about, scale, session)
    if session.failures:
        count = len(session.failures)
        raise FusestoreError(f"{count} of the workloads' runs failed; see above.")


def _measure(
    session: Session, chosen: Sequence[Workload], reported: Report, echo: Callable[[str], None]
) -> list[Row]:
    rows: list[Row] = []
    told = 0
    for found in session.measure(chosen):
        for line in reported.lines(found):
            echo(line)
        for failure in session.failures[told:]:
            echo(f"FAILED: {failure}")
        told = len(session.failures)
        rows += found
    return rows


def _targets(
    options: Options, disk: Path, needed: int, stack: contextlib.ExitStack
) -> Iterator[Target]:
    """Prepare and yield the targets; `needed` is the bytes of the largest workload."""
    taken = {"fusestore", "raw", "null"}
    if options.directory is None:
        targets.check_room(disk, ROOM_BYTES_MIN + ROOM_FACTOR * needed)
        store = stack.enter_context(targets.own_store(disk))
        about = f"2+1 in three regions on {file_system(disk)}"
        yield Target("fusestore", store.mountpoint, about, store.daemon(), store.path)
        yield stack.enter_context(targets.directory(disk, "raw"))
    for path in filter(None, (options.directory, *options.against)):
        name = path.resolve().name or "/"
        name = str(path.resolve()) if name in taken else name
        if name in taken:
            raise UsageError(f"{path} is given twice.")
        taken.add(name)
        targets.check_room(path, ROOM_BYTES_MIN + 2 * needed)
        yield stack.enter_context(targets.directory(path, name))
    if options.null or options.directory is None:
        yield stack.enter_context(targets.null_daemon(disk))


def _disk_share(store: Path | None) -> float:
    """Return the share of data, without parity, in the writes of a store; 1 if it is no store."""
    if store is None:
        return 1.0
    code = load(store).code
    return code.k / (code.k + code.m)


def make_tarball(path: Path, files_max: int) -> None:
    """Pack Python modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    outside = {"site-packages", "dist-packages", "__pycache__"}
    with tarfile.open(path, "w") as tarball:
        count = 0
        for folder, folders, names in os.walk(library):
            folders[:] = sorted(set(folders) - outside)
            for name in sorted(names):
                if name.endswith(".py") and count < files_max:
                    file = Path(folder, name)
                    tarball.add(file, Path("python") / file.relative_to(library))
                    count += 1


def _head(about: dict[str, str], reported: Report) -> Iterator[str]:
    for key, value in about.items():
        yield f"{key + ':':11} {value}"
    for target in reported.targets:
        yield f"{target.name + ':':11} {target.about}"
    yield ""
    yield reported.head()


def _progress(text: str) -> None:
    """Show the current step on a terminal, on one temporary line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def _write(
    options: Options,
    rows: Sequence[Row],
    reported: Report,
    about: dict[str, str],
    scale: Scale,
    session: Session,
) -> None:
    records = reported.records(rows)
    if options.json_file is not None:
        result: dict[str, Any] = {
            "surroundings": about,
            "targets": {target.name: target.about for target in reported.targets},
            "scale": asdict(scale),
            "figures": records,
            "failures": [asdict(failure) for failure in session.failures],
        }
        report.write_json(options.json_file, result)
    if options.csv_file is not None:
        report.write_csv(options.csv_file, records)
    if options.plot is not None:
        title = (
            f"fusestore {about['fusestore']}, {about['kernel']}, {about['CPU']}, {about['date']}"
        )
        plot.write(options.plot, records, title, reported.names)
