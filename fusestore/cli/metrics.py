"""The command `metrics`: counts, durations and results of operations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..text import Row, bytes_text, counted, duration_text, table_lines
from .asking import JSON, STORE, answering, print_json, print_lines

if TYPE_CHECKING:
    from ..serve.messages.mount import MetricsAction, MetricsResult


@click.group(short_help="Report counts and durations of operations.")
def metrics() -> None:
    """Report how many operations ran on mounts of STORE, how fast, and how they ended.

    The counts begin at the last `reset` and are kept across mounts.  Times are
    from the daemon's receipt of a request to its answer.  A crash may lose the
    counts of the last minute.

    \b
      fusestore metrics summary ~/store
      fusestore metrics export ~/store --csv operations.csv
      fusestore metrics reset ~/store
    """


def _counts(store: Path, action: MetricsAction) -> MetricsResult:
    """Get the counts from the daemon, or from a file if the store is not mounted."""
    from ..config.store_config import load
    from ..errors import NotMountedError
    from ..serve.control_client import ControlClient
    from ..serve.messages.mount import MetricsRequest, MetricsResult
    from ..typed_json import from_json

    config = load(store)
    try:
        return ControlClient(config.store).ask(MetricsRequest(action))
    except NotMountedError:
        from ..serve.control_server import lock_store
        from ..watch.counts import Counts

        if action == "reset":
            with lock_store(config.store):
                Counts(time.time(), 0.0, {}).write(config.store)
        return from_json(MetricsResult, Counts.read(config.store).rows())


@metrics.command("summary")
@STORE
@JSON
def metrics_summary(store: Path, as_json: bool) -> None:
    """Print a table of all operations: counts, speeds and results."""
    from ..typed_json import to_json

    with answering(as_json):
        counts = _counts(store, "summary")
    if as_json:
        print_json(to_json(counts))
    else:
        print_lines(_lines(counts))


@metrics.command("export")
@STORE
@click.option(
    "--csv",
    "file",
    type=click.File("w", encoding="utf-8", atomic=True),
    default="-",
    metavar="FILE",
    help="Write to FILE, and replace it if it exists.  Default: standard output.",
)
def metrics_export(store: Path, file: Any) -> None:
    """Write the counts as CSV; times are in seconds, sizes in bytes."""
    from ..typed_json import to_json
    from ..watch.counts import csv_text

    file.write(csv_text(to_json(_counts(store, "summary"))))


@metrics.command("reset")
@STORE
def metrics_reset(store: Path) -> None:
    """Set the counts to zero; the metrics for Prometheus do not change."""
    _counts(store, "reset")


def _lines(counts: MetricsResult) -> Iterator[str]:
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(counts.since))
    total = sum(row.count for row in counts.operations)
    yield (
        f"{counted(total, 'operation')} since {since}, "
        f"while mounted for {duration_text(counts.mounted_seconds)}."
    )
    if not total:
        return
    yield ""
    heads = ("OPERATION", "COUNT", "PER S", "BYTES", "MB/S", "OK", "MEAN", "MEDIAN", "P95", "P99")
    table: list[Row] = [heads]
    for row in counts.operations:
        moved = bool(row.bytes)
        table.append(
            (
                row.operation,
                f"{row.count:,}",
                f"{row.per_second:.1f}",
                bytes_text(row.bytes) if moved else "-",
                f"{row.bytes_per_busy_second / 1e6:.0f}" if moved else "-",
                _percent(row.success_rate),
                *map(_brief, (row.mean, row.median, row.p95, row.p99)),
            )
        )
    yield from table_lines(table, right=range(1, 10))


def _percent(share: float) -> str:
    """Format a share as a percentage; it is 100 only if nothing failed."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.999):.3f} %"


def _brief(seconds: float) -> str:
    """Format a duration with a suitable unit."""
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
