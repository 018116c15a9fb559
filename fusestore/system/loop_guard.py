"""A process whose event loop failed ends, and the log says why.

If trio itself meets an error, as when the system refuses memory, it cancels all tasks; but it may
deliver no result of a thread any more, and tasks that may not be cancelled wait for those.  The
daemon would neither serve nor end.  The journals make it safe to end it at any moment.
"""

from __future__ import annotations

import _thread
import logging
import os
import time
from contextlib import suppress

import trio

logger = logging.getLogger(__name__)

END_SECONDS = 30.0
"""How long a process may take to end after trio failed."""
STATUS = 3
_LOG_SECONDS = 1.0
_guard: trio.lowlevel.RunVar[_Guard] = trio.lowlevel.RunVar("loop_guard")


class _Guard(trio.abc.Instrument):
    """Watches from a thread."""

    def __init__(self) -> None:
        self._stops, self._is_over = _thread.allocate_lock(), _thread.allocate_lock()
        self._stops.acquire()
        self._is_over.acquire()
        _thread.start_new_thread(self._watch, ())
        trio.lowlevel.add_instrument(self)
        trio.lowlevel.spawn_system_task(self._until_stopped)

    async def _until_stopped(self) -> None:
        """Trio stops its own tasks when all others have ended, or when it failed."""
        try:
            await trio.sleep_forever()
        finally:
            self._stops.release()

    def after_run(self) -> None:
        """Note that the event loop has ended; trio calls this."""
        self._is_over.release()

    def _watch(self) -> None:
        self._stops.acquire()
        if self._is_over.acquire(timeout=END_SECONDS):
            return
        with suppress(MemoryError):
            logger.critical(
                "The event loop failed, and this process did not end within %.0f seconds: it is "
                "killed. What fsync acknowledged is safe; mount the store again.",
                END_SECONDS,
            )
            time.sleep(_LOG_SECONDS)
        os._exit(STATUS)


def begin() -> None:
    """Guard the event loop that runs from now on; RuntimeError or MemoryError without a thread."""
    try:
        _guard.get()
    except LookupError:
        _guard.set(_Guard())
