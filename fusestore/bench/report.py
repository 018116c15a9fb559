"""Reports of a benchmark: a table while it runs, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rounds import Row
from .targets import Target

NAME_COLUMNS = 44
BAR_COLUMNS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"

COLUMNS = (
    "workload", "figure", "unit", "target", "median", "least", "most", "rounds",
    "ratio", "share_of_limit", "goal", "goal_met",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """The report on some targets; the others are compared with the first one."""

    targets: Sequence[Target]
    disk_share: float
    """The share of data, without parity, in the bytes written to the disk."""

    @property
    def names(self) -> list[str]:
        """The names of the targets."""
        return [target.name for target in self.targets]

    def has_limits(self) -> bool:
        """Whether the targets include a limit (raw or null)."""
        return not {"raw", "null"}.isdisjoint(self.names[1:])

    def _goal_met(self, row: Row, target: str) -> bool | None:
        """Return whether a goal is met; goals apply only to the first target if it is a store."""
        first = self.targets[0]
        return row.goal_met(target) if first.name == target and first.daemon else None

    # --- the table -----------------------------------------------------------

    def head(self) -> str:
        """The names of the columns."""
        line = " " * NAME_COLUMNS + "".join(f"{cut(name):>11}" for name in self.names) + " " * 8
        line += "".join(f"{'× ' + cut(name):>{ratio_columns(name)}}" for name in self.names[1:])
        return line + ("  of the limit" if self.has_limits() else "")

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        """The lines of a workload."""
        first = self.names[0]
        for row in rows:
            line = f"{row.figure:{NAME_COLUMNS}}"
            for name in self.names:
                line += f"{number_text(row.median(name)) if name in row.values else '':>11}"
            line += f" {row.unit:7}"
            for name in self.names[1:]:
                ratio = row.ratio(first, name)
                line += f"{'' if ratio is None else f'{ratio:.2f}':>{ratio_columns(name)}}"
            share = row.share(first, self.disk_share)
            if share is not None:
                line += f"  {bar(share)} {share:4.0%}"
            met = self._goal_met(row, first)
            if met is not None:
                line += f"  goal {row.goal} {'✓' if met else '✗'}"
            yield line.rstrip()

    # --- for programs --------------------------------------------------------

    def records(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return one record for each figure and target, with the values of each round."""
        return [
            {
                "workload": row.workload,
                "figure": row.figure,
                "unit": row.unit,
                "target": name,
                "median": row.median(name),
                "least": min(values),
                "most": max(values),
                "rounds": len(values),
                "ratio": row.ratio(self.names[0], name),
                "share_of_limit": row.share(name, self.disk_share),
                "goal": str(row.goal) if row.goal else None,
                "goal_met": self._goal_met(row, name),
                "values": values,
            }
            for row in rows
            for name, values in sorted(
                row.values.items(), key=lambda item: self.names.index(item[0])
            )
        ]


def number_text(value: float) -> str:
    """Format a number with three significant digits; print counts in full."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:#.3g}" if value >= 0.1 else f"{value:.2g}"


def cut(name: str) -> str:
    """Shorten the name of a target for the head of a column."""
    return name if len(name) <= 10 else name[:9] + "…"


def ratio_columns(name: str) -> int:
    """Return the width of the column with the ratio of the first target to this one."""
    return max(8, len(cut(name)) + 4)


def value_text(record: dict[str, Any]) -> str:
    """Format the median of a record with its unit."""
    return f"{number_text(record['median'])} {record['unit']}"


def bar(share: float) -> str:
    """Draw a bar with a share of its full length."""
    eighths = round(max(0.0, min(share, 1.0)) * BAR_COLUMNS * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(BAR_COLUMNS, "·")


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the records without the values of each round; None is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write all results of a run."""
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
