"""One owner, on real mounts: copies of a store, and locks that somebody removed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.mounted_store import FUSESTORE, Store

pytestmark = pytest.mark.mounted

ROUNDS = 12


@pytest.fixture
def shared(make_store: Callable[..., Store], tmp_path: Path) -> Store:
    """A mounted store whose regions lie beside it."""
    (tmp_path / "regions").mkdir()
    regions = [f"--region={name}={tmp_path / 'regions' / name}" for name in ("a", "b", "c")]
    store = make_store(*regions)
    store.mount()
    return store


def fusestore(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*FUSESTORE, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def written(place: Path, name: str, data: bytes) -> None:
    """Write a file, and return when it is durable."""
    with (place / name).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def refused(store: Path, mountpoint: Path, *options: str) -> None:
    done = fusestore("mount", store, mountpoint, *options)
    assert done.returncode != 0
    assert "in use by process" in done.stderr, done.stderr
    assert not os.path.ismount(mountpoint)


def test_a_copy_of_the_store_is_not_mounted_beside_it(shared: Store, tmp_path: Path) -> None:
    written(shared.mountpoint, "one", b"1" * 300_000)
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(shared.store, copy, ignore=shutil.ignore_patterns("*.sock"))
    other.mkdir()
    refused(copy, other)
    refused(copy, other, "-o", "ro")
    refused(copy, other, "-o", "accept_loss")
    for command in (("fsck", copy, "--repair"), ("repair", copy, "a"), ("scrub", copy, "start")):
        done = fusestore(*command)
        assert done.returncode != 0
        assert "in use by process" in done.stderr, command
    written(shared.mountpoint, "two", b"2" * 300_000)
    shared.umount()
    assert fusestore("mount", copy, other).returncode == 0
    try:
        assert (other / "one").read_bytes() == b"1" * 300_000
        assert (other / "two").read_bytes() == b"2" * 300_000
    finally:
        assert fusestore("umount", other).returncode == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_files_that_were_removed_let_nobody_in(
    shared: Store, tmp_path: Path, stopped: bool
) -> None:
    """The lock file and the socket are gone; the daemon goes on, or was stopped for a while."""
    written(shared.mountpoint, "one", b"1" * 300_000)
    daemon = int((shared.store / "fusestore.lock").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for name in ("fusestore.lock", "control.sock"):
        (shared.store / name).unlink()
    if stopped:
        os.kill(daemon, signal.SIGSTOP)
    try:
        refused(shared.store, other)
        done = fusestore("fsck", shared.store, "--repair")
        assert done.returncode != 0
        assert "in use by process" in done.stderr
    finally:
        if stopped:
            os.kill(daemon, signal.SIGCONT)
    written(shared.mountpoint, "two", b"2" * 300_000)
    os.kill(daemon, signal.SIGTERM)
    end = time.monotonic() + 30
    while os.path.ismount(shared.mountpoint) and time.monotonic() < end:
        time.sleep(0.05)
    while Path(f"/proc/{daemon}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    shared.mount()
    assert (shared.mountpoint / "one").read_bytes() == b"1" * 300_000
    assert (shared.mountpoint / "two").read_bytes() == b"2" * 300_000


def test_two_copies_take_turns_and_lose_nothing(
    shared: Store, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Who is killed gives way; what either acknowledged is read by the next."""
    seed = pytestconfig.getoption("--model-seed")
    print("seed", seed)
    chance = random.Random(seed)
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(shared.store, copy, ignore=shutil.ignore_patterns("*.sock"))
    other.mkdir()
    sides = [(shared.store, shared.mountpoint), (copy, other)]
    shared.umount()
    acknowledged: dict[str, bytes] = {}
    for number in range(ROUNDS):
        (mine, place), (theirs, elsewhere) = chance.sample(sides, 2)
        assert fusestore("mount", mine, place).returncode == 0
        for name, data in acknowledged.items():
            assert (place / name).read_bytes() == data, (number, name)
        data = chance.randbytes(chance.choice((100, 70_000, 1_500_000)))
        written(place, f"f{number}", data)
        acknowledged[f"f{number}"] = data
        refused(theirs, elsewhere)
        daemon = int((mine / "fusestore.lock").read_text())
        if chance.random() < 0.5:
            os.kill(daemon, signal.SIGKILL)
            subprocess.run(["fusermount3", "-uz", place], check=True)
            while Path(f"/proc/{daemon}").exists():
                time.sleep(0.02)
        else:
            assert fusestore("umount", place).returncode == 0


@pytest.mark.expects_log(r"/owner\b.* It is written anew", r"/owner\b.* cannot be read")
def test_a_damaged_record_of_the_owner_costs_nothing(shared: Store, tmp_path: Path) -> None:
    """A bit flips while the store is mounted, then in another record at rest."""
    regions = tmp_path / "regions"

    def flip(name: str, key: bytes) -> None:
        place = regions / name / "owner"
        data = bytearray(place.read_bytes())
        data[data.index(key) + len(key) + 5] ^= 1
        with place.open("r+b", buffering=0) as file:
            file.write(data)

    def healthy() -> bool:
        done = fusestore("status", shared.store)
        return done.returncode == 0 and "All data is safe" in done.stdout

    written(shared.mountpoint, "one", b"1" * 300_000)
    for name in ("a", "b", "c"):
        for key in (b"machine", b"mount", b"ended"):
            flip(name, key)
            written(shared.mountpoint, f"{name}-{key.decode()}", b"2" * 400_000)
            assert healthy()
    assert fusestore("repair", shared.store, "b").returncode == 0
    shared.umount()
    flip("b", b"mount")
    (regions / "c" / "owner").write_bytes(b"")
    assert healthy()
    shared.mount()
    assert healthy()
    assert (shared.mountpoint / "a-mount").read_bytes() == b"2" * 400_000
    assert fusestore("repair", shared.store, "c").returncode == 0
    shared.umount()
    assert fusestore("fsck", shared.store).returncode == 0


@pytest.mark.expects_log(r"/node\.toml.* The records beside it are those of node \w, and are used")
@pytest.mark.parametrize("nodes", ["ab", "abc"])
def test_damaged_identities_cost_nothing(shared: Store, tmp_path: Path, nodes: str) -> None:
    """`status`, `fsck`, a mount and `recover` know the nodes by their records."""
    files = {name: name.encode() * 200_000 for name in ("one", "two")}
    for name, data in files.items():
        written(shared.mountpoint, name, data)
    shared.umount()

    def damage() -> None:
        for name in nodes:
            place = tmp_path / "regions" / name / "node.toml"
            data = bytearray(place.read_bytes())
            data[65] ^= 1
            place.write_bytes(data)

    damage()
    done = fusestore("status", shared.store)
    assert done.returncode == 0, done.stderr
    assert "All data is safe" in done.stdout
    assert fusestore("fsck", shared.store).returncode == 0
    shared.mount()
    assert {node["state"] for node in shared.status()["nodes"]} == {"up"}
    shared.umount()
    damage()
    shutil.rmtree(shared.store / "metadata")
    done = fusestore("recover", shared.store)
    assert done.returncode == 0, done.stderr
    assert "of 3 of 3 nodes" in done.stdout
    shared.mount()
    for name, data in files.items():
        assert (shared.mountpoint / name).read_bytes() == data
    assert shared.status()["healthy"]
