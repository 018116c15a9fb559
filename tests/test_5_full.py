"""Full devices: by the store, by other programs, and out of inodes; nothing breaks, all goes on."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusestore.limits import XATTR_BYTES_MAX, XATTRS_BYTES_MAX
from support.disks import Disks, fill, free
from support.logs import LOST_STRIPE, OUT_OF_USE, TOO_FEW_NODES
from support.mounted_store import Store, sync

pytestmark = pytest.mark.mounted

MIB = 1 << 20
WAITS = (r"log\.log: .* What was accepted waits for room", r"log\.log: There is room again")
BLOCK = random.Random(1).randbytes(MIB)


@pytest.fixture
def on_disks(
    disks: Disks, make_store: Callable[..., Store]
) -> Callable[..., tuple[Store, list[Path]]]:
    """A function that mounts a store of three nodes, on as many devices as paths are given."""

    def make(*places: Path, code: str = "2+1") -> tuple[Store, list[Path]]:
        options: list[str] = ["--code", code]
        for number in range(3):
            options += ["--region", f"r{number}={places[number % len(places)] / f'n{number}'}"]
        store = make_store(*options)
        store.mount()
        return store, list(places)

    return make


def write_until_full(path: Path, size: int = MIB) -> int:
    """Write a file until ENOSPC; bytes written."""
    total = 0
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            total += file.write(BLOCK[:size])
    return total


def put(path: Path, data: bytes) -> None:
    """Write a file and fsync it."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), MIB):
            file.write(data[start : start + MIB])
        os.fsync(file.fileno())


def is_well(store: Store) -> None:
    status = store.status()
    assert not status["read_only"], status["error"]
    assert [node["state"] for node in status["nodes"]] == ["up"] * 3


# --- one region filled by others ----------------------------------------------


@pytest.mark.parametrize("what", ["bytes", "inodes"])
@pytest.mark.expects_log(
    *WAITS, LOST_STRIPE, r"What is written has fewer shards", r"has no room for the shards"
)
def test_a_commit_with_fewer_shards_is_no_success(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]], what: str
) -> None:
    """What an fsync covered bears the loss of any region, whoever has filled another one's disk."""
    made = [disks.tmpfs(f"d{i}", 250, inodes=500) for i in range(3)]
    store, places = on_disks(*made)
    put(store.mountpoint / "before", BLOCK)
    time.sleep(8)
    if what == "bytes":
        fill(places[0] / "junk")
    else:
        (places[0] / "junk").mkdir()
        with contextlib.suppress(OSError):
            for number in itertools.count():
                (places[0] / "junk" / str(number)).touch()
    acknowledged, errors = dict[int, bytes](), set()
    for number in range(40):
        data = BLOCK * (20 if number < 2 else 1)  # room is measured at commits only
        try:
            put(store.mountpoint / f"f{number}", data)
            acknowledged[number] = data
        except OSError as error:
            errors.add(error.errno)
    assert errors == {errno.ENOSPC}
    store.umount()
    shutil.rmtree(places[1] / "n1")
    store.mount()
    for number, data in acknowledged.items():
        assert (store.mountpoint / f"f{number}").read_bytes() == data


# --- filled by the store -----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mib", "count", "code", "policy", "size"),
    [
        ("tmpfs", 300, 1, "2+1", "", MIB),
        ("ext4", 330, 1, "2+1", "", MIB),
        ("ext4", 290, 1, "2+1", "", 64 << 10),
        ("tmpfs", 260, 1, "1+2", "", MIB),
        ("tmpfs", 300, 1, "2+1", "1+2", MIB),
        ("tmpfs", 200, 3, "2+1", "1+63", MIB),
        ("tmpfs", 120, 3, "2+1", "4+2", 20_000),
        ("tmpfs", 250, 2, "1+2", "", MIB),
    ],
)
def test_a_store_that_is_filled_keeps_its_reserve_and_can_be_emptied(
    disks: Disks,
    on_disks: Callable[..., tuple[Store, list[Path]]],
    kind: str,
    mib: int,
    count: int,
    code: str,
    policy: str,
    size: int,
) -> None:
    make = disks.tmpfs if kind == "tmpfs" else disks.ext4
    store, places = on_disks(*(make(f"d{i}", mib) for i in range(count)), code=code)
    top = store.mountpoint / "top"
    top.mkdir()
    if policy:
        os.setxattr(top, "user.fusestore.code", policy.encode())
    put(store.mountpoint / "important", BLOCK)
    written = write_until_full(top / "big", size)
    assert written > 3 * MIB
    sync(top / "big")
    assert min(map(free, places)) >= 20 * MIB
    is_well(store)
    assert os.statvfs(store.mountpoint).f_bavail * 4096 < 32 * MIB
    store.remount()
    assert min(map(free, places)) >= 20 * MIB
    assert (top / "big").stat().st_size == written
    assert (store.mountpoint / "important").read_bytes() == BLOCK
    (top / "big").unlink()
    put(store.mountpoint / "other", BLOCK)  # at once
    is_well(store)


