"""A mount whose nodes hold what others put there; the sentence that reports it."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.foreign_files import FILES, VICTIM, Outside, last, plant
from support.logs import (
    FOREIGN_FILES,
    IDENTITY_STAYS,
    JOURNAL_DAMAGED,
    NOT_WHERE_ITS_ROW_SAYS,
    OUT_OF_USE,
    RECOGNIZED,
    UNREAD_FILE,
)
from support.mounted_store import Store

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.expects_log(
        FOREIGN_FILES,
        UNREAD_FILE,
        OUT_OF_USE,
        JOURNAL_DAMAGED,
        NOT_WHERE_ITS_ROW_SAYS,
        RECOGNIZED,
        IDENTITY_STAYS,
    ),
]

SECONDS_MAX = 20
"""Of a mount; nothing may wait for a foreign file, or read it to its end."""


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    """Files that are not of the store."""
    return Outside(tmp_path / "outside")


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    """A store with files, not mounted."""
    store = make_store()
    store.mount()
    for name, data in FILES.items():
        (store.mountpoint / name).write_bytes(data)
    store.umount()
    return store


def is_in_use(store: Store) -> None:
    """The store mounts soon, reads, writes, and its other nodes are up."""
    began = time.monotonic()
    store.mount()
    assert time.monotonic() - began < SECONDS_MAX
    for name, data in FILES.items():
        assert (store.mountpoint / name).read_bytes() == data
    with (store.mountpoint / "new").open("wb") as file:
        file.write(VICTIM)
        file.flush()
        os.fsync(file.fileno())
    states = {found["name"]: found["state"] for found in store.status()["nodes"]}
    assert states["us-west-1"] == states["eu-west-1"] == "up"


def test_nothing_is_written_through_links(store: Store, outside: Outside) -> None:
    """A damaged shard is healed where it was; the owner of the disk has put a link there."""
    node = store.node("us-east-1")
    for path in (node / "shards").iterdir():
        plant("link to a file", [path], outside)
    is_in_use(store)
    store.cli("scrub", store.store, "start", "--wait", check=False)
    store.cli("repair", store.store, "us-east-1", check=False)
    assert outside.is_untouched()
    store.remount()
    assert (store.mountpoint / "new").read_bytes() == VICTIM
    store.umount()
    assert outside.is_untouched()


def test_a_copy_of_hard_links_stays_whole_and_does_not_hinder(store: Store) -> None:
    """As `cp --link` makes it, of all regions: the mount reads, writes, frees, heals."""
    regions = [store.node(name) for name in ("us-east-1", "us-west-1", "eu-west-1")]
    for region in regions:
        shutil.copytree(region, region.with_name(f"copy-{region.name}"), copy_function=os.link)
    copied = {path: path.read_bytes() for path in store.store.glob("copy-*/**/*") if path.is_file()}
    is_in_use(store)
    for name in sorted(FILES)[::2]:
        (store.mountpoint / name).unlink()
    store.remount()  # what was deleted is freed
    assert {path: path.read_bytes() for path in copied} == copied
    for path in (regions[0] / "shards").iterdir():
        if os.stat(path).st_nlink > 1:
            spoiled = bytearray(path.read_bytes())
            spoiled[200] ^= 1
            path.write_bytes(spoiled)
    copied = {path: path.read_bytes() for path in copied}
    store.cli("scrub", store.store, "start", "--wait", check=False)
    assert {found["state"] for found in store.status()["nodes"]} == {"up"}
    store.cli("scrub", store.store, "start", "--wait")
    assert store.status()["healthy"]
    for name in sorted(FILES)[1::2]:
        assert (store.mountpoint / name).read_bytes() == FILES[name]
    store.umount()
    assert {path: path.read_bytes() for path in copied} == copied


ODDITIES: dict[str, Callable[[Path], object]] = {
    "a segment of 10 TB": lambda node: os.truncate(last(node / "journal"), 10 << 40),
    "a number that is too great": lambda node: (node / "journal/4294967295.log").touch(),
    "a number of 10 digits": lambda node: (node / "journal/9999999999.log").touch(),
    "a shard segment that is far": lambda node: (node / "shards/4294967294.seg").touch(),
    "a fifo": lambda node: os.mkfifo(node / "journal/00000099.log"),
    "a long identity": lambda node: (node / "node.toml").write_text(
        "format = 1\n" + "".join(f"k{i} = 1\n" for i in range(22_000))
    ),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_oddity_in_one_region_stops_no_mount(store: Store, oddity: str) -> None:
    ODDITIES[oddity](store.node("us-east-1"))
    is_in_use(store)
    store.umount()


def test_fsck_lists_foreign_files_and_the_store_is_clean(store: Store) -> None:
    (store.node("us-east-1") / "shards/notes.txt").write_bytes(VICTIM)
    (store.node("us-east-1") / "shards/4294967294.seg").write_bytes(VICTIM)
    found = store.cli("fsck", store.store)
    assert "node us-east-1: 2 files in" in found.stdout
    assert "shards/notes.txt" in found.stdout
    assert "shards/4294967294.seg" in found.stdout
    assert (store.node("us-east-1") / "shards/4294967294.seg").read_bytes() == VICTIM


# --- the small files of the store itself ---------------------------------------

LINES = (
    r"WARNING .*metrics\.json cannot be used",
    r"WARNING .*the counts of operations cannot be written: Is a directory",
    r"WARNING .*The log .* cannot be opened",
)


def plant_small(file: Path, what: str, outside: Path) -> None:
    """Replace a file of the store."""
    file.unlink(missing_ok=True)
    if what == "huge":
        with file.open("wb") as opened:
            opened.truncate(10 << 40)
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "device":
        os.mknod(file, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    elif what == "directory":
        file.mkdir()
    elif what == "link":
        outside.write_bytes(b"theirs")
        file.symlink_to(outside)


KINDS = ("fifo", "device", "directory", "link")


@pytest.mark.expects_log(*LINES)
@pytest.mark.parametrize(
    ("name", "what"),
    [("metrics.json", "huge")]
    + [(name, what) for name in ("metrics.json", "fusestore.log") for what in KINDS],
)
def test_a_foreign_file_of_the_store_costs_only_what_it_is_for(
    store: Store, tmp_path: Path, name: str, what: str
) -> None:
    outside = tmp_path / "theirs"
    plant_small(store.store / name, what, outside)
    if name == "metrics.json":
        counted = store.cli("metrics", "summary", store.store)
        assert "0 operations" in counted.stdout
        assert "cannot be used, and the counts restart at zero" in counted.stderr
        assert "Traceback" not in counted.stderr
    is_in_use(store)
    assert not outside.exists() or outside.read_bytes() == b"theirs"
    if name == "fusestore.log":
        assert store.status()["log_file"] is None
        store.umount()
        (store.store / name).rmdir() if what == "directory" else (store.store / name).unlink()


@pytest.mark.parametrize(
    ("name", "what"),
    [("fusestore.toml", "huge")]
    + [(name, what) for name in ("fusestore.toml", "fusestore.lock") for what in KINDS],
)
def test_a_store_with_a_foreign_file_is_refused_at_once(
    store: Store, tmp_path: Path, name: str, what: str
) -> None:
    file, outside = store.store / name, tmp_path / "theirs"
    before = file.read_bytes()
    plant_small(file, what, outside)
    began = time.monotonic()
    refused = store.try_mount()
    assert refused.returncode in (2, 3)
    assert str(file) in refused.stderr
    assert "Traceback" not in refused.stderr
    store.cli("status", store.store, check=False)
    assert time.monotonic() - began < SECONDS_MAX
    assert not outside.exists() or outside.read_bytes() == b"theirs"
    file.rmdir() if what == "directory" else file.unlink()
    file.write_bytes(before)
    is_in_use(store)


def test_links_of_an_operator_are_followed(store: Store, tmp_path: Path) -> None:
    for name in ("fusestore.toml", "metadata"):
        (store.store / name).rename(tmp_path / name)
        (store.store / name).symlink_to(tmp_path / name)
    is_in_use(store)
    store.umount()
    assert (store.store / "fusestore.toml").is_symlink()
    assert (store.store / "metadata").is_symlink()
