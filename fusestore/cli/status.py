"""The command `status`: the state of a store, once or repeatedly."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import FusestoreError
from ..text import Row, bytes_text, counted, duration_text, printable, table_lines
from .asking import JSON, STORE, answering, ask, print_json, print_lines
from .nodes import state_text
from .policy import recode_line

if TYPE_CHECKING:
    from ..config.store_config import StoreConfig
    from ..serve.control_client import Message
    from ..watch.fields import NodeStatus, Status

WATCH_SECONDS = 2.0

_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""Switch to the alternate screen without a cursor, and back."""
_HOME, _LINE_END, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


@click.command(short_help="Report whether a store is healthy.")
@STORE
@JSON
@click.option(
    "--watch",
    "seconds",
    is_flag=False,
    flag_value=WATCH_SECONDS,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help=f"Repeat the report every SECONDS (default: {WATCH_SECONDS:g}) until Ctrl-C.",
)
@click.pass_context
def status(context: click.Context, store: Path, as_json: bool, seconds: float | None) -> None:
    """Report whether all data of STORE is safe, where STORE is mounted, and what its nodes hold.

    Exit status 0: healthy; 1: not healthy; 3: the command failed.  With --watch,
    the status after Ctrl-C is 0, and --json prints one object per line.

    \b
      fusestore status ~/store
      fusestore status ~/store --watch
      fusestore status ~/store --json | jq .nodes
    """
    from ..config.store_config import load

    with answering(as_json, healthy=False):
        config = load(store)
        view = _look(config) if seconds is None else None
    if view is None:
        _watch(config, as_json, seconds or WATCH_SECONDS)
        return
    if as_json:
        print_json(view.json())
    else:
        print_lines(status_lines(view))
    if not view.status.healthy:
        context.exit(1)


_NOT_MOUNTED = {
    "mounted": False,
    "mounted_at": None,
    "mountpoint": None,
    "dead_mount": None,
    "pid": None,
    "metrics": None,
    "options": None,
}


@dataclass(frozen=True, slots=True)
class StoreView:
    """The status of a store, and facts about its mount from outside."""

    status: Status
    dead_mount: str | None
    """The mount point that a dead daemon left."""
    log_file: str | None

    def json(self) -> Message:
        """The fields that --json prints."""
        from ..typed_json import to_json

        mount = _NOT_MOUNTED if self.status.mount is None else {}
        outside = {"dead_mount": self.dead_mount, "log_file": self.log_file}
        return to_json(self.status) | mount | outside


def _look(config: StoreConfig) -> StoreView:
    from ..serve.messages.mount import StatusRequest

    pid, status = ask(config, StatusRequest())
    dead = dead_mount(config) if pid is None else None
    return StoreView(status, dead, _log_file(config, pid))


def dead_mount(config: StoreConfig) -> str | None:
    """Return the mount point that a dead daemon of the store left, if any."""
    from ..system import mounts

    left = mounts.mounts_of(config.store)
    return os.fspath(left[-1].mountpoint) if left else None


def _log_file(config: StoreConfig, pid: int | None) -> str | None:
    """Return the log file of the daemon `pid`, or of the next daemon; None if it is no file."""
    from ..system import logs

    file = logs.destination(pid) if pid is not None else config.log_file
    return os.fspath(file) if file else None


# --- watching ----------------------------------------------------------------


def _watch(config: StoreConfig, as_json: bool, seconds: float) -> None:
    """Show the status until Ctrl-C, the normal way to end this."""
    screen = sys.stdout.isatty() and not as_json
    show: Callable[[list[str]], None] = _draw if screen else _print
    lines: list[str] = []
    if screen:
        click.echo(_SCREEN, nl=False)
    try:
        for view in _looks(config):
            if isinstance(view, FusestoreError):
                failed = {"healthy": False, "error": str(view)}
                lines = [json.dumps(failed) if as_json else str(view)]
            else:
                lines = [json.dumps(view.json())] if as_json else list(status_lines(view))
            show(lines)
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass
    finally:
        if screen:
            click.echo(_BACK, nl=False)
            print_lines(lines)  # the last report stays visible


