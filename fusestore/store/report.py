"""The report of an open store: the fields of `fusestore status --json`.

Only `count_missing` takes longer with more stripes, and runs in a thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import trio

from ..commit.committer import Committer
from ..commit.reclaim import Reclaimer
from ..config.store_config import StoreConfig
from ..errors import DamagedMetadataError, NodeError, NotDurableError, ShortageError
from ..format import keys, stripe_rows
from ..format.placement import check_region_rule
from ..format.stripe_rows import LOST_STRIPE
from ..log.log import Log
from ..log.owners import extents_of
from ..members.member import Member
from ..members.standing import State
from ..metadata.view import View
from ..read.reader import Reader
from ..repair.repairer import Repairer
from ..repair.scrub import Scrubber
from ..system import threads

T = TypeVar("T")
_DAMAGED = (
    "A row of the metadata does not match its checksum: it is mended if the journals have it."
)
Missing = dict[int, int]
"""By node: the number of shards that it lacks."""


def count_missing(view: View) -> Missing | None:
    """In a thread: count the shards that nodes lack in a view of `missing`, and close it.

    None if a row is damaged.
    """
    with view:
        found: Counter[int] = Counter()
        try:
            for count, (key, _) in enumerate(view.scan(b"M", keys.after(b"M"))):
                found[stripe_rows.decode_missing_key(key)[0]] += 1
                if count % 256 == 0:
                    time.sleep(0)  # let the event loop run first
        except DamagedMetadataError:
            return None
        return dict(found)


_METADATA = 0
"""Stands for the metadata among the ids of nodes, which begin at 1."""


def _unread(log: Log) -> str:
    """Return a sentence about journals that could not be read; a mount writes them anew itself."""
    names = ", ".join(sorted(log.unread_journals))
    if names and log.read_only:
        return f"The journals of {names} cannot be read completely."
    if log.journal_gaps:
        return "A part of the journals cannot be read until a metadata dump has replaced it."
    return ""


def read_only_advice(config: StoreConfig, member: Member) -> str:
    """Return a sentence, after a space, for a node whose file system is read-only."""
    return (
        " It is used again when its file system is writable; before you unmount its disk, run "
        f"'fusestore node offline {config.store} {member.name}'."
    )


class Reporter:
    """Reports the state of the parts of an open store."""

    def __init__(
        self,
        config: StoreConfig,
        log: Log,
        reader: Reader,
        committer: Committer,
        repairer: Repairer,
        scrubber: Scrubber,
        reclaimer: Reclaimer,
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._log = log
        self._reader = reader
        self._committer = committer
        self._repairer = repairer
        self._scrubber = scrubber
        self._reclaimer = reclaimer
        self._nursery = nursery
        self._measuring: dict[int, trio.Event] = {}
        """The nodes that are being measured, by id, and _METADATA."""
        self._counting = trio.CapacityLimiter(1)
        self._damaged = False
        """The report under way has met a damaged row."""

    async def status(self) -> dict[str, Any]:
        """Return the current fields, after checking and measuring every node.

        A shard that was rebuilt counts when a commit has recorded this.
        """
        await self.measure()
        if self._rebuilt_uncommitted() and not self._log.read_only:
            with (
                trio.move_on_after(self._log.limits.read_seconds_max),
                suppress(NotDurableError, ShortageError),
            ):
                await self._committer.commit_apart()
        view, uncommitted = self._log.engine.view(b"M"), self._rebuilt_uncommitted()
        async with self._counting:
            found = await threads.call(count_missing, view)
        return self.report(found if found is None else dict(uncommitted + Counter(found)))

    def _rebuilt_uncommitted(self) -> Counter[int]:
        """Count by node the shards that a crash would make missing again."""
        found: Counter[int] = Counter()
        engine, batch = self._log.engine, self._committer.flushing
        for changes in (self._log.pending, batch.changes if batch is not None else {}):
            for key, value in changes.items():
                if value is None and key[:1] == b"M":
                    node, stripe, _ = stripe_rows.decode_missing_key(key)
                    if engine.get(stripe_rows.stripe_key(stripe)) is not None:  # not deleted
                        found[node] += 1
        return found

    async def measure(self) -> None:
        """Check that the nodes in use are present, and measure the room there and of the metadata.

        Returns after `read_seconds_max`; late nodes are measured further.
        """
        for member in self._log.members.all:
            if not member.out_of_use and member.id not in self._measuring:
                self._measuring[member.id] = trio.Event()
                self._nursery.start_soon(self._measure, member)
        if _METADATA not in self._measuring:
            self._measuring[_METADATA] = trio.Event()
            self._nursery.start_soon(self._measure_metadata)
        with trio.move_on_after(self._log.limits.read_seconds_max):
            for measured in list(self._measuring.values()):
                await measured.wait()

    async def _measure(self, member: Member) -> None:
        try:
            await member.call(member.sample)
            member.used = await member.call(member.node.bytes_used)
        except NodeError as error:
            member.fail(error)
            self._committer.ask()
        finally:
            self._measuring.pop(member.id).set()

    async def _measure_metadata(self) -> None:
        await self._log.sample_metadata()
        self._log.room.refresh()
        self._measuring.pop(_METADATA).set()

    def _row(self, read: Callable[[], T], otherwise: T) -> T:
        """Return what is in a row; `otherwise` if it is damaged, which is noted and mended."""
        try:
            return read()
        except DamagedMetadataError:
            self._found_damage()
            return otherwise

    def _found_damage(self) -> None:
        self._damaged = True
        self._log.on_damage()

    def report(self, counted: Missing | None) -> dict[str, Any]:
        """Return the fields as far as they are known without I/O on a node.

        `counted` is from `count_missing`.  Damaged rows are one of the problems.
        """
        log, committer = self._log, self._committer
        members = log.members
        self._damaged = False
        if counted is None:
            self._found_damage()
        missing = counted or {}
        codes = self._row(log.codes, [log.code])
        none: list[dict[str, Any]] = []
        repairs = self._row(self._repairer.past, none)
        lacking = {
            m.id
            for m in members.all
            if m.state is not State.UP or missing.get(m.id) or m.shards.lost
        }
        whole = not lacking
        empty = {
            m.id
            for m in members.all
            if m.config.draining and not m.shards.states and not missing.get(m.id)
        }
        unused = {member.id for member in members.all if member.out_of_use}
        size, free = log.usable()
        lost = self._row(lambda: sum(e.length for _, e in extents_of(log.engine, LOST_STRIPE)), 0)
        problem = log.broken or members.waiting() or log.room.waits
        metadata_problem = log.metadata_error or log.metadata_stall or _unread(log)
        if self._damaged:
            metadata_problem = metadata_problem or _DAMAGED
        try:
            metadata_bytes = log.engine.bytes_used
        except OSError:
            metadata_bytes = 0
        return {
            "healthy": whole
            and not problem
            and not metadata_problem
            and not log.rows_in_doubt
            and not lost,
            "store": str(self._config.store),
            "uuid": str(self._config.uuid),
            "code": str(log.code),
            "unsafe_codes": [
                str(code) for code in codes if check_region_rule(code, members.config.regions)
            ],
            "regions_borne": members.losses_borne(codes, lacking - empty),
            "readable": members.losses_borne(codes, unused - empty) >= 0,
            "read_only": log.read_only or bool(log.broken),
            "error": problem,
            "metadata_error": metadata_problem,
            "files": log.counters.files,
            "bytes": log.counters.file_bytes,
            "bytes_total": size,
            "bytes_free": free,
            "full": log.room.full(),
            "stripes": log.counters.stripes,
            "last_commit": log.position.commit,
            "last_commit_at": committer.committed_at,
            "uncommitted_bytes": log.unwritten(),
            "checkpoint": committer.checkpointer.reached,
            "epoch": log.position.epoch,
            "metadata_bytes": metadata_bytes,
            "degraded_reads": self._reader.degraded,
            "failed_reads": self._reader.errors,
            "rows_mended": log.rows_mended,
            "rows_in_doubt": log.rows_in_doubt,
            "lost_bytes": lost,
            "stripes_put_back": log.stripes_put_back,
            "repair": self._repair(missing),
            "repairs": repairs,
            "scrub": self._scrubber.report(),
            "quarantine": self._quarantine(),
            "nodes": [self._node(member, missing.get(member.id, 0)) for member in members.all],
        }

    def _quarantine(self) -> dict[str, Any] | None:
        """Return the segments that are kept although in no table, and why; None if none are."""
        if not self._log.doubt:
            return None
        found = self._reclaimer.strays.found.values()
        strays = [size for segments in found for size in segments.values()]
        return {"why": self._log.doubt, "segments": len(strays), "bytes": sum(strays)}

    def _node(self, member: Member, missing: int) -> dict[str, Any]:
        space = member.space if not member.out_of_use else None
        error = member.standing.error or (member.lacks_room if missing else "")
        if error and member.standing.read_only and not self._log.read_only:
            error += read_only_advice(self._config, member)
        return {
            "name": member.name,
            "region": member.config.region,
            "path": str(member.config.path),
            "weight": member.config.weight,
            "draining": member.config.draining,
            "state": str(member.state),
            "in_sync": member.in_sync,
            "error": error,
            "bytes_used": member.used if space else 0,
            "bytes_free": space.free if space else 0,
            "bytes_total": space.total if space else 0,
            "missing_shards": missing,
            "checksum_failures": member.corrupt,
        }

    def _repair(self, missing: Missing) -> dict[str, Any] | None:
        """Return the running repair, with `eta_seconds`, the time to the end of its phase."""
        running = self._repairer.healer.running
        if running is None:
            return None
        healing = running.phase == "healing"
        total = running.done + missing.get(running.node, 0) if healing else running.total
        seconds = time.monotonic() - running.since if running.since else 0.0
        known = 0 < running.done < total
        eta = seconds * (total - running.done) / running.done if known else None
        return {
            "node": self._log.members.by_id[running.node].name,
            "by_itself": running.by_itself,
            "phase": running.phase,
            "unit": "shards" if healing else "bytes",
            "done": running.done,
            "total": total,
            "seconds": seconds,
            "eta_seconds": eta,
        }
