"""Workloads for any file system; each works in an empty directory.

Cold means after `sync` and after dropping the kernel's caches.  This needs root; the head
of a report states whether it was possible.  Access patterns are the same in every run and
on every file system.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ..errors import FusestoreError
from ..limits import KIB, MIB
from .children import together
from .measured import Goal, Limit, Measured
from .scale import Scale
from .watching import cpu_seconds

BLOCK_BYTES: Final = 4 * KIB
SEED: Final = 20_240
READ_SHARE: Final = 0.1
"""The share of reads in the operations on documents."""
DOCUMENTS: Final = 10
"""The number of documents of each client; existing ones are overwritten."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place and the inputs of a workload."""

    top: Path
    """An empty directory for the workload."""
    scale: Scale
    tarball: Path
    """A tarball of a source tree."""
    daemon: int | None = None
    """The process that serves the file system, if known."""
    store: Path | None = None
    """The store that contains the directory, if it was made for the benchmark."""
    files_in_store: int | None = None
    """The number of files for the workload `many`."""


Run = Callable[[Place], Iterator[Measured]]

# --- one client --------------------------------------------------------------


def large(place: Place) -> Iterator[Measured]:
    """Write a file in sequence and sync it; read it cold, in sequence and at random."""
    path, mib, reads = place.top / "large", place.scale.large_mib, place.scale.random_reads
    block = os.urandom(MIB)
    used = partial(cpu_seconds, place.daemon)

    before = used()
    elapsed = seconds(lambda: write_large(path, mib, block))
    yield Measured(
        "sequential write, then fsync", "MiB/s", mib / elapsed, Limit.WRITTEN, Goal(0.62, "raw")
    )
    yield from cpu("written", before, used(), mib)
    drop_caches()
    before = used()
    elapsed = seconds(lambda: read_whole(path))
    yield Measured("sequential read, cold", "MiB/s", mib / elapsed, Limit.READ, Goal(1000))
    yield from cpu("read", before, used(), mib)
    drop_caches()
    elapsed = seconds(lambda: read_at_random(path, mib, reads))
    yield Measured("random 4 KiB read, cold", "/s", reads / elapsed, Limit.READ, Goal(8000))


def cpu(what: str, before: float | None, after: float | None, mib: int) -> Iterator[Measured]:
    """Report the CPU time of the daemon for written or read data, if there is a daemon."""
    if before is not None and after is not None:
        yield Measured(f"daemon's CPU, a GiB {what}", "s", (after - before) * KIB / mib)


def overwrite(place: Place) -> Iterator[Measured]:
    """Overwrite 4 KiB of a file at random, each time followed by an fdatasync."""
    path, mib, count = place.top / "blocks", place.scale.overwritten_mib, place.scale.synced_writes
    write_large(path, mib, os.urandom(MIB))
    block = os.urandom(BLOCK_BYTES)
    latencies = []
    with opened(path, os.O_RDWR) as fd:
        for offset in random_offsets(12345, mib * MIB, count):
            start = time.perf_counter()
            os.pwrite(fd, block, offset)
            os.fdatasync(fd)
            latencies.append(time.perf_counter() - start)
    yield Measured(
        "4 KiB overwrite, each synced", "/s", count / sum(latencies), Limit.READ, Goal(2200)
    )
    yield from latency("4 KiB overwrite, synced", latencies, ("p99", "max"))


def small(place: Place) -> Iterator[Measured]:
    """Create files of 4 KiB, read them cold, list them with attributes, delete them."""
    directory, count = place.top / "small", place.scale.small_files
    directory.mkdir()
    data = os.urandom(BLOCK_BYTES)
    paths = [f"{directory}/{number:06d}" for number in range(count)]

    def create() -> None:
        for path in paths:
            with open(path, "wb", buffering=0) as file:
                file.write(data)

    def read() -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                file.read()

    def rate(what: str, elapsed: float) -> Measured:
        return Measured(
            f"4 KiB files: {what}", "/s", count / elapsed, Limit.NULL, Goal(0.9, "null")
        )

    yield rate("create", seconds(create))
    drop_caches()
    yield rate("read, cold", seconds(read))
    drop_caches()
    yield rate("ls -lR, cold", seconds(lambda: command("ls", "-lR", str(directory))))
    yield rate("delete", seconds(lambda: shutil.rmtree(directory)))


