"""The events of the campaign of ordinary life.

Each is a function of a `Life`, which returns whether it could happen.  What it makes wrong is a
`Cause`, which goes later; what it destroys it names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from support.disks import fill
from support.ordinary_life import ANSWER_SECONDS, Cause, Life, remove
from support.ordinary_model import FILL_BLOCK, FILLER, BrokenPromiseError, in_time, sync
from support.ordinary_world import Device, run
from support.posixly import read_uncached

FULL = frozenset({errno.ENOSPC})
DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.EIO})
Event = Callable[[Life], bool]
EVENTS: dict[str, Event] = {}


def event(function: Event) -> Event:
    """Put an event on the list."""
    EVENTS[function.__name__] = function
    return function


def some_node(life: Life) -> str:
    """Choose a node."""
    return life.chance.choice(sorted(life.world.nodes))


def device_of(life: Life, kinds: tuple[str, ...] = ("ext4", "tmpfs")) -> Device | None:
    """Choose a file system of some kind."""
    devices = [device for device in life.world.devices if device.kind in kinds]
    return life.chance.choice(devices) if devices else None


def on(life: Life, device: Device) -> frozenset[str]:
    """The nodes on a file system."""
    return frozenset(name for name, other in life.world.nodes.items() if other is device)


# --- full disks ---------------------------------------------------------------------


@event
def fill_from_inside(life: Life) -> bool:
    """A user writes until the store is full."""
    path = life.world.store.mountpoint / FILLER

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
    if number not in {errno.ENOSPC, *life.tolerated}:
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
    life.add(Cause(f"{what} of {device.name}", errors=FULL, undo=lambda: shutil.rmtree(folder)))
    return True


@event
def fill_from_outside(life: Life) -> bool:
    """Another program fills a disk to the last byte."""
    device = device_of(life)
    assert device is not None
    return _filled(life, device, "others took all bytes", lambda folder: fill(folder / "data"))


@event
def take_all_inodes(life: Life) -> bool:
    """Another program takes the last inode of a disk."""

    def write(folder: Path) -> None:
        with contextlib.suppress(OSError):
            for number in range(10_000):
                (folder / f"{number}").touch()

    device = device_of(life)
    assert device is not None
    return _filled(life, device, "others took all inodes", write)


# --- time ------------------------------------------------------------------------------


@event
def freeze(life: Life) -> bool:
    """A backup tool freezes a file system for a while."""
    device = device_of(life, ("ext4",))
    if device is None:
        return False
    seconds = life.chance.choice([0.1, 1, 3])
    life.note(f"{device.name} is frozen for {seconds} s")
    run("fsfreeze", "--freeze", device.place)

    def thaw() -> None:
        time.sleep(seconds)
        run("fsfreeze", "--unfreeze", device.place)

    life.work(12, thaw)
    return True


@event
def stand_still(life: Life) -> bool:
    """The daemon is stopped for a while, as by a debugger or a container that is paused."""
    seconds = life.chance.choice([0.1, 1, 3])
    life.note(f"the daemon stands still for {seconds} s")
    life.world.stop()

    def go_on() -> None:
        time.sleep(seconds)
        life.world.go_on()

    life.work(12, go_on)
    return True


@event
def set_clock(life: Life) -> bool:
    """The clock of the day is set, back or ahead, and corrected later."""
    seconds = life.chance.choice([-3600.0, -86400.0 * 400, 7200.0, 86400.0 * 50])
    life.world.set_clock(seconds)
    life.add(Cause(f"the clock is off by {seconds:.0f} s", undo=lambda: life.world.set_clock(0)))
    return True


# --- the life of the daemon ----------------------------------------------------------------


@event
def kill(life: Life) -> bool:
    """The daemon is killed."""
    if any(cause.errors for cause in life.causes):
        return False  # a mount in want of room is an event of its own
    seconds = life.chance.random()
    life.note(f"kill -9 after {seconds:.1f} s")

    def strike() -> None:
        time.sleep(seconds)
        life.world.store.kill(clear=False)

    life.work(25, strike, DEAD)
    if len(life.hurt) <= life.world.bears:
        life.mount()
        life.compare(crashed=True)
    return True


@event
def cut_power(life: Life) -> bool:
    """The machine loses power: only what the disks were given is left."""
    if life.causes or any(device.kind != "ext4" for device in life.world.devices):
        return False
    life.note("power cut")
    life.work(10)
    life.world.cut_power()
    life.mount()
    life.compare(crashed=True)
    return True


@event
def remount(life: Life) -> bool:
    """The store is unmounted and mounted."""
    if len(life.hurt) > life.world.bears or life.tolerated:
        return False
    life.umount()
    life.mount()
    life.compare(crashed=False)
    return True


@event
def end_by_signal(life: Life) -> bool:
    """SIGTERM."""
    if life.tolerated:
        return False
    life.note("SIGTERM")
    life.world.store.end_by(signal.SIGTERM)
    life.model.acknowledged()
    life.mount()
    life.compare(crashed=False)
    return True


@event
def second_daemon(life: Life) -> bool:
    """Somebody removes the lock file, perhaps, and mounts the store once more."""
    lock = life.world.store.store / "fusestore.lock"
    if life.chance.random() < 0.5:
        lock.unlink(missing_ok=True)
        life.note("the lock file is removed")
    other = life.world.top / "other"
    other.mkdir(exist_ok=True)
    done = life.cli("mount", str(life.world.store.store), str(other))
    if done.returncode == 0:
        subprocess.run(["fusermount3", "-uz", other])
        raise BrokenPromiseError("the store is mounted twice")
    return True


@event
def few_descriptors(life: Life) -> bool:
    """The daemon gets few descriptors for a while."""
    pid = life.world.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{pid}/fd"))
    few = used + life.chance.choice([0, 1, 3, 10])
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, limits[1]))
    life.note(f"the daemon may have {few} descriptors, of which it has {used}")
    try:
        life.work(15)
    finally:
        if life.world.store.alive():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    return True


@event
def little_address_space(life: Life) -> bool:
    """The store is mounted with a small address space."""
    if life.causes:
        return False
    life.umount()
    gib = life.chance.choice([2, 4, 16])
    life.note(f"mounted with an address space of {gib} GiB")
    resource_before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (gib << 30, resource_before[1]))
    try:
        life.mount()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, resource_before)
    life.work(10)
    life.compare(crashed=False)
    life.umount()
    life.mount()
    return True


# --- nodes that move --------------------------------------------------------------------------


@event
def move_away(life: Life) -> bool:
    """The directory of a node is moved away, and back later."""
    name = some_node(life)
    path = life.world.node(name)
    away = path.with_name(f"{name}.away")
    if name in life.hurt or not life.may_lose(frozenset({name})):
        return False
    path.rename(away)

    def back() -> None:
        if path.exists():  # nobody may have made it anew
            raise BrokenPromiseError(f"{path} was made while the node was away")
        away.rename(path)

    life.add(Cause(f"{name} is moved away", frozenset({name}), undo=back))
    life.must_notice(name)
    return True


@event
def move_several_away(life: Life) -> bool:
    """More nodes are away at a time than the code bears, for a while: a cable is pulled."""
    if life.hurt or life.tolerated:
        return False
    count = life.chance.randrange(life.world.bears + 1, len(life.world.nodes) + 1)
    names = sorted(life.chance.sample(sorted(life.world.nodes), count))
    paths = [life.world.node(name) for name in names]
    for path in paths:
        path.rename(path.with_name(f"{path.name}.away"))

    def back() -> None:
        for path in paths:
            path.with_name(f"{path.name}.away").rename(path)

    life.add(Cause(f"{', '.join(names)} are moved away", frozenset(names), undo=back))
    life.work(6)
    for name in names:
        life.must_notice(name)
    return True


@event
def turn_read_only(life: Life) -> bool:
    """A file system finds an error of its disk and turns read-only; later it is checked."""
    device = device_of(life, ("ext4",))
    if device is None or device is life.world.meta or life.hurt or life.tolerated:
        return False
    nodes = on(life, device)
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
    device.detach()
    subprocess.run(["e2fsck", "-fy", device.image], capture_output=True, check=False)
    device.attach()
    for name in sorted(nodes):
        if life.cli("node", "online", store, name).returncode not in (0, 1):
            raise BrokenPromiseError(f"{name} cannot be taken online")


@event
def take_offline(life: Life) -> bool:
    """A node is offline for a while, as for a new cable."""
    name, store = some_node(life), str(life.world.store.store)
    if name in life.hurt or not life.may_lose(frozenset({name})) or life.tolerated:
        return False
    if life.cli("node", "offline", store, name).returncode:
        raise BrokenPromiseError(f"{name} cannot be taken offline")

    def online() -> None:
        if life.cli("node", "online", store, name).returncode not in (0, 1):
            raise BrokenPromiseError(f"{name} cannot be taken online")

    life.add(Cause(f"{name} is offline", frozenset({name}), undo=online))
    return True


@event
def mount_read_only(life: Life) -> bool:
    """The store is mounted with -o ro for a while."""
    if life.hurt or life.causes:
        return False
    life.umount()
    life.mount("ro")
    life.compare(crashed=False)
    life.umount()
    life.mount()
    return True


@event
def ask(life: Life) -> bool:
    """Somebody asks about everything while there is trouble."""
    store = str(life.world.store.store)
    for words in (["status"], ["risk"], ["fsck"], ["node", "list"], ["scrub", store, "status"]):
        done = life.cli(*words, *([store] if store not in words else []))
        if done.returncode not in (0, 1):
            raise BrokenPromiseError(f"{words} fails")
    return True


@event
def scrub_in_trouble(life: Life) -> bool:
    """A scrub runs while there is trouble."""
    gone = {name for cause in life.causes for name in cause.nodes if not cause.destroys}
    if len(life.hurt) > life.world.bears or life.tolerated:
        return False
    done = life.cli("scrub", str(life.world.store.store), "start", "--wait", "--quiet")
    if done.returncode not in (0, 1) or (gone and done.returncode == 0):
        raise BrokenPromiseError(f"scrub says {done.returncode} while {gone} are not there")
    return True


def copied(source: Path, target: Path) -> None:
    """Copy a directory as a careful operator does."""
    run("cp", "-a", "--sparse=always", source, target)
    run("sync", "--file-system", target)


@event
def move_copy(life: Life) -> bool:
    """A node is copied, as to another disk, and the copy takes its place."""
    name = some_node(life)
    path = life.world.node(name)
    if name in life.hurt or life.tolerated or len(life.hurt) >= life.world.bears:
        return False
    life.umount()
    copy = life.world.top / "copy"
    run("cp", "-a", "--sparse=always", path, copy)
    remove(path)
    copied(copy, path)
    remove(copy)
    life.note(f"{name} is a copy")
    life.mount()
    life.compare(crashed=False)
    return True


@event
def swap(life: Life) -> bool:
    """Two nodes are swapped while the store is not mounted."""
    if life.hurt or life.tolerated:
        return False
    one, two = life.chance.sample(sorted(life.world.nodes), 2)
    first, second = life.world.node(one), life.world.node(two)
    if life.world.nodes[one] is not life.world.nodes[two]:
        return False  # a rename does not reach another file system
    life.umount()

    def exchange() -> None:
        first.rename(first.with_name("swapped"))
        second.rename(first)
        first.with_name("swapped").rename(second)

    exchange()
    life.note(f"{one} and {two} are swapped")
    done = life.world.store.try_mount()
    life.note(f"mount: {done.returncode} {done.stderr.strip()[:500]}")
    if done.returncode == 0:
        if life.world.bears < 2:
            raise BrokenPromiseError(
                "it was mounted although two nodes are not what they are to be"
            )
        life.compare(crashed=False)
        life.umount()
    exchange()
    life.mount()
    life.compare(crashed=False)
    return True


@event
def wipe(life: Life) -> bool:
    """A node is lost, or a part of it."""
    name = some_node(life)
    path = life.world.node(name)
    if name in life.hurt or not life.may_lose(frozenset({name})):
        return False
    what = life.chance.choice(["", "", "shards", "journal", "segment", "node.toml"])
    if what == "segment":
        segments = sorted((path / "shards").iterdir())
        if not segments:
            return False
        what = f"shards/{life.chance.choice(segments).name}"
    target = path / what
    if target.is_dir():
        remove(target)
    else:
        target.unlink()
    life.to_scrub |= bool(what)
    life.add(Cause(f"{name}/{what} is lost", frozenset({name}), destroys=True))
    if not what:
        life.must_notice(name)
    return True


@event
def keep_copy(life: Life) -> bool:
    """Somebody copies a node or the database, for a restore at a later moment."""
    if life.hurt or life.causes:
        return False
    what = life.chance.choice(["metadata", some_node(life)])
    source = life.world.store.store / what if what == "metadata" else life.world.node(what)
    copy = life.world.top / f"kept-{what}"
    remove(copy)
    life.world.stop()
    try:
        run("cp", "-a", "--sparse=always", source, copy)
    finally:
        life.world.go_on()
    life.kept[what] = copy
    life.note(f"{what} is copied")
    return True


def _put_back(copy: Path, target: Path) -> None:
    remove(target)
    copied(copy, target)


@event
def restore_node(life: Life) -> bool:
    """A node is restored from a copy of an earlier moment."""
    names = sorted(set(life.kept) - {"metadata"})
    if not names or life.hurt or life.tolerated:
        return False
    name = life.chance.choice(names)
    mounted = life.chance.random() < 0.5
    if not mounted:
        life.umount()
    _put_back(life.kept[name], life.world.node(name))
    life.add(Cause(f"{name} is restored from a copy", frozenset({name}), destroys=True))
    if not mounted:
        life.mount()
        life.compare(crashed=False)
    return True


@event
def restore_metadata(life: Life) -> bool:
    """The database is restored from a copy of an earlier moment."""
    if "metadata" not in life.kept or life.hurt or life.causes:
        return False
    crashed = life.chance.random() < 0.3
    if crashed:
        life.world.store.kill()
    else:
        life.umount()
    _put_back(life.kept["metadata"], life.world.store.store / "metadata")
    life.note("the database is restored from a copy")
    names = sorted(set(life.kept) - {"metadata"})
    if names and life.chance.random() < 0.4:
        name = life.chance.choice(names)
        _put_back(life.kept[name], life.world.node(name))
        life.add(Cause(f"{name} is restored from a copy", frozenset({name}), destroys=True))
    life.mount()
    life.compare(crashed=crashed)
    return True


# --- damage -------------------------------------------------------------------------------------


def _flip(path: Path, chance: random.Random) -> str:
    with path.open("r+b") as file:
        data = file.read()
        used = len(data.rstrip(b"\0")) or len(data)
        at = chance.randrange(used)
        file.seek(at)
        file.write(bytes([data[at] ^ 1 << chance.randrange(8)]))
    return f"a bit of {path.parent.name}/{path.name} is flipped at {at}"


@event
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


@event
def flip_in_metadata(life: Life) -> bool:
    """A bit flips in the database while the store is not mounted."""
    if life.hurt or life.tolerated:
        return False
    life.umount()
    life.note(_flip(life.world.store.store / "metadata" / "data.mdb", life.chance))
    life.mount()
    life.compare(crashed=False)
    return True


# --- operators who do too much --------------------------------------------------------------------


@event
def needless_repair(life: Life) -> bool:
    """Somebody repairs a node that lacks nothing."""
    if life.causes:
        return False
    store = str(life.world.store.store)
    if life.cli("repair", store, some_node(life), "--quiet").returncode:
        raise BrokenPromiseError("a repair of a node that lacks nothing failed")
    return True


@event
def needless_fsck(life: Life) -> bool:
    """Somebody runs `fsck --repair` on a store that is well, and first while it is mounted."""
    if life.causes or life.damaged:
        return False
    store = str(life.world.store.store)
    if life.cli("fsck", store, "--repair").returncode != 2:
        raise BrokenPromiseError("fsck --repair of a mounted store was not refused")
    life.umount()
    if life.cli("fsck", store, "--repair").returncode:
        raise BrokenPromiseError("fsck found something")
    life.mount()
    life.compare(crashed=False)
    return True


@event
def lose_metadata(life: Life) -> bool:
    """The database is lost, perhaps together with a node, and is recovered."""
    if life.hurt or life.tolerated:
        return False
    crashed = life.chance.random() < 0.5
    if crashed:
        life.work(10)
        life.world.store.kill()
    else:
        life.umount()
    remove(life.world.store.store / "metadata")
    life.note(f"the database is removed after {'a kill' if crashed else 'an umount'}")
    if life.chance.random() < 0.4:
        name = some_node(life)
        remove(life.world.node(name))
        life.add(Cause(f"{name} is lost", frozenset({name}), destroys=True))
    life.mount()
    life.compare(crashed=crashed)
    return True


@event
def unlink_files_of_store(life: Life) -> bool:
    """Somebody removes the log and the socket."""
    for name in ("fusestore.log", "control.sock"):
        if life.chance.random() < 0.5:
            (life.world.store.store / name).unlink(missing_ok=True)
            life.note(f"{name} is removed")
    if life.causes or life.hurt:
        return True
    life.world.store.end_by(signal.SIGTERM)
    life.model.acknowledged()
    life.mount()
    life.compare(crashed=False)
    return True


@event
def drill(life: Life) -> bool:
    """Somebody asks whether a region could be lost."""
    if life.hurt or life.tolerated:
        return False
    sync(life.world.store.mountpoint)
    life.model.acknowledged()
    store = str(life.world.store.store)
    if life.cli("drill", store, "--lose", some_node(life), "--all", "--quiet").returncode:
        raise BrokenPromiseError("a region could not be lost")
    return True
