"""Any one region can be lost: at mount, while mounted, and after a repair any other.

Bytes are read with O_DIRECT after a remount, so that they come from the nodes
and not from a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.logs import CORRUPT, OUT_OF_USE
from support.mounted_store import Store
from support.posixly import read_uncached

pytestmark = [pytest.mark.mounted, pytest.mark.expects_log(OUT_OF_USE)]

KIB, MIB = 1 << 10, 1 << 20
REGIONS = ["us-east-1", "us-west-1", "eu-west-1"]
CODES = ["2+1", "4+2", "6+3", "1+2"]

Checksums = dict[str, str]


def content(name: str, size: int) -> bytes:
    return random.Random(f"{name} {size}").randbytes(size)


def write_tree(top: Path) -> Checksums:
    """Files of all sizes in some directories; their checksums by name."""
    written = {}
    for number, size in enumerate((0, 1, 500, 4096, 70_001, 300_000, MIB, 5 * MIB + 321)):
        directory = top / f"d{number % 3}"
        directory.mkdir(exist_ok=True, parents=True)
        path = directory / f"f{number}"
        data = content(path.name, size)
        path.write_bytes(data)
        written[str(path.relative_to(top))] = hashlib.sha256(data).hexdigest()
    return written


def read_tree(top: Path) -> Checksums:
    """The checksums of all files below, read past the page cache."""
    return {
        os.path.relpath(os.path.join(directory, name), top): hashlib.sha256(
            read_uncached(os.path.join(directory, name))
        ).hexdigest()
        for directory, _, files in os.walk(top)
        for name in files
    }


class Away:
    """A place to which node directories are moved, and from which they come back."""

    def __init__(self, store: Store, place: Path) -> None:
        self.paths = {node["name"]: Path(node["path"]) for node in store.status()["nodes"]}
        self.place = place
        place.mkdir()

    def take(self, name: str) -> None:
        self.paths[name].rename(self.place / name)

    def bring_back(self, name: str) -> None:
        (self.place / name).rename(self.paths[name])


@pytest.fixture(params=CODES)
def store(request: pytest.FixtureRequest, make_store: Callable[..., Store]) -> Store:
    made = make_store("--code", request.param)
    made.mount()
    return made


@pytest.fixture
def away(store: Store, tmp_path: Path) -> Away:
    return Away(store, tmp_path / "away")


def heal(store: Store) -> None:
    """Wait until the mounted store has given every node what it missed."""
    deadline = time.monotonic() + 60
    while not (status := store.status())["healthy"]:
        assert time.monotonic() < deadline, json.dumps(status, indent=1)
        time.sleep(0.2)


def states(store: Store) -> dict[str, str]:
    return {node["name"]: node["state"] for node in store.status()["nodes"]}


def test_all_reads_right_without_any_one_region_at_mount(store: Store, away: Away) -> None:
    written = write_tree(store.mountpoint)
    store.umount()
    for lost in REGIONS:
        away.take(lost)
        done = store.cli("mount", store.store, store.mountpoint)
        store.cli("umount", store.mountpoint)
        assert lost in done.stdout + done.stderr
        store.mount()
        assert read_tree(store.mountpoint) == written
        assert states(store)[lost] != "up"
        assert store.status()["healthy"] is False
        store.umount()
        away.bring_back(lost)
        store.mount()
        heal(store)
        store.umount()
    store.mount()
    assert read_tree(store.mountpoint) == written


def test_all_reads_right_when_a_region_goes_while_mounted(store: Store, away: Away) -> None:
    written = write_tree(store.mountpoint)
    for lost in REGIONS:
        store.remount()
        away.take(lost)
        assert read_tree(store.mountpoint) == written
        store.umount()
        away.bring_back(lost)
        store.mount()
        heal(store)


@pytest.mark.parametrize("store", ["2+1"], indirect=True)
def test_all_reads_right_when_a_region_is_wiped_while_mounted(store: Store) -> None:
    written = write_tree(store.mountpoint)
    store.remount()
    path = store.node(REGIONS[0])
    shutil.rmtree(path)
    assert read_tree(store.mountpoint) == written
    (store.mountpoint / "new").write_bytes(b"written without it")
    assert read_uncached(store.mountpoint / "new") == b"written without it"
    store.remount()
    assert (store.mountpoint / "new").read_bytes() == b"written without it"


@pytest.mark.parametrize(
    ("store", "lost"),
    [("2+1", REGIONS[0]), ("4+2", REGIONS[1]), ("6+3", REGIONS[2]), ("1+2", REGIONS[0])],
    indirect=["store"],
)
def test_writes_without_a_region_survive(store: Store, away: Away, lost: str) -> None:
    before = write_tree(store.mountpoint / "before")
    store.umount()
    away.take(lost)
    store.mount()
    during = write_tree(store.mountpoint / "during")
    (store.mountpoint / "before/d0/f0").write_bytes(b"changed")
    before["d0/f0"] = hashlib.sha256(b"changed").hexdigest()
    os.rename(store.mountpoint / "before/d1/f1", store.mountpoint / "before/d1/renamed")
    before["d1/renamed"] = before.pop("d1/f1")
    for _ in range(2):
        assert read_tree(store.mountpoint / "before") == before
        assert read_tree(store.mountpoint / "during") == during
        store.remount()
    store.umount()
    away.bring_back(lost)
    store.mount()
    assert read_tree(store.mountpoint / "before") == before
    assert read_tree(store.mountpoint / "during") == during


@pytest.mark.parametrize("store", ["2+1", "1+2"], indirect=True)
def test_writes_go_on_when_a_region_goes_while_mounted(store: Store, away: Away) -> None:
    written = write_tree(store.mountpoint / "before")
    away.take(REGIONS[1])
    during = write_tree(store.mountpoint / "during")
    fd = os.open(store.mountpoint / "during/d1/f1", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert states(store)[REGIONS[1]] != "up"
    store.remount()
    assert read_tree(store.mountpoint / "before") == written
    assert read_tree(store.mountpoint / "during") == during


@pytest.mark.parametrize(
    ("mounted", "loss"), [(True, "emptied"), (False, "gone")], ids=["mounted", "unmounted"]
)
def test_after_a_repair_any_other_region_may_go(
    store: Store, away: Away, mounted: bool, loss: str
) -> None:
    written = write_tree(store.mountpoint)
    if not mounted:
        store.umount()
    wiped, *others = REGIONS[1:] + REGIONS[:1]
    shutil.rmtree(away.paths[wiped])
    if loss == "emptied":
        away.paths[wiped].mkdir()
    store.cli("repair", store.store, wiped, "--quiet")
    assert states(store)[wiped] == "up"
    if mounted:
        assert read_tree(store.mountpoint) == written
        (store.mountpoint / "later").write_bytes(b"after the repair")
        written["later"] = hashlib.sha256(b"after the repair").hexdigest()
        store.umount()
    for lost in others:
        away.take(lost)
        store.mount()
        assert read_tree(store.mountpoint) == written
        store.umount()
        away.bring_back(lost)
        store.mount()
        heal(store)
        store.umount()
    store.mount()
    status = store.status()
    assert status["healthy"] is True
    assert [node["missing_shards"] for node in status["nodes"]] == [0, 0, 0]


@pytest.mark.parametrize("store", ["2+1", "1+2"], indirect=True)
def test_repairs_one_after_the_other_lose_nothing(store: Store, away: Away) -> None:
    written = write_tree(store.mountpoint)
    for lost in REGIONS:
        shutil.rmtree(away.paths[lost])
        store.cli("repair", store.store, lost, "--quiet")
    store.remount()
    assert read_tree(store.mountpoint) == written


@pytest.mark.parametrize("store", ["2+1", "1+2"], indirect=True)
def test_what_was_written_without_a_region_is_repaired_too(store: Store, away: Away) -> None:
    before = write_tree(store.mountpoint / "before")
    store.umount()
    shutil.rmtree(away.paths[REGIONS[0]])
    store.mount()
    during = write_tree(store.mountpoint / "during")
    store.cli("repair", store.store, REGIONS[0], "--quiet")
    store.umount()
    away.take(REGIONS[2])
    store.mount()
    assert read_tree(store.mountpoint / "before") == before
    assert read_tree(store.mountpoint / "during") == during


@pytest.mark.parametrize("store", ["2+1", "1+2"], indirect=True)
def test_a_region_that_comes_back_is_whole_again(store: Store, away: Away) -> None:
    store.umount()
    away.take(REGIONS[0])
    store.mount()
    written = write_tree(store.mountpoint)
    store.umount()
    away.bring_back(REGIONS[0])
    store.mount()
    heal(store)
    store.umount()
    away.take(REGIONS[1])
    store.mount()
    assert read_tree(store.mountpoint) == written


@pytest.mark.parametrize("store", ["2+1", "1+2"], indirect=True)
def test_a_region_that_is_back_counts_at_once_when_another_goes(store: Store, away: Away) -> None:
    written = write_tree(store.mountpoint)
    store.umount()
    away.take(REGIONS[0])
    store.mount()
    store.umount()
    away.bring_back(REGIONS[0])
    away.take(REGIONS[1])
    store.mount()
    assert read_tree(store.mountpoint) == written


def test_a_loss_that_is_too_large_is_told_and_nothing_wrong_is_read(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store()
    store.mount()
    written = write_tree(store.mountpoint)
    store.remount()
    away = Away(store, tmp_path / "away")
    away.take(REGIONS[0])
    away.take(REGIONS[1])
    for name, checksum in written.items():
        try:
            found = hashlib.sha256(read_uncached(store.mountpoint / name)).hexdigest()
        except OSError:
            continue
        assert found == checksum
    away.bring_back(REGIONS[0])
    away.bring_back(REGIONS[1])
    store.remount()
    assert read_tree(store.mountpoint) == written


@pytest.mark.parametrize("store", ["2+1", "1+2"], indirect=True)
@pytest.mark.expects_log(CORRUPT)
def test_a_damaged_shard_is_not_believed(store: Store) -> None:
    written = write_tree(store.mountpoint)
    store.remount()
    layout = json.loads(os.getxattr(store.mountpoint / "d1/f7", "user.fusestore.layout"))
    damaged = 0
    for stripe in layout["stripes"].values():
        shard = stripe["shards"][0]
        with (store.node(shard["node"]) / shard["segment"]).open("r+b") as segment:
            segment.seek(shard["offset"] + shard["length"] // 2)
            byte = segment.read(1)
            segment.seek(-1, os.SEEK_CUR)
            segment.write(bytes([byte[0] ^ 0x10]))
            damaged += 1
    assert damaged
    assert read_tree(store.mountpoint) == written
