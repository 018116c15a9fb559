"""The metadata is moved away, or its disk fails: the journals have all, and unmounting says so."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.logs import CHECKPOINT_FAILED
from support.loop_devices import Disks
from support.mounted_store import Store, sync

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.not_plain,
    pytest.mark.expects_log(r"serve\.launch: The metadata in \S+ cannot be read or written: "),
]


def by_command(store: Store) -> None:
    done = store.cli("umount", store.mountpoint, check=False)
    store.await_end()
    assert done.returncode == 3
    assert "journals of its nodes hold everything that was written. " in done.stderr, done.stderr
    assert f"run 'fusestore recover {store.store}'" in done.stderr
    assert "kept in memory" not in done.stderr


def by_umount8(store: Store) -> None:
    subprocess.run(["fusermount3", "-u", store.mountpoint], check=True)
    store.await_end()


def by_signal(store: Store) -> None:
    store.end_by(signal.SIGTERM)


@pytest.mark.parametrize("way", [by_command, by_umount8, by_signal])
@pytest.mark.parametrize("returns", [False, True], ids=["lost", "moved"])
def test_the_journals_hold_everything(
    make_store: Callable[..., Store], way: Callable[[Store], None], returns: bool
) -> None:
    store = make_store()
    store.mount()
    chance = random.Random(3)
    files = {f"f{number}": chance.randbytes(200_000) for number in range(8)}
    metadata, aside = store.store / "metadata", store.store / "aside"
    for number, (name, data) in enumerate(files.items()):
        if number == 4:
            metadata.rename(aside)
        (store.mountpoint / name).write_bytes(data)
    way(store)
    if returns:
        aside.rename(metadata)
    else:
        store.cli("recover", store.store)
    store.mount()
    for name, data in files.items():
        assert (store.mountpoint / name).read_bytes() == data


@pytest.mark.expects_log(
    r"commit\.checkpoint: .* is kept in memory\. The checkpoint will be tried",
    r"The free space of the metadata is unknown",
)
def test_a_store_whose_checkpoints_had_failed_before(make_store: Callable[..., Store]) -> None:
    """While it is mounted, what is not written is in memory; when it is unmounted, no more."""
    store = make_store()
    store.mount()
    metadata, aside = store.store / "metadata", store.store / "aside"
    for name in ("a", "b"):
        (store.mountpoint / name).write_bytes(name.encode() * 100_000)
    metadata.rename(aside)
    # A checkpoint has to have the set of nodes before anything is acknowledged.
    store.cli("node", "offline", store.store, "us-east-1", check=False)
    problem = store.status()["metadata_error"]
    assert problem.endswith("What is not written yet is kept in memory."), problem
    (store.mountpoint / "b").unlink()
    done = store.cli("umount", store.mountpoint, check=False)
    store.await_end()
    assert done.returncode == 3
    assert "kept in memory" not in done.stderr
    assert "any later change is lost. " in done.stderr
    assert f"run 'fusestore recover {store.store}'" in done.stderr
    store.cli("recover", store.store)
    store.mount()
    for name in ("a", "b"):
        assert (store.mountpoint / name).read_bytes() == name.encode() * 100_000


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    disks = Disks(tmp_path)
    try:
        disks.make({"metadata": 100 << 20})
    except (OSError, FileNotFoundError):
        pytest.skip("no loop device here")
    yield disks
    disks.detach()


@pytest.mark.expects_log(CHECKPOINT_FAILED, "cannot be read or written", "read-only file system")
@pytest.mark.parametrize("ends", ["killed", "unmounted"])
def test_a_disk_of_the_metadata_that_fails_stops_neither_reads_nor_writes(
    make_store: Callable[..., Store], disks: Disks, ends: str
) -> None:
    store = make_store("--metadata", disks.top / "metadata" / "m")
    store.mount()
    chance, files = random.Random(5), {}
    until = time.monotonic() + 18
    for number in range(100_000):
        if number == 5:
            disks.turn_read_only("metadata")
        data = files[f"f{number}"] = chance.randbytes(200_000)
        path = store.mountpoint / f"f{number}"
        path.write_bytes(data)
        sync(path)
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    assert "kept in memory" in store.status()["metadata_error"]
    if ends == "killed":
        store.kill()
    else:
        by_command(store)
    disks.check("metadata")
    store.mount()
    for name, data in files.items():
        assert (store.mountpoint / name).read_bytes() == data
    (store.mountpoint / "after").write_bytes(b"after")
    store.remount()
    assert store.status()["healthy"]
    store.umount()  # before the disk goes
