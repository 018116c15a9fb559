"""`mount.fusestore` and `umount.fusestore`: the helpers of mount(8) and umount(8).

With links at /sbin/mount.fusestore and /sbin/umount.fuse.fusestore, `mount -t
fusestore`, lines of /etc/fstab and `umount` work.  The exit statuses are those of
mount(8).
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import click

from ..errors import ConfigError, NotHealthyError, UsageError
from .asking import ANY_PATH, STORE, print_lines
from .errors import EndsInSentences

WRONG_USE = 1
MOUNT_FAILED = 32


class _Helper(EndsInSentences):
    program = "mount.fusestore"
    # A cleared dead mount (NotHealthyError) is unmounted: umount(8) succeeded.
    statuses = {UsageError: WRONG_USE, ConfigError: WRONG_USE, NotHealthyError: 0}  # noqa: RUF012
    failed = MOUNT_FAILED


_TYPE = click.option("-t", "kind", hidden=True, help="Ignored.")


@click.command(cls=_Helper, short_help="Mount a store, for mount(8).")
@STORE
@click.argument("mountpoint", type=ANY_PATH)
@click.option("options", "-o", multiple=True, metavar="OPT[,OPT…]", help="Mount options.")
@click.option("sloppy", "-s", is_flag=True, help="Ignore unknown options.")
@click.option("fake", "-f", is_flag=True, help="Check everything, but do not mount.")
@click.option("-n", "no_mtab", is_flag=True, help="Ignored.")
@click.option("verbose", "-v", is_flag=True, help="Report the mount.")
@_TYPE
def mount(
    store: Path,
    mountpoint: Path,
    options: tuple[str, ...],
    sloppy: bool,
    fake: bool,
    no_mtab: bool,
    verbose: bool,
    kind: str | None,
) -> None:
    """Mount STORE on the directory MOUNTPOINT, like `fusestore mount`.

    mount(8) runs this as /sbin/mount.fusestore.  The options are those of
    `fusestore mount`.  Options that only mount(8) and systemd understand
    (defaults, noauto, nofail, user, _netdev, x-systemd.…) are ignored.  With
    `-o remount`, the options ro, rw, nosuid, nodev, noexec and those of access times
    change on a mount in use.

    \b
      mount -t fusestore /srv/store /srv/data -o allow_other

    \b
    In /etc/fstab:
      /srv/store  /srv/data  fusestore  allow_other,nofail,_netdev  0  0
    """
    from ..config.mount_options import MountOptions, of_fstab, split
    from ..config.store_config import load
    from ..serve import launch

    if "remount" in split(options):
        _remount(mountpoint, split(options), sloppy=sloppy, fake=fake)
        return
    config = load(store)
    chosen = MountOptions.parse(of_fstab(options, sloppy=sloppy))
    if chosen.once:
        raise UsageError(f"{chosen.once} is not allowed here: run `fusestore mount` with it once.")
    place = launch.prepare_mountpoint(config, mountpoint, chosen)
    if fake:
        return
    for warning in launch.start(config, place, chosen, "info", "text"):
        print_lines([f"mount.fusestore: warning: {warning}"], err=True)
    if verbose:
        print_lines([f"mount.fusestore: {config.store} mounted on {place}."])


def _remount(mountpoint: Path, options: list[str], *, sloppy: bool, fake: bool) -> None:
    """Change the kernel's options of a mount; a mount that turns read-only is committed."""
    from ..config.remount_options import check_fixed, fixed_options, remount_flags
    from ..errors import FusestoreError, StoreBusyError
    from ..serve.control_client import ControlClient
    from ..serve.messages.mount import StatusRequest
    from ..system import linux, mounts

    place = mounts.locate(mountpoint)
    there = mounts.find(place)
    if there is None:
        raise UsageError(f"No store is mounted on {place}.")
    flags, fixed = remount_flags(options, sloppy=sloppy), fixed_options(options)
    read_only = bool(flags & 1)
    if fixed or not read_only:
        status = ControlClient(there.store).ask(StatusRequest())
        check_fixed(fixed, status.mount.options if status.mount else "")
        if status.read_only and not read_only:
            raise FusestoreError(
                f"The daemon of {place} is read-only: unmount it, and mount it again without `ro`."
            )
    if fake:
        return
    try:
        linux.remount(place, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise StoreBusyError(f"{place} is busy: files are open for writing.") from error
        raise FusestoreError(f"{place} cannot be remounted: {error.strerror}.") from error
    if read_only:
        fd = os.open(place, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


@click.command(cls=_Helper, short_help="Unmount a store, for umount(8).")
@click.argument("mountpoint", type=ANY_PATH)
@click.option("force", "-f", is_flag=True, help="Force the unmount, as umount(8) does.")
@click.option("lazy", "-l", is_flag=True, help="Detach the mount now, as umount(8) does.")
@click.option("-n", "no_mtab", is_flag=True, help="Ignored.")
@click.option("-r", "read_only", is_flag=True, help="Ignored.")
@click.option("-v", "verbose", is_flag=True, help="Ignored.")
@_TYPE
def umount(
    mountpoint: Path,
    force: bool,
    lazy: bool,
    no_mtab: bool,
    read_only: bool,
    verbose: bool,
    kind: str | None,
) -> None:
    """Unmount the store on MOUNTPOINT; return when everything is committed.

    umount(8) runs this as /sbin/umount.fuse.fusestore.  If the mount is one of several,
    such as a bind mount of a file, only this one ends.
    """
    if force or lazy or _is_one_of_several(mountpoint):
        # The kernel does it; the daemon commits when its last mount ends.
        flags = [*(["-f"] if force else []), *(["-l"] if lazy else [])]
        sys.exit(subprocess.run(["umount", "-i", *flags, "--", mountpoint]).returncode)
    from .mount import unmount

    unmount(mountpoint)


def _is_one_of_several(mountpoint: Path) -> bool:
    from ..system import mounts

    there = mounts.find(mounts.locate(mountpoint))
    return there is not None and sum(m.device == there.device for m in mounts.all_mounts()) > 1


def main_mount() -> None:
    """Run `mount.fusestore`."""
    sys.exit(mount.main(prog_name="mount.fusestore"))


def main_umount() -> None:
    """Run `umount.fusestore`."""
    sys.exit(umount.main(prog_name="umount.fusestore"))
