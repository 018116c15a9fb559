"""A mount as a service: what systemd hears of it, its log in the journal, mount(8), umount(8)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from fusestore.errors import FusestoreError
from fusestore.system import sd_notify
from fusestore.system.mounts import check_answers
from fusestore.system.sd_notify import ServiceManager
from support.mounted_store import FUSESTORE, REPOSITORY, Store, is_mounted

MakeStore = Callable[..., Store]
SECONDS_MAX = 60


class Manager:
    """What a service manager hears."""

    def __init__(self, directory: Path) -> None:
        self.address = os.fspath(directory / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(SECONDS_MAX)
        self.socket.bind(self.address)

    def hear(self) -> list[str]:
        """The lines of the next message."""
        return self.socket.recv(4096).decode().split("\n")

    def hear_until(self, line: str) -> list[list[str]]:
        """All messages up to the first that has a line."""
        heard = [self.hear()]
        while line not in heard[-1]:
            heard.append(self.hear())
        return heard


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager that waits to hear from a daemon."""
    found = Manager(tmp_path)
    yield found
    found.socket.close()


# --- what a manager hears -----------------------------------------------------


async def heard_in(manager: Manager, seconds: float, **environment: str) -> list[list[str]]:
    """What is said in so many seconds of the loop's clock by a daemon that is ready."""
    told = ServiceManager({"NOTIFY_SOCKET": manager.address, **environment})
    told.starting("Opening")
    told.ready(lambda: "All\nwell")
    heard = [manager.hear(), manager.hear()]
    with trio.move_on_after(seconds):
        await told.keep_telling()
    told.stopping("Closing")
    return heard + manager.hear_until("STOPPING=1")


async def test_signs_of_life_come_at_half_the_time_of_the_watchdog(
    manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    heard = await heard_in(manager, 9.9, WATCHDOG_USEC="4000000", WATCHDOG_PID=str(os.getpid()))
    more = "EXTEND_TIMEOUT_USEC=60000000"
    assert heard[0] == [more, "STATUS=Opening"]
    assert heard[1] == ["READY=1", "WATCHDOG=1", "STATUS=All well"]
    assert heard[2:-1] == [["WATCHDOG=1", "STATUS=All well"]] * 5
    assert heard[-1] == ["STOPPING=1", more, "STATUS=Closing"]


@pytest.mark.parametrize("odd", [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}])
async def test_without_a_watchdog_of_ours_they_come_now_and_then(
    manager: Manager, autojump_clock: trio.testing.MockClock, odd: dict[str, str]
) -> None:
    heard = await heard_in(manager, 2 * sd_notify.BEAT_SECONDS_MAX - 1, **odd)
    assert len(heard) == 2 + 4 + 1


async def test_without_a_manager_nothing_is_said() -> None:
    for address in ["", "nowhere", "vsock:1:2"]:
        told = ServiceManager({"NOTIFY_SOCKET": address})
        assert not told.listens
        told.ready(str)
        await told.keep_telling()


@pytest.mark.expects_log(r"sd_notify: 'READY=1' could not be sent to the service manager")
async def test_a_manager_that_is_gone_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = ServiceManager({"NOTIFY_SOCKET": os.fspath(tmp_path / "gone")})
    told.ready(str)
    assert "'READY=1' could not be sent to the service manager" in caplog.text


def test_a_directory_that_is_no_mount_does_not_answer_for_one(tmp_path: Path) -> None:
    with pytest.raises(FusestoreError, match="is not its mount"):
        check_answers(tmp_path, tmp_path)


# --- a daemon of a service -----------------------------------------------------


