"""Measure what a file system does: `python -m fusestore.bench [DIR]`.

With DIR the workloads run there, on whatever file system that is, so that a
store, a peer and the bare disk are measured by the same code.  Without it they
run on a store of their own in a temporary directory, made, mounted and removed
by the command line like any other.

Every figure is a rate, and higher is better.  Memory that a machine touches for
the first time is slow, so each workload runs once unmeasured, in small, before
its rounds; what is printed is the median of the rounds, with the least and the
most beside it.  Caches of the kernel are dropped before each cold read, which
needs root; the head of the output says when they could not be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from . import __version__
from .limits import KIB, MIB

BLOCK_BYTES: Final = 4 * KIB
SEED: Final = 20_240


@dataclass(frozen=True, slots=True)
class Scale:
    """How much each workload does in one round."""

    rounds: int
    large_mib: int
    """The file that is written and read in sequence, and read at random."""
    overwritten_mib: int
    """The file whose blocks are overwritten."""
    random_reads: int
    synced_writes: int
    small_files: int
    small_bytes: int = 4 * KIB


FULL: Final = Scale(
    rounds=5,
    large_mib=512,
    overwritten_mib=64,
    random_reads=2000,
    synced_writes=500,
    small_files=2000,
)
QUICK: Final = Scale(
    rounds=1,
    large_mib=64,
    overwritten_mib=16,
    random_reads=300,
    synced_writes=100,
    small_files=300,
)
WARM_UP: Final = Scale(
    rounds=1,
    large_mib=32,
    overwritten_mib=8,
    random_reads=50,
    synced_writes=20,
    small_files=50,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """What one workload reached."""

    workload: str
    unit: str
    median: float
    least: float
    most: float
    rounds: int


# --- the workloads: each does its work in a directory and yields its rates ----

Rates = Iterator[tuple[str, str, float]]
"""Name, unit and rate of each thing that a workload measures."""


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """An open file descriptor."""
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def large_file(top: Path, scale: Scale) -> Rates:
    """Write a file in sequence and sync it; read it cold, in sequence and at random."""
    path = top / "large"
    block = random.Random(SEED).randbytes(MIB)
    buffer = bytearray(MIB)

    def write() -> None:
        with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
            for _ in range(scale.large_mib):
                os.write(fd, block)
            os.fsync(fd)

    def read() -> None:
        with opened(path, os.O_RDONLY) as fd:
            while os.readv(fd, [buffer]):
                pass

    def read_at_random() -> None:
        offsets = random_blocks(scale.large_mib, scale.random_reads)
        with opened(path, os.O_RDONLY) as fd:
            for offset in offsets:
                os.pread(fd, BLOCK_BYTES, offset)

    yield "sequential write, then fsync", "MiB/s", scale.large_mib / seconds(write)
    drop_caches()
    yield "sequential read, cold", "MiB/s", scale.large_mib / seconds(read)
    drop_caches()
    yield "random 4 KiB read, cold", "/s", scale.random_reads / seconds(read_at_random)
    path.unlink()


def synced_overwrites(top: Path, scale: Scale) -> Rates:
    """Overwrite 4 KiB blocks of a file at random, each followed by an fdatasync."""
    path = top / "overwritten"
    block = random.Random(SEED).randbytes(MIB)
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        for _ in range(scale.overwritten_mib):
            os.write(fd, block)
        os.fsync(fd)

    def overwrite() -> None:
        offsets = random_blocks(scale.overwritten_mib, scale.synced_writes)
        with opened(path, os.O_WRONLY) as fd:
            for offset in offsets:
                os.pwrite(fd, block[:BLOCK_BYTES], offset)
                os.fdatasync(fd)

    yield "4 KiB overwrite, each synced", "/s", scale.synced_writes / seconds(overwrite)
    path.unlink()


def small_files(top: Path, scale: Scale) -> Rates:
    """Create small files, and read, stat and unlink them."""
    paths = [top / f"{number:06}" for number in range(scale.small_files)]
    data = random.Random(SEED).randbytes(scale.small_bytes)

    def create() -> None:
        for path in paths:
            with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
                os.write(fd, data)

    def read() -> None:
        for path in paths:
            with opened(path, os.O_RDONLY) as fd:
                os.read(fd, scale.small_bytes)

    def stat() -> None:
        with os.scandir(top) as entries:
            for entry in entries:
                entry.stat()

    def unlink() -> None:
        for path in paths:
            path.unlink()

    size = f"{scale.small_bytes // KIB} KiB"
    yield f"create files of {size}", "/s", scale.small_files / seconds(create)
    drop_caches()
    yield f"read files of {size}, cold", "/s", scale.small_files / seconds(read)
    drop_caches()
    yield "list and stat files, cold", "/s", scale.small_files / seconds(stat)
    yield "unlink files", "/s", scale.small_files / seconds(unlink)


WORKLOADS: Final[Sequence[Callable[[Path, Scale], Rates]]] = (
    large_file,
    synced_overwrites,
    small_files,
)


def random_blocks(file_mib: int, count: int) -> list[int]:
    """Offsets of `count` blocks in a file of `file_mib`, the same ones in every run."""
    randomness = random.Random(SEED)
    return [randomness.randrange(file_mib * MIB // BLOCK_BYTES) * BLOCK_BYTES for _ in range(count)]


def drop_caches() -> bool:
    """Make the kernel forget what it has read; False if that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


