"""Starting a daemon, in this process or in the background.

For a background daemon, the command runs itself in a new session, with one pipe.
The daemon writes one line of JSON to the pipe: its mount answers, or the reason
why it does not.  It inherits nothing else but standard output and error, which go
to the log.  Any later failure ends the daemon and leaves nothing mounted.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import site
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..config.mount_options import MountOptions
from ..config.store_config import StoreConfig
from ..errors import FusestoreError, StoreBusyError, UsageError
from ..system import linux, logs, mounts
from ..system.beneath import WRONG_KIND, open_file
from .control_client import NOT_WRITABLE, Message, encode, error_message, error_of

logger = logging.getLogger(__name__)

READY_BYTES_MAX = 1 << 20
_NO_LOG = (*NOT_WRITABLE, *WRONG_KIND)
"""Why a daemon keeps no log."""
END_SECONDS = 30.0
"""How long a daemon that was told to end may take to commit before it is killed."""


def prepare_mountpoint(config: StoreConfig, path: Path, options: MountOptions) -> Path:
    """Return the absolute path of a mount point; clear a dead mount of the store there.

    Raises UsageError or StoreBusyError if the store cannot be mounted there.
    """
    place = mounts.locate(path)
    while there := mounts.find(place):
        if not mounts.is_dead(place):
            what = "This store" if there.store == config.store else f"The store {there.store}"
            raise StoreBusyError(f"{what} is already mounted on {place}.")
        if there.store != config.store:
            raise UsageError(
                f"A dead daemon of {there.store} left its mount on {place}: "
                f"clear it with `fusestore umount {place}`."
            )
        mounts.clear_dead(place)
        logger.warning("cleared the mount that a dead daemon left on %s", place)
    try:
        entries = os.listdir(place)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{place} is not a directory: make it first.") from None
    except OSError as error:
        raise UsageError(f"{place} cannot be mounted on: {error.strerror}.") from error
    parts = [("the store", config.store), ("its metadata", config.metadata)]
    parts += [(f"its region {node.name}", node.path) for node in config.nodes]
    for what, part in parts:
        part = Path(os.path.realpath(part))
        if place.is_relative_to(part):
            raise UsageError(f"{place} lies inside {what}: mount somewhere else.")
        if part.is_relative_to(place):
            raise UsageError(f"{place} would hide {what}, {part}: mount somewhere else.")
    if entries and not options.nonempty:
        raise UsageError(
            f"{place} is not empty: choose an empty directory, or hide its files with -o nonempty."
        )
    return place


# --- in this process ---------------------------------------------------------


def run(
    config: StoreConfig,
    mountpoint: Path,
    options: MountOptions,
    level: str,
    style: str,
    ready_fd: int | None,
) -> None:
    """Serve the store until it is unmounted; FusestoreError if this fails.

    With `ready_fd`, this process is the background daemon.
    """
    in_background = ready_fd is not None
    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)
    try:
        in_file = in_background and not logs.is_journal()
        _start_log(config, level, style, in_file=in_file)
        os.chdir("/")
        linux.keep_one_heap()
        import trio

        from ..system.loop_clock import LoopClock
        from .daemon import serve

        def on_ready(warnings: list[str]) -> None:
            nonlocal ready_fd
            if ready_fd is None:
                for warning in warnings:
                    logger.warning("%s", warning)
            else:
                _say(ready_fd, {"ready": True, "warnings": warnings})
                ready_fd = None

        trio.run(
            serve,
            config,
            mountpoint,
            options,
            on_ready,
            clock=LoopClock(),
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
    except (FusestoreError, OSError) as error:
        if ready_fd is not None:
            if isinstance(error, OSError):
                error = FusestoreError(f"The daemon cannot start: {error}.")
            _say(ready_fd, error_message(error))
        elif in_background:
            logger.error("%s", error)
            raise SystemExit(3) from error
        raise


def _start_log(config: StoreConfig, level: str, style: str, *, in_file: bool) -> None:
    """Log to the file, or to standard error if there can be no file; OSError."""
    try:
        logs.start(level, style, config.log_file if in_file else None)
    except OSError as error:
        if error.errno not in _NO_LOG:
            raise
        logs.start(level, style, None)


def _say(fd: int, message: Message) -> None:
    """Write one line to the waiting command, and close the pipe to it."""
    try:
        os.write(fd, encode(message))
    except BrokenPipeError:
        logger.warning("the command that started this daemon has exited")
    finally:
        os.close(fd)


# --- in the background -------------------------------------------------------


def start(
    config: StoreConfig, mountpoint: Path, options: MountOptions, level: str, style: str
) -> list[str]:
    """Start a daemon in the background; return its warnings when the mount answers.

    Raises the error that stopped the daemon, or FusestoreError if the mount does not
    answer.
    """
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        try:
            child = _spawn(config, mountpoint, options, level, style, writing)
        finally:
            os.close(writing)
        try:
            with _ending_on_signals():
                warnings = _wait_ready(config, child, pipe.readline(READY_BYTES_MAX))
                mounts.check_answers(mountpoint, config.store)
        except BaseException:
            _end(child, config, mountpoint)
            raise
    child.returncode = 0  # The daemon keeps running; this object no longer watches it.
    return warnings


def _spawn(
    config: StoreConfig,
    mountpoint: Path,
    options: MountOptions,
    level: str,
    style: str,
    ready_fd: int,
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fusestore", "mount", "--foreground"]
    command += [f"--ready-fd={ready_fd}", f"--log-level={level}", f"--log-format={style}"]
    command += [f"-o{options}"] if str(options) else []
    command += ["--", os.fspath(config.store), os.fspath(mountpoint)]
    if logs.is_journal():
        output = os.dup(2)
    else:
        try:
            output = open_file(config.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            problem = f"The log {config.log_file} cannot be opened: {error.strerror}"
            if error.errno not in _NO_LOG:
                raise FusestoreError(f"{problem}.") from error
            logger.warning("%s; the daemon keeps no log.", problem)
            output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[ready_fd],
            start_new_session=True,
            cwd="/",
            env=environment(),
        )
    finally:
        os.close(output)


def environment() -> dict[str, str]:
    """Return an environment in which a program finds this package from any directory."""
    home = os.fspath(Path(__file__).resolve().parents[2])
    ours = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # only for the service itself
    found = {name: value for name, value in os.environ.items() if name not in ours}
    if home not in (*site.getsitepackages(), site.getusersitepackages()):
        paths = [home, *filter(None, [found.get("PYTHONPATH")])]
        found["PYTHONPATH"] = os.pathsep.join(paths)
    return found


def _wait_ready(config: StoreConfig, child: subprocess.Popen[bytes], line: bytes) -> list[str]:
    """Parse the line of the daemon: return its warnings, or raise its error."""
    if not line:
        try:
            status = child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise FusestoreError(
                f"The daemon closed its pipe without an answer, and still runs: "
                f"see {config.log_file}."
            ) from None
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise FusestoreError(f"The daemon {how} before it was ready: see {config.log_file}.")
    message = json.loads(line)
    if "error" in message:
        raise error_of(message["error"]["kind"], message["error"]["message"])
    warnings: list[str] = message["warnings"]
    return warnings


def _end(child: subprocess.Popen[bytes], config: StoreConfig, mountpoint: Path) -> None:
    """End a daemon that did not become ready, and clear its mount."""
    if child.poll() is None:
        child.terminate()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    mount = mounts.find(mountpoint)
    if mount is not None and mount.store == config.store:
        mounts.clear_dead(mountpoint)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit, so that the daemon is ended, too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