class Service:
    """`fusestore mount --foreground`, as systemd starts it."""

    def __init__(self, store: Store, manager: Manager) -> None:
        reading, writing = os.pipe()
        self.log = open(reading, encoding="utf-8")
        status = os.fstat(writing)
        with open(writing, "wb") as stderr:
            self.process = subprocess.Popen(
                [*FUSESTORE, "mount", "--foreground", store.store, store.mountpoint],
                cwd=REPOSITORY,
                stderr=stderr,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": manager.address,
                    "WATCHDOG_USEC": "200000",
                    "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
                },
            )

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end; its exit status and what it logged."""
        status = self.process.wait(SECONDS_MAX)
        with self.log:
            return status, self.log.read().splitlines()


@pytest.fixture
def start(make_store: MakeStore, manager: Manager) -> Iterator[Callable[[Store], Service]]:
    """A function that starts a service; what is left is killed."""
    started: list[tuple[Store, Service]] = []

    def begin(store: Store) -> Service:
        service = Service(store, manager)
        started.append((store, service))
        return service

    yield begin
    for store, service in started:
        service.log.close()
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()
            store.clear_mount()


@pytest.mark.mounted
def test_ready_is_said_of_a_mount_that_answers_and_the_last_commit_is_waited_for(
    make_store: MakeStore, manager: Manager, start: Callable[[Store], Service]
) -> None:
    store = make_store()
    service = start(store)
    opening, *_, ready = manager.hear_until("READY=1")
    assert opening == ["EXTEND_TIMEOUT_USEC=60000000", f"STATUS=Opening {store.store}"]
    assert f"STATUS=Serving {store.mountpoint}. All nodes are up." in ready
    assert is_mounted(store.mountpoint)
    assert os.statvfs(store.mountpoint).f_namemax == 255
    for _ in range(3):
        assert manager.hear()[0] == "WATCHDOG=1"
    (store.mountpoint / "letter").write_text("not synced")
    service.process.send_signal(signal.SIGTERM)
    stopping = manager.hear_until("STOPPING=1")[-1]
    assert "EXTEND_TIMEOUT_USEC=60000000" in stopping
    status, lines = service.end()
    assert status == 0
    assert f"<6>fusestore.serve.daemon: {store.store} is mounted on {store.mountpoint}" in lines
    assert all(line[:3] in ("<4>", "<6>") for line in lines), lines
    assert not is_mounted(store.mountpoint)
    store.mount()
    assert (store.mountpoint / "letter").read_text() == "not synced"


@pytest.mark.mounted
def test_a_daemon_whose_users_are_killed_keeps_its_watchdog_quiet(
    make_store: MakeStore, manager: Manager, start: Callable[[Store], Service]
) -> None:
    """An idle mount, but for programs that are killed in the middle of a request."""
    store = make_store()
    start(store)
    manager.hear_until("READY=1")
    manager.socket.settimeout(6)
    doing = "import os, sys\nwhile True: os.path.exists(f'{sys.argv[1]}/{os.urandom(8).hex()}')"
    for _ in range(20):
        users = [
            subprocess.Popen([sys.executable, "-E", "-S", "-c", doing, store.mountpoint])
            for _ in range(2)
        ]
        assert "WATCHDOG=1" in manager.hear()
        for user in users:
            user.kill()
            user.wait()
        manager.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                manager.hear()
        manager.socket.settimeout(6)
        assert "WATCHDOG=1" in manager.hear()


@pytest.mark.mounted
def test_signals_while_a_daemon_ends_lose_nothing(
    make_store: MakeStore, manager: Manager, start: Callable[[Store], Service]
) -> None:
    store = make_store()
    service = start(store)
    manager.hear_until("READY=1")
    data = os.urandom(3_000_000)
    (store.mountpoint / "data").write_bytes(data)
    service.process.send_signal(signal.SIGTERM)
    manager.hear_until("STOPPING=1")
    while service.process.poll() is None:  # at the very end it may be what ends the process
        service.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.process.wait(0.001)
    status, lines = service.end()
    assert status in (0, -signal.SIGTERM), lines
    store.mount()
    assert (store.mountpoint / "data").read_bytes() == data


@pytest.mark.mounted
def test_a_killed_daemon_is_followed_by_one_that_clears_its_mount(
    make_store: MakeStore, manager: Manager, start: Callable[[Store], Service]
) -> None:
    store = make_store()
    service = start(store)
    manager.hear_until("READY=1")
    with open(store.mountpoint / "letter", "w") as file:
        file.write("synced")
        file.flush()
        os.fsync(file.fileno())
    service.process.kill()
    service.end()
    again = start(store)
    manager.hear_until("READY=1")
    assert (store.mountpoint / "letter").read_text() == "synced"
    again.process.send_signal(signal.SIGTERM)
    status, lines = again.end()
    assert status == 0
    assert f"cleared the mount that a dead daemon left on {store.mountpoint}" in lines[0]
    assert lines[0].startswith("<4>")


# --- the level of the log ------------------------------------------------------


@pytest.mark.mounted
@pytest.mark.expects_log(r"serve\.commands: the log level is now debug; it was error")
def test_the_log_level_changes_while_mounted(make_store: MakeStore) -> None:
    store = make_store()
    store.mount()
    assert store.cli("log-level", store.store).stdout == "info\n"
    assert store.cli("log-level", store.store, "error").stdout == "error\n"
    assert store.cli("log-level", store.store).stdout == "error\n"
    assert store.cli("log-level", store.store, "debug").stdout == "debug\n"
    text = (store.store / "fusestore.log").read_text()
    assert "the log level is now debug; it was error" in text


@pytest.mark.mounted
@pytest.mark.expects_log(r".")
def test_a_name_writes_no_line_of_its_own_anywhere(make_store: MakeStore) -> None:
    store = make_store()
    store.mount()
    forged = "x\n2026-01-31T12:00:00.000Z ERROR fusestore: forged\x1b[31m\u2028\udcff"
    (store.mountpoint / forged).write_bytes(os.urandom(2_000_000))
    store.umount()
    for name in ("us-east-1", "us-west-1"):
        for path in (store.node(name) / "shards").iterdir():
            path.unlink()
    store.mount()
    with pytest.raises(OSError):
        (store.mountpoint / forged).read_bytes()
    lines = (store.store / "fusestore.log").read_bytes().split(b"\n")
    named = [line for line in lines if b"forged" in line]
    assert named
    for line in named:
        assert b"cannot be read" in line
        assert (
            b"/x\\n2026-01-31T12:00:00.000Z ERROR fusestore: forged\\x1b[31m\\u2028\\udcff" in line
        )
    done = store.cli("risk", store.store, check=False)
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))
    assert "forged" in done.stdout + done.stderr


# --- mount(8) ------------------------------------------------------------------


def helper(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a helper as mount(8) and umount(8) do."""
    code = f"from fusestore.cli.mount_helper import main_{name}; main_{name}()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )


@pytest.mark.mounted
def test_the_helpers_take_what_mount_and_umount_give_them(make_store: MakeStore) -> None:
    store = make_store()
    place = store.mountpoint
    fake = helper("mount", store.store, place, "-fnv", "-o", "rw,nofail,_netdev")
    assert (fake.returncode, fake.stderr) == (0, "")
    assert not is_mounted(place)
    for options in (["-o", "big"], ["-o", "accept_loss"]):
        assert helper("mount", store.store, place, *options).returncode == 1
    never_mounted = helper("mount", store.store, place, "-sv", "-o", "ro,big,x-systemd.automount")
    assert never_mounted.returncode == 32
    done = helper(
        "mount", store.store, place, "-v", "-o", "rw,noauto,user,nodev", "-t", "fusestore"
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"mount.fusestore: {store.store} mounted on {place}.\n",
        "",
    )
    assert helper("mount", store.store, place).returncode == 32
    (place / "letter").write_text("not synced")
    done = helper("umount", place, "-n", "-t", "fuse.fusestore")
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_mounted(place)
    assert helper("umount", place).returncode == 1
    store.mount()
    assert (place / "letter").read_text() == "not synced"
    store.kill(clear=False)
    done = helper("umount", place)
    assert done.returncode == 0
    assert "had died: the mount is cleared" in done.stderr


def interpreter(helpers: Path) -> Path:
    """Python for the first line of a script, which takes no path with a blank."""
    path = helpers / "python"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return path


SCRIPT = """
set -e
mkdir "$HELPERS/upper" "$HELPERS/work"
mount -t overlay -o "lowerdir=$(realpath /sbin),upperdir=$HELPERS/upper,workdir=$HELPERS/work" \
    overlay "$(realpath /sbin)"
for name in mount umount; do
    printf '#!%s\\nfrom fusestore.cli.mount_helper import main_%s\\nmain_%s()\\n' \
        "$PYTHON" $name $name >"$HELPERS/main"
    install -m 755 "$HELPERS/main" "/sbin/$name.$([ $name = mount ] || echo fuse.)fusestore"
done
export PYTHONPATH="$REPOSITORY"
mount -t fusestore -o allow_other,nofail "$STORE" "$MOUNTPOINT"
echo one >"$MOUNTPOINT/letter"
umount "$MOUNTPOINT"
mount --fstab "$HELPERS/fstab" "$MOUNTPOINT"
mount --fstab "$HELPERS/fstab" -a
cat "$MOUNTPOINT/letter"
findmnt --noheadings --output OPTIONS --mountpoint "$MOUNTPOINT"
umount -l "$MOUNTPOINT"
"""