def _looks(config: StoreConfig) -> Iterator[StoreView | FusestoreError]:
    """Yield the status without end; open an unmounted store only once.

    If a request fails, yield its error and continue.
    """
    from ..serve.control_client import ControlClient

    seen = False
    while True:
        try:
            if seen:
                ControlClient(config.store).daemon()  # NotMountedError
            yield _look(config)
            seen = True
        except FusestoreError as error:
            yield error


def _draw(lines: list[str]) -> None:
    """Overwrite the screen in one write, so that nothing flickers."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    head = f"{time.strftime('%H:%M:%S')}  (Ctrl-C ends)"
    shown = [printable(line)[:width] for line in [*lines[: height - 2], "", head][:height]]
    click.echo(_HOME + "\n".join(line + _LINE_END for line in shown) + _BELOW, nl=False)


def _print(lines: list[str]) -> None:
    print_lines([*lines, ""] if len(lines) > 1 else lines)


# --- the report --------------------------------------------------------------


def status_lines(view: StoreView, now: float | None = None) -> Iterator[str]:
    """Format the report; its first line states whether the data is safe.

    `now` is in seconds since the epoch; by default it is the present time.
    """
    from ..watch.health import (
        cleaning_text,
        is_cleaning_of_interest,
        quarantine_text,
        repair_text,
        risk_text,
        scrub_text,
        verdict,
    )

    status, mount = view.status, view.status.mount
    yield verdict(status)
    for node in status.nodes:
        if node.error:
            yield f"  {node.name}: {node.error}"
    yield ""
    facts = [
        ("store", f"{status.store} ({status.uuid})"),
        ("mounted", _mounted_text(view)),
        ("log", view.log_file or "standard error, or the journal"),
        ("metrics", mount.metrics if mount is not None else None),
        ("code", status.code),
        ("files", _files_text(status)),
        ("last commit", _commit_text(status, time.time() if now is None else now)),
        ("repair", repair_text(status)),
        ("scrub", scrub_text(status)),
        ("risk", risk_text(status)),
    ]
    if status.quarantine is not None:
        facts.append(("kept", quarantine_text(status.quarantine)))
    if status.recode is not None and status.recode.state == "running":
        what = "defragmenting" if status.recode.defragment else "recoding"
        facts.append((what, recode_line(status.recode)))
    if status.cleaning is not None and is_cleaning_of_interest(status.cleaning):
        facts.append(("cleaning", cleaning_text(status.cleaning)))
    yield from table_lines([(f"{name}:", text) for name, text in facts if text])
    yield ""
    heads = ("NODE", "REGION", "STATE", "USED", "FREE", "MISSING", "PATH")
    rows = [_node_row(node) for node in status.nodes]
    yield from table_lines([heads, *rows], right=(3, 4, 5))


def _mounted_text(view: StoreView) -> str:
    mount, dead = view.status.mount, view.dead_mount
    if mount is not None:
        return f"on {mount.mountpoint} by process {mount.pid}"
    if dead is not None:
        return f"no; a dead daemon left a mount on {dead}: mount there again, or run umount"
    return "no"


def _files_text(status: Status) -> str:
    return (
        f"{status.files:,}, {bytes_text(status.bytes)} in {counted(status.stripes, 'stripe')}; "
        f"{bytes_text(status.bytes_free)} more will fit"
    )


def _commit_text(status: Status, now: float) -> str:
    text = str(status.last_commit)
    if status.last_commit_at:
        text += f", {duration_text(max(0.0, now - status.last_commit_at))} ago"
    return f"{text}; checkpoint {status.checkpoint}"


def _node_row(node: NodeStatus) -> Row:
    return (
        node.name,
        node.region,
        state_text(node),
        bytes_text(node.bytes_used),
        bytes_text(node.bytes_free),
        f"{node.missing_shards:,}",
        node.path,
    )
