"""A job in the background: its row, its states, and those who wait for it.

A scrub, a rebalance and a recoding are jobs.  A job keeps what it must remember in a
row of its own (a dataclass that extends JobRow, as JSON), so it continues after a
restart.  The owner of a job provides the row's class and its key, the sentences for
requests that make no sense, and the work itself: a task that runs while `is_current`,
counts in the row, and calls `note` now and then and `end` at the end.

    transition  from                  to
    begin       never, stopped, done  running, with a new row
    pause       running               paused
    resume      paused                running
    stop        running               stopped
    end         running               done

A request for any other transition raises UsageError.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import trio

from ..errors import UsageError
from .log import Log

LOOK_SECONDS = 0.2
"""The interval of progress reports to a waiting caller."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class JobRow:
    """The state of a job, or how the last one ended."""

    state: str = "never"
    """never, running, paused, stopped or done."""
    rate: float | None = None
    """Bytes of I/O a second; None: as much as the I/O of users allows."""
    started: float = 0.0
    finished: float = 0.0
    """Seconds since the epoch."""


Row = TypeVar("Row", bound=JobRow)

_FROM = {
    "begin": ("never", "stopped", "done"),
    "pause": ("running",),
    "resume": ("paused",),
    "stop": ("running",),
    "end": ("running",),
}


class BackgroundJob(Generic[Row]):
    """The state of one kind of job; at most one of a kind runs."""

    def __init__(
        self, log: Log, key: bytes, row_class: type[Row], refusals: Mapping[str, str]
    ) -> None:
        """Take up the row at `key`; `refusals` has a sentence for each transition it allows."""
        self._log = log
        self._key = key
        self._refusals = refusals
        value = log.engine.get(key)
        self.row: Row = row_class(**json.loads(value)) if value else row_class()
        self._noted_at = trio.current_time()
        self._changed = trio.Event()

    @property
    def is_running(self) -> bool:
        """Whether there is work to do."""
        return self.row.state == "running"

    def is_current(self, row: Row) -> bool:
        """Return whether the work that counts in this row should continue."""
        return self.row is row and row.state == "running"

    # --- transitions ---------------------------------------------------------

    def begin(self, row: Row) -> None:
        """Begin a new job; UsageError if one runs or is paused, RowTooLargeError."""
        self.check("begin")
        row.state, row.started = "running", time.time()
        self._put(row)
        self.row = row
        self.wake()

    def pause(self) -> None:
        """Stop for now; UsageError if none runs."""
        self._go("pause", "paused")

    def resume(self, rate: float | None) -> None:
        """Continue, at another rate if one is given; UsageError if none is paused."""
        self.check("resume")
        self.row.rate = rate or self.row.rate
        self._go("resume", "running")

    def stop(self) -> None:
        """Give the job up where it is; UsageError if none runs."""
        self.check("stop")
        self.row.finished = time.time()
        self._go("stop", "stopped")

    def end(self) -> None:
        """Record that the work is complete."""
        self.check("end")
        self.row.finished = time.time()
        self._go("end", "done")

    def check(self, transition: str) -> None:
        """UsageError unless the transition is possible now."""
        if self.row.state not in _FROM[transition]:
            sentence = self._refusals.get(transition, f"There is nothing to {transition}.")
            raise UsageError(sentence.format(**asdict(self.row)))

    def _go(self, transition: str, to: str) -> None:
        self.check(transition)
        self.row.state = to
        self.note()
        self.wake()

    # --- notes, and those who wait -------------------------------------------

    def note(self) -> None:
        """Put the row, for the next commit."""
        self._put(self.row)

    def _put(self, row: Row) -> None:
        self._log.apply({self._key: json.dumps(asdict(row)).encode()})
        self._noted_at = trio.current_time()

    def note_after(self, seconds: float) -> None:
        """Put the row if it was last put at least so many seconds ago."""
        if trio.current_time() - self._noted_at > seconds:
            self.note()

    def wake(self) -> None:
        """Let the work check again, now or after its current step."""
        self._changed.set()

    async def changed(self, seconds: float) -> None:
        """Return after a transition or `wake` since the last time, or after so many seconds."""
        with trio.move_on_after(seconds):
            await self._changed.wait()
        self._changed = trio.Event()

    async def wait(self, look: Callable[[], dict[str, Any] | None], progress: Progress) -> None:
        """Report progress until the job no longer runs, or `look` has none to report."""
        while self.is_running and (message := look()) is not None:
            progress(message)
            await trio.sleep(LOOK_SECONDS)
