"""What a mount tells the outside: metrics for Prometheus, its health, and the status page.

The web server's threads ask here.  The event loop only copies counters and
builds the fields of `status`; counting what is missing, and turning numbers into
text, is done by the thread that asked.  All answers within a second share one
look at the store.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any, TypeVar

import trio
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
from ..errors import FusestoreError
from ..members.standing import State
from ..store.report import count_missing
from ..store.store import Store
from ..tally import Histogram, Tallies, summary
from .health import repair_state, risk_line, scrub_state, verdict
from .web import Answer, Route

ANSWER_SECONDS = 5.0
"""How long the event loop may take to answer."""
SHARED_SECONDS = 1.0
SAMPLE_SECONDS = 2.0
SAMPLES_MAX = 300
"""What the charts of the status page show: ten minutes."""
MEASURE_SECONDS_MIN = 5.0
MEASURE_SHARE = 0.01
"""Nodes are asked how much room they take at most so often, and for so much of the time: that
looks at each segment."""
BUCKETS_NS = (*(step * 10**decade for decade in range(4, 10) for step in (1, 2, 5)), 10**10)
"""Upper ends of the exported buckets: 1, 2, 5 … from 10 µs to 10 s."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A store at one instant."""

    status: dict[str, Any]
    tallies: Tallies
    commits: Histogram
    checkpoints: Histogram
    flushes: list[tuple[str, Histogram]]
    """By node."""
    caches: dict[str, int]
    """Entries, by cache."""
    pending: int
    """Changes that the metadata database does not have yet."""


class Monitor:
    """Looks at an open, mounted store; made on the event loop."""

    def __init__(self, store: Store, tallies: Tallies, about: Callable[[], dict[str, Any]]) -> None:
        """`about` has the fields of `status` that the mount adds."""
        self._store = store
        self._tallies = tallies
        self._about = about
        self._token = trio.lowlevel.current_trio_token()
        self._looking = threading.Lock()
        self._last: tuple[float, Snapshot] | None = None
        self._samples: deque[tuple[float, ...]] = deque(maxlen=SAMPLES_MAX)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(self.snapshot))
        ProcessCollector(registry=self._registry)

    async def run(self) -> None:
        """Take samples for the charts, and measure the nodes, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            while True:
                self._sample()
                await trio.sleep(SAMPLE_SECONDS)

    async def _measure(self) -> None:
        while True:
            began = trio.current_time()
            await self._store.reporter.measure()
            took = trio.current_time() - began
            await trio.sleep(max(MEASURE_SECONDS_MIN, took / MEASURE_SHARE))

    def _sample(self) -> None:
        tallies = self._tallies
        operations = sum(tally.times.count for tally in tallies.values())
        sizes = (tallies["read"].size, tallies["write"].size)
        self._samples.append((round(time.time(), 3), *sizes, operations))

    # --- a look at the store ---------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The store as it was at most a second ago; not on the event loop.

        FusestoreError when the loop does not answer in time.
        """
        with self._looking:
            if self._last is None or time.monotonic() - self._last[0] > SHARED_SECONDS:
                missing = count_missing(self._ask(lambda: self._store.log.engine.view(b"M")))
                self._last = (time.monotonic(), self._ask(lambda: self._take(missing)))
            return self._last[1]

    def _ask(self, question: Callable[[], T]) -> T:
        """Have the event loop answer."""
        future: Future[T] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(question())
                except BaseException as error:
                    future.set_exception(error)

        try:
            self._token.run_sync_soon(answer)
            return future.result(ANSWER_SECONDS)
        except trio.RunFinishedError:
            raise FusestoreError("The mount has ended.") from None
        except TimeoutError:
            future.cancel()
            raise FusestoreError(
                f"The daemon has not answered within {ANSWER_SECONDS:.0f} seconds."
            ) from None

    def _take(self, missing: dict[int, int]) -> Snapshot:
        store = self._store
        status = {**store.reporter.report(missing), **self._about()}
        return Snapshot(
            status={"summary": verdict(status), **status},
            tallies={name: tally.copy() for name, tally in self._tallies.items()},
            commits=store.committer.commits.copy(),
            checkpoints=store.committer.checkpointer.took.copy(),
            flushes=[(m.name, m.flushes.copy()) for m in store.log.members.all],
            caches={"stripes": store.reader.cached, "unsealed": len(store.log.unsealed)},
            pending=store.log.engine.changed_keys,
        )

    # --- what is served --------------------------------------------------------

    def routes(self) -> Mapping[str, Route]:
        """The paths, and what answers them."""
        return {
            "/": _page,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/status.json": self._status,
        }

    def _metrics(self, accept: str) -> Answer:
        try:
            encode, kind = choose_encoder(accept)
        except TypeError:  # a version that is no number
            encode, kind = choose_encoder("")
        return Answer(encode(self._registry), kind)

    def _healthz(self, accept: str) -> Answer:
        good, sentence = health(self.snapshot().status)
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        return Answer(f"{sentence}\n".encode(), status=status)

    def _status(self, accept: str) -> Answer:
        seen = self.snapshot()
        began = seen.status["mounted_at"]
        value = {
            **seen.status,
            "now": time.time(),
            "serving": health(seen.status)[0],
            "risk": risk_line(seen.status),
            "repair_text": repair_state(seen.status),
            "scrub_text": scrub_state(seen.status),
            "operations": summary(seen.tallies, time.time() - began),
            "samples": list(self._samples),
        }
        return Answer(json.dumps(value).encode(), "application/json")


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


