"""An open store: the engine, the nodes, the log, and the tasks that use them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from ..commit.committer import Committer
from ..commit.metadata_dump import MetadataDumper
from ..commit.reclaim import Reclaimer
from ..commit.row_keeper import RowKeeper
from ..config.store_config import StoreConfig
from ..errors import MetadataError
from ..format import store_rows
from ..format.store_rows import LogPosition
from ..grow.rebalance import Rebalancer
from ..grow.topology import Topology
from ..log.log import Log
from ..members.member import Member
from ..members.standing import State
from ..read.reader import Reader
from ..repair.comeback import Comeback
from ..repair.heal import Healer
from ..repair.rejoin import Rejoin
from ..repair.repairer import Repairer
from ..repair.scrub import Scrubber
from ..repair.writing_again import Resumption
from ..write.writer import Writer
from .make_room import RoomMaker
from .report import Reporter, read_only_advice

logger = logging.getLogger(__name__)


class Store:
    """The open store, for the file system and the control commands."""

    def __init__(self, config: StoreConfig, log: Log, nursery: trio.Nursery) -> None:
        self.config = config
        self.log = log
        self.reader = Reader(log)
        self.committer = Committer(log, nursery)
        self.writer = Writer(log, nursery, self.committer.ask)
        self.committer.writer = self.writer
        checkpoint = log.engine.get(store_rows.LOG_KEY)
        if checkpoint is not None:
            self.committer.checkpointer.reached = LogPosition.decode(checkpoint).commit
        nodes = log.engine.get(store_rows.NODES_KEY)
        self.committer.rows = store_rows.decode_nodes(nodes) if nodes else []
        self.rows = RowKeeper(log, self.committer)
        log.on_damage = self.rows.wake
        log.on_freed = self.committer.ask
        self.reclaimer = Reclaimer(log)
        self.dumper = MetadataDumper(log, self.committer)
        self.room_maker = RoomMaker(log, self.committer, self.reclaimer, self.dumper, nursery)
        self.healer = Healer(log, self.reader, self.committer)
        self.rejoin = Rejoin(log, self.committer, self.dumper, self.healer)
        resumption = Resumption(log, self.committer, self.healer, self.rejoin)
        self.comeback = Comeback(log, self.healer, self.rejoin, resumption)
        self.repairer = Repairer(
            log, self.reader, self.committer, self.healer, self.rejoin, resumption
        )
        self.rebalancer = Rebalancer(log, self.committer, self.repairer)
        self.topology = Topology(log, self.committer, self.repairer, self.rebalancer, self.comeback)
        self.scrubber = Scrubber(
            log, self.committer, self.healer, self.rejoin, self.rows, config.scrub_days
        )
        self.reporter = Reporter(
            config,
            log,
            self.reader,
            self.committer,
            self.repairer,
            self.scrubber,
            self.reclaimer,
            nursery,
        )
        self.status = self.reporter.status
        self.committer.checkpointer.on_checkpoint += [self.reclaimer.wake, self.comeback.wake]
        self.committer.on_commit.append(self.dumper.look)

    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """Return the background tasks of the open store."""
        parts = (self.reclaimer, self.dumper, self.comeback, self.scrubber, self.rebalancer)
        return [self.rows.run, *(partial(self._go_on, part.run) for part in parts)]

    async def _go_on(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run a task; restart it after a bad row, once the row may have been mended."""
        while True:
            try:
                await run()
            except MetadataError as error:
                logger.error("%s", error)
                self.log.on_damage()
                await trio.sleep(self.log.limits.probe_seconds)

    def warnings(self) -> list[str]:
        """Return a sentence for each node that is not up."""
        found = []
        for member in self.log.members.all:
            if member.state is not State.UP:
                why = f": {member.standing.error}" if member.standing.error else "."
                found.append(f"Node {member.name} is {member.state}{why}{self._advice(member)}")
        return found

    def _advice(self, member: Member) -> str:
        if member.state is State.FOREIGN:  # its error has the remedy
            return ""
        if member.config.offline:  # its error has the remedy
            return ""
        if member.standing.read_only:
            return read_only_advice(self.config, member)
        if member.state is not State.DOWN:
            return ""  # it is brought back
        return (
            " If its disk is not mounted, mount it. If its data is lost, run 'fusestore repair "
            f"{self.config.store} {member.name}'."
        )
