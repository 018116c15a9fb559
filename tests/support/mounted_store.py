"""A store that a daemon of its own serves on a mount point."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from support.logs import LogFile

REPOSITORY = Path(__file__).resolve().parents[2]
FUSESTORE = [sys.executable, "-m", "fusestore"]
TRACEBACK = "Traceback (most recent call last)"

#: Seconds for any one command, and for a daemon to end after its umount.
COMMAND_SECONDS_MAX = 180
DAEMON_END_SECONDS_MAX = 60


def sync(path: Path) -> None:
    """fsync a file or a directory; OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Directory:
    """A plain directory that looks like a mounted store to the tests of POSIX behaviour."""

    def __init__(self, base: Path) -> None:
        self.mountpoint = base / "mnt"
        self.mountpoint.mkdir(parents=True)

    def mount(self, *options: str) -> None:
        """Nothing: it is always there."""

    def umount(self) -> None:
        """Nothing, too."""

    def remount(self, *options: str) -> None:
        """Nothing, either."""


class Store:
    """A store of its own, and the daemon that serves it."""

    def __init__(self, base: Path, *mkfs_options: str | Path) -> None:
        self.store = base / "store"
        self.mountpoint = base / "mnt"
        self.mountpoint.mkdir(parents=True)
        self.options: tuple[str, ...] = ()
        self.daemon_pid: int | None = None
        self._pidfd: int | None = None
        self._logs: dict[Path, LogFile] = {}
        self.cli("mkfs", self.store, *mkfs_options)

    def cli(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `fusestore ARGUMENTS`; with `check`, it must end with exit status 0."""
        done = subprocess.run(
            [*FUSESTORE, *map(str, arguments)],
            check=False,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
        )
        if check and done.returncode:
            pytest.fail(
                f"fusestore {' '.join(map(str, arguments))}: exit status {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done

    def status(self) -> dict[str, Any]:
        """What `fusestore status --json` says, whatever its exit status."""
        done = self.cli("status", self.store, "--json", check=False)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            pytest.fail(f"status --json printed no JSON:\n{done.stdout}\n{done.stderr}")
        assert isinstance(answer, dict)
        return answer

    def node(self, name: str) -> Path:
        """The directory of a node."""
        (path,) = (node["path"] for node in self.status()["nodes"] if node["name"] == name)
        return Path(path)

    def mount(self, *options: str) -> None:
        """Mount, and remember the daemon and the options."""
        done = self.try_mount(*options)
        if done.returncode:
            pytest.fail(f"mount: exit status {done.returncode}\n{done.stdout}{done.stderr}")

    def try_mount(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Mount like `mount`, if that is not refused."""
        self.options = options
        chosen = ["-o", ",".join(options)] if options else []
        done = self.cli("mount", self.store, self.mountpoint, *chosen, check=False)
        if done.returncode:
            return done
        status = self.status()
        pid = status["pid"]
        assert isinstance(pid, int), status
        self.daemon_pid, self._pidfd = pid, os.pidfd_open(pid)
        if status.get("log_file"):
            log = Path(status["log_file"])
            self._logs.setdefault(log, LogFile(log))
        assert os.path.ismount(self.mountpoint)
        return done

    def umount(self) -> None:
        """Unmount; the daemon must have ended."""
        self.cli("umount", self.mountpoint)
        self.await_end()

    def remount(self, *options: str) -> None:
        """Unmount and mount."""
        self.umount()
        self.mount(*options)

    def kill(self, clear: bool = True) -> None:
        """SIGKILL the daemon; with `clear`, take the dead mount away, too."""
        assert self._pidfd is not None
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.await_end()
        if clear:
            self.clear_mount()

    def end_by(self, number: signal.Signals) -> None:
        """Send the daemon a signal, and wait for its end."""
        assert self._pidfd is not None
        signal.pidfd_send_signal(self._pidfd, number)
        self.await_end()

    def kill_soon(self, seconds: float) -> threading.Timer:
        """SIGKILL the daemon in `seconds`, while the test goes on."""
        assert self._pidfd is not None
        timer = threading.Timer(seconds, signal.pidfd_send_signal, (self._pidfd, signal.SIGKILL))
        timer.start()
        return timer

    def alive(self) -> bool:
        """Whether the daemon of the last mount runs."""
        return self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]

    def revive(self) -> None:
        """Mount again, with the same options, if the daemon is not there any more."""
        if not self.alive():
            self.clear_mount()
            self.mount(*self.options)

    def clear_mount(self) -> None:
        """Detach whatever is mounted on the mount point."""
        while is_mounted(self.mountpoint):
            subprocess.run(
                ["fusermount3", "-u", "-z", str(self.mountpoint)],
                check=True,
                capture_output=True,
                timeout=COMMAND_SECONDS_MAX,
            )

    def logged(self) -> list[str]:
        """Return the warnings and errors that the daemons have logged since the last call."""
        return [line for log in self._logs.values() for line in log.new_lines()]

    def clean_up(self) -> None:
        """End all; AssertionError if the daemon did not end well or logged a traceback."""
        problems = []
        if self._pidfd is not None:
            was_alive = self.alive()
            if not was_alive:
                problems.append("the daemon had died before it was unmounted")
            try:
                done = self.cli("umount", self.mountpoint, check=False)
                if was_alive and done.returncode:
                    problems.append(f"umount failed: {done.stdout}{done.stderr}")
                elif was_alive:
                    self.await_end()
            except (Exception, pytest.fail.Exception) as error:
                problems.append(f"umount failed: {error}")
        problems += self._end_by_force()
        for log in self._logs.values():
            text = log.text()
            if TRACEBACK in text:
                problems.append(
                    f"{log.path} has a traceback:\n{text[text.index(TRACEBACK) - 400 :][:4000]}"
                )
        assert not problems, "\n".join(problems)

    def _end_by_force(self) -> list[str]:
        """Remove a daemon and a mount that should not be there any more, and say so."""
        problems = []
        if self._pidfd is None:  # a mount command that failed may have left a daemon
            with contextlib.suppress(Exception, pytest.fail.Exception):
                pid = self.status()["pid"]
                if isinstance(pid, int):
                    self._pidfd = os.pidfd_open(pid)
        if self.alive():
            problems.append("the daemon had to be killed")
            with contextlib.suppress(Exception):
                self.kill(clear=False)
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if is_mounted(self.mountpoint):
            problems.append("the mount had to be taken away")
            self.clear_mount()
        return problems

    def await_end(self) -> None:
        """Wait until the daemon has ended by itself."""
        assert self._pidfd is not None
        ended = select.select([self._pidfd], [], [], DAEMON_END_SECONDS_MAX)[0]
        assert ended, f"the daemon {self.daemon_pid} still runs"
        os.close(self._pidfd)
        self._pidfd = self.daemon_pid = None


def is_mounted(path: Path) -> bool:
    """Whether anything, dead or alive, is mounted on `path`."""
    place = str(path).replace(" ", "\\040")
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return any(line.split(" ")[4] == place for line in lines)
