"""The command `repair`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import bytes_text, counted, speed_text
from .asking import (
    ANY_PATH,
    JSON,
    QUIET,
    STORE,
    ProgressBar,
    answering,
    ask,
    complete_node,
    print_json,
    print_lines,
    print_paths,
    rate_option,
)

if TYPE_CHECKING:
    from ..serve.messages.safety import RepairDone, RepairPlan


@click.command(short_help="Rebuild a node that lost its data.")
@STORE
@click.argument("node", shell_complete=complete_node)
@click.option(
    "--to",
    type=ANY_PATH,
    metavar="PATH",
    help="Rebuild the node at PATH, new or empty, and use it there from then on.",
)
@click.option(
    "--discard-history",
    is_flag=True,
    help="Permanently give up the commits of the other history that `status` reports on NODE.",
)
@click.option(
    "--on-this-disk",
    is_flag=True,
    help="Rebuild an empty NODE in its place even if its disk is probably not mounted.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@rate_option
@QUIET
@JSON
@click.pass_context
def repair(
    context: click.Context,
    store: Path,
    node: str,
    to: Path | None,
    discard_history: bool,
    on_this_disk: bool,
    dry_run: bool,
    rate: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rebuild NODE of STORE from the other nodes, mounted or not.

    Use this if the directory of NODE is gone or empty, or has lost or bad shards.
    Repair begins with the journal.  Then come the shards, those of the weakest
    stripes first.  Each shard is read back and checked before it counts; afterwards
    you can lose any other region.  A repair that was killed continues where it was.

    The command refuses a node that holds another history of the store, unless you
    discard that history with --discard-history.  It refuses an empty node whose disk
    is probably not mounted, unless you say --on-this-disk.

    Exit status 1: something cannot be rebuilt.  The command names it file by file.

    \b
      fusestore repair ~/store us-east-1
      fusestore repair ~/store us-east-1 --to /mnt/new-disk/us-east-1
    """
    from ..config.store_config import load
    from ..serve.messages.safety import RepairRequest
    from ..typed_json import to_json

    place = os.fspath(to.absolute()) if to else None
    request = RepairRequest(
        node,
        to=place,
        dry_run=dry_run,
        rate=rate,
        on_this_disk=on_this_disk,
        discard_history=discard_history,
    )
    with closing(ProgressBar(quiet)) as bar, answering(as_json):
        config = load(store)
        config.node(node)
        _, result = ask(config, request, bar.show)
    if as_json:
        print_json(to_json(result))
    else:
        lines = [] if result.done is None else [repair_line(node, result.done)]
        print_lines([*plan_lines(result.plan), *lines])
    if result.done is not None and result.done.unrepairable:
        if not as_json:
            print_paths("not repaired", result.done.unrepairable)
        context.exit(1)


def plan_lines(plan: RepairPlan) -> Iterator[str]:
    """Describe the plan of a repair."""
    yield (
        f"{plan.node} at {plan.path}: {counted(plan.stripes, 'stripe')}, "
        f"{bytes_text(plan.bytes_to_check)} to check, {counted(plan.shards_to_rebuild, 'shard')} "
        f"({bytes_text(plan.bytes_to_rebuild)}) to rebuild"
    )
    if plan.reads:
        reads = ", ".join(f"{bytes_text(size)} from {name}" for name, size in plan.reads.items())
        yield f"  reads: {reads}"
    if plan.weak_stripes:
        one, many = "stripe that also lacks", "stripes that also lack"
        yield f"  first: {counted(plan.weak_stripes, one, many)} other shards"
    if plan.hopeless_shards:
        hopeless = counted(plan.hopeless_shards, "shard")
        yield f"  {hopeless} cannot be rebuilt: too many others are lost"


def repair_line(node: str, done: RepairDone) -> str:
    """Report the result and the speed of a repair."""
    shards = f"{counted(done.shards_rebuilt, 'shard')} rebuilt and checked"
    if done.shards_copied:
        copied = counted(done.shards_copied, "shard")
        shards = f"{copied} copied, {done.shards_rebuilt:,} rebuilt, all checked"
    line = f"{node}: {shards}, {bytes_text(done.bytes)} in {speed_text(done.bytes, done.seconds)}"
    if done.unrepairable:
        line += f"; {counted(len(done.unrepairable), 'file')} cannot be repaired"
        if done.away:
            line += f" while {', '.join(done.away)} cannot be read"
    return line + "."
