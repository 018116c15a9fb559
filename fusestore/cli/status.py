"""The command `status`: how a store fares, once or again and again."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..text import Row, bytes_text, duration_text, printable, table_lines
from ..watch.health import repair_state, risk_line, scrub_state, verdict
from .asking import JSON, STORE, answering, ask, print_json, print_lines
from .nodes import state_text
from .policy import recode_line

if TYPE_CHECKING:
    from ..config.store_config import StoreConfig
    from ..serve.control_client import Message

WATCH_SECONDS = 2.0

_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""A screen of its own without a cursor, and the one before again."""
_HOME, _LINE_END, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


@click.command(short_help="Say whether a store is healthy.")
@STORE
@JSON
@click.option(
    "--watch",
    "seconds",
    is_flag=False,
    flag_value=WATCH_SECONDS,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help=f"Look again every SECONDS ({WATCH_SECONDS:g} if left out), until Ctrl-C.",
)
@click.pass_context
def status(context: click.Context, store: Path, as_json: bool, seconds: float | None) -> None:
    """Say how STORE fares: is all data safe, where is it mounted, what do its nodes hold.

    Exit status 0: healthy; 1: not healthy; 3: it could not be found out.  With
    --watch it is 0 once it is ended by Ctrl-C, and --json prints an object a line.

    \b
      fusestore status ~/store
      fusestore status ~/store --watch
      fusestore status ~/store --json | jq .nodes
    """
    from ..config.store_config import load

    with answering(as_json, healthy=False):
        config = load(store)
        found = _look(config) if seconds is None else {}
    if seconds is not None:
        _watch(config, as_json, seconds)
        return
    if as_json:
        print_json(found)
    else:
        print_lines(status_lines(found))
    if not found.get("healthy"):
        context.exit(1)


def _look(config: StoreConfig) -> Message:
    """All fields of `status`."""
    pid, found = ask(config, "status", {}, lambda progress: None)
    seen = _circumstances(config, pid)
    return found | {key: value for key, value in seen.items() if found.get(key) is None}


def _circumstances(config: StoreConfig, pid: int | None) -> Message:
    """What can be said of a store from outside, in the fields of `status`."""
    from ..system import logs, mounts

    places = [os.fspath(mount.mountpoint) for mount in mounts.mounts_of(config.store)[-1:]]
    log_file = logs.destination(pid) if pid is not None else config.log_file
    return {
        "healthy": False,
        "mounted": pid is not None,
        "mounted_at": None,
        "mountpoint": places[0] if places and pid is not None else None,
        "dead_mount": places[0] if places and pid is None else None,
        "pid": pid,
        "metrics": None,
        "store": os.fspath(config.store),
        "uuid": str(config.uuid),
        "code": str(config.code),
        "log_file": os.fspath(log_file) if log_file else None,
    }


# --- again and again ---------------------------------------------------------


def _watch(config: StoreConfig, as_json: bool, seconds: float) -> None:
    """Show the status until Ctrl-C, which is how this is meant to end."""
    screen = sys.stdout.isatty() and not as_json
    show: Callable[[list[str]], None] = _draw if screen else _print
    lines: list[str] = []
    if screen:
        click.echo(_SCREEN, nl=False)
    try:
        for found in _looks(config):
            if as_json:
                lines = [json.dumps(found)]
            elif "error" in found and "nodes" not in found:
                lines = [found["error"]]
            else:
                lines = list(status_lines(found))
            show(lines)
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass
    finally:
        if screen:
            click.echo(_BACK, nl=False)
            print_lines(lines)  # what was seen last stays


def _looks(config: StoreConfig) -> Iterator[Message]:
    """The status, for ever; a store that is not mounted is opened for that only once.

    A look that fails gives `healthy` (false) and `error`, and others follow.
    """
    from ..errors import FusestoreError
    from ..serve.control_client import ControlClient

    seen = False
    while True:
        try:
            if seen:
                ControlClient(config.store).daemon()  # NotMountedError
            yield _look(config)
            seen = True
        except FusestoreError as error:
            yield {"healthy": False, "error": str(error)}


def _draw(lines: list[str]) -> None:
    """Over what is on the screen, in one write, so that nothing flickers."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    head = f"{time.strftime('%H:%M:%S')}  (Ctrl-C ends)"
    shown = [printable(line)[:width] for line in [*lines[: height - 2], "", head][:height]]
    click.echo(_HOME + "\n".join(line + _LINE_END for line in shown) + _BELOW, nl=False)


def _print(lines: list[str]) -> None:
    print_lines([*lines, ""] if len(lines) > 1 else lines)


def status_lines(status: dict[str, Any], now: float | None = None) -> Iterator[str]:
    """One screen; the first line is a sentence that says whether the data is safe.

    `now` is in seconds since the epoch, and the present by default.
    """
    now = time.time() if now is None else now
    yield verdict(status)
    for node in status["nodes"]:
        if node.get("error"):
            yield f"  {node['name']}: {node['error']}"
    yield ""
    where = "no"
    if status["mounted"]:
        where = f"on {status['mountpoint']} by process {status['pid']}"
    elif status.get("dead_mount"):
        where += f"; a daemon died on {status['dead_mount']}: mount it there again, or umount that"
    facts = [
        ("store", f"{status['store']} ({status['uuid']})"),
        ("mounted", where),
        ("log", status.get("log_file") or "standard error, or the journal"),
        ("metrics", status.get("metrics")),
        ("code", status["code"]),
        ("files", _files(status)),
        ("last commit", _commit(status, now)),
        ("repair", repair_state(status)),
        ("scrub", scrub_state(status)),
        ("risk", risk_line(status)),
    ]
    if (status.get("recode") or {}).get("state") == "running":
        facts.append(("recoding", recode_line(status["recode"])))
    yield from table_lines([(f"{name}:", text) for name, text in facts if text])
    yield ""
    heads = ("NODE", "REGION", "STATE", "USED", "FREE", "MISSING", "PATH")
    rows = [_node_row(node) for node in status["nodes"]]
    yield from table_lines([heads, *rows], right=(3, 4, 5))


def _files(status: dict[str, Any]) -> str:
    text = f"{status['files']:,}, {bytes_text(status['bytes'])} in {status['stripes']:,} stripes"
    if status.get("bytes_free") is not None:
        text += f"; {bytes_text(status['bytes_free'])} more will fit"
    return text


def _commit(status: dict[str, Any], now: float) -> str:
    text = _plain(status.get("last_commit"))
    if status.get("last_commit_at"):
        text += f", {duration_text(max(0.0, now - status['last_commit_at']))} ago"
    return f"{text}; checkpoint {_plain(status.get('checkpoint'))}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return "none" if value is None else str(value)


def _node_row(node: dict[str, Any]) -> Row:
    def size(key: str) -> str:
        return "-" if node.get(key) is None else bytes_text(node[key])

    missing = "-" if node.get("missing_shards") is None else f"{node['missing_shards']:,}"
    return (
        node["name"],
        node["region"],
        state_text(node),
        size("bytes_used"),
        size("bytes_free"),
        missing,
        node["path"],
    )
