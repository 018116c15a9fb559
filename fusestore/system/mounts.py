"""Finding, probing and ending mounts.

The source is `/proc/self/mountinfo`: one line per mount, names in bytes with spaces,
tabs, newlines and backslashes as octal escapes (proc_pid_mountinfo(5)).  The mount of a
store has the type `fuse.fusestore`, and the path of the store as its source.

If a daemon hangs, every `stat` below its mount hangs, too, and no signal ends it.
Therefore this module touches mounts only in child processes, which can be abandoned.
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
LINKS_MAX = 40
"""The kernel follows no more links in a path."""

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
    """The `st_dev` of every file on it."""
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a path to `statfs` (which the kernel never answers itself) and `stat`."""

    errno: int
    """0 on success."""
    device: int


def source_of(store: Path) -> str:
    """Return the mount source of a store: its path in characters that pyfuse3 and libfuse accept.

    Letters, digits and common signs stay.  All other characters, including `%` and `,`, are
    percent-encoded.
    """
    return quote_from_bytes(os.fsencode(store), safe="/:=+@~ !()[]{}'&*;^#$<>|?")


class Entry(NamedTuple):
    """A line of a mountinfo file."""

    place: Path
    kind: str
    source: bytes
    device: int
    options: tuple[str, ...]
    details: bytes
    """The options of the file system itself, with octal escapes."""

    def is_overlay_of(self, mountpoint: Path) -> bool:
        """Whether it is an overlay with a layer in a mount."""
        parts = re.split(rb"[,:=]", _unescape(self.details))
        layers = [Path(os.fsdecode(part)) for part in parts if part.startswith(b"/")]
        return self.kind == "overlay" and any(at.is_relative_to(mountpoint) for at in layers)


def parse_entries(data: bytes) -> Iterator[Entry]:
    """Yield the lines of a mountinfo file, oldest first."""
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
            details=types[2] if len(types) > 2 else b"",
        )


def parse_mountinfo(data: bytes) -> Iterator[Mount]:
    """Yield the mounts of stores in a mountinfo file, oldest first."""
    for entry in parse_entries(data):
        if entry.kind == f"fuse.{SUBTYPE}":
            store = Path(os.fsdecode(unquote_to_bytes(entry.source)))
            yield Mount(store, entry.place, entry.device, entry.options)


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), field)


def all_mounts() -> list[Mount]:
    """Return the mounts of all stores that this process sees, oldest first."""
    return list(parse_mountinfo(MOUNTINFO.read_bytes()))


def mounts_of(store: Path) -> list[Mount]:
    """Return the mounts of one store (an absolute path without links), oldest first."""
    return [mount for mount in all_mounts() if mount.store == store]


def lies_on(store: Path, path: Path) -> Path | None:
    """Return the mount point on which a path lies if that leads to a mount of a store, or None.

    Links are resolved, and overlays above such a mount count.  A daemon that looked at such a
    path would wait for itself, so the mount itself is never asked.  The path need not exist.
    """
    own = {mount.mountpoint for mount in mounts_of(store)}
    if own:
        entries = list(parse_entries(MOUNTINFO.read_bytes()))
        own |= {entry.place for entry in entries if any(map(entry.is_overlay_of, own))}
    at, rest, links = Path("/"), [*reversed(path.absolute().parts[1:])], 0
    while rest:
        name = rest.pop()
        at = at.parent if name == ".." else at / name
        for place in own:
            if at.is_relative_to(place):
                return place
        try:
            target = Path(os.readlink(at))
        except OSError:
            continue  # not a link, or missing
        links += 1
        if links > LINKS_MAX:
            return None
        at = Path("/") if target.is_absolute() else at.parent
        rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return None


def locate(path: Path) -> Path:
    """Return the absolute path without links of a directory.

    The directory may be a dead or hanging mount: the last name is not resolved if a store
    is mounted there.
    """
    path = Path(os.path.abspath(path))
    place = Path(os.path.realpath(path.parent)) / path.name
    if any(mount.mountpoint == place for mount in all_mounts()):
        return place
    return Path(os.path.realpath(path))


