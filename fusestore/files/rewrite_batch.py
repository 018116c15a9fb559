"""A batch: runs of one file, or of many small ones, that one transaction rewrites.

A commit seals what a transaction left in an open stripe.  Small files together fill whole
stripes, so that frequent commits do not give each its own small one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import trio

from ..errors import LostError, NoMemoryLeftError, NoSpaceError, StaleError
from ..format.erasure import Code
from ..format.file_rows import Extent
from ..format.stripe_rows import LOST_STRIPE
from ..log.log import Log
from ..log.pace import Pace
from ..read.reader import Reader
from .contents import Contents, Part
from .fragments import Run, is_full
from .rewriter import Rewriter
from .tree_steps import inode_of

READS_MAX = 4
PACED_BYTES_MIN = 64 << 10
"""A batch has about as many bytes as a set rate allows in a second, but at least these."""


class RewriteBatch:
    """Collects runs, and rewrites them when they are enough for a transaction."""

    def __init__(
        self,
        log: Log,
        reader: Reader,
        contents: Contents,
        rewriter: Rewriter,
        on_lost: Callable[[int, LostError], Awaitable[None]],
    ) -> None:
        """`on_lost` is called for the inode of bytes that cannot be read, and keep their place."""
        self._log = log
        self._limits = log.limits
        self._reader = reader
        self._contents = contents
        self._rewriter = rewriter
        self._on_lost = on_lost
        self._pace = Pace(log)
        self._goes_on: Callable[[], bool] = lambda: True
        self._runs: list[tuple[int, Run]] = []
        self._code: Code | None = None
        self._bytes_max = self._limits.recode_bytes
        self.waits_for = ""
        """Why nothing can be written now; empty if it can."""
        self.moved = 0
        """Bytes rewritten."""

    def begin(self, rate: float | None, goes_on: Callable[[], bool], moved: int) -> None:
        """Begin an empty batch; nothing is rewritten any more when `goes_on` returns False."""
        self._pace, self._goes_on, self.moved = Pace(self._log, rate), goes_on, moved
        self._runs.clear()
        self._bytes_max = self._limits.recode_bytes
        if rate is not None:  # else the first batch could be all that there is
            self._bytes_max = min(self._bytes_max, max(int(rate), PACED_BYTES_MIN))

    async def add(self, ino: int, run: Run, code: Code) -> None:
        """Rewrite a run of a file in this code, with others, soon."""
        if self._code != code or self._length + run.length > self._bytes_max:
            await self.flush()
        self._code = code
        self._runs.append((ino, run))
        extents = sum(run.extents for _, run in self._runs)
        if self._length >= self._bytes_max or is_full(extents, self._length, self._limits):
            await self.flush()

    @property
    def _length(self) -> int:
        return sum(run.length for _, run in self._runs)

    async def flush(self) -> None:
        """Rewrite all runs.

        What is changed while it is written stays where it is, if it has the code: this ends even
        if a file is changed all the time.
        """
        runs, self._runs = self._runs, []
        code, is_first = self._code, True
        while runs and code is not None and self._goes_on():
            parts, is_complete = await self._read(runs, code, all_codes=is_first)
            try:
                moved, _ = await self._rewriter.write(code, parts)
            except (NoMemoryLeftError, NoSpaceError) as error:
                self.waits_for = str(error)
                await trio.sleep(self._limits.recode_retry_seconds)
                continue
            self.waits_for = ""
            self.moved += moved
            if is_complete and moved == sum(part.length for part in parts):
                return
            is_first = False

    async def _read(
        self, runs: list[tuple[int, Run]], code: Code, *, all_codes: bool
    ) -> tuple[list[Part], bool]:
        """Return the bytes of runs, and whether this is all that can be read.

        What is moved or overwritten meanwhile is read again, a few times.  Pieces that are left
        out would be new fragments.
        """
        without = None if all_codes else code
        have: dict[tuple[int, Extent], Part] = {}
        lost: set[tuple[int, Extent]] = set()
        for _ in range(READS_MAX):
            wanted = await self._extents(runs, without)
            have = {item: have[item] for item in wanted if self._is_current(have.get(item))}
            missing = [item for item in wanted if item not in have and item not in lost]
            if not missing:
                return list(have.values()), True
            length = sum(extent.length for _, extent in missing)
            await self._pace.spend(length + length * code.n // code.k)
            parts, errors = await self._rewriter.read(missing)
            have |= {(part.ino, part.extent): part for part in parts}
            for ino, error in errors.items():
                await self._on_lost(ino, error)
            lost.update(item for item in missing if item[0] in errors and item not in have)
        return list(have.values()), False

    def _is_current(self, part: Part | None) -> bool:
        """Whether the bytes of a part are there: it was not sealed since it was looked at."""
        return part is not None and (
            part.data is not None or part.extent.stripe in self._log.unsealed
        )

    async def _extents(
        self, runs: list[tuple[int, Run]], without: Code | None
    ) -> list[tuple[int, Extent]]:
        """Return the extents of runs, except those in a code."""
        found = list[tuple[int, Extent]]()
        for ino, run in runs:
            await self._contents.settled(ino)
            found += [(ino, extent) for extent in self._wanted(ino, run, without)]
        return found

    def _wanted(self, ino: int, run: Run, without: Code | None) -> Iterator[Extent]:
        try:
            end = min(run.end, inode_of(self._log.engine, ino).size)
        except StaleError:
            return  # it was removed
        for extent in self._reader.extents(ino, run.start, end):
            if extent.stripe != LOST_STRIPE and (
                without is None or self.code_of(extent.stripe) != without
            ):
                yield extent

    def code_of(self, stripe: int) -> Code | None:
        """Return the code of a stripe; None if it is gone."""
        unsealed = self._log.unsealed.get(stripe)
        if unsealed is not None:
            return unsealed.code
        row = self._reader.stripe(stripe)
        return row.code if row is not None else None