@pytest.mark.mounted
def test_mount_fstab_and_umount_work(make_store: MakeStore, tmp_path: Path) -> None:
    """In a mount namespace, so that the helpers can lie in /sbin; needs root."""
    store = make_store()
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    line = f"{store.store} {store.mountpoint} fusestore ro,nofail,_netdev,x-systemd.automount 0 0\n"
    (helpers / "fstab").write_text(line)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", SCRIPT],
        env={
            **os.environ,
            "HELPERS": str(helpers),
            "PYTHON": os.fspath(interpreter(helpers)),
            "REPOSITORY": str(REPOSITORY),
            "STORE": str(store.store),
            "MOUNTPOINT": str(store.mountpoint),
        },
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 0, done.stderr
    letter, options = done.stdout.splitlines()
    assert letter == "one"
    assert options.startswith("ro,")


LINKED = """
set -e
mkdir "$HELPERS/upper" "$HELPERS/work"
mount -t overlay -o "lowerdir=$(realpath /sbin),upperdir=$HELPERS/upper,workdir=$HELPERS/work" \\
    overlay "$(realpath /sbin)"
export PYTHONPATH="$REPOSITORY"
link() { printf '#!%s\\nfrom fusestore.cli.%s import %s\\n%s()\\n' "$PYTHON" "$2" "$3" "$3" >"$1"
    chmod 755 "$1"; }
for name in $NAMES; do
    case $name in
    mount*) link "/sbin/$name" mount_helper main_mount;;
    umount*) link "/sbin/$name" mount_helper main_umount;;
    fusestore) link /sbin/fusestore main main;;
    esac
done
say() { echo "$*"; }
options() { findmnt --noheadings --output VFS-OPTIONS --mountpoint "$MOUNTPOINT"; }
"""


def in_namespace(store: Store, helpers: Path, names: str, script: str) -> list[str]:
    """Run a script in a mount namespace where helpers are in place; the lines that it prints."""
    helpers.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", LINKED + script],
        env={
            **os.environ,
            "HELPERS": str(helpers),
            "NAMES": names,
            "PYTHON": os.fspath(interpreter(helpers)),
            "REPOSITORY": str(REPOSITORY),
            "STORE": str(store.store),
            "MOUNTPOINT": str(store.mountpoint),
        },
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX * 2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


REMOUNTED = """
mount -t fusestore "$STORE" "$MOUNTPOINT"
echo one >"$MOUNTPOINT/letter"
mount -o remount,ro "$MOUNTPOINT"
options
cat "$MOUNTPOINT/letter"
echo two >"$MOUNTPOINT/letter" || say refused
mount -o remount,rw "$MOUNTPOINT"
options
echo two >"$MOUNTPOINT/letter"
cat "$MOUNTPOINT/letter"
for option in strictatime relatime noatime nosuid,nodev,noexec suid,dev,exec; do
    mount -o "remount,$option" "$MOUNTPOINT"
    say "$option: $(options)"
done
mount -o remount,big "$MOUNTPOINT" || say refused
for option in allow_other writeback noxattr nospin accept_loss metrics=9464; do
    mount -o "remount,$option" "$MOUNTPOINT" 2>"$HELPERS/why" || say refused
    grep -c "$option cannot be set while the store is mounted" "$HELPERS/why"
done
exec 3>"$MOUNTPOINT/open"
mount -o remount,ro "$MOUNTPOINT" || say busy
exec 3>&-
mount -o remount,ro "$MOUNTPOINT"
umount "$MOUNTPOINT"
mount -t fusestore -o allow_other,writeback "$STORE" "$MOUNTPOINT"
mount -o remount,ro "$MOUNTPOINT"
mount -o remount,rw,writeback "$MOUNTPOINT"
say "again: $(options)"
umount "$MOUNTPOINT"
mount -t fusestore -o ro,strictatime,lazytime "$STORE" "$MOUNTPOINT"
mount -o remount,rw "$MOUNTPOINT" || say refused
umount "$MOUNTPOINT"
"""


