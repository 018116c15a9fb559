"""Disks of a mounted store fail and come back: nothing is for good, and a disk can be changed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.logs import GONE, LOST_STRIPE, ONLY_READ, OUT_OF_USE, TOO_FEW_NODES, UNREAD_FILE
from support.loop_devices import Disks
from support.mounted_store import Store
from support.posixly import read_uncached

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.not_plain,
    pytest.mark.expects_log(
        GONE, LOST_STRIPE, ONLY_READ, OUT_OF_USE, TOO_FEW_NODES, UNREAD_FILE, "No metadata dump"
    ),
]

MIB = 1 << 20
SECONDS_MAX = 60
REGIONS = ("r0", "r1", "r2")


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    disks = Disks(tmp_path / "disks")
    disks.top.mkdir()
    try:
        disks.make(dict.fromkeys(REGIONS, 200 * MIB))
    except OSError as error:
        disks.detach()
        pytest.skip(f"there are no loop devices: {error}")
    yield disks
    disks.detach()


@pytest.fixture
def store(disks: Disks, make_store: Callable[..., Store]) -> Iterator[Store]:
    regions = [f"--region={name}={disks.top / name / 'node'}" for name in REGIONS]
    store = make_store(*regions)
    store.mount()
    yield store
    store.clean_up()


def write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())


def eventually(what: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS_MAX
    while not what():
        assert time.monotonic() < until
        time.sleep(0.3)


def healthy(store: Store) -> bool:
    return bool(store.status()["healthy"])


def states(store: Store) -> dict[str, str]:
    return {node["name"]: node["state"] for node in store.status()["nodes"]}


def is_read_only(store: Store) -> bool:
    try:
        (store.mountpoint / "probe").write_bytes(b"")
    except OSError as error:
        return error.errno == errno.EROFS
    return False


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_mount_continues_when_directories_are_back(store: Store, disks: Disks, gone: int) -> None:
    write(store.mountpoint / "old", b"o" * MIB)
    (store.mountpoint / "accepted").write_bytes(b"a" * 3 * MIB)
    for name in REGIONS[:gone]:
        (disks.top / name / "node").rename(disks.top / name / "hidden")
    if gone > 1:
        with pytest.raises(OSError) as failed:
            write(store.mountpoint / "new", b"n" * MIB)
        assert failed.value.errno in (errno.EIO, errno.EROFS)
        assert is_read_only(store)
    else:
        write(store.mountpoint / "new", b"n" * MIB)
    for name in REGIONS[:gone]:
        (disks.top / name / "hidden").rename(disks.top / name / "node")
    eventually(lambda: healthy(store))
    write(store.mountpoint / "later", b"l" * MIB)
    store.kill()
    store.mount()
    assert (store.mountpoint / "old").read_bytes() == b"o" * MIB
    assert (store.mountpoint / "accepted").read_bytes() == b"a" * 3 * MIB
    assert (store.mountpoint / "later").read_bytes() == b"l" * MIB


@pytest.mark.parametrize(("gone", "size"), [(3, 3 * MIB), (3, 300_000), (2, 40_000), (2, 9 * MIB)])
def test_what_was_read_in_vain_can_be_read_when_the_mount_continues(
    store: Store, disks: Disks, gone: int, size: int
) -> None:
    data = os.urandom(size)
    for name in REGIONS[:gone]:
        (disks.top / name / "node").rename(disks.top / name / "hidden")
    for number in range(3):
        with suppress(OSError):
            write(store.mountpoint / f"f{number}", data)
        with suppress(OSError):
            read_uncached(store.mountpoint / f"f{number}")
    assert is_read_only(store)
    for name in REGIONS[:gone]:
        (disks.top / name / "hidden").rename(disks.top / name / "node")
    eventually(lambda: healthy(store))
    assert read_uncached(store.mountpoint / "f0") == data
    write(store.mountpoint / "later", data)
    for path in store.mountpoint.iterdir():
        assert data.startswith(read_uncached(path))
    assert (store.mountpoint / "f0").stat().st_size == size


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_file_system_that_turns_read_only_is_read_and_comes_back(
    store: Store, disks: Disks, count: int
) -> None:
    write(store.mountpoint / "old", b"o" * 3 * MIB)
    for name in REGIONS[:count]:
        disks.turn_read_only(name)
    with suppress(OSError):  # more than there is room for ahead
        (store.mountpoint / "accepted").write_bytes(b"a" * 20 * MIB)
    if count == 1:
        write(store.mountpoint / "new", b"n" * MIB)
    else:
        eventually(lambda: is_read_only(store))
    eventually(lambda: all(states(store)[name] == "behind" for name in REGIONS[:count]))
    if count == 3:
        assert (store.mountpoint / "old").read_bytes() == b"o" * 3 * MIB
        store.kill()
        return
    hidden = disks.top / "r2" / "hidden"
    (disks.top / "r2" / "node").rename(hidden)  # whatever is left is read
    with (store.mountpoint / "old").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == b"o" * 3 * MIB
    hidden.rename(disks.top / "r2" / "node")
    if count == 1:
        eventually(lambda: states(store)["r2"] == "up")
    else:
        store.kill()


def test_the_disk_of_a_lost_node_can_be_unmounted_and_changed(store: Store, disks: Disks) -> None:
    write(store.mountpoint / "old", b"o" * MIB)
    node = disks.top / "r1" / "node"
    node.rename(node.with_name("away"))
    eventually(lambda: states(store)["r1"] != "up")

    def unmounted() -> bool:
        try:
            disks.detach_one("r1")
        except OSError:
            return False
        return True

    eventually(unmounted)
    write(store.mountpoint / "new", b"n" * MIB)
    disks.attach("r1")
    node.with_name("away").rename(node)
    eventually(lambda: healthy(store))
