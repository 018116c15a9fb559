"""A mount that is watched: metrics, health and the status page, as others see them."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.logs import GONE, OUT_OF_USE, TOO_FEW_NODES
from support.mounted_store import FUSESTORE, REPOSITORY, Store
from support.posixly import read_uncached

pytestmark = pytest.mark.mounted

MIB = 1 << 20
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def watched(make_store: Callable[..., Store]) -> Store:
    """A mounted store with metrics at a free port."""
    store = make_store()
    store.mount("metrics=0")
    return store


def get(store: Store, path: str) -> tuple[int, str]:
    """(HTTP status, text) of a path of the mount's own server."""
    url = store.status()["metrics"].rstrip("/") + path
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metric(store: Store, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    _, text = get(store, "/metrics")
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert found, name
    return sum(found)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it did not come about")


def test_what_is_read_and_written_is_counted(watched: Store) -> None:
    data = os.urandom(3 * MIB + 17)
    file = watched.mountpoint / "file"
    file.write_bytes(data)
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert read_uncached(file) == data
    with pytest.raises(FileNotFoundError):
        os.unlink(watched.mountpoint / "none")
    time.sleep(1.1)  # answers within a second share one look
    assert metric(watched, "fusestore_written_bytes_total") == len(data)
    assert metric(watched, "fusestore_read_bytes_total") >= len(data)
    name = "fusestore_operation_duration_seconds_count"
    assert metric(watched, name, operation="fsync") == 1
    assert metric(watched, name, operation="create") == 1
    assert metric(watched, "fusestore_healthy") == 1
    assert get(watched, "/healthz") == (
        200,
        "All data is safe: every node is up, and any one region may be lost.\n",
    )


def test_counts_go_on_after_a_remount(watched: Store) -> None:
    def writes() -> int:
        rows = json.loads(watched.cli("metrics", "summary", watched.store, "--json").stdout)
        return sum(row["count"] for row in rows["operations"] if row["operation"] == "create")

    (watched.mountpoint / "a").touch()
    assert writes() == 1
    watched.umount()
    assert writes() == 1
    watched.mount("metrics=0")
    (watched.mountpoint / "b").touch()
    assert writes() == 2
    assert "create,2," in watched.cli("metrics", "export", watched.store).stdout
    watched.cli("metrics", "reset", watched.store)
    assert writes() == 0
    (watched.mountpoint / "c").touch()
    watched.kill()  # what the last minute counted is lost, and nothing else
    assert writes() == 0


@pytest.mark.expects_log(GONE)
def test_a_lost_region_is_seen_and_its_repair_measured(watched: Store) -> None:
    data = os.urandom(4 * MIB)
    (watched.mountpoint / "file").write_bytes(data)
    shutil.rmtree(watched.node("us-east-1"))
    eventually(lambda: metric(watched, "fusestore_regions_borne") == 0)
    down = {"node": "us-east-1", "state": "down"}
    eventually(lambda: metric(watched, "fusestore_node_state", **down) == 1)
    assert metric(watched, "fusestore_healthy") == 0
    assert metric(watched, "fusestore_serving") == 1
    status, sentence = get(watched, "/healthz")
    assert status == 200
    assert sentence.startswith("Not healthy: us-east-1 is not up")
    watched.cli("repair", watched.store, "us-east-1")
    eventually(lambda: metric(watched, "fusestore_healthy") == 1)
    assert metric(watched, "fusestore_repair_mean_seconds") > 0
    assert read_uncached(watched.mountpoint / "file") == data


@pytest.mark.expects_log(GONE, TOO_FEW_NODES)
def test_two_lost_regions_are_not_healthy_at_all(watched: Store) -> None:
    (watched.mountpoint / "file").write_bytes(os.urandom(2 * MIB))
    for region in ("us-east-1", "us-west-1"):
        shutil.rmtree(watched.node(region))
    watched.cli("status", watched.store, check=False)  # looks at the nodes
    eventually(lambda: get(watched, "/healthz")[0] == 503)
    assert metric(watched, "fusestore_serving") == 0
    assert metric(watched, "fusestore_regions_borne") == -1
    watched.kill()  # there is nothing left to unmount to


def test_a_port_in_use_is_said_and_nothing_is_mounted(
    watched: Store, make_store: Callable[..., Store]
) -> None:
    address = watched.status()["metrics"].removeprefix("http://").rstrip("/")
    other = make_store()
    done = other.cli("mount", other.store, other.mountpoint, "--metrics", address, check=False)
    assert done.returncode == 3
    assert (
        done.stderr
        == f"fusestore: The server cannot listen on {address}: Address already in use.\n"
    )
    assert not os.path.ismount(other.mountpoint)


def test_the_configuration_says_where_and_the_mount_may_say_no(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    file = store.store / "fusestore.toml"
    file.write_text('metrics = "0"\n' + file.read_text())
    store.mount()
    assert get(store, "/healthz")[0] == 200
    store.remount("metrics=off")
    assert store.status()["metrics"] is None


# --- the fields of status --------------------------------------------------------


def documented() -> set[str]:
    """The fields that the manual's table has; those of parts as `part.field`."""
    text = (REPOSITORY / "docs/monitoring.md").read_text()
    table = text[text.index("| field | ") :].partition("\n\n")[0]
    found = set()
    for row in table.splitlines()[2:]:
        cell = row.split("|")[1]
        found |= set(re.findall(r"`([a-z_.]+)`", cell))
    return found


def fields(status: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in status.items():
        found.add(prefix + name)
        part = value[0] if isinstance(value, list) and value else value
        if isinstance(part, dict):
            found |= fields(part, f"{name}.")
    return found


@pytest.mark.expects_log(OUT_OF_USE)
def test_status_has_the_fields_that_are_documented(watched: Store) -> None:
    (watched.mountpoint / "file").write_bytes(os.urandom(40 * MIB))
    shutil.rmtree(watched.node("us-east-1"))
    watched.cli("repair", watched.store, "us-east-1")
    shutil.rmtree(watched.node("us-east-1"))
    child = subprocess.Popen(
        [*FUSESTORE, "repair", str(watched.store), "us-east-1", "--rate", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: watched.status()["repair"] is not None)
        found = fields(watched.status())
    finally:
        child.terminate()
        child.wait(30)
    assert found == documented()
    eventually(lambda: watched.status()["repair"] is None)
    watched.umount()
    assert {name for name in fields(watched.status()) if "repair." not in name} == {
        name for name in documented() if "repair." not in name
    }


# --- the page --------------------------------------------------------------------


def browse(store: Store, profile: Path, *options: str) -> tuple[str, str]:
    """The page after some seconds of its scripts, and what the browser complained of."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs chromium, which tools/setup installs on Debian")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=5000"),
            f"--user-data-dir={profile}",
            *options,
            "--dump-dom",
            store.status()["metrics"],
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return html.unescape(done.stdout), "\n".join(complaints)


@pytest.mark.expects_log(GONE)
def test_the_page_in_a_browser(watched: Store, tmp_path: Path) -> None:
    file = watched.mountpoint / "file"
    file.write_bytes(os.urandom(8 * MIB))
    read_uncached(file)
    page, complaints = browse(watched, tmp_path / "profile")
    assert complaints == ""
    assert "All data is safe: every node is up, and any one region may be lost." in page
    assert page.count("✓ up") == 3
    for name in ("us-east-1", "us-west-1", "eu-west-1"):
        assert f"Region {name}" in page
    assert 'aria-label="Code 2+1; us-east-1 is up, us-west-1 is up, eu-west-1 is up"' in page
    assert re.search(r'aria-label="Written: [^"]+ now, at most [^"]+ in the last 1 min"', page)
    assert 'role="progressbar"' in page
    assert re.search(r'<th scope="row">write</th>', page)

    shutil.rmtree(watched.node("us-east-1"))
    (watched.mountpoint / "more").write_bytes(os.urandom(2 * MIB))
    eventually(lambda: not json.loads(get(watched, "/status.json")[1])["healthy"])
    page, complaints = browse(watched, tmp_path / "profile")
    assert complaints == ""
    assert "Not healthy: us-east-1 is not up" in page
    assert "The loss of one more region would lose data." in page
    assert "✕ down" in page
    watched.cli("repair", watched.store, "us-east-1")


def test_the_manuals_picture_is_small() -> None:
    picture = REPOSITORY / "docs" / "status-page.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 200_000
