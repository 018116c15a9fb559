"""What people see of cleaning: the fields of `status` and of `compact`."""

from __future__ import annotations

from typing import Any

from ..log.log import Log
from ..text import counted
from .cleaner import Cleaner, Compaction
from .emptier import Emptier


class CleaningReport:
    """Reports what a cleaner does, and what it leaves alone."""

    def __init__(self, log: Log, cleaner: Cleaner, emptier: Emptier) -> None:
        self._log = log
        self._cleaner = cleaner
        self._emptier = emptier

    def status(self) -> dict[str, Any]:
        """Return the fields `cleaning` of `status`."""
        cleaner = self._cleaner
        waits_for = self._waits_for()
        if waits_for:
            state = "waiting"
        elif cleaner.is_urgent and self._log.waste_counted:
            state = "urgent"
        else:
            state = "running" if cleaner.is_running else "idle"
        return {
            "state": state,
            "waits_for": waits_for,
            "bound": cleaner.bound,
            "pinned": self._emptier.pinned,
            "freed": self._emptier.freed,
            "moved": self._emptier.moved,
            "held_writers": cleaner.held_writers,
            **self._left(),
        }

    def compaction(self, compaction: Compaction) -> dict[str, Any]:
        """Return the progress of a compaction, or its result."""
        return {
            "state": "done" if compaction.ended.is_set() else "running",
            "problem": compaction.problem,
            "freed": self._emptier.freed - compaction.freed_before,
            "moved": self._emptier.moved - compaction.moved_before,
            **self._left(),
        }

    def _left(self) -> dict[str, int | None]:
        return {
            "waste": self._log.waste if self._log.waste_counted else None,
            "doubtful_stripes": len(self._emptier.doubted),
            "unreadable_stripes": len(self._emptier.unreadable),
            "absent_stripes": len(self._emptier.absent),
        }

    def _waits_for(self) -> str:
        """Return a sentence that explains why there is too much waste; empty while there is not."""
        cleaner = self._cleaner
        if not self._log.waste_counted or self._log.waste <= cleaner.bound:
            return ""
        reason = cleaner.hindrance() or self._emptier.waits_for
        if reason or not cleaner.is_fruitless():
            return reason
        if self._emptier.absent:
            stripes = counted(len(self._emptier.absent), "stripe")
            return f"{stripes} with shards on nodes that are not up must wait for these."
        return "No other stripe gives back enough for what must be written."
