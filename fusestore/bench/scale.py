"""The amount of work of each workload in one round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..limits import KIB, MIB


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes and counts; the defaults are those of a full run."""

    rounds: int = 5
    """Rounds that count, after one that does not."""
    warm_mib: int = 2048
    """Memory that is touched once before the measurements."""
    large_mib: int = 512
    """The size of the file that is written and read in sequence, and read at random."""
    random_reads: int = 1000
    overwritten_mib: int = 64
    """The size of the file whose blocks are overwritten."""
    synced_writes: int = 300
    small_files: int = 2000
    tree_files: int = 1500
    objects: int = 1000
    clients: int = 30
    documents_per_client: int = 20
    clients_at_once: tuple[int, ...] = (1, 2, 4, 8)
    parallel_mib: int = 256
    """The total size of the files that clients write and read at once."""
    sizes: tuple[int, ...] = tuple(1000 * 10**power for power in range(7))
    """Sizes of files, in bytes: 1 KB to 1 GB."""
    size_total_bytes: int = 32 * MIB
    size_files_max: int = 200
    """The greatest number of files of one size; fewer if they reach the total, at least one."""
    stall_seconds: float = 20.0
    """How long writes are timed while the daemon makes checkpoints."""
    damaged_mib: int = 512
    """The data in a store that loses a region."""
    small_write_mib: int = 64
    """The data that is written in pieces of 4 KiB, with and without faster mount options."""
    memory_mib: int = 512
    """The data that is written to a store whose nodes are in memory."""
    files_before: int = 10_000
    """Files in the store for the first of two measurements with many files."""

    def bytes_max(self, workloads: Iterable[str]) -> int:
        """Return the most file data that one run of these workloads stores at a time."""
        needed = {
            "large": self.large_mib * MIB,
            "parallel": self.parallel_mib * MIB,
            "degraded": 2 * self.damaged_mib * MIB,
            "repair": self.damaged_mib * MIB,
            "writeback": self.small_write_mib * MIB,
            "documents": self.clients * self.documents_per_client * 1536 * KIB,
            "sizes": max(*self.sizes, self.size_total_bytes),
        }
        return max(needed.get(name, self.overwritten_mib * MIB) for name in workloads)


FULL = Scale()
QUICK = Scale(
    rounds=1,
    warm_mib=512,
    large_mib=64,
    random_reads=500,
    overwritten_mib=16,
    synced_writes=150,
    small_files=400,
    tree_files=200,
    objects=150,
    documents_per_client=2,
    clients_at_once=(1, 4),
    parallel_mib=32,
    sizes=(1000, 100_000, 10_000_000),
    size_total_bytes=8 * MIB,
    size_files_max=30,
    stall_seconds=4.0,
    damaged_mib=64,
    small_write_mib=8,
    memory_mib=64,
)
