"""Wrong rows of an open store are mended while it is in use.

A reader of a row that does not match its checksum gets an error (BadRowError); the row
is never used.  After such an error, and in each scrub, all rows are examined.  Rows that
differ from the journals are logged again with their right value, like any change.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import trio

from ..errors import (
    ComparisonError,
    DamagedMetadataError,
    MetadataError,
    NodeError,
    NotDurableError,
    ReplayError,
)
from ..format import store_rows, stripe_rows
from ..format.records import Changes
from ..format.store_rows import Counters
from ..format.stripe_rows import SegmentState
from ..log.log import Log
from ..system import threads
from .committer import Committer
from .row_check import Examined, WrongRow, checkpoint_of, examine, still_wrong, wrong_rows

logger = logging.getLogger(__name__)

_TOLD_MAX = 20
"""The number of rows that are logged each time that rows are mended."""


class RowKeeper:
    """Examines all rows on request, and mends them."""

    def __init__(self, log: Log, committer: Committer) -> None:
        self._log = log
        self._committer = committer
        self._busy = trio.Lock()
        self._wake = trio.Event()

    def wake(self) -> None:
        """Run soon: a wrong row was found."""
        self._wake.set()

    async def run(self) -> None:
        """Mend rows whenever a wrong row was found, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            pause = self._log.limits.probe_seconds
            try:
                await self.mend()
            except (MetadataError, ReplayError, NodeError, NotDurableError) as error:
                logger.error("The metadata cannot be mended: %s", error)
                pause = self._log.limits.retry_seconds_max  # each attempt reads all journals
            await trio.sleep(pause)

    async def compare(self, *, thorough: bool = False) -> tuple[Examined, list[WrongRow]]:
        """Examine all rows, and compare them with the journals if some are wrong.

        With `thorough`, always compare them: checksums do not reveal errors of the program
        itself.

        ReplayError if the journals do not lead to the database's commit.
        """
        engine = self._log.engine
        await self._write_position()
        with engine.view() as view:
            found = await threads.run_sync(examine, view)
            if found.is_right and not thorough:
                return found, []
            nodes = [member.watched for member in self._log.members.all if not member.out_of_use]
            directory = self._log.members.config.metadata
            arguments = (view, self._log.store, nodes, directory, self._log.limits)
            return found, await threads.run_sync(wrong_rows, *arguments)

    async def _write_position(self) -> None:
        """Make a checkpoint if the row that names the last one is damaged.

        No journal has this row, but each checkpoint writes it.
        """
        try:
            with self._log.engine.view() as view:
                checkpoint_of(view)
        except DamagedMetadataError:
            if not self._log.read_only:
                async with self._committer.lock:
                    with suppress(NotDurableError):
                        await self._committer.commit_now(checkpoint=True)

    async def mend(self, *, thorough: bool = False) -> list[str]:
        """Mend rows from the journals; a line for each wrong row.

        ReplayError, ComparisonError or DamagedMetadataError if the right values are not available.
        """
        async with self._busy:
            try:
                found, rows = await self.compare(thorough=thorough)
            except (ReplayError, ComparisonError, DamagedMetadataError):
                self._log.rows_in_doubt += 1
                raise
            if found.is_right and not rows:
                return []
            texts = [str(row) for row in rows]
            for text in texts[:_TOLD_MAX]:
                logger.error("The metadata is damaged: %s. It is mended.", text)
            if self._log.read_only or self._log.broken:
                self._log.rows_in_doubt += len(rows)
                return texts
            changes = still_wrong(self._log.engine, rows)
            self._apply(changes)
            self._log.rows_mended += len(changes)
            self._log.rows_in_doubt = len(self._log.doubted)  # all rows were compared
            self._log.engine.recount()
            async with self._committer.lock:
                await self._committer.commit_now(checkpoint=True)
            return texts or ["the counts of rows are wrong"]

    def _apply(self, changes: Changes) -> None:
        """Log the rows again; with no other changes pending, update their copies in memory."""
        idle = not self._log.pending
        self._log.apply(changes)
        for key, value in changes.items() if idle else ():
            if key == store_rows.COUNTERS_KEY and value is not None:
                self._log.counters = Counters.decode(value)
            elif key[:1] == stripe_rows.SEGMENTS_START:
                node, segment = stripe_rows.decode_segment_key(key)
                member = self._log.members.by_id.get(node)
                if member is not None and value is not None:
                    member.shards.states[segment] = SegmentState.decode(value)
