"""Small, unequal file systems below one directory, and a store on them.

They are ext4 on loop devices, and tmpfs.  A region is a directory of a file system.  Several
regions, and STORE, may share one.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from support.mounted_store import COMMAND_SECONDS_MAX, Store, is_mounted

MIB = 1 << 20
DAEMON_FOLDER = Path(__file__).parent / "ordinary_daemon"
BAD_SECTORS_SOURCE = Path(__file__).parent / "bad_sectors.c"


def run(*command: str | Path) -> str:
    """Run a command; its output; OSError."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX
    )
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr}")
    return done.stdout.strip()


@dataclass
class Device:
    """A file system."""

    place: Path
    kind: str
    """ext4 or tmpfs."""
    mib: int
    inodes: int
    loop: str = ""

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def image(self) -> Path:
        """The file below the loop device."""
        return self.place.with_name(f"{self.name}.image")

    def make(self) -> None:
        """Make it, and mount it."""
        self.place.mkdir()
        if self.kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", f"size={self.mib}m,nr_inodes={self.inodes}", "none",
                self.place)  # fmt: skip
            return
        with self.image.open("wb") as file:
            file.truncate(self.mib * MIB)
        run("mkfs.ext4", "-q", "-m", "0", "-N", str(self.inodes), self.image)
        self.attach()

    def attach(self) -> None:
        """Mount an ext4."""
        self.loop = run("losetup", "--find", "--show", self.image)
        run("mount", "-o", "errors=remount-ro", self.loop, self.place)

    def detach(self) -> None:
        """Unmount an ext4, which nobody may use; OSError."""
        run("umount", self.place)
        run("losetup", "--detach", self.loop)
        self.loop = ""

    def fail(self) -> None:
        """Have the kernel treat an ext4 as it does after an error of its disk."""
        Path(f"/sys/fs/ext4/{Path(self.loop).name}/trigger_fs_error").write_text("1")

    def end(self) -> None:
        """Unmount it whatever happened."""
        subprocess.run(["fsfreeze", "--unfreeze", self.place], capture_output=True)
        if is_mounted(self.place):
            subprocess.run(["umount", "--lazy", self.place], check=False)
        if self.loop:
            subprocess.run(["losetup", "--detach", self.loop], check=False)


@dataclass
class World:
    """The file systems, the store, and where its nodes are."""

    top: Path
    code: str
    devices: list[Device]
    nodes: dict[str, Device]
    """By node, which is named as its region."""
    meta: Device
    has_bad_sectors: bool
    """Whether reads of the daemon can fail (bad_sectors.c); it has no io_uring then."""
    clock: Path = field(init=False)
    store: Store = field(init=False)
    bears: int = field(init=False)
    """How many regions may be lost."""

    def __post_init__(self) -> None:
        data, parity = map(int, self.code.split("+"))
        self.bears = parity // -(-(data + parity) // len(self.nodes))
        self.clock = self.top / "clock"
        self.set_clock(0)

    @property
    def bad_sectors(self) -> Path | None:
        """The file that lists them."""
        return self.top / "bad" if self.has_bad_sectors else None

    def surroundings(self) -> dict[str, str]:
        """The environment of the daemon."""
        found = {"PYTHONPATH": str(DAEMON_FOLDER), "TEST_CLOCK": str(self.clock)}
        if self.bad_sectors is not None:
            library = self.top / "bad_sectors.so"
            run("gcc", "-O1", "-shared", "-fPIC", "-o", library, BAD_SECTORS_SOURCE, "-ldl")
            self.bad_sectors.write_text("")
            found |= {"LD_PRELOAD": str(library), "BAD_SECTORS": str(self.bad_sectors)}
        return found

    def __str__(self) -> str:
        devices = [f"{d.name} {d.kind} {d.mib} MiB, {d.inodes} inodes" for d in self.devices]
        places = [f"{name} on {device.name}" for name, device in self.nodes.items()]
        parts = [self.code, *devices, ", ".join(places), f"STORE on {self.meta.name}"]
        return "; ".join([*parts, *(["bad sectors"] if self.has_bad_sectors else [])])

    def node(self, name: str) -> Path:
        """The directory of a node."""
        return self.nodes[name].place / name

    def on(self, device: Device) -> frozenset[str]:
        """The nodes on a file system."""
        return frozenset(name for name, other in self.nodes.items() if other is device)

    def set_clock(self, seconds: float) -> None:
        """Let the clock of the daemon be off."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:
            file.write(struct.pack("<d", seconds))

    def make(self) -> None:
        """Make the file systems, and the store."""
        for device in self.devices:
            device.make()
        options: list[str | Path] = ["--code", self.code]
        for name in self.nodes:
            options += ["--region", f"{name}={self.node(name)}"]
        self.store = Store(self.meta.place, *options)
        self.store.mountpoint.rmdir()
        self.store.mountpoint = self.top / "mnt"  # not on a device that is unmounted below it
        self.store.mountpoint.mkdir()

    def end(self) -> None:
        """Unmount all, whatever happened."""
        for device in self.devices:
            device.end()

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self.store.daemon_pid is not None
        return self.store.daemon_pid

    def stop(self) -> None:
        """Let the daemon stand still."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def cut_power(self) -> None:
        """Leave what the block devices were given, of ext4 everywhere; no daemon, all attached."""
        self.stop()
        time.sleep(0.05)  # what the kernel was given already goes on
        for device in self.devices:
            run("cp", "--sparse=always", device.image, device.image.with_suffix(".cut"))
        self.store.kill()
        for device in self.devices:
            device.detach()
            device.image.with_suffix(".cut").replace(device.image)
            device.attach()


def choose_world(top: Path, chance: random.Random) -> World:
    """Choose file systems, and what lies on which."""
    top.mkdir()
    regions = ["r0", "r1", "r2"]
    layout = chance.choice(["each", "each", "one", "two", "four"])
    bad = chance.random() < 0.5
    kinds = chance.choice([["ext4"], ["ext4"], ["tmpfs"], ["ext4", "tmpfs"]])

    def device(name: str, mib: int) -> Device:
        return Device(top / name, chance.choice(kinds), mib, chance.choice([400, 2000, 5000]))

    match layout:
        case "one":
            only = device("d0", chance.randrange(330, 500))
            code = chance.choice(["2+1", "1+2"])
            return World(top, code, [only], dict.fromkeys(regions, only), only, bad)
        case "two":
            large, small = device("d0", chance.randrange(260, 400)), device("d1", 180)
            nodes, meta = {"r0": large, "r1": large, "r2": small}, chance.choice([large, small])
            return World(top, "2+1", [large, small], nodes, meta, bad)
        case "four":
            regions.append("r3")
    each = [device(f"d{i}", chance.randrange(150, 300)) for i in range(len(regions))]
    meta = device("meta", 200)
    code = chance.choice(["2+1", "2+1", "1+2"] if len(regions) == 3 else ["2+2", "3+1"])
    return World(top, code, [*each, meta], dict(zip(regions, each, strict=True)), meta, bad)
