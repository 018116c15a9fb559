"""The mounts that the kernel knows, and how they end.

`/proc/self/mountinfo` is the truth: one line a mount, names in bytes with
spaces, tabs, newlines and backslashes as octal escapes (proc_pid_mountinfo(5)).
A store's mount has type `fuse.fusestore`, and the store's path as its source.

A daemon that hangs makes every `stat` below its mount hang with it, beyond the
reach of a signal.  So nothing here touches a mount but in a child process,
which can be left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from ..errors import FusestoreError, StoreBusyError, UsageError

SUBTYPE = "fusestore"
BDI = Path("/sys/class/bdi")
MOUNTINFO = Path("/proc/self/mountinfo")

PROBE_SECONDS = 10.0
UNMOUNT_SECONDS = 60.0

_PROBE = """
import os, sys
try:
    os.statvfs(sys.argv[1])
    print(0, os.stat(sys.argv[1]).st_dev)
except OSError as error:
    print(error.errno, 0)
"""


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount of a store."""

    store: Path
    mountpoint: Path
    device: int
    """As `st_dev` of every file on it."""
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a path answered to `statfs` (which the kernel never answers itself) and `stat`."""

    errno: int
    """0 when it answered well."""
    device: int


def source_of(store: Path) -> str:
    """The source to mount a store under: its path, in the characters pyfuse3 and libfuse take.

    Letters, digits and common signs stay; all else, `%` and `,` too, is percent-encoded.
    """
    return quote_from_bytes(os.fsencode(store), safe="/:=+@~ !()[]{}'&*;^#$<>|?")


class Entry(NamedTuple):
    """A line of a mountinfo file."""

    place: Path
    kind: str
    source: bytes
    device: int
    options: tuple[str, ...]


def parse_entries(data: bytes) -> Iterator[Entry]:
    """The lines of a mountinfo file, oldest first."""
    for line in data.split(b"\n"):
        head, separator, tail = line.partition(b" - ")
        fields, types = head.split(b" "), tail.split(b" ")
        if not separator or len(fields) < 6 or len(types) < 2:
            continue
        major, _, minor = fields[2].partition(b":")
        yield Entry(
            place=Path(os.fsdecode(_unescape(fields[4]))),
            kind=os.fsdecode(types[0]),
            source=_unescape(types[1]),
            device=os.makedev(int(major), int(minor)),
            options=tuple(os.fsdecode(fields[5]).split(",")),
        )


def parse_mountinfo(data: bytes) -> Iterator[Mount]:
    """The stores' mounts among the lines of a mountinfo file, oldest first."""
    for place, kind, source, device, options in parse_entries(data):
        if kind == f"fuse.{SUBTYPE}":
            store = Path(os.fsdecode(unquote_to_bytes(source)))
            yield Mount(store, place, device, options)


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), field)


def all_mounts() -> list[Mount]:
    """The mounts of all stores that this process sees, oldest first."""
    return list(parse_mountinfo(MOUNTINFO.read_bytes()))


def mounts_of(store: Path) -> list[Mount]:
    """The mounts of one store (an absolute path without links), oldest first."""
    return [mount for mount in all_mounts() if mount.store == store]


def locate(path: Path) -> Path:
    """The absolute path without links of a directory that may be a dead or hanging mount.

    The last name is not looked at if a store is mounted there.
    """
    path = Path(os.path.abspath(path))
    place = Path(os.path.realpath(path.parent)) / path.name
    if any(mount.mountpoint == place for mount in all_mounts()):
        return place
    return Path(os.path.realpath(path))


