"""What is counted is right, kept and said: tallies, metrics, health, the web server, the screen."""

from __future__ import annotations

import base64
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from http.client import HTTPConnection
from importlib.resources import files
from pathlib import Path
from typing import Any

import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest
import trio
from pyfuse3 import FUSEError

from fusestore.cli.status import StoreView, status_lines
from fusestore.config.mkfs import make_store
from fusestore.config.mount_options import MountOptions, parse_address
from fusestore.config.store_config import COUNTS_NAME, StoreConfig, load
from fusestore.errors import ConfigError, FusestoreError, NoEntryError, NoSpaceError, UsageError
from fusestore.format import stripe_rows
from fusestore.format.erasure import Code
from fusestore.limits import STRIPE_BYTES
from fusestore.metadata.engine import Engine
from fusestore.serve import operations
from fusestore.serve.operations import TALLIES, _answered
from fusestore.store.report import count_missing
from fusestore.tally import BOUNDS_NS, Histogram, Tally, combined, summary
from fusestore.text import duration_text
from fusestore.watch import web
from fusestore.watch.counts import COLUMNS, Counts, LiveCounts, csv_text
from fusestore.watch.families import BUCKETS_NS
from fusestore.watch.fields import MountStatus, NodeStatus, ScrubStatus, Status
from fusestore.watch.health import health, risk_text, status_of, verdict
from fusestore.watch.monitor import Monitor
from fusestore.watch.page import page
from support.logs import CORRUPT, GONE
from support.mounted_store import FUSESTORE
from support.opened_store import Opened, opened

MONITORING = files("fusestore.watch")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make_store(tmp_path / "store")


# --- tallies -----------------------------------------------------------------


def test_bounds_are_in_order_and_hold_those_that_are_exported() -> None:
    assert list(BOUNDS_NS) == sorted(set(BOUNDS_NS))
    assert set(BUCKETS_NS) <= set(BOUNDS_NS)


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_off_by_6_percent_at_most(seed: int) -> None:
    chance = random.Random(seed)
    times = sorted(round(chance.lognormvariate(11, 2)) + 2000 for _ in range(20_000))
    histogram = Histogram()
    for ns in times:
        histogram.add(ns)
    assert histogram.count == len(times)
    assert histogram.total_ns == sum(times)
    for share in (0.01, 0.5, 0.95, 0.99):
        exact = times[round(share * len(times)) - 1] / 1e9
        assert histogram.percentile(share) == pytest.approx(exact, rel=0.065)
    for bound, found in zip(BUCKETS_NS, histogram.cumulated(BUCKETS_NS), strict=True):
        assert found == sum(ns <= bound for ns in times)


def test_no_durations_and_endless_ones() -> None:
    histogram = Histogram()
    assert (histogram.count, histogram.percentile(0.5)) == (0, 0.0)
    histogram.add(10**15)
    assert histogram.percentile(0.5) == 100.0


def tally(*times: int, size: int = 0, **errors: int) -> Tally:
    made = Tally()
    for ns in times:
        made.times.add(ns)
    made.size = size
    made.errors = {getattr(errno, name): count for name, count in errors.items()}
    return made


def test_tallies_add_up_and_survive_json() -> None:
    one = tally(1000, 2_000_000, size=7, EIO=1)
    other = tally(5000, size=1, EIO=2, ENOENT=1)
    both = one.plus(other)
    assert both.times.count == 3
    assert both.times.total_ns == 2_006_000
    assert both.size == 8
    assert both.failures == 3
    back = Tally.decode(json.loads(json.dumps(both.plus(other, -1).encode())))
    assert back.encode() == one.encode()
    assert combined({"a": one}, {"b": other}).keys() == {"a", "b"}


def test_a_summary_tells_failures_from_answers() -> None:
    tallies = {
        "read": tally(*[1_000_000] * 10, size=10_000_000, EIO=1),
        "getxattr": tally(*[2000] * 100, ENODATA=90),
        "idle": Tally(),
    }
    often, read = summary(tallies, 20.0)
    assert (often["operation"], often["count"], often["success_rate"]) == ("getxattr", 100, 1.0)
    assert often["errors"] == {"ENODATA": 90}
    assert (read["success_rate"], read["per_second"]) == (0.9, 0.5)
    assert read["bytes_per_busy_second"] == pytest.approx(1e9)
    assert read["mean"] == pytest.approx(0.001)


