"""Opening, bytes, mappings, locks and space of a mounted store are those of POSIX.

With `--plain` the same tests run on a plain directory, which shows that they
ask for what the kernel's own file systems give.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.mounted_store import Directory, Store
from support.posixly import (
    ACCESS,
    ALICE,
    DEFAULT,
    KIB,
    MIB,
    TEAM,
    for_alice,
    fresh,
    make,
    names_in,
    opened,
    read_uncached,
    refused,
    tick,
)
from support.processes import in_child

pytestmark = pytest.mark.mounted


# --- opening -----------------------------------------------------------------


def test_excl_makes_a_file_only_once(shared_mount: Path) -> None:
    path = shared_mount / "file"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with opened(path, flags), refused(errno.EEXIST):
        os.open(path, flags)
    (shared_mount / "link").symlink_to("new")
    with refused(errno.EEXIST):
        os.open(shared_mount / "link", flags)


def test_excl_lets_one_of_many_win(shared_mount: Path) -> None:
    script = (
        "import os, sys\n"
        "won = 0\n"
        "for number in range(50):\n"
        "    try:\n"
        "        os.close(os.open(f'{sys.argv[1]}/{number}', os.O_CREAT | os.O_EXCL))\n"
        "        won += 1\n"
        "    except FileExistsError:\n"
        "        pass\n"
        "print(won)\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, shared_mount], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert sum(int(worker.communicate()[0]) for worker in workers) == 50
    assert len(names_in(shared_mount)) == 50


def test_trunc_empties_a_file(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"a long line")
    tick()
    before = path.stat().st_mtime_ns
    with opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
    assert path.read_bytes() == b""
    assert path.stat().st_mtime_ns > before
    path.write_bytes(b"short")
    assert path.read_bytes() == b"short"


def test_append_writes_at_the_end_whatever_the_position(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
        os.write(fd, b"one")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
        os.pwrite(fd, b"three", 0)
        os.truncate(path, 8)
        os.write(fd, b"four")
    assert path.read_bytes() == b"onetwothfour"


def test_appending_processes_lose_nothing(shared_mount: Path) -> None:
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for number in range(300):\n"
        "    os.write(fd, f'{sys.argv[2]}:{number:04}\\n'.encode())\n"
    )
    path = shared_mount / "log"
    path.touch()
    workers = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    lines = path.read_text().splitlines()
    for name in "ab":
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [f"{name}:{number:04}" for number in range(300)]
    assert len(lines) == 600


def test_directories_cannot_be_written_to(shared_mount: Path) -> None:
    with refused(errno.EISDIR):
        os.open(shared_mount, os.O_WRONLY)
    with refused(errno.EISDIR):
        os.open(shared_mount, os.O_CREAT | os.O_RDONLY)
    with refused(errno.ENOTDIR):
        make(shared_mount / "file", "file")
        os.open(shared_mount / "file", os.O_DIRECTORY)
    with opened(shared_mount, os.O_RDONLY) as fd, refused(errno.EISDIR):
        os.read(fd, 1)


def test_a_missing_name_is_told(shared_mount: Path) -> None:
    make(shared_mount / "file", "file")
    with refused(errno.ENOENT):
        os.stat(shared_mount / "nothing")
    with refused(errno.ENOENT):
        os.open(shared_mount / "nothing", os.O_RDONLY)
    with refused(errno.ENOENT):
        (shared_mount / "nothing/file").touch()
    with refused(errno.ENOTDIR):
        os.stat(shared_mount / "file/below")
    with refused(errno.ENOENT):
        os.unlink(shared_mount / "nothing")
    (shared_mount / "nothing").touch()
    assert (shared_mount / "nothing").exists()


def test_descriptors_open_for_one_thing_do_no_other(shared_mount: Path) -> None:
    make(shared_mount / "file", "file")
    with opened(shared_mount / "file", os.O_RDONLY) as fd:
        with refused(errno.EBADF):
            os.write(fd, b"x")
        with refused(errno.EINVAL):
            os.ftruncate(fd, 0)
    with opened(shared_mount / "file", os.O_WRONLY) as fd, refused(errno.EBADF):
        os.read(fd, 1)


def test_a_file_written_and_never_closed_reads_back(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"still open")
        assert path.read_bytes() == b"still open"
        assert read_uncached(path) == b"still open"


# --- bytes -------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "O_DIRECT"])
def test_random_writes_read_back(shared_mount: Path, direct: bool) -> None:
    randomness = random.Random(11)
    path = shared_mount / "file"
    expected = bytearray()
    grain = 4 * KIB if direct else 1
    with (
        opened(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)) as fd,
        mmap.mmap(-1, 2 * MIB) as buffer,
    ):
        for number in range(150):
            offset = randomness.randrange(6 * MIB // grain) * grain
            length = min(2 * MIB, grain + int(randomness.expovariate(1 / 60_000)) // grain * grain)
            buffer[:length] = randomness.randbytes(length)
            assert os.pwritev(fd, [memoryview(buffer)[:length]], offset) == length
            expected.extend(bytes(max(0, offset + length - len(expected))))
            expected[offset : offset + length] = buffer[:length]
            if number % 50 == 49:
                os.fsync(fd)
            if number % 10 == 9:
                assert read_uncached(path) == expected
    assert path.read_bytes() == expected


def test_reads_past_the_end_are_short(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"0123456789")
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 4) == b"456789"
        assert os.pread(fd, 100, 10) == b""
        assert os.pread(fd, 100, 2**62) == b""
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
        assert os.preadv(fd, [page], 0) == 10
        assert os.preadv(fd, [page], 4096) == 0


def test_a_large_file_in_odd_pieces(shared_mount: Path) -> None:
    data = random.Random(12).randbytes(9 * MIB + 12_345)
    path = shared_mount / "file"
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 77_777):
            file.write(data[start : start + 77_777])
    assert path.read_bytes() == data
    assert read_uncached(path) == data
    shutil.copyfile(path, shared_mount / "copy")
    assert read_uncached(shared_mount / "copy") == data


def test_truncated_bytes_never_come_back(shared_mount: Path) -> None:
    path = shared_mount / "file"
    for size in (10, 5000, 100_000, 3 * MIB):
        path.write_bytes(b"\xff" * size)
        with opened(path, os.O_RDWR) as fd:
            os.fsync(fd)
        os.truncate(path, size // 3)
        os.truncate(path, size * 2)
        kept = size // 3
        assert path.read_bytes() == b"\xff" * kept + bytes(size * 2 - kept)
        assert read_uncached(path) == b"\xff" * kept + bytes(size * 2 - kept)
    os.truncate(path, 0)
    with opened(path, os.O_WRONLY) as fd:
        os.pwrite(fd, b"end", 50_000)
    assert read_uncached(path) == bytes(50_000) + b"end"


def test_holes_read_as_zeros_and_take_no_space(shared_mount: Path) -> None:
    path = shared_mount / "sparse"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 1 << 32)
        assert os.fstat(fd).st_blocks * 512 < MIB
        os.pwrite(fd, b"island", 3 << 30)
        os.fsync(fd)
        assert os.pread(fd, 100, (3 << 30) - 50) == bytes(50) + b"island" + bytes(44)
        assert os.pread(fd, MIB, 1 << 30) == bytes(MIB)
        assert 0 < os.fstat(fd).st_blocks * 512 < MIB
        assert os.fstat(fd).st_size == 1 << 32


def test_blocks_grow_and_shrink_with_the_bytes(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, bytes(range(256)) * 4096 * 4, 0)
        os.fsync(fd)
        assert 4 * MIB <= fresh(path).st_blocks * 512 < 5 * MIB
        os.ftruncate(fd, MIB)
        os.fsync(fd)
        assert MIB <= fresh(path).st_blocks * 512 < 2 * MIB
        os.ftruncate(fd, 0)
        assert fresh(path).st_blocks == 0


@pytest.mark.not_plain
def test_files_have_up_to_2_to_the_63_bytes(mounted: Store) -> None:
    path = mounted.mountpoint / "huge"
    last = 2**63 - 2
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 2**63 - 1)
        assert os.fstat(fd).st_size == 2**63 - 1
        os.ftruncate(fd, 0)
        assert os.pwrite(fd, b"z", last) == 1
        assert os.fstat(fd).st_size == 2**63 - 1
        assert os.pread(fd, 1, last) == b"z"
        assert os.pread(fd, 10, 2**62) == bytes(10)
        os.pwrite(fd, b"middle", 2**40 + 1)
        with refused(errno.EFBIG, errno.EINVAL):
            os.pwrite(fd, b"x", 2**63 - 1)
        with refused(errno.EINVAL):
            os.ftruncate(fd, -1)
        with refused(errno.EINVAL):
            os.pwrite(fd, b"x", -1)
        os.fsync(fd)
    mounted.remount("allow_other")
    assert path.stat().st_size == 2**63 - 1
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 6, last - 5) == bytes(5) + b"z"
        assert os.pread(fd, 8, 2**40) == b"\0middle\0"


def test_negative_offsets_are_refused(shared_mount: Path) -> None:
    with opened(shared_mount / "file", os.O_RDWR | os.O_CREAT) as fd:
        with refused(errno.EINVAL):
            os.pwrite(fd, b"x", -1)
        with refused(errno.EINVAL):
            os.ftruncate(fd, -1)
    assert (shared_mount / "file").stat().st_size == 0


def test_the_file_size_limit_of_a_process_holds(shared_mount: Path) -> None:
    def body() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with opened(shared_mount / "file", os.O_RDWR | os.O_CREAT) as fd:
            assert os.write(fd, bytes(8192)) == 5000
            with refused(errno.EFBIG):
                os.write(fd, b"x")
            with refused(errno.EFBIG):
                os.ftruncate(fd, 6000)

    in_child(body)
    assert (shared_mount / "file").stat().st_size == 5000


def test_posix_fallocate_makes_room(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"kept", 0)
        os.posix_fallocate(fd, 0, 300_000)
    assert path.read_bytes() == b"kept" + bytes(299_996)


def test_data_and_holes_can_be_sought(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"x" * 10_000)
    with opened(path, os.O_RDONLY) as fd:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 10_000
        with refused(errno.ENXIO):
            os.lseek(fd, 10_000, os.SEEK_DATA)


# --- mmap --------------------------------------------------------------------


def test_shared_maps_read_and_write_the_file(shared_mount: Path) -> None:
    path = shared_mount / "file"
    data = bytearray(random.Random(5).randbytes(2 * MIB + 100))
    path.write_bytes(data)
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, len(data)) as view:
        assert view[:] == data
        for place in (0, 4095, MIB - 1, 2 * MIB, len(data) - 1):
            view[place] = data[place] = 255 - data[place]
        assert os.pread(fd, len(data), 0) == data
        view.flush()
        os.pwrite(fd, b"by write", 5000)
        data[5000:5008] = b"by write"
        assert view[4990:5010] == data[4990:5010]
    assert path.read_bytes() == data
    assert read_uncached(path) == data


def test_a_map_outlives_its_descriptor_and_its_name(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(bytes(8192))
    os.link(path, shared_mount / "second")
    with opened(path, os.O_RDWR) as fd:
        view = mmap.mmap(fd, 8192)
    with view:
        os.unlink(path)
        view[100:103] = b"abc"
        view.flush()
    assert read_uncached(shared_mount / "second")[100:103] == b"abc"


def test_two_processes_share_a_map(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(bytes(4096))

    def body() -> None:
        with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 4096) as view:
            view[7] = 7

    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 4096) as view:
        in_child(body)
        assert view[7] == 7


def test_programs_run_from_the_mount(shared_mount: Path) -> None:
    shutil.copy("/bin/echo", shared_mount / "echo")
    done = subprocess.run([shared_mount / "echo", "hello"], capture_output=True, check=True)
    assert done.stdout == b"hello\n"


# --- locks -------------------------------------------------------------------


def test_locks_keep_processes_apart(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()

    def taken(lock: Callable[[int, int], object]) -> bool:
        def body() -> bool:
            with opened(path, os.O_RDWR) as fd:
                try:
                    lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                return False

        return in_child(body)

    for lock in (fcntl.flock, fcntl.lockf):
        with opened(path, os.O_RDWR) as fd:
            lock(fd, fcntl.LOCK_EX)
            assert taken(lock)
            lock(fd, fcntl.LOCK_UN)
            assert not taken(lock)


# --- space -------------------------------------------------------------------


def test_statfs_is_plausible(shared_mount: Path) -> None:
    found = os.statvfs(shared_mount)
    assert found.f_namemax == 255
    assert found.f_bsize >= 512
    assert found.f_frsize >= 512
    assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
    assert 0 < found.f_ffree <= found.f_files


@pytest.mark.not_plain
def test_statfs_counts_the_code_and_each_device_once(shared_mount: Path) -> None:
    below = os.statvfs("/tmp" if shared_mount.is_relative_to("/tmp") else shared_mount.parents[4])
    device = below.f_bavail * below.f_frsize
    found = os.statvfs(shared_mount)
    usable = found.f_bavail * found.f_frsize
    assert 0.55 * device < usable <= 0.68 * device


def test_statfs_shrinks_by_what_is_written(shared_mount: Path) -> None:
    def free() -> int:
        found = os.statvfs(shared_mount)
        return found.f_bfree * found.f_frsize

    taken = 0.0
    for attempt in range(4):  # others write to the same device
        before = free()
        with opened(shared_mount / f"file{attempt}", os.O_WRONLY | os.O_CREAT) as fd:
            for number in range(48):
                os.write(fd, random.Random(number).randbytes(MIB))
            os.fsync(fd)
        taken = (before - free()) / MIB
        if 40 <= taken <= 80:
            return
    pytest.fail(f"48 MiB took {taken:.1f} MiB of the free space")


# --- remount -----------------------------------------------------------------


def snapshot(top: Path) -> dict[str, tuple[object, ...]]:
    """All that a tree shows: attributes, targets, bytes, extended attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(top):
        for name in [".", *directories, *files]:
            path = os.path.join(directory, name)
            s = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(s.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(s.st_mode):
                content = Path(path).read_bytes()
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            found[path] = (
                *(s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_rdev, s.st_size),
                *(s.st_mtime_ns, s.st_ctime_ns, s.st_blocks, content, attributes),
            )
    return found


def test_a_remount_keeps_everything(mounted: Store | Directory) -> None:
    top = mounted.mountpoint / "tree"
    (top / "a/b").mkdir(parents=True)
    (top / "a/file").write_bytes(random.Random(1).randbytes(2 * MIB + 5))
    (top / "a/small").write_bytes(b"small")
    (top / "a/empty").touch()
    os.link(top / "a/file", top / "a/b/linked")
    os.symlink("../nowhere/" + "x" * 200, top / "a/link")
    os.mkfifo(top / "fifo")
    os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(10, 200))
    os.chown(top / "a/small", ALICE, TEAM)
    os.chmod(top / "a/small", 0o6711)
    os.chmod(top / "a/b", 0o1755)
    os.setxattr(top / "a/small", "user.colour", b"red")
    os.setxattr(top / "a", DEFAULT, for_alice(7))
    os.setxattr(top / "a/empty", ACCESS, for_alice(6))
    os.utime(top / "a/small", ns=(1, 1_234_567_890_123_456_789))
    os.truncate(top / "a/empty", 10 * MIB)
    with opened(top / "a/file", os.O_WRONLY) as fd:
        os.pwrite(fd, b"overwritten", MIB - 5)
    before = snapshot(top)
    for _ in range(2):
        mounted.remount("allow_other")
        assert snapshot(top) == before


