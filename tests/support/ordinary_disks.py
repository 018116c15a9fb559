"""Events of the campaign of ordinary life: disks are full, stand still, fail and rot.

Each is a function of a `Life`, which returns whether it could happen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from support.disks import fill
from support.ordinary_life import ANSWER_SECONDS, Cause, Life, device_of, some_node
from support.ordinary_model import FILL_BLOCK, FILLER, BrokenPromiseError, in_time
from support.ordinary_world import Device, run
from support.posixly import read_uncached

FULL = frozenset({errno.ENOSPC})
SECTOR_BYTES = 4096


def fill_from_inside(life: Life) -> bool:
    """A user writes until the store is full."""
    path = life.world.store.mountpoint / FILLER
    if len(life.hurt) > life.world.bears or life.tolerated:
        return False

    def write() -> tuple[int, int]:
        written, number = 0, 0
        with path.open("wb", buffering=0) as file:
            try:
                while True:
                    written += file.write(FILL_BLOCK)
            except OSError as error:
                number = error.errno or 0
            try:
                os.fsync(file.fileno())
            except OSError as error:
                return written, error.errno or 0
        return written, number

    written, number = in_time(ANSWER_SECONDS, "filling the store", write)
    if number != errno.ENOSPC:
        raise BrokenPromiseError(f"filling ended with {errno.errorcode[number]}")
    life.model.acknowledged()

    def delete() -> None:
        def body() -> None:
            data = read_uncached(path)
            if data != (FILL_BLOCK * (len(data) // len(FILL_BLOCK) + 1))[: len(data)]:
                raise BrokenPromiseError("wrong bytes in the file that filled the store")
            path.unlink()

        in_time(ANSWER_SECONDS, "deleting the filler", body)

    life.add(Cause(f"the store is full after {written >> 20} MiB", errors=FULL, undo=delete))
    return True


def _filled(life: Life, device: Device, what: str, write: Callable[[Path], None]) -> bool:
    folder = device.place / "others"
    if folder.exists():
        return False
    try:
        folder.mkdir()
    except OSError:
        return False  # it is full, or read-only
    write(folder)

    def undo() -> None:
        shutil.rmtree(folder)
        run("sync", "--file-system", str(device.place))  # or an error brings them back

    life.add(Cause(f"{what} of {device.name}", errors=FULL, undo=undo))
    return True


def fill_from_outside(life: Life) -> bool:
    """Another program fills a disk to the last byte."""
    device = device_of(life)
    assert device is not None
    return _filled(life, device, "others took all bytes", lambda folder: fill(folder / "data"))


def take_all_inodes(life: Life) -> bool:
    """Another program takes the last inode of a disk."""

    def write(folder: Path) -> None:
        with contextlib.suppress(OSError):
            for number in range(10_000):
                (folder / f"{number}").touch()

    device = device_of(life)
    assert device is not None
    return _filled(life, device, "others took all inodes", write)


def freeze(life: Life) -> bool:
    """A backup tool freezes a file system for a while."""
    device = device_of(life, ("ext4",))
    if device is None:
        return False
    seconds = life.pause()
    try:
        run("fsfreeze", "--freeze", device.place)
    except OSError:
        return False  # it is read-only
    life.note(f"{device.name} is frozen for {seconds} s")

    def thaw() -> None:
        time.sleep(seconds)
        run("fsfreeze", "--unfreeze", device.place)

    life.work(12, thaw)
    return True


def turn_read_only(life: Life) -> bool:
    """A file system finds an error of its disk and turns read-only; later it is checked."""
    device = device_of(life, ("ext4",))
    if device is None or device is life.world.meta or life.hurt or life.tolerated:
        return False
    nodes = life.world.on(device)
    device.fail()
    life.add(
        Cause(f"{device.name} is read-only", nodes, undo=lambda: _check_disk(life, device, nodes))
    )
    life.work(6)
    return True


def _check_disk(life: Life, device: Device, nodes: frozenset[str]) -> None:
    """What an operator does with a disk that is read-only, while the store is mounted or not."""
    store = str(life.world.store.store)
    force = ["--force"] if len(nodes) > life.world.bears else []
    for name in sorted(nodes):
        if life.cli("node", "offline", store, name, *force).returncode:
            raise BrokenPromiseError(f"{name} cannot be taken offline")
    try:
        device.detach()
    except OSError as busy:
        raise BrokenPromiseError(f"{busy}; open: {life.open_files(device)}") from busy
    subprocess.run(["e2fsck", "-fy", device.image], capture_output=True, check=False)
    device.attach()
    for name in sorted(nodes):
        if life.cli("node", "online", store, name).returncode not in (0, 1):
            raise BrokenPromiseError(f"{name} cannot be taken online")


def bad_sector(life: Life) -> bool:
    """A sector of a segment cannot be read, until the disk has another in its place."""
    name, bad = some_node(life), life.world.bad_sectors
    if bad is None or life.hurt:
        return False
    folder = life.chance.choice(["journal", "shards"])
    segments = [p for p in sorted((life.world.node(name) / folder).iterdir()) if p.stat().st_size]
    if not segments:
        return False
    path = life.chance.choice(segments)
    size = len(path.read_bytes().rstrip(b"\0")) or 1
    start = life.chance.randrange(size) // SECTOR_BYTES * SECTOR_BYTES
    kept = path.open("rb")  # else another file may get the inode's number
    about = path.stat()
    bad.write_text(f"{about.st_dev} {about.st_ino} {start} {start + SECTOR_BYTES}\n")

    def replace() -> None:
        bad.write_text("")
        kept.close()

    life.to_scrub = True
    life.add(
        Cause(
            f"{name}/{folder}/{path.name} cannot be read at {start}",
            frozenset({name}),
            undo=replace,
            destroys=True,
        )
    )
    return True


def _flip(path: Path, chance: random.Random) -> str:
    with path.open("r+b") as file:
        data = file.read()
        used = len(data.rstrip(b"\0")) or len(data)
        at = chance.randrange(used)
        file.seek(at)
        file.write(bytes([data[at] ^ 1 << chance.randrange(8)]))
    return f"a bit of {path.parent.name}/{path.name} is flipped at {at}"


def flip_in_node(life: Life) -> bool:
    """A bit flips in a segment of a node."""
    name = some_node(life)
    if life.hurt:
        return False
    folder = life.chance.choice(["journal", "shards"])
    segments = [p for p in sorted((life.world.node(name) / folder).iterdir()) if p.stat().st_size]
    if not segments:
        return False
    what = _flip(life.chance.choice(segments), life.chance)
    life.to_scrub = True
    life.add(Cause(f"{name}: {what}", frozenset({name}), destroys=True))
    return True


def flip_in_metadata(life: Life) -> bool:
    """A bit flips in the database while the store is not mounted."""
    if life.hurt or life.tolerated:
        return False
    life.umount()
    life.note(_flip(life.world.store.store / "metadata" / "data.mdb", life.chance))
    life.mount()
    life.compare(crashed=False)
    return True


EVENTS = (
    fill_from_inside,
    fill_from_outside,
    take_all_inodes,
    freeze,
    turn_read_only,
    bad_sector,
    flip_in_node,
    flip_in_metadata,
)
