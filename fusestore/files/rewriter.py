"""Rewriting: bytes of files get another place, while the files are read and written.

What is to move is read and verified like any read, and written to stripes of its own, since
what is old lives longer than what is new.  One transaction, and therefore one commit, gives some
extents their new places, if they have not changed since they were read.  A read always returns
the bytes that were written last, also after a crash at any moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import trio

from ..errors import LostError
from ..format.erasure import Code
from ..format.file_rows import Extent
from ..log.log import Log
from ..read.reader import Reader
from ..write.writer import Writer
from .contents import Contents, Part

_GAP_BYTES_MAX = 64 << 10
"""Bytes that are read in vain, rather than to read twice."""
_EXTRA_STRIPES = 4


class Rewriter:
    """Moves bytes of files, for cleaning and recoding."""

    def __init__(self, log: Log, reader: Reader, writer: Writer, contents: Contents) -> None:
        self._log = log
        self._limits = log.limits
        self._reader = reader
        self._writer = writer
        self._contents = contents

    async def read(
        self, extents: Iterable[tuple[int, Extent]]
    ) -> tuple[list[Part], dict[int, LostError]]:
        """Return the bytes of extents, by inode, and the inodes of those that cannot be read."""
        parts, lost = list[Part](), dict[int, LostError]()
        by_place = sorted(extents, key=lambda item: (item[1].stripe, item[1].stripe_offset))
        for near in _runs(by_place):
            stripe = near[0][1].stripe
            if stripe in self._log.unsealed:
                parts += [Part(ino, extent, None) for ino, extent in near]
                continue
            start, end = near[0][1].stripe_offset, _end(near[-1][1])
            try:
                data = memoryview(await self._reader.read_stripe(stripe, start, end))
            except LostError as error:
                # What was freed meanwhile is not lost.
                lost |= {ino: error for ino, extent in near if self._contents.has(ino, extent)}
                continue
            for ino, extent in near:
                at = extent.stripe_offset - start
                parts.append(Part(ino, extent, data[at : at + extent.length]))
        return parts, lost

    async def write(
        self, code: Code, parts: Iterable[Part], *, in_reserve: bool = False
    ) -> tuple[int, int]:
        """Give bytes their new places; return how many have moved, and the waste that is gone.

        With `in_reserve`, they may use half of the reserve, because others become free.
        NoSpaceError.
        """
        ordered = sorted(parts, key=lambda part: (part.ino, part.extent.offset))
        moved = freed = 0
        for start in range(0, len(ordered), self._limits.rewrite_extents):
            some = ordered[start : start + self._limits.rewrite_extents]
            length = sum(part.length for part in some)
            await self._writer.room(length, extra=_EXTRA_STRIPES)
            before = self._log.waste
            moved += self._contents.rewrite(code, some, in_reserve=in_reserve)
            freed += before - self._log.waste
            await trio.lowlevel.checkpoint()
        return moved, freed


def _end(extent: Extent) -> int:
    return extent.stripe_offset + extent.length


def _is_near(before: Extent, extent: Extent) -> bool:
    gap = extent.stripe_offset - _end(before)
    return extent.stripe == before.stripe and gap <= _GAP_BYTES_MAX


def _runs(extents: list[tuple[int, Extent]]) -> Iterator[list[tuple[int, Extent]]]:
    """Yield extents that lie so close together that they are read at once."""
    run: list[tuple[int, Extent]] = []
    for item in extents:
        if run and not _is_near(run[-1][1], item[1]):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
