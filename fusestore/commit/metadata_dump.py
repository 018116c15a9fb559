"""The metadata dump: all tables are written to the journals, and older journals deleted.

All tables are dumped as METADATA_DUMP records, a few keys at a time, while changes
continue.  Changes are absolute: the dump, with every commit replayed from the one at
which it began, gives the state.  A dump counts when the commit that names it is
durable; until then the previous dump and its commits stay.
"""

from __future__ import annotations

import json
import logging
import math
from itertools import islice

import trio

from ..errors import DamagedMetadataError, MetadataError, NodeError, NotDurableError
from ..format import store_rows
from ..format.records import Changes, Header, Kind, SegmentKind, checksum, encode_changes
from ..format.store_rows import LogPosition
from ..limits import MIB
from ..log.log import Log
from ..nodes.base import Node
from ..system import threads
from ..text import counted
from .committer import Committer
from .row_check import examine

logger = logging.getLogger(__name__)

_UNWRITTEN_BYTES = 4 * MIB
"""What the tables may take more than the pages of the database."""
_FIRST, _END = b"A", b"["
"""All tables lie between these keys; the super table lies above `Z` and below `[`."""


class MetadataDumper:
    """Dumps the metadata when the journal since the last dump is larger than the dump."""

    def __init__(self, log: Log, committer: Committer) -> None:
        self._log = log
        self._limits = log.limits
        self._committer = committer
        self._wake = trio.Event()
        self._ended = trio.lowlevel.ParkingLot()
        """Tasks that wait for the end of a dump."""
        self._not_before = -math.inf
        """By trio's clock: when the metadata may have been mended, after it was damaged."""
        value = log.engine.get(store_rows.METADATA_DUMP_KEY)
        row = json.loads(value) if value else {"bytes": 0, "segment": 0}
        self.last_bytes: int = row["bytes"]
        """The size of the last metadata dump, and the journal segment in which it begins."""
        self.first_segment: int = row["segment"]

    def look(self) -> None:
        """After a commit: start a dump if one is due."""
        grown = max(0, self._committer.journal.commit_bytes)
        tables = self._log.engine.bytes_in_use + _UNWRITTEN_BYTES
        self._log.room.dump_bytes = min(self.last_bytes + grown, tables)
        if self.is_due:
            self._wake.set()

    @property
    def is_due(self) -> bool:
        """Whether the journal has outgrown the last dump; when room is short, much earlier."""
        log, limits = self._log, self._limits
        if trio.current_time() < self._not_before:
            return False
        grown = self._committer.journal.commit_bytes
        most = max(limits.dump_journal_bytes_min, self.last_bytes)
        if log.room.is_short:
            most = min(most, limits.reserve_bytes // (4 * len(log.members.all)))
        return log.journal_gaps > 0 or (grown > most and log.room.has_for_dump())

    async def done(self) -> None:
        """Return when the dump that is due, if one is, has ended."""
        if self._wake.is_set():
            await self._ended.park()

    async def fill_gaps(self) -> None:
        """Return when a dump has replaced what no node can read, or has failed."""
        for _ in range(2):  # one that runs already may have begun before they were found
            if self._log.journal_gaps:
                self.look()
                await self.done()

    async def run(self) -> None:
        """Dump the metadata whenever a dump is due, until cancelled."""
        while True:
            await self._wake.wait()
            try:
                await self.take()
            except NotDurableError as error:
                logger.error("No metadata dump: %s", error)
            except MetadataError as error:
                # The pieces so far do not count: the older dump and all journals after it,
                # which have the rows, stay.
                logger.error("No metadata dump: %s", error)
                self._log.on_damage()
                self._not_before = trio.current_time() + self._limits.retry_seconds_max
            self._wake = trio.Event()
            self._ended.unpark_all()

    async def take(self) -> None:
        """Dump all tables, then delete the journal segments that are no longer needed.

        DamagedMetadataError if rows are wrong or missing: the dump would replace the
        journals that have them.
        """
        await self._examine()
        committer = self._committer
        async with committer.lock:
            gaps = self._log.journal_gaps
            committer.journal.roll()
            committer.journal.commit_bytes = 0
            first_segment = committer.journal.segment
            begin = self._log.position
        total = pieces = 0
        start: bytes | None = _FIRST
        while start is not None:
            piece, start = await self._piece(start)
            payload = encode_changes(piece)
            total += len(payload)
            pieces += 1
            header = Header(
                Kind.METADATA_DUMP,
                len(payload),
                checksum(payload, len(payload)),
                self._log.position.epoch,
                begin.commit,
            )
            async with committer.lock:
                self._check_epoch(begin)
                await committer.journal.append(header, payload)
        row = {
            "commit": begin.commit,
            "checksum": begin.checksum,
            "segment": first_segment,
            "pieces": pieces,
            "bytes": total,
        }
        async with committer.lock:
            await committer.commit_now()  # nodes that failed and lack a part are out of the set
            self._check_epoch(begin)
            self._log.apply({store_rows.METADATA_DUMP_KEY: json.dumps(row).encode()})
            await committer.commit_now()
        self.last_bytes, self.first_segment = total, first_segment
        # The dump must certainly count before the journals that it replaces are deleted.
        async with committer.lock:
            await committer.commit_now(cover=True)
        self._log.journal_gaps -= gaps
        await self._delete_before(first_segment)

    def _check_epoch(self, begin: LogPosition) -> None:
        """NotDurableError if the mount was read-only meanwhile: nodes may lack pieces."""
        if self._log.broken or self._log.position.epoch != begin.epoch:
            raise NotDurableError("Too few nodes were in use meanwhile.")

    async def _examine(self) -> None:
        with self._log.engine.view() as view:
            found = await threads.run_sync(examine, view)
        if not found.is_right:
            what = counted(
                len(found.bad),
                "row does not match its checksum",
                "rows do not match their checksums",
            )
            if found.miscounted:
                what += f", and the sums of {', '.join(found.miscounted)} are wrong"
            raise DamagedMetadataError(f"The metadata is damaged: {what}.")

    async def _piece(self, start: bytes) -> tuple[Changes, bytes | None]:
        """The next rows from `start` on, and the next start, None at the end."""
        piece: dict[bytes, bytes | None] = {}
        size = 0
        while size < self._limits.dump_piece_bytes:
            rows = 0
            for key, value in islice(
                self._log.engine.scan(start, _END), self._limits.dump_step_keys
            ):
                piece[key] = value
                size += len(key) + len(value)
                rows += 1
                start = key + b"\0"
                if size >= self._limits.dump_piece_bytes:
                    return piece, start
            if rows < self._limits.dump_step_keys:
                return piece, None
            await trio.lowlevel.checkpoint()
        return piece, start

    async def _delete_before(self, segment: int) -> None:
        """Delete the journals before `segment`, once a checkpoint is past it too.

        They are kept while the history is in doubt; the next dump deletes them.
        """
        await self._committer.checkpoint()
        if self._log.doubt or self._log.keeps_all:
            return
        async with self._log.journals:
            for member in self._log.members.in_sync:
                node = member.node

                def delete(node: Node = node) -> None:
                    for old in node.segments(SegmentKind.JOURNAL):
                        if old < segment:
                            node.delete(SegmentKind.JOURNAL, old)

                try:
                    await member.call(delete)
                except NodeError as error:
                    member.fail(error)
