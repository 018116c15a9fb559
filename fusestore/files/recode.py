"""Recoding: existing files get another code, or are defragmented, while they are in use.

Files are rewritten one after another, each from its beginning to its end.  A file that is recoded
first gets the code for its new bytes; then its bytes in stripes of another code are rewritten.
Of a file that is defragmented, the fragmented runs are (`fragments`).  Up to RECODE_BYTES, of one
file or many, are rewritten at a time (`rewrite_batch`).  What changes meanwhile is rewritten again
if it still has another code, and else stays where it is.  This limits transactions, and it ends
although a file is written to all the time.  A read always returns the last written bytes, also
after a crash at any moment.

The extents of a file show whether it is done.  An interrupted recoding therefore
restarts its walk, and only checks these files.
"""

from __future__ import annotations

import logging
import stat
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

import trio

from ..errors import FusestoreError, LostError, StaleError, UsageError
from ..format import store_rows
from ..format.erasure import Code
from ..format.file_rows import Extent
from ..format.stripe_rows import LOST_STRIPE
from ..log.background_job import BackgroundJob, JobRow, Progress
from ..store.store import Store
from .contents import Contents
from .fragments import Run, fragmented, run_of, window
from .rewrite_batch import RewriteBatch
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
    """The code; empty: the code of new files in the directory of each file, or, if it is
    defragmented, the code that it has."""
    defragment: bool = False
    """Whether fragmented runs are rewritten."""
    files: int = 0
    total_files: int = 0
    size: int = 0
    total: int = 0
    """Files checked, the total number of files, and the bytes in them."""
    recoded: int = 0
    """Bytes rewritten since the start."""
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
        self._batch = RewriteBatch(store.log, store.reader, contents, rewriter, self._lost)
        self._nursery = nursery
        self._job = BackgroundJob(store.log, store_rows.RECODE_KEY, Recoding, REFUSALS)
        self._running = False
        self._began = (0.0, 0)
        """The start of this run, by trio's clock, and the bytes done before."""
        self._unreadable: dict[str, None] = {}

    @property
    def job(self) -> Recoding:
        """What is recoded, and how far."""
        return self._job.row

    # --- commands ------------------------------------------------------------

    async def start(
        self, ino: int, to: Code | None, rate: float | None, *, defragment: bool = False
    ) -> None:
        """Begin; UsageError if a recoding runs, or this is no file or directory."""
        path = (await self._tree.paths([ino]))[ino]
        self._job.check("begin")
        mode = self._tree.inode(ino).mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise UsageError("Only files and directories can be recoded.")
        with self._log.transaction() as txn:  # ReadOnlyError
            if to is not None:
                self._tree.codes.note(txn, to)
        row = Recoding(rate=rate, ino=ino, path=path, to=str(to or ""), defragment=defragment)
        self._job.begin(row)
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
        what = self._phase if self.job.total_files else "counting"
        return {"phase": what, "done": self.job.size, "total": self.job.total}

    @property
    def _phase(self) -> str:
        return "defragmenting" if self.job.defragment else "recoding"

    def status(self) -> dict[str, Any]:
        """Return its progress, with `waits_for` and `seconds_left`, None if unknown."""
        job = self.job
        since, before = self._began
        done, left = job.size - before, max(job.total - job.size, 0)
        seconds = None
        if job.state == "running" and done and not self._batch.waits_for:
            seconds = left * (trio.current_time() - since) / done
        return {
            **asdict(job),
            "waits_for": self._batch.waits_for,
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
        self._batch.begin(job.rate, partial(self._job.is_current, job), job.recoded)
        with Walk(self._tree, job.ino) as walk:
            for step in walk.files():
                for folder, ino in step:
                    try:
                        size = job.size
                        await self._file(job, folder, ino)
                        job.files += 1
                        job.size = size + self._tree.inode(ino).allocated
                    except StaleError:
                        pass  # it was removed
                    if not self._job.is_current(job):
                        return
                    self._job.note_after(self._limits.recode_note_seconds)
                await trio.lowlevel.checkpoint()
        await self._batch.flush()
        job.recoded = self._batch.moved

    async def _file(self, job: Recoding, folder: int, ino: int) -> None:
        """Rewrite what is to be rewritten of one file; StaleError if it is gone."""
        inode = self._tree.inode(ino)
        if not stat.S_ISREG(inode.mode):
            return
        code = before = Code(inode.k, inode.m)
        if job.to:
            code = Code.parse(job.to)
        elif not job.defragment:
            code = self._tree.codes.of(folder)
        if before != code:
            self._contents.set_code(ino, code)
        at = 0
        while self._job.is_current(job):
            await self._contents.settled(ino)
            found = self._store.reader.extents(ino, at, self._tree.inode(ino).size)
            extents, more = window(found, self._limits)
            if not extents:
                return
            runs, at = self._choose(job, extents, code, more=more)
            for run in runs:
                await self._batch.add(ino, run, code)
            job.recoded = self._batch.moved
            job.size += sum(extent.part(0, at).length for extent in extents if extent.offset < at)
            await trio.lowlevel.checkpoint()

    def _choose(
        self, job: Recoding, extents: list[Extent], code: Code, *, more: bool
    ) -> tuple[list[Run], int]:
        """Return the runs to rewrite in a window of a file, and the offset up to which it does."""
        runs, end = list[Run](), extents[-1].end
        if job.defragment:
            runs, end = fragmented(extents, self._limits, more=more)
        if job.defragment and not job.to:
            return runs, end

        def is_other(extent: Extent) -> bool:
            return (
                extent.offset < end
                and extent.stripe != LOST_STRIPE
                and self._batch.code_of(extent.stripe) != code
                and not any(run.start <= extent.offset < run.end for run in runs)
            )

        others = [run_of(list(group)) for is_it, group in groupby(extents, is_other) if is_it]
        return runs + others, end

    async def _lost(self, ino: int, error: LostError) -> None:
        path = (await self._tree.paths([ino]))[ino]
        if path not in self._unreadable and len(self._unreadable) < UNREADABLE_KEPT_MAX:
            logger.error("%s cannot be rewritten: %s", path, error)
            self._unreadable[path] = None
            self.job.unreadable += 1
