"""The counts of operations that outlive a mount: `STORE/metrics.json`, and its rows as CSV.

The file is replaced whole every minute, and when the mount ends: a crash loses
the counts of the last minute, and nothing else.  A mount that is read-only
counts, too, but keeps nothing.
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
from ..system.files import write_whole
from ..tally import Tallies, Tally, combined, summary

log = logging.getLogger(__name__)

KEEP_SECONDS = 60.0
FORMAT = 1
SECONDS_MAX = 1 << 40
"""No time is so late, and no mount so old."""
COLUMNS = (
    *("operation", "count", "per_second", "bytes", "bytes_per_busy_second", "success_rate"),
    *("mean", "median", "p95", "p99"),
)
"""Of the CSV; what `errors` has by name is left to JSON."""


class Counts:
    """What was counted since the last reset."""

    def __init__(self, since: float, mounted_seconds: float, tallies: Tallies) -> None:
        self.since = since
        """When it was reset, in seconds since the epoch."""
        self.mounted_seconds = mounted_seconds
        self.tallies = tallies

    @classmethod
    def read(cls, store: Path) -> Counts:
        """What the file has; nothing when it is not there or not ours."""
        file = store / COUNTS_NAME
        try:
            value = json.loads(file.read_bytes())
            if value["format"] != FORMAT:
                raise ValueError(f"it has format {value['format']}")
            tallies = {name: Tally.decode(row) for name, row in value["operations"].items()}
            since, seconds = float(value["since"]), float(value["mounted_seconds"])
            if not (0 <= since < SECONDS_MAX and 0 <= seconds < SECONDS_MAX):
                raise ValueError("it has a time that is none")
            return cls(since, seconds, tallies)
        except FileNotFoundError:
            pass
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            log.warning("%s cannot be used, counting begins anew: %s", file, error)
        return cls(time.time(), 0.0, {})

    def write(self, store: Path) -> None:
        """Replace the file, durably; OSError."""
        value = {
            "format": FORMAT,
            "since": self.since,
            "mounted_seconds": self.mounted_seconds,
            "operations": {name: tally.encode() for name, tally in self.tallies.items()},
        }
        write_whole(store / COUNTS_NAME, json.dumps(value))

    def rows(self) -> dict[str, Any]:
        """What `fusestore metrics summary --json` prints; times in seconds."""
        return {
            "since": self.since,
            "mounted_seconds": self.mounted_seconds,
            "operations": summary(self.tallies, self.mounted_seconds),
        }


class LiveCounts:
    """Adds what this mount counts to what the ones before it did."""

    def __init__(self, store: Path, tallies: Tallies, *, keeps: bool) -> None:
        """`tallies` is what goes on counting; without `keeps` the file is only read."""
        self._store = store
        self._live = tallies
        self._keeps = keeps
        self._kept = Counts.read(store)
        self._began = time.monotonic()
        self._before = combined(tallies, {})
        self._writing = trio.Lock()

    def now(self) -> Counts:
        """All that was counted since the last reset."""
        live = combined(self._live, self._before, -1)
        seconds = self._kept.mounted_seconds + time.monotonic() - self._began
        return Counts(self._kept.since, seconds, combined(self._kept.tallies, live))

    def reset(self) -> None:
        """Count from nothing on."""
        self._kept = Counts(time.time(), 0.0, {})
        self._began = time.monotonic()
        self._before = combined(self._live, {})

    async def keep(self) -> None:
        """Write the file, if it is to be; that it cannot be is only logged."""
        if not self._keeps:
            return
        try:
            async with self._writing:
                await trio.to_thread.run_sync(self.now().write, self._store)
        except OSError as error:
            log.warning("The counts of operations cannot be kept: %s", error)

    async def run(self) -> None:
        """Write the file every minute, until cancelled."""
        while True:
            await trio.sleep(KEEP_SECONDS)
            await self.keep()


def csv_text(rows: dict[str, Any]) -> str:
    """The rows of a summary as CSV, with a line of names; times in seconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows["operations"])
    return text.getvalue()
