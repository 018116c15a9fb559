"""A power cut on real file systems: only what block devices were given is left.

Each region, and the metadata, is an ext4 on a loop device.  While the daemon is
stopped the files behind the devices are copied; what only the page cache had is
not in them, and the copies come up by the journals of ext4, as after a cut.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.loop_devices import Disks
from support.mounted_store import Store

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

BLOCK, SLOTS = 4096, 1024
DEVICE_BYTES = {"meta": 600 << 20, "r0": 400 << 20, "r1": 400 << 20, "r2": 400 << 20}

WRITER = """
import mmap, os, random, struct, sys
path, told, seed, start = sys.argv[1:]
chance = random.Random(seed)
with open(told, "r+b") as file:
    acknowledged = mmap.mmap(file.fileno(), 0)
descriptor = os.open(path, os.O_RDWR)
number = int(start)
while True:
    number += 1
    slot = chance.randrange(len(acknowledged) // 8)
    value = struct.pack("<Q", number)
    os.pwrite(descriptor, value * 512, 4096 * slot)
    os.fdatasync(descriptor)
    acknowledged[8 * slot : 8 * slot + 8] = value
"""


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    disks = Disks(tmp_path / "disks")
    disks.top.mkdir()
    try:
        disks.run("losetup", "--find")
    except OSError as error:
        pytest.skip(f"there are no loop devices: {error}")
    yield disks
    disks.detach()


@pytest.fixture
def make(disks: Disks) -> Iterator[Callable[[], Store]]:
    """A function that makes a store on the disks; it ends before they do."""
    made: list[Store] = []

    def make() -> Store:
        disks.make(DEVICE_BYTES)
        nodes = [f"{name}={disks.top / name / 'node'}" for name in ("r0", "r1", "r2")]
        made.append(Store(disks.top / "meta", *(x for node in nodes for x in ("--region", node))))
        return made[-1]

    yield make
    for store in made:
        store.clean_up()


@pytest.mark.timeout(600)
def test_what_was_synced_is_there_after_a_power_cut(
    disks: Disks,
    make: Callable[[], Store],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    long: bool,
) -> None:
    seed = request.config.getoption("--model-seed")
    print("seed", seed)
    chance = random.Random(seed)
    store = make()
    told, file = tmp_path / "acknowledged", store.mountpoint / "file"
    told.write_bytes(bytes(8 * SLOTS))
    store.mount()
    file.write_bytes(bytes(BLOCK * SLOTS))
    with file.open("rb") as synced:
        os.fsync(synced.fileno())
    for turn in range(20 if long else 2):
        options = [str(file), str(told), f"{seed}/{turn}", str(turn * 1_000_000)]
        writer = subprocess.Popen([sys.executable, "-c", WRITER, *options])
        try:
            time.sleep(0.5 + 2 * chance.random())
            assert writer.poll() is None
            assert store.daemon_pid is not None
            os.kill(store.daemon_pid, signal.SIGSTOP)
            time.sleep(0.05)  # what the kernel was given already goes on
            acknowledged = [value for (value,) in struct.iter_unpack("<Q", told.read_bytes())]
            for name in DEVICE_BYTES:
                cut = disks.top / f"{name}.cut"
                disks.run("cp", "--sparse=always", disks.image(name), cut)
        finally:
            store.kill()
            writer.kill()
            writer.wait()
        assert max(acknowledged) > turn * 1_000_000
        disks.detach()
        lost = chance.choice(["r0", "r1", "r2", None])
        for name in DEVICE_BYTES:
            (disks.top / f"{name}.cut").replace(disks.image(name))
            if name != lost:
                disks.attach(name)
        store.mount()
        found = file.read_bytes()
        for slot, number in enumerate(acknowledged):
            block = found[BLOCK * slot : BLOCK * (slot + 1)]
            (value,) = struct.unpack_from("<Q", block)
            assert block == struct.pack("<Q", value) * 512
            assert value >= number, (turn, lost, slot)
        if lost is not None:
            disks.attach(lost)
            store.cli("repair", store.store, lost)
        store.remount()
