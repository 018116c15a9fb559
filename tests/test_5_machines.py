"""Two machines share the nodes' directories, and no lock of one reaches the other.

Both are daemons of this machine with names of their own (support/other_machine), each with
its own copy of the store's directory.  One writes all the time; the other takes its nodes,
while the first runs, stands still, is slow, or has ended.  The seed repeats the events and
the delays, not how the two interleave.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.mounted_store import FUSESTORE, REPOSITORY

pytestmark = pytest.mark.mounted

ROUNDS, ROUNDS_LONG = 9, 200
SEAM = REPOSITORY / "tests" / "support" / "other_machine"
SIZES = (100, 5_000, 70_000, 70_000, 1_500_000)
EVENTS = ("runs", "stopped", "resumes", "slow", "slower", "killed", "crashed", "ended", "removed")


@dataclass
class Machine:
    """A machine: its store's directory, its mount, and its daemon."""

    name: str
    store: Path
    mountpoint: Path
    network: bool = False
    """Whether it takes the nodes for places on a network file system."""

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TEST_MACHINE": self.name}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (REPOSITORY, SEAM)))
        if self.network:
            environment["TEST_NETWORK"] = "1"
        return subprocess.run(
            [*FUSESTORE, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=180,
            env=environment,
        )

    def mount(self, *options: str) -> subprocess.CompletedProcess[str]:
        chosen = ["-o", ",".join(options)] if options else []
        return self.run("mount", self.store, self.mountpoint, *chosen)

    def must_mount(self, *options: str) -> None:
        """Mount the store, and do what the mount advises if its metadata became too old."""
        done = self.mount(*options)
        if "which no node holds" in done.stderr:
            metadata = self.store / "metadata"
            metadata.rename(self.store / f"metadata-{time.monotonic_ns()}")
            recovered = self.run("recover", self.store)
            assert recovered.returncode == 0, recovered.stderr
            done = self.mount(*options)
        assert done.returncode == 0, done.stderr

    def must_be_refused(self) -> None:
        done = self.mount()
        assert done.returncode != 0
        assert "on another machine" in done.stderr, done.stderr
        assert "-o take_over" in done.stderr
        assert not os.path.ismount(self.mountpoint)

    @property
    def files(self) -> Path:
        """A directory in the store, which is not beneath the mount."""
        return self.mountpoint / "files"

    @property
    def daemon(self) -> int:
        return int((self.store / "fusestore.lock").read_text())

    def umount(self) -> subprocess.CompletedProcess[str]:
        return self.run("umount", self.mountpoint)

    def must_umount(self) -> None:
        """Unmount, between two files that are written."""
        end = time.monotonic() + 60
        while (done := self.umount()).returncode != 0:
            assert "busy" in done.stderr, done.stderr
            assert time.monotonic() < end

    def kill(self) -> None:
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            daemon = self.daemon
            os.kill(daemon, signal.SIGKILL)
            while Path(f"/proc/{daemon}").exists():
                time.sleep(0.01)
        subprocess.run(["fusermount3", "-uz", self.mountpoint], capture_output=True)


@dataclass
class Writer:
    """Writes files, each with an fsync, and notes which of them were acknowledged."""

    machine: Machine
    prefix: str
    chance: random.Random
    acknowledged: dict[str, bytes] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    """When the write of an acknowledged file began."""
    errors: int = 0
    ends: threading.Event = field(default_factory=threading.Event)

    def write(self, name: str) -> None:
        data = self.chance.randbytes(self.chance.choice(SIZES))
        began = time.monotonic()
        try:
            with open(self.machine.files / name, "xb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
        except OSError:
            self.errors += 1
            time.sleep(0.005)
        else:
            self.acknowledged[name], self.began[name] = data, began

    def run(self) -> None:
        number = 0
        while not self.ends.is_set():
            self.write(f"{self.prefix}-{number}")
            number += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self.ends.set()
            thread.join()


@contextmanager
def in_bursts(daemon: Callable[[], int], seconds: float) -> Iterator[None]:
    """Let a daemon run for a moment now and then."""
    ends = threading.Event()

    def stop_and_go() -> None:
        while not ends.is_set():
            with suppress(OSError, ValueError):
                pid = daemon()
                os.kill(pid, signal.SIGSTOP)
                ends.wait(seconds)
                os.kill(pid, signal.SIGCONT)
            ends.wait(seconds / 2)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def hand_over(
    event: str, mine: Machine, other: Machine, writer: Writer, chance: random.Random
) -> None:
    """Let the other machine have the nodes, in this way; it is mounted afterwards."""
    if event == "runs":
        other.must_mount("take_over")
    elif event == "stopped":
        os.kill(mine.daemon, signal.SIGSTOP)
        other.must_mount("take_over")
        os.kill(mine.daemon, signal.SIGCONT)
    elif event == "resumes":
        os.kill(mine.daemon, signal.SIGSTOP)
        timer = threading.Timer(chance.uniform(0, 2), os.kill, (mine.daemon, signal.SIGCONT))
        timer.start()
        other.must_mount("take_over")
        timer.join()
    elif event == "slow":
        with in_bursts(lambda: mine.daemon, 0.05):
            other.must_mount("take_over")
    elif event == "slower":
        with in_bursts(lambda: other.daemon, 0.03):  # once there is one
            other.must_mount("take_over")
    elif event == "killed":
        mine.kill()
        other.must_be_refused()
        other.must_mount("take_over")
    elif event == "ended":
        writer.ends.set()
        mine.must_umount()
        other.must_mount()
    else:
        assert event == "removed"
        for node in (mine.store.parent / "regions").iterdir():
            (node / "owner").unlink(missing_ok=True)
        (mine.store / "fusestore.lock").unlink()
        if other.mount().returncode != 0:  # the first wrote its record again
            other.must_mount("take_over")


def check(machine: Machine, files: dict[str, bytes], *, must: bool = True) -> None:
    """Read files; with `must` they are all there, else what is read is right."""
    for name, data in files.items():
        try:
            found = (machine.files / name).read_bytes()
        except OSError:
            assert not must, f"{machine.name} lost {name}"
            continue
        assert found == data, f"{machine.name} has other bytes in {name}"


def play(mine: Machine, other: Machine, files: dict[str, bytes], number: int, seed: int) -> bool:
    """One round; whether the other machine has the nodes afterwards."""
    chance = random.Random(f"{seed} {number}")
    other.network = number % 2 == 1  # from its mount on
    event = EVENTS[number % len(EVENTS)] if number < len(EVENTS) else chance.choice(EVENTS)
    print(f"{time.monotonic():.1f} round {number}: {mine.name} {event}")
    writer = Writer(mine, f"{number}-{mine.name}", chance)
    with writer.running():
        time.sleep(chance.uniform(0.05, 0.4))
        if number % 4 == 3:
            other.must_be_refused()
        if event == "crashed":
            mine.kill()
            mine.must_mount()
        else:
            daemon = mine.daemon
            hand_over(event, mine, other, writer, chance)
            began = time.monotonic()
            second = Writer(other, f"{number}-{other.name}", chance)
            with second.running():
                time.sleep(chance.uniform(0.1, 0.4))
            assert not second.errors
    files.update(writer.acknowledged)
    if event == "crashed":
        check(mine, files)
        return False
    late = [name for name, at in writer.began.items() if at > began]
    assert not late, f"{mine.name} acknowledged {late} after {other.name} took over"
    files.update(second.acknowledged)
    if event not in ("ended", "killed"):
        check(mine, writer.acknowledged, must=False)
        if event == "removed":
            (mine.store / "fusestore.lock").write_text(f"{daemon}\n")
        mine.umount()
        mine.kill()
    check(other, files)
    return True


@pytest.mark.timeout(3600)
def test_two_machines_never_write_one_node(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seed = pytestconfig.getoption("--model-seed")
    rounds = ROUNDS_LONG if pytestconfig.getoption("--long") else ROUNDS
    print("seed", seed)
    machines = [
        Machine(name, tmp_path / f"store-{name}", tmp_path / f"on-{name}")
        for name in ("one", "two")
    ]
    (tmp_path / "regions").mkdir()
    regions = [f"--region={name}={tmp_path / 'regions' / name}" for name in ("a", "b", "c")]
    done = machines[0].run("mkfs", machines[0].store, *regions)
    assert done.returncode == 0, done.stderr
    for machine in machines:
        machine.mountpoint.mkdir()
    mine, other = machines
    mine.must_mount()
    mine.files.mkdir()
    mine.must_umount()
    shutil.copytree(mine.store, other.store, ignore=shutil.ignore_patterns("*.sock"))
    files: dict[str, bytes] = {}
    try:
        mine.must_mount()
        for number in range(rounds):
            if play(mine, other, files, number, seed):
                mine, other = other, mine
        mine.must_umount()
        done = mine.run("fsck", mine.store)
        assert done.returncode == 0, done.stdout + done.stderr
        other.must_mount()
        check(other, files)
        other.must_umount()
    finally:
        for machine in machines:
            machine.kill()