@pytest.mark.expects_log(r"operations: some failed with an unexpected error")
async def test_the_wrapper_counts_answers_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "TALLIES", {})

    class Handlers:
        @_answered
        async def some(self, error: Exception | None) -> str:
            if error is not None:
                raise error
            return "fine"

    some = Handlers().some
    assert await some(None) == "fine"
    for error in (NoEntryError(""), NoSpaceError(""), FUSEError(errno.EPERM), ValueError("odd")):
        with pytest.raises(FUSEError):
            await some(error)
    counted = operations.TALLIES["some"]
    assert counted.times.count == 5
    assert counted.errors == dict.fromkeys((errno.ENOENT, errno.ENOSPC, errno.EPERM, errno.EIO), 1)
    assert counted.failures == 2


# --- kept across mounts --------------------------------------------------------


async def test_counts_are_kept_across_mounts_and_reset(tmp_path: Path) -> None:
    live = {"read": tally(1000, 1000)}
    counter = LiveCounts(tmp_path, live, keeps=True)
    live["read"].times.add(3000)  # what came before this mount is not its own
    await counter.keep()
    assert Counts.read(tmp_path).tallies["read"].times.count == 1

    second: dict[str, Tally] = {"write": tally()}
    counter = LiveCounts(tmp_path, second, keeps=True)
    second["write"].times.add(5)
    assert {name: t.times.count for name, t in counter.now().tallies.items()} == {
        "read": 1,
        "write": 1,
    }
    counter.reset()
    second["write"].times.add(5)
    await counter.keep()
    kept = Counts.read(tmp_path)
    assert kept.tallies["write"].times.count == 1
    assert kept.tallies.get("read", Tally()).times.count == 0
    assert kept.since == pytest.approx(time.time(), abs=60)


KEPT = (
    '{"format": 1, "since": %s, "mounted_seconds": %s, "operations": {"read": '
    '{"counts": {"5": %s}, "total_ns": 1, "bytes": 1, "errors": {}}}}'
)


async def test_a_read_only_mount_keeps_nothing(tmp_path: Path) -> None:
    await LiveCounts(tmp_path, {}, keeps=False).keep()
    assert not (tmp_path / COUNTS_NAME).exists()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "[" * 100_000, "{}", '{"format": 9}', '{"format": 1, "since": []}'),
        '{"format": 1, "operations": {}, "mounted_seconds": 0, "since": 1' + "0" * 400 + "}",
        " " * (1 << 20) + "{}",
        KEPT % ("1e400", "1", "1"),
        KEPT % ("1", "NaN", "1"),
        KEPT % ("1", "1", "1e400"),
        KEPT % ("1", "1", "-1"),
        KEPT.replace('"5"', '"-5"') % ("1", "1", "1"),
    ],
)
@pytest.mark.expects_log(r"watch\.counts: .* the counts restart at zero")
def test_a_file_of_counts_that_is_not_ours_is_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / COUNTS_NAME).write_text(text)
    assert Counts.read(tmp_path).tallies == {}


def test_a_file_of_counts_that_is_ours_is_taken(tmp_path: Path) -> None:
    (tmp_path / COUNTS_NAME).write_text(KEPT % ("1", "1", "7"))
    assert Counts.read(tmp_path).tallies["read"].times.count == 7


@pytest.mark.expects_log(r"watch\.counts: the counts of operations cannot be written")
async def test_counts_that_cannot_be_written_do_no_harm(tmp_path: Path) -> None:
    await LiveCounts(tmp_path / "gone", {}, keeps=True).keep()


