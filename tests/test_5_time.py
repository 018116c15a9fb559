"""Clients that are killed, a daemon that is stopped, and disks that hang, stop nothing for good."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.disks import Disks
from support.logs import HUNG, METADATA_STALL, OUT_OF_USE, SLOW, WAITED_FOR
from support.mounted_store import Store

pytestmark = pytest.mark.mounted

LOOKS_UP = "import os, sys\nwhile True: os.path.exists(f'{sys.argv[1]}/{os.urandom(8).hex()}')"
LISTS = "import os, sys\nwhile True: os.listdir(sys.argv[1])"
WRITES = """\
import os, sys
file = os.open(f"{sys.argv[1]}/{os.getpid()}", os.O_CREAT | os.O_WRONLY)
while True: os.pwrite(file, b"x", 0)
"""


def answers(store: Store, seconds: float = 6) -> bool:
    """Whether the event loop answers, asked without a request to the mount."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(seconds)
        client.connect(str(store.store / "control.sock"))
        client.sendall(b'{"command":"status","arguments":{}}\n')
        try:
            return client.recv(100) != b""
        except TimeoutError:
            return False


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    """Whether a condition becomes true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.parametrize(
    ("processes", "doing"),
    [(1, LOOKS_UP), (2, LOOKS_UP), (4, LOOKS_UP), (3, LISTS), (2, WRITES)],
    ids=["1-looks-up", "2-look-up", "4-look-up", "3-list", "2-write"],
)
def test_the_daemon_goes_on_when_those_who_use_it_are_killed(
    make_store: Callable[..., Store], processes: int, doing: str
) -> None:
    store = make_store()
    store.mount()
    random.seed(f"{processes} {doing}")
    for _ in range(25):
        command = [sys.executable, "-E", "-S", "-c", doing, store.mountpoint]
        users = [subprocess.Popen(command) for _ in range(processes)]
        time.sleep(random.uniform(0.1, 0.2))
        number = random.choice([signal.SIGTERM, signal.SIGKILL])
        for user in users:
            user.send_signal(number)
        for user in users:
            assert user.wait() == -number
        assert answers(store)
    subprocess.run(["touch", store.mountpoint / "file"], check=True)
    made_at = time.time()
    users = [subprocess.Popen(command) for _ in range(processes)]
    time.sleep(0.2)
    for user in users:
        user.kill()
        user.wait()
    assert within(6, lambda: (store.status()["last_commit_at"] or 0) > made_at)


def processor_seconds(store: Store) -> float:
    """What the daemon has used of the processors."""
    fields = Path(f"/proc/{store.daemon_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


STORM = """\
import os, sys
while True:
    os.close(os.open(sys.argv[1], os.O_CREAT))
