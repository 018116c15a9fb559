"""Checkpoints: the changes of flushed commits are written to the metadata database.

A commit sets the changes so far aside (`freeze`).  After it is flushed (`flushed`) they
may be written, in one transaction in a thread, while operations continue.  A failed
checkpoint loses nothing: these changes are still in memory.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import trio
from outcome import Outcome

from ..errors import FencedError, InvariantError, MetadataError, NotDurableError
from ..format import store_rows
from ..format.store_rows import LogPosition
from ..log.log import Log
from ..system import threads
from ..tally import Histogram

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes the metadata database, one checkpoint at a time."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._limits = log.limits
        self._lock = trio.Lock()
        self._at = trio.current_time()
        self._frozen_at: LogPosition | None = None
        """The position of the commit up to which changes are set aside, once it is flushed."""
        self.reached = 0
        """The commit up to which the metadata database is complete."""
        self.took = Histogram()
        """The duration of each checkpoint."""
        self.on_checkpoint: list[Callable[[], None]] = []

    def is_due(self) -> bool:
        """Return whether enough changes wait, or some wait for long enough."""
        changed = self._log.engine.changed_keys
        return changed > 0 and (
            changed >= self._limits.checkpoint_changes_max
            or self._log.frees_much
            or trio.current_time() - self._at >= self._limits.checkpoint_seconds_max
        )

    @property
    def is_unflushed(self) -> bool:
        """Whether changes are set aside, and no flushed commit contains them."""
        return self._log.engine.frozen and self._frozen_at is None

    def flushed(self, position: LogPosition) -> None:
        """The changes set aside are flushed, with the commit at this position."""
        self._frozen_at = position

    @property
    def is_owed(self) -> bool:
        """Whether changes may be written, and no checkpoint runs."""
        return self._frozen_at is not None and not self._lock.locked()

    async def write_later(self) -> None:
        """Write a checkpoint that no caller waits for; if it fails, a later commit retries it."""
        with contextlib.suppress(NotDurableError):
            await self.write()

    async def write(self) -> None:
        """Write the changes set aside, if the commit that set them aside has been flushed.

        NotDurableError if the metadata cannot be written.  The changes are kept,
        and the journals have them; see `Log.usable` for what may grow meanwhile.
        """
        async with self._lock:
            engine, position = self._log.engine, self._frozen_at
            if position is None:
                return
            if position.commit > self._log.position.commit:
                raise InvariantError(f"A checkpoint is ahead of commit {position.commit}.")
            engine.amend({store_rows.LOG_KEY: position.encode()})
            began = time.perf_counter_ns()
            try:
                await self._write_in_thread()
            except FencedError as error:
                self._log.break_(str(error), for_good=True)
                raise NotDurableError(str(error)) from error
            except MetadataError as error:
                kept = f"{error} What is not written yet is kept in memory."
                if not self._log.metadata_error and not self._log.is_ending:
                    logger.error("%s The checkpoint will be tried again.", kept)
                self._log.metadata_error = kept
                with contextlib.suppress(MetadataError):  # the next checkpoint tries again
                    engine.after_failure()
                raise NotDurableError(str(error) if self._log.is_ending else kept) from error
            self._log.metadata_error = ""
            self._frozen_at = None
            engine.thaw()
            await self._log.sample_metadata()
            self._log.room.checkpointed()
            self._at = trio.current_time()
            self.took.add(time.perf_counter_ns() - began)
            self.reached = position.commit
        for callback in self.on_checkpoint:
            callback()

    async def _write_in_thread(self) -> None:
        """Write, and say so while the disk does not answer; MetadataError, FencedError."""
        ended = trio.Event()
        outcomes: list[Outcome[None]] = []

        def on_end(outcome: Outcome[None]) -> None:
            outcomes.append(outcome)
            ended.set()

        job = threads.start(self._log.engine.write, on_end)
        with trio.CancelScope(shield=True):
            if job.got_thread is not None:
                await job.got_thread.wait()
            with trio.move_on_after(self._limits.node_seconds_max):
                await ended.wait()
            if not ended.is_set():
                self._log.metadata_stall = (
                    "The disk of the metadata does not answer: the nodes keep all changes, and a "
                    "checkpoint follows when it answers."
                )
                logger.error("%s", self._log.metadata_stall)
                await ended.wait()
                self._log.metadata_stall = ""
                logger.info("The disk of the metadata answers again.")
        outcomes[0].unwrap()
