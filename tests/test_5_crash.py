"""After kill -9 the tree is as it was at one instant, no earlier than the last fsync.

The steps of a test are done one after the other, and the state of the tree after
each is known.  What is there after the next mount must be one of these states:
the one at the last fsync that returned, or a later one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.logs import GONE
from support.mounted_store import FUSESTORE, REPOSITORY, Store, is_mounted, sync
from support.posixly import read_uncached

pytestmark = pytest.mark.mounted

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    made = make_store()
    made.mount()
    return made


def tree(top: Path) -> dict[str, bytes]:
    """The bytes of every file below `top`, by name."""
    return {
        os.path.relpath(os.path.join(directory, name), top): read_uncached(
            os.path.join(directory, name)
        )
        for directory, _, files in os.walk(top)
        for name in files
    }


# --- what was synced is there ------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5000, 100_000, MIB, 5 * MIB + 3])
def test_a_synced_file_is_there(store: Store, size: int) -> None:
    path = store.mountpoint / "file"
    data = random.Random(size).randbytes(size)
    path.write_bytes(data)
    sync(path)
    store.kill()
    store.mount()
    assert read_uncached(path) == data


def test_one_sync_of_a_directory_covers_every_change_before_it(store: Store) -> None:
    top = store.mountpoint
    (top / "a/b").mkdir(parents=True)
    (top / "a/file").write_bytes(b"bytes")
    os.link(top / "a/file", top / "a/b/linked")
    os.symlink("somewhere", top / "link")
    os.rename(top / "a/file", top / "renamed")
    os.setxattr(top / "renamed", "user.a", b"1")
    os.chmod(top / "renamed", 0o601)
    os.utime(top / "renamed", ns=(3, 4))
    sync(top)
    store.kill()
    store.mount()
    assert sorted(os.listdir(top)) == ["a", "link", "renamed"]
    assert os.listdir(top / "a") == ["b"]
    assert (top / "a/b/linked").read_bytes() == b"bytes"
    found = os.stat(top / "renamed")
    assert (found.st_nlink, found.st_mode & 0o777, found.st_mtime_ns) == (2, 0o601, 4)
    assert os.getxattr(top / "renamed", "user.a") == b"1"
    assert os.readlink(top / "link") == "somewhere"


def test_what_was_removed_stays_removed(store: Store) -> None:
    for name in ("kept", "removed"):
        (store.mountpoint / name).write_bytes(name.encode())
    sync(store.mountpoint)
    os.unlink(store.mountpoint / "removed")
    sync(store.mountpoint)
    store.kill()
    store.mount()
    assert tree(store.mountpoint) == {"kept": b"kept"}


def test_many_small_syncs_are_all_there(store: Store) -> None:
    path = store.mountpoint / "log"
    with path.open("wb", buffering=0) as file:
        for number in range(200):
            file.write(f"line {number}\n".encode())
            os.fsync(file.fileno())
    store.kill()
    store.mount()
    assert path.read_bytes() == b"".join(f"line {number}\n".encode() for number in range(200))


def test_osync_and_odsync_write_through(store: Store) -> None:
    for name, flag in (("sync", os.O_SYNC), ("dsync", os.O_DSYNC)):
        fd = os.open(store.mountpoint / name, os.O_WRONLY | os.O_CREAT | flag)
        os.write(fd, name.encode())
        os.close(fd)
    store.kill()
    store.mount()
    assert tree(store.mountpoint) == {"sync": b"sync", "dsync": b"dsync"}


def test_without_a_sync_all_is_there_after_some_seconds(store: Store) -> None:
    (store.mountpoint / "file").write_bytes(b"x" * 300_000)
    time.sleep(6.5)  # five seconds, one flush, and some patience
    store.kill()
    store.mount()
    assert read_uncached(store.mountpoint / "file") == b"x" * 300_000


def test_an_unlinked_open_file_is_gone_after_a_crash(store: Store) -> None:
    fd = os.open(store.mountpoint / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * 100_000)
    os.fsync(fd)
    os.unlink(store.mountpoint / "file")
    sync(store.mountpoint)
    store.kill()
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(OSError):
        os.close(fd)
    store.mount()
    assert os.listdir(store.mountpoint) == []


# --- what was not synced is there as it was at one instant -------------------


Digests = dict[str, tuple[int, bytes]]
"""The size and the checksum of every file, by name."""

DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV)


def digest(data: bytes | bytearray) -> tuple[int, bytes]:
    return len(data), hashlib.blake2b(data, digest_size=16).digest()


class Script:
    """Random steps on a tree, with the state after each."""

    def __init__(self, top: Path, randomness: random.Random) -> None:
        self.top = top
        self.random = randomness
        self.now = tree(top)
        self.states: list[Digests] = [{name: digest(data) for name, data in self.now.items()}]
        self.synced = 0
        """The number of the state at the last fsync that returned."""

    def run(self, steps: int) -> None:
        """Do so many steps, fewer if the daemon dies."""
        try:
            for _ in range(steps):
                self.step()
        except OSError as error:
            if error.errno not in DEAD:
                raise

    def reaches(self, name: str, content: bytes | None) -> None:
        """The next change makes this the file's bytes; None takes the file away."""
        state = dict(self.states[-1])
        if content is None:
            del self.now[name], state[name]
        else:
            self.now[name], state[name] = content, digest(content)
        self.states.append(state)

    def step(self) -> None:
        names = sorted(self.now)
        name, other = self.random.choice([*names, "f0"]), f"f{self.random.randrange(12)}"
        kind = self.random.choices(
            ["create", "write", "append", "truncate", "rename", "unlink", "fsync"],
            [3, 5, 4, 2, 2, 1, 1],
        )[0]
        if kind == "fsync":
            sync(self.top)
            self.synced = len(self.states) - 1
        elif kind == "create" or name not in self.now:
            if other not in self.now:
                self.reaches(other, b"")
                os.mknod(self.top / other)
        elif kind in ("write", "append"):
            self.write(name, at_the_end=kind == "append")
        elif kind == "truncate":
            content = self.now[name]
            size = self.random.randrange(len(content) * 2 + 1)
            self.reaches(name, content[:size] + bytes(max(0, size - len(content))))
            os.truncate(self.top / name, size)
        elif kind == "rename" and name != other:
            state = dict(self.states[-1])
            state[other] = state.pop(name)
            self.states.append(state)
            self.now[other] = self.now.pop(name)
            os.rename(self.top / name, self.top / other)
        elif kind == "unlink":
            self.reaches(name, None)
            os.unlink(self.top / name)

    def write(self, name: str, at_the_end: bool) -> None:
        """One write(2) that is one request to the daemon, and so one change."""
        content = bytearray(self.now[name])
        piece = self.random.randbytes(self.random.choice([3, 900, 30_000, 120_000]))
        start = len(content) if at_the_end else self.random.randrange(len(content) + 1)
        start = min(start, 4 * MIB)
        content[start : start + len(piece)] = piece
        self.reaches(name, bytes(content))
        fd = os.open(self.top / name, os.O_WRONLY)
        try:
            os.pwrite(fd, piece, start)
        finally:
            os.close(fd)

    def check(self) -> int:
        """The number of the state that the tree is in."""
        found = {name: digest(data) for name, data in tree(self.top).items()}
        for number in range(self.synced, len(self.states)):
            if self.states[number] == found:
                return number
        where = [number for number, state in enumerate(self.states) if state == found]
        now = self.states[-1]
        differing = {
            name: (found.get(name, ("missing",))[0], now.get(name, ("missing",))[0])
            for name in sorted(found.keys() | now.keys())
            if found.get(name) != now.get(name)
        }
        pytest.fail(
            f"the tree is in none of the states {self.synced} to {len(self.states) - 1}, "
            f"but in {where or 'no state that it ever had'}; sizes found and last: {differing}"
        )


