"""Unmounting while another mount of the same file system remains: in a container, or bound."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from support.mounted_store import Store

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.not_plain,
    pytest.mark.expects_log(r"serve\.daemon: .* The daemon commits everything and exits anyway"),
]


# A namespace begins with copies of all mounts; those of tests that run beside this one go.
INSIDE = """
findmnt -rn -t fuse.fusestore -o TARGET | while read -r mounted; do
    [ "$mounted" = "$0" ] || umount --lazy --internal-only "$mounted"
done
echo ready
exec sleep 100
"""


@contextmanager
def container(store: Store) -> Iterator[str]:
    """A process with a mount namespace of its own."""
    inside = ["sh", "-c", INSIDE, str(store.mountpoint)]
    child = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", *inside],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            pytest.skip("there are no mount namespaces")
        yield rf"process {child.pid} \(s\w+\), in a container or namespace of its own"
    finally:
        child.kill()
        child.communicate()


@contextmanager
def bound(store: Store) -> Iterator[str]:
    """A directory of the mount that is mounted elsewhere, too."""
    place = store.mountpoint.with_name("bound")
    place.mkdir()
    if subprocess.run(["mount", "--bind", store.mountpoint, place], check=False).returncode:
        pytest.skip("bind mounts are not permitted")
    try:
        yield f"a mount on {place}"
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def overlaid(store: Store) -> Iterator[str]:
    """An overlay, as container engines make them, whose upper layer is on the mount."""
    place, low = store.mountpoint.with_name("an overlay"), store.mountpoint.with_name("low")
    upper, work = store.mountpoint / "up", store.mountpoint / "work"
    for directory in (place, low, upper, work):
        directory.mkdir()
    layers = f"lowerdir={low},upperdir={upper},workdir={work}"
    made = subprocess.run(["mount", "-t", "overlay", "o", "-o", layers, place], check=False)
    if made.returncode:
        pytest.skip("overlays are not permitted")
    try:
        yield f"a mount on {place}"
    finally:
        subprocess.run(["umount", place], check=True)


HOLDERS = pytest.mark.parametrize("holder", [container, bound, overlaid])


@HOLDERS
def test_umount_names_who_holds_the_file_system_and_commits(
    make_store: Callable[..., Store], holder: Callable[[Store], AbstractContextManager[str]]
) -> None:
    store = make_store()
    store.mount()
    (store.mountpoint / "f").write_bytes(b"f" * 100_000)
    with holder(store) as who:
        began = time.monotonic()
        done = store.cli("umount", store.mountpoint, check=False)
        assert time.monotonic() - began < 60
        assert done.returncode == 3
        assert re.search(who, done.stderr), done.stderr
        assert "To end it now: kill" in done.stderr
        assert store.alive()
        assert store.status()["uncommitted_bytes"] == 0
    store.await_end()  # the last mount is gone
    store.mount()
    assert (store.mountpoint / "f").read_bytes() == b"f" * 100_000


@HOLDERS
def test_sigterm_ends_the_daemon_all_the_same(
    make_store: Callable[..., Store], holder: Callable[[Store], AbstractContextManager[str]]
) -> None:
    store = make_store()
    store.mount()
    (store.mountpoint / "f").write_bytes(b"f" * 100_000)
    with holder(store):
        store.end_by(signal.SIGTERM)
        assert not os.path.ismount(store.mountpoint)
    store.mount()
    assert (store.mountpoint / "f").read_bytes() == b"f" * 100_000


def test_sigterm_ends_a_daemon_whose_mount_was_removed_before(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    store.mount()
    (store.mountpoint / "f").write_bytes(b"f" * 100_000)
    with container(store):
        assert store.cli("umount", store.mountpoint, check=False).returncode == 3
        store.end_by(signal.SIGTERM)
    store.mount()
    assert (store.mountpoint / "f").read_bytes() == b"f" * 100_000
