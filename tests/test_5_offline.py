"""Nodes are taken offline and back, on a mount and without one; their disks can be changed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.logs import GONE, LOST_STRIPE, ONLY_READ, OUT_OF_USE, TOO_FEW_NODES, UNREAD_FILE
from support.loop_devices import Disks
from support.mounted_store import Store

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.not_plain,
    pytest.mark.expects_log(OUT_OF_USE, TOO_FEW_NODES),
]

MIB = 1 << 20
REGIONS = ("r0", "r1", "r2")


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    disks = Disks(tmp_path / "disks")
    disks.top.mkdir()
    try:
        disks.make(dict.fromkeys(REGIONS, 100 * MIB))
    except OSError as error:
        disks.detach()
        pytest.skip(f"there are no loop devices: {error}")
    yield disks
    disks.detach()


@pytest.fixture
def store(disks: Disks, make_store: Callable[..., Store]) -> Iterator[Store]:
    store = make_store(*[f"--region={name}={disks.top / name / 'node'}" for name in REGIONS])
    store.mount()
    yield store
    store.clean_up()


def write(store: Store, name: str) -> None:
    with (store.mountpoint / name).open("wb") as file:
        file.write(name.encode() * MIB)
        os.fsync(file.fileno())


def state(store: Store, name: str) -> tuple[str, str]:
    (node,) = (node for node in store.status()["nodes"] if node["name"] == name)
    return node["state"], node["error"]


def test_a_disk_is_checked_while_the_store_is_used(store: Store, disks: Disks) -> None:
    write(store, "a")
    assert "can be unmounted" in store.cli("node", "offline", store.store, "r1").stdout
    disks.detach_one("r1")
    write(store, "b")
    assert state(store, "r1")[0] == "down"
    assert f"'fusestore node online {store.store} r1'" in state(store, "r1")[1]
    store.remount()  # it stays offline
    assert "is offline" in state(store, "r1")[1]
    assert store.cli("repair", store.store, "r1", check=False).returncode != 0
    disks.attach("r1")
    write(store, "c")
    assert "is offline" in state(store, "r1")[1]
    assert store.cli("node", "online", store.store, "r1").stdout == "r1 is up.\n"
    assert store.status()["healthy"]
    (disks.top / "r2" / "node").rename(disks.top / "r2" / "away")
    for name in ("a", "b", "c"):
        assert (store.mountpoint / name).read_bytes() == name.encode() * MIB
    (disks.top / "r2" / "away").rename(disks.top / "r2" / "node")
    store.kill()


def test_the_last_node_but_too_few_is_kept_unless_forced(store: Store) -> None:
    write(store, "a")
    store.cli("node", "offline", store.store, "r0")
    refused = store.cli("node", "offline", store.store, "r1", check=False)
    assert refused.returncode == 2
    assert "Without r1, the store could not be written to" in refused.stderr
    write(store, "b")
    store.cli("node", "offline", store.store, "r1", "--force")
    with pytest.raises(OSError, match=r"Input/output error|Read-only file system"):
        write(store, "c")
    assert store.cli("node", "online", store.store, "r1").stdout == "r1 is up.\n"
    write(store, "d")
    store.cli("node", "online", store.store, "r0")
    assert store.status()["healthy"]


def test_an_unmounted_store(store: Store, disks: Disks) -> None:
    write(store, "a")
    store.umount()
    store.cli("node", "offline", store.store, "r2")
    disks.detach_one("r2")
    store.mount()
    write(store, "b")
    store.umount()
    disks.attach("r2")
    assert store.cli("node", "online", store.store, "r2").stdout == "r2 is up.\n"
    store.mount()
    assert store.status()["healthy"]


@pytest.mark.expects_log(ONLY_READ)
def test_an_unmounted_store_that_cannot_be_opened(store: Store, disks: Disks) -> None:
    write(store, "a")
    store.umount()
    for name in REGIONS[:2]:
        subprocess.run(["mount", "-o", "remount,ro", disks.top / name], check=True)
    assert store.try_mount().returncode == 3
    assert store.cli("node", "offline", store.store, "r7", "--force", check=False).returncode == 2
    for name in REGIONS[:2]:
        assert (
            "can be unmounted" in store.cli("node", "offline", store.store, name, "--force").stdout
        )
        disks.detach_one(name)
    refused = store.try_mount()
    assert refused.returncode == 3
    assert f"'fusestore node online {store.store} r0'" in refused.stderr
    for name in REGIONS[:2]:
        disks.attach(name)
        store.cli("node", "online", store.store, name, check=False)
    store.mount()
    assert store.status()["healthy"]
    assert (store.mountpoint / "a").read_bytes() == b"a" * MIB


@pytest.mark.expects_log(GONE, LOST_STRIPE, ONLY_READ, UNREAD_FILE, "No metadata dump")
@pytest.mark.parametrize("trouble", ["none", "read-only", "read-only, large", "back"])
def test_a_disk_can_be_unmounted_at_once_whatever_befell_it(
    store: Store, disks: Disks, trouble: str
) -> None:
    write(store, "a")
    node = disks.top / "r1" / "node"
    for number in range(5):
        if trouble.startswith("read-only"):
            disks.turn_read_only("r1")
        elif trouble == "back":
            node.rename(node.with_name("away"))
        for small in range(1 if trouble.endswith("large") else 20):
            with (store.mountpoint / f"small{small}").open("wb") as file:
                file.write(os.urandom(3 * MIB if trouble.endswith("large") else 100))
                os.fsync(file.fileno())
        if trouble == "back":
            node.with_name("away").rename(node)
            time.sleep(2.3 * number)  # it may be on its way
        store.cli("node", "offline", store.store, "r1")
        disks.check("r1")
        store.cli("node", "online", store.store, "r1")
        assert store.status()["healthy"]


@pytest.mark.expects_log(ONLY_READ, UNREAD_FILE, "No metadata dump")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_status_says_how_to_free_the_disks_that_turned_read_only(
    store: Store, disks: Disks, count: int
) -> None:
    write(store, "a")
    for name in REGIONS[:count]:
        disks.turn_read_only(name)
    with contextlib.suppress(OSError):
        write(store, "b")
    advised = [f"'fusestore node offline {store.store} {name}'" for name in REGIONS[:count]]
    deadline = time.monotonic() + 40
    while not all(text in store.cli("status", store.store, check=False).stdout for text in advised):
        assert time.monotonic() < deadline, store.status()
        time.sleep(0.5)
    for name in REGIONS[:count]:
        store.cli("node", "offline", store.store, name)
    for name in REGIONS[:count]:
        disks.check(name)
        store.cli("node", "online", store.store, name)
    write(store, "c")
    assert (store.mountpoint / "a").read_bytes() == b"a" * MIB
    while not store.status()["healthy"]:
        assert time.monotonic() < deadline, store.status()
        time.sleep(0.5)
