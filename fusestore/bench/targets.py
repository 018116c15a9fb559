"""Where workloads run: a store of its own, the null daemon, any directory.

Each makes one directory, and on leaving takes it away with all that is in it,
mounts and daemons included, however the benchmark ends.
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
"""For one command of fusestore: a repair of a full-size store among them."""
END_SECONDS_MAX = 30.0
"""For a daemon to end when its mount has gone."""
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Target:
    """A file system to be measured."""

    name: str
    top: Path
    """A directory that is the benchmark's alone."""
    about: str
    """File system and device."""
    daemon: int | None = None
    """The process that serves it, if one is known."""
    store: Path | None = None
    """The store that it is, if it was made for the benchmark."""


# --- directories -------------------------------------------------------------


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A new directory below `directory`, taken away at the end with all that is mounted in it.

    UsageError when it cannot be made.
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
    """Take a mount away that could not be unmounted as it should: its daemon ends by itself."""
    subprocess.run(["fusermount3", "-u", "-z", "--", mountpoint], capture_output=True)


def working_directory() -> Path:
    """Where a store of its own is made: in the directory for temporary files, if on a disk."""
    directory = Path(tempfile.gettempdir())
    return Path("/var/tmp") if file_system(directory).startswith("tmpfs") else directory


def check_room(directory: Path, needed: int) -> None:
    """FusestoreError unless so many bytes are free there."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise FusestoreError(
            f"{directory} has {free >> 20:,} MiB free, and these workloads need "
            f"{needed >> 20:,}: free some, or choose less with --quick or --only."
        )


@contextlib.contextmanager
def directory(path: Path, name: str) -> Iterator[Target]:
    """Any directory, whatever file system it is on."""
    with scratch(path) as top:
        yield Target(name, top, file_system(top), _daemon_of(top))


def _daemon_of(path: Path) -> int | None:
    """The daemon of the store that a directory is on, if it is on one that may be asked."""
    mount = mounts.containing(path)
    if mount is None:
        return None
    try:
        return ControlClient(mount.store).daemon()
    except FusestoreError:
        return None


# --- stores ------------------------------------------------------------------


class OwnStore:
    """A store with three regions, made for one purpose."""

    def __init__(self, top: Path) -> None:
        self.path = top / "store"
        self.mountpoint = top / "files"

    def make(self) -> None:
        """Make and mount it."""
        self.mountpoint.mkdir()
        fusestore("mkfs", str(self.path))

    def mount(self, *options: str) -> None:
        """Mount it, with options as of -o."""
        flags = ["-o", ",".join(options)] if options else []
        fusestore("mount", *flags, str(self.path), str(self.mountpoint))

    def umount(self) -> None:
        """Unmount it; everything is committed then."""
        fusestore("umount", str(self.mountpoint))

    def daemon(self) -> int:
        """The process that serves it."""
        return ControlClient(self.path).daemon()

    def lose(self, region: str) -> None:
        """Delete all that a region has."""
        shutil.rmtree(self.path / region)

    def repair(self, region: str) -> dict[str, Any]:
        """Rebuild a region, and say what `fusestore repair --json` does."""
        answer = json.loads(fusestore("repair", str(self.path), region, "--quiet", "--json"))
        assert isinstance(answer, dict)
        return answer


@contextlib.contextmanager
def own_store(disk: Path, *options: str) -> Iterator[OwnStore]:
    """A store that exists only here, mounted with `options`."""
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
    """What a command of fusestore prints; FusestoreError with its complaint when it fails.

    It is not interrupted, so that no daemon comes about whom nobody knows.
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
                f"fusestore {arguments[0]} has not ended within {COMMAND_SECONDS_MAX:.0f} seconds."
            ) from None
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
        raise FusestoreError(
            f"fusestore {arguments[0]} failed: {complaint[-1].removeprefix('fusestore: ')}"
        )
    return done.stdout


# --- the ceiling -------------------------------------------------------------


@contextlib.contextmanager
def null_daemon(disk: Path) -> Iterator[Target]:
    """The null daemon, mounted: see null.py."""
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
            reason = daemon.stderr.read().strip().splitlines() or ["it ended"]
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