def test_with_writeback_an_fsync_says_what_a_full_store_did_not_take(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]]
) -> None:
    store, _ = on_disks(*(disks.tmpfs(f"d{i}", 130) for i in range(3)))
    store.remount("writeback")
    failed, kept = set[int](), dict[Path, bytes]()
    for number in range(60):
        path, data = store.mountpoint / f"f{number}", BLOCK * 4
        try:
            put(path, data)
            kept[path] = data
        except OSError as error:
            failed.add(error.errno)
    assert failed == {errno.ENOSPC}
    is_well(store)
    store.remount()
    for path, data in kept.items():
        assert path.read_bytes() == data
        path.unlink()
    put(store.mountpoint / "other", BLOCK)
    is_well(store)


@pytest.mark.parametrize("how", ["delete", "truncate", "overwrite", "close", "rename"])
def test_what_was_freed_makes_room_at_once(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]], how: str
) -> None:
    store, _ = on_disks(*(disks.tmpfs(f"d{i}", 130) for i in range(3)))
    old, new = store.mountpoint / "old", store.mountpoint / "new"
    put(old, BLOCK * 30)
    (store.mountpoint / "empty").touch()
    write_until_full(store.mountpoint / "rest")
    sync(store.mountpoint / "rest")
    time.sleep(0.5)
    write_until_full(store.mountpoint / "rest2", 4096)
    if how == "delete":
        old.unlink()
    elif how == "truncate":
        os.truncate(old, 0)
    elif how == "overwrite":
        new = old
    elif how == "rename":
        os.rename(store.mountpoint / "empty", old)
    else:
        with old.open("rb"):
            old.unlink()
    with new.open("wb", buffering=0) as file:
        for _ in range(20):
            assert file.write(BLOCK) == MIB
        os.fsync(file.fileno())
    assert new.read_bytes() == BLOCK * 20


# --- filled by others --------------------------------------------------------


@pytest.mark.expects_log(*WAITS, r"cannot write journal/.*: No space left .* now out of use")
@pytest.mark.parametrize(("kind", "count"), [("tmpfs", 1), ("ext4", 1), ("tmpfs", 3)])
def test_files_are_deleted_while_others_have_filled_the_devices(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]], kind: str, count: int
) -> None:
    make = disks.tmpfs if kind == "tmpfs" else disks.ext4
    store, places = on_disks(*(make(f"d{i}", 200) for i in range(count)))
    top = store.mountpoint / "top"
    top.mkdir()
    for number in range(3000):
        (top / f"file-with-a-rather-long-name-{number}").write_bytes(b"x" * 100)
    sync(top)
    for place in places:
        fill(place / "filler")
    shutil.rmtree(top)
    sync(store.mountpoint)
    store.kill()
    store.mount()
    assert not top.exists()
    with pytest.raises(OSError, match="No space left"):
        put(store.mountpoint / "more", BLOCK * 8)
    is_well(store)
    for place in places:
        (place / "filler").unlink()
    put(store.mountpoint / "after", BLOCK)
    is_well(store)


