"""What `status`, `repair` and `inspect` print for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Row = Sequence[str]

GOOD_STATES = {"open", "sealed", "whole", "healthy"}
"""States of a stripe that lacks nothing."""


def bytes_text(count: int) -> str:
    """A number of bytes with a unit: `5.6 GiB`."""
    if count < 1024:
        return f"{count} B"
    size, unit = float(count), "B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):  # noqa: B007
        size /= 1024
        if size < 1023.95:
            break
    return f"{size:.1f} {unit}"


def speed_text(size: int, seconds: float) -> str:
    """How long so many bytes took, and how fast that was: `2.0 s (51.2 MB/s)`."""
    return f"{seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.1f} MB/s)"


def table_lines(rows: Sequence[Row], right: Sequence[int] = ()) -> Iterator[str]:
    """Rows of equal length as aligned columns; those numbered in `right` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def printable(text: str) -> str:
    """A line as a terminal may get it: names of files can have any characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- status ------------------------------------------------------------------


def status_lines(status: dict[str, Any], now: float | None = None) -> Iterator[str]:
    """One screen; the first line is a sentence that says whether the data is safe.

    `now` is in seconds since the epoch, and the present by default.
    """
    now = time.time() if now is None else now
    yield verdict(status)
    for node in status["nodes"]:
        if node.get("error"):
            yield f"  {node['name']}: {node['error']}"
    yield ""
    where = "no"
    if status["mounted"]:
        where = f"on {status['mountpoint']} by process {status['pid']}"
    elif status.get("dead_mount"):
        where += f"; a daemon died on {status['dead_mount']}: mount it there again, or umount that"
    facts = [
        ("store", f"{status['store']} ({status['uuid']})"),
        ("mounted", where),
        ("log", status.get("log_file") or "standard error, or the journal"),
        ("metrics", status.get("metrics")),
        ("code", status["code"]),
        ("files", _files(status)),
        ("last commit", _commit(status, now)),
        ("repair", repair_state(status)),
        ("scrub", scrub_state(status)),
        ("risk", risk_line(status)),
    ]
    if (status.get("recode") or {}).get("state") == "running":
        facts.append(("recoding", recode_line(status["recode"])))
    yield from table_lines([(f"{name}:", text) for name, text in facts if text])
    yield ""
    heads = ("NODE", "REGION", "STATE", "USED", "FREE", "MISSING", "PATH")
    rows = [_node_row(node) for node in status["nodes"]]
    yield from table_lines([heads, *rows], right=(3, 4, 5))


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


def _files(status: dict[str, Any]) -> str:
    text = f"{status['files']:,}, {bytes_text(status['bytes'])} in {status['stripes']:,} stripes"
    if status.get("bytes_free") is not None:
        text += f"; {bytes_text(status['bytes_free'])} more will fit"
    return text


def _commit(status: dict[str, Any], now: float) -> str:
    text = _plain(status.get("last_commit"))
    if status.get("last_commit_at"):
        text += f", {duration_text(max(0.0, now - status['last_commit_at']))} ago"
    return f"{text}; checkpoint {_plain(status.get('checkpoint'))}"


def duration_text(seconds: float) -> str:
    """A time in the two largest units that tell: `3 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (("day", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    parts: list[tuple[int, str]] = []
    for name, size in units:
        count, whole = divmod(whole, size)
        if count or parts:
            parts.append((count, "days" if name == "day" and count != 1 else name))
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count)


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
    return f"done {_when(scrub)}, {found}{_left_over(scrub)}"


def _when(scrub: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(scrub["finished"]))


def _left_over(scrub: dict[str, Any]) -> str:
    if scrub["left"]:
        return f", {scrub['left']:,} still missing"
    return ", all repaired" if scrub["found"] else ""


def _left(work: dict[str, Any]) -> str:
    eta = work.get("eta_seconds")
    return f", {duration_text(eta)} left" if eta is not None else ""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return "none" if value is None else str(value)


def _node_row(node: dict[str, Any]) -> Row:
    def size(key: str) -> str:
        return "-" if node.get(key) is None else bytes_text(node[key])

    missing = "-" if node.get("missing_shards") is None else f"{node['missing_shards']:,}"
    return (
        node["name"],
        node["region"],
        state_text(node),
        size("bytes_used"),
        size("bytes_free"),
        missing,
        node["path"],
    )


# --- policies and quotas ----------------------------------------------------


def policy_line(path: str, policy: dict[str, Any], mountpoint: str) -> str:
    """A code, where it comes from, and what it survives."""
    origin = "the default of the store"
    if policy["set_on"] is not None:
        origin = f"set on {mountpoint.rstrip('/')}{policy['set_on']}".rstrip("/")
    shards, borne = policy["shards_borne"], policy["regions_borne"]
    return (
        f"{path}: {policy['code']}, {origin}; survives the loss of any {borne} of "
        f"{policy['regions']} regions, and of any {shards} shard{'s'[: shards != 1]} of a stripe."
    )


def recode_line(job: dict[str, Any]) -> str:
    """How far a recoding is, or how it ended."""
    to = job["to"] or "the policy of each directory"
    what = f"{job['path']} to {to}: {bytes_text(job['recoded'])} recoded"
    if job["state"] != "running":
        unreadable = f", {job['unreadable']:,} could not be read" if job["unreadable"] else ""
        return f"{what}, {job['files']:,} files looked at{unreadable}; {job['state']}."
    size = f"{bytes_text(job['size'])} of {bytes_text(job['total'])}"
    far = f"{job['files']:,} of {job['total_files']:,} files, {size} looked at"
    if job["waits_for"]:
        return f"{what}, {far}; it waits: {job['waits_for']}"
    left = job["seconds_left"]
    return (
        f"{what}, {far}, {'time left unknown' if left is None else duration_text(left) + ' left'}"
    )


def quota_lines(quotas: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of quotas; those that are not in force yet say so."""

    def most(limit: int | None, text: Callable[[int], str]) -> str:
        return "no limit" if limit is None else text(limit)

    rows: list[Row] = [("DIRECTORY", "BYTES", "OF", "FILES", "OF", "STATE")]
    states = {
        "counting": "being counted: not enforced yet",
        "active": "enforced",
        "clearing": "being cleared: not enforced",
    }
    for quota in quotas:
        rows.append(
            (
                quota["path"],
                bytes_text(quota["bytes_used"]),
                most(quota["bytes_max"], bytes_text),
                f"{quota['files_used']:,}",
                most(quota["files_max"], "{:,}".format),
                states.get(quota["state"], quota["state"]),
            )
        )
    yield from table_lines(rows, right=(1, 2, 3, 4))


def state_text(node: dict[str, Any]) -> str:
    """The state of a node, and whether it is being drained."""
    return f"{node['state']}, draining" if node.get("draining") else str(node["state"])


# --- growing ---------------------------------------------------------------


def nodes_lines(result: dict[str, Any]) -> Iterator[str]:
    """The nodes, what they hold and what they should."""
    heads = ("NODE", "REGION", "WEIGHT", "STATE", "SHARDS", "HOLDS", "SHARE", "FREE", "PATH")
    rows = [
        (
            node["name"],
            node["region"],
            f"{node['weight']:g}",
            "drained" if node["drained"] else state_text(node),
            f"{node['shards']:,}",
            bytes_text(node["bytes"]),
            bytes_text(node["share_bytes"]),
            bytes_text(node["bytes_free"]),
            node["path"],
        )
        for node in result["nodes"]
    ]
    yield from table_lines([heads, *rows], right=(2, 4, 5, 6, 7))
    for node in result["nodes"]:
        if node["problem"]:
            yield f"  {node['name']}: {node['problem']}"
    yield f"No node is more than {result['off_balance']:.1%} from its share."
    yield rebalance_line(result["rebalance"])


def drain_line(store: str, result: dict[str, Any]) -> str:
    """How far draining a node is."""
    name = result["node"]
    if not result["draining"]:
        return f"{name} gets shards again."
    if result["drained"]:
        return f"{name} is drained: take it out with 'fusestore node remove {store} {name}'."
    return f"{name} is being drained: see 'fusestore node list {store}'."


def rebalance_line(row: dict[str, Any]) -> str:
    """Where a rebalance stands, or how it ended."""
    if row["state"] == "never":
        return "This store was never rebalanced."
    moved = f"{row['shards']:,} shards moved and checked, {bytes_text(row['size'])}"
    if row["state"] == "done":
        speed = speed_text(row["size"], row["finished"] - row["started"])
        return f"Rebalance done: {moved} in {speed}."
    left = f", about {bytes_text(max(row['total'] - row['size'], 0))} to go"
    problem = f" {row['error']}" if row["error"] else ""
    return f"Rebalance {row['state']}: {moved}{left}.{problem}"


# --- safety ----------------------------------------------------------------


def scrub_line(scrub: dict[str, Any]) -> str:
    """Where a scrub stands, or how it ended."""
    if scrub["state"] == "never":
        return "This store was never scrubbed."
    read = f"{scrub['shards']:,} shards read and verified, {bytes_text(scrub['size'])}"
    found = "nothing found" if not scrub["found"] else f"{scrub['found']:,} bad or gone"
    if scrub["skipped"]:
        found += f", {scrub['skipped']:,} of nodes that are not up skipped"
    if scrub["state"] != "done":
        stripes = f"{scrub['stripes']:,} of {scrub['total']:,} stripes"
        return f"{scrub['state']}: {stripes}: {read}, {found}."
    speed = speed_text(scrub["size"], scrub["finished"] - scrub["started"])
    return f"done {_when(scrub)}: {read} in {speed}, {found}{_left_over(scrub)}."


def risk_lines(risk: dict[str, Any]) -> Iterator[str]:
    """What could be lost."""
    without = f" without {', '.join(risk['if_lost'])}" if risk["if_lost"] else ""
    if risk["lost_stripes"]:
        yield f"{len(risk['lost']):,} files would be lost{without}."
    elif risk["next_region_loses"]:
        count = len(risk["next_region_loses"])
        yield f"Nothing is lost{without}, but one more region would take {count:,} files with it."
    else:
        least = min(map(int, risk["by_regions"]), default=0)
        more = f"any {least} more regions may go" if least > 1 else "any one more region may go"
        yield (
            f"Nothing is lost{without}, and {more}." if risk["stripes"] else "There is no data yet."
        )
    for what, key in (("region", "by_regions"), ("shard", "by_shards")):
        for count, stripes in risk[key].items():
            share = f"{stripes:,} of {risk['stripes']:,} stripes"
            if count == "0":
                yield f"  {share} would not survive the loss of one more {what}"
            else:
                yield f"  {share} survive the loss of any {count} more {what}{'s'[: count != '1']}"
    yield f"  the metadata is in {risk['metadata_regions']} regions besides its own place"
    if risk.get("model"):
        yield from model_lines(risk["model"])


def model_lines(model: dict[str, Any]) -> Iterator[str]:
    """The expected losses a year, never of disks alone."""
    how = "measured here" if model["measured"] else "assumed: nothing was repaired yet"
    yield (
        f"Expected losses of data a year, with {model['disk_failures_a_year']:g} failures a disk, "
        f"{model['region_losses_a_year']:g} losses a region, {model['replace_hours']:g} h to "
        f"replace and {model['repair_seconds']:,.0f} s to repair a node "
        f"({model['repair_bytes_a_second'] / 1e6:.0f} MB/s, {how}):"
    )
    for code, found in model["codes"].items():
        yield (
            f"  {code}: {found['with_regions']:.2g} (of disk failures alone "
            f"{found['disks_only']:.2g}); regions that may go: {found['regions_borne']}"
        )


def drill_line(drill: dict[str, Any]) -> str:
    """What a drill showed."""
    read = (
        f"{drill['stripes']:,} stripes, {bytes_text(drill['bytes'])}, read without "
        f"{drill['region']} in {speed_text(drill['bytes'], drill['seconds'])}"
    )
    if drill["failed_stripes"]:
        failed = f"{drill['failed_stripes']:,} failed"
        return f"{drill['region']} could not be lost now: {read}, {failed}."
    return f"{drill['region']} could be lost now: {read}, all right."


# --- repair ------------------------------------------------------------------


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """What a repair has to do."""
    yield (
        f"{plan['node']} at {plan['path']}: {plan['stripes']:,} stripes, "
        f"{bytes_text(plan['bytes_to_check'])} to check, {plan['shards_to_rebuild']:,} shards "
        f"({bytes_text(plan['bytes_to_rebuild'])}) to rebuild"
    )
    if plan["reads"]:
        reads = ", ".join(f"{bytes_text(size)} from {name}" for name, size in plan["reads"].items())
        yield f"  reads: {reads}"
    if plan["weak_stripes"]:
        yield f"  first {plan['weak_stripes']:,} stripes that lack shards elsewhere, too"
    if plan["hopeless_shards"]:
        yield f"  {plan['hopeless_shards']:,} shards cannot be rebuilt: too many others are gone"


def repair_line(node: str, result: dict[str, Any]) -> str:
    """What a repair did, and how fast."""
    line = (
        f"{node}: {result['shards_rebuilt']:,} shards rebuilt and checked, "
        f"{bytes_text(result['bytes'])} in {speed_text(result['bytes'], result['seconds'])}"
    )
    if result["unrepairable"]:
        line += f"; {len(result['unrepairable']):,} files cannot be repaired"
    return line + "."


def recovery_lines(result: dict[str, Any]) -> Iterator[str]:
    """What was recovered, and from where."""
    speed = speed_text(result["journal_bytes"], result["seconds"])
    there = sum(node["found"] for node in result["nodes"])
    yield (
        f"{result['store']}: recovered to commit {result['commit']}: {result['files']:,} files, "
        f"{bytes_text(result['bytes'])}, from the journals of {there} of {len(result['nodes'])} "
        f"nodes: {bytes_text(result['journal_bytes'])} in {speed}."
    )
    for node in result["nodes"]:
        if node["problem"]:
            yield f"  {node['name']}: {node['problem']} After mounting, repair it."


# --- inspect -----------------------------------------------------------------


def layout_lines(path: str, layout: dict[str, Any]) -> Iterator[str]:
    """A file's stripes, and under each the place of its shards."""
    stripes: dict[str, dict[str, Any]] = layout["stripes"]
    yield (
        f"{path}: {bytes_text(layout['size'])}, code {layout['code']}, "
        f"{len(layout['extents'])} extents in {len(stripes)} stripes"
    )
    yield _presence(stripes)
    if not layout["extents"]:
        return
    yield ""
    rows: list[Row] = [("FILE OFFSET", "LENGTH", "STRIPE", "AT")]
    rows += [
        tuple(str(extent[key]) for key in ("offset", "length", "stripe", "stripe_offset"))
        for extent in layout["extents"]
    ]
    yield from table_lines(rows, right=(0, 1, 2, 3))
    yield ""
    rows = [("STRIPE", "STATE", "SHARD", "NODE", "SEGMENT", "OFFSET", "LENGTH")]
    for number, stripe in stripes.items():
        rows += _shard_rows(number, stripe)
    yield from table_lines(rows, right=(0, 2, 5, 6))


def _presence(stripes: dict[str, dict[str, Any]]) -> str:
    states = [stripe["state"] for stripe in stripes.values()]
    waiting = states.count("open")
    bad = [state for state in states if state not in GOOD_STATES]
    text = "All shards are there" if not bad else f"{len(bad)} stripes lack shards"
    if waiting:
        text += f"; {waiting} {'stripe is' if waiting == 1 else 'stripes are'} still open"
    return text + "."


def _shard_rows(number: str, stripe: dict[str, Any]) -> Iterator[Row]:
    for shard in stripe.get("shards", []):
        yield (
            number,
            shard.get("state", stripe["state"]),
            str(shard["index"]),
            shard["node"],
            shard["segment"],
            str(shard["offset"]),
            str(shard["length"]),
        )
    if not stripe.get("shards"):
        yield (number, stripe["state"], "-", "in memory", "-", "-", "-")
