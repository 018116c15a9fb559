"""Before a store is opened: wrong rows of its database are mended from the journals."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from ..commit.row_check import (
    Examined,
    WrongRow,
    checkpoint_of,
    examine,
    examine_some,
    mend_at_rest,
)
from ..config.store_config import StoreConfig
from ..errors import MetadataError, NodeError, ReplayError
from ..members.opening import open_node
from ..metadata.engine import Engine
from ..nodes.base import Node
from ..system import threads
from ..text import counted

logger = logging.getLogger(__name__)

ROWS_TOLD_MAX = 20
"""The number of mended rows that are logged."""
_DOUBT = "rows of the metadata are damaged, and the journals did not give the right values"
TABLES_AT_MOUNT = (b"Z", b"G", b"T", b"D", b"U", b"B")
"""The tables that a mount reads completely."""


@dataclass(frozen=True, slots=True)
class MendedRows:
    """The rows of a database before its store is opened."""

    wrong: tuple[WrongRow, ...] = ()
    """Those that were wrong, and are mended."""
    doubt: str = ""
    """Why others are wrong still: no table may be believed to name all that is needed."""


async def mend_rows(config: StoreConfig, engine: Engine, *, read_only: bool) -> MendedRows:
    """Examine the rows, mend those that differ from the journals, and return the wrong ones.

    DamagedMetadataError if the database cannot be read, or does not say at which commit it
    stands.  If the journals do not have the right values, the rows stay as they are, and
    reading them is an error.
    """
    examined = await threads.run_sync(_examine, config, engine)
    if examined.rows:
        with engine.view() as view:
            checkpoint_of(view)
    if examined.is_right:
        return MendedRows()
    nodes: list[tuple[str, Node]] = []
    for node in config.nodes:
        with suppress(NodeError):
            opened = partial(open_node, config, node, read_only=True)
            nodes.append((node.name, await threads.run_sync(opened)))
    try:
        wrong = await threads.run_sync(mend_at_rest, engine, config.uuid, nodes, config.metadata)
    except (ReplayError, MetadataError) as error:
        others = ", ".join(examined.miscounted)
        hint = " Bring all nodes back, or run 'fusestore recover'."
        logger.error(
            "The metadata is damaged (%s%s), and the journals do not give the right values: %s%s",
            counted(
                len(examined.bad),
                "row does not match its checksum",
                "rows do not match their checksums",
            ),
            f"; rows are gone or old in {others}" if others else "",
            error,
            hint if isinstance(error, ReplayError) else "",
        )
        return MendedRows(doubt=_DOUBT)
    finally:
        for _, node_opened in nodes:
            with suppress(NodeError):
                await threads.run_sync(node_opened.close)
    for row in wrong[:ROWS_TOLD_MAX]:
        logger.error("The metadata is damaged: %s. It is mended.", row)
    if not read_only:
        engine.freeze()
        await threads.run_sync(engine.write)
        engine.thaw()
    return MendedRows(tuple(wrong))


def _examine(config: StoreConfig, engine: Engine) -> Examined:
    """In a thread: examine all rows or, if they are many, those that a mount reads.

    All of them, too, if there are not as many as the last checkpoint counted.
    """
    few = engine.rows_stored <= config.limits.rows_examined_at_mount_max
    with engine.view() as view:
        counted = view.sums()
        if few or counted is None or engine.rows_found != counted.rows:
            return examine(view)
        return examine_some(view, TABLES_AT_MOUNT)