@pytest.mark.expects_log(*WAITS)
def test_what_was_accepted_waits_while_others_have_taken_its_room(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]]
) -> None:
    place = disks.tmpfs("d", 300)
    store, _ = on_disks(place)
    first, second = store.mountpoint / "first", store.mountpoint / "second"
    put(first, BLOCK)
    total = 0
    with second.open("wb", buffering=0) as file:
        fill(place / "filler")
        with pytest.raises(OSError, match="No space left"):
            while True:
                total += file.write(BLOCK)
        with pytest.raises(OSError, match="No space left"):
            os.fsync(file.fileno())
        assert first.read_bytes() == BLOCK
        first.unlink()
        assert not store.status()["read_only"]
        (place / "filler").unlink()
        os.fsync(file.fileno())
        put(store.mountpoint / "third", BLOCK)
    is_well(store)
    store.kill()
    store.mount()
    assert second.read_bytes() == BLOCK * (total // MIB)
    assert not first.exists()


@pytest.mark.expects_log(*WAITS)
def test_a_device_without_inodes_counts_as_full(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]]
) -> None:
    place = disks.tmpfs("d", 600, inodes=200)
    store, _ = on_disks(place)
    top = store.mountpoint / "top"
    top.mkdir()
    for number in range(100):
        (top / f"{number}").write_bytes(BLOCK[:1000])
    sync(top)
    made = []
    with pytest.raises(OSError, match="No space left"):
        for number in range(1000):
            made.append(place / f"filler{number}")
            made[-1].touch()
    with pytest.raises(OSError, match="No space left"):
        put(store.mountpoint / "more", BLOCK * 200)
    shutil.rmtree(top)
    sync(store.mountpoint)
    is_well(store)
    for path in made[:-1]:
        path.unlink()
    put(store.mountpoint / "after", BLOCK)
    is_well(store)


@pytest.mark.parametrize("what", ["bytes", "inodes"])
@pytest.mark.expects_log(*WAITS, r"checkpoint will be tried again", r"cannot")
def test_the_own_disk_of_the_store_is_full(
    disks: Disks, tmp_path: Path, log: object, what: str
) -> None:
    """Its files change in place: it is mounted, checked and emptied all the same."""
    place = disks.tmpfs("own", 120, inodes=300)
    regions = [f"--region=r{i}={disks.tmpfs(f'd{i}', 200) / 'n'}" for i in range(3)]
    store = Store(place / "store", *regions)
    try:
        store.mount()
        for number in range(50):
            put(store.mountpoint / f"f{number}", BLOCK[: 10_000 + number])
        store.umount()
        if what == "bytes":
            fill(place / "filler")
        with contextlib.suppress(OSError):
            for number in range(0 if what == "bytes" else 1000):
                (place / f"filler{number}").touch()
        for command in (["status"], ["risk"], ["fsck"]):
            done = store.cli(*command, store.store, check=False)
            assert "damaged" not in done.stdout + done.stderr
            assert "recover" not in done.stdout + done.stderr
        for options in ("ro", ""):
            store.mount(*filter(None, [options]))
            for number in range(50):
                data = (store.mountpoint / f"f{number}").read_bytes()
                assert data == BLOCK[: 10_000 + number]
            if options != "ro":
                for number in range(40):
                    (store.mountpoint / f"f{number}").unlink()
                sync(store.mountpoint)
            store.umount()
        for path in place.glob("filler*"):
            path.unlink()
        store.mount()
        assert sorted(os.listdir(store.mountpoint)) == [f"f{number}" for number in range(40, 50)]
        put(store.mountpoint / "after", BLOCK)
        is_well(store)
        assert store.cli("fsck", store.store).returncode == 0
    finally:
        store.clean_up()


def test_a_full_store_bears_changes_that_only_rewrite(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]]
) -> None:
    """Journals, checkpoints and metadata dumps take room, too: they never use it up."""
    store, _ = on_disks(disks.tmpfs("d", 200))
    top = store.mountpoint / "top"
    top.mkdir()
    for number in range(300):
        put(top / f"f{number}", BLOCK[:3000])
    with pytest.raises(OSError, match="No space left"):
        put(store.mountpoint / "large", BLOCK * 200)
    for turn in range(40):
        for number in range(300):
            try:
                (top / f"f{number}").chmod(0o600 + turn % 8)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        with contextlib.suppress(OSError):
            sync(top)
    is_well(store)
    (store.mountpoint / "large").unlink()
    shutil.rmtree(top)
    sync(store.mountpoint)
    store.kill()
    store.mount()
    put(store.mountpoint / "after", BLOCK * 20)
    is_well(store)
    store.umount()
    assert store.cli("fsck", store.store).returncode == 0


