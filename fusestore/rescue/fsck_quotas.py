"""fsck: each inode counts for the quota of its directory, and each quota counts its inodes."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..format import file_rows
from ..format.file_rows import ROOT, Inode, Quota, QuotaState
from ..text import counted
from .fsck_findings import Finding, Phase, finding
from .fsck_view import StoreView

_COUNT_MAX = (1 << 63) - 1
"""What a row of a quota can count."""


@dataclass(slots=True)
class QuotaCheck:
    """Collects the quotas of directories and of their inodes; without quotas it does nothing."""

    _store: StoreView
    _quotas: dict[int, Quota] = field(init=False)
    """By directory."""
    _walking: bool = field(init=False)
    """Inodes are moving from one quota to another: they may name either."""
    _homes: dict[int, frozenset[int]] = field(default_factory=dict)
    """By inode: the quotas of its directories."""
    _alike: dict[frozenset[int], frozenset[int]] = field(default_factory=dict)
    """One object for all inodes with the same quotas."""
    _held: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """By quota: bytes and inodes that name it, without those of inner quotas."""

    def __post_init__(self) -> None:
        self._quotas = {
            file_rows.decode_ino_key(key): Quota.decode(value)
            for key, value in self._store.table(b"B")
        }
        states = {row.state for row in self._quotas.values()}
        self._walking = bool(states & {QuotaState.COUNTING, QuotaState.CLEARING})

    def named(self, ino: int, directory: Inode) -> None:
        """Note a name of an inode in this directory; called for each name, before `inode`."""
        if self._quotas:
            homes = self._homes.get(ino, frozenset()) | {directory.quota_root}
            self._homes[ino] = self._alike.setdefault(homes, homes)

    def inode(self, ino: int, inode: Inode) -> Iterator[Finding]:
        """Each inode names the quota of its directory."""
        if not self._quotas and not inode.quota_root:
            return
        homes = frozenset({0}) if ino == ROOT else self._homes.get(ino, frozenset())
        own = self._quotas.get(ino) if inode.quota_root == ino else None
        counts_in = own.outer if own else inode.quota_root
        if self._is_misplaced(inode, own, homes):
            home = min(homes, default=0)
            text = f"inode {ino} counts for the quota of {counts_in}, but lies in that of {home}"
            if own:
                mended = replace(own, outer=home)
                yield finding(Phase.INODES, "quotas", text, "set_quota", ino, mended)
            else:
                yield finding(Phase.INODES, "quotas", text, "change", ino, quota_root=home)
            return
        self._held[counts_in][0] += inode.allocated
        self._held[counts_in][1] += 1

    def _is_misplaced(self, inode: Inode, own: Quota | None, homes: frozenset[int]) -> bool:
        """Return whether an inode, with its `own` quota or none, counts for the wrong one."""
        if inode.quota_root not in (0, *self._quotas):
            return True
        if self._walking or not homes or inode.quota_root in homes:
            return False
        if own:
            return own.outer not in homes
        if stat.S_ISDIR(inode.mode):
            return True
        # Otherwise it had names on both sides when a quota was set.
        return all(inode.quota_root in [*self._outer(home), 0] for home in homes)

    def _outer(self, root: int) -> list[int]:
        """Return a quota and those above it."""
        chain: list[int] = []
        while root in self._quotas and root not in chain:
            chain.append(root)
            root = self._quotas[root].outer
        return chain

    def totals(self) -> Iterator[Finding]:
        """Each quota belongs to a directory, and counts the inodes in it and in inner quotas."""
        sums: dict[int, list[int]] = {ino: [0, 0] for ino in self._quotas}
        for root, (size, files) in self._held.items():
            for ino in self._outer(root):
                sums[ino][0] += size
                sums[ino][1] += files
        for ino, row in self._quotas.items():
            # Inodes that count impossible sizes are mended in the same phase.
            size, files = (min(number, _COUNT_MAX) for number in sums[ino])
            yield from self._total(ino, row, size, files)

    def _total(self, ino: int, row: Quota, size: int, files: int) -> Iterator[Finding]:
        inode = self._store.inode(ino)
        is_directory = inode is not None and stat.S_ISDIR(inode.mode)
        text, mended = "", row
        if (row.bytes_used, row.files_used) != (size, files):
            text = (
                f"the quota of {ino} counts {counted(row.bytes_used, 'byte')} and "
                f"{counted(row.files_used, 'inode')}, but has {size} and {files}"
            )
            mended = replace(row, bytes_used=size, files_used=files)
        elif row.state is QuotaState.ACTIVE and not is_directory:
            text = f"directory {ino}, which has a quota, does not exist"
            mended = replace(row, state=QuotaState.GONE)
        elif row.state is QuotaState.ACTIVE and inode and inode.quota_root != ino:
            text = f"directory {ino} does not count for its own quota"
            mended = replace(row, state=QuotaState.COUNTING)
        elif row.state is QuotaState.GONE and files == 0:
            text = f"nothing counts for the quota of {ino}, which was cleared"
        if text:
            yield finding(Phase.DERIVED, "quotas", text, "set_quota", ino, mended)