def find(mountpoint: Path) -> Mount | None:
    """Return the topmost mount of a store at exactly this path (see `locate`), or None."""
    found = [mount for mount in all_mounts() if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def read_further_ahead(mountpoint: Path, length: int) -> None:
    """Raise the kernel's read-ahead of a mount to `length` bytes; its default is 128 KiB.

    This works only for root, and only after the first answer of the mount.
    """
    mount = find(mountpoint)
    if mount is not None:
        place = f"{os.major(mount.device)}:{os.minor(mount.device)}"
        with contextlib.suppress(OSError):
            (BDI / place / "read_ahead_kb").write_text(f"{length >> 10}\n")


def containing(path: Path) -> Mount | None:
    """Return the mount of a store that contains a file or directory, or None; OSError of `stat`."""
    device = os.stat(path).st_dev
    found = [mount for mount in all_mounts() if mount.device == device]
    return found[-1] if found else None


def attribute(path: Path, name: str) -> bytes:
    """Return an extended attribute of a file; UsageError if its mount has no attributes."""
    try:
        return os.getxattr(path, name)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise UsageError(
            f"{path} is on a mount with the option noxattr: mount the store without this option."
        ) from None


# --- alive, dead, hanging ----------------------------------------------------


def probe(path: Path, seconds: float = PROBE_SECONDS) -> Answer | None:
    """Return the answer of a path, or None if it does not answer in time."""
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
    """Return whether the daemon of a mount is gone: the kernel then reports an error."""
    answer = probe(mountpoint, seconds)
    return answer is not None and answer.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def check_answers(mountpoint: Path, store: Path, seconds: float = PROBE_SECONDS) -> None:
    """Check that a store is mounted and answers through the kernel; else FusestoreError."""
    mount = find(mountpoint)
    answer = probe(mountpoint, seconds)
    if answer is None:
        raise FusestoreError(f"{mountpoint} is mounted, but does not answer.")
    if answer.errno:
        raise FusestoreError(
            f"{mountpoint} is mounted, but answers with an error: {os.strerror(answer.errno)}."
        )
    if mount is None or mount.store != store or mount.device != answer.device:
        raise FusestoreError(
            f"The daemon reports that it is ready, but {mountpoint} is not its mount."
        )
    if answer.device == os.stat(mountpoint.parent).st_dev:
        raise FusestoreError(f"Nothing is mounted on {mountpoint}.")


def clear_dead(mountpoint: Path) -> bool:
    """Unmount the mount of a dead daemon; False if there is none at this path.

    FusestoreError if it cannot be unmounted.
    """
    if find(mountpoint) is None or not is_dead(mountpoint):
        return False
    status, message = _fusermount("-uz", mountpoint)
    if status != 0:
        raise FusestoreError(f"The dead mount {mountpoint} cannot be cleared: {message}.")
    return True


def unmount(mountpoint: Path, seconds: float = UNMOUNT_SECONDS) -> None:
    """Unmount a live mount of a store.

    The daemon must answer meanwhile, so its event loop must not call this.  UsageError if
    nothing is mounted there, StoreBusyError if it is in use, FusestoreError if this fails or
    takes longer than `seconds`.
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
    """Return the exit status (-1: not in time) and the message of `fusermount3`."""
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
    except OSError as error:  # no process, or no memory
        raise FusestoreError(
            f"The program fusermount3 cannot be started: {error.strerror}. To unmount without the "
            f"daemon: 'fusermount3 -u {mountpoint}'."
        ) from error
    complaint = _output(child, seconds)
    if complaint is None:
        return -1, f"it took longer than {seconds:.0f} seconds"
    message = complaint.decode(errors="replace").strip().removeprefix("fusermount3: ")
    return child.returncode, message.rstrip(".")


def _output(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Return the output of a child; None if it was too slow, and was killed or abandoned."""
    try:
        return child.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        child.kill()
    assert child.stdout is not None
    child.stdout.close()
    try:
        child.wait(1.0)
    except subprocess.TimeoutExpired:
        child.returncode = -9  # it exits when its system call ends; this does not wait for it
    return None


# --- processes that use a mount ----------------------------------------------


def holders_of(device: int, mountpoint: Path, count_max: int = 3) -> list[str]:
    """Return who still has a mount of a device: other mount points, overlays, other namespaces.

    A container has a namespace of its own, with copies of the mounts that it began with.
    """
    found, seen = list[str](), set[str]()
    for process in [Path("/proc/self"), *sorted(Path("/proc").glob("[0-9]*"))]:
        if len(found) == count_max:
            break
        try:
            namespace = os.readlink(process / "ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            places = [
                entry.place
                for entry in parse_entries((process / "mountinfo").read_bytes())
                if entry.device == device or entry.is_overlay_of(mountpoint)
            ]
            name = (process / "comm").read_text().strip()
        except OSError:
            continue  # it has ended, or is somebody else's
        if places and process.name == "self":
            found += [f"a mount on {place}" for place in places]
        elif places:
            found.append(f"process {process.name} ({name}), in a container or namespace of its own")
    return found


def users_of(mountpoint: Path, count_max: int = 3) -> list[tuple[int, str]]:
    """Return some processes (number, name) with an open file or their directory on a mount.

    Only processes that this process may examine count.  The mount gets no request.
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
        return f"in use by {users}"
    return f"a process or a loop device uses it (see `fuser -vm {mountpoint}`)"
