"""`fusestore compact` on a mount: the nodes shrink, and every byte stays."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.mounted_store import FUSESTORE, REPOSITORY, Store, sync
from support.posixly import read_uncached

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

KIB, MIB = 1 << 10, 1 << 20


def littered(store: Store, count: int, size: int = 4096) -> dict[Path, bytes]:
    """Write files of 1 MB, with a small one after each; delete the large ones.  The small ones."""
    chance = random.Random(1)
    kept = {}
    for number in range(count):
        large = store.mountpoint / f"large{number}"
        large.write_bytes(chance.randbytes(1_000_000))
        small = store.mountpoint / f"small{number}"
        kept[small] = chance.randbytes(size)
        small.write_bytes(kept[small])
    sync(store.mountpoint)
    for number in range(count):
        (store.mountpoint / f"large{number}").unlink()
    sync(store.mountpoint)
    return kept


def shards_used(store: Store) -> int:
    """The bytes that the shards take on their disks."""
    places = [Path(node["path"]) / "shards" for node in store.status()["nodes"]]
    return sum(path.stat().st_blocks * 512 for place in places for path in place.iterdir())


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def cleaning(store: Store) -> dict[str, Any]:
    return dict(store.status()["cleaning"])


def check(store: Store, kept: dict[Path, bytes]) -> None:
    for path, data in kept.items():
        assert read_uncached(path) == data


def slow(store: Store, rate: float) -> None:
    """Let cleaning read and write so many MB/s."""
    file = store.store / "fusestore.toml"
    limits = f"waste_percent = 1000\nwaste_mib = 1000\nclean_rate = {rate}\n"
    file.write_text(limits + file.read_text())


def test_the_nodes_shrink_and_every_byte_stays(make_store: Callable[..., Store]) -> None:
    store = make_store()
    slow(store, 0)
    store.mount()
    kept = littered(store, 100)
    eventually(lambda: cleaning(store)["waste"] > 90 * MIB)  # the large files are removed
    before = shards_used(store)
    assert before > 140 * MIB
    result = json.loads(store.cli("compact", store.store, "--wait", "--json").stdout)
    assert (result["state"], result["problem"]) == ("done", "")
    assert result["waste"] < MIB
    assert result["freed"] > 85 * MIB
    assert 100 * 4096 <= result["moved"] < 4 * MIB
    assert shards_used(store) < 32 * MIB  # with what is allocated ahead
    found = cleaning(store)
    assert (found["state"], found["waits_for"]) == ("idle", "")
    assert found["freed"] >= result["freed"]
    check(store, kept)
    again = store.cli("compact", store.store, "--wait").stdout
    assert again.startswith("0 B given back, 0 B of files moved")
    store.remount()
    check(store, kept)
    store.umount()
    assert store.cli("fsck", store.store).returncode == 0
    assert shards_used(store) < 8 * MIB


def test_it_goes_on_in_the_daemon_and_ends_with_the_mount(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    slow(store, 0.001)
    store.mount()
    kept = littered(store, 50, 200 * KIB)  # several batches; the first is not delayed
    eventually(lambda: cleaning(store)["waste"] > 45 * MIB)
    started = store.cli("compact", store.store).stdout
    assert "of garbage has begun; 'fusestore status' shows whether it runs." in started
    assert cleaning(store)["state"] == "running"
    assert "cleaning:" in store.cli("status", store.store).stdout
    waits = subprocess.Popen(
        [*FUSESTORE, "compact", str(store.store), "--wait"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)
    assert waits.poll() is None
    store.umount()
    _, errors = waits.communicate(timeout=30)
    assert waits.returncode == 3
    assert errors == (
        "fusestore: The compaction was interrupted: the store was unmounted. "
        "Repeat the command when the store is mounted again.\n"
    )
    store.mount()
    assert cleaning(store)["state"] == "idle"
    check(store, kept)


def test_a_kill_at_any_moment_loses_nothing(make_store: Callable[..., Store]) -> None:
    store = make_store()
    slow(store, 0)
    store.mount()
    kept = littered(store, 100)
    for seconds in (0.0, 0.02, 0.05, 0.1, 0.2):
        eventually(lambda: cleaning(store)["waste"] is not None)
        store.cli("compact", store.store)
        time.sleep(seconds)
        store.kill()
        store.mount()
        check(store, kept)
    eventually(lambda: cleaning(store)["waste"] is not None)
    assert store.cli("compact", store.store, "--wait").returncode == 0
    assert cleaning(store)["waste"] < MIB
    check(store, kept)
    store.umount()
    assert store.cli("fsck", store.store).returncode == 0


def test_who_interrupts_the_command_does_not_end_it(make_store: Callable[..., Store]) -> None:
    store = make_store()
    slow(store, 0.001)
    store.mount()
    littered(store, 50, 200 * KIB)
    waits = subprocess.Popen(
        [*FUSESTORE, "compact", str(store.store), "--wait"],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    eventually(lambda: cleaning(store)["state"] == "running")
    waits.send_signal(signal.SIGINT)
    assert waits.wait(30) == 130
    assert cleaning(store)["state"] == "running"


def test_a_read_only_mount_is_refused(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    littered(store, 5)
    store.remount("ro")
    done = store.cli("compact", store.store, "--wait", check=False)
    assert done.returncode == 3
    assert done.stderr == (
        "fusestore: The store is mounted read-only: unmount it, or mount it without 'ro'.\n"
    )
    assert cleaning(store)["waste"] is None
    store.umount()
    done = store.cli("compact", store.store, check=False)
    assert done.returncode == 2
    assert "is not mounted: only a mounted store is cleaned." in done.stderr


def test_the_bound_of_the_file_is_kept_without_a_request(make_store: Callable[..., Store]) -> None:
    store = make_store()
    file = store.store / "fusestore.toml"
    file.write_text(f"waste_percent = 10\nwaste_mib = 8\n{file.read_text()}")
    store.mount()
    kept = littered(store, 40)
    assert 8 * MIB < cleaning(store)["bound"] < 9 * MIB
    eventually(lambda: cleaning(store)["freed"] > 20 * MIB)
    eventually(lambda: cleaning(store)["waste"] <= cleaning(store)["bound"])
    check(store, kept)
    assert os.listdir(store.mountpoint) == [path.name for path in kept]
