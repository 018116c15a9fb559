"""Time stamps are in the order of events, as make and backups need; far times are clamped."""

from __future__ import annotations

import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from fusestore.system import clock
from support.mounted_store import Directory, Store
from support.posixly import AT_FDCWD, Timespec, fresh, libc, make

MakeStore = Callable[..., Store | Directory]
pytestmark = pytest.mark.mounted
TIMES = 100
AT_SYMLINK_NOFOLLOW = 0x100


@pytest.fixture(scope="module", params=["", "writeback", "noxattr"])
def top(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a mount of its own with an option."""
    base = tmp_path_factory.mktemp("times")
    if request.config.getoption("--plain"):
        yield Directory(base).mountpoint
        return
    store = Store(base)
    try:
        store.mount(*([request.param] if request.param else []))
        yield store.mountpoint
    finally:
        store.clean_up()


def written(path: Path) -> None:
    path.write_text("1")


def appended(path: Path) -> None:
    with open(path, "a") as file:
        file.write("2")


def resized(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)  # with writeback, the same size is no event


def touched(path: Path) -> None:
    path.touch()
    os.utime(path)


def with_attribute(path: Path) -> None:
    path.touch()
    path.chmod(0o600)


EVENTS = {event.__name__: event for event in (written, appended, resized, touched)}


@pytest.mark.parametrize("later", EVENTS)
@pytest.mark.parametrize("earlier", EVENTS)
def test_a_later_event_has_no_earlier_stamp(top: Path, earlier: str, later: str) -> None:
    one, two = top / f"{earlier}-{later}-1", top / f"{earlier}-{later}-2"
    one.write_text("x")
    two.write_text("x")
    wrong = 0
    for _ in range(TIMES):
        EVENTS[earlier](one)
        EVENTS[later](two)
        wrong += two.stat().st_mtime_ns < one.stat().st_mtime_ns
    assert wrong == 0


def test_a_directory_is_not_older_than_what_was_touched_before(top: Path) -> None:
    directory = top / "directory"
    directory.mkdir()
    wrong = 0
    for number in range(TIMES):
        touched(top / "before")
        (directory / str(number)).touch()
        os.rename(directory / str(number), directory / "new")
        wrong += fresh(directory).st_mtime_ns < (top / "before").stat().st_mtime_ns
    assert wrong == 0


def test_the_stamps_of_one_file_never_go_back(top: Path) -> None:
    path = top / "one"
    path.touch()
    last = fresh(path)
    chance: tuple[Callable[[Path], None], ...] = (appended, touched, with_attribute, resized)
    for number in range(4 * TIMES):
        chance[number % 4](path)
        now = path.stat()
        assert now.st_mtime_ns >= last.st_mtime_ns
        assert now.st_ctime_ns >= last.st_ctime_ns
        last = now


MAKEFILE = """\
stamp: linked
\t@touch stamp
linked: one.o two.o
\t@cat one.o two.o >linked
%.o: %.c
\t@cp $< $@
one.c two.c: generator
\t@sed s/x/$@/ generator >$@.new
\t@mv $@.new $@
"""


def test_make_has_nothing_to_do_after_a_build(top: Path) -> None:
    (top / "Makefile").write_text(MAKEFILE)
    (top / "generator").write_text("x")
    time.sleep(0.1)
    again = []
    for number in range(30):
        subprocess.run(
            "rm -f stamp linked *.o *.c; touch generator; make -s", shell=True, cwd=top, check=True
        )
        again.append(subprocess.run(["make", "-q"], cwd=top).returncode)
        if number % 10 == 0:
            time.sleep(0.01)
    assert sum(again) == 0


def test_find_sees_what_is_newer(top: Path) -> None:
    """`find -newer`, `tar --newer`, incremental backups: nothing that came later is missed."""
    directory = top / "found"
    directory.mkdir()
    for number in range(TIMES):
        (directory / "mark").write_text("x")
        touched(directory / f"late-{number}")
    older = subprocess.run(
        ["find", directory, "-type", "f", "!", "-newermt", "2000-01-01"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert older.stdout == ""
    late = [(directory / f"late-{number}").stat().st_mtime_ns for number in range(TIMES)]
    assert late == sorted(late)


# --- far times ---------------------------------------------------------------

NS = 10**9
FIRST, LAST = -(1 << 63), (1 << 63) - 1
FAR_TIMES = {
    "0000": (-62_167_219_200 * NS, FIRST),
    "1600": (-11_676_096_000 * NS, FIRST),
    "before the first": (FIRST - 1, FIRST),
    "the first": (FIRST, FIRST),
    "1969": (-86_400 * NS - 1, -86_400 * NS - 1),
    "2038": (2_147_558_400 * NS + 5, 2_147_558_400 * NS + 5),
    "2106": (4_294_987_200 * NS, 4_294_987_200 * NS),
    "the last": (LAST, LAST),
    "after the last": (LAST + 1, LAST),
    "2300": (10_413_792_000 * NS, LAST),
    "9999": (253_402_214_400 * NS, LAST),
    "the kernel's first": (-(1 << 63) * NS, FIRST),
    "the kernel's last": (((1 << 63) - 1) * NS, LAST),
}


def set_times(path: Path, atime: int, mtime: int) -> None:
    """Set times, as os.utime does, which refuses the kernel's extremes."""
    times = (Timespec * 2)(Timespec(*divmod(atime, NS)), Timespec(*divmod(mtime, NS)))
    assert libc.utimensat(AT_FDCWD, os.fsencode(path), times, AT_SYMLINK_NOFOLLOW) == 0


def far_files(top: Path) -> dict[Path, tuple[int, int]]:
    """Make files of each type with far times; by path, the access and change time they have."""
    made = {}
    for name, (asked, kept) in FAR_TIMES.items():
        for kind in ("file", "link", "empty"):
            path = top / f"{name}-{kind}"
            make(path, kind)
            set_times(path, 0, asked)
            set_times(path, asked, asked)
            made[path] = kept, kept
        set_times(top / f"{name}-file", 1, asked)
        made[top / f"{name}-file"] = 1, kept
    return made


def times_of(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    return {path: (s.st_atime_ns, s.st_mtime_ns) for path in paths for s in [os.lstat(path)]}


def test_far_times_are_clamped_and_kept(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    made = far_files(store.mountpoint)
    assert times_of(made) == made
    fd = os.open(store.mountpoint, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    store.kill()
    store.mount()
    assert times_of(made) == made
    store.remount()
    assert times_of(made) == made
    done = store.cli("fsck", store.store)
    assert "Clean" in done.stdout


def test_programs_that_copy_times_take_far_ones(shared_mount: Path, tmp_path: Path) -> None:
    """What they read from another file system, and from an archive."""
    source, archive = tmp_path / "source", tmp_path / "archive.tar"
    source.mkdir()
    (source / "file").write_text("x")
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for year, seconds in (("1500", -14_831_769_600), ("9999", 253_402_214_400)):
            member = tarfile.TarInfo(year)
            member.mtime = seconds
            tar.addfile(member)
    for command in (
        ["touch", "-d", "9999-12-31 UTC", source / "file"],
        ["cp", "-p", source / "file", shared_mount / "copied"],
        ["tar", "-C", shared_mount, "-xf", archive],
        ["touch", "-d", "1600-01-01 UTC", shared_mount / "touched"],
        ["touch", "-ad", "2300-01-01 UTC", shared_mount / "touched"],
        ["cp", "-a", shared_mount / "touched", shared_mount / "again"],
    ):
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    found = {name: os.stat(shared_mount / name).st_mtime_ns for name in os.listdir(shared_mount)}
    assert found.pop("copied") == min(os.stat(source / "file").st_mtime_ns, LAST)
    assert found == {"1500": FIRST, "9999": LAST, "touched": FIRST, "again": FIRST}
    assert os.stat(shared_mount / "again").st_atime_ns == LAST


# --- the clock ---------------------------------------------------------------


def test_a_stamp_of_the_kernel_that_is_ahead_within_a_tick_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coarse = 1_000_000_000_000

    def read(number: int) -> int:
        assert number == 5
        return coarse

    monkeypatch.setattr(time, "clock_gettime_ns", read)
    monkeypatch.setattr(clock, "_latest", 0)
    assert clock.now() == coarse
    clock.came(coarse - 5)
    assert clock.now() == coarse
    clock.came(coarse + 3_000_000)
    assert clock.now() == coarse + 3_000_000
    clock.came(coarse + 2_000_000)
    assert clock.now() == coarse + 3_000_000
    clock.came(coarse + 86_400 * 10**9)  # a user set it
    assert clock.now() == coarse + 3_000_000
    coarse += 4_000_000
    assert clock.now() == coarse
    coarse -= 3600 * 10**9  # the clock was set back
    assert clock.now() == coarse
    clock.came(coarse + 1)
    assert clock.now() == coarse + 1
