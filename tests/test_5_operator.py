"""What an operator in trouble does: two troubles at a time, and the commands that are advised."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusestore.config.store_config import CONFIG_NAME
from support.disks import Disks, fill, free
from support.logs import AS_TOLD, GONE, OUT_OF_USE, SCRUBBED, TOO_FEW_NODES
from support.mounted_store import Store, sync
from support.recovery import fingerprint

pytestmark = pytest.mark.mounted

MIB = 1 << 20
BLOCK = os.urandom(MIB)


@pytest.fixture
def on_disks(disks: Disks, make_store: Callable[..., Store]) -> Callable[..., Store]:
    """A function that makes a store of three nodes r0, r1, r2, each on a disk of some MiB."""

    def make(mib: int, *options: str) -> Store:
        places = [disks.tmpfs(f"d{number}", mib) for number in range(3)]
        regions = [f"--region=r{number}={place}/n" for number, place in enumerate(places)]
        return make_store(*options, *regions)

    return make


def disk_of(store: Store, node: str) -> Path:
    return store.node(node).parent


def put(store: Store, name: str, count: int) -> None:
    """Write and fsync a file of some MiB."""
    with (store.mountpoint / name).open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(BLOCK)
        os.fsync(file.fileno())


def is_whole(store: Store, name: str, count: int) -> bool:
    return (store.mountpoint / name).read_bytes() == BLOCK * count


def filled_store(store: Store, spoil: Callable[[Path], object]) -> Path:
    """Mount a store with a file, a spoilt segment of r1, and little room left there; the filler."""
    store.mount()
    put(store, "file", 10)
    store.umount()
    spoil(next((store.node("r1") / "shards").iterdir()))
    place = disk_of(store, "r1")
    (place / "filler").write_bytes(bytes(free(place) - 10 * MIB))
    store.mount()
    store.cli("scrub", store.store, "start", "--wait", check=False)
    return place / "filler"


def states(store: Store) -> set[str]:
    return {node["state"] for node in store.status()["nodes"]}


# --- full disks


@pytest.mark.parametrize("how", ["wiped", "new disk", "to"])
@pytest.mark.expects_log(GONE, OUT_OF_USE)
def test_a_node_of_a_full_store_is_rebuilt(
    disks: Disks, on_disks: Callable[..., Store], how: str
) -> None:
    """On its own disk, which has room now, or on another one, without a remount."""
    store = on_disks(140)
    store.mount()
    put(store, "kept", 10)
    with pytest.raises(OSError, match="No space left"):
        put(store, "filler", 400)
    place, node = disk_of(store, "r0"), store.node("r0")
    shutil.rmtree(node)
    if how == "new disk":
        disks.unmount(place)
        disks.remount_tmpfs(place, 140)
    arguments = [f"--to={disks.tmpfs('larger', 200)}/n"] if how == "to" else []
    store.cli("repair", store.store, "r0", "--on-this-disk", *arguments)
    assert states(store) == {"up"}
    shutil.rmtree(store.node("r1"))
    store.remount()
    assert is_whole(store, "kept", 10)


@pytest.mark.expects_log(SCRUBBED, GONE)
def test_a_rotten_shard_on_a_full_disk_is_mended_where_it_lies(
    on_disks: Callable[..., Store],
) -> None:
    def rot(segment: Path) -> None:
        with segment.open("r+b") as file:
            file.seek(200_000)
            file.write(b"rotten")

    store = on_disks(140)
    filled_store(store, rot)
    store.cli("repair", store.store, "r1")
    store.cli("scrub", store.store, "start", "--wait")
    assert states(store) == {"up"}
    shutil.rmtree(store.node("r0"))
    store.remount()
    assert is_whole(store, "file", 10)


@pytest.mark.expects_log(SCRUBBED, r"has no room for the shards that it lacks")
def test_a_node_without_room_for_a_lost_shard_serves_the_others(
    on_disks: Callable[..., Store],
) -> None:
    """Its repair fails, and `status` says why; what the node has is not given up."""
    store = on_disks(140)
    filler = filled_store(store, lambda segment: os.truncate(segment, 2 * MIB))
    done = store.cli("repair", store.store, "r1", check=False)
    assert done.returncode == 3
    assert "no room for the shards that it lacks" in done.stderr
    (about,) = (node for node in store.status()["nodes"] if node["name"] == "r1")
    assert (about["state"], about["missing_shards"] > 0) == ("up", True)
    assert "no room" in about["error"]
    filler.unlink()
    store.cli("repair", store.store, "r1")
    assert store.status()["healthy"]


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.expects_log(r"watch\.counts: the counts of operations cannot be written")
def test_status_names_the_disk_that_is_full(
    disks: Disks, make_store: Callable[..., Store], tmp_path: Path, mounted: bool
) -> None:
    (tmp_path / "s0").symlink_to(disks.tmpfs("metadata", 100))
    store = make_store(*(f"--region=r{number}={tmp_path}/r/{number}" for number in range(3)))
    store.mount()
    fill(tmp_path / "s0" / "filler")
    if mounted:
        store.status()  # which measures it
        with pytest.raises(OSError, match="No space left"):
            for number in range(100):
                (store.mountpoint / f"d{number}").mkdir()
                sync(store.mountpoint)
    else:
        store.umount()
    status = store.status()
    assert status["full"] == "The store is full: there is no room on the disk of the metadata."
    assert "the disk of the metadata" in status["summary"]
    assert status["bytes_free"] == 0
    (tmp_path / "s0" / "filler").unlink()


# --- commands that are refused, and commands that must not be


def test_a_read_only_mount_writes_nothing_whatever_is_asked(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    put(store, "file", 3)
    store.umount()
    nodes = [store.node(name) for name in ("us-east-1", "us-west-1", "eu-west-1")]
    before = fingerprint(*nodes, store.store / "metadata")
    store.mount("ro")
    for command in (
        ("repair", store.store, "us-east-1"),
        ("repair", store.store, "us-east-1", f"--to={store.store}/elsewhere"),
        ("scrub", store.store, "start", "--wait"),
        ("scrub", store.store, "resume"),
        ("node", "offline", store.store, "us-east-1"),
        ("node", "online", store.store, "us-east-1"),
        ("node", "drain", store.store, "us-east-1"),
        ("rebalance", store.store, "start"),
        ("quota", "set", store.mountpoint, "--bytes=1G"),
    ):
        done = store.cli(*command, check=False)
        assert (done.returncode, "read-only" in done.stderr) == (3, True), (command, done.stderr)
    store.cli("repair", store.store, "us-east-1", "--dry-run")
    store.cli("scrub", store.store, "status")
    assert states(store) == {"up"}
    assert is_whole(store, "file", 3)
    store.umount()
    assert fingerprint(*nodes, store.store / "metadata") == before


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.expects_log(GONE, OUT_OF_USE, TOO_FEW_NODES)
def test_a_lost_region_is_repaired_although_the_store_wants_a_spare_one(
    make_store: Callable[..., Store], mounted: bool
) -> None:
    store = make_store()
    config = store.store / CONFIG_NAME
    text = config.read_text()
    assert "spare_shards = 0" in text
    config.write_text(text.replace("spare_shards = 0", "spare_shards = 1"))
    store.mount()
    put(store, "file", 3)
    if not mounted:
        store.umount()
    shutil.rmtree(store.store / "us-west-1")
    if mounted:
        with pytest.raises(OSError, match=r"Input/output|Read-only"):
            put(store, "other", 3)
    else:
        refused = store.try_mount()
        assert refused.returncode == 3
        assert "spare_shards" in refused.stderr
        assert "fusestore repair" in refused.stderr
    store.cli("repair", store.store, "us-west-1")
    if not mounted:
        store.mount()
    assert store.status()["healthy"]
    put(store, "more", 1)
    shutil.rmtree(store.store / "us-east-1")
    assert is_whole(store, "file", 3)
    store.cli("repair", store.store, "us-east-1")


@pytest.mark.expects_log(r"Too few nodes are left to keep new data safe")
def test_nodes_that_are_offline_come_back_although_the_store_cannot_be_opened(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    put(store, "file", 3)
    for name in ("us-east-1", "us-west-1"):
        store.cli("node", "offline", store.store, name, "--force")
    store.cli("umount", store.mountpoint, check=False)  # it is read-only for want of nodes
    store.await_end()
    refused = store.try_mount()
    assert refused.returncode == 3
    assert "fusestore node online" in refused.stderr
    for name in ("us-east-1", "us-west-1"):
        store.cli("node", "online", store.store, name, check=False)
    store.mount()
    assert store.status()["healthy"]
    assert is_whole(store, "file", 3)


@pytest.mark.expects_log(GONE, OUT_OF_USE, AS_TOLD, r"cannot")
def test_a_place_that_does_not_answer_is_an_error_of_that_place(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    """A node lies on a network file system whose client has died: ENOTCONN for each stat."""
    carrier = make_store()
    carrier.mount()
    place = carrier.mountpoint / "node"
    store = make_store(
        f"--region=a={tmp_path}/a", f"--region=b={tmp_path}/b", f"--region=c={place}"
    )
    store.mount()
    put(store, "file", 3)
    carrier.kill(clear=False)
    put(store, "other", 3)
    for command in (
        ("repair", store.store, "c"),
        ("repair", store.store, "c", "--dry-run"),
        ("repair", store.store, "c", "--on-this-disk"),
        ("repair", store.store, "c", f"--to={carrier.mountpoint}/other"),
        ("node", "add", store.store, "d", "--region=a", f"--path={carrier.mountpoint}/new"),
    ):
        done = store.cli(*command, check=False)
        assert done.returncode in (2, 3), (command, done.stdout)
        assert "not connected" in done.stderr, (command, done.stderr)
        assert "bug" not in done.stderr + done.stdout
    assert is_whole(store, "other", 3)
    store.cli("repair", store.store, "c", f"--to={tmp_path}/c")
    assert store.status()["healthy"]
    carrier.clear_mount()
