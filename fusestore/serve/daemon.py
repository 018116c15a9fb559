"""The daemon: a store opened, mounted and served until it is unmounted.

The order of a stop: the mount goes away, requests end, everything is
committed and checkpointed, the answer goes to who asked, the process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from ..config.mount_options import NO_METRICS, MountOptions, parse_address
from ..config.store_config import StoreConfig
from ..errors import FusestoreError, InvalidError, UsageError
from ..files.filesystem import FileSystem
from ..metadata.engine import DATABASE
from ..repair.risk import Rates, Safety
from ..rescue.fsck import fsck
from ..store.opening import open_store
from ..store.store import Store
from ..system import logs, mounts
from ..system.sd_notify import ServiceManager
from ..watch.counts import Counter
from ..watch.health import verdict
from .control_server import ControlServer, lock_store
from .operations import TALLIES, Operations

log = logging.getLogger(__name__)

READY_SECONDS = 60.0
"""A mount that was made answers within this time, or has failed."""

Progress = Callable[[dict[str, Any]], None]


async def serve(
    config: StoreConfig,
    mountpoint: Path,
    options: MountOptions,
    on_ready: Callable[[list[str]], None],
) -> None:
    """Open the store, mount it, and serve until it is unmounted; then commit all and close.

    Calls `on_ready` with warnings once the mount answers.  FusestoreError.
    """
    with lock_store(config.store):
        try:
            await _Daemon(config, mountpoint, options).run(on_ready)
        except BaseExceptionGroup as group:
            raise _first(group) from None


async def offline(
    config: StoreConfig, command: str, arguments: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Do a control command on a store that is not mounted; FusestoreError."""
    with lock_store(config.store):
        try:
            looks = command in _LOOKING or arguments.get("dry_run")
            lasting = command in ("scrub", "rebalance")
            looks = looks or (lasting and arguments.get("action") == "status")
            read_only = bool(looks) and not arguments.get("repair")
            if read_only and not (config.metadata / DATABASE).exists():
                read_only = False  # never mounted: there is no journal to leave alone
            checking = command == "fsck"
            async with (
                open_store(config, read_only=read_only, background=not checking) as store,
                trio.open_nursery() as nursery,
            ):
                files = FileSystem(store, nursery)
                if checking:  # of what is there, before anything goes on from it
                    repair = bool(arguments.get("repair"))
                    return await fsck(store, repair=repair, at_rest=True)
                await files.begin()
                if lasting or command == "node_drain":
                    arguments = {**arguments, "wait": not read_only, "alone": True}
                return await _commands(store, files)[command](arguments, progress)
        except BaseExceptionGroup as group:
            raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to tell of, when nurseries have wrapped it."""
    if group.subgroup(KeyboardInterrupt) is not None:
        return KeyboardInterrupt()
    ours, others = group.split(FusestoreError)
    if ours is None or others is not None:
        return group
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


_LOOKING = {"status", "fsck", "risk", "drill", "nodes"}
"""Commands that need not change a store."""

Command = Callable[[dict[str, Any], Progress], Awaitable[dict[str, Any]]]


def _commands(store: Store, files: FileSystem) -> dict[str, Command]:
    """What works on a store whether it is mounted or not."""

    async def status(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        found = await store.status()
        return {"summary": verdict(found), **found, "recode": files.recoder.status()}

    safety = Safety(store.log, store.reader, files.tree.path)

    async def repair(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        member = store.repairer.member(str(arguments["node"]))
        await store.healer.look_at(member)
        to = Path(arguments["to"]) if arguments.get("to") else None
        plan = await safety.plan(member, anew=to is not None)
        if arguments.get("dry_run"):
            return {"plan": plan}
        rate = arguments.get("rate")
        done = await store.repairer.repair(member.name, progress, files.tree.path, to=to, rate=rate)
        return {"plan": plan, **done}

    async def risk(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        found = await safety.risk(arguments.get("if_lost", ()))
        if arguments.get("model"):
            found["model"] = safety.model(found["codes"], Rates(**arguments["model"]))
        return found

    async def drill(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        sample = float(arguments.get("sample", 1.0))
        return await safety.drill(str(arguments["region"]), sample, arguments.get("rate"), progress)

    async def scrub(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return await store.scrubber.command(
            str(arguments["action"]),
            arguments.get("rate"),
            wait=bool(arguments.get("wait")),
            alone=bool(arguments.get("alone")),
            progress=progress,
        )

    async def rebalance(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return await store.rebalancer.command(
            str(arguments["action"]),
            arguments.get("rate"),
            wait=bool(arguments.get("wait")),
            progress=progress,
        )

    async def nodes(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return await store.topology.list()

    async def node_add(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        name, region = str(arguments["node"]), str(arguments["region"])
        path, weight = Path(arguments["path"]), float(arguments.get("weight", 1.0))
        return await store.topology.add(name, region, path, weight, progress)

    async def node_drain(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return await store.topology.drain(
            str(arguments["node"]),
            cancel=bool(arguments.get("cancel")),
            wait=bool(arguments.get("wait", True)),
            progress=progress,
        )

    async def node_remove(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return await store.topology.remove(str(arguments["node"]))

    async def layout(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return files.attributes.layout(int(arguments["inode"]), 0, None)

    async def quota(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        action, ino = str(arguments["action"]), int(arguments["inode"])
        if action == "set":
            files.quotas.set(ino, arguments.get("bytes"), arguments.get("files"))
        elif action == "clear":
            files.quotas.clear(ino)
        if action in ("set", "clear"):
            await files.quotas.wait(ino)
            await files.commit()
        return {"quotas": files.quotas.all() if action == "list" else files.quotas.above(ino)}

    async def recode(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if arguments.get("stop"):
            files.recoder.stop()
        else:
            to = arguments.get("to")
            try:
                code = files.attributes.parse_code(str(to)) if to else None
            except InvalidError as error:
                raise UsageError(str(error)) from None
            files.recoder.start(int(arguments["inode"]), code, arguments.get("rate"))
        await files.commit()  # what is answered goes on after a crash
        if arguments.get("wait"):
            return await files.recoder.wait(progress)
        return files.recoder.status()

    async def check(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if arguments.get("repair"):
            raise UsageError("The store is mounted: unmount it to have it mended.")
        return await fsck(store, repair=False, at_rest=False)

    return {
        "status": status,
        "repair": repair,
        "layout": layout,
        "fsck": check,
        "risk": risk,
        "drill": drill,
        "scrub": scrub,
        "quota": quota,
        "recode": recode,
        "rebalance": rebalance,
        "nodes": nodes,
        "node_add": node_add,
        "node_drain": node_drain,
        "node_remove": node_remove,
    }


async def _log_level(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Change the level of this daemon's log, if one is given, and say what it is."""
    if arguments.get("level"):
        before = logs.get_level()
        logs.set_level(str(arguments["level"]))
        log.warning("the log level is %s now, and was %s", logs.get_level(), before)
    return {"level": logs.get_level()}