@pytest.mark.mounted
@pytest.mark.parametrize(
    "names", ["mount.fusestore fusestore", "mount.fusestore mount.fuse.fusestore"]
)
def test_a_mount_can_be_remounted(make_store: MakeStore, tmp_path: Path, names: str) -> None:
    """Also if mount(8) finds mount.fuse(8) only, which runs `fusestore` from the path."""
    lines = in_namespace(make_store(), tmp_path / "helpers", names, REMOUNTED)
    assert lines == [
        "ro,noatime",
        "one",
        "refused",
        "rw,noatime",
        "two",
        "strictatime: rw",
        "relatime: rw,relatime",
        "noatime: rw,noatime",
        "nosuid,nodev,noexec: rw,nosuid,nodev,noexec,noatime",
        "suid,dev,exec: rw,noatime",
        "refused",
        *("refused", "1") * 6,
        "busy",
        "again: rw,noatime",
        "refused",
    ]


@pytest.mark.mounted
def test_a_mount_that_turns_read_only_is_committed(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    script = """
mount -t fusestore "$STORE" "$MOUNTPOINT"
head -c 5000000 /dev/urandom >"$MOUNTPOINT/data"
sha256sum <"$MOUNTPOINT/data"
mount -o remount,ro "$MOUNTPOINT"
kill -9 "$(cat "$STORE/fusestore.lock")"
umount -l "$MOUNTPOINT"
"""
    (digest,) = in_namespace(store, tmp_path / "helpers", "mount.fusestore fusestore", script)
    store.mount()
    assert hashlib.sha256((store.mountpoint / "data").read_bytes()).hexdigest() == digest.split()[0]


@pytest.mark.mounted
@pytest.mark.parametrize("names", ["", "umount.fuse.fusestore"])
@pytest.mark.parametrize("kind", ["absolute", "twice"])
def test_umount_returns_when_all_is_committed(
    make_store: MakeStore, tmp_path: Path, names: str, kind: str
) -> None:
    """With an absolute path umount(8) never runs a helper: it asks statfs(2) for the type."""
    store = make_store()
    script = """
for round in 1 2 3; do
    "$PYTHON" -m fusestore mount "$STORE" "$MOUNTPOINT"
    pid=$(cat "$STORE/fusestore.lock")
    head -c 20000000 /dev/urandom >"$MOUNTPOINT/data$round"
    sha256sum <"$MOUNTPOINT/data$round"
    if [ "$KIND" = twice ]; then
        exec 3<"$MOUNTPOINT/data1"; umount "$MOUNTPOINT" 2>/dev/null || true; exec 3<&-
    fi
    umount "$MOUNTPOINT"
    kill -9 "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
done
"""
    lines = in_namespace(store, tmp_path / "helpers", names, f"KIND={kind}\n{script}")
    store.mount()
    for number, digest in enumerate(lines, 1):
        found = hashlib.sha256((store.mountpoint / f"data{number}").read_bytes()).hexdigest()
        assert found == digest.split()[0]
    assert len(lines) == 3


@pytest.mark.mounted
@pytest.mark.parametrize("names", ["", "umount.fuse.fusestore"])
def test_bind_mounts_are_unmounted_one_by_one(
    make_store: MakeStore, tmp_path: Path, names: str
) -> None:
    store = make_store()
    script = """
"$PYTHON" -m fusestore mount "$STORE" "$MOUNTPOINT"
mkdir "$MOUNTPOINT/directory" "$HELPERS/directory" "$HELPERS/whole"
echo one >"$MOUNTPOINT/file"; echo x >"$HELPERS/file"
mount --bind "$MOUNTPOINT/file" "$HELPERS/file"
mount --bind "$MOUNTPOINT/directory" "$HELPERS/directory"
mount --bind "$MOUNTPOINT" "$HELPERS/whole"
cd "$HELPERS"
umount "$HELPERS/file"; cat "$HELPERS/file"
mount --bind "$MOUNTPOINT/file" "$HELPERS/file"
umount file; cat file
umount directory; umount "$HELPERS/whole"
cat "$MOUNTPOINT/file"
umount "$MOUNTPOINT"
"""
    assert in_namespace(store, tmp_path / "helpers", names, script) == ["x", "x", "one"]
    store.mount()
    assert (store.mountpoint / "file").read_text() == "one\n"
