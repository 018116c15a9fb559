"""The commands `recover` and `fsck`: what to do when the metadata is gone or in doubt."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..text import bytes_text, speed_text
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


@click.command(short_help="Make lost metadata anew from the nodes.")
@STORE
@click.option(
    "extra",
    "--from",
    multiple=True,
    type=ANY_PATH,
    metavar="NODE_DIR",
    help="A node that lies elsewhere than fusestore.toml says.  May be repeated.",
)
@click.option(
    "--metadata",
    type=ANY_PATH,
    metavar="DIR",
    help="Where the new metadata goes; default: where fusestore.toml says, or STORE/metadata.",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="Go on without newer commits that nodes which are gone may have held.",
)
@click.option(
    "--history",
    default="",
    metavar="NODE",
    help="Of two histories that part, recover the one that NODE holds, and give up the other.",
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
    """Make the metadata of STORE anew from its nodes, to the last commit that counts.

    For a store whose metadata is gone, and perhaps a region and fusestore.toml
    too.  The nodes are only read, and metadata that is there is not touched.
    Afterwards mount the store, and repair the nodes that were missing.

    Exit status 0: all files can be read; 1: some cannot, and are named; 3: it
    was refused or failed, and nothing was changed.

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
                store, extra, metadata, accept_loss=accept_loss, progress=bar.show
            )
    if as_json:
        print_json(result)
    else:
        _print_recovery(result)
    if result["lost"]:
        context.exit(1)


@click.command(short_help="Check the metadata, and mend it.")
@STORE
@click.option("--repair", is_flag=True, help="Mend what is found; the store must not be mounted.")
@JSON
@click.pass_context
def fsck(context: click.Context, store: Path, repair: bool, as_json: bool) -> None:
    """Check that all tables of STORE's metadata agree with each other and with the nodes.

    A mounted store is checked as it is at one instant, while it goes on.  With
    --repair what is found is mended: nothing is dropped, what has no place any
    more goes to lost+found, and bytes that are nowhere become an error to read.
    The bytes of shards are not read: that is what repair and reading do.

    Exit status 0: nothing found; 1: something was found, mended or not.

    \b
      fusestore fsck ~/store
      fusestore fsck ~/store --repair
    """
    from ..serve.messages.safety import FsckRequest

    result = do(store, FsckRequest(repair), as_json=as_json)
    if not as_json:
        print_lines([*result.findings, _verdict(result, repair)])
    if result.findings:
        context.exit(1)


def _verdict(result: FsckResult, repair: bool) -> str:
    count = len(result.findings)
    about = f"{result.files:,} files and {result.stripes:,} stripes checked"
    if result.lost_bytes:
        about += f", {result.lost_bytes:,} bytes known to be lost"
    if not count:
        return f"Clean: {about}."
    if result.left:
        how = "not all could be mended" if repair else "mend them with --repair, unmounted"
        return f"{count:,} findings, {how}: {about}."
    return f"{count:,} findings, all mended: {about}."


def _print_recovery(result: dict[str, Any]) -> None:
    lines = list(recovery_lines(result))
    for dropped in result["dropped"]:
        names = ", ".join(dropped["names"][:PATHS_SHOWN_MAX]) or "no names"
        lines.append(f"dropped: commit {dropped['commit']}, never acknowledged or lost ({names})")
    print_lines(lines)
    print_paths("cannot be read now", result["lost"])
    print_lines([f"Mount it: fusestore mount {shlex.quote(result['store'])} MOUNTPOINT"])


def recovery_lines(result: dict[str, Any]) -> Iterator[str]:
    """What was recovered, and from where."""
    speed = speed_text(result["journal_bytes"], result["seconds"])
    there = sum(node["found"] for node in result["nodes"])
    yield (
        f"{result['store']}: recovered to commit {result['commit']}: {result['files']:,} files, "
        f"{bytes_text(result['bytes'])}, from the journals of {there} of {len(result['nodes'])} "
        f"nodes: {bytes_text(result['journal_bytes'])} in {speed}."
    )
    for node in result["nodes"]:
        if node["problem"]:
            yield f"  {node['name']}: {node['problem']} After mounting, repair it."