class _Daemon:
    """One mount of one store."""

    def __init__(self, config: StoreConfig, mountpoint: Path, options: MountOptions) -> None:
        self._config = config
        self._mountpoint = mountpoint
        self._options = options
        self._unmounted = trio.Event()
        self._closed = trio.Event()
        self._failed: Exception | None = None
        self._manager = ServiceManager()
        self._mounted_at = time.time()
        self._url: str | None = None
        """Of the status page."""

    async def run(self, on_ready: Callable[[list[str]], None]) -> None:
        self._manager.starting(f"Opening {self._config.store}")
        async with trio.open_nursery() as outer:
            outer.start_soon(self._manager.keep_telling)
            try:
                async with (
                    open_store(
                        self._config,
                        read_only=self._options.read_only,
                        accept_loss=self._options.accept_loss,
                    ) as store,
                    trio.open_nursery() as nursery,
                ):
                    files = FileSystem(store, nursery)
                    await files.begin()
                    files.go_on()
                    keeps = not self._options.read_only
                    counter = Counter(self._config.store, TALLIES, keeps=keeps)
                    nursery.start_soon(counter.run)
                    handlers = {
                        **_commands(store, files),
                        "stop": self._stop,
                        "log_level": _log_level,
                    }
                    status = handlers["status"]

                    async def mounted_status(
                        arguments: dict[str, Any], progress: Progress
                    ) -> dict[str, Any]:
                        return {**await status(arguments, progress), **self._about()}

                    async def metrics(
                        arguments: dict[str, Any], progress: Progress
                    ) -> dict[str, Any]:
                        if arguments.get("action") == "reset":
                            counter.reset()
                            await counter.keep()
                        return counter.now().rows()

                    handlers |= {"status": mounted_status, "metrics": metrics}
                    with self._monitoring(store, nursery):
                        await outer.start(ControlServer(handlers).serve, self._config.store)
                        async with self._mount(files):
                            on_ready(store.warnings())
                            log.info("%s is mounted on %s", self._config.store, self._mountpoint)
                            outer.start_soon(self._watch_signals)
                            nursery.start_soon(self._read_further_ahead)
                            nursery.start_soon(self._tell_ready, store)
                            await pyfuse3.main(max_tasks=self._config.limits.fuse_tasks_max)
                            self._manager.stopping("Committing, and closing the store")
                    await files.removal.removed()
                    await counter.keep()
                    nursery.cancel_scope.cancel()
            except Exception as error:
                self._failed = error
                raise
            finally:
                self._closed.set()
                outer.cancel_scope.cancel()

    def _about(self) -> dict[str, Any]:
        """What the mount adds to the fields of `status`."""
        return {
            "mounted": True,
            "mounted_at": self._mounted_at,
            "mountpoint": str(self._mountpoint),
            "pid": os.getpid(),
            "metrics": self._url,
        }

    @contextmanager
    def _monitoring(self, store: Store, nursery: trio.Nursery) -> Iterator[None]:
        """Serve metrics and the status page, if that is wanted; FusestoreError."""
        address = self._options.metrics or self._config.metrics
        if not address or address == NO_METRICS:
            yield
            return
        from ..watch.monitor import Monitor
        from ..watch.web import WebServer

        monitor = Monitor(store, TALLIES, self._about)
        server = WebServer(*parse_address(address), monitor.routes())
        self._url = server.url
        log.info("metrics and the status page are at %s", server.url)
        nursery.start_soon(monitor.run)
        try:
            yield
        finally:
            server.close()

    @asynccontextmanager
    async def _mount(self, files: FileSystem) -> AsyncIterator[None]:
        options = {
            "default_permissions",
            "fsname=" + mounts.source_of(self._config.store),
            "subtype=fusestore",
            *self._options.kernel,
        }
        operations = Operations(
            files, writeback=self._options.writeback, xattrs=not self._options.noxattr
        )
        try:
            pyfuse3.init(operations, str(self._mountpoint), options)
        except RuntimeError as error:
            what = "is /dev/fuse there, and may this user mount?"
            if self._options.allow_other and os.geteuid() != 0:
                what = "is user_allow_other in /etc/fuse.conf, which allow_other needs?"
            raise FusestoreError(
                f"{self._mountpoint} cannot be mounted ({error}): {what}"
            ) from error
        try:
            yield
        finally:
            self._unmounted.set()
            pyfuse3.close()

    async def _stop(self, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Unmount, commit everything, and answer when that is done."""
        wanted = arguments.get("mountpoint", str(self._mountpoint))
        if wanted != str(self._mountpoint):
            raise UsageError(f"The store is mounted on {self._mountpoint}, not on {wanted}.")
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(mounts.unmount, self._mountpoint)
            await self._closed.wait()
        if self._failed is not None:
            error = self._failed
            raise _first(error) if isinstance(error, ExceptionGroup) else error
        return {}

    async def _read_further_ahead(self) -> None:
        """Raise the kernel's read-ahead, once the first answer shows that it has set its own."""
        with contextlib.suppress(OSError):  # unmounted meanwhile
            await trio.to_thread.run_sync(os.statvfs, self._mountpoint, abandon_on_cancel=True)
            mounts.read_further_ahead(self._mountpoint, self._config.limits.read_ahead_bytes)

    async def _tell_ready(self, store: Store) -> None:
        """Tell the service manager, if there is one, once the mount answers through the kernel.

        FusestoreError when it does not: the service has failed then.
        """
        if not self._manager.listens:
            return
        try:
            await trio.to_thread.run_sync(
                partial(mounts.check_answers, self._mountpoint, self._config.store, READY_SECONDS),
                abandon_on_cancel=True,
            )
        except FusestoreError:
            if mounts.find(self._mountpoint) is None:
                return  # unmounted meanwhile
            raise

        def status() -> str:
            what = store.warnings() or ["All nodes are up."]
            return " ".join([f"Serving {self._mountpoint}.", *what])

        self._manager.ready(status)

    async def _watch_signals(self) -> None:
        """Unmount on SIGTERM and SIGINT, busy or not; until the daemon has ended."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if self._unmounted.is_set():
                    log.info("%s: about to end already", signal.Signals(number).name)
                    continue
                log.info("%s: unmounting", signal.Signals(number).name)
                try:
                    await trio.to_thread.run_sync(mounts.unmount, self._mountpoint)
                except FusestoreError as error:
                    if self._unmounted.is_set():  # by somebody else, meanwhile
                        continue
                    log.warning("%s The daemon commits everything and ends all the same.", error)
                    pyfuse3.terminate()