@cache
def _page(accept: str = "") -> Answer:
    """The status page; it may run what it contains, and ask this server, and nothing else."""
    page = (files(__package__) / "status.html").read_text("utf-8")
    allowed = {
        f"{tag}-src": " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("style", "script")
    }
    policy = {
        "default-src": "'none'",
        **allowed,
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    text = "; ".join(f"{name} {value}" for name, value in policy.items())
    return Answer(
        page.encode(), "text/html; charset=utf-8", headers={"Content-Security-Policy": text}
    )


class _Families(Collector):
    """The metrics of a snapshot."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        seen = self._snapshot()
        for families in (_of_operations, _of_store, _of_nodes, _of_background):
            for family in families(seen):
                yield family
                time.sleep(0)  # the event loop comes first


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


def _of_operations(seen: Snapshot) -> Iterator[Metric]:
    status, tallies = seen.status, seen.tallies
    times = _histogram(
        "operation_duration_seconds", "From a request of the kernel to its answer.", "operation"
    )
    errors = CounterMetricFamily(
        "fusestore_operation_errors",
        "Requests answered with an error; EIO, ENOSPC and EROFS are the store's own.",
        labels=["operation", "error"],
    )
    for row in summary(tallies, 0):
        name = row["operation"]
        _add(times, [name], tallies[name].times)
        for error, count in row["errors"].items():
            errors.add_metric([name, error], count)
    yield times
    yield errors
    yield _counter("read_bytes", "Bytes of files given to readers.", tallies["read"].size)
    yield _counter("written_bytes", "Bytes of files taken from writers.", tallies["write"].size)
    yield _counter(
        "degraded_reads",
        "Ranges that were decoded, as a shard was missing, late or bad.",
        status["degraded_reads"],
    )
    yield _counter("failed_reads", "Reads that were answered with EIO.", status["failed_reads"])


def _of_store(seen: Snapshot) -> Iterator[Metric]:
    status = seen.status
    yield InfoMetricFamily(
        "fusestore",
        "The store and the program that serves it.",
        value={"version": __version__, "uuid": status["uuid"], "code": status["code"]},
    )
    yield _gauge("healthy", "1: every node is up and nothing is missing.", status["healthy"])
    yield _gauge(
        "serving", "1: the mount serves as it was meant to; as /healthz.", health(status)[0]
    )
    yield _gauge("read_only", "1: nothing can be changed.", status["read_only"])
    yield _gauge(
        "regions_borne",
        "How many more regions may certainly be lost; -1: files may be unreadable.",
        status["regions_borne"],
    )
    yield _gauge("files", "Inodes of any kind.", status["files"])
    yield _gauge("file_bytes", "Bytes that files hold.", status["bytes"])
    yield _gauge("stripes", "Stripes that hold them.", status["stripes"])
    yield _gauge(
        "size_bytes", "Bytes of files that the devices have room for.", status["bytes_total"]
    )
    yield _gauge("free_bytes", "Bytes of files that will still fit.", status["bytes_free"])
    yield _gauge("metadata_bytes", "What the database takes.", status["metadata_bytes"])
    yield _gauge(
        "uncommitted_bytes", "Bytes of files that no commit covers.", status["uncommitted_bytes"]
    )
    yield _gauge("uncheckpointed_changes", "Changed rows that wait for the database.", seen.pending)
    commits = _histogram("commit_duration_seconds", "From all being coded to all being flushed.")
    _add(commits, [], seen.commits)
    yield commits
    checkpoints = _histogram("checkpoint_duration_seconds", "Writing the database.")
    _add(checkpoints, [], seen.checkpoints)
    yield checkpoints
    if status["last_commit_at"] is not None:
        yield _gauge(
            "last_commit_timestamp_seconds",
            "When the last commit was durable.",
            status["last_commit_at"],
        )
    entries = GaugeMetricFamily(
        "fusestore_cache_entries", "What caches have in memory.", labels=["cache"]
    )
    for name, count in seen.caches.items():
        entries.add_metric([name], count)
    yield entries


_NODE_GAUGES = {
    "missing_shards": ("missing_shards", "Shards that the node lacks, and that are to be rebuilt."),
    "bytes_used": (
        "used_bytes",
        "What the node takes on its device, as of when that was last asked.",
    ),
    "bytes_free": ("free_bytes", "Room on the node's device."),
    "bytes_total": ("size_bytes", "Size of the node's device."),
}


def _of_nodes(seen: Snapshot) -> Iterator[Metric]:
    nodes = seen.status["nodes"]
    states = GaugeMetricFamily(
        "fusestore_node_state", "1: the node is in this state.", labels=["node", "region", "state"]
    )
    for node in nodes:
        for state in State:
            states.add_metric([node["name"], node["region"], str(state)], node["state"] == state)
    yield states
    for key, (name, text) in _NODE_GAUGES.items():
        gauge = GaugeMetricFamily(f"fusestore_node_{name}", text, labels=["node", "region"])
        for node in nodes:
            gauge.add_metric([node["name"], node["region"]], node[key])
        yield gauge
    failures = CounterMetricFamily(
        "fusestore_checksum_failures",
        "Reads whose bytes were not those that were written.",
        labels=["node", "region"],
    )
    for node in nodes:
        failures.add_metric([node["name"], node["region"]], node["checksum_failures"])
    yield failures
    flushes = _histogram(
        "node_flush_duration_seconds",
        "The node's part of a commit; small ones, which flush all nodes at once, are left out.",
        "node",
    )
    for name, times in seen.flushes:
        _add(flushes, [name], times)
    yield flushes


def _of_background(seen: Snapshot) -> Iterator[Metric]:
    repair, repairs, scrub = (seen.status[key] for key in ("repair", "repairs", "scrub"))
    running = GaugeMetricFamily(
        "fusestore_repair_running", "1: the node is being repaired.", labels=["node"]
    )
    for node in seen.status["nodes"]:
        running.add_metric([node["name"]], repair is not None and repair["node"] == node["name"])
    yield running
    if repair is not None:
        share = repair["done"] / repair["total"] if repair["total"] else 0.0
        yield _gauge("repair_progress_ratio", "How much of its phase is done.", share)
        if repair["eta_seconds"] is not None:
            yield _gauge(
                "repair_eta_seconds", "When its phase should have ended.", repair["eta_seconds"]
            )
    if repairs:
        seconds = sum(past["seconds"] for past in repairs)
        size = sum(past["bytes"] for past in repairs)
        yield _gauge(
            "repair_mean_seconds", "MTTR: how long the last repairs took.", seconds / len(repairs)
        )
        yield _gauge("repair_bytes_per_second", "How fast they were.", size / max(seconds, 1e-9))
        yield _gauge("repair_last_timestamp_seconds", "When the last one ended.", repairs[-1]["at"])
    yield _gauge("scrub_running", "1: a scrub runs.", scrub["state"] == "running")
    share = scrub["stripes"] / scrub["total"] if scrub["total"] else 0.0
    yield _gauge("scrub_progress_ratio", "How much the scrub has read.", min(share, 1.0))
    if scrub["eta_seconds"] is not None:
        yield _gauge("scrub_eta_seconds", "When it should have ended.", scrub["eta_seconds"])
    if scrub["state"] == "done":
        yield _gauge(
            "scrub_finished_timestamp_seconds", "When the last one ended.", scrub["finished"]
        )
    yield _gauge(
        "scrub_found_shards",
        "Shards and records found bad or gone by this or the last scrub.",
        scrub["found"],
    )
    yield _gauge("scrub_left_shards", "Shards that were still missing at its end.", scrub["left"])