@pytest.mark.parametrize(
    ("kind", "count", "mib"), [("tmpfs", 8, 1), ("tmpfs", 22, 1), ("ext4", 4, 4)]
)
def test_programs_that_delete_and_write_at_the_same_time_all_find_room(
    disks: Disks,
    on_disks: Callable[..., tuple[Store, list[Path]]],
    kind: str,
    count: int,
    mib: int,
) -> None:
    make = disks.tmpfs if kind == "tmpfs" else disks.ext4
    store, _ = on_disks(make("d", 300))
    names = []
    with pytest.raises(OSError, match="No space left"):
        for number in itertools.count():
            put(store.mountpoint / f"f{number}", BLOCK * mib)
            names.append(f"f{number}")

    def replace(own: list[str]) -> None:
        for name in own:  # punched holes free whole blocks only: it is a little smaller
            (store.mountpoint / name).unlink()
            put(store.mountpoint / f"{name}.new", (BLOCK * mib)[: -48 * 1024])

    with ThreadPoolExecutor(count) as pool:
        done = [pool.submit(replace, names[number::count][:6]) for number in range(count)]
        for one in done:
            one.result(120)
    is_well(store)
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):  # it is full all the same
        for number in range(20):
            put(store.mountpoint / f"more{number}", BLOCK)
    assert time.monotonic() - began < 8


# --- smaller disks -----------------------------------------------------------


@pytest.mark.expects_log(OUT_OF_USE)
@pytest.mark.parametrize("there", ["wiped", "moved", "remounted"])
def test_a_place_that_is_too_small_is_refused_before_anything_is_written(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]], there: str
) -> None:
    places = [disks.tmpfs(f"d{i}", 200) for i in range(3)]
    store, _ = on_disks(*places)
    for number in range(10):
        put(store.mountpoint / f"f{number}", BLOCK * 15)
    small = disks.tmpfs("small", 60)
    config = (store.store / "fusestore.toml").read_text()
    target = small / "n"
    options: list[str | Path] = ["--to", target]
    if there != "moved":
        shutil.rmtree(places[0] / "n0")
    if there == "remounted":
        disks.unmount(places[0])
        small, options = disks.remount_tmpfs(places[0], 60), []
        target = small / "n0"
    for extra in (["--dry-run"], []):
        done = store.cli("repair", store.store, "r0", *options, *extra, check=False)
        assert done.returncode != 0
        assert "choose a larger disk" in done.stderr
        assert not target.exists()
        assert (store.store / "fusestore.toml").read_text() == config
    large = disks.tmpfs("large", 200)
    store.cli("repair", store.store, "r0", "--to", large / "n")
    assert str(large / "n") in (store.store / "fusestore.toml").read_text()
    store.remount()
    is_well(store)


# --- unequal disks -----------------------------------------------------------


@pytest.mark.parametrize("mib", [100, 140])
def test_shards_are_moved_to_a_node_as_long_as_it_has_its_reserve(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]], mib: int
) -> None:
    store, _ = on_disks(*(disks.tmpfs(f"d{i}", 160) for i in range(3)))
    for number in itertools.count():
        try:
            put(store.mountpoint / f"f{number}", BLOCK * 2)
        except OSError:
            break
    new = disks.tmpfs("new", mib)
    store.cli("node", "add", store.store, "new", "--region", "r1", "--path", new / "n")
    store.cli("rebalance", store.store, "start", "--wait")
    held = sum(path.stat().st_blocks * 512 for path in (new / "n" / "shards").iterdir())
    assert held > mib * MIB // 10
    refused = store.cli("node", "drain", store.store, "new", check=False)
    if refused.returncode:
        assert "add a node first" in refused.stderr
        for number in range(4, 200):
            (store.mountpoint / f"f{number}").unlink(missing_ok=True)
        sync(store.mountpoint)
        for _ in range(30):  # the room comes back after a checkpoint
            time.sleep(1)
            if store.cli("node", "drain", store.store, "new", check=False).returncode == 0:
                break
        else:
            pytest.fail("the node is not drained")
    assert store.cli("fsck", store.store).returncode == 0


def test_the_room_of_unequal_disks_is_used(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]]
) -> None:
    places = [disks.tmpfs(f"d{i}", size) for i, size in enumerate((80, 200, 200))]
    store, _ = on_disks(*places)
    more = disks.tmpfs("more", 200)
    store.cli("node", "add", store.store, "r0b", "--region", "r0", "--path", more / "n")
    weights = {node["name"]: node["weight"] for node in store.status()["nodes"]}
    assert weights["r0b"] == pytest.approx(2.5, rel=0.05)
    expected = os.statvfs(store.mountpoint).f_bavail * 4096
    written = write_until_full(store.mountpoint / "big")
    assert written >= 250 * MIB
    assert 0.8 * written < expected < 1.2 * written
    assert free(places[0]) >= 10 * MIB
    (store.mountpoint / "big").unlink()
    put(store.mountpoint / "other", BLOCK * 20)
    assert [node["state"] for node in store.status()["nodes"]] == ["up"] * 4


