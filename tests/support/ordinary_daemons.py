"""Events of the campaign of ordinary life: what happens to the daemon and its machine.

Each is a function of a `Life`, which returns whether it could happen.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time

from support.ordinary_life import Cause, Life
from support.ordinary_model import BrokenPromiseError

DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.EIO})


def stand_still(life: Life) -> bool:
    """The daemon is stopped for a while, as by a debugger or a container that is paused."""
    seconds = life.pause()
    life.note(f"the daemon stands still for {seconds} s")
    life.world.stop()

    def go_on() -> None:
        time.sleep(seconds)
        life.world.go_on()

    life.work(12, go_on)
    return True


def set_clock(life: Life) -> bool:
    """The clock of the day is set, back or ahead, and corrected later."""
    seconds = life.chance.choice([-3600.0, -86400.0 * 400, 7200.0, 86400.0 * 50])
    life.world.set_clock(seconds)
    life.add(Cause(f"the clock is off by {seconds:.0f} s", undo=lambda: life.world.set_clock(0)))
    return True


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


def remount(life: Life) -> bool:
    """The store is unmounted and mounted."""
    if len(life.hurt) > life.world.bears or life.tolerated:
        return False
    life.umount()
    life.mount()
    life.compare(crashed=False)
    return True


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


def unlink_files_of_store(life: Life) -> bool:
    """Somebody removes the log and the socket; without it nobody can ask, but all goes on."""
    if life.causes or life.hurt:
        return False
    store = life.world.store
    for name in ("fusestore.log", "control.sock"):
        (store.store / name).unlink(missing_ok=True)
    life.note("the log and the socket are removed")
    life.work(6)
    done = life.cli("status", str(store.store))
    if done.returncode != 3 or "in use" not in done.stderr:
        raise BrokenPromiseError("status answers without a socket")
    if life.chance.random() < 0.5:
        life.umount()
    else:
        store.end_by(signal.SIGTERM)
        life.model.acknowledged()
    life.mount()
    life.compare(crashed=False)
    return True


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


EVENTS = (
    stand_still,
    set_clock,
    kill,
    cut_power,
    remount,
    mount_read_only,
    end_by_signal,
    second_daemon,
    unlink_files_of_store,
    few_descriptors,
    little_address_space,
)
