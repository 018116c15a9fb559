"""Sentences about the health of a store, made from the fields of `status`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..text import bytes_text, counted, duration_text
from ..typed_json import from_json
from .fields import Cleaning, MountStatus, Quarantine, Recoding, Scrub, Status


def status_of(
    report: Mapping[str, Any],
    *,
    recode: Recoding | None = None,
    cleaning: Cleaning | None = None,
    mount: MountStatus | None = None,
) -> Status:
    """Make the fields of `status`, including the summary, from the report of a store."""
    status = from_json(Status, dict(report))
    status = replace(status, recode=recode, cleaning=cleaning, mount=mount)
    if cleaning is not None and cleaning.doubtful_stripes:
        status = replace(status, healthy=False)
    return replace(status, summary=verdict(status))


def verdict(status: Status) -> str:
    """Return a sentence that states whether the data is safe."""
    away = [node.name for node in status.nodes if node.state != "up"]
    missing = sum(node.missing_shards for node in status.nodes)
    said = (status.error, status.metadata_error, status.full)
    problems = [text[0].lower() + text[1:].rstrip(".") for text in said if text]
    if away:
        problems.append(f"{', '.join(away)} {'is' if len(away) == 1 else 'are'} not up")
    if missing:
        problems.append(f"{counted(missing, 'shard is', 'shards are')} missing")
    if status.unsafe_codes:
        codes = ", ".join(status.unsafe_codes)
        problems.append(f"code {codes} does not survive the loss of a region")
    if status.rows_in_doubt or (status.cleaning and status.cleaning.doubtful_stripes):
        problems.append("rows of the metadata are damaged: run 'fusestore fsck --repair'")
    if status.lost_bytes:
        problems.append(
            f"{bytes_text(status.lost_bytes)} of files are lost: 'fusestore fsck' names the files"
        )
    if status.healthy and not problems:
        regions = _regions(status.regions_borne)
        return f"All data is safe: every node is up, and any {regions} may be lost."
    if status.healthy:
        return f"All data is present, but {'; '.join(problems)}."
    return f"Not healthy: {'; '.join(problems) or 'see the log'}."


def health(status: Status) -> tuple[bool, str]:
    """Return whether the mount works as intended, and a sentence about it.

    A store also works as intended while its code covers its losses.  The metrics
    show whether somebody must act.
    """
    for problem in (status.error, status.metadata_error):
        if problem:
            return False, problem
    if not status.readable:
        return False, "Too few nodes are available to read all files."
    if status.full and not status.read_only:
        return False, status.full
    return True, verdict(status)


def risk_text(status: Status) -> str:
    """Describe the effect of one more loss."""
    borne = status.regions_borne
    if borne > 0:
        return f"any {_regions(borne)} may be lost"
    if borne == 0:
        return "the loss of one more region would lose data"
    if status.readable:
        return "some stripes may lack too many shards: 'fusestore risk' names their files"
    return "too few nodes are available to read all files"


def _regions(count: int) -> str:
    return "one region" if count == 1 else counted(count, "region")


def repair_text(status: Status) -> str:
    """Describe the running repair, or the last repairs."""
    running, repairs = status.repair, status.repairs
    if running is None:
        if not repairs:
            return "none running"
        mean = sum(repair.seconds for repair in repairs) / len(repairs)
        last = "the last took" if len(repairs) == 1 else f"the last {len(repairs)} took"
        average = "" if len(repairs) == 1 else " on average"
        return f"none running; {last} {duration_text(mean)}{average}"
    size = bytes_text if running.unit == "bytes" else "{:,}".format
    text = f"{running.node}: {running.phase}"
    if running.total > 1:
        share = 100 * running.done // running.total
        unit = "" if running.unit == "bytes" else " shards"
        text += f", {size(running.done)} of {size(running.total)}{unit} ({share} %)"
    return text + _time_left(running.eta_seconds)


def scrub_text(status: Status) -> str:
    """Describe the running scrub, or the last one, in a few words."""
    scrub = status.scrub
    if scrub.state == "never":
        return "never run"
    if scrub.state == "done":
        return f"done {finished_text(scrub)}, {found_text(scrub)}{left_over_text(scrub)}"
    share = 100 * scrub.stripes // max(scrub.total, scrub.stripes, 1)
    text = f"{scrub.state}, {share} %, {found_text(scrub)}{_time_left(scrub.eta_seconds)}"
    return f"{text}; it continues by itself: {scrub.problem}" if scrub.problem else text


def finished_text(scrub: Scrub) -> str:
    """Format the time at which a scrub ended."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(scrub.finished))


def found_text(scrub: Scrub) -> str:
    """Describe the findings of a scrub."""
    found = f"{scrub.found:,} bad or missing" if scrub.found else ""
    unread = f"{counted(scrub.unread, 'place')} could not be read" if scrub.unread else ""
    skipped = counted(scrub.skipped, "shard")
    skipped = f"{skipped} skipped (on nodes that are not up)" if scrub.skipped else ""
    return ", ".join(filter(None, (found or "nothing found", unread, skipped)))


def left_over_text(scrub: Scrub) -> str:
    """Describe the repair of the findings; the text follows `found_text`."""
    if scrub.left:
        return f", {scrub.left:,} still missing"
    return ", all repaired" if scrub.found else ""


def quarantine_text(kept: Quarantine) -> str:
    """Describe the segments that are kept although no file is known to need them."""
    return (
        f"{bytes_text(kept.bytes)} in {counted(kept.segments, 'segment')} that no file is known to "
        "need, "
        f"because {kept.why}; until 'fusestore fsck' on the mounted store finds nothing"
    )


def cleaning_text(cleaning: Cleaning) -> str:
    """Describe the garbage, and the cleaning that gives its room back, in a few words."""
    if cleaning.waste is None:
        return "garbage is not counted"
    text = f"{bytes_text(cleaning.waste)} of garbage, cleaned above {bytes_text(cleaning.bound)}"
    if cleaning.state in ("running", "urgent"):
        text += "; running"
    if cleaning.held_writers:
        text += f", {counted(cleaning.held_writers, 'write')} held up"
    if cleaning.freed:
        text += f"; {bytes_text(cleaning.freed)} given back since the mount"
    if cleaning.doubtful_stripes:
        stripes = counted(cleaning.doubtful_stripes, "stripe")
        text += f"; {stripes} with wrong counts left alone: run 'fusestore fsck --repair'"
    if cleaning.unreadable_stripes:
        text += f"; {counted(cleaning.unreadable_stripes, 'stripe')} cannot be read"
    reason = cleaning.waits_for.rstrip(".")
    return f"{text}; it waits: {reason}" if reason else text


def is_cleaning_of_interest(cleaning: Cleaning) -> bool:
    """Return whether cleaning runs or waits, or leaves alone what somebody must look at."""
    left = cleaning.doubtful_stripes or cleaning.unreadable_stripes
    over = cleaning.waste is not None and cleaning.waste > cleaning.bound
    return bool(cleaning.state != "idle" or left or over)


def _time_left(seconds: float | None) -> str:
    return f", {duration_text(seconds)} left" if seconds is not None else ""