def test_disks_that_are_added_to_full_ones_are_used_at_once(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]]
) -> None:
    store, _ = on_disks(*(disks.tmpfs(f"d{i}", 90) for i in range(3)))
    write_until_full(store.mountpoint / "big")
    for number in range(3):
        path = disks.tmpfs(f"more{number}", 150) / "n"
        store.cli(
            "node", "add", store.store, f"m{number}", "--region", f"r{number}", "--path", path
        )
    written = write_until_full(store.mountpoint / "big2")
    assert written >= 130 * MIB
    (store.mountpoint / "big").unlink()
    (store.mountpoint / "big2").unlink()
    put(store.mountpoint / "other", BLOCK * 20)


# --- the metadata ------------------------------------------------------------


ATTRIBUTES_MAX = XATTRS_BYTES_MAX // XATTR_BYTES_MAX - 1


def set_attributes(top: Path, count: int, start: int = 0) -> None:
    """Set attributes of 64 KiB, as many a file as it may have; OSError."""
    value = random.Random(2).randbytes(64 << 10)
    for number in range(start, start + count):
        path, at = top / f"f{number // ATTRIBUTES_MAX}", number % ATTRIBUTES_MAX
        if at == 0 or not path.exists():
            path.touch()
        os.setxattr(path, f"user.{at}", value[number:] + value[:number])


@pytest.mark.parametrize(
    "what", ["attributes", "links", pytest.param("names", marks=pytest.mark.long)]
)
def test_metadata_that_would_outgrow_its_device_is_refused_before(
    disks: Disks, make_store: Callable[..., Store], what: str
) -> None:
    place = disks.tmpfs("metadata", 64)
    store = make_store("--metadata", place / "m")
    store.mount()
    top = store.mountpoint / "top"
    top.mkdir()
    with pytest.raises(OSError, match="No space left"):
        if what == "attributes":
            set_attributes(top, 10_000)
        else:
            for number in range(200_000):
                if what == "links":
                    os.symlink("x" * 4000, top / f"{number}")
                else:
                    fd = os.open(top / f"{number:0250}", os.O_CREAT | os.O_WRONLY)
                    os.close(fd)
    sync(top)
    assert free(place) >= 10 * MIB
    is_well(store)
    store.remount()
    shutil.rmtree(top)
    put(store.mountpoint / "other", BLOCK)
    (store.mountpoint / "again").mkdir()
    set_attributes(store.mountpoint / "again", 100)
    is_well(store)


def test_attributes_take_no_more_memory_than_file_bytes(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    sizes = []
    for number in range(30):
        set_attributes(store.mountpoint, 100, 100 * number)
        text = Path(f"/proc/{store.daemon_pid}/status").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("RssAnon:"))
        sizes.append(int(line.split()[1]) >> 10)
    assert max(sizes) < 300, sizes


# --- df ----------------------------------------------------------------------


@pytest.mark.expects_log(OUT_OF_USE, TOO_FEW_NODES)
@pytest.mark.parametrize(("gone", "remount"), [(1, False), (2, False), (3, False), (2, True)])
def test_df_shows_sane_numbers_whatever_nodes_are_down(
    disks: Disks, on_disks: Callable[..., tuple[Store, list[Path]]], gone: int, remount: bool
) -> None:
    places = [disks.tmpfs(f"d{i}", 200) for i in range(3)]
    store, _ = on_disks(*places)
    put(store.mountpoint / "file", BLOCK * 20)
    whole = os.statvfs(store.mountpoint)
    if remount:
        store.umount()
    for number in range(gone):
        (places[number] / f"n{number}").rename(places[number] / "away")
    if remount:
        store.mount("ro")
    with contextlib.suppress(OSError):
        put(store.mountpoint / "other", BLOCK)
    found = os.statvfs(store.mountpoint)
    assert 0 <= found.f_bavail <= found.f_bfree <= found.f_blocks
    assert found.f_blocks - found.f_bfree >= 20 * MIB // 4096
    assert found.f_blocks <= 1.1 * whole.f_blocks
    assert found.f_bavail <= 1.05 * whole.f_bavail
    if gone > 1:
        assert found.f_bavail == 0
    for number in range(gone):
        (places[number] / "away").rename(places[number] / f"n{number}")
    store.kill()
