"""The metrics of a mount, as metric families of Prometheus, made from an observation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .. import __version__
from ..members.standing import State
from ..tally import Histogram, summary
from .health import health
from .observation import Observation
from .web import Answer

BUCKETS_NS = (*(step * 10**decade for decade in range(4, 10) for step in (1, 2, 5)), 10**10)
"""Upper ends of the exported buckets: 1, 2, 5 … from 10 µs to 10 s."""


class Metrics:
    """The answer of `/metrics`: the metric families of a mount and of its process."""

    def __init__(self, observe: Callable[[], Observation]) -> None:
        """`observe` returns an observation of the store; it runs in the caller's thread."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(observe))
        ProcessCollector(registry=self._registry)

    def answer(self, accept: str) -> Answer:
        """Return all metrics in the format that an Accept header requests."""
        try:
            encode, kind = choose_encoder(accept)
        except TypeError:  # the header has an invalid version
            encode, kind = choose_encoder("")
        return Answer(encode(self._registry), kind)


class _Families(Collector):
    """The metrics of an observation."""

    def __init__(self, observe: Callable[[], Observation]) -> None:
        self._observe = observe

    def collect(self) -> Iterator[Metric]:
        seen = self._observe()
        for families in _FAMILIES:
            for family in families(seen):
                yield family
                time.sleep(0)  # gives way to the event loop


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fusestore_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"fusestore_{name}", text, value=value)


def _histogram(name: str, text: str, label: str = "") -> HistogramMetricFamily:
    return HistogramMetricFamily(f"fusestore_{name}", text, labels=[label] if label else [])


def _add(family: HistogramMetricFamily, labels: list[str], times: Histogram) -> None:
    ends = [str(bound / 1e9) for bound in BUCKETS_NS]
    buckets = [*zip(ends, times.cumulated(BUCKETS_NS), strict=True), ("+Inf", times.count)]
    family.add_metric(labels, buckets, times.seconds)


def _of_operations(seen: Observation) -> Iterator[Metric]:
    status, tallies = seen.status, seen.tallies
    times = _histogram(
        "operation_duration_seconds",
        "Time from a request of the kernel to its answer.",
        "operation",
    )
    errors = CounterMetricFamily(
        "fusestore_operation_errors",
        "Requests answered with an error; EIO, ENOSPC and EROFS are failures of the store.",
        labels=["operation", "error"],
    )
    for row in summary(tallies, 0):
        name = row["operation"]
        _add(times, [name], tallies[name].times)
        for error, count in row["errors"].items():
            errors.add_metric([name, error], count)
    yield times
    yield errors
    yield _counter("read_bytes", "Bytes of files read.", tallies["read"].size)
    yield _counter("written_bytes", "Bytes of files written.", tallies["write"].size)
    yield _counter(
        "degraded_reads",
        "Ranges decoded from other shards because a shard was missing, late or bad.",
        status.degraded_reads,
    )
    yield _counter("failed_reads", "Reads that failed with EIO.", status.failed_reads)
    yield _counter("rows_mended", "Wrong rows that were mended.", status.rows_mended)
    yield _gauge("rows_in_doubt", "Wrong rows that only fsck can mend.", status.rows_in_doubt)
    yield _gauge("lost_bytes", "Bytes of files that fsck found to be lost.", status.lost_bytes)
    yield _counter(
        "stripes_put_back",
        "Stripes that were to be freed although files had bytes in them.",
        status.stripes_put_back,
    )


def _of_store(seen: Observation) -> Iterator[Metric]:
    status = seen.status
    yield InfoMetricFamily(
        "fusestore",
        "The store and the version of fusestore that serves it.",
        value={"version": __version__, "uuid": status.uuid, "code": status.code},
    )
    yield _gauge("healthy", "1: every node is up and nothing is missing.", status.healthy)
    yield _gauge(
        "serving", "1: the mount works as intended; the same as /healthz.", health(status)[0]
    )
    yield _gauge("read_only", "1: the mount is read-only.", status.read_only)
    yield _gauge(
        "regions_borne",
        "How many more regions can be lost for certain; -1: files may be unreadable.",
        status.regions_borne,
    )
    yield _gauge("files", "Inodes of any kind.", status.files)
    yield _gauge("file_bytes", "Bytes that files hold.", status.bytes)
    yield _gauge("stripes", "Stripes that hold these bytes.", status.stripes)
    yield _gauge("size_bytes", "Room for bytes of files on the devices.", status.bytes_total)
    yield _gauge("free_bytes", "Free room for bytes of files.", status.bytes_free)
    yield _gauge("metadata_bytes", "Size of the metadata database.", status.metadata_bytes)
    yield _gauge(
        "uncommitted_bytes", "Bytes of files that no commit covers yet.", status.uncommitted_bytes
    )
    yield _gauge("uncheckpointed_changes", "Changed rows that wait for the database.", seen.pending)
    entries = GaugeMetricFamily(
        "fusestore_cache_entries", "Entries of caches in memory.", labels=["cache"]
    )
    for name, count in seen.caches.items():
        entries.add_metric([name], count)
    yield entries


def _of_commits(seen: Observation) -> Iterator[Metric]:
    committed_at = seen.status.last_commit_at
    commits = _histogram(
        "commit_duration_seconds", "Time from coding the last stripe to flushing the last node."
    )
    _add(commits, [], seen.commits)
    yield commits
    checkpoints = _histogram("checkpoint_duration_seconds", "Time to write the database.")
    _add(checkpoints, [], seen.checkpoints)
    yield checkpoints
    if committed_at is not None:
        yield _gauge(
            "last_commit_timestamp_seconds",
            "Time at which the last commit became durable.",
            committed_at,
        )


