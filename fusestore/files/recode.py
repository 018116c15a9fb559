"""Recoding: existing files get another code, while they are read and written.

Files are recoded one after another.  New bytes of the file have the new code from then
on.  Then, from its beginning to its end, bytes in stripes of another code are read,
verified, and written to stripes of the new one.  One transaction, and therefore one
commit, gives up to RECODE_BYTES in up to RECODE_EXTENTS extents their new places, if
they have not changed since; otherwise they are read again.  Files up to this size are
recoded as a whole, larger ones run by run: this limits transactions, and a file with
constant writes would otherwise never be recoded.  A read always returns the last
written bytes, also after a crash at any moment.

The extents of a file show whether it is done.  An interrupted recoding therefore
restarts its walk, and only checks these files.
"""

from __future__ import annotations

import logging
import stat
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import trio

from ..errors import (
    FusestoreError,
    LostError,
    NoMemoryLeftError,
    NoSpaceError,
    StaleError,
    UsageError,
)
from ..format import store_rows
from ..format.erasure import Code
from ..format.file_rows import Extent
from ..format.stripe_rows import LOST_STRIPE
from ..log.background_job import BackgroundJob, JobRow, Progress
from ..log.pace import Pace
from ..store.store import Store
from .contents import Contents
from .rewriter import Rewriter
from .tree import Tree
from .walk import Walk

logger = logging.getLogger(__name__)

UNREADABLE_KEPT_MAX = 1000


REFUSALS = {
    "begin": "{path} is being recoded: wait for it, or stop it with --stop.",
    "stop": "Nothing is being recoded.",
}


@dataclass(slots=True)
class Recoding(JobRow):
    """The target of a recoding, and its progress."""

    ino: int = 0
    """A file, or a directory with all below it."""
    path: str = ""
    """Its path at the start."""
    to: str = ""
    """The code; empty: the code of new files in the directory of each file."""
    files: int = 0
    total_files: int = 0
    size: int = 0
    total: int = 0
    """Files checked, the total number of files, and the bytes in them."""
    recoded: int = 0
    """Bytes recoded since the start."""
    unreadable: int = 0
    """Files with unreadable bytes; these bytes keep their places."""


