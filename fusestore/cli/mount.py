"""The commands `mount` and `umount`."""

from __future__ import annotations

import os
import select
from pathlib import Path

import click

from ..system.logs import LEVELS
from .asking import ANY_PATH, STORE, print_lines

FORMATS = ("text", "json")
EXIT_SECONDS = 60.0
"""How long a daemon may take to exit after it has answered `stop`."""


@click.command(short_help="Mount a store on a directory.")
@STORE
@click.argument("mountpoint", type=ANY_PATH)
@click.option("--foreground", "-f", is_flag=True, help="Stay, and log to standard error.")
@click.option("options", "-o", multiple=True, metavar="OPT[,OPT…]", help="Mount options, as above.")
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve metrics and a status page here, by HTTP.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    default="info",
    show_default=True,
    help="The lowest level to log; `fusestore log-level` changes it later.",
)
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="Log plain lines, or one JSON object per line.",
)
@click.option("--ready-fd", type=int, hidden=True)
def mount(
    store: Path,
    mountpoint: Path,
    foreground: bool,
    options: tuple[str, ...],
    metrics: str | None,
    log_level: str,
    log_format: str,
    ready_fd: int | None,
) -> None:
    """Mount STORE on the directory MOUNTPOINT.

    The command returns when the mount answers.  A daemon in the background serves
    the mount, and logs to a file that `fusestore status STORE` names.  A store
    that lacks a region mounts with a warning.

    \b
      fusestore mount ~/store ~/files
      fusestore mount ~/store /srv/files -o allow_other,noexec
      fusestore mount ~/store ~/files --foreground --log-level debug
      fusestore mount ~/store ~/files --metrics 9464    http://127.0.0.1:9464/

    \b
    Options of -o:
      ro            the mount is read-only
      allow_other   other users may use the mount, as file modes allow
      writeback     the kernel collects small writes: faster, but if the daemon
                    dies, everything that no fsync covered can be lost
      noxattr       extended attributes and ACLs are off: small writes are
                    faster, with writeback several times faster
      nospin        the daemon sleeps between requests: slower, but it leaves
                    more of the processors to others
      nonempty      MOUNTPOINT may contain files; the mount hides them
      accept_loss   permanently give up newer commits that absent nodes may hold
      take_over     take the nodes from a mount on another machine that is gone
                    for good
      metrics=[HOST:]PORT    the same as --metrics; metrics=off turns metrics off
                    even if fusestore.toml turns them on
      nosuid, nodev, noexec, noatime    as for mount(8); noatime is always on
    """
    from ..config.mount_options import MountOptions
    from ..config.store_config import load
    from ..serve import launch

    config = load(store)
    chosen = MountOptions.parse(
        [*options, f"metrics={metrics}"] if metrics is not None else options
    )
    if ready_fd is not None:
        launch.run(config, mountpoint, chosen, log_level, log_format, ready_fd)
        return
    place = launch.prepare_mountpoint(config, mountpoint, chosen)
    if foreground:
        launch.run(config, place, chosen, log_level, log_format, None)
        return
    for warning in launch.start(config, place, chosen, log_level, log_format):
        print_lines([f"fusestore: warning: {warning}"], err=True)


@click.command(short_help="Commit everything and unmount.")
@click.argument("mountpoint", type=ANY_PATH)
def umount(mountpoint: Path) -> None:
    """Unmount the store on MOUNTPOINT.

    The command returns when everything is committed and the daemon has exited.
    If the daemon had died, the command clears the mount and exits with status 1:
    uncommitted changes (normally of the last five seconds) are lost.

    \b
      fusestore umount ~/files
    """
    unmount(mountpoint)


def unmount(mountpoint: Path) -> None:
    """Unmount a store; returns when its daemon has exited.  NotHealthyError: it had died."""
    from ..errors import (
        FusestoreError,
        MountHeldError,
        NotHealthyError,
        NotMountedError,
        UsageError,
    )
    from ..serve.control_client import ControlClient, UnansweredError, lock_holder
    from ..serve.messages.mount import StopRequest
    from ..system import mounts

    place = mounts.locate(mountpoint)
    there = mounts.find(place)
    if there is None:
        raise UsageError(f"No store is mounted on {place}.")
    if mounts.clear_dead(place):
        raise NotHealthyError(
            f"The daemon of {place} had died: the mount is cleared.  Changes of its last "
            f"seconds that no fsync covered may be lost."
        )
    client = ControlClient(there.store)
    try:
        pid = client.daemon()
    except NotMountedError:
        pid = 0
    daemon = _watch(pid or lock_holder(there.store) or 0)
    try:
        if pid:
            client.ask(StopRequest(os.fspath(place)))
        else:
            mounts.unmount(place)  # The daemon commits and exits, even if it does not listen.
    except UnansweredError:
        if _exited(daemon, 1.0):
            mounts.clear_dead(place)
            raise
        mounts.unmount(place)
    except MountHeldError:
        raise
    except FusestoreError:
        if mounts.find(place) is None:
            _exited(daemon, EXIT_SECONDS)
        raise
    if not _exited(daemon, EXIT_SECONDS):
        raise FusestoreError(
            f"{place} is unmounted, but its daemon (process {pid}) did not exit "
            f"within {EXIT_SECONDS:.0f} seconds."
        )


def _watch(pid: int) -> int | None:
    """A descriptor that becomes readable when the process exits.

    None if the process has exited, or cannot be watched.
    """
    try:
        return os.pidfd_open(pid)
    except (OSError, ValueError):
        return None


def _exited(daemon: int | None, seconds: float) -> bool:
    """Wait until the process exits; False if it still runs after `seconds`."""
    if daemon is None:
        return True
    poller = select.poll()
    poller.register(daemon, select.POLLIN)
    return bool(poller.poll(seconds * 1000))
