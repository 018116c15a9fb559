"""A store is unmounted while commands of its control socket run: they end before it is closed."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.logs import GONE
from support.mounted_store import FUSESTORE, Store

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

NODE = "us-east-1"
UNMOUNT_SECONDS_MAX = 15.0
FALSE = re.compile(r"damaged|is closed|cannot list|Traceback|see its log|recover")
"""What a command that an unmount interrupts must not say."""
REPEAT = "interrupted: the store was unmounted. Repeat the command"
CONTINUES = r"interrupted: the store was unmounted\. .*continues when the store is mounted again"

Files = dict[str, bytes]


def filled(store: Store) -> Files:
    """Mount a store, and write files of all sizes, in more stripes than a batch of a repair has."""
    store.mount()
    chance = random.Random(1)
    sizes = [*range(7_000, 900_000, 111_000), *[70_000] * 30]
    files = {f"f{number}": chance.randbytes(size) for number, size in enumerate(sizes)}
    for name, data in files.items():
        written(store.mountpoint / name, data)
    return files


def written(path: Path, data: bytes) -> None:
    """Write a file, and return when it is durable, in a stripe of its own."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


class Command:
    """A command that runs beside the test."""

    def __init__(self, *arguments: str | Path) -> None:
        self.words = " ".join(map(str, arguments))
        self._process = subprocess.Popen(
            [*FUSESTORE, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Wait for its end; its exit status and its output, in which nothing false may be."""
        output = self._process.communicate(timeout=120)[0]
        assert not FALSE.search(output), (self.words, output)
        return self._process.returncode, output

    def must_be_interrupted(self, how: str) -> None:
        status, output = self.end()
        assert status == 3, (self.words, status, output)
        assert re.search(how, output), (self.words, output)


def by_command(store: Store) -> None:
    store.umount()


def by_umount8(store: Store) -> None:
    subprocess.run(["fusermount3", "-u", store.mountpoint], check=True)
    store.await_end()


def by_signal(store: Store) -> None:
    store.end_by(signal.SIGTERM)


WAYS = (by_command, by_umount8, by_signal)


def unmount(store: Store, way: Callable[[Store], None]) -> None:
    began = time.monotonic()
    way(store)
    assert time.monotonic() - began < UNMOUNT_SECONDS_MAX


def check(store: Store, files: Files) -> None:
    for name, data in files.items():
        assert (store.mountpoint / name).read_bytes() == data, name


def moments() -> Iterator[tuple[float, Callable[[Store], None]]]:
    """How long a command has run when the store is unmounted, and in what way."""
    yield from zip((0.5, 0.9, 1.4), WAYS, strict=True)


def wipe(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def rebalance_of(store: Store) -> str:
    return store.cli("rebalance", store.store, "status", "--json").stdout


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def running(store: Store) -> bool:
    """Whether a repair by a command runs."""
    repair = store.status()["repair"]
    return repair is not None and not repair["by_itself"]


@pytest.mark.expects_log(GONE)
def test_a_repair(store: Store) -> None:
    files = filled(store)
    place = store.node(NODE)
    for number, way in enumerate(WAYS):
        wipe(place)
        repair = Command("repair", store.store, NODE, "--on-this-disk", "--rate", "0.2")
        until(lambda: running(store))
        time.sleep(0.3 * number)
        unmount(store, way)
        repair.must_be_interrupted("The repair was " + REPEAT)
        store.mount()
        check(store, files)
        if number == 1:  # what was begun also continues without another command
            until(lambda: bool(store.status()["healthy"]))
        store.cli("repair", store.store, NODE, "--on-this-disk")
        assert store.status()["healthy"]


@pytest.mark.expects_log(GONE)
def test_a_repair_that_has_just_begun(store: Store, long: bool) -> None:
    files = filled(store)
    place = store.node(NODE)
    chance = random.Random(2)
    for number in range(30 if long else 5):
        wipe(place)
        repair = Command("repair", store.store, NODE, "--on-this-disk", "--rate", "5")
        time.sleep(chance.uniform(0.3, 1.0))
        unmount(store, WAYS[number % 3])
        status, output = repair.end()
        assert status in (0, 3), output
        store.mount()
        check(store, files)
        store.cli("repair", store.store, NODE, "--on-this-disk")


@pytest.mark.expects_log(r"members\.member: Node us-east-1 moves to ")
def test_a_repair_to_another_place(store: Store, tmp_path: Path) -> None:
    files = filled(store)
    arguments = ("repair", store.store, NODE, "--to", tmp_path / "new")
    repair = Command(*arguments, "--rate", "0.2")
    until(lambda: running(store))
    unmount(store, by_command)
    repair.must_be_interrupted("The repair was " + REPEAT)
    store.mount()
    check(store, files)
    store.cli(*arguments)
    assert store.status()["healthy"]
    assert store.node(NODE) == tmp_path / "new"


def test_a_drill(store: Store) -> None:
    files = filled(store)
    for seconds, way in moments():
        drill = Command("drill", store.store, "--lose", NODE, "--all", "--rate", "0.2")
        time.sleep(seconds)
        unmount(store, way)
        drill.must_be_interrupted("The drill was " + REPEAT)
        store.mount()
        check(store, files)


def test_a_scrub(store: Store) -> None:
    files = filled(store)
    scrub = Command("scrub", store.store, "start", "--wait", "--rate", "0.2")
    for seconds, way in moments():
        time.sleep(seconds)
        unmount(store, way)
        scrub.must_be_interrupted("The scrub was " + CONTINUES)
        store.mount()
        assert store.status()["scrub"]["state"] == "running"
        check(store, files)
        scrub = Command("scrub", store.store, "start", "--wait")
    store.cli("scrub", store.store, "pause")
    scrub.end()


def test_a_recoding(store: Store) -> None:
    files = filled(store)
    recode = Command("recode", store.mountpoint, "--to", "1+2", "--rate", "0.1")
    time.sleep(1.5)
    unmount(store, by_command)
    recode.must_be_interrupted(CONTINUES)
    store.mount()
    assert store.status()["recode"]["state"] == "running"
    check(store, files)


@pytest.mark.expects_log(GONE)
def test_several_commands_at_once(store: Store, tmp_path: Path, long: bool) -> None:
    """The repair holds up all that would bring data to a node."""
    files = filled(store)
    place = store.node("eu-west-1")
    store.cli("node", "add", store.store, "new", "--region", NODE, "--path", tmp_path / "new")
    for number in range(10 if long else 3):
        wipe(place)
        repair = Command("repair", store.store, "eu-west-1", "--on-this-disk", "--rate", "0.1")
        until(lambda: running(store))
        moves = []
        if number == 0:  # later there may be nothing to move
            moves.append(Command("rebalance", store.store, "start", "--wait"))
            until(lambda: '"running"' in rebalance_of(store))
            moves.append(Command("node", "drain", store.store, "new"))
            until(lambda: "draining = true" in (store.store / "fusestore.toml").read_text())
        more = tmp_path / f"more{number}"
        add = Command("node", "add", store.store, more.name, "--region", NODE, "--path", more)
        others = [
            Command("fsck", store.store),
            Command("risk", store.store),
            Command("status", store.store),
            Command("node", "list", store.store),
            Command("drill", store.store, "--lose", "us-west-1", "--all", "--rate", "0.3"),
        ]
        until(more.exists)
        time.sleep(0.2 * number)
        unmount(store, WAYS[number % 3])
        repair.must_be_interrupted("The repair was " + REPEAT)
        add.must_be_interrupted("Adding the node was " + REPEAT)
        for move in moves:
            move.must_be_interrupted(CONTINUES)
        for other in others:
            other.end()
        store.mount()
        check(store, files)
        store.cli("repair", store.store, "eu-west-1", "--on-this-disk")
        store.cli("node", "add", store.store, more.name, "--region", NODE, "--path", more)
        if number == 0:
            store.cli("node", "drain", store.store, "new")
            store.cli("node", "drain", store.store, "new", "--cancel")


@pytest.mark.expects_log(r" was taken over by process \d+ of ")
def test_the_mount_was_fenced(make_store: Callable[..., Store]) -> None:
    store, other = make_store(), make_store()
    files = filled(store)
    other.mount()
    drill = Command("drill", store.store, "--lose", NODE, "--all", "--rate", "0.2")
    time.sleep(0.5)
    for name in ("us-east-1", "us-west-1", "eu-west-1"):
        shutil.copy(other.node(name) / "owner", store.node(name) / "owner")
    with (
        pytest.raises(OSError, match=r"Read-only|Input/output"),
    ):
        written(store.mountpoint / "late", b"late")
    done = store.cli("umount", store.mountpoint, check=False)
    assert done.returncode == 3
    assert not FALSE.search(done.stderr), done.stderr
    drill.must_be_interrupted("The drill was " + REPEAT)
    store.await_end()
    store.mount("take_over")
    check(store, files)
