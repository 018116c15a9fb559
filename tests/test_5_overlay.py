"""RENAME_WHITEOUT, and overlayfs with its upper layer on a mount, as container engines use it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.mounted_store import Store
from support.posixly import (
    EXCHANGE,
    NOREPLACE,
    WHITEOUT,
    make,
    names_in,
    opened,
    refused,
    renameat2,
)

MakeStore = Callable[..., Store]
pytestmark = pytest.mark.mounted


# --- one whiteout ------------------------------------------------------------


def is_whiteout(path: Path) -> bool:
    found = os.lstat(path)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


@pytest.mark.parametrize("across", [False, True], ids=["within", "across"])
@pytest.mark.parametrize("target", ["nothing", "file", "empty"])
@pytest.mark.parametrize("source", ["file", "link", "empty", "full"])
def test_a_whiteout_takes_the_old_name(
    shared_mount: Path, source: str, target: str, across: bool
) -> None:
    first, second = shared_mount / "first", shared_mount / ("second" if across else "first")
    first.mkdir()
    second.mkdir(exist_ok=True)
    old, new = first / "old", second / "new"
    make(old, source)
    make(new, target)
    inode = os.lstat(old).st_ino
    directory = source in ("empty", "full")
    if target != "nothing" and (target == "empty") != directory:
        with refused(errno.EISDIR, errno.ENOTDIR):
            renameat2(old, new, WHITEOUT)
        assert os.lstat(old).st_ino == inode
        return
    renameat2(old, new, WHITEOUT)
    assert os.lstat(new).st_ino == inode
    found = os.lstat(old)
    assert is_whiteout(old)
    assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0, 1)
    assert found.st_ino != inode
    assert names_in(first) == (["old"] if across else ["new", "old"])
    assert first.stat().st_nlink == 2 + (directory and not across)
    assert second.stat().st_nlink == 2 + directory
    os.unlink(old)
    assert not os.path.lexists(old)


def test_a_whiteout_with_other_flags(shared_mount: Path) -> None:
    make(shared_mount / "one", "file")
    make(shared_mount / "two", "file")
    with refused(errno.EEXIST):
        renameat2(shared_mount / "one", shared_mount / "two", WHITEOUT | NOREPLACE)
    with refused(errno.EINVAL):
        renameat2(shared_mount / "one", shared_mount / "two", WHITEOUT | EXCHANGE)
    assert (shared_mount / "one").read_bytes() == b"one"
    renameat2(shared_mount / "one", shared_mount / "three", WHITEOUT | NOREPLACE)
    assert names_in(shared_mount) == ["one", "three", "two"]
    renameat2(shared_mount / "one", shared_mount / "two", EXCHANGE)
    assert is_whiteout(shared_mount / "two")
    assert (shared_mount / "one").read_bytes() == b"two"


def test_a_whiteout_counts_in_a_quota_and_survives_a_crash(make_store: MakeStore) -> None:
    store = make_store()
    store.mount()
    top = store.mountpoint / "top"
    top.mkdir()
    store.cli("quota", "set", top, "--files", "3")
    for name in ("a", "b"):
        (top / name).touch()
    renameat2(top / "a", top / "c", WHITEOUT)
    with refused(errno.EDQUOT):
        renameat2(top / "b", top / "d", WHITEOUT)
    assert names_in(top) == ["a", "b", "c"]
    renameat2(top / "b", store.mountpoint / "out", WHITEOUT)
    with opened(top, os.O_RDONLY) as fd:
        os.fsync(fd)
    store.kill()
    store.mount()
    assert names_in(top) == ["a", "b", "c"]
    assert [is_whiteout(top / name) for name in "abc"] == [True, True, False]
    assert (store.mountpoint / "out").exists()
    assert "Clean" in store.cli("fsck", store.store).stdout


# --- overlayfs ---------------------------------------------------------------


@contextlib.contextmanager
def overlay(place: Path, upper: Path, *lower: Path, options: str = "") -> Iterator[Path]:
    """Mount an overlay on a directory; `upper` and its `.work` are made."""
    work = upper.with_name(upper.name + ".work")
    for directory in (place, upper, work):
        directory.mkdir(exist_ok=True)
    layers = f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work}{options}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", layers, place], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(lower: Path) -> None:
    """Make a small image: files, links, directories in directories."""
    lower.mkdir()
    for name in ("a", "b", "c"):
        (lower / name / "deep/deeper").mkdir(parents=True)
        for number in range(4):
            (lower / name / f"file{number}").write_bytes(name.encode() * (number * 5000 + 1))
            (lower / name / "deep" / f"file{number}").write_text(str(number))
        (lower / name / "deep/deeper/file").write_text("deepest")
        (lower / name / "link").symlink_to("file0")


def image(top: Path) -> dict[str, tuple[object, ...]]:
    """What a tree shows, without times and numbers of inodes."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(directory) / name
            s = os.lstat(path)
            content: object = None
            if stat.S_ISREG(s.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(s.st_mode):
                content = os.readlink(path)
            kept = [
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in sorted(os.listxattr(path, follow_symlinks=False))
            ]
            found[str(path.relative_to(top))] = (s.st_mode, s.st_uid, s.st_gid, content, kept)
    return found


class Changes:
    """Random changes of a tree; the same seed makes the same ones on equal trees.

    No hard links: the kernel's overlayfs finds the other names of a file stale on any FUSE file
    system once the name that it knows first is removed.
    """

    def __init__(self, top: Path, seed: int) -> None:
        self.top = top
        self.chance = random.Random(seed)
        self.count = 0

    def run(self, count: int) -> list[int]:
        """Make so many changes; the errnos of those that were refused."""
        kinds = (
            *(self.write, self.write, self.copy_tree, self.append, self.remove),
            *(self.remove_tree, self.replace_tree, self.rename, self.rename, self.exchange),
            *(self.chmod, self.attribute, self.symlink, self.mkdir),
        )
        refusals = []
        for _ in range(count):
            self.count += 1
            try:
                self.chance.choice(kinds)()
            except OSError as error:
                refusals.append(error.errno or 0)
        assert errno.ESTALE not in refusals
        return refusals

    def pick(self, directories: bool = False) -> Path:
        """Something that is there."""
        paths = []
        for directory, folders, files in sorted(os.walk(self.top)):
            paths += [Path(directory) / name for name in sorted(folders if directories else files)]
        return self.chance.choice(paths) if paths else self.top / "nothing"

    def new(self) -> Path:
        """A new name somewhere."""
        return self.pick(directories=True) / f"new{self.count}"

    def write(self) -> None:
        self.new().write_bytes(self.chance.randbytes(self.chance.randrange(100_000)))

    def copy_tree(self) -> None:
        fill(self.new())

    def append(self) -> None:
        path = self.pick()
        if not path.is_symlink():
            with open(path, "ab") as file:
                file.write(b"appended")

    def remove(self) -> None:
        self.pick().unlink()

    def remove_tree(self) -> None:
        shutil.rmtree(self.pick(directories=True))

    def replace_tree(self) -> None:
        """A directory that is made anew is opaque: nothing of the lower layer may show."""
        path = self.pick(directories=True)
        shutil.rmtree(path)
        path.mkdir()
        (path / "fresh").write_text("fresh")

    def rename(self) -> None:
        path, new = self.pick(self.chance.random() < 0.5), self.new()
        if not new.is_relative_to(path):
            os.rename(path, new if self.chance.random() < 0.7 else self.pick_like(path))

    def pick_like(self, path: Path) -> Path:
        """A name that a rename may replace."""
        return self.new() if path.is_dir() else self.pick()

    def exchange(self) -> None:
        renameat2(self.pick(), self.pick(), EXCHANGE)

    def chmod(self) -> None:
        path = self.pick(self.chance.random() < 0.5)
        if not path.is_symlink():
            path.chmod(self.chance.choice((0o600, 0o755, 0o4711)))

    def attribute(self) -> None:
        path = self.pick()
        if not path.is_symlink():
            os.setxattr(path, "trusted.note", str(self.count).encode())

    def symlink(self) -> None:
        self.new().symlink_to(f"target{self.count}")

    def mkdir(self) -> None:
        self.new().mkdir()


@pytest.mark.parametrize(
    ("options", "writeback"),
    [("", False), (",redirect_dir=on,metacopy=on", False), (",index=off,xino=off", True)],
)
def test_an_upper_layer_on_a_mount_behaves_as_on_another_file_system(
    make_store: MakeStore,
    tmp_path: Path,
    options: str,
    writeback: bool,
    request: pytest.FixtureRequest,
) -> None:
    seed = request.config.getoption("--model-seed")
    store = make_store()
    store.mount(*(["writeback"] if writeback else []))
    low, there = tmp_path / "low", store.mountpoint
    fill(low)
    fill(tmp_path / "low2")
    plain = tmp_path / "plain"
    plain.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", plain], check=True)
    bases = ((tmp_path / "one", plain, low), (tmp_path / "two", there, tmp_path / "low2"))

    def of_both(layer: int, act: Callable[[Path], object]) -> None:
        """Mount the layer on both, act on each, and compare them."""
        with contextlib.ExitStack() as stack:
            images = []
            for place, top, lowest in bases:
                below = layers(top, layer, lowest)
                mounted = overlay(place, top / f"up{layer}", *below, options=options)
                act(stack.enter_context(mounted))
                images.append(image(place))
            assert images[0] == images[1]

    try:
        for layer in range(2):
            of_both(layer, lambda top, layer=layer: Changes(top, seed + layer).run(30))
            store.remount(*store.options)
            of_both(layer, lambda top: None)
        assert "Clean" in store.cli("fsck", store.store).stdout
    finally:
        subprocess.run(["umount", plain], check=True)


def layers(top: Path, count: int, lowest: Path) -> list[Path]:
    """The lower layers, the topmost first: those that were upper ones, as in an image."""
    return [*(top / f"up{number}" for number in reversed(range(count))), lowest]


def test_what_the_upper_layer_holds_is_what_an_engine_packs(
    make_store: MakeStore, tmp_path: Path
) -> None:
    """Whiteouts and opaque directories, which `docker commit` turns into a layer."""
    store = make_store()
    store.mount()
    fill(tmp_path / "low")
    up = store.mountpoint / "up"
    with overlay(tmp_path / "merged", up, tmp_path / "low") as merged:
        os.unlink(merged / "a/file0")
        os.rename(merged / "a/file1", merged / "a/renamed")
        shutil.rmtree(merged / "b")
        shutil.rmtree(merged / "c/deep")
        (merged / "c/deep").mkdir()
        assert names_in(merged / "a") == ["deep", "file2", "file3", "link", "renamed"]
        assert names_in(merged / "c/deep") == []
    assert is_whiteout(up / "a/file0")
    assert is_whiteout(up / "a/file1")
    assert is_whiteout(up / "b")
    assert os.getxattr(up / "c/deep", "trusted.overlay.opaque") == b"y"


def test_an_upper_layer_survives_a_killed_daemon(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    store.mount()
    fill(tmp_path / "low")
    up, work = store.mountpoint / "up", store.mountpoint / "up.work"
    up.mkdir()
    work.mkdir()
    place = tmp_path / "merged"
    place.mkdir()
    layers = f"lowerdir={tmp_path / 'low'},upperdir={up},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "o", "-o", layers, place], check=True)
    try:
        Changes(place, 11).run(30)
        with opened(store.mountpoint, os.O_RDONLY) as fd:
            os.fsync(fd)
        before = image(place)
        store.kill(clear=False)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    store.clear_mount()
    store.mount()
    with overlay(place, up, tmp_path / "low") as merged:
        assert image(merged) == before
        Changes(merged, 12).run(30)
    assert "Clean" in store.cli("fsck", store.store).stdout