# --- running them ------------------------------------------------------------


def measure(top: Path, scale: Scale) -> Iterator[Figure]:
    """Run all workloads below `top`; each figure as soon as it is there.

    Each workload warms up first and has an empty directory in every round.
    Raises OSError if a file operation fails.
    """
    for workload in WORKLOADS:
        rates: dict[tuple[str, str], list[float]] = {}
        run_once(workload, top, WARM_UP)
        for _ in range(scale.rounds):
            for name, unit, rate in run_once(workload, top, scale):
                rates.setdefault((name, unit), []).append(rate)
        for (name, unit), values in rates.items():
            yield Figure(
                workload=name,
                unit=unit,
                median=statistics.median(values),
                least=min(values),
                most=max(values),
                rounds=len(values),
            )


def run_once(
    workload: Callable[[Path, Scale], Rates], top: Path, scale: Scale
) -> list[tuple[str, str, float]]:
    """One round of a workload in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=top) as directory:
        return list(workload(Path(directory), scale))


@contextlib.contextmanager
def own_store() -> Iterator[Path]:
    """The mount point of a store that exists only here."""
    with tempfile.TemporaryDirectory(prefix="fusestore-bench-") as directory:
        store, mountpoint = Path(directory) / "store", Path(directory) / "files"
        mountpoint.mkdir()
        fusestore("mkfs", str(store))
        fusestore("mount", str(store), str(mountpoint))
        try:
            yield mountpoint
        finally:
            fusestore("umount", str(mountpoint))


def fusestore(*arguments: str) -> None:
    """Run the command line; SystemExit with what it says if it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fusestore", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"fusestore {' '.join(arguments)}: {done.stderr or done.stdout}")


def surroundings(top: Path) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "fusestore": __version__,
        "file system": file_system(top),
        "processor": f"{os.cpu_count()} × {processor()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "caches": "dropped before cold reads" if drop_caches() else "not dropped: needs root",
    }


def file_system(top: Path) -> str:
    """The type and source of the file system that `top` is on."""
    best, answer = "", "unknown"
    resolved = str(top.resolve())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        place = left.split(" ")[4].replace("\\040", " ")
        kind, source = right.split(" ")[:2]
        below = resolved == place or resolved.startswith(place.rstrip("/") + "/")
        if below and len(place) >= len(best):
            best, answer = place, f"{kind} ({source})"
    return answer


def processor() -> str:
    """The name that the processor gives itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def run(top: Path, scale: Scale, json_path: Path | None) -> None:
    """Measure in `top`, print a table, and write JSON if a path is given."""
    about = surroundings(top)
    for key, value in about.items():
        print(f"{key + ':':13} {value}")
    print(f"\n{'workload':32} {'median':>10} {'least':>10} {'most':>10}")
    figures = []
    for figure in measure(top, scale):
        figures.append(figure)
        values = (figure.median, figure.least, figure.most)
        print(
            f"{figure.workload:32} " + " ".join(f"{value:10,.0f}" for value in values),
            figure.unit,
            flush=True,
        )
    if json_path is not None:
        result = {
            "surroundings": about,
            "scale": asdict(scale),
            "figures": [asdict(figure) for figure in figures],
        }
        json_path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measure a directory, or without one a store made for the purpose.",
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, help="where to measure")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, too")
    parser.add_argument("--quick", action="store_true", help="one small round: seconds")
    options = parser.parse_args(arguments)
    scale = QUICK if options.quick else FULL
    if options.directory is None:
        with own_store() as mountpoint:
            run(mountpoint, scale, options.json)
    elif not options.directory.is_dir():
        parser.error(f"{options.directory} is not a directory")
    else:
        need = 2 * scale.large_mib * MIB
        if shutil.disk_usage(options.directory).free < need:
            parser.error(f"{options.directory} has less than {need // MIB} MiB free")
        run(options.directory, scale, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