@pytest.mark.not_plain
def test_a_read_only_mount_changes_nothing(mounted: Store) -> None:
    (mounted.mountpoint / "file").write_bytes(b"kept")
    mounted.remount("ro")
    assert (mounted.mountpoint / "file").read_bytes() == b"kept"
    for attempt in (
        lambda: (mounted.mountpoint / "file").write_bytes(b"x"),
        (mounted.mountpoint / "new").touch,
        lambda: os.unlink(mounted.mountpoint / "file"),
        lambda: os.chmod(mounted.mountpoint / "file", 0o600),
    ):
        with refused(errno.EROFS):
            attempt()


@pytest.mark.not_plain
@pytest.mark.parametrize("option", ["nosuid", "nodev", "noexec", "noatime"])
def test_mount_options_reach_the_kernel(make_store: Callable[..., Store], option: str) -> None:
    store = make_store()
    store.mount(option)
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    (line,) = (line for line in lines if line.split()[4] == str(store.mountpoint))
    assert option in line.split()[5].split(",")


@pytest.mark.not_plain
def test_virtual_attributes_answer_and_are_not_listed(shared_mount: Path) -> None:
    (shared_mount / "file").write_bytes(b"x")
    assert b'"size"' in os.getxattr(shared_mount / "file", "user.fusestore.layout")
    assert os.getxattr(shared_mount, "user.fusestore.code") == b"2+1"
    assert os.listxattr(shared_mount / "file") == []
    assert os.listxattr(shared_mount) == []


@pytest.mark.not_plain
def test_a_directorys_code_is_inherited(shared_mount: Path) -> None:
    def code(path: Path) -> bytes:
        return os.getxattr(path, "user.fusestore.code")

    top = shared_mount / "top"
    top.mkdir()
    (top / "before").write_bytes(b"x")
    os.setxattr(top, "user.fusestore.code", b"1+2")
    (top / "below").mkdir()
    (top / "below/file").write_bytes(b"y" * 100_000)
    assert code(top) == code(top / "below") == code(top / "below/file") == b"1+2"
    assert code(top / "before") == b"2+1"
    assert read_uncached(top / "below/file") == b"y" * 100_000
    for bad in (b"", b"2", b"+", b"0+1", b"two+one", b"4+1", b"2+0"):
        with refused(errno.EINVAL):
            os.setxattr(top, "user.fusestore.code", bad)
    assert code(top) == b"1+2"
