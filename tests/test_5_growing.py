"""A mounted store grows from three nodes to six and loses some again, under load and kills.

The fault model: the daemon is killed in the middle of a rebalance and of a drain; at
the end a whole region is deleted.  What was written is compared by checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.file_load import Load
from support.logs import OUT_OF_USE
from support.mounted_store import Store
from support.posixly import read_uncached

pytestmark = [pytest.mark.mounted, pytest.mark.expects_log(OUT_OF_USE)]

FILES = 24
FILE_BYTES = 3 << 20


def fill(mountpoint: Path, name: str) -> dict[str, str]:
    """Write files, and flush them; their checksums."""
    sums = {}
    (mountpoint / name).mkdir()
    for number in range(FILES):
        data = random.Random(f"{name}{number}").randbytes(FILE_BYTES + 4099 * number)
        path = f"{name}/{number}"
        (mountpoint / path).write_bytes(data)
        sums[path] = hashlib.sha256(data).hexdigest()
    descriptor = os.open(mountpoint / name, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return sums


def is_right(mountpoint: Path, sums: dict[str, str]) -> None:
    for path, digest in sums.items():
        assert hashlib.sha256(read_uncached(mountpoint / path)).hexdigest() == digest, path


def asked(store: Store, *arguments: str) -> dict[str, Any]:
    """What a command answers as JSON."""
    command, *rest = arguments
    words = command.split()
    answer = json.loads(store.cli(*words, store.store, *rest, "--json").stdout)
    assert isinstance(answer, dict)
    return answer


def nodes(store: Store) -> dict[str, dict[str, Any]]:
    return {node["name"]: node for node in asked(store, "node list")["nodes"]}


def grow(store: Store) -> None:
    """Three more nodes, of weights 1, 1 and 2."""
    for name, region, weight in (
        ("us-east-2", "us-east-1", "1"),
        ("us-west-2", "us-west-1", "1"),
        ("eu-west-2", "eu-west-1", "2"),
    ):
        store.cli("node", "add", store.store, name, "--region", region, "--weight", weight)


def is_even(store: Store, heavy: float = 2 / 3) -> None:
    """Each node is within 5 % of its share, `heavy` for the heavy one."""
    found = nodes(store)
    for node in found.values():
        assert node["bytes"] == pytest.approx(node["share_bytes"], rel=0.05)
    region = found["eu-west-1"]["bytes"] + found["eu-west-2"]["bytes"]
    assert found["eu-west-2"]["bytes"] == pytest.approx(region * heavy, rel=0.05)


@contextmanager
def load(mountpoint: Path, seed: int) -> Iterator[None]:
    """Random operations in the meantime, all compared with what they should give."""
    loads = [Load(mountpoint / f"load-{seed}-{n}", f"{seed}-{n}") for n in range(2)]
    for one in loads:
        one.start()
    try:
        yield
    finally:
        for one in loads:
            one.stop.set()
            one.join()
    for one in loads:
        assert one.error is None, one.error
        assert one.operations > 0
        assert read_uncached(one.path) == one.model


@pytest.mark.parametrize("code", ["2+1", "4+2"])
def test_a_store_grows_and_shrinks_under_load(
    make_store: Callable[..., Store], pytestconfig: pytest.Config, code: str
) -> None:
    seed = pytestconfig.getoption("--model-seed")
    store = make_store("--code", code)
    store.mount()
    sums = fill(store.mountpoint, "first")
    with load(store.mountpoint, seed):
        grow(store)
        store.cli("rebalance", store.store, "start", "--wait")
        sums |= fill(store.mountpoint, "second")
    store.cli("rebalance", store.store, "start", "--wait")
    # With 4+2 each of a region's two nodes has one shard of every stripe.
    is_even(store, 2 / 3 if code == "2+1" else 1 / 2)
    is_right(store.mountpoint, sums)
    with load(store.mountpoint, seed + 1):
        refused = store.cli("node", "remove", store.store, "us-east-1", check=False)
        assert refused.returncode == 2
        assert "drain it first" in refused.stderr
        assert asked(store, "node drain", "us-east-1")["drained"] is True
        assert nodes(store)["us-east-1"]["bytes"] == 0
        store.cli("node", "remove", store.store, "us-east-1")
    assert not list((store.store / "us-east-1").iterdir())
    is_right(store.mountpoint, sums)
    assert store.status()["healthy"] is True
    refused = store.cli("node", "drain", store.store, "us-east-2", check=False)
    assert refused.returncode == 2
    store.remount()
    is_right(store.mountpoint, sums)
    shutil.rmtree(store.store / "eu-west-1")
    shutil.rmtree(store.store / "eu-west-2")
    is_right(store.mountpoint, sums)
    store.remount()
    is_right(store.mountpoint, sums)
    for name in ("eu-west-1", "eu-west-2"):
        store.cli("repair", store.store, name)
    assert store.status()["healthy"] is True
    store.umount()
    assert asked(store, "fsck")["clean"] is True


def test_a_kill_in_the_middle_loses_nothing_and_work_goes_on(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    sums = fill(store.mountpoint, "first")
    grow(store)
    store.cli("rebalance", store.store, "start", "--rate", "20")
    while asked(store, "rebalance", "status")["shards"] < 10:
        pass
    store.kill()
    store.mount()
    assert asked(store, "rebalance", "status")["state"] == "running"
    is_right(store.mountpoint, sums)
    store.cli("rebalance", store.store, "stop")
    store.cli("rebalance", store.store, "start", "--wait")
    is_even(store)
    before = nodes(store)["us-west-1"]["bytes"]
    store.cli("node", "drain", store.store, "us-west-1", "--no-wait")
    while nodes(store)["us-west-1"]["bytes"] == before:
        pass
    store.kill()
    store.mount()
    is_right(store.mountpoint, sums)
    assert nodes(store)["us-west-1"]["draining"] is True
    assert asked(store, "node drain", "us-west-1")["drained"] is True
    store.cli("node", "remove", store.store, "us-west-1")
    store.kill()
    store.mount()
    assert "us-west-1" not in nodes(store)
    assert store.status()["healthy"] is True
    is_right(store.mountpoint, sums)
    shutil.rmtree(store.store / "us-east-1")
    shutil.rmtree(store.store / "us-east-2")
    is_right(store.mountpoint, sums)


def test_a_kill_while_a_node_is_added_leaves_a_node_that_joins(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    sums = fill(store.mountpoint, "first")
    for number in range(3):
        killer = store.kill_soon(0.3 + 0.15 * number)
        arguments = ("--region", "us-east-1")
        store.cli("node", "add", store.store, f"more-{number}", *arguments, check=False)
        killer.join()
        store.kill()
        store.mount()
        is_right(store.mountpoint, sums)
        store.cli("node", "add", store.store, f"more-{number}", *arguments)
        assert store.status()["healthy"] is True
    assert len(nodes(store)) == 6
    store.cli("rebalance", store.store, "start", "--wait")
    shutil.rmtree(store.store / "eu-west-1")
    is_right(store.mountpoint, sums)


def test_replace_moves_a_node(make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store()
    store.mount()
    sums = fill(store.mountpoint, "first")
    store.cli("node", "replace", store.store, "us-east-1", "--to", tmp_path / "new")
    shutil.rmtree(store.store / "us-east-1")
    assert store.status()["healthy"] is True
    shutil.rmtree(store.store / "us-west-1")
    is_right(store.mountpoint, sums)


@pytest.mark.parametrize("way", ["on it", "deep", "link", "back", "bind", "overlay"])
def test_a_place_on_the_own_mount_is_refused_and_freezes_nothing(
    make_store: Callable[..., Store], tmp_path: Path, way: str
) -> None:
    store = make_store()
    store.mount()
    mountpoint, aside = store.mountpoint, tmp_path / "aside"
    aside.mkdir()
    for name in ("sub", "upper", "work"):
        (mountpoint / name).mkdir()
    layers = f"lowerdir={tmp_path},upperdir={mountpoint}/upper,workdir={mountpoint}/work"
    place, mount = {
        "on it": (mountpoint / "x", None),
        "deep": (mountpoint / "missing" / "sub" / "x", None),
        "link": (aside / "link" / "x", None),
        "back": (aside / "link" / ".." / "mnt" / "x", None),
        "bind": (aside / "x", ["--bind", mountpoint / "sub", aside]),
        "overlay": (aside / "x", ["-t", "overlay", "-o", layers, "overlay", aside]),
    }[way]
    if mount:
        subprocess.run(["mount", *mount], check=True)
    else:
        (aside / "link").symlink_to(mountpoint)
    before = (store.store / "fusestore.toml").read_bytes()
    try:
        for command in (
            ("node", "add", store.store, "w2", "--region", "us-west-1", "--path", place),
            ("repair", store.store, "us-west-1", "--to", place),
            ("repair", store.store, "us-west-1", "--to", place, "--dry-run"),
        ):
            refused = store.cli(*command, check=False)
            assert refused.returncode == 2, refused
            assert "a mount of this store itself: choose another place." in refused.stderr
        assert (store.store / "fusestore.toml").read_bytes() == before
        assert store.status()["healthy"] is True
    finally:
        if mount:
            subprocess.run(["umount", aside], check=True)
    store.remount()
    (mountpoint / "after").write_bytes(b"after")
