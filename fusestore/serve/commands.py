"""The commands of the control socket: each is a function of a context and a request.

A daemon and a command that opens a store itself run the same functions.  Only
`handlers` converts requests and results from and to JSON.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..errors import (
    DamagedMetadataError,
    InvalidError,
    NotDurableError,
    NotMountedError,
    UsageError,
)
from ..files.filesystem import FileSystem
from ..format.stripe_rows import LOST_STRIPE
from ..log.owners import extents_of
from ..repair.risk import Rates, Safety
from ..repair.unmounted_disk import check_disk
from ..rescue.fsck import fsck as check_tables
from ..store.store import Store
from ..system import logs, threads
from ..text import counted
from ..typed_json import FieldError, from_json, to_json
from ..watch.counts import LiveCounts
from ..watch.fields import Cleaning, MountStatus, Recoding, Scrub, Status
from ..watch.health import status_of
from .control_client import Message, Progress
from .control_server import Handler
from .messages.files import LayoutRequest, LayoutResult, QuotaRequest, QuotaResult, RecodeRequest
from .messages.mount import (
    CompactRequest,
    CompactResult,
    LogLevelRequest,
    LogLevelResult,
    MetricsRequest,
    MetricsResult,
    StatusRequest,
    StopRequest,
    StopResult,
)
from .messages.nodes import (
    NodeAdded,
    NodeAddRequest,
    NodeDrained,
    NodeDrainRequest,
    NodeOfflineRequest,
    NodeOnlineRequest,
    NodeRemoved,
    NodeRemoveRequest,
    NodesRequest,
    NodesResult,
    NodeState,
    Rebalance,
    RebalanceRequest,
)
from .messages.request import Request
from .messages.safety import (
    DrillRequest,
    DrillResult,
    FsckRequest,
    FsckResult,
    RepairDone,
    RepairPlan,
    RepairRequest,
    RepairResult,
    RiskRequest,
    RiskResult,
    ScrubRequest,
)
from .running import RunningCommands

logger = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Request[Any])
R = TypeVar("R")


class ServedMount(Protocol):
    """The mount of an open store that a daemon serves."""

    counts: LiveCounts

    def about(self) -> MountStatus:
        """Describe the mount."""

    async def stop(self, mountpoint: str | None, commit: Callable[[], Awaitable[object]]) -> None:
        """Unmount, and return when everything is committed; UsageError if mounted elsewhere.

        MountHeldError, after `commit`, if another mount of the file system remains.
        """


@dataclass(frozen=True, slots=True)
class Context:
    """The open store that a command works on, and its mount."""

    store: Store
    files: FileSystem
    progress: Progress = lambda message: None
    """Called on the event loop with the progress of a command."""
    mount: ServedMount | None = None
    """None: the store is not mounted."""
    alone: bool = False
    """The store was opened for this command, and is closed after it."""

    @property
    def safety(self) -> Safety:
        """The calculations that cover all stripes of the store."""
        return Safety(self.store.log, self.store.reader)

    @property
    def served(self) -> ServedMount:
        """The mount; NotMountedError if there is none."""
        if self.mount is None:
            raise NotMountedError(f"The store {self.store.config.store} is not mounted.")
        return self.mount

    def waits(self, request: ScrubRequest | RebalanceRequest | NodeDrainRequest) -> bool:
        """Whether to wait for the end of a command that runs in the background.

        This is necessary if the store is closed after the command.
        """
        return request.wait if not self.alone else not request.only_looks


# --- the store -----------------------------------------------------------------


async def status(context: Context, request: StatusRequest) -> Status:
    """Report the state of the store, and of its mount if there is one."""
    return status_of(
        await context.store.status(),
        recode=from_json(Recoding, context.files.recoder.status()),
        cleaning=from_json(Cleaning, context.files.cleaning_report.status()),
        mount=context.mount.about() if context.mount is not None else None,
    )


async def fsck(context: Context, request: FsckRequest) -> FsckResult:
    """Check the tables, and mend them if asked; UsageError if asked for a store in use."""
    if request.repair and not context.alone:
        raise UsageError("The store is mounted: unmount it before you mend it.")
    found = await check_tables(context.store, repair=request.repair, at_rest=context.alone)
    return from_json(FsckResult, {**found, "lost": await _lost(context)})


async def _lost(context: Context) -> tuple[str, ...]:
    """Return sentences about the files of which bytes are lost for good."""
    lost: Counter[int] = Counter()
    try:
        for ino, extent in extents_of(context.store.log.engine, LOST_STRIPE):
            lost[ino] += extent.length
        paths = await context.files.tree.paths(lost)
    except DamagedMetadataError as error:  # the row is one of the findings
        return (f"The files with lost bytes are not known: {error}",)
    return tuple(f"{paths[ino]}: {counted(count, 'byte')} lost" for ino, count in lost.items())


# --- checking and repairing ----------------------------------------------------


async def repair(context: Context, request: RepairRequest) -> RepairResult:
    """Plan the repair of a node, and run it unless this is a dry run."""
    repairer = context.store.repairer
    member = repairer.member(request.node)
    await context.store.healer.look_at(member)
    to = Path(request.to) if request.to else None
    if to is None and not request.on_this_disk:
        place = partial(check_disk, context.store.log.members, member)
        await threads.call(place, abandon_on_cancel=True)
    plan = from_json(RepairPlan, await context.safety.plan(member, anew=to is not None))
    if request.to:
        plan = replace(plan, path=request.to)
    if request.dry_run:
        await repairer.check_place(member, to)
        return RepairResult(plan)
    done = await repairer.repair(
        member.name,
        context.progress,
        to=to,
        rate=request.rate,
        discard_history=request.discard_history,
    )
    return RepairResult(plan, from_json(RepairDone, done))


async def risk(context: Context, request: RiskRequest) -> RiskResult:
    """Count how many losses the stripes would survive; add the expected losses if asked."""
    with suppress(NotDurableError):  # what is only in memory has no stripes to count
        await context.store.committer.commit()
    safety = context.safety
    found = await safety.risk(request.if_lost)
    if request.model is not None:
        found["model"] = safety.model(found["codes"], Rates(**to_json(request.model)))
    return from_json(RiskResult, found)


async def drill(context: Context, request: DrillRequest) -> DrillResult:
    """Read a sample of the stripes without a region."""
    found = await context.safety.drill(
        request.region, request.sample, request.rate, context.progress
    )
    return from_json(DrillResult, found)


async def scrub(context: Context, request: ScrubRequest) -> Scrub:
    """Start, pause or resume a scrub, or report its progress."""
    found = await context.store.scrubber.command(
        request.action,
        request.rate,
        wait=context.waits(request),
        alone=context.alone,
        progress=context.progress,
    )
    return from_json(Scrub, found)


# --- nodes ---------------------------------------------------------------------


async def rebalance(context: Context, request: RebalanceRequest) -> Rebalance:
    """Start or stop a rebalance, or report its progress."""
    found = await context.store.rebalancer.command(
        request.action, request.rate, wait=context.waits(request), progress=context.progress
    )
    return from_json(Rebalance, found)


async def nodes(context: Context, request: NodesRequest) -> NodesResult:
    """List the nodes, what they hold, and their shares."""
    return from_json(NodesResult, await context.store.topology.list())


async def node_add(context: Context, request: NodeAddRequest) -> NodeAdded:
    """Add a node."""
    found = await context.store.topology.add(
        request.node, request.region, Path(request.path), request.weight, context.progress
    )
    return from_json(NodeAdded, found)


async def node_drain(context: Context, request: NodeDrainRequest) -> NodeDrained:
    """Start or cancel draining a node."""
    found = await context.store.topology.drain(
        request.node,
        cancel=request.cancel,
        wait=context.waits(request),
        progress=context.progress,
    )
    return from_json(NodeDrained, found)


async def node_remove(context: Context, request: NodeRemoveRequest) -> NodeRemoved:
    """Take a drained node out of the store."""
    return from_json(NodeRemoved, await context.store.topology.remove(request.node))


async def node_offline(context: Context, request: NodeOfflineRequest) -> NodeState:
    """Take a node offline."""
    found = await context.store.topology.offline(request.node, force=request.force)
    return from_json(NodeState, found)


async def node_online(context: Context, request: NodeOnlineRequest) -> NodeState:
    """Use a node again that was taken offline."""
    return from_json(NodeState, await context.store.topology.online(request.node))


# --- files ---------------------------------------------------------------------


async def layout(context: Context, request: LayoutRequest) -> LayoutResult:
    """Return the place of each byte of a file."""
    return from_json(LayoutResult, context.files.attributes.layout(request.inode, 0, None))


async def quota(context: Context, request: QuotaRequest) -> QuotaResult:
    """Set or clear a quota; return the quotas that apply to the inode, or all quotas.

    Setting and clearing return when the change is in force.
    """
    quotas, ino = context.files.quotas, request.inode
    if request.action == "set":
        quotas.set(ino, request.bytes, request.files)
    elif request.action == "clear":
        await quotas.clear(ino)
    if request.action in ("set", "clear"):
        await quotas.wait(ino)
        await context.store.committer.commit()
    found = await (quotas.all() if request.action == "list" else quotas.above(ino))
    return from_json(QuotaResult, {"quotas": found})


async def recode(context: Context, request: RecodeRequest) -> Recoding:
    """Start or stop recoding or defragmenting; UsageError for an invalid code."""
    recoder = context.files.recoder
    if request.stop:
        recoder.stop()
    else:
        try:
            code = context.files.attributes.parse_code(request.to) if request.to else None
        except InvalidError as error:
            raise UsageError(str(error)) from None
        await recoder.start(request.inode, code, request.rate, defragment=request.defragment)
    await context.store.committer.commit()  # an acknowledged recoding continues after a crash
    found = await recoder.wait(context.progress) if request.wait else recoder.status()
    return from_json(Recoding, found)


async def compact(context: Context, request: CompactRequest) -> CompactResult:
    """Begin to clean all that gives back enough, or wait for its end; NotMountedError."""
    if context.alone:  # nothing cleans in the background
        raise NotMountedError(f"The store {context.store.config.store} is not mounted.")
    cleaner = context.files.cleaner
    compaction = cleaner.compact()
    if request.wait:
        await cleaner.wait(compaction, context.progress)
    return from_json(CompactResult, context.files.cleaning_report.compaction(compaction))


# --- the daemon ----------------------------------------------------------------


async def stop(context: Context, request: StopRequest) -> StopResult:
    """Unmount, and answer when everything is committed."""
    await context.served.stop(request.mountpoint, context.store.committer.commit)
    return StopResult()


async def log_level(context: Context, request: LogLevelRequest) -> LogLevelResult:
    """Set the log level of this process, if one is given, and return the level."""
    if request.level:
        before = logs.get_level()
        logs.set_level(request.level)
        logger.warning("the log level is now %s; it was %s", logs.get_level(), before)
    return LogLevelResult(logs.get_level())


async def metrics(context: Context, request: MetricsRequest) -> MetricsResult:
    """Return the counts since the last reset, after a reset if asked."""
    counts = context.served.counts
    if request.action == "reset":
        counts.reset()
        await counts.keep()
    return from_json(MetricsResult, counts.now().rows())


# --- all of them ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Command(Generic[Q, R]):
    """A kind of request, and its function."""

    request: type[Q]
    run: Callable[[Context, Q], Awaitable[R]]


COMMANDS: dict[str, _Command[Any, Any]] = {
    one.request.command: one
    for one in (
        _Command(StatusRequest, status),
        _Command(FsckRequest, fsck),
        _Command(RepairRequest, repair),
        _Command(RiskRequest, risk),
        _Command(DrillRequest, drill),
        _Command(ScrubRequest, scrub),
        _Command(RebalanceRequest, rebalance),
        _Command(NodesRequest, nodes),
        _Command(NodeAddRequest, node_add),
        _Command(NodeDrainRequest, node_drain),
        _Command(NodeRemoveRequest, node_remove),
        _Command(NodeOfflineRequest, node_offline),
        _Command(NodeOnlineRequest, node_online),
        _Command(LayoutRequest, layout),
        _Command(QuotaRequest, quota),
        _Command(RecodeRequest, recode),
        _Command(CompactRequest, compact),
        _Command(StopRequest, stop),
        _Command(LogLevelRequest, log_level),
        _Command(MetricsRequest, metrics),
    )
}
"""The commands by the name that a request has on the socket."""


async def do(context: Context, request: Request[R]) -> R:
    """Run a command in this process; FusestoreError."""
    if not request.only_looks:
        context.store.log.refuse_read_only()
    result: R = await COMMANDS[request.command].run(context, request)
    return result


def handlers(context: Context, running: RunningCommands | None = None) -> dict[str, Handler]:
    """Return all commands as the control server needs them: JSON in, JSON out.

    All of them but `stop` are in `running` while they run.
    """
    those = running or RunningCommands()
    return {name: partial(_handle, context, those, one) for name, one in COMMANDS.items()}


async def _handle(
    context: Context,
    running: RunningCommands,
    command: _Command[Any, Any],
    arguments: Message,
    progress: Progress,
) -> Message:
    """Run the request of a client; UsageError for fields that do not fit the request."""
    name = command.request.command
    try:
        request = from_json(command.request, arguments)
    except FieldError as error:
        raise UsageError(f"The arguments of {name!r} are invalid: {error}.") from None
    context = replace(context, progress=progress)
    if command.request is StopRequest:
        return to_json(await do(context, request))
    with running.command(command.request):
        return to_json(await do(context, request))