def find(mountpoint: Path) -> Mount | None:
    """The topmost mount of a store at exactly this path (see `locate`), or None."""
    found = [mount for mount in all_mounts() if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def read_further_ahead(mountpoint: Path, length: int) -> None:
    """Have the kernel ask for more at a time when files are read in order.

    Its own choice is 128 KiB.  Only root may say so, and only after the first answer of the mount.
    """
    mount = find(mountpoint)
    if mount is not None:
        place = f"{os.major(mount.device)}:{os.minor(mount.device)}"
        with contextlib.suppress(OSError):
            (BDI / place / "read_ahead_kb").write_text(f"{length >> 10}\n")


def containing(path: Path) -> Mount | None:
    """The mount of a store that a file or directory lies on, or None; OSError from `stat`."""
    device = os.stat(path).st_dev
    found = [mount for mount in all_mounts() if mount.device == device]
    return found[-1] if found else None


def attribute(path: Path, name: str) -> bytes:
    """An extended attribute of a file on a mount; UsageError where mounts have none."""
    try:
        return os.getxattr(path, name)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise UsageError(
            f"{path} is on a mount with the option noxattr: mount the store without it to see this."
        ) from None


# --- alive, dead, hanging ----------------------------------------------------


def probe(path: Path, seconds: float = PROBE_SECONDS) -> Answer | None:
    """What a path answers, or None when it does not answer in time."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    output = _output(child, seconds)
    if output is None:
        return None
    code, device = output.split()
    return Answer(int(code), int(device))


def is_dead(mountpoint: Path, seconds: float = PROBE_SECONDS) -> bool:
    """Whether the daemon of a mount is gone, so that the kernel answers in its place."""
    answer = probe(mountpoint, seconds)
    return answer is not None and answer.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def check_answers(mountpoint: Path, store: Path, seconds: float = PROBE_SECONDS) -> None:
    """See that a store is mounted and answers, through the kernel; FusestoreError when not."""
    mount = find(mountpoint)
    answer = probe(mountpoint, seconds)
    if answer is None:
        raise FusestoreError(f"{mountpoint} is mounted, and does not answer.")
    if answer.errno:
        raise FusestoreError(
            f"{mountpoint} is mounted, and answers with an error: {os.strerror(answer.errno)}."
        )
    if mount is None or mount.store != store or mount.device != answer.device:
        raise FusestoreError(
            f"The daemon says that it is ready, and {mountpoint} is not its mount."
        )
    if answer.device == os.stat(mountpoint.parent).st_dev:
        raise FusestoreError(f"{mountpoint} is still the directory that it was.")


def clear_dead(mountpoint: Path) -> bool:
    """Unmount a store's mount whose daemon is gone; False when there is none there.

    FusestoreError when it cannot be unmounted.
    """
    if find(mountpoint) is None or not is_dead(mountpoint):
        return False
    status, message = _fusermount("-uz", mountpoint)
    if status != 0:
        raise FusestoreError(f"The dead mount {mountpoint} cannot be cleared: {message}.")
    return True


def unmount(mountpoint: Path, seconds: float = UNMOUNT_SECONDS) -> None:
    """Unmount a live mount of a store.  The daemon has to answer meanwhile: not from its loop.

    UsageError when nothing is mounted there, StoreBusyError when it is in use,
    FusestoreError when it fails or takes longer than `seconds`.
    """
    if find(mountpoint) is None:
        raise UsageError(f"No store is mounted on {mountpoint}.")
    status, message = _fusermount("-u", mountpoint, seconds)
    if status == 0:
        return
    if "busy" in message:
        raise StoreBusyError(f"{mountpoint} is busy: {_users_text(mountpoint)}.")
    if find(mountpoint) is not None:
        raise FusestoreError(f"{mountpoint} cannot be unmounted: {message}.")


def _fusermount(flag: str, mountpoint: Path, seconds: float = UNMOUNT_SECONDS) -> tuple[int, str]:
    """Exit status (-1: none in time) and complaint of `fusermount3`."""
    try:
        child = subprocess.Popen(
            ["fusermount3", flag, "--", mountpoint],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            cwd="/",
        )
    except FileNotFoundError:
        raise FusestoreError("The program fusermount3 is missing: install fuse3.") from None
    complaint = _output(child, seconds)
    if complaint is None:
        return -1, f"it took longer than {seconds:.0f} seconds"
    message = complaint.decode(errors="replace").strip().removeprefix("fusermount3: ")
    return child.returncode, message.rstrip(".")


def _output(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """What a child prints; None when it has not ended in time, and is killed or left behind."""
    try:
        return child.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        child.kill()
    assert child.stdout is not None
    child.stdout.close()
    try:
        child.wait(1.0)
    except subprocess.TimeoutExpired:
        child.returncode = -9  # It ends when its system call does; nobody waits for that.
    return None


# --- who keeps a mount busy --------------------------------------------------


def users_of(mountpoint: Path, count_max: int = 3) -> list[tuple[int, str]]:
    """Some processes (number, name) with a file open, or their directory, on a mount.

    Only those that this process may look at; no request reaches the mount.
    """
    users = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _uses(entry, mountpoint):
            try:
                name = (entry / "comm").read_text(errors="replace").strip()
            except OSError:
                continue
            users.append((int(entry.name), name))
            if len(users) == count_max:
                break
    return users


def _uses(process: Path, mountpoint: Path) -> bool:
    try:
        links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
    except OSError:
        return False
    for link in links:
        try:
            target = Path(os.readlink(link))
        except OSError:
            continue
        if target.is_relative_to(mountpoint):
            return True
    return False


def _users_text(mountpoint: Path) -> str:
    users = ", ".join(f"{name} (process {pid})" for pid, name in users_of(mountpoint))
    if users:
        return f"{users} has files or its directory there"
    return f"something uses it (see `fuser -vm {mountpoint}`)"
