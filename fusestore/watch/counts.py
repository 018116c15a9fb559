"""The counts of operations that outlive a mount: `STORE/metrics.json`, and its rows as CSV.

The file is replaced as a whole every minute, and when the mount ends.  A crash
loses only the counts of the last minute.  A read-only mount counts, too, but does
not write the file.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import trio

from ..config.store_config import COUNTS_NAME
from ..system import threads
from ..system.beneath import read_small
from ..system.files import write_whole
from ..tally import Tallies, Tally, combined, summary

logger = logging.getLogger(__name__)

KEEP_SECONDS = 60.0
FORMAT = 1
FILE_BYTES_MAX = 1 << 20
"""The longest file that is read; all operations with all their times take a tenth of this."""
SECONDS_MAX = 1 << 40
"""All valid times and durations are below this."""
COLUMNS = (
    *("operation", "count", "per_second", "bytes", "bytes_per_busy_second", "success_rate"),
    *("mean", "median", "p95", "p99"),
)
"""The columns of the CSV; only JSON has `errors`."""


class Counts:
    """The counts since the last reset."""

    def __init__(self, since: float, mounted_seconds: float, tallies: Tallies) -> None:
        self.since = since
        """The time of the reset, in seconds since the epoch."""
        self.mounted_seconds = mounted_seconds
        self.tallies = tallies

    @classmethod
    def read(cls, store: Path) -> Counts:
        """Read the counts from the file; empty if the file is missing or cannot be used."""
        file = store / COUNTS_NAME
        try:
            value = json.loads(read_small(file, FILE_BYTES_MAX))
            if value["format"] != FORMAT:
                raise ValueError(f"it has format {value['format']}")
            tallies = {name: Tally.decode(row) for name, row in value["operations"].items()}
            since, seconds = float(value["since"]), float(value["mounted_seconds"])
            if not (0 <= since < SECONDS_MAX and 0 <= seconds < SECONDS_MAX):
                raise ValueError("it has an invalid time")
            return cls(since, seconds, tallies)
        except FileNotFoundError:
            pass
        except (
            OSError,
            ValueError,
            ArithmeticError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning("%s cannot be used, and the counts restart at zero: %s", file, reason)
        return cls(time.time(), 0.0, {})

    def write(self, store: Path) -> None:
        """Replace the file durably; OSError."""
        value = {
            "format": FORMAT,
            "since": self.since,
            "mounted_seconds": self.mounted_seconds,
            "operations": {name: tally.encode() for name, tally in self.tallies.items()},
        }
        write_whole(store / COUNTS_NAME, json.dumps(value))

    def rows(self) -> dict[str, Any]:
        """Return the fields of `fusestore metrics summary --json`; times are in seconds."""
        return {
            "since": self.since,
            "mounted_seconds": self.mounted_seconds,
            "operations": summary(self.tallies, self.mounted_seconds),
        }


class LiveCounts:
    """The counts of this mount, added to those of earlier mounts."""

    def __init__(self, store: Path, tallies: Tallies, *, keeps: bool) -> None:
        """`tallies` are the live counters of this mount; without `keeps` the file is only read."""
        self._store = store
        self._live = tallies
        self._keeps = keeps
        self._kept = Counts.read(store)
        self._began = time.monotonic()
        self._before = combined(tallies, {})
        self._writing = trio.Lock()
        self._problem = ""
        """Why the file could not be written the last time."""

    def now(self) -> Counts:
        """Return all counts since the last reset."""
        live = combined(self._live, self._before, -1)
        seconds = self._kept.mounted_seconds + time.monotonic() - self._began
        return Counts(self._kept.since, seconds, combined(self._kept.tallies, live))

    def reset(self) -> None:
        """Set the counts to zero."""
        self._kept = Counts(time.time(), 0.0, {})
        self._began = time.monotonic()
        self._before = combined(self._live, {})

    async def keep(self) -> None:
        """Write the file if this mount keeps counts; a failure is only logged."""
        if not self._keeps:
            return
        try:
            async with self._writing:
                await threads.call(self.now().write, self._store, abandon_on_cancel=True)
            self._problem = ""
        except OSError as error:
            problem = error.strerror or str(error)
            if problem != self._problem:  # not each minute
                logger.warning("the counts of operations cannot be written: %s", problem)
            self._problem = problem

    async def run(self) -> None:
        """Write the file every minute, until cancelled."""
        while True:
            await trio.sleep(KEEP_SECONDS)
            await self.keep()


def csv_text(rows: dict[str, Any]) -> str:
    """Format the rows of a summary as CSV, with a line of names; times are in seconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows["operations"])
    return text.getvalue()