def tree(place: Place) -> Iterator[Measured]:
    """Unpack a source tree, and search it cold."""
    unpacked = place.top / "tree"
    unpacked.mkdir()
    place.tarball.read_bytes()  # so that it is read from memory
    listing = command("tar", "--list", "--file", str(place.tarball))
    count = listing.count("\n")
    elapsed = seconds(lambda: unpack(place.tarball, unpacked))
    yield Measured("source tree: tar -x", "files/s", count / elapsed, Limit.NULL, Goal(0.8, "null"))
    drop_caches()
    elapsed = seconds(lambda: search(unpacked))
    yield Measured("source tree: grep -r, cold", "files/s", count / elapsed, Limit.NULL)


def objects(place: Place) -> Iterator[Measured]:
    """Put and get objects of 1 to 10 KB, with and without fsync."""
    randomness = random.Random(SEED)
    sizes = [randomness.randint(1000, 10_000) for _ in range(place.scale.objects)]
    data = os.urandom(10_000)
    for what, synced in (("put", False), ("put, fsync", True)):
        directory = place.top / what
        directory.mkdir()

        def put(number: int, directory: Path = directory, synced: bool = synced) -> None:
            with opened(directory / f"{number:06d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                os.write(fd, data[: sizes[number]])
                if synced:
                    os.fsync(fd)

        def get(number: int, directory: Path = directory) -> None:
            with opened(directory / f"{number:06d}", os.O_RDONLY) as fd:
                os.read(fd, 10_000)

        yield from latency(f"{what} 1–10 KB", timed(put, len(sizes)))
        drop_caches()
        if not synced:
            yield from latency("get 1–10 KB, cold", timed(get, len(sizes)))


def sizes(place: Place) -> Iterator[Measured]:
    """Write files of one size after the other, each synced, and read them cold."""
    scale = place.scale
    data = os.urandom(MIB)
    for size in scale.sizes:
        count = max(1, min(scale.size_files_max, scale.size_total_bytes // size))
        paths = [place.top / f"{size}-{number}" for number in range(count)]

        def write(paths: Sequence[Path] = paths, size: int = size) -> None:
            for path in paths:
                with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
                    for start in range(0, size, MIB):
                        os.write(fd, data[: min(MIB, size - start)])
                    os.fsync(fd)

        def read(paths: Sequence[Path] = paths) -> None:
            for path in paths:
                read_whole(path)

        mib = count * size / MIB
        yield Measured(f"files of {size_text(size)}: write, fsync", "MiB/s", mib / seconds(write))
        drop_caches()
        yield Measured(f"files of {size_text(size)}: read, cold", "MiB/s", mib / seconds(read))
        for path in paths:
            path.unlink()


# --- several clients ---------------------------------------------------------


def parallel(place: Place) -> Iterator[Measured]:
    """Write and read files with 1, 2, 4 and 8 processes at once, the same bytes in total."""
    block = os.urandom(MIB)
    for clients in place.scale.clients_at_once:
        mib = max(1, place.scale.parallel_mib // clients)
        paths = [place.top / f"{clients}-{number}" for number in range(clients)]
        elapsed, _ = together([partial(write_large, path, mib, block) for path in paths])
        total = mib * clients
        yield Measured(f"{clients} at once: write, fsync", "MiB/s", total / elapsed, Limit.WRITTEN)
        drop_caches()
        elapsed, _ = together([partial(read_whole, path) for path in paths])
        yield Measured(f"{clients} at once: read, cold", "MiB/s", total / elapsed, Limit.READ)
        for path in paths:
            path.unlink()


def documents(place: Place) -> Iterator[Measured]:
    """30 clients with documents of 100 KB to 1.5 MB: 10 % reads, 90 % whole, synced writes."""
    scale = place.scale

    def client(number: int, top: Path = place.top) -> tuple[int, list[float]]:
        randomness = random.Random(SEED + number)
        data = os.urandom(1_500_000)
        moved = 0
        latencies: list[float] = []
        there: list[Path] = []
        for _ in range(scale.documents_per_client):
            if there and randomness.random() < READ_SHARE:
                moved += read_whole(randomness.choice(there))
                continue
            path = top / f"{number}-{randomness.randrange(DOCUMENTS)}"
            size = randomness.randint(100_000, 1_500_000)
            start = time.perf_counter()
            with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
                moved += os.write(fd, data[:size])
                os.fsync(fd)
            latencies.append(time.perf_counter() - start)
            there.append(path)
        return moved, latencies

    elapsed, answers = together([partial(client, number) for number in range(scale.clients)])
    mib = sum(moved for moved, _ in answers) / MIB
    count = scale.clients * scale.documents_per_client
    name = f"{scale.clients} clients, 10/90 r/w"
    yield Measured(f"{name}: documents", "/s", count / elapsed, Limit.WRITTEN)
    yield Measured(f"{name}: bytes", "MiB/s", mib / elapsed, Limit.WRITTEN)
    latencies = [seconds for _, each in answers for seconds in each]
    yield from latency(f"{name}: write, fsync", latencies, ("median", "p99", "max"))


# --- steps of workloads ------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """An open file descriptor."""
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed(work: Callable[[int], object], count: int) -> list[float]:
    """Return how long each of `count` calls takes, in seconds."""
    return [seconds(partial(work, number)) for number in range(count)]


def latency(
    name: str,
    latencies: Sequence[float],
    which: Sequence[str] = ("mean", "median", "p99", "max"),
) -> Iterator[Measured]:
    """Figures of the distribution of latencies, given in seconds."""
    ordered = sorted(latencies)
    found = {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[max(0, -(-len(ordered) * 99 // 100) - 1)],
        "max": ordered[-1],
    }
    for each in which:
        yield Measured(f"{name}: {each}", "ms", 1000 * found[each])


def random_offsets(seed: int, file_bytes: int, count: int) -> Iterator[int]:
    """Yield random offsets of blocks in a file, the same in every run."""
    for _ in range(count):
        seed = (1103515245 * seed + 12345) & 0x7FFFFFFF
        yield seed % (file_bytes // BLOCK_BYTES) * BLOCK_BYTES


def write_large(path: Path, mib: int, block: bytes) -> None:
    """Write `mib` MiB, and sync them."""
    with open(path, "wb", buffering=0) as file:
        for _ in range(mib):
            file.write(block)
        os.fsync(file.fileno())


def read_whole(path: Path) -> int:
    """Read a file to its end; return its length."""
    buffer, total = bytearray(MIB), 0
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            total += got
    return total


def read_at_random(path: Path, mib: int, count: int) -> None:
    """Read blocks of 4 KiB."""
    with opened(path, os.O_RDONLY) as fd:
        for offset in random_offsets(777, mib * MIB, count):
            os.pread(fd, BLOCK_BYTES, offset)


def unpack(tarball: Path, top: Path) -> None:
    """Unpack a tarball below `top`."""
    command("tar", "--extract", "--file", str(tarball), "--directory", str(top), "--no-same-owner")


def search(top: Path) -> None:
    """Search all files below `top` for a text that none of them contains."""
    command("grep", "-rc", "zzzznot" + "there", str(top), fine=(0, 1))


def command(*arguments: str, fine: Sequence[int] = (0,)) -> str:
    """Run a program, and return its output; FusestoreError with its message if it fails."""
    done = subprocess.run(
        arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode not in fine:
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise FusestoreError(f"{arguments[0]} failed: {reason[0]}")
    return done.stdout


def size_text(size: int) -> str:
    """Format a round number of bytes: 10 KB."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size} {unit}"
        size //= 1000
    return f"{size} GB"


def drop_caches() -> bool:
    """Drop the kernel's caches; False if this is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
