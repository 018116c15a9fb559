"""A store on a medium that cannot be written to is mounted, checked and examined all the same."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.loop_devices import Disks
from support.mounted_store import Store, sync

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

MIB = 1 << 20


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    disks = Disks(tmp_path / "disks")
    disks.top.mkdir()
    try:
        disks.make({"store": 200 * MIB, "region": 100 * MIB})
    except OSError as error:
        disks.detach()
        pytest.skip(f"there are no loop devices: {error}")
    yield disks
    disks.detach()


def remount(disks: Disks, name: str, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disks.top / name], check=True)


@pytest.fixture(params=["all of it", "all but one region", "one region"])
def store(request: pytest.FixtureRequest, disks: Disks, log: object) -> Iterator[tuple[Store, str]]:
    """A store with a file, unmounted, and the part of it that is read-only."""
    regions = ["--region=a", "--region=b", f"--region=c={disks.top / 'region' / 'node'}"]
    store = Store(disks.top / "store", *regions)
    store.mount()
    (store.mountpoint / "f").write_bytes(b"f" * MIB)
    store.umount()
    wanted = {"all of it": ("store", "region"), "all but one region": ("store",)}
    names = wanted.get(request.param, ("region",))
    for name in names:
        remount(disks, name, "ro")
    yield store, request.param
    store.clean_up()
    for name in names:
        remount(disks, name, "rw")


def test_it_is_mounted_although_its_daemon_died(disks: Disks, log: object) -> None:
    """The socket of the daemon that died cannot be removed."""
    store = Store(disks.top / "store")
    store.mount()
    (store.mountpoint / "f").write_bytes(b"f" * MIB)
    sync(store.mountpoint)
    store.kill()
    remount(disks, "store", "ro")
    store.mount("ro")
    assert (store.mountpoint / "f").read_bytes() == b"f" * MIB
    assert store.status()["read_only"]
    store.umount()
    remount(disks, "store", "rw")
    store.clean_up()


def test_it_is_looked_at_and_mounted(store: tuple[Store, str]) -> None:
    one, what = store
    for command in (["status"], ["fsck"], ["risk"], ["drill", "--lose", "a"]):
        done = one.cli(*command, one.store, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    one.mount("ro")
    assert (one.mountpoint / "f").read_bytes() == b"f" * MIB
    status = one.status()
    assert status["mounted"] is True
    assert status["read_only"] is True
    assert one.cli("risk", one.store).returncode == 0
    assert one.cli("mount", one.store, one.mountpoint, "-o", "ro", check=False).returncode != 0
    one.umount()
    if what != "one region":
        refused = one.cli("mount", one.store, one.mountpoint, check=False)
        assert "is on a read-only file system: only a mount with -o ro" in refused.stderr


@pytest.mark.expects_log(r"members\.member: .* The node is read, but gets no data")
def test_a_region_on_a_read_only_medium_is_read(
    disks: Disks, make_store: Callable[..., Store]
) -> None:
    regions = ["--region=a", "--region=b", f"--region=c={disks.top / 'region' / 'node'}"]
    store = make_store(*regions)
    store.mount()
    (store.mountpoint / "f").write_bytes(b"f" * MIB)
    store.umount()
    remount(disks, "region", "ro")
    store.mount()
    assert {node["name"]: node["state"] for node in store.status()["nodes"]}["c"] == "behind"
    (store.store / "a").rename(store.store / "away")
    assert (store.mountpoint / "f").read_bytes() == b"f" * MIB
    (store.store / "away").rename(store.store / "a")
    (store.mountpoint / "g").write_bytes(b"g" * MIB)
    store.umount()
    remount(disks, "region", "rw")
    store.mount()
    assert (store.mountpoint / "g").read_bytes() == b"g" * MIB