_NODE_GAUGES = {
    "missing_shards": ("missing_shards", "Shards to rebuild on the node."),
    "bytes_used": ("used_bytes", "Bytes of the device that the node takes, as last measured."),
    "bytes_free": ("free_bytes", "Room on the node's device."),
    "bytes_total": ("size_bytes", "Size of the node's device."),
}


def _of_nodes(seen: Observation) -> Iterator[Metric]:
    nodes = seen.status.nodes
    states = GaugeMetricFamily(
        "fusestore_node_state", "1: the node is in this state.", labels=["node", "region", "state"]
    )
    for node in nodes:
        for state in State:
            states.add_metric([node.name, node.region, str(state)], node.state == state)
    yield states
    for key, (name, text) in _NODE_GAUGES.items():
        gauge = GaugeMetricFamily(f"fusestore_node_{name}", text, labels=["node", "region"])
        for node in nodes:
            gauge.add_metric([node.name, node.region], getattr(node, key))
        yield gauge
    failures = CounterMetricFamily(
        "fusestore_checksum_failures",
        "Reads that returned other bytes than were written.",
        labels=["node", "region"],
    )
    for node in nodes:
        failures.add_metric([node.name, node.region], node.checksum_failures)
    yield failures
    flushes = _histogram(
        "node_flush_duration_seconds",
        "Time to flush the node for a commit, except small commits that flush all nodes at once.",
        "node",
    )
    for name, times in seen.flushes:
        _add(flushes, [name], times)
    yield flushes


def _of_repairs(seen: Observation) -> Iterator[Metric]:
    repair, repairs = seen.status.repair, seen.status.repairs
    running = GaugeMetricFamily(
        "fusestore_repair_running", "1: the node is being repaired.", labels=["node"]
    )
    for node in seen.status.nodes:
        running.add_metric([node.name], repair is not None and repair.node == node.name)
    yield running
    if repair is not None:
        share = repair.done / repair.total if repair.total else 0.0
        yield _gauge("repair_progress_ratio", "Progress of the running phase.", share)
        if repair.eta_seconds is not None:
            yield _gauge(
                "repair_eta_seconds",
                "Estimated seconds until the running phase ends.",
                repair.eta_seconds,
            )
    if repairs:
        seconds = sum(past.seconds for past in repairs)
        size = sum(past.bytes for past in repairs)
        yield _gauge(
            "repair_mean_seconds",
            "Mean time to repair (MTTR) of the last repairs.",
            seconds / len(repairs),
        )
        yield _gauge(
            "repair_bytes_per_second", "Speed of the last repairs.", size / max(seconds, 1e-9)
        )
        yield _gauge(
            "repair_last_timestamp_seconds", "Time at which the last repair ended.", repairs[-1].at
        )


def _of_scrub(seen: Observation) -> Iterator[Metric]:
    scrub = seen.status.scrub
    yield _gauge("scrub_running", "1: a scrub runs.", scrub.state == "running")
    share = scrub.stripes / scrub.total if scrub.total else 0.0
    yield _gauge("scrub_progress_ratio", "Progress of the scrub.", min(share, 1.0))
    if scrub.eta_seconds is not None:
        yield _gauge(
            "scrub_eta_seconds", "Estimated seconds until the scrub ends.", scrub.eta_seconds
        )
    if scrub.state == "done":
        yield _gauge(
            "scrub_finished_timestamp_seconds",
            "Time at which the last scrub ended.",
            scrub.finished,
        )
    yield _gauge(
        "scrub_found_shards",
        "Shards and records that the running or the last scrub found bad or missing.",
        scrub.found,
    )
    yield _gauge(
        "scrub_left_shards", "Shards that were still missing at the end of the scrub.", scrub.left
    )


def _of_cleaning(seen: Observation) -> Iterator[Metric]:
    cleaning = seen.status.cleaning
    if cleaning is None:
        return
    if cleaning.waste is not None:
        yield _gauge("waste_bytes", "Bytes of garbage, which cleaning gives back.", cleaning.waste)
    if cleaning.pinned is not None:
        text = "Bytes on the nodes that only the deletion of segments gives back."
        yield _gauge("pinned_bytes", text, cleaning.pinned)
    yield _gauge("waste_bound_bytes", "Bytes of garbage above which cleaning runs.", cleaning.bound)
    yield _counter("cleaning_freed_bytes", "Bytes that cleaning gave back.", cleaning.freed)
    yield _counter("cleaning_moved_bytes", "Bytes of files that cleaning moved.", cleaning.moved)
    left = GaugeMetricFamily(
        "fusestore_cleaning_skipped_stripes",
        "Stripes that cleaning leaves alone: their counts are in doubt, they have bytes that "
        "cannot be read, or they have shards on nodes that are not up.",
        labels=["reason"],
    )
    left.add_metric(["doubtful"], cleaning.doubtful_stripes)
    left.add_metric(["unreadable"], cleaning.unreadable_stripes)
    left.add_metric(["absent"], cleaning.absent_stripes)
    yield left
    yield _gauge("held_writers", "Writes that wait for cleaning.", cleaning.held_writers)


_FAMILIES = (
    _of_operations,
    _of_store,
    _of_commits,
    _of_nodes,
    _of_repairs,
    _of_scrub,
    _of_cleaning,
)