def test_csv_has_a_line_an_operation() -> None:
    counts = Counts(0.0, 10.0, {"read": tally(1000, EIO=1), "write": tally(2000, size=5)})
    rows = list(csv.DictReader(io.StringIO(csv_text(counts.rows()))))
    assert [row["operation"] for row in rows] == ["read", "write"]
    assert list(rows[0]) == list(COLUMNS)
    assert (rows[0]["success_rate"], rows[1]["bytes"]) == ("0.0", "5")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*FUSESTORE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_metrics_of_an_unmounted_store(config: StoreConfig, tmp_path: Path) -> None:
    Counts(1.0, 2.0, {"read": tally(*[4_000_000] * 8, size=1 << 20)}).write(config.store)
    shown = run("metrics", "summary", config.store)
    assert "8 operations since 1970-01-01" in shown.stdout
    assert re.search(r"^read +8 +4\.0 +1\.0 MiB +33 +100 % +4 ms ", shown.stdout, re.MULTILINE)
    rows = json.loads(run("metrics", "summary", config.store, "--json").stdout)
    assert rows["operations"][0]["count"] == 8
    out = tmp_path / "out.csv"
    assert run("metrics", "export", config.store, "--csv", out).stdout == ""
    assert out.read_text() == run("metrics", "export", config.store).stdout
    assert run("metrics", "reset", config.store).returncode == 0
    assert run("metrics", "summary", config.store).stdout.startswith("0 operations since 20")


# --- what a store says of itself -----------------------------------------------


@pytest.mark.parametrize(
    ("code", "lacking", "borne"),
    [
        ("2+1", 0, 1), ("2+1", 1, 0), ("2+1", 2, -1),
        ("4+2", 0, 1), ("4+2", 1, 0), ("1+2", 0, 2), ("1+2", 1, 1), ("1+2", 2, 0), ("1+2", 3, -1),
    ],
)  # fmt: skip
async def test_regions_that_may_be_lost(
    tmp_path: Path, code: str, lacking: int, borne: int
) -> None:
    async with opened(make_store(tmp_path / "s", code=Code.parse(code))) as one:
        members = one.store.log.members
        gone = {member.id for member in members.all[:lacking]}
        assert members.losses_borne([Code.parse(code)], gone) == borne


async def test_missing_shards_are_counted_beside_the_loop(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.put("a", random.Random(1).randbytes(3 * STRIPE_BYTES))
        await one.checkpoint()
        engine = one.store.log.engine
        node = one.store.log.members.all[1].id
        engine.apply(
            {stripe_rows.missing_key(node, n, 0): b"" for n in range(1 << 41, (1 << 41) + 300)}
        )
        view = engine.view(b"M")
        engine.apply({stripe_rows.missing_key(node, 1 << 41, 0): None})
        with view:
            assert len(list(view.scan(b"M", b"N"))) == 300
        status = await one.store.status()
        assert [n["missing_shards"] for n in status["nodes"]] == [0, 299, 0]
        assert not status["healthy"]
        assert status["regions_borne"] == 0


def test_a_view_outlives_its_engine(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.apply({stripe_rows.missing_key(1, n, 0): b"" for n in range(1000)})
    engine.freeze()
    engine.write()
    engine.thaw()
    view = engine.view(b"M")
    engine.close()  # a thread may be in the middle of it
    assert count_missing(view) == {1: 1000}


NODE = NodeStatus("a", "a", "/a", 1.0, False, "up", True, "", 0, 0, 0, 0, 0)
SCRUB = ScrubStatus("never", "", "", None, 0.0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, "", None)
STATUS = Status(
    healthy=True, error="", metadata_error="", readable=True, read_only=False, store="/s",
    uuid="u", code="2+1", regions_borne=1, unsafe_codes=(), files=1, bytes=0, bytes_total=10**9,
    bytes_free=10**9, full="", stripes=0, last_commit=1, last_commit_at=None, uncommitted_bytes=0,
    checkpoint=1, epoch=1, metadata_bytes=0, degraded_reads=0, failed_reads=0, rows_mended=0,
    rows_in_doubt=0, lost_bytes=0, stripes_put_back=0, repair=None,
    repairs=(), scrub=SCRUB, nodes=(NODE,),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"healthy": False, "regions_borne": 0}, True),
        ({"read_only": True, "bytes_free": 0}, True),
        ({"error": "Too few nodes."}, False),
        ({"metadata_error": "No space."}, False),
        ({"readable": False, "regions_borne": -1}, False),
        ({"bytes_free": 0, "full": "The store is full: there is no room on the disk of n."}, False),
    ],
)
def test_health(change: dict[str, Any], good: bool) -> None:
    found, sentence = health(replace(STATUS, **change))
    assert found is good
    assert sentence.endswith(".")


