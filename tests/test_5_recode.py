"""Recoding on a mount: files in use get another code, and no byte is lost, killed or not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.mounted_store import FUSESTORE, REPOSITORY, Store
from support.posixly import read_uncached

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

KIB, MIB = 1 << 10, 1 << 20
assert sys.executable


def make_tree(top: Path, files: int, size_max: int) -> dict[Path, str]:
    """Random files in some directories; the checksum of each."""
    chance = random.Random(4)
    sums = {}
    for number in range(files):
        path = top / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = chance.randbytes(chance.randrange(size_max))
        path.write_bytes(data)
        sums[path] = hashlib.sha256(data).hexdigest()
    return sums


def checksum(path: Path) -> str:
    return hashlib.sha256(read_uncached(path)).hexdigest()


def codes(store: Store, path: Path) -> set[str]:
    """The codes of the stripes of a file; what is in memory has none yet."""
    layout = json.loads(store.cli("inspect", path, "--json").stdout)
    return {stripe["code"] for stripe in layout["stripes"].values() if "code" in stripe}


def recode_state(store: Store) -> dict[str, Any]:
    return dict(store.status()["recode"])


def test_a_tree_is_recoded_while_it_is_read_and_written(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    top = store.mountpoint / "top"
    sums = make_tree(top, 60, 3 * MIB)
    steady = list(sums)[10:]
    busy = list(sums)[:10]
    model = {path: bytearray(path.read_bytes()) for path in busy}
    before = {path: path.stat() for path in steady}
    store.cli("policy", "set", top, "4+2")
    over = threading.Event()
    problems: list[str] = []

    def write() -> None:
        chance = random.Random(9)
        while not over.is_set():
            path = chance.choice(busy)
            data, new = model[path], chance.randbytes(chance.randrange(1, 60_000))
            at = chance.randrange(len(data) + 1)
            with path.open("r+b", buffering=0) as file:
                file.seek(at)
                file.write(new)
                data.extend(bytes(max(0, at + len(new) - len(data))))
                data[at : at + len(new)] = new
                if chance.random() < 0.1:
                    size = chance.randrange(len(data))
                    file.truncate(size)
                    del data[size:]
                if chance.random() < 0.1:
                    os.fsync(file.fileno())

    def read() -> None:
        chance = random.Random(10)
        while not over.is_set():
            path = chance.choice(steady)
            if checksum(path) != sums[path]:
                problems.append(f"{path} read wrong bytes")

    with (top / "unlinked").open("w+b") as unlinked:
        unlinked.write(bytes(range(256)) * 8000)
        unlinked.flush()
        (top / "unlinked").unlink()
        threads = [threading.Thread(target=body) for body in (write, read, read)]
        for thread in threads:
            thread.start()
        done = store.cli("recode", top, "--rate", "60", "--json")
        over.set()
        for thread in threads:
            thread.join()
        unlinked.seek(0)
        assert unlinked.read() == bytes(range(256)) * 8000
    result = json.loads(done.stdout)
    assert (result["state"], result["unreadable"], result["files"]) == ("done", 0, 60)
    assert problems == []
    store.remount()
    for path in steady:
        assert checksum(path) == sums[path]
        now = path.stat()
        assert (now.st_mtime_ns, now.st_ctime_ns) == (
            before[path].st_mtime_ns,
            before[path].st_ctime_ns,
        )
    for path, data in model.items():
        assert read_uncached(path) == data
    for path in [*busy, *steady[:5]]:
        assert codes(store, path) <= {"4+2"}
    store.umount()
    assert store.cli("fsck", store.store).returncode == 0


def test_a_kill_in_the_middle_loses_nothing_and_it_goes_on(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    top = store.mountpoint / "top"
    sums = make_tree(top, 60, MIB)
    fd = os.open(top, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    store.cli("recode", top, "--to", "4+2", "--rate", "20", "--background")
    for part in (0.2, 0.5):
        while recode_state(store)["size"] < part * sum(path.stat().st_size for path in sums):
            assert recode_state(store)["state"] == "running"
        store.kill()
        store.mount()
        for path, wanted in random.Random(1).sample(sorted(sums.items()), 20):
            assert checksum(path) == wanted
        state = recode_state(store)
        assert (state["state"], state["path"], state["to"]) == ("running", "/top", "4+2")
    left = subprocess.run(
        [*FUSESTORE, "recode", str(top)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert left.returncode == 2
    assert "is being recoded: wait for it, or stop it with --stop" in left.stderr
    while recode_state(store)["state"] == "running":
        pass
    assert recode_state(store)["state"] == "done"
    again = json.loads(store.cli("recode", top, "--to", "4+2", "--json").stdout)
    assert (again["state"], again["recoded"]) == ("done", 0)
    store.remount()
    for path, wanted in sums.items():
        assert checksum(path) == wanted
    for path in random.Random(2).sample(sorted(sums), 10):
        assert codes(store, path) <= {"4+2"}
    store.umount()
    assert store.cli("fsck", store.store).returncode == 0


def test_status_shows_how_far_it_is_and_stop_ends_it(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    top = store.mountpoint / "top"
    sums = make_tree(top, 20, 2 * MIB)
    assert "done" in store.cli("recode", top, "--to", "1+2").stdout
    store.cli("recode", top, "--rate", "3", "--background")
    assert (
        "recoding:     /top to the policy of each directory"
        in store.cli("status", store.store).stdout
    )
    assert "stopped" in store.cli("recode", top, "--stop").stdout
    for wrong in (["--stop"], ["--to", "two"], ["--to", "5+1"]):
        assert store.cli("recode", top, *wrong, check=False).returncode == 2
    for path, wanted in sums.items():
        assert checksum(path) == wanted


def test_policies_say_what_holds(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    top = store.mountpoint / "top"
    (top / "inner").mkdir(parents=True)
    said = store.cli("policy", "get", top / "inner").stdout
    assert said.startswith(f"{top / 'inner'}: 2+1, the default of the store; survives the loss of")
    store.cli("policy", "set", top, "4+2")
    said = store.cli("policy", "get", top / "inner").stdout
    assert f"4+2, set on {top}; survives the loss of any 1 of 3 regions, and of any 2" in said
    assert json.loads(store.cli("policy", "get", top, "--json").stdout)["set_on"] == "/top"
    refused = store.cli("policy", "set", top, "5+1", check=False)
    assert refused.returncode == 2
    assert "the loss of a region would lose data" in refused.stderr
    (top / "file").touch()
    assert store.cli("policy", "set", top / "file", "4+2", check=False).returncode == 2
    store.cli("policy", "clear", top)
    assert "2+1, the default of the store" in store.cli("policy", "get", top).stdout


def overwrite_at_random(path: Path, size: int, piece: int) -> str:
    """Overwrite all of a file in pieces, in random order; return the checksum of its bytes."""
    chance = random.Random(8)
    data = bytearray(chance.randbytes(size))
    offsets = list(range(0, size, piece))
    chance.shuffle(offsets)
    with path.open("r+b", buffering=0) as file:
        for number, at in enumerate(offsets):
            os.pwrite(file.fileno(), data[at : at + piece], at)
            if number % 200 == 0:
                os.fsync(file.fileno())
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def extents_of(path: Path) -> int:
    """How many extents a file has."""
    count, at = 0, ""
    while True:
        layout = json.loads(os.getxattr(path, f"user.fusestore.layout{at}"))
        count += len(layout["extents"])
        if layout.get("next") is None:
            return count
        at = f".{layout['next']}"


def test_a_file_is_defragmented_and_a_kill_does_not_hurt(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    top = store.mountpoint / "top"
    sums = make_tree(top, 20, 2 * MIB)
    image = top / "image"
    image.write_bytes(bytes(24 * MIB))
    sums[image] = overwrite_at_random(image, 24 * MIB, 8 * KIB)
    whole = image.stat()
    assert extents_of(image) > 2500
    store.cli("recode", top, "--defragment", "--rate", "4", "--background")
    status = store.cli("status", store.store).stdout
    assert "defragmenting: /top, defragmented: " in " ".join(status.split())
    while recode_state(store)["recoded"] < 4 * MIB:
        assert recode_state(store)["state"] == "running"
    store.kill()
    store.mount()
    assert checksum(image) == sums[image]
    assert (recode_state(store)["state"], recode_state(store)["defragment"]) == ("running", True)
    assert "stopped" in store.cli("recode", top, "--stop").stdout
    result = json.loads(store.cli("recode", top, "--defragment", "--json").stdout)
    assert (result["state"], result["files"], result["unreadable"]) == ("done", 21, 0)
    assert 0 < result["recoded"] < 24 * MIB
    assert extents_of(image) <= 48
    again = store.cli("recode", top, "--defragment").stdout
    assert again == "/top, defragmented: 0 B rewritten, 21 files looked at; done.\n"
    assert (image.stat().st_mtime_ns, image.stat().st_blocks) == (
        whole.st_mtime_ns,
        whole.st_blocks,
    )
    assert codes(store, image) <= {"2+1"}
    store.remount()
    for path, wanted in sums.items():
        assert checksum(path) == wanted
    store.umount()
    assert store.cli("fsck", store.store).returncode == 0
