"""The metadata is moved away while the store is mounted: unmounting says what is true then."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable

import pytest

from support.mounted_store import Store

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


@pytest.mark.expects_log(r"commit\.checkpoint: .* is kept in memory\. The checkpoint will be tried")
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