def test_the_verdict_and_the_risk_say_how_many_regions() -> None:
    assert "any one region may be lost" in verdict(STATUS)
    assert "any 2 regions may be lost" in verdict(replace(STATUS, regions_borne=2))
    assert risk_text(replace(STATUS, regions_borne=0)) == (
        "the loss of one more region would lose data"
    )
    assert "risk" in risk_text(replace(STATUS, regions_borne=-1))
    assert "to read all files" in risk_text(replace(STATUS, regions_borne=-1, readable=False))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"),
        (3725, "1 h 2 min"), (86_400, "1 day"), (200_000, "2 days 7 h"),
    ],
)  # fmt: skip
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


async def test_the_screen_fits_and_says_what_runs(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.put("a", random.Random(1).randbytes(3 * STRIPE_BYTES))
        await one.store.committer.commit()
        report = await one.store.status()
        report["repair"] = {
            "node": "us-east-1", "by_itself": False, "phase": "shards", "unit": "bytes",
            "done": 1 << 30, "total": 4 << 30, "seconds": 60.0, "eta_seconds": 180.0,
        }  # fmt: skip
        report["scrub"] |= {"state": "running", "stripes": 5, "total": 10, "eta_seconds": 9.0}
        lines = list(status_lines(StoreView(status_of(report), None, None)))
        assert len(lines) < 24
        text = "\n".join(lines)
        assert "us-east-1: shards, 1.0 GiB of 4.0 GiB (25 %), 3 min left" in text
        assert "running, 50 %, nothing found, 9.0 s left" in text
        assert re.search(r"last commit: +\d+, \d+\.\d s ago; checkpoint \d+", text)


@pytest.mark.expects_log(GONE)
async def test_a_repair_under_way_is_told(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.put("a", random.Random(1).randbytes(40 * STRIPE_BYTES))
        await one.store.committer.commit()
        shutil.rmtree(config.nodes[0].path)
        told = []

        def look(message: dict[str, Any]) -> None:
            if message["phase"] != "waiting for other work on the nodes":
                told.append(one.store.reporter.report({})["repair"])

        await one.store.repairer.repair("us-east-1", look)
        assert {repair["phase"] for repair in told} >= {"journal", "shards"}
        assert {(repair["node"], repair["by_itself"]) for repair in told} == {("us-east-1", False)}
        assert any(repair["eta_seconds"] is not None for repair in told)
        status = await one.store.status()
        assert status["repair"] is None
        (past,) = status["repairs"]
        assert past["bytes"] > 0


# --- metrics -------------------------------------------------------------------


def about() -> MountStatus:
    return MountStatus(True, time.time(), "/mnt", os.getpid(), None)


async def fetch(monitor: Monitor, path: str, accept: str = "") -> web.Answer:
    return await trio.to_thread.run_sync(monitor.routes()[path], accept)


async def everything(one: Opened) -> Monitor:
    """A monitor that has something to say about everything: a rotten shard, a repair, a scrub."""
    await one.put("a", random.Random(1).randbytes(3 * STRIPE_BYTES))
    await one.store.committer.commit()
    node = one.store.config.nodes[0]
    (segment,) = (node.path / "shards").iterdir()
    with segment.open("r+b") as file:
        file.seek(10_000)
        file.write(bytes(100_000))
    await one.get("a")
    await one.store.healer.heal_all()
    shutil.rmtree(node.path)
    await one.store.repairer.repair(node.name, lambda message: None)
    with trio.fail_after(30):
        await one.store.scrubber.command(
            "start", None, wait=True, alone=False, progress=lambda message: None
        )
    for name in ("read", "write"):
        TALLIES[name].times.add(50_000)
    TALLIES["write"].answered(errno.EIO)
    one.files.go_on()
    with trio.fail_after(30):
        await one.files.cleaner.wait(one.files.cleaner.compact(), lambda message: None)
    return Monitor(one.store, one.files.cleaning_report.status, TALLIES, about)


def samples(answer: web.Answer) -> dict[str, float]:
    """Name and labels of all samples of an exposition, by prometheus_client's own parser."""
    parser = (
        prometheus_client.openmetrics.parser
        if "openmetrics" in answer.kind
        else prometheus_client.parser
    )
    return {
        f"{sample.name}{sorted(sample.labels.items()) or ''}": sample.value
        for family in parser.text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize("accept", ["", OPENMETRICS, OPENMETRICS.replace("1.0.0", "x")])
@pytest.mark.expects_log(GONE, CORRUPT)
async def test_the_exposition_is_valid_and_tells_what_happened(
    config: StoreConfig, accept: str
) -> None:
    async with opened(config) as one:
        monitor = await everything(one)
        found = samples(await fetch(monitor, "/metrics", accept))
        east = "[('node', 'us-east-1'), ('region', 'us-east-1')]"
        assert found["fusestore_healthy"] == 1
        assert found["fusestore_regions_borne"] == 1
        assert found["fusestore_degraded_reads_total"] >= 1
        assert found[f"fusestore_checksum_failures_total{east}"] >= 1
        assert found["fusestore_repair_mean_seconds"] > 0
        assert found["fusestore_scrub_progress_ratio"] == 1
        assert found["fusestore_commit_duration_seconds_count"] >= 1
        assert found["fusestore_checkpoint_duration_seconds_count"] >= 1
        assert found["fusestore_stripes"] == one.store.log.counters.stripes
        states = {
            key: value
            for key, value in found.items()
            if key.startswith("fusestore_node_state") and "us-east-1" in key
        }
        assert sum(states.values()) == 1
        buckets = [value for key, value in found.items() if "commit_duration_seconds_bucket" in key]
        assert buckets == sorted(buckets)


KEYWORDS = {"by", "on", "and", "or", "unless", "sum", "max", "min", "without", "ignoring"}


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression speaks of."""
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", text)
    text = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", " ", text)
    names = set(re.findall(r"\b[a-zA-Z_][a-zA-Z0-9_:]*\b(?!\s*\()", text))
    return names - KEYWORDS


def dashboard_expressions() -> list[str]:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    variables = board["templating"]["list"]
    queries = [v["query"]["query"] for v in variables if v["type"] == "query"]
    return found + [re.sub(r"label_values\((\w+),.*", r"\1", query) for query in queries]


def alert_expressions() -> list[str]:
    text = (MONITORING / "alerts.yml").read_text()
    found = re.findall(r"^ +expr: (.+)$", text, re.MULTILINE)
    assert len(found) == text.count("- alert: ")
    return found


@pytest.mark.expects_log(GONE, CORRUPT)
async def test_dashboard_and_alerts_speak_of_metrics_that_there_are(config: StoreConfig) -> None:
    assert metric_names('sum by (a) (rate(x_total{b="c"}[5m])) > 0.1 and on (i) y == 1') == {
        "x_total",
        "y",
    }
    async with opened(config) as one:
        monitor = await everything(one)
        text = (await fetch(monitor, "/metrics")).body.decode()
    families = prometheus_client.parser.text_string_to_metric_families(text)
    exported = {sample.name for family in families for sample in family.samples} | {"up"}
    expressions = dashboard_expressions() + alert_expressions()
    assert len(expressions) > 30
    # What is there only while a repair runs.
    exported |= {"fusestore_repair_progress_ratio"}
    for expression in expressions:
        names = metric_names(expression)
        assert names, expression
        assert names <= exported, expression


async def test_a_loop_that_hangs_is_said(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusestore.watch.monitor.ANSWER_SECONDS", 0.1)
    async with opened(config) as one:
        monitor = Monitor(one.store, one.files.cleaning_report.status, TALLIES, about)
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                monitor.observe()
            except FusestoreError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()  # the loop answers nobody meanwhile
        assert "did not answer" in str(failed[0])
        assert json.loads((await fetch(monitor, "/status.json")).body)["healthy"]


async def test_looks_within_a_second_are_one(config: StoreConfig) -> None:
    async with opened(config) as one:
        monitor = Monitor(one.store, one.files.cleaning_report.status, TALLIES, about)
        first = await trio.to_thread.run_sync(monitor.observe)
        assert await trio.to_thread.run_sync(monitor.observe) is first


# --- the web server ------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Starts web servers; returns their ports."""
    with ExitStack() as ends:

        def start(host: str = "127.0.0.1") -> int:
            def fails(accept: str) -> web.Answer:
                raise FusestoreError("Not now.")

            def odd(accept: str) -> web.Answer:
                raise ZeroDivisionError

            routes = {"/": lambda accept: web.Answer(b"hello"), "/fails": fails, "/odd": odd}
            server = web.WebServer(host, 0, routes)
            ends.callback(server.close)
            return int(server.url.rstrip("/").rpartition(":")[2])

        yield start


def ask(
    port: int, path: str, method: str = "GET", host: str = "localhost", at: str = "127.0.0.1"
) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection(at, port, timeout=20)
    try:
        connection.request(method, path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


@pytest.mark.expects_log(r"watch\.web: /odd could not be answered")
def test_only_known_paths_and_methods_are_answered(serve: Callable[..., int]) -> None:
    port = serve()
    status, body, headers = ask(port, "/?x=y")
    assert (status, body) == (200, b"hello")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert ask(port, "/", "HEAD")[:2] == (200, b"")
    for path in ("/../etc/passwd", "//etc/passwd", "/%2e%2e/etc/passwd", "/status.html", "/fails/"):
        assert ask(port, path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(port, "/", method)[0] == 405
    assert ask(port, "/", "TRACE")[0] == 501
    assert ask(port, "/fails")[:2] == (503, b"Not now.\n")
    assert ask(port, "/odd")[0] == 500


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:9464", 200), ("127.0.0.1:1", 200), ("127.8.8.8", 200),
        ("[::1]:9464", 200), ("LocalHost.", 200), ("evil.example", 403), ("", 403),
        ("localhost.evil.example", 403), ("10.0.0.1", 403), ("127.0.0.1.evil.example:80", 403),
    ],
)  # fmt: skip
def test_other_names_than_the_loopbacks_are_refused(
    serve: Callable[..., int], host: str, status: int
) -> None:
    assert ask(serve(), "/", host=host)[0] == status


def test_bound_elsewhere_any_name_will_do(serve: Callable[..., int]) -> None:
    assert ask(serve("0.0.0.0"), "/", host="store.example")[0] == 200


def test_ipv6(serve: Callable[..., int]) -> None:
    assert ask(serve("::1"), "/", host="[::1]", at="::1")[0] == 200


def test_an_address_in_use_is_one_sentence(serve: Callable[..., int]) -> None:
    port = serve()
    with pytest.raises(
        FusestoreError, match=rf"^The server cannot listen on 127.0.0.1:{port}: .+\.$"
    ):
        web.WebServer("127.0.0.1", port, {})


def test_silent_clients_keep_nobody_away(
    serve: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while they are connected, nor when they connect again and again."""
    monkeypatch.setattr(web, "CLIENTS_MAX", 3)
    port = serve()
    with ExitStack() as ends:
        slow = [ends.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in "abcde"]
        for one in slow[2:]:
            one.sendall(b"GET / HT")
        for _ in range(5):
            assert ask(port, "/")[0] == 200
            slow.append(ends.enter_context(socket.create_connection(("127.0.0.1", port))))
        slow[0].settimeout(20)
        assert b"200" not in slow[0].recv(1000)


def test_slow_clients_are_let_go(
    serve: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "CLIENT_SECONDS", 0.5)
    port = serve()
    with ExitStack() as ends:
        slow = [ends.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in "abc"]
        for one in slow:
            one.sendall(b"GET / HT")
        for one in slow:
            one.settimeout(20)
            assert b"200" not in one.recv(1000)
    assert ask(port, "/")[0] == 200


# --- the page ------------------------------------------------------------------


def test_the_page_contains_all_that_it_needs() -> None:
    answer = page()
    text = answer.body.decode()
    assert "//" not in re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
    assert not re.search(r"\bstyle=|\bon[a-z]+=\"|innerHTML|@import|url\(", text)
    policy = answer.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


# --- where it is served --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)), ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:80", ("::1", 80)), ("a.example:1", ("a.example", 1)),
    ],
)  # fmt: skip
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    options = MountOptions.parse(["ro", f"metrics={text}"])
    assert MountOptions.parse([str(options)]) == options
    assert "metrics" not in " ".join(options.kernel)


@pytest.mark.parametrize("text", ["", ":80", "x", "a:b", "a:70000", "::1:80", "1:-1", "1:²"])
def test_what_is_no_address(text: str, config: StoreConfig) -> None:
    with pytest.raises(UsageError, match="is not an address for metrics"):
        MountOptions.parse([f"metrics={text}"])
    if text:
        file = config.store / "fusestore.toml"
        file.write_text(f'metrics = "{text}"\n' + file.read_text())
        with pytest.raises(ConfigError, match=r"fusestore\.toml:1: metrics cannot be used: "):
            load(config.store)


def test_metrics_can_be_turned_off_and_configured(config: StoreConfig) -> None:
    assert MountOptions.parse(["metrics=off"]).metrics == "off"
    file = config.store / "fusestore.toml"
    file.write_text('metrics = "9464"\n' + file.read_text())
    assert load(config.store).metrics == "9464"


# --- watching ------------------------------------------------------------------


def watched(store: Path, *options: str, until: Callable[[str], bool]) -> tuple[int, str]:
    """What `status --watch` prints until it has printed enough, and how it then ends."""
    command = [*FUSESTORE, "status", str(store), *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = ""
    timer = threading.Timer(60, child.kill)
    timer.start()
    try:
        while not until(text) and (line := child.stdout.readline()):
            text += line
        child.send_signal(signal.SIGINT)
        text += child.stdout.read()
        return child.wait(30), text
    finally:
        timer.cancel()
        child.stdout.close()


def test_watching_prints_a_block_each_time_and_ends_with_0(config: StoreConfig) -> None:
    status, text = watched(
        config.store, "--watch=0.1", until=lambda text: text.count("not mounted") >= 2
    )
    assert status == 0
    assert "\x1b" not in text
    assert text.startswith("All data is safe")


def test_watching_as_json_prints_an_object_a_line(config: StoreConfig) -> None:
    status, text = watched(
        config.store, "--json", "--watch", "0.1", until=lambda text: text.count("\n") >= 3
    )
    assert status == 0
    first, second, *_ = map(json.loads, text.splitlines())
    assert first["healthy"] is True
    assert second["healthy"] is False


def test_watching_on_a_terminal_draws_in_place(config: StoreConfig) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    command = [*FUSESTORE, "status", str(config.store), "--watch", "0.1"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while seen.count(b"\x1b[H") < 3:
            seen += os.read(ours, 1 << 16)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
        seen += os.read(ours, 1 << 16)
    finally:
        child.kill()
        os.close(ours)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l\x1b[HAll data is safe")
    screens, _, after = seen.partition(b"\x1b[?25h\x1b[?1049l")
    assert after.startswith(b"The store")  # what was seen last
    assert b"2J" not in screens  # nothing is cleared, so nothing flickers
    for screen in screens.split(b"\x1b[H")[1:]:
        lines = screen.replace(b"\x1b[K", b"").replace(b"\x1b[J", b"").split(b"\r\n")
        assert len(lines) <= 24
        assert [line for line in lines if len(line.decode()) > 60] == []
