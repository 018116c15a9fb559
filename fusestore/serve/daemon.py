"""The daemon: a store opened, mounted and served until it is unmounted.

The order of a stop: the mount is removed, requests end, commands that run are interrupted,
everything is committed and checkpointed, the client gets its answer, the process exits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from ..config.mount_options import NO_METRICS, MountOptions, parse_address
from ..config.store_config import StoreConfig
from ..errors import FusestoreError, MountHeldError, NotDurableError, UsageError
from ..files.filesystem import FileSystem
from ..store.opening import open_store
from ..store.store import Store
from ..system import mounts, threads
from ..system.sd_notify import ServiceManager
from ..watch.counts import LiveCounts
from ..watch.fields import MountStatus
from . import fuse_device
from .commands import Context, handlers
from .control_server import ControlServer, lock_store
from .messages.mount import StopRequest
from .offline import unwrapped
from .operations import TALLIES, Operations
from .running import RunningCommands

logger = logging.getLogger(__name__)

HELD_SECONDS = 10.0
"""How long after the mount is removed the kernel may keep its file system."""
COUNTS_SECONDS = 10.0
"""How long the end of the mount waits for the file of the counts."""
READY_SECONDS = 60.0
"""A mount that does not answer within this time has failed."""


async def serve(
    config: StoreConfig,
    mountpoint: Path,
    options: MountOptions,
    on_ready: Callable[[list[str]], None],
) -> None:
    """Open the store, mount it, and serve it until it is unmounted; then commit and close.

    Calls `on_ready` with warnings when the mount is made.  Raises FusestoreError.
    """
    with lock_store(config.store):
        try:
            await _Daemon(config, mountpoint, options).run(on_ready)
        except BaseExceptionGroup as group:
            raise unwrapped(group) from None


class _Daemon:
    """One mount of one store."""

    def __init__(self, config: StoreConfig, mountpoint: Path, options: MountOptions) -> None:
        self._config = config
        self._mountpoint = mountpoint
        self._options = options
        self._unmounted = trio.Event()
        self._closed = trio.Event()
        self._running = RunningCommands()
        self._failed: Exception | None = None
        self._manager = ServiceManager()
        self._mounted_at = time.time()
        self._url: str | None = None
        """The address of the status page."""

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
                        take_over=self._options.take_over,
                    ) as store,
                    trio.open_nursery() as nursery,
                ):
                    files = FileSystem(store, nursery)
                    await files.begin()
                    files.go_on()
                    keeps = not self._options.read_only
                    self.counts = LiveCounts(self._config.store, TALLIES, keeps=keeps)
                    nursery.start_soon(self.counts.run)
                    commands = handlers(Context(store, files, mount=self), self._running)
                    with self._monitoring(store, files, nursery):
                        await outer.start(ControlServer(commands).serve, self._config.store)
                        async with self._ending_commands(), self._mount(files):
                            on_ready(store.warnings())
                            logger.info("%s is mounted on %s", self._config.store, self._mountpoint)
                            outer.start_soon(self._watch_signals)
                            nursery.start_soon(self._read_further_ahead)
                            nursery.start_soon(self._tell_ready, store)
                            fuse_device.attend(spins=not self._options.nospin)
                            await pyfuse3.main(max_tasks=self._config.limits.fuse_tasks_max)
                            self._manager.stopping("Committing, and closing the store")
                    await files.removal.removed()
                    with trio.move_on_after(COUNTS_SECONDS):
                        await self.counts.keep()
                    nursery.cancel_scope.cancel()
            except Exception as error:
                self._failed = error
                raise
            finally:
                self._closed.set()
                outer.cancel_scope.cancel()

    def about(self) -> MountStatus:
        """Describe the mount."""
        return MountStatus(
            mounted=True,
            mounted_at=self._mounted_at,
            mountpoint=str(self._mountpoint),
            pid=os.getpid(),
            metrics=self._url,
            options=str(self._options),
        )

    @contextmanager
    def _monitoring(self, store: Store, files: FileSystem, nursery: trio.Nursery) -> Iterator[None]:
        """Serve metrics and the status page if configured; FusestoreError."""
        address = self._options.metrics or self._config.metrics
        if not address or address == NO_METRICS:
            yield
            return
        from ..watch.monitor import Monitor
        from ..watch.web import WebServer

        monitor = Monitor(store, files.cleaning_report.status, TALLIES, self.about)
        server = WebServer(*parse_address(address), monitor.routes())
        self._url = server.url
        logger.info("metrics and the status page are at %s", server.url)
        nursery.start_soon(monitor.run)
        try:
            yield
        finally:
            server.close()

    @asynccontextmanager
    async def _ending_commands(self) -> AsyncIterator[None]:
        """Interrupt the commands that still run on leaving: the store is closed next."""
        try:
            yield
        finally:
            await self._running.end(self._config.limits.node_seconds_max)

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
            what = "check that /dev/fuse exists, and that this user may mount."
            if self._options.allow_other and os.geteuid() != 0:
                what = "allow_other needs the line user_allow_other in /etc/fuse.conf."
            raise FusestoreError(
                f"{self._mountpoint} cannot be mounted ({error}): {what}"
            ) from error
        try:
            yield
        finally:
            self._unmounted.set()
            pyfuse3.close()

    async def stop(self, mountpoint: str | None, commit: Callable[[], Awaitable[object]]) -> None:
        """Unmount, and return when everything is committed; UsageError if mounted elsewhere.

        MountHeldError, after `commit`, if another mount of the file system remains.
        """
        if mountpoint not in (None, str(self._mountpoint)):
            raise UsageError(f"The store is mounted on {self._mountpoint}, not on {mountpoint}.")
        with trio.CancelScope(shield=True):
            held = await self._unmount()
            if held:
                with suppress(NotDurableError), self._running.command(StopRequest):
                    await commit()
                raise MountHeldError(held)
            await self._closed.wait()
        if self._failed is not None:
            error = self._failed
            raise unwrapped(error) if isinstance(error, ExceptionGroup) else error

    async def _unmount(self) -> str:
        """Remove the mount; return why its file system remains, or an empty text."""
        mount = mounts.find(self._mountpoint)
        await threads.call(mounts.unmount, self._mountpoint)
        with trio.move_on_after(HELD_SECONDS):
            await self._unmounted.wait()
        if self._unmounted.is_set():
            return ""
        device = mount.device if mount is not None else -1
        holders = await threads.call(mounts.holders_of, device, self._mountpoint)
        return (
            f"{self._mountpoint} is unmounted, but its file system is still in use: "
            f"{'; '.join(holders) or 'its user is not known'}. Everything is committed, and the "
            f"daemon ends when the last mount is gone. To end it now: kill {os.getpid()}."
        )

    async def _read_further_ahead(self) -> None:
        """Raise the kernel's read-ahead after the first answer, when the kernel has set its own."""
        with contextlib.suppress(OSError):  # unmounted meanwhile
            await threads.call(os.statvfs, self._mountpoint, abandon_on_cancel=True)
            mounts.read_further_ahead(self._mountpoint, self._config.limits.read_ahead_bytes)

    async def _tell_ready(self, store: Store) -> None:
        """Notify the service manager, if there is one, when the mount answers through the kernel.

        FusestoreError if it does not answer: the service has failed then.
        """
        if not self._manager.listens:
            return
        try:
            await threads.call(
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
        """Unmount on SIGTERM and SIGINT, busy or not, until the daemon exits."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if self._unmounted.is_set():
                    logger.info("%s: already ending", signal.Signals(number).name)
                    continue
                logger.info("%s: unmounting", signal.Signals(number).name)
                try:
                    problem = await self._unmount()
                except FusestoreError as error:
                    problem = str(error)
                if problem and not self._unmounted.is_set():  # else unmounted meanwhile
                    logger.warning("%s The daemon commits everything and exits anyway.", problem)
                    pyfuse3.terminate()
