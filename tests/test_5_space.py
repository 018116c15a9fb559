"""A store takes the space that its code says and little more, and gives it back.

So does the daemon with memory and file descriptors.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fusestore.format import acl
from fusestore.format.acl import Entry, Tag
from support.mounted_store import Store

pytestmark = pytest.mark.mounted

KIB, MIB, MB = 1 << 10, 1 << 20, 10**6


def used(*tops: Path | str) -> int:
    """Bytes that the trees take on their disks, each inode once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for top in tops:
        for directory, _, files in os.walk(top):
            for name in [".", *files]:
                try:
                    found = os.lstat(os.path.join(directory, name))
                except FileNotFoundError:
                    continue
                if (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    total += found.st_blocks * 512
    return total


def regions(store: Store) -> list[str]:
    return [node["path"] for node in store.status()["nodes"]]


def write_files(top: Path, sizes: Iterable[int]) -> int:
    """Incompressible files of the given sizes; bytes written."""
    block = random.Random(1).randbytes(MIB)
    total = 0
    for number, size in enumerate(sizes):
        with (top / f"{number}").open("wb", buffering=0) as file:
            for start in range(0, size, MIB):
                file.write(block[: min(MIB, size - start)])
        total += size
    return total


@pytest.mark.parametrize(
    ("code", "ratio"), [("2+1", 1.5), ("4+2", 1.5), ("6+3", 1.5), ("1+2", 3.0)]
)
def test_large_files_take_what_the_code_says_and_three_percent(
    make_store: Callable[..., Store], code: str, ratio: float
) -> None:
    store = make_store("--code", code)
    store.mount()
    sizes = [MIB + number * 12_345 for number in range(64)] + [17 * MIB + 1] * 3
    data = write_files(store.mountpoint, sizes)
    store.umount()
    assert used(*regions(store)) <= data * ratio * 1.03


def test_space_is_taken_while_mounted_as_it_is_after(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    data = write_files(store.mountpoint, [4 * MIB] * 32)
    fd = os.open(store.mountpoint, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert used(*regions(store)) <= data * 1.5 * 1.03 + 64 * MIB


@pytest.mark.parametrize(
    ("count", "bytes_max"),
    [
        (10_000, 45 * MB + 16 * MB),
        pytest.param(100_000, 450 * MB, marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
def test_small_files_share_their_stripes(
    make_store: Callable[..., Store], count: int, bytes_max: int
) -> None:
    store = make_store()
    store.mount()
    block = random.Random(1).randbytes(MIB)
    for number in range(count):
        path = store.mountpoint / f"{number // 1000}/{number}"
        if number % 1000 == 0:
            path.parent.mkdir()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, block[number % 1000 * KIB :][:KIB])
        os.close(fd)
    store.umount()
    assert used(store.store, *regions(store)) <= bytes_max
    store.mount()
    for number in random.Random(2).sample(range(count), 500):
        path = store.mountpoint / f"{number // 1000}/{number}"
        assert path.read_bytes() == block[number % 1000 * KIB :][:KIB]


def test_holes_and_metadata_take_next_to_nothing(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    for number in range(100):
        (store.mountpoint / f"{number}").touch()
        os.truncate(store.mountpoint / f"{number}", 1 << 40)
    store.umount()
    assert used(*regions(store)) < 4 * MIB


@pytest.mark.parametrize(
    "mib", [300, pytest.param(3000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_deleting_everything_gives_the_space_back_within_a_minute(
    make_store: Callable[..., Store], mib: int
) -> None:
    store = make_store()
    store.mount()
    small = store.mountpoint / "small"
    large = store.mountpoint / "large"
    for directory in (small, large):
        directory.mkdir()
    write_files(large, [10 * MIB] * (mib // 10))
    write_files(small, [5 * KIB] * 2000)
    shutil.rmtree(large)
    shutil.rmtree(small)
    start = time.monotonic()
    while (taken := used(*regions(store))) >= 64 * MIB:
        assert time.monotonic() - start < 60, f"{taken / MIB:.0f} MiB are still taken"
        time.sleep(0.5)


def test_overwriting_gives_the_space_back(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    path = store.mountpoint / "file"
    for number in range(30):
        path.write_bytes(random.Random(number).randbytes(16 * MIB))
    start = time.monotonic()
    while (taken := used(*regions(store))) >= 16 * MIB * 1.5 + 64 * MIB:
        assert time.monotonic() - start < 60, f"{taken / MIB:.0f} MiB are still taken"
        time.sleep(0.5)
    assert path.read_bytes() == random.Random(29).randbytes(16 * MIB)


def test_an_unlinked_open_file_gives_its_space_back_when_it_is_closed(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    path = store.mountpoint / "file"
    with path.open("w+b", buffering=0) as file:
        for _ in range(150):
            file.write(random.Random(1).randbytes(MIB))
        os.unlink(path)
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), MIB, 149 * MIB) == random.Random(1).randbytes(MIB)
    start = time.monotonic()
    while (taken := used(*regions(store))) >= 64 * MIB:
        assert time.monotonic() - start < 60, f"{taken / MIB:.0f} MiB are still taken"
        time.sleep(0.5)


def anonymous_memory(pid: int) -> int:
    """Bytes of memory that are the process's own."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KIB
    raise AssertionError(f"process {pid} has no RssAnon")


@pytest.mark.parametrize(
    "mib", [512, pytest.param(4096, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_the_daemon_stays_small_while_much_is_copied(
    make_store: Callable[..., Store], mib: int
) -> None:
    store = make_store()
    store.mount()
    pid = store.daemon_pid
    assert pid is not None
    block = random.Random(1).randbytes(MIB)
    buffer = bytearray(MIB)
    most = 0
    for number in range(mib // 64):
        path = store.mountpoint / f"{number}"
        with path.open("wb", buffering=0) as file:
            for _ in range(64):
                file.write(block)
                most = max(most, anonymous_memory(pid))
    store.remount()
    pid = store.daemon_pid
    assert pid is not None
    for number in range(mib // 64):
        with (store.mountpoint / f"{number}").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                most = max(most, anonymous_memory(pid))
    assert most < 200 * MIB, f"{most / MIB:.0f} MiB"


def test_the_daemon_keeps_no_descriptors_of_what_was_closed(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{store.daemon_pid}/fd"))

    def use_it() -> None:
        for number in range(200):
            path = store.mountpoint / f"{number}"
            path.write_bytes(b"x" * number * 500)
            path.read_bytes()
            os.listdir(store.mountpoint)
            path.unlink()
        store.status()

    use_it()
    before = descriptors()
    for _ in range(3):
        use_it()
    assert descriptors() <= before + 3


def new_attributes(top: Path, number: int, value: bytes) -> None:
    if number % 15 == 0:
        (top / f"{number // 15}").touch()
    os.setxattr(top / f"{number // 15}", f"user.{number % 15}", value)


def one_attribute(top: Path, number: int, value: bytes) -> None:
    (top / "one").touch()
    os.setxattr(top / "one", "user.one", value)


def targets(top: Path, number: int, value: bytes) -> None:
    for part in range(10):
        os.symlink(value[:2000].hex(), top / f"{number}.{part}")


def inherited_acls(top: Path, number: int, value: bytes) -> None:
    if number == 0:
        users = (Entry(Tag.USER, 7, uid) for uid in range(400))
        last = Entry(Tag.GROUP_OBJ, 7), Entry(Tag.MASK, 7), Entry(Tag.OTHER, 7)
        acl_of = acl.format((Entry(Tag.USER_OBJ, 7), *users, *last))
        os.setxattr(top, "system.posix_acl_default", acl_of)
    (top / f"{number}").mkdir()


@pytest.mark.parametrize("flood", [new_attributes, one_attribute, targets, inherited_acls])
def test_the_daemon_stays_small_whatever_is_put_into_the_metadata(
    make_store: Callable[..., Store], flood: Callable[[Path, int, bytes], None]
) -> None:
    """By somebody with a quota, too, which does not count attributes; others are served."""
    store = make_store()
    store.mount()
    top = store.mountpoint / "top"
    top.mkdir()
    store.cli("quota", "set", top, "--bytes", "1M")
    assert store.daemon_pid is not None
    before, peak, longest, put = anonymous_memory(store.daemon_pid), 0, 0.0, 0
    value = random.Random(1).randbytes(64 * KIB)
    until = time.monotonic() + 15
    while time.monotonic() < until and put < 12_000:
        flood(top, put, value[put % 1000 :] + value[: put % 1000])
        put += 1
        if put % 200 == 0:
            peak = max(peak, anonymous_memory(store.daemon_pid))
            started = time.monotonic()
            (store.mountpoint / f"nothing{put}").exists()
            longest = max(longest, time.monotonic() - started)
    peak = max(peak, anonymous_memory(store.daemon_pid))
    assert put > 200
    assert peak - before < 500 * MIB
    assert longest < 15
