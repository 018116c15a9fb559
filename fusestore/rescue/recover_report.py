"""recover: its report, with the files that cannot be read from the available nodes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from ..commit.replay import Replayed
from ..errors import NodeError
from ..files.path_search import PathSearch
from ..format import file_rows, store_rows, stripe_rows
from ..format.store_rows import Counters
from ..format.stripe_rows import Stripe
from ..log.journal import Journals
from ..log.log import Log
from ..members.opening import shard_sizes
from ..read.reader import Reader
from .recover_nodes import FoundNodes

logger = logging.getLogger(__name__)


def recovery_report(
    found: FoundNodes, journals: Journals, log: Log, replayed: Replayed
) -> dict[str, Any]:
    """Return the report of a recovery, with the losses by file."""
    reader = Reader(log)
    counters = log.engine.get(store_rows.COUNTERS_KEY)
    known = Counters.decode(counters) if counters else Counters(files=0)
    sizes = _segment_sizes(log)
    lost = [number for number, row in _stripes(log) if not _readable(log, sizes, number, row)]
    owners = {ino for number in lost for ino in reader.owners(number)}
    return {
        "store": str(found.store),
        "commit": replayed.position.commit,
        "files": known.files,
        "bytes": known.file_bytes,
        "commits": sum(len(entries) for entries in journals.commits.values()),
        "dump_pieces": len(journals.pieces),
        "nodes": [
            {
                "name": member.name,
                "region": member.config.region,
                "path": str(member.config.path),
                "found": member.is_open,
                "last_commit": journals.last(member.name),
                "problem": found.problems.get(member.name, member.standing.error),
            }
            for member in log.members.all
        ],
        "dropped": [_dropped(journals, log, number) for number in replayed.dropped],
        "lost": sorted(set(PathSearch(log, owners).at_once().values())),
    }


def _stripes(log: Log) -> Iterator[tuple[int, Stripe]]:
    for key, value in log.engine.scan(stripe_rows.STRIPES_START, stripe_rows.STRIPES_END):
        yield stripe_rows.decode_stripe_key(key), Stripe.decode(value)


def _segment_sizes(log: Log) -> dict[int, dict[int, int]]:
    """Return the bytes on the nodes, by node and segment."""
    sizes: dict[int, dict[int, int]] = {}
    for member in log.members.all:
        if member.is_open:
            try:
                sizes[member.id] = shard_sizes(member.node)
            except NodeError as error:
                logger.warning("%s", error)
    return sizes


def _readable(log: Log, sizes: dict[int, dict[int, int]], number: int, row: Stripe) -> bool:
    """Return whether k shards of a stripe seem to exist; their bytes are not read."""
    there = 0
    for index, place in enumerate(row.shards):
        size = sizes.get(place.node, {}).get(place.segment, 0)
        missing = log.engine.get(stripe_rows.missing_key(place.node, number, index)) is not None
        there += place.written and not missing and size >= place.offset + row.shard_length
    return there >= row.code.k


def _dropped(journals: Journals, log: Log, number: int) -> dict[str, Any]:
    """Describe a commit that does not count: the names that it would have set or removed."""
    names = {
        file_rows.decode_name_key(key)
        for entry in journals.commits[number]
        for key in entry.commit().changes
        if key[:1] == b"N"
    }
    folders = PathSearch(log, (parent for parent, _ in names)).at_once()
    paths = {folders[parent].rstrip("/") + "/" + os.fsdecode(name) for parent, name in names}
    return {"commit": number, "names": sorted(paths)}
