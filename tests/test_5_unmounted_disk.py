"""The disk of a node is not mounted: the node is not rebuilt below its mount point by mistake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.loop_devices import Disks
from support.mounted_store import Store

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

MIB = 1 << 20
REGIONS = ("r0", "r1", "r2")
REFUSED = "the disk of node r1 is probably not mounted"


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
def store(disks: Disks, tmp_path: Path, log: object) -> Iterator[Store]:
    """A store of which the disk of r1 is not mounted."""
    regions = [f"--region={name}={disks.top / name / 'node'}" for name in REGIONS]
    store = Store(tmp_path / "s", *regions)
    store.mount()
    (store.mountpoint / "f").write_bytes(b"f" * MIB)
    store.umount()
    disks.detach_one("r1")
    yield store
    store.clean_up()


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_repair_refuses_and_the_node_returns_with_its_disk(
    store: Store, disks: Disks, mounted: bool, made: bool
) -> None:
    node = disks.top / "r1" / "node"
    if made:  # the empty directory below the mount point
        node.mkdir()
    if mounted:
        warned = store.cli("mount", store.store, store.mountpoint)
        assert "If its disk is not mounted, mount it." in warned.stderr
    for options in ([], ["--dry-run"]):
        refused = store.cli("repair", store.store, "r1", *options, check=False)
        assert refused.returncode == 2
        assert REFUSED in refused.stderr
    assert not (node / "node.toml").exists()
    if mounted:
        store.cli("umount", store.mountpoint)
    disks.attach("r1")
    store.mount()
    assert store.status()["healthy"]
    assert (store.mountpoint / "f").read_bytes() == b"f" * MIB


def test_it_is_rebuilt_there_when_asked_for(store: Store, disks: Disks) -> None:
    store.cli("repair", store.store, "r1", "--on-this-disk")
    assert (disks.top / "r1" / "node" / "node.toml").exists()
    store.mount()
    assert store.status()["healthy"]


def test_a_new_disk_is_filled_without_a_question(store: Store, disks: Disks) -> None:
    disks.make({"r1": 100 * MIB})
    store.cli("repair", store.store, "r1")
    store.mount()
    assert store.status()["healthy"]
