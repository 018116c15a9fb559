"""Rot under a mount: bad sectors and flipped bits in the files of two regions at a time.

What a user and an operator see is right: every byte, the exit statuses, and that all data is
safe.  The daemon runs with support/bad_sectors.c; a failure prints the damage, and
`--model-seed` repeats it.  test_3_rot_campaign does the same in process, and much more of it.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from support.logs import CORRUPT, DISAGREE, MENDED, SCRUBBED, UNREAD_FILE
from support.mounted_store import Store
from support.opened_store import REGIONS

pytestmark = pytest.mark.not_plain

FILES = {f"f{i}": random.Random(i).randbytes(40_000 + 170_000 * i) for i in range(8)}
SECTOR_BYTES = 4096


class BadDisk:
    """The bad places on the disks below a store."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library = place / "bad_sectors.so"
        source = Path(__file__).parent / "support" / "bad_sectors.c"
        command = ["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
        subprocess.run(command, check=True)
        self._kept: list[BinaryIO] = []
        self.list = place / "bad"
        self.list.write_text("")
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("BAD_SECTORS", str(self.list))

    def __enter__(self) -> BadDisk:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._kept:
            file.close()

    def add(self, path: Path, start: int, end: int) -> None:
        """Let start <= i < end of a file be unreadable, until it is written anew."""
        self._kept.append(path.open("rb"))  # else another file may get the inode's number
        about = path.stat()
        with self.list.open("a") as file:
            print(about.st_dev, about.st_ino, start, end, file=file)


def segments(store: Store, region: str) -> list[Path]:
    found = [
        p for folder in ("journal", "shards") for p in (store.store / region / folder).iterdir()
    ]
    return [path for path in sorted(found) if path.stat().st_size]


def spoil(store: Store, disk: BadDisk, region: str, chance: random.Random) -> str:
    """Damage a place in a segment of a region, by a bad sector or a flipped bit."""
    path = chance.choice(segments(store, region))
    size = len(path.read_bytes().rstrip(b"\0"))
    at = chance.randrange(size)
    if chance.random() < 0.5:
        start = at // SECTOR_BYTES * SECTOR_BYTES
        disk.add(path, start, start + SECTOR_BYTES)
        return f"{path} cannot be read at {start}"
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return f"a bit of {path} is flipped at {at}"


def reads_right(store: Store) -> None:
    for name, data in FILES.items():
        assert (store.mountpoint / name).read_bytes() == data, name


def is_safe(store: Store) -> None:
    done = store.cli("status", store.store, check=False)
    assert done.returncode == 0, done.stdout
    assert "All data is safe" in done.stdout


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadDisk]:
    with BadDisk(tmp_path, monkeypatch) as disk:
        yield disk


@pytest.mark.parametrize("then", ["scrub", "repair", "recover", "fsck"])
@pytest.mark.expects_log(UNREAD_FILE, CORRUPT, DISAGREE, SCRUBBED, MENDED)
def test_two_regions_rot(
    make_store: Callable[..., Store],
    disk: BadDisk,
    request: pytest.FixtureRequest,
    then: str,
) -> None:
    store = make_store()
    store.mount()
    for name, data in FILES.items():
        (store.mountpoint / name).write_bytes(data)
    store.remount()
    chance = random.Random(f"{request.config.getoption('--model-seed')} {then}")
    if then in ("recover", "fsck"):
        store.umount()
    pair = chance.sample(REGIONS, 2)
    damage = [spoil(store, disk, region, chance) for region in pair]
    print(damage)
    if then == "recover":
        shutil.rmtree(store.store / "metadata")
        store.cli("recover", store.store)
    if then == "fsck":
        assert "Clean" in store.cli("fsck", store.store).stdout
        assert "Clean" in store.cli("fsck", store.store, "--repair").stdout
    if then in ("recover", "fsck"):
        store.mount()
    reads_right(store)
    if then == "repair":
        for region in pair:
            store.cli("repair", store.store, region)
    found = store.cli("scrub", store.store, "start", "--wait", check=False)
    assert found.returncode in (0, 1), found.stderr
    again = store.cli("scrub", store.store, "start", "--wait", check=False)
    assert (again.returncode, "nothing found" in again.stdout) == (0, True), again.stdout
    is_safe(store)
    store.umount()
    lost = store.store / chance.choice(REGIONS)
    shutil.rmtree(lost)
    store.mount("ro")
    reads_right(store)
