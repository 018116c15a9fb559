"""A mount within the limits of its process: open files, the size of files, address space.

None of them is a fault of a node.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import mounted_store
from support.mounted_store import Store, sync

MIB = 1 << 20


@contextmanager
def limited(ulimit: str) -> Iterator[None]:
    """Run the commands of stores with a limit, as `ulimit` of a shell takes it."""
    shell = ["sh", "-c", f'ulimit {ulimit} && exec "$@"', "sh"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mounted_store, "FUSESTORE", [*shell, *mounted_store.FUSESTORE])
        yield


def write_and_read(store: Store, count: int, size: int = MIB, first: int = 0) -> None:
    """Write files durably, and read them past the kernel's cache."""
    for number in range(first, first + count):
        data = os.urandom(size)
        path = store.mountpoint / f"{number}"
        with path.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == data


@pytest.mark.parametrize("soft", [36, 64])
def test_a_low_soft_limit_of_open_files_is_raised(
    make_store: Callable[..., Store], soft: int
) -> None:
    store = make_store()
    with limited(f"-S -n {soft}"):
        store.mount()
    assert resource.prlimit(store.daemon_pid or 0, resource.RLIMIT_NOFILE)[0] > 1000
    write_and_read(store, 8)
    assert store.status()["healthy"]


def test_with_few_descriptors_a_node_keeps_few_segments_open(
    make_store: Callable[..., Store],
) -> None:
    store = make_store("--code", "1+2")
    with limited("-n 110"):
        store.mount()
    write_and_read(store, 8, 80 * MIB)  # more segments than the daemon may keep open
    assert len(list((store.store / "us-east-1" / "shards").iterdir())) > 8
    assert store.status()["healthy"]


def test_too_few_descriptors_for_the_nodes_are_refused(make_store: Callable[..., Store]) -> None:
    regions = [f"--region=r{number}" for number in range(8)]
    store = make_store(*regions, "--code", "2+1")
    with limited("-n 100"):
        refused = store.cli("mount", store.store, store.mountpoint, check=False)
    assert refused.returncode == 2
    assert "may open 100 files, and a store of 8 nodes needs 184" in refused.stderr


