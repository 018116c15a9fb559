"""The commands `recover` and `fsck`: rebuilding and checking the metadata."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..text import bytes_text, counted, speed_text
from .asking import (
    ANY_PATH,
    JSON,
    PATHS_SHOWN_MAX,
    QUIET,
    STORE,
    ProgressBar,
    answering,
    do,
    print_json,
    print_lines,
    print_paths,
)

if TYPE_CHECKING:
    from ..serve.messages.safety import FsckResult


@click.command(short_help="Rebuild lost metadata from the nodes.")
@STORE
@click.option(
    "extra",
    "--from",
    multiple=True,
    type=ANY_PATH,
    metavar="NODE_DIR",
    help="The directory of a node that fusestore.toml names elsewhere or not at all.  "
    "May be repeated.",
)
@click.option(
    "--metadata",
    type=ANY_PATH,
    metavar="DIR",
    help="The directory of the new metadata; default: as in fusestore.toml, or STORE/metadata.",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="Permanently give up newer commits that absent nodes may hold.",
)
@click.option(
    "--history",
    default="",
    metavar="NODE",
    help="If the nodes hold two histories, recover that of NODE, and give up the other.",
)
@QUIET
@JSON
@click.pass_context
def recover(
    context: click.Context,
    store: Path,
    extra: tuple[Path, ...],
    metadata: Path | None,
    accept_loss: bool,
    history: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rebuild the metadata of STORE from its nodes, up to the last acknowledged commit.

    Use this if the metadata is lost.  A region and fusestore.toml may be lost as
    well.  The command only reads the nodes, and never touches existing metadata.
    Afterwards mount the store, and repair the nodes that were missing.

    Exit status 0: all files can be read; 1: some cannot, and the command names
    them; 3: the command refused or failed, and changed nothing.

    \b
      fusestore recover ~/store
      fusestore recover ~/store --from /mnt/usb/eu-west-1
    """
    from ..errors import UsageError
    from ..rescue.recover import recover as make_metadata
    from ..serve.control_server import lock_store

    with closing(ProgressBar(quiet)) as bar, answering(as_json):
        if not store.is_dir():
            raise UsageError(f"There is no directory {store}.")
        with lock_store(store):
            result = make_metadata(
                store,
                extra,
                metadata,
                accept_loss=accept_loss,
                history=history,
                progress=bar.show,
            )
    if as_json:
        print_json(result)
    else:
        _print_recovery(result)
    if result["lost"]:
        context.exit(1)


@click.command(short_help="Check the metadata and mend it.")
@STORE
@click.option("--repair", is_flag=True, help="Mend the findings; the store must not be mounted.")
@JSON
@click.pass_context
def fsck(context: click.Context, store: Path, repair: bool, as_json: bool) -> None:
    """Check all tables of STORE's metadata against each other and against the nodes.

    A mounted store is checked as it is at one instant, and stays in use.  --repair
    mends the findings: it drops nothing.  Names, inodes and bytes that no longer
    have a place go to lost+found, and bytes that are nowhere become a read error.
    The command does not read the contents of shards; `scrub` does.

    Files on nodes that are not of the store are listed.  They change nothing.

    Exit status 0: nothing was found; 1: something was found, mended or not.

    \b
      fusestore fsck ~/store
      fusestore fsck ~/store --repair
    """
    from ..serve.messages.safety import FsckRequest

    result = do(store, FsckRequest(repair), as_json=as_json)
    if not as_json:
        lines = [*result.findings, *result.unreadable, *result.strays, *result.lost]
        print_lines([*lines, *_verdict(result, repair)])
    if not result.clean:
        context.exit(1)


def _verdict(result: FsckResult, repair: bool) -> list[str]:
    count = len(result.findings)
    about = f"{counted(result.files, 'file')} and {counted(result.stripes, 'stripe')} checked"
    if result.lost_bytes:
        about += f", {counted(result.lost_bytes, 'byte')} known to be lost"
    if result.clean:
        return [f"Clean: {about}."]
    lines = (
        [f"{counted(count, 'finding')}, {_what_repair_does(result, repair)}: {about}."]
        if count
        else []
    )
    if not count:
        lines.append(f"The tables agree, but not all files can be read: {about}.")
    if result.unreadable:
        lines.append(
            "--repair cannot bring back shards: bring back or repair the nodes that are not up, or "
            "restore the files that 'fusestore risk' names from a backup."
        )
    return lines


def _what_repair_does(result: FsckResult, repair: bool) -> str:
    count, left, losses = len(result.findings), len(result.left), result.losses
    recorded = (
        f", except {counted(losses, 'loss', 'losses')}, which it can only record" if losses else ""
    )
    if result.hindrances:
        return f"{'mended' if repair else '--repair mends'} none while: {result.hindrances[0]}"
    if repair and left:
        return f"{left:,} of them could not be mended"
    if repair:
        return f"all mended{recorded}"
    if not left:
        return "all mended when the store was mounted"
    if losses == count:
        return "all of them losses: --repair, unmounted, only records them"
    return f"mend them with --repair, unmounted{recorded}"


def _print_recovery(result: dict[str, Any]) -> None:
    lines = list(recovery_lines(result))
    for dropped in result["dropped"]:
        names = ", ".join(dropped["names"][:PATHS_SHOWN_MAX]) or "no names"
        lines.append(f"dropped: commit {dropped['commit']}, never acknowledged or lost ({names})")
    print_lines(lines)
    print_paths("cannot be read now", result["lost"])
    print_lines([f"Mount it: fusestore mount {shlex.quote(result['store'])} MOUNTPOINT"])


def recovery_lines(result: dict[str, Any]) -> Iterator[str]:
    """Report what was recovered, and from which nodes."""
    speed = speed_text(result["journal_bytes"], result["seconds"])
    there = sum(node["found"] for node in result["nodes"])
    files = counted(result["files"], "file")
    yield (
        f"{result['store']}: recovered to commit {result['commit']}: {files}, "
        f"{bytes_text(result['bytes'])}, from the journals of {there} of {len(result['nodes'])} "
        f"nodes: {bytes_text(result['journal_bytes'])} in {speed}."
    )
    for node in result["nodes"]:
        if node["problem"]:
            yield f"  {node['name']}: {node['problem']} After mounting, repair it."