@pytest.mark.parametrize("number", range(8))
def test_a_killed_daemon_leaves_one_instant(store: Store, number: int) -> None:
    script = Script(store.mountpoint, random.Random(number))
    timer = store.kill_soon(0.1 + number * 0.4)
    script.run(100_000)
    timer.join()
    store.kill()
    store.mount()
    reached = script.check()
    store.remount()
    assert script.check() == reached


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_crashes_in_a_row_lose_nothing_that_was_synced(store: Store) -> None:
    randomness = random.Random(77)
    for _ in range(60):
        script = Script(store.mountpoint, randomness)
        timer = store.kill_soon(randomness.uniform(0.05, 4))
        script.run(100_000)
        timer.join()
        store.kill()
        store.mount()
        script.check()


def test_a_crash_right_after_a_mount_changes_nothing(store: Store) -> None:
    script = Script(store.mountpoint, random.Random(5))
    script.run(200)
    store.remount()
    script.synced = len(script.states) - 1
    for _ in range(4):
        store.kill()
        store.mount()
    script.check()


def test_a_crash_of_the_writeback_cache_keeps_what_was_synced(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount("writeback")
    data = random.Random(1).randbytes(3 * MIB)
    for number in range(3):
        path = store.mountpoint / f"{number}"
        path.write_bytes(data[number * 1000 :])
        sync(path)
    (store.mountpoint / "lost").write_bytes(data)
    store.kill()
    store.mount("writeback")
    for number in range(3):
        assert read_uncached(store.mountpoint / f"{number}") == data[number * 1000 :]


@pytest.mark.expects_log(GONE)
def test_a_crash_without_a_region_loses_nothing_that_was_synced(
    store: Store, tmp_path: Path
) -> None:
    node = store.node("us-west-1")
    script = Script(store.mountpoint, random.Random(9))
    script.run(60)
    node.rename(tmp_path / "away")
    script.run(60)
    sync(store.mountpoint)
    script.synced = len(script.states) - 1
    script.run(20)
    store.kill()
    store.mount()
    script.check()
    store.umount()
    (tmp_path / "away").rename(node)
    store.mount()
    script.check()


def heal(store: Store) -> None:
    """Wait until every node has what it missed."""
    deadline = time.monotonic() + 60
    while not (status := store.status())["healthy"]:
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(4))
def test_losses_and_crashes_in_a_row_lose_nothing_that_was_synced(
    store: Store, tmp_path: Path, number: int
) -> None:
    """A region goes at any moment, the daemon may be killed, and the region comes back."""
    randomness = random.Random(number)
    nodes = {node["name"]: Path(node["path"]) for node in store.status()["nodes"]}
    away = tmp_path / "away"
    away.mkdir()
    for _ in range(8):
        script = Script(store.mountpoint, randomness)
        lost, other = randomness.sample(sorted(nodes), 2)
        loss = threading.Timer(
            randomness.uniform(0.05, 0.5), nodes[lost].rename, args=(away / lost,)
        )
        loss.start()
        if randomness.random() < 0.6:
            timer = store.kill_soon(randomness.uniform(0.3, 1.5))
            script.run(100_000)
            timer.join()
            loss.join()
            store.kill()
        else:
            script.run(400)
            loss.join()
            store.umount()
            script.synced = len(script.states) - 1
        return_ = randomness.choice(["before the mount", "after it", "wiped"])
        if return_ == "before the mount":
            (away / lost).rename(nodes[lost])
        store.mount()
        reached = script.synced = script.check()
        if return_ == "after it":
            store.umount()
            (away / lost).rename(nodes[lost])
            store.mount()
        elif return_ == "wiped":
            shutil.rmtree(away / lost)
            store.cli("repair", store.store, lost, "--quiet")
        heal(store)
        assert script.check() == reached
        store.umount()
        nodes[other].rename(away / other)
        store.mount()
        assert script.check() == reached
        store.umount()
        (away / other).rename(nodes[other])
        store.mount()
        heal(store)


