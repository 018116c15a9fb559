"""The targets of workloads: a temporary store, the null daemon, any directory.

Each target makes one directory.  At the end it removes this directory with its contents,
mounts and daemons, however the benchmark ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FusestoreError, UsageError
from ..serve.control_client import ControlClient
from ..serve.launch import environment
from ..system import mounts
from . import interrupts
from .surroundings import file_system

COMMAND_SECONDS_MAX = 600.0
"""How long one command of fusestore may take, including a repair of a full-size store."""
END_SECONDS_MAX = 30.0
"""How long a daemon may take to exit after its mount is gone."""
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Target:
    """A file system to measure."""

    name: str
    top: Path
    """A directory that only the benchmark uses."""
    about: str
    """A description: file system and device."""
    daemon: int | None = None
    """The process that serves it, if known."""
    store: Path | None = None
    """The store, if it was made for the benchmark."""


# --- directories -------------------------------------------------------------


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """Make a directory below `directory`; at the end remove it and unmount all mounts in it.

    UsageError if it cannot be made.
    """
    top = directory.resolve() / f"fusestore-bench-{os.getpid()}-{next(_numbers)}"
    try:
        try:
            top.mkdir()
        except OSError as error:
            raise UsageError(f"{directory} cannot be measured: {error.strerror}.") from error
        yield top
    finally:
        with interrupts.deferred():
            for entry in reversed(list(mounts.parse_entries(mounts.MOUNTINFO.read_bytes()))):
                if entry.place.is_relative_to(top):
                    _detach(entry.place)
            shutil.rmtree(top, ignore_errors=True)


def _detach(mountpoint: Path) -> None:
    """Detach a mount that could not be unmounted normally; its daemon exits by itself."""
    subprocess.run(["fusermount3", "-u", "-z", "--", mountpoint], capture_output=True)


def working_directory() -> Path:
    """Return the default directory for temporary stores: that of temporary files, if on a disk."""
    directory = Path(tempfile.gettempdir())
    return Path("/var/tmp") if file_system(directory).startswith("tmpfs") else directory


def check_room(directory: Path, needed: int) -> None:
    """Raise FusestoreError unless `needed` bytes are free in a directory."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise FusestoreError(
            f"{directory} has {free >> 20:,} MiB free, but these workloads need "
            f"{needed >> 20:,} MiB: free some room, or choose less with --quick or --only."
        )


@contextlib.contextmanager
def directory(path: Path, name: str) -> Iterator[Target]:
    """A directory on any file system."""
    with scratch(path) as top:
        yield Target(name, top, file_system(top), _daemon_of(top))


def _daemon_of(path: Path) -> int | None:
    """Return the daemon of the store that contains a directory, if there is one that answers."""
    mount = mounts.containing(path)
    if mount is None:
        return None
    try:
        return ControlClient(mount.store).daemon()
    except FusestoreError:
        return None


# --- stores ------------------------------------------------------------------


class OwnStore:
    """A temporary store with three regions."""

    def __init__(self, top: Path) -> None:
        self.path = top / "store"
        self.mountpoint = top / "files"

    def make(self) -> None:
        """Make the store and mount it."""
        self.mountpoint.mkdir()
        fusestore("mkfs", str(self.path))

    def mount(self, *options: str) -> None:
        """Mount the store, with options as for -o."""
        flags = ["-o", ",".join(options)] if options else []
        fusestore("mount", *flags, str(self.path), str(self.mountpoint))

    def umount(self) -> None:
        """Unmount the store; then everything is committed."""
        fusestore("umount", str(self.mountpoint))

    def daemon(self) -> int:
        """Return the process that serves the store."""
        return ControlClient(self.path).daemon()

    def lose(self, region: str) -> None:
        """Delete all data of a region."""
        shutil.rmtree(self.path / region)

    def repair(self, region: str) -> dict[str, Any]:
        """Rebuild a region, and return the result of `fusestore repair --json`."""
        answer = json.loads(fusestore("repair", str(self.path), region, "--quiet", "--json"))
        assert isinstance(answer, dict)
        return answer


@contextlib.contextmanager
def own_store(disk: Path, *options: str) -> Iterator[OwnStore]:
    """Make a store, mounted with `options`; remove it at the end."""
    with scratch(disk) as top:
        store = OwnStore(top)
        store.make()
        try:
            store.mount(*options)
            yield store
        finally:
            if os.path.ismount(store.mountpoint):
                store.umount()


def fusestore(*arguments: str) -> str:
    """Run a command of fusestore, and return its output; FusestoreError if it fails.

    The command is not interrupted, so that no unknown daemon remains.
    """
    with interrupts.deferred():
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "fusestore", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS_MAX,
                start_new_session=True,
                env=environment(),
            )
        except subprocess.TimeoutExpired:
            raise FusestoreError(
                f"fusestore {arguments[0]} did not finish within {COMMAND_SECONDS_MAX:.0f} seconds."
            ) from None
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
        raise FusestoreError(
            f"fusestore {arguments[0]} failed: {complaint[-1].removeprefix('fusestore: ')}"
        )
    return done.stdout


# --- the null daemon ---------------------------------------------------------


@contextlib.contextmanager
def null_daemon(disk: Path) -> Iterator[Target]:
    """Mount the null daemon (see null.py)."""
    with scratch(disk) as top:
        mountpoint = top / "null"
        mountpoint.mkdir()
        with _null_process(mountpoint) as process:
            yield Target("null", mountpoint, "null daemon in memory", process)


@contextlib.contextmanager
def _null_process(mountpoint: Path) -> Iterator[int]:
    daemon = None
    try:
        with interrupts.deferred():
            daemon = subprocess.Popen(
                [sys.executable, "-P", "-m", "fusestore.bench.null", str(mountpoint)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=environment(),
            )
            assert daemon.stdout is not None
            assert daemon.stderr is not None
            ready = daemon.stdout.readline() == "ready\n"
        if not ready:
            reason = daemon.stderr.read().strip().splitlines() or ["it exited"]
            raise FusestoreError(f"The null daemon could not be mounted: {reason[-1]}")
        yield daemon.pid
    finally:
        with interrupts.deferred():
            _detach(mountpoint)
            if daemon is not None:
                try:
                    daemon.communicate(timeout=END_SECONDS_MAX)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.communicate()
