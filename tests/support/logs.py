"""Warnings and errors in the log of fusestore, and which of them a test expects.

A line is `LEVEL LOGGER: MESSAGE`, as in the log file without its time.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z ((?:WARNING|ERROR|CRITICAL) .*)")


class Recorder(logging.Handler):
    """Keeps the warnings and errors that are logged in this process, and those it is given."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the first line of a record, without a traceback."""
        self.lines.append(self.format(record).partition("\n")[0])

    def take(self) -> list[str]:
        """Return the lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


class LogFile:
    """The log file of a daemon, with the files that were rolled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._characters_read = 0

    def text(self) -> str:
        """Return all that is left of the log; empty if there is none."""
        rolled = self.path.parent.glob(f"{self.path.name}.[0-9]")
        paths = [*sorted(rolled, reverse=True), self.path]
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def new_lines(self) -> list[str]:
        """Return the warnings and errors since the last call."""
        text = self.text()
        new, self._characters_read = text[self._characters_read :], len(text)
        return [line for line in map(_important, new.splitlines()) if line is not None]


def _important(line: str) -> str | None:
    """Return a line of a log file without its time, if it is a warning or an error."""
    if line.startswith('{"time"'):
        fields = json.loads(line)
        level = fields["level"].upper()
        important = level in ("WARNING", "ERROR", "CRITICAL")
        return f"{level} {fields['logger']}: {fields['message']}" if important else None
    matched = TEXT_LINE.fullmatch(line)
    return matched[1] if matched else None


def unexpected(lines: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the lines that no pattern is found in."""
    return [line for line in lines if not any(re.search(pattern, line) for pattern in patterns)]


# --- lines that several tests expect ---------------------------------------------------

AS_TOLD = r"(failed|no room for the \w+|no room), as told"
HUNG = r"members\.member: Node \S+ did not (answer|write a shard) within \d+ seconds"
WAITED_FOR = r"members\.member: Node \S+ has not answered for \d+ seconds\. .*, and waits"
METADATA_STALL = r"commit\.checkpoint: The disk of the metadata does not answer"
GONE = r"members\.member: Node \S+ is gone from .* The node is now out of use"
OUT_OF_USE = r"members\.member: .* The node is now out of use"
SLOW = r"read\.reader: Node \S+ did not answer .* Others are read for a while"
CORRUPT = r"read\.reader: Shard \d+ of stripe \S+ on node \S+ is corrupt\. It is decoded"
DISAGREE = r"read\.reader: Shard \d+ of stripe \S+ and its row disagree\. It is decoded"
UNREAD_FILE = r": Node \S+ \(.*\) cannot (read|examine) (journal|shards)/"
LOST_STRIPE = r"Stripe \S+ has fewer than the \d+ good shards that it needs"
NO_STRIPE = r"read\.reader: .* cannot be read: Stripe \S+ is not in the metadata"
WRONG_ROW = r"read\.reader: The row of stripe \S+ is wrong: .* It is mended"
NOT_WHERE_ITS_ROW_SAYS = r"repair\.rebuild: Shard \d+ of stripe \S+ is not where its row says"
SCRUBBED = r"repair\.scrub: Scrub: shard \d+ of stripe \S+ is bad or gone"
MENDED = r"(row_keeper|rows_at_mount): The metadata is damaged: .* It is mended"
NOT_MENDED = r"rows_at_mount: The metadata is damaged .* do not give the right values"
DROPPED = r"commit\.replay: \d+ commits? that w\S+ never acknowledged \S+ dropped"
SEGMENT_KEPT = r"commit\.stray_segments: Segment \d+ of node \S+ is in no table"
SEGMENT_IN_USE = r"commit\.reclaim: Segment \d+ of node \S+ was to be freed"
NOT_IN_TABLES = r"commit\.stray_segments: Segment \d+ of node \S+ is in use but not in the tables"
CHECKPOINT_FAILED = r"commit\.checkpoint: .* The checkpoint will be tried again"
JOURNAL_DAMAGED = (
    r"journal_scan: Node \S+: .* no record was found in the last .* it is damaged"
    r"|journal_scan: Node \S+ has many journal segments without records, and was not read"
)
FOREIGN_FILES = (
    r"nodes\.segment_files: .* has files that are not segments of this store"
    r"|node_contents: .* holds [\d,]+ files? with numbers that this store has not reached"
    r"|commit\.stray_segments: Segment \d+ of node \S+ is not of this store: it is ignored"
)
OTHER_HISTORY = (
    r"(node_contents|comeback): Node \S+: It holds commits \d+ to \d+ of another history"
)
RECOGNIZED = r"nodes\.place: .*node\.toml.* The records beside it are those of node \S+, and"
IDENTITY_STAYS = r"nodes\.place: \S+node\.toml cannot be written anew"
CLAIMED = r"repair\.claim: \S+ ?.*node\.toml"
NOT_DELETED = r"grow\.topology: The data of removed node \S+ could not be deleted"
TOO_FEW_NODES = r"log\.log: (Too few nodes|Fewer than \d+ nodes) .* the mount is read-only until"
ONLY_READ = r"members\.member: .* The node is read, but gets no data"
CLOSED = r": Node \S+ \(.*\) cannot .*: it is closed\."  # what hung in a node that was let go
