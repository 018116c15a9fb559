"""The command `compact`: cleaning that somebody asks for."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import bytes_text, counted
from .asking import JSON, QUIET, STORE, ProgressBar, answering, print_json

if TYPE_CHECKING:
    from ..serve.messages.mount import CompactResult


@click.command(short_help="Give back the room of overwritten and deleted data.")
@STORE
@click.option("--wait", is_flag=True, help="Return when all room that can be had is free.")
@QUIET
@JSON
@click.pass_context
def compact(context: click.Context, store: Path, wait: bool, quiet: bool, as_json: bool) -> None:
    """Give back the room of overwritten and deleted data in the mounted STORE.

    A mounted store cleans by itself when its garbage exceeds 15 % of the bytes of
    files, and 20 MiB.  This command cleans all stripes that are there now and give
    back at least an eighth of what must be written for them.  The files stay in
    use.  Cleaning runs in the daemon, gives way to users, and goes on if you
    interrupt this command; it ends with the mount.

    Exit status 1: some stripes were left alone because their counts are in doubt,
    or because they cannot be read or have shards on a node that is not up; or it
    ended early.

    \b
      fusestore compact ~/store
      fusestore compact ~/store --wait
    """
    from ..config.store_config import load
    from ..errors import NotMountedError, UsageError
    from ..serve.control_client import ControlClient
    from ..serve.messages.mount import CompactRequest
    from ..typed_json import to_json

    with closing(ProgressBar(quiet)) as bar, answering(as_json):
        config = load(store)
        try:
            result = ControlClient(config.store).ask(CompactRequest(wait), bar.show)
        except NotMountedError:
            raise UsageError(
                f"The store {config.store} is not mounted: only a mounted store is cleaned."
            ) from None
    if as_json:
        print_json(to_json(result))
    else:
        click.echo(compact_line(result))
    if result.state == "done" and (result.problem or left_alone(result)):
        context.exit(1)


def left_alone(result: CompactResult) -> str:
    """Return which stripes were not cleaned, and why; empty if there are none."""
    reasons = (
        (result.doubtful_stripes, "with counts in doubt: run 'fusestore fsck --repair'"),
        (result.unreadable_stripes, "that cannot be read"),
        (result.absent_stripes, "with shards on nodes that are not up"),
    )
    return ", ".join(f"{counted(count, 'stripe')} {why}" for count, why in reasons if count)


def compact_line(result: CompactResult) -> str:
    """Report the progress or the result of a compaction."""
    if result.state == "running":
        left = "" if result.waste is None else f" of {bytes_text(result.waste)} of garbage"
        return f"Cleaning{left} has begun; 'fusestore status' shows whether it runs."
    text = f"{bytes_text(result.freed)} given back, {bytes_text(result.moved)} of files moved"
    if result.waste:
        text += f"; {bytes_text(result.waste)} of garbage left"
    left = left_alone(result)
    if left:
        text += f"; left alone: {left}"
    return f"{text}; it ended early: {result.problem}" if result.problem else f"{text}."