class Recoder:
    """Recodes a file or a tree in the background, one at a time."""

    def __init__(
        self,
        store: Store,
        tree: Tree,
        contents: Contents,
        rewriter: Rewriter,
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._log = store.log
        self._limits = store.log.limits
        self._tree = tree
        self._contents = contents
        self._rewriter = rewriter
        self._nursery = nursery
        self._job = BackgroundJob(store.log, store_rows.RECODE_KEY, Recoding, REFUSALS)
        self._running = False
        self._began = (0.0, 0)
        """The start of this run, by trio's clock, and the bytes done before."""
        self._waits_for = ""
        self._unreadable: dict[str, None] = {}

    @property
    def job(self) -> Recoding:
        """What is recoded, and how far."""
        return self._job.row

    # --- commands ------------------------------------------------------------

    async def start(self, ino: int, to: Code | None, rate: float | None) -> None:
        """Begin; UsageError if a recoding runs, or this is no file or directory."""
        path = (await self._tree.paths([ino]))[ino]
        self._job.check("begin")
        mode = self._tree.inode(ino).mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise UsageError("Only files and directories can be recoded.")
        with self._log.transaction() as txn:  # ReadOnlyError
            if to is not None:
                self._tree.codes.note(txn, to)
        self._job.begin(Recoding(rate=rate, ino=ino, path=path, to=str(to or "")))
        self._unreadable.clear()
        self.resume()

    def stop(self) -> None:
        """Stop it at its present place; UsageError if none runs."""
        self._job.stop()

    async def wait(self, progress: Progress) -> dict[str, Any]:
        """Return after it has ended, or if it cannot continue before the next mount."""
        await self._job.wait(self._progress, progress)
        return self.status()

    def _progress(self) -> dict[str, Any] | None:
        if not self._running:
            return None
        what = "recoding" if self.job.total_files else "counting"
        return {"phase": what, "done": self.job.size, "total": self.job.total}

    def status(self) -> dict[str, Any]:
        """Return its progress, with `waits_for` and `seconds_left`, None if unknown."""
        job = self.job
        since, before = self._began
        done, left = job.size - before, max(job.total - job.size, 0)
        seconds = None
        if job.state == "running" and done and not self._waits_for:
            seconds = left * (trio.current_time() - since) / done
        return {
            **asdict(job),
            "waits_for": self._waits_for,
            "seconds_left": seconds,
            "unreadable_files": list(self._unreadable),
        }

    def resume(self) -> None:
        """Continue with the remaining files."""
        if self._job.is_running and not self._running:
            self._running = True
            self._nursery.start_soon(self._run)

    # --- the work ------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while self._job.is_running:
                job = self.job
                await self._count(job)
                await self._all_files(job)
                await self._store.committer.commit()
                if self._job.is_current(job):
                    self._job.end()
        except FusestoreError as error:
            logger.error("Recoding stopped: %s The next mount continues it.", error)
        finally:
            self._running = False

    async def _count(self, job: Recoding) -> None:
        """Count the files to check, for the progress; files made meanwhile are added."""
        job.files = job.total_files = job.size = job.total = job.unreadable = 0
        files = total = 0
        with Walk(self._tree, job.ino) as walk:
            for step in walk.files():
                for _, ino in step:
                    files += 1
                    total += self._tree.inode(ino).allocated
                await trio.lowlevel.checkpoint()
        job.total_files, job.total = files, total
        self._began = trio.current_time(), 0

    async def _all_files(self, job: Recoding) -> None:
        pace = Pace(self._log, job.rate)
        with Walk(self._tree, job.ino) as walk:
            for step in walk.files():
                for folder, ino in step:
                    try:
                        code = Code.parse(job.to) if job.to else self._tree.codes.of(folder)
                        before = job.size
                        await self._file(job, ino, code, pace)
                        job.files += 1
                        job.size = before + self._tree.inode(ino).allocated
                    except StaleError:
                        pass  # it was removed
                    if not self._job.is_current(job):
                        return
                    self._job.note_after(self._limits.recode_note_seconds)
                await trio.lowlevel.checkpoint()

    async def _file(self, job: Recoding, ino: int, code: Code, pace: Pace) -> None:
        """Recode one file; StaleError if it is gone."""
        inode = self._tree.inode(ino)
        if not stat.S_ISREG(inode.mode):
            return
        if (inode.k, inode.m) != (code.k, code.m):
            self._contents.set_code(ino, code)
        at, begun = 0, job.size
        while self._job.is_current(job):
            await self._contents.settled(ino)
            found = self._store.reader.extents(ino, at, self._tree.inode(ino).size)
            rows = list(islice(found, self._limits.recode_extents))
            if not rows:
                return
            run, end = self._choose(rows, code)
            if run:
                length = sum(extent.length for extent in run)
                await pace.spend(length + length * code.n // code.k)
                parts, lost = await self._rewriter.read((ino, extent) for extent in run)
                for error in lost.values():
                    await self._lost(ino, error)
                try:
                    moved, _ = await self._rewriter.write(code, parts)
                except (NoMemoryLeftError, NoSpaceError) as error:
                    self._waits_for = str(error)
                    await trio.sleep(self._limits.recode_retry_seconds)
                    continue
                self._waits_for = ""
                job.recoded += moved
                if moved < sum(part.length for part in parts):
                    continue  # some of it was changed meanwhile
            else:
                await trio.lowlevel.checkpoint()
            at = end
            job.size = begun + sum(extent.length for extent in rows if extent.end <= end)
            begun = job.size

    def _choose(self, rows: list[Extent], code: Code) -> tuple[list[Extent], int]:
        """Return the extents of one transaction, and the offset up to which it does the file."""
        run: list[Extent] = []
        size = 0
        for extent in rows:
            if extent.stripe == LOST_STRIPE or self._code(extent.stripe) == code:
                continue
            if run and size + extent.length > self._limits.recode_bytes:
                return run, extent.offset
            run.append(extent)
            size += extent.length
        return run, rows[-1].end

    def _code(self, stripe: int) -> Code | None:
        unsealed = self._log.unsealed.get(stripe)
        if unsealed is not None:
            return unsealed.code
        row = self._store.reader.stripe(stripe)
        return row.code if row is not None else None

    async def _lost(self, ino: int, error: LostError) -> None:
        path = (await self._tree.paths([ino]))[ino]
        if path not in self._unreadable and len(self._unreadable) < UNREADABLE_KEPT_MAX:
            logger.error("%s cannot be recoded: %s", path, error)
            self._unreadable[path] = None
            self.job.unreadable += 1
