"""The database compared with the journals: damaged, lost or old rows, and their right values.

Each row has a checksum, and each table the number of its rows and the sum of their
checksums (format/row_sums).  If either is wrong, the tables are rebuilt beside the
database, from the newest metadata dump and the commits after it, up to the commit at
which the database stands.  recover uses the same code.  Any difference is an error.

All functions here block, and must be called in a thread.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from ..errors import ComparisonError, DamagedMetadataError, MetadataError, ReplayError
from ..format import keys, store_rows
from ..format.row_sums import RowSums, unseal
from ..format.store_rows import LogPosition
from ..format.tables import TABLES
from ..limits import Limits
from ..log.journal_scan import read_journals
from ..metadata.engine import Engine
from ..metadata.environment import DATABASE
from ..metadata.view import View
from ..nodes.base import Node
from .load_tables import load_tables

logger = logging.getLogger(__name__)

SCRATCH_NAME = "comparing"
"""In the metadata directory, while the tables are compared with the journals."""
_ROOM_MIN = 8 << 20
"""The least that a comparison takes, in bytes."""
_LET_OTHERS_ROWS = 256
_CAUTIOUS = (store_rows.NODES_KEY, store_rows.GIVEN_UP_KEY)


@dataclass(slots=True)
class Examined:
    """The result of checking all rows of a database."""

    rows: int = 0
    bad: set[bytes] = field(default_factory=set)
    """Keys of rows that do not match their checksum."""
    miscounted: list[str] = field(default_factory=list)
    """Tables whose rows differ from the counts of the last checkpoint."""

    @property
    def is_right(self) -> bool:
        """Whether every row is as it was written."""
        return not self.bad and not self.miscounted


@dataclass(frozen=True, slots=True)
class WrongRow:
    """A row of the database that differs from the journals."""

    key: bytes
    stored: bytes | None
    """The value in the database, checksum included; None if there is no such row."""
    value: bytes | None
    """The right value; None if there must be no such row."""

    def __str__(self) -> str:
        what = f"row {self.key.hex()}"
        if self.stored is None:
            what += " is gone"
        elif unseal(self.key, self.stored) is None:
            what += " does not match its checksum"
        elif self.value is None:
            what += " should have been deleted"
        else:
            what += " is not the last written version"
        return f"{table_name(self.key)}: {what}; the journals have the right version"


def table_name(key: bytes) -> str:
    """The table of a row."""
    return TABLES[key[:1]].name if key[:1] in TABLES else "super"


def examine(view: View) -> Examined:
    """Verify all rows of the database; DamagedMetadataError if it cannot be read."""
    found, sums = Examined(), RowSums()
    for key, stored in view.all_stored():
        sums.add(key, stored)
        if unseal(key, stored) is None:
            found.bad.add(key)
        if view.stored(key) != stored:  # a search takes another path through the pages than a scan
            raise DamagedMetadataError(
                f"The metadata database is damaged (row {key.hex()} cannot be found by its key): "
                "unmount the store, move the metadata away, and run 'fusestore recover'."
            )
        found.rows += 1
        if found.rows % _LET_OTHERS_ROWS == 0:
            time.sleep(0)  # let the event loop run first
    counted = view.sums()
    if counted is not None:
        found.miscounted += [table_name(letter) for letter in sums.differing(counted)]
    elif found.rows:
        found.miscounted.append("all tables")
    return found


def examine_some(view: View, letters: Iterable[bytes]) -> Examined:
    """Verify the rows of some tables against their own checksums only."""
    found = Examined()
    view.passes_over = found.bad
    for letter in letters:
        found.rows += sum(1 for _ in view.scan(letter, keys.after(letter)))
    return found


def checkpoint_of(view: View) -> LogPosition:
    """Return the commit at which the database stands, which no journal has.

    DamagedMetadataError if its row is damaged or gone.
    """
    stored = view.stored(store_rows.LOG_KEY)
    value = unseal(store_rows.LOG_KEY, stored) if stored is not None else None
    if value is None:
        raise DamagedMetadataError(
            "The metadata does not name its last commit: unmount the store, move the metadata "
            "away, and run 'fusestore recover'."
        )
    return LogPosition.decode(value)


def wrong_rows(
    view: View,
    store: UUID,
    nodes: Iterable[tuple[str, Node]],
    metadata: Path,
    limits: Limits,
) -> list[WrongRow]:
    """The rows that differ from the journals of these nodes; ReplayError, ComparisonError.

    Rows that changed since the checkpoint are in memory, and are not compared.
    """
    position, journals = checkpoint_of(view), read_journals(store, nodes)
    at = journals.at(position)
    if at is None:
        raise ReplayError(f"No readable journal holds commit {position.commit}.")
    journals.keep_history(at)
    with _scratch(metadata, limits) as scratch, closing(Engine(scratch, limits=limits)) as right:
        load_tables(right, journals, lambda progress: None, position)
        with right.view() as rows:
            return list(_differences(view, rows))


@contextmanager
def _scratch(metadata: Path, limits: Limits) -> Iterator[Path]:
    """Make a directory with room for the tables; ComparisonError."""
    here = metadata / SCRATCH_NAME
    shutil.rmtree(here, ignore_errors=True)
    elsewhere = Path(tempfile.gettempdir())
    made, needed, kept = None, _ROOM_MIN, limits.reserve_bytes
    try:
        needed += (metadata / DATABASE).stat().st_blocks * 512 * 5 // 4
        if _free(metadata) >= needed + kept:
            made = here
            made.mkdir(mode=0o700)
        elif _free(elsewhere) >= needed:
            made = Path(tempfile.mkdtemp(prefix="fusestore-"))
        else:
            raise ComparisonError(
                "The metadata cannot be compared with the journals for want of room: this takes "
                f"about {needed >> 20} MiB in {elsewhere}, or {(needed + kept) >> 20} MiB in "
                f"{metadata}."
            )
        yield made
    except (ComparisonError, DamagedMetadataError):
        raise
    except (OSError, MetadataError) as error:
        raise ComparisonError(
            f"The metadata cannot be compared with the journals in {made or metadata}, which takes "
            f"about {needed >> 20} MiB there: {error.__cause__ or error}."
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _free(directory: Path) -> int:
    """Return the free bytes where a directory may be made; 0 if it may not."""
    found = os.statvfs(directory)
    return 0 if found.f_flag & os.ST_RDONLY else found.f_bavail * found.f_frsize


def _differences(view: View, right: View) -> Iterator[WrongRow]:
    """Each row that only one of the two has, or that has different values."""
    here, there = view.all_stored(), right.all_stored()
    mine, other = next(here, None), next(there, None)
    count = 0
    while mine is not None or other is not None:
        count += 1
        if count % _LET_OTHERS_ROWS == 0:
            time.sleep(0)
        if other is None or (mine is not None and mine[0] < other[0]):
            assert mine is not None
            key, stored, value = mine[0], mine[1], None
            mine = next(here, None)
        elif mine is None or other[0] < mine[0]:
            key, stored, value = other[0], None, unseal(*other)
            other = next(there, None)
        else:
            key, stored, value = mine[0], mine[1], unseal(*other)
            same = mine[1] == other[1]
            mine, other = next(here, None), next(there, None)
            if same:
                continue
        if not _is_cautious(key, stored) and not view.has_changed(key):
            yield WrongRow(key, stored, value)


def _is_cautious(key: bytes, stored: bytes | None) -> bool:
    """Return whether an intact row of the database is right regardless of the journals.

    `Zlog` is in no journal.  When recover accepts losses, it writes to the database alone
    which shards and nodes may lack something, and which histories are void: the next
    mount logs this.
    """
    known = key == store_rows.LOG_KEY or key in _CAUTIOUS or key[:1] == b"M"
    return known and stored is not None and unseal(key, stored) is not None


def still_wrong(engine: Engine, rows: Iterable[WrongRow]) -> dict[bytes, bytes | None]:
    """The right values of those rows that have not changed since they were examined."""
    with engine.view() as view:
        return {
            row.key: row.value
            for row in rows
            if not view.has_changed(row.key) and view.stored(row.key) == row.stored
        }


def mend_at_rest(
    engine: Engine, store: UUID, nodes: Iterable[tuple[str, Node]], metadata: Path
) -> list[WrongRow]:
    """Mend a database that is not in use yet from the journals; the rows that were wrong.

    The rows come from the journals, and are therefore written to the database only;
    ReplayError if the journals do not have them, ComparisonError, DamagedMetadataError.
    """
    with engine.view() as view:
        wrong = wrong_rows(view, store, nodes, metadata, engine.limits)
    engine.apply({row.key: row.value for row in wrong})
    engine.recount()
    return wrong