"""


@pytest.mark.parametrize("options", [(), ("nospin",)], ids=["spins", "nospin"])
def test_a_storm_of_requests_leaves_turns_for_others_and_an_idle_mount_takes_none(
    make_store: Callable[..., Store], options: tuple[str, ...]
) -> None:
    store = make_store()
    store.mount(*options)
    names = [store.mountpoint / name for name in ("one", "another", "third")]
    storm = [subprocess.Popen([sys.executable, "-c", STORM, name]) for name in names]
    try:
        assert within(5, names[-1].exists)
        (store.mountpoint / "file").write_bytes(b"written in the storm")
        made_at = time.time()
        for _ in range(20):
            assert answers(store)
        assert within(7, lambda: (store.status()["last_commit_at"] or 0) > made_at)
    finally:
        for program in storm:
            program.kill()
            program.wait()
    time.sleep(6)  # a commit and a checkpoint
    before = processor_seconds(store)
    time.sleep(4)
    assert processor_seconds(store) - before <= 0.08


# --- disks that hang, and a daemon that is stopped ----------------------------


@contextmanager
def frozen(*places: Path) -> Iterator[None]:
    """File systems whose writes hang."""
    for place in places:
        subprocess.run(["fsfreeze", "--freeze", place], check=True)
    try:
        yield
    finally:
        for place in places:
            subprocess.run(["fsfreeze", "--unfreeze", place], check=True)


WRITER = """\
import os, sys
number = 0
while True:
    number += 1
    for name, data in ("small", b"%d" % number), (f"large {number % 20}", os.urandom(3 << 20)):
        file = os.open(f"{sys.argv[1]}/{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.write(file, data)
        os.fsync(file)
        os.close(file)
    print(number, flush=True)
"""


class Writer:
    """A program that writes and syncs files, or does something else in rounds."""

    def __init__(self, place: Path, doing: str = WRITER) -> None:
        command = [sys.executable, "-c", doing, place]
        self._program = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.rounds = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._program.stdout is not None
        with self._program.stdout as lines:
            for line in lines:
                self.rounds = int(line)

    def goes_on(self, seconds: float) -> bool:
        """Whether it syncs files within some time."""
        before = self.rounds
        return within(seconds, lambda: self.rounds > before + 1)

    def end(self) -> None:
        """End it; it met no error."""
        assert self._program.poll() is None
        self._program.kill()
        self._program.wait()
        self._reader.join()


def is_well(store: Store, writer: Writer) -> None:
    """The writer goes on by itself, and nothing is lost or missing."""
    assert writer.goes_on(30)
    writer.end()
    assert within(60, lambda: store.status()["healthy"]), store.status()["summary"]


def test_a_daemon_that_is_stopped_blames_nobody(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    writer = Writer(store.mountpoint)
    assert writer.goes_on(20)
    assert store.daemon_pid is not None
    os.kill(store.daemon_pid, signal.SIGSTOP)
    time.sleep(34)
    os.kill(store.daemon_pid, signal.SIGCONT)
    is_well(store, writer)


@pytest.mark.long
@pytest.mark.expects_log(HUNG, OUT_OF_USE, WAITED_FOR)
def test_disks_that_hang_together_are_waited_for(
    disks: Disks, make_store: Callable[..., Store]
) -> None:
    """One that hangs a moment before the others may be given up, but comes back by itself."""
    places = [disks.ext4(f"r{number}", 400) for number in range(3)]
    regions = [f"--region=r{number}={place}/node" for number, place in enumerate(places)]
    store = make_store(*regions)
    store.mount()
    writer = Writer(store.mountpoint)
    assert writer.goes_on(20)
    with frozen(*places):
        time.sleep(38)
        began = time.monotonic()
        status = store.status()
        assert time.monotonic() - began < 10
        assert not status["read_only"]
    is_well(store, writer)


@pytest.mark.long
@pytest.mark.expects_log(HUNG, OUT_OF_USE, SLOW)
def test_a_disk_whose_writes_hang_holds_up_nobody_for_long(
    disks: Disks, make_store: Callable[..., Store]
) -> None:
    place = disks.ext4("r0", 800)
    store = make_store(f"--region=r0={place}/node", "--region=r1", "--region=r2")
    store.mount()
    writer = Writer(store.mountpoint)
    assert writer.goes_on(20)
    with frozen(place):
        assert writer.goes_on(60)
        threads = []
        for _ in range(20):
            assert writer.goes_on(20)
            status = store.status()
            assert [node["name"] for node in status["nodes"] if not node["in_sync"]] == ["r0"]
            threads.append(len(os.listdir(f"/proc/{store.daemon_pid}/task")))
            time.sleep(2)
        assert max(threads) < 40
    is_well(store, writer)


def with_metadata_on(place: Path, make_store: Callable[..., Store], tmp_path: Path) -> Store:
    """A store that lies on a file system of its own, with its regions elsewhere."""
    (tmp_path / "s0").symlink_to(place)
    return make_store(*(f"--region=r{n}={tmp_path}/regions/{n}" for n in range(3)))


@pytest.mark.expects_log(METADATA_STALL)
def test_a_metadata_disk_that_hangs_stops_nobody(
    disks: Disks, make_store: Callable[..., Store], tmp_path: Path
) -> None:
    place = disks.ext4("metadata", 800)
    store = with_metadata_on(place, make_store, tmp_path)
    store.mount("metrics=127.0.0.1:0")
    (store.mountpoint / "before").write_bytes(b"before")
    url = store.status()["metrics"]
    writer = Writer(store.mountpoint)
    assert writer.goes_on(20)
    with frozen(place):
        for _ in range(45):
            time.sleep(1)
            assert answers(store, 2)
            assert writer.goes_on(10)
            assert urllib.request.urlopen(f"{url}metrics", timeout=10).status == 200
            (store.mountpoint / "before").stat()
        assert (store.mountpoint / "before").read_bytes() == b"before"
        assert "disk of the metadata" in store.status()["summary"]
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}healthz", timeout=10)
    is_well(store, writer)
    store.remount()
    assert (store.mountpoint / "before").read_bytes() == b"before"


NAMES = """\
import os, sys
number = 0
while True:
    try:
        name = f"{sys.argv[1]}/{number:0200}"
        os.makedirs(name, exist_ok=True)
        os.setxattr(name, "user.large", os.urandom(60_000))
        number += 1
    except OSError:
        pass
    print(number, flush=True)
"""
MEMORY_MAX = 150 << 20
"""Bytes that a daemon may take more while names and attributes wait for a checkpoint: those that
wait, their commits on the way to the nodes, and as much again for Python."""


def memory(store: Store) -> int:
    """The bytes of memory that the daemon has for itself."""
    lines = Path(f"/proc/{store.daemon_pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.expects_log(METADATA_STALL)
def test_memory_is_limited_while_a_metadata_disk_hangs(
    disks: Disks, make_store: Callable[..., Store], tmp_path: Path
) -> None:
    place = disks.ext4("metadata", 800)
    store = with_metadata_on(place, make_store, tmp_path)
    store.mount()
    (store.mountpoint / "before").write_bytes(b"before")
    before = memory(store)
    places = [store.mountpoint / f"d{number}" for number in range(4)]
    for folder in places:
        folder.mkdir()
    with frozen(place):
        users = [Writer(folder, NAMES) for folder in places]
        for _ in range(33):
            time.sleep(1)
            assert memory(store) - before < MEMORY_MAX
            assert answers(store, 2)
            assert (store.mountpoint / "before").read_bytes() == b"before"
    for user in users:
        assert user.goes_on(60)
        user.end()
    store.remount()
    for folder, user in zip(places, users, strict=True):
        assert len(os.listdir(folder)) >= user.rounds > 0
