"""A plot of a benchmark: for each figure one bar per target, as a share of the limit.

Figures without a limit are omitted.  If no figure has a limit, a bar is the share of the
best target.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .report import value_text

FORMATS = (".png", ".svg")
SHARE_SHOWN_MAX = 1.5
"""The longest bar: the cache of a disk may be many times as fast as any daemon."""
COLOURS = ("#1f6f8b", "#c8c8c8", "#e3a857", "#8a6fa8", "#7fa86f", "#b85c5c")


def check(path: Path) -> None:
    """Raise UsageError if a plot cannot be written to `path`; call this before measuring."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} cannot be plotted: its name must end with .png or .svg.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "Plotting needs matplotlib, which is not installed: pip install 'fusestore[bench]'."
        )


def write(path: Path, records: Sequence[dict[str, Any]], title: str, names: Sequence[str]) -> None:
    """Plot records (see report.py) of the targets `names`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shares = {key: value for key, value in _shares(records).items() if value}
    label = "share of the limit: what disk and null daemon allow"
    if not any(record["share_of_limit"] for record in records):
        label = "share of the best"
    figures = list(dict.fromkeys((record["workload"], record["figure"]) for record in records))
    figures = [key for key in figures if any((*key, name) in shares for name in names)]
    by_key = {(each["workload"], each["figure"], each["target"]): each for each in records}

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusestore", "font.size": 9}):
        drawing = Figure(figsize=(9, 1.4 + 0.15 * (len(names) + 0.8) * len(figures)))
        axes = drawing.add_subplot()
        thick = 0.8 / len(names)
        for order, name in enumerate(names):
            there = [line for line, key in enumerate(figures) if (*key, name) in shares]
            where = [line - 0.4 + thick * (order + 0.5) for line in there]
            keys = [(*figures[line], name) for line in there]
            lengths = [min(shares[key], SHARE_SHOWN_MAX) for key in keys]
            colour = COLOURS[order % len(COLOURS)]
            bars = axes.barh(where, lengths, thick * 0.9, color=colour, label=name)
            texts = [value_text(by_key[key]) for key in keys]
            axes.bar_label(bars, texts, padding=2, fontsize=7)
        axes.set_yticks(range(len(figures)), [figure for _, figure in figures])
        axes.set_ylim(len(figures) - 0.5, -0.5)
        axes.set_xlim(0, SHARE_SHOWN_MAX + 0.2)
        axes.axvline(1.0, color="#444444", linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=9, loc="left", pad=24)
        axes.spines[["top", "right"]].set_visible(False)
        if figures:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), frameon=False)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(
            path,
            bbox_inches="tight",
            dpi=150,
            metadata=nothing if path.suffix.lower() == ".svg" else {},
        )


def _shares(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float | None]:
    """Return the length of each bar by workload, figure and target."""
    limited = any(record["share_of_limit"] for record in records)
    best: dict[tuple[str, str], float] = {}
    for record in records:
        key, better = (record["workload"], record["figure"]), max
        if not record["unit"].endswith("/s"):
            better = min
        best[key] = better(best.get(key, record["median"]), record["median"])
    found = {}
    for record in records:
        key, median = (record["workload"], record["figure"]), record["median"]
        ratio = median / best[key] if best[key] else 0.0
        if not record["unit"].endswith("/s"):
            ratio = best[key] / median if median else 0.0
        found[(*key, record["target"])] = record["share_of_limit"] if limited else ratio
    return found
