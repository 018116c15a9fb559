"""Whether a store is healthy, in sentences, from the fields of `status`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..text import bytes_text, duration_text


def verdict(status: dict[str, Any]) -> str:
    """Whether the data is safe, in a sentence."""
    unsafe = status.get("unsafe_codes") or []
    away = [node["name"] for node in status["nodes"] if node["state"] != "up"]
    missing = sum(node["missing_shards"] or 0 for node in status["nodes"])
    problems = [str(status["error"]).rstrip(".")] if status.get("error") else []
    if status.get("metadata_error"):
        problems.append(str(status["metadata_error"]).rstrip("."))
    if away:
        problems.append(f"{', '.join(away)} {'is' if len(away) == 1 else 'are'} not up")
    if missing:
        problems.append(f"{missing:,} {'shard is' if missing == 1 else 'shards are'} missing")
    if unsafe:
        problems.append(f"code {', '.join(map(str, unsafe))} does not survive the loss of a region")
    if status["healthy"] and not problems:
        regions = _regions(status.get("regions_borne", 1))
        return f"All data is safe: every node is up, and any {regions} may be lost."
    if status["healthy"]:
        return f"All data is there, but {'; '.join(problems)}."
    return f"Not healthy: {'; '.join(problems) or 'see the log'}."


def risk_line(status: dict[str, Any]) -> str | None:
    """What one more loss would mean."""
    borne = status.get("regions_borne")
    if borne is None:
        return None
    if borne > 0:
        return f"any {_regions(borne)} may be lost"
    if borne == 0:
        return "the loss of one more region would lose data"
    if status["readable"]:
        return "some stripes may lack too many shards: 'fusestore risk' names their files"
    return "too few nodes are there: files cannot be read"


def _regions(count: int) -> str:
    return "one region" if count == 1 else f"{count} regions"


def repair_state(status: dict[str, Any]) -> str | None:
    """What is being repaired, and how long that takes, or how the last repairs went."""
    if "repair" not in status:
        return None
    running = status["repair"]
    if running is None:
        repairs = status["repairs"]
        if not repairs:
            return "none running"
        mean = sum(repair["seconds"] for repair in repairs) / len(repairs)
        last = "the last took" if len(repairs) == 1 else f"the last {len(repairs)} took"
        average = "" if len(repairs) == 1 else " on average"
        return f"none running; {last} {duration_text(mean)}{average}"
    size = bytes_text if running["unit"] == "bytes" else "{:,}".format
    text = f"{running['node']}: {running['phase']}"
    if running["total"] > 1:
        share = 100 * running["done"] // running["total"]
        unit = "" if running["unit"] == "bytes" else " shards"
        text += f", {size(running['done'])} of {size(running['total'])}{unit} ({share} %)"
    return text + _left(running)


def scrub_state(status: dict[str, Any]) -> str | None:
    """Where the scrub stands, or how the last one ended, in a few words."""
    scrub = status.get("scrub")
    if scrub is None:
        return None
    if scrub["state"] == "never":
        return "never yet"
    found = "nothing found" if not scrub["found"] else f"{scrub['found']:,} bad or gone"
    if scrub["state"] != "done":
        share = 100 * scrub["stripes"] // max(scrub["total"], scrub["stripes"], 1)
        return f"{scrub['state']}, {share} %, {found}{_left(scrub)}"
    return f"done {finished_text(scrub)}, {found}{left_over_text(scrub)}"


def finished_text(scrub: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(scrub["finished"]))


def left_over_text(scrub: dict[str, Any]) -> str:
    if scrub["left"]:
        return f", {scrub['left']:,} still missing"
    return ", all repaired" if scrub["found"] else ""


def _left(work: dict[str, Any]) -> str:
    eta = work.get("eta_seconds")
    return f", {duration_text(eta)} left" if eta is not None else ""


def health(status: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the mount serves as it was meant to, and a sentence about it.

    A store that lost what its code bears serves; whether somebody has to act is
    in the metrics.
    """
    for problem in (status["error"], status["metadata_error"]):
        if problem:
            return False, str(problem)
    if not status["readable"]:
        return False, "Too few nodes are there: files cannot be read."
    if not status["read_only"] and status["bytes_free"] <= 0:
        return False, "The store is full: nothing can be written."
    return True, verdict(dict(status))