@pytest.mark.parametrize("number", range(2))
def test_status_counts_what_is_there_after_a_crash(store: Store, number: int) -> None:
    script = Script(store.mountpoint, random.Random(100 + number))
    timer = store.kill_soon(0.7 + number)
    script.run(100_000)
    timer.join()
    store.kill()
    store.mount()
    layouts = [
        json.loads(os.getxattr(store.mountpoint / name, "user.fusestore.layout"))
        for name in os.listdir(store.mountpoint)
    ]
    status = store.status()
    assert status["files"] == 1 + len(layouts)  # the root is one
    assert status["bytes"] == sum(e["length"] for each in layouts for e in each["extents"])


# --- mounts ------------------------------------------------------------------


def test_a_dead_mount_is_cleared_by_the_next(store: Store) -> None:
    (store.mountpoint / "file").write_bytes(b"x")
    sync(store.mountpoint)
    store.kill(clear=False)
    with pytest.raises(OSError) as caught:
        os.listdir(store.mountpoint)
    assert caught.value.errno == errno.ENOTCONN
    assert store.status()["mounted"] is False
    store.mount()
    assert (store.mountpoint / "file").read_bytes() == b"x"
    store.umount()
    assert not is_mounted(store.mountpoint)


def test_a_second_daemon_is_refused_in_one_sentence(store: Store, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    done = store.cli("mount", store.store, second, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert not is_mounted(second)
    (store.mountpoint / "file").write_bytes(b"the first goes on")
    assert (store.mountpoint / "file").read_bytes() == b"the first goes on"


def test_of_two_mounts_at_once_one_wins(make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store()
    places = [store.mountpoint, tmp_path / "second"]
    places[1].mkdir()
    attempts = [
        subprocess.Popen(
            [*FUSESTORE, "mount", str(store.store), str(place)],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for place in places
    ]
    statuses = [attempt.wait(60) for attempt in attempts]
    try:
        assert sorted(statuses) == [0, 3]
        assert [is_mounted(place) for place in places] == [status == 0 for status in statuses]
    finally:
        for place in places:
            if is_mounted(place):
                store.cli("umount", place)


def test_a_busy_mount_is_a_clear_message(store: Store) -> None:
    with (store.mountpoint / "file").open("wb"):
        done = store.cli("umount", store.mountpoint, check=False)
        assert done.returncode == 3
        assert len(done.stderr.splitlines()) == 1
        assert store.alive()
    store.umount()


def test_the_file_that_programs_had_open_is_not_silently_another(store: Store) -> None:
    fd = os.open(store.mountpoint / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"before")
    os.fsync(fd)
    store.kill()
    store.mount()
    with pytest.raises(OSError) as caught:
        os.write(fd, b"after")
    assert caught.value.errno in (errno.ENOTCONN, errno.EIO, errno.ECONNABORTED)
    with pytest.raises(OSError):
        os.close(fd)
    assert (store.mountpoint / "file").read_bytes() == b"before"


def test_a_killed_writer_leaves_a_prefix(store: Store) -> None:
    script = (
        "import sys\n"
        "with open(sys.argv[1], 'wb', buffering=0) as file:\n"
        "    for number in range(10**9):\n"
        "        file.write(b'%015d\\n' % number * 64)\n"
    )
    path = store.mountpoint / "file"
    writer = subprocess.Popen([sys.executable, "-c", script, path])
    time.sleep(1.5)
    store.kill(clear=False)
    writer.kill()
    writer.wait()
    store.clear_mount()
    store.mount()
    found = path.read_bytes() if path.exists() else b""
    assert len(found) % 1024 == 0
    for number in range(len(found) // 1024):
        assert found[number * 1024 : (number + 1) * 1024] == b"%015d\n" % number * 64


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_mount_with_everything_committed(
    store: Store, number: signal.Signals
) -> None:
    data = random.Random(number).randbytes(3 * MIB)
    (store.mountpoint / "unsynced").write_bytes(data)
    store.end_by(number)
    assert not is_mounted(store.mountpoint)
    status = store.status()
    assert (status["mounted"], status["healthy"]) == (False, True)
    store.mount()
    assert read_uncached(store.mountpoint / "unsynced") == data
