"""fsck: check all tables against each other, mend the first phase with findings, check again.

First the rows are compared with the journals, and rows that differ are restored: damage
in the database alone is no loss.  While the journals do not give the right values,
nothing is mended.  A stripe without a row is rebuilt from its shards.

Each check gets the earlier ones whose counts it needs; `check_tables` has their exact
order:

    rows       each row has the form of its table                         this module
    names      each has an inode, and is in the listing of its directory  fsck_names
    inodes     each has a type, a name, the right count of links          fsck_inodes
    extents    each lies in a file and in a stripe; owners, live bytes    fsck_extents
    quotas     each counts its inodes and their bytes                     fsck_quotas
    stripes    each shard has a place; segments count their shards        fsck_stripes
    readable   enough shards of each stripe are on the nodes              fsck_readable
    counters   of the whole store                                         this module

Files on nodes that are not of this store are listed, and change nothing (fsck_strays).

The phases of mending (fsck_findings.Phase; the fixes are fsck_mend.Mender):

    1  names and listings
    2  inodes
    3  extents, and places of shards
    4  counts and derived rows

All findings of the first phase that has any are mended.  Then everything is checked
again: a later finding may only be a result of an earlier one.  All rows are read from
one view (fsck_view): a mounted store is checked as of one instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from ..errors import MetadataError, ReplayError
from ..format import tables
from ..format.tables import TABLES
from ..store.store import Store
from ..system import threads
from .fsck_extents import ExtentCheck
from .fsck_findings import LOSSES, Finding, Phase, finding
from .fsck_inodes import InodeCheck
from .fsck_lost_stripes import lost_stripes
from .fsck_mend import Mender
from .fsck_names import NameCheck
from .fsck_quotas import QuotaCheck
from .fsck_readable import unreadable
from .fsck_strays import strays
from .fsck_stripes import StripeCheck
from .fsck_view import StoreView, view_store

ROUNDS_MAX = 200
"""Rounds of mending.  They end before, when a round finds what an earlier one has found."""


async def fsck(store: Store, *, repair: bool, at_rest: bool) -> dict[str, Any]:
    """Check a store's tables, and mend them if requested; the findings, and those left.

    `at_rest`: nothing else uses the store; only then may it be mended.
    """
    mended = list(store.log.mended)
    found = dict.fromkeys(mended)
    wrong, hindrance = await _rows_of_journals(store, repair=repair, at_rest=at_rest)
    found.update(dict.fromkeys([*wrong, *hindrance]))
    checked = await _check(store, at_rest)
    if hindrance:  # rows that are lost now may be available when the journals can be read
        found.update(dict.fromkeys(map(str, checked.findings)))
        repair = False
    losses = sum(one.fix in LOSSES for one in checked.findings)
    seen: set[tuple[str, ...]] = set()
    while True:
        texts = tuple(map(str, checked.findings))
        found.update(dict.fromkeys([*texts, *checked.waits]))
        if not texts or not repair or checked.waits or texts in seen or len(seen) > ROUNDS_MAX:
            break
        seen.add(texts)
        await _mend_first_phase(store, checked.findings)
        checked = await _check(store, at_rest)
    hindrance += checked.waits
    settled = not checked.findings and not hindrance and (repair or not wrong)
    if settled and not store.log.read_only:
        nothing_lost = not checked.unreadable and not checked.lost_bytes
        await _end_doubt(store, at_rest=at_rest and nothing_lost)
    return {
        "clean": not found and not checked.unreadable,
        "findings": list(found),
        "hindrances": hindrance,
        "losses": losses,
        "left": [
            *hindrance,
            *([] if repair else wrong),
            *(mended if store.log.read_only else []),  # in memory alone
            *map(str, checked.findings),
        ],
        "unreadable": checked.unreadable,
        "strays": await strays(store),
        "files": checked.files,
        "stripes": checked.stripes,
        "lost_bytes": checked.lost_bytes,
    }


async def _end_doubt(store: Store, *, at_rest: bool) -> None:
    """End the doubt after a check of all nodes without findings: kept segments may be freed.

    Segments that were kept because their rows were lost may be freed only with `at_rest`:
    then the tables were compared with the journals.
    """
    log, strays = store.log, store.reclaimer.strays
    if not all(member.in_sync for member in log.members.all):
        return
    if not log.doubt and not (at_rest and strays.any_found):
        return
    async with store.committer.lock:
        if at_rest:
            strays.release()
        log.position = replace(log.position, doubt="")
        await store.committer.commit_now(checkpoint=True)
    store.reclaimer.wake()


async def _rows_of_journals(
    store: Store, *, repair: bool, at_rest: bool
) -> tuple[list[str], list[str]]:
    """Compare the rows with the journals, and mend them if requested; wrong rows, and errors.

    A mounted store is compared only if a checksum or a count is wrong.
    """
    try:
        if repair:
            return await store.rows.mend(thorough=at_rest), []
        _, rows = await store.rows.compare(thorough=at_rest)
    except (MetadataError, ReplayError) as error:
        hint = " (bring all nodes back; if all are present, move the metadata away and run recover)"
        return [], [f"rows: {error}{hint if isinstance(error, ReplayError) else ''}"]
    return list(map(str, rows)), []


async def _mend_first_phase(store: Store, findings: list[Finding]) -> None:
    """Mend all findings of the first phase that has any, and commit."""
    phase = min(found.phase for found in findings)
    mender = Mender(store.log)
    for found in findings:
        if found.phase is phase:
            mender.mend(found)
    async with store.committer.lock:
        await store.committer.commit_now(checkpoint=True)


# --- the check ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checked:
    """The findings of all checks."""

    findings: list[Finding]
    files: int
    """Inodes."""
    stripes: int
    lost_bytes: int
    """Lost bytes of files; reading them is an error."""
    unreadable: list[str]
    """Sentences about unreadable stripes in consistent tables."""
    waits: list[str] = field(default_factory=list)
    """Why nothing may be mended now: what would be given up may be on other nodes."""


async def _check(store: Store, at_rest: bool) -> Checked:
    """Check the store as of this instant, in a thread."""
    async with view_store(store.log, at_rest=at_rest) as view:
        checked = await threads.run_sync(check_tables, view)
        searched = await threads.run_sync(lost_stripes, store.log, view, checked.findings)
    waits = []
    if searched.unread:
        names = ", ".join(searched.unread)
        waits.append(
            f"stripes: {names} cannot be read, and may have shards of the bytes that are lost "
            "without them: bring them back or repair them first, so that nothing is given up"
        )
    numbers = {one.arguments[0] for one in searched.findings}
    others = [one for one in checked.findings if not _is_of(one, numbers)]
    return replace(checked, findings=[*searched.findings, *others], waits=waits)


def _is_of(one: Finding, stripes: set[int]) -> bool:
    """Return whether a finding says what is wrong with stripes whose rows are replaced."""
    if one.fix == "lose_extent":
        return one.arguments[1].stripe in stripes
    return one.fix == "unwrite" and one.arguments[0] in stripes


def check_tables(view: StoreView) -> Checked:
    """Run all checks in their order; each uses the results of those before it."""
    quotas = QuotaCheck(view)
    names = NameCheck(view, quotas)
    inodes = InodeCheck(view, names, quotas)
    extents = ExtentCheck(view, inodes)
    stripes = StripeCheck(view, extents)
    findings = chain(
        _rows(view),
        names.names(),
        names.listing(),
        inodes.inodes(),
        names.loops(),
        extents.extents(),
        inodes.attributes(),
        inodes.orphans(),
        inodes.trims(),
        stripes.missing(),
        stripes.tails(),
        extents.owners(),
        quotas.totals(),
        stripes.stripes(),
        extents.live(),
        stripes.segments(),
        _counters(view, names, inodes, extents, stripes),
    )
    listed = list(findings)
    return Checked(listed, inodes.files, stripes.count, extents.lost_bytes, unreadable(view))


def _rows(view: StoreView) -> Iterator[Finding]:
    """Rows that cannot be read are reported once, and count as missing."""
    for key, value in view.rows.scan(b"", b"\xff"):
        if key[:1] != b"Z" and not tables.readable(key, value):
            table = TABLES[key[:1]].name if key[:1] in TABLES else "rows"
            yield finding(Phase.NAMES, table, f"row {key.hex()} cannot be read", "drop", key)


def _counters(
    view: StoreView,
    names: NameCheck,
    inodes: InodeCheck,
    extents: ExtentCheck,
    stripes: StripeCheck,
) -> Iterator[Finding]:
    """The counters match the counts, and used numbers are not assigned again."""
    counters = view.counters
    wanted = {"files": inodes.files, "file_bytes": extents.uses.total()}
    if view.at_rest:
        wanted["stripes"] = stripes.count
    for name, last in (("next_ino", inodes.last_ino), ("next_cookie", names.last_cookie)):
        wanted[name] = max(getattr(counters, name), last + 1)
    for name, value in wanted.items():
        if getattr(counters, name) != value:
            text = f"{name} is {getattr(counters, name)}, but should be {value}"
            yield finding(Phase.DERIVED, "counters", text, "count", name, value)
