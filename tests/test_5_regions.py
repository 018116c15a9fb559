"""Regions come and go at random under a load of random reads and writes, and repair is killed.

The fault model: at any moment the directory of one region is moved away, emptied
or brought back, while the others stay; a repair is killed at any moment.  The
expected bytes are kept in memory, the seed is printed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.file_load import Load
from support.logs import OUT_OF_USE
from support.mounted_store import FUSESTORE, REPOSITORY, Store
from support.posixly import read_uncached

pytestmark = [pytest.mark.mounted, pytest.mark.expects_log(OUT_OF_USE)]

REGIONS = ("us-east-1", "us-west-1", "eu-west-1")


def heal(store: Store) -> None:
    """Wait until nothing is missing."""
    deadline = time.monotonic() + 90
    while not (status := store.status())["healthy"]:
        assert time.monotonic() < deadline, json.dumps(status, indent=1)
        time.sleep(0.2)


def rounds(config: pytest.Config, few: int, many: int) -> int:
    return many if config.getoption("--long") else few


@pytest.mark.parametrize("code", ["2+1", "4+2"])
def test_regions_come_and_go_under_random_load(
    make_store: Callable[..., Store], tmp_path: Path, pytestconfig: pytest.Config, code: str
) -> None:
    seed = f"{pytestconfig.getoption('--model-seed')}/{code}"
    print("seed", seed)
    chance = random.Random(seed)
    store = make_store("--code", code)
    store.mount()
    paths = {node["name"]: Path(node["path"]) for node in store.status()["nodes"]}
    loads = [Load(store.mountpoint / f"file{i}", f"{seed}/{i}") for i in range(2)]
    for load in loads:
        load.start()
    try:
        for _ in range(rounds(pytestconfig, 2, 40)):
            lost = chance.choice(REGIONS)
            time.sleep(chance.random())
            if chance.random() < 0.5:
                paths[lost].rename(tmp_path / "away")
                time.sleep(chance.random() * 2)
                (tmp_path / "away").rename(paths[lost])
            else:
                shutil.rmtree(paths[lost])
                time.sleep(chance.random())
                store.cli("repair", store.store, lost)
            heal(store)
            assert all(load.error is None for load in loads)
    finally:
        for load in loads:
            load.end()
    assert all(load.operations for load in loads)
    store.umount()
    shutil.rmtree(paths[chance.choice(REGIONS)])
    store.mount()
    for load in loads:
        assert read_uncached(load.path) == bytes(load.model)


@pytest.mark.parametrize("mounted", [False, True])
def test_a_repair_that_is_killed_is_begun_again(
    make_store: Callable[..., Store], pytestconfig: pytest.Config, mounted: bool
) -> None:
    seed = f"{pytestconfig.getoption('--model-seed')}/{mounted}"
    print("seed", seed)
    chance = random.Random(seed)
    store = make_store()
    store.mount()
    nodes = {node["name"]: Path(node["path"]) for node in store.status()["nodes"]}
    files = {f"f{i}": chance.randbytes(chance.choice((100, 5000, 20 << 20))) for i in range(8)}
    for name, data in files.items():
        (store.mountpoint / name).write_bytes(data)
    store.umount()
    if mounted:
        store.mount()
    shutil.rmtree(nodes["us-west-1"])
    for _ in range(rounds(pytestconfig, 4, 40)):
        command = subprocess.Popen(
            [*FUSESTORE, "repair", str(store.store), "us-west-1", "--rate", "60", "--json"],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.random() * 1.5)
        command.send_signal(signal.SIGKILL)
        command.wait()
        if chance.random() < 0.3:
            for path in (nodes["us-west-1"] / "shards").glob("*"):
                os.truncate(path, chance.choice((0, path.stat().st_size // 2)))
    done = store.cli("repair", store.store, "us-west-1", "--json")
    assert json.loads(done.stdout)["unrepairable"] == []
    if mounted:
        heal(store)
        store.umount()
    shutil.rmtree(nodes["us-east-1"])
    store.mount()
    for name, data in files.items():
        assert read_uncached(store.mountpoint / name) == data


def test_users_write_on_while_a_node_is_repaired_and_another_read_fails(
    make_store: Callable[..., Store], pytestconfig: pytest.Config
) -> None:
    """With 1+2 a second region may go while the first is rebuilt."""
    seed = f"{pytestconfig.getoption('--model-seed')}/two"
    chance = random.Random(seed)
    store = make_store("--code", "1+2")
    store.mount()
    nodes = {node["name"]: Path(node["path"]) for node in store.status()["nodes"]}
    data = chance.randbytes(60 << 20)
    (store.mountpoint / "big").write_bytes(data)
    os.sync()
    shutil.rmtree(nodes["us-east-1"])
    load = Load(store.mountpoint / "load", seed)
    load.start()
    repair = subprocess.Popen(
        [*FUSESTORE, "repair", str(store.store), "us-east-1", "--rate", "100"], cwd=REPOSITORY
    )
    time.sleep(0.5)
    shutil.rmtree(nodes["eu-west-1"])
    assert repair.wait(120) == 0
    store.cli("repair", store.store, "eu-west-1")
    heal(store)
    load.end()
    assert read_uncached(store.mountpoint / "big") == data
