"""The daemon's log: its destination, and the format of its lines.

A foreground daemon logs to standard error.  A background daemon logs to
`STORE/fusestore.log`.  If systemd has connected standard error to the journal, the
daemon logs there, with priorities and without times of its own.  Standard output and
error also go to the log file, and follow it when it is rolled, so that it also has the
output of libraries and of crashes.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import UsageError
from ..text import printable
from .beneath import open_file

LEVELS = ("debug", "info", "warning", "error")
LOG_BYTES_MAX = 10 * 1000 * 1000
LOG_FILES = 3
"""How many rolled files are kept."""
RECORDS_MAX = 10_000
"""Records that wait for a disk."""
END_SECONDS = 5.0
"""How long the end of the daemon waits for the log's disk."""


def _utc(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class PrintableFormatter(logging.Formatter):
    """One line a record, and an indented one for each line of a traceback.

    Names of files can contain anything, newlines too.  None can look like a line of the log,
    or act on a terminal that shows the log.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, info: Any) -> str:  # noqa: N802
        return "\n".join(
            "  " + printable(line) for line in super().formatException(info).splitlines()
        )


class TextFormatter(PrintableFormatter):
    """`2026-01-31T12:00:00.000Z INFO daemon: text`, in UTC."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return _utc(record)


class JSONFormatter(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `logger`, `message`, and `exception` if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class JournalFormatter(PrintableFormatter):
    """`<6>daemon: text`: each line has a priority of sd-daemon(3); the journal adds the time."""

    def __init__(self, inner: logging.Formatter | None = None) -> None:
        super().__init__("%(name)s: %(message)s")
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record) if self._inner else super().format(record)
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)
"""The lowest level of Python's logging for each priority of syslog(3)."""
ERROR_PRIORITY = "<3>"


class DaemonLog(RotatingFileHandler):
    """A rolled log file (mode 0600) that also gets standard output and error."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            maxBytes=LOG_BYTES_MAX,
            backupCount=LOG_FILES,
            encoding="utf-8",
            errors="backslashreplace",
        )

    def _open(self) -> TextIOWrapper:
        fd = open_file(Path(self.baseFilename), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        return open(fd, "a", encoding=self.encoding, errors=self.errors)


class BackgroundHandler(logging.Handler):
    """Writes records in a thread, so that a disk that hangs holds up nobody who logs."""

    def __init__(self, inner: logging.Handler) -> None:
        super().__init__()
        self._inner = inner
        self._records: SimpleQueue[logging.LogRecord | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on; it is dropped if too many wait."""
        if self._records.qsize() < RECORDS_MAX:
            record.msg, record.args = record.getMessage(), None
            self._records.put(record)

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            self._inner.handle(record)

    def _end(self) -> None:
        self._records.put(None)
        self._thread.join(END_SECONDS)


def is_journal(fd: int = 2) -> bool:
    """Return whether a descriptor is the connection to the journal that systemd announced."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_level(level: str) -> None:
    """Set the lowest level to log, one of LEVELS; UsageError for others."""
    if level not in LEVELS:
        raise UsageError(f"There is no log level {level!r}; the levels are {', '.join(LEVELS)}.")
    logging.getLogger().setLevel(level.upper())


def get_level() -> str:
    """Return the lowest level that is logged, one of LEVELS."""
    return logging.getLevelName(logging.getLogger().level).lower()


def start(level: str, style: str, file: Path | None) -> None:
    """Send the log to `file`, or to standard error if None; OSError if it cannot be opened."""
    handler = DaemonLog(file) if file else logging.StreamHandler(sys.stderr)
    formatter: logging.Formatter = JSONFormatter() if style == "json" else TextFormatter()
    if not file and is_journal():
        formatter = JournalFormatter(formatter if style == "json" else None)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [BackgroundHandler(handler) if file else handler]
    set_level(level)
    logging.captureWarnings(True)
    faulthandler.enable(2)


def destination(pid: int) -> Path | None:
    """Return the file that gets the standard error of a daemon.

    None if it is no file, or cannot be determined.
    """
    try:
        target = Path(os.readlink(f"/proc/{pid}/fd/2"))
    except OSError:
        return None
    return target if target.is_file() else None