def test_a_limit_that_is_lowered_while_mounted_costs_no_node(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    assert store.daemon_pid is not None
    write_and_read(store, 2)
    resource.prlimit(
        store.daemon_pid,
        resource.RLIMIT_NOFILE,
        (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
    )
    write_and_read(store, 4, 40 * MIB)
    assert store.status()["healthy"]


def test_files_that_may_not_be_long_enough_are_refused(make_store: Callable[..., Store]) -> None:
    store = make_store()
    with limited("-f 102400"):
        refused = store.cli("mount", store.store, store.mountpoint, check=False)
    assert refused.returncode == 2
    assert "may write files of 50 MiB only" in refused.stderr
    with limited("-S -f 102400"):  # the soft limit alone is raised
        store.mount()
    write_and_read(store, 2)
    assert store.status()["healthy"]


@pytest.mark.parametrize("gib", [2, 16, 700])
def test_a_limit_of_address_space_makes_the_map_of_the_metadata_smaller(
    make_store: Callable[..., Store], gib: int
) -> None:
    store = make_store()
    with limited(f"-v {gib << 20}"):
        store.mount()
    write_and_read(store, 4)
    assert store.status()["healthy"]
    store.remount()
    assert Path(store.mountpoint / "3").stat().st_size == MIB


SHORT_FILES = (r"may write files of \d+ MiB only", "waits for room", "fewer shards")


@pytest.mark.expects_log(*SHORT_FILES)
@pytest.mark.parametrize("mib", [0, 1, 5])
def test_a_lowered_size_of_files_is_raised_again(
    make_store: Callable[..., Store], mib: int
) -> None:
    store = make_store()
    store.mount()
    write_and_read(store, 2)
    pid, kind = store.daemon_pid or 0, resource.RLIMIT_FSIZE
    for number in range(2, 6):
        resource.prlimit(pid, kind, (mib * MIB, resource.prlimit(pid, kind)[1]))
        with suppress(OSError):  # it waits for room for a moment
            write_and_read(store, 1, 3 * MIB, first=number)
    assert {node["state"] for node in store.status()["nodes"]} == {"up"}
    time.sleep(1)
    write_and_read(store, 12, 3 * MIB)
    store.remount()
    assert store.cli("fsck", store.store).returncode == 0


@pytest.mark.expects_log(*SHORT_FILES)
def test_a_size_of_files_that_is_lowered_for_good_is_no_fault_of_a_node(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    write_and_read(store, 2)
    resource.prlimit(store.daemon_pid or 0, resource.RLIMIT_FSIZE, (MIB, MIB))
    with pytest.raises(OSError, match="No space left"):
        write_and_read(store, 10, 3 * MIB, first=2)
    assert {node["state"] for node in store.status()["nodes"]} == {"up"}
    assert (store.mountpoint / "1").read_bytes()
    store.kill()
    store.mount()
    assert (store.mountpoint / "1").stat().st_size == MIB
    assert store.cli("fsck", store.store).returncode == 0


class Tasks:
    """A control group that limits the tasks of a process; root makes it."""

    def __init__(self, pid: int) -> None:
        top = Path("/sys/fs/cgroup")
        top = top / "pids" if (top / "pids").is_dir() else top
        self._group, self._pid, self._top = top / f"fusestore-test-{pid}", pid, top

    def limit(self, count: int | None = None) -> None:
        """Permit `count` tasks; by default those that there are."""
        self._group.mkdir(exist_ok=True)
        (self._group / "cgroup.procs").write_text(str(self._pid))
        count = count or len(os.listdir(f"/proc/{self._pid}/task"))
        (self._group / "pids.max").write_text(str(count))

    def lift(self) -> None:
        """Remove the group, and with it the limit."""
        with suppress(ProcessLookupError):  # it has ended
            (self._top / "cgroup.procs").write_text(str(self._pid))
        self._group.rmdir()


@pytest.fixture
def tasks(make_store: Callable[..., Store]) -> Iterator[tuple[Store, Tasks]]:
    """A mounted store, and what limits its tasks."""
    store = make_store()
    store.mount()
    write_and_read(store, 2)
    tasks = Tasks(store.daemon_pid or 0)
    try:
        tasks.limit()
    except OSError:
        pytest.skip("there is no control group of tasks")
    yield store, tasks
    tasks.lift()


@pytest.mark.expects_log("refuses this process another thread")
@pytest.mark.parametrize("permitted", [None, 3])
def test_a_process_that_gets_no_thread_goes_on_with_those_that_it_has(
    tasks: tuple[Store, Tasks], permitted: int | None
) -> None:
    store, group = tasks
    if permitted is None:
        time.sleep(12)  # threads that are not kept end
    group.limit(permitted)
    with ThreadPoolExecutor(4) as pool:

        def write(number: int) -> None:
            for part in range(5):
                path = store.mountpoint / f"{number}.{part}"
                data = os.urandom(3 * MIB)
                path.write_bytes(data)
                sync(path)
                assert path.read_bytes() == data

        for done in [pool.submit(write, number) for number in range(4)]:
            done.result(60)
    assert store.status()["healthy"]
    assert store.cli("fsck", store.store).returncode == 0
    assert "TasksMax=" in Path(store.status()["log_file"]).read_text()
    group.limit(1000)
    write_and_read(store, 4, 3 * MIB)
    assert store.status()["healthy"]


@pytest.mark.expects_log("refuses this process another thread")
def test_a_process_that_gets_no_thread_can_unmount(tasks: tuple[Store, Tasks]) -> None:
    store, _ = tasks
    write_and_read(store, 4, 3 * MIB)
    refused = store.cli("umount", store.mountpoint, check=False)
    if refused.returncode:  # it may not start a process either
        assert f"'fusermount3 -u {store.mountpoint}'" in refused.stderr
        subprocess.run(["fusermount3", "-u", store.mountpoint], check=True)
    store.await_end()
    store.mount()
    assert (store.mountpoint / "3").stat().st_size == 3 * MIB


@pytest.mark.expects_log("refuses this process another thread", "exits anyway")
def test_a_process_that_gets_no_thread_can_be_asked_and_stopped(
    tasks: tuple[Store, Tasks],
) -> None:
    store, group = tasks
    group.limit(1000)
    time.sleep(12)  # threads that are not kept end
    group.limit()
    write_and_read(store, 4, 3 * MIB)
    for _ in range(2):
        assert store.status()["healthy"]
    os.kill(store.daemon_pid or 0, signal.SIGTERM)
    store.await_end()
    subprocess.run(["fusermount3", "-u", store.mountpoint], check=False, capture_output=True)
    store.mount()
    assert (store.mountpoint / "3").stat().st_size == 3 * MIB


@pytest.mark.expects_log("refuses this process")
@pytest.mark.parametrize("kib", [4_000, 12_000, 40_000])
@pytest.mark.parametrize("which", ["VmSize", "VmData"])
def test_a_process_that_gets_no_memory_refuses_writes_and_goes_on(
    make_store: Callable[..., Store], which: str, kib: int
) -> None:
    store = make_store()
    store.mount()
    write_and_read(store, 2, 2 * MIB)
    pid = store.daemon_pid or 0
    used = int(Path(f"/proc/{pid}/status").read_text().split(f"{which}:")[1].split()[0])
    kind = resource.RLIMIT_AS if which == "VmSize" else resource.RLIMIT_DATA
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, ((used + kib) << 10, before[1]))
    written: list[tuple[Path, bytes]] = []

    def write(number: int) -> None:
        for part in range(10):
            path, data = store.mountpoint / f"w{number}.{part}", os.urandom(3 * MIB)
            try:
                path.write_bytes(data)
                sync(path)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
            else:
                written.append((path, data))

    with ThreadPoolExecutor(5) as pool:
        for done in [pool.submit(write, number) for number in range(5)]:
            done.result(60)
    assert (store.mountpoint / "1").read_bytes()
    assert {node["state"] for node in store.status()["nodes"]} == {"up"}
    resource.prlimit(pid, kind, before)
    write_and_read(store, 4, 3 * MIB)
    assert store.status()["healthy"]
    store.remount()
    for path, data in written:
        assert path.read_bytes() == data
    assert store.cli("fsck", store.store).returncode == 0
