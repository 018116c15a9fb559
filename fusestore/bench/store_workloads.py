"""Workloads for stores only: lost regions, repair, checkpoints, many files.

Most of them make their own stores, so that they do not affect other workloads.  These
run in the process of the benchmark, which makes and removes stores.  Only children touch
the files of the stores.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..limits import MIB
from ..serve.control_client import ControlClient
from ..serve.messages.mount import StatusRequest
from . import workloads
from .children import isolated, together
from .measured import Measured
from .targets import check_room, own_store
from .workloads import BLOCK_BYTES, Place, Run, drop_caches, read_whole, seconds, write_large

REGION = "us-east-1"
MEMORY = Path("/dev/shm")
CHURN_BATCH = 500
"""How many files are created between two syncs."""
FILES_PER_DIRECTORY = 1000


def in_child(work: Callable[[], float]) -> float:
    """Run work in a child, and return the seconds that the child reports."""
    return isolated(work, lambda: None)


def all_of(run: Run, place: Place) -> list[Measured]:
    """Run a workload in a child, and return its figures."""
    return isolated(lambda: list(run(place)), lambda: None)


def renamed(circumstance: str, found: Iterable[Measured]) -> Iterator[Measured]:
    """Rename the figures of a workload under special conditions, and drop limits and goals."""
    for each in found:
        yield replace(each, figure=f"{circumstance}: {each.figure}", limit=None, goal=None)


def degraded(place: Place) -> Iterator[Measured]:
    """Read files that were written before the loss of a region, and write without it."""
    scale = place.scale
    mib, reads, block = scale.damaged_mib, scale.random_reads, os.urandom(MIB)
    with own_store(place.top) as store:
        large, tree, new = (store.mountpoint / name for name in ("large", "tree", "new"))

        def fill() -> float:
            write_large(large, mib, block)
            tree.mkdir()
            new.mkdir()
            return seconds(lambda: workloads.unpack(place.tarball, tree))

        in_child(fill)
        store.umount()
        store.lose(REGION)
        store.mount()
        drop_caches()
        elapsed = in_child(lambda: seconds(lambda: read_whole(large)))
        yield Measured("then a region lost: sequential read, cold", "MiB/s", mib / elapsed)
        drop_caches()
        elapsed = in_child(lambda: seconds(lambda: workloads.read_at_random(large, mib, reads)))
        yield Measured("then a region lost: random 4 KiB read", "/s", reads / elapsed)
        drop_caches()
        count = workloads.command("tar", "--list", "--file", str(place.tarball)).count("\n")
        elapsed = in_child(lambda: seconds(lambda: workloads.search(tree)))
        yield Measured("then a region lost: grep -r, cold", "files/s", count / elapsed)
        there = replace(place, top=new, daemon=store.daemon())
        for run in (workloads.large, workloads.overwrite, workloads.small, workloads.tree):
            yield from renamed("degraded", all_of(run, there))


def repair(place: Place) -> Iterator[Measured]:
    """Rebuild a lost region of a mounted store."""
    mib, block = place.scale.damaged_mib, os.urandom(MIB)
    with own_store(place.top) as store:
        in_child(lambda: seconds(lambda: write_large(store.mountpoint / "large", mib, block)))
        store.umount()
        store.lose(REGION)
        store.mount()
        drop_caches()
        start = time.perf_counter()
        done = store.repair(REGION)
        elapsed = time.perf_counter() - start
        rebuilt = done["bytes"] / MIB
        rate = rebuilt / max(done["seconds"], 0.001)
        yield Measured("repair of a region: rebuilt and checked", "MiB/s", rate)
        yield Measured(f"repair of a region: the command, {mib} MiB", "s", elapsed)


def writeback(place: Place) -> Iterator[Measured]:
    """Write a file in pieces of 4 KiB, with and without faster mount options."""
    mib, block = place.scale.small_write_mib, os.urandom(BLOCK_BYTES)

    def write(path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(mib * MIB // BLOCK_BYTES):
                file.write(block)
            os.fsync(file.fileno())

    for options in ((), ("noxattr",), ("writeback",), ("writeback", "noxattr")):
        with own_store(place.top, *options) as store:
            path = store.mountpoint / "small writes"
            elapsed = in_child(lambda path=path: seconds(lambda: write(path)))  # type: ignore[misc]
            chosen = f", -o {','.join(options)}" if options else ""
            name = f"4 KiB in sequence, fsync{chosen}"
            yield Measured(name, "MiB/s", mib / elapsed)


def memory(place: Place) -> Iterator[Measured]:
    """Run `large` in a store whose nodes and metadata are in memory (/dev/shm)."""
    check_room(MEMORY, 3 * place.scale.memory_mib * MIB)
    with own_store(MEMORY) as store:
        there = replace(
            place,
            top=store.mountpoint,
            scale=replace(place.scale, large_mib=place.scale.memory_mib),
            daemon=store.daemon(),
        )
        yield from renamed("in memory", all_of(workloads.large, there))


def checkpoints(place: Place) -> Iterator[Measured]:
    """Time writes of 4 KiB while another process creates files as fast as it can.

    That process syncs from time to time: a commit with many changes makes a checkpoint.
    """
    path, block = place.top / "stalled", os.urandom(BLOCK_BYTES)
    write_large(path, 1, os.urandom(MIB))
    churned = place.top / "churned"
    churned.mkdir()
    end = time.perf_counter() + place.scale.stall_seconds

    def write() -> list[float]:
        latencies: list[float] = []
        with workloads.opened(path, os.O_WRONLY) as fd:
            while (start := time.perf_counter()) < end or not latencies:
                os.pwrite(fd, block, len(latencies) % (MIB // BLOCK_BYTES) * BLOCK_BYTES)
                latencies.append(time.perf_counter() - start)
        return latencies

    def churn() -> list[float]:
        seen: set[float] = set()
        paths = (churned / str(number) for number in itertools.count())
        while time.perf_counter() < end:
            batch = list(itertools.islice(paths, CHURN_BATCH))
            for path in batch:
                with open(path, "wb", buffering=0) as file:
                    file.write(block[:100])
            with workloads.opened(churned, os.O_RDONLY) as fd:
                os.fsync(fd)
            if place.store is not None:
                seen.add(ControlClient(place.store).ask(StatusRequest()).checkpoint)
        return list(seen)

    _, (latencies, seen) = together([write, churn])
    yield from workloads.latency(
        "4 KiB write, checkpoints meanwhile", latencies, ("median", "p99", "max")
    )
    if place.store is not None:
        yield Measured("checkpoints meanwhile", "", max(0, len(seen) - 1))


def many(place: Place) -> Iterator[Measured]:
    """Run `small` in a store with 10,000 files, and again with many more files."""
    assert place.files_in_store is not None
    there = 0
    for wanted in (place.scale.files_before, place.files_in_store):
        start, before = time.perf_counter(), there
        for there in range(before, wanted):
            directory = f"{place.top}/d{there // FILES_PER_DIRECTORY:06d}"
            if there % FILES_PER_DIRECTORY == 0:
                os.mkdir(directory)
            with open(f"{directory}/{there:09d}", "wb", buffering=0) as file:
                file.write(b"one of many\n")
        there = max(before, wanted)
        if wanted > before:
            elapsed = time.perf_counter() - start
            yield Measured(f"filled to {wanted:,} files", "/s", (wanted - before) / elapsed)
        yield from renamed(f"at {wanted:,} files", workloads.small(place))
