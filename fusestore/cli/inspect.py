"""The command `inspect`."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import Row, bytes_text, counted, table_lines
from .asking import JSON, PATH, answering, print_json, print_lines

if TYPE_CHECKING:
    from ..serve.messages.files import LayoutResult, StripePlace

LAYOUT = "user.fusestore.layout"
GOOD_STATES = {"open", "sealed", "whole", "healthy"}
"""States of a stripe that lacks no shard."""


@click.command(short_help="Show where the shards of a file are.")
@PATH
@JSON
def inspect(path: Path, as_json: bool) -> None:
    """Show the code, the stripes and the place of each shard of PATH, a file on a mount.

    The attribute user.fusestore.layout has the same contents.

    \b
      fusestore inspect ~/files/letter.txt
      getfattr -n user.fusestore.layout --only-values ~/files/letter.txt
    """
    from ..typed_json import to_json

    with answering(as_json):
        layout = _layout(path)
    if as_json:
        print_json(to_json(layout))
    else:
        print_lines(layout_lines(os.fspath(path), layout))


def _layout(path: Path) -> LayoutResult:
    """Return the layout of a file; ask the daemon if it is too long for an attribute."""
    from ..errors import UsageError
    from ..serve.control_client import ControlClient
    from ..serve.messages.files import LayoutRequest, LayoutResult
    from ..system import mounts
    from ..typed_json import from_json

    try:
        mount = mounts.containing(path)
        if mount is None:
            raise UsageError(f"{path} is not on a mount of a store.")
        try:
            return from_json(LayoutResult, json.loads(mounts.attribute(path, LAYOUT)), exact=False)
        except OSError as error:
            if error.errno not in (errno.E2BIG, errno.ERANGE):
                raise
            inode = os.stat(path).st_ino
            return ControlClient(mount.store).ask(LayoutRequest(inode))
    except OSError as error:
        if error.errno == errno.ENODATA:
            raise UsageError(f"{path} has no layout: only regular files have one.") from None
        raise UsageError(f"{path} cannot be inspected: {error.strerror}.") from error


def layout_lines(path: str, layout: LayoutResult) -> Iterator[str]:
    """List the extents of a file, its stripes, and the place of each shard."""
    stripes = layout.stripes
    yield (
        f"{path}: {bytes_text(layout.size)}, code {layout.code}, "
        f"{counted(len(layout.extents), 'extent')} in {counted(len(stripes), 'stripe')}"
    )
    yield _presence(stripes)
    if not layout.extents:
        return
    yield ""
    rows: list[Row] = [("FILE OFFSET", "LENGTH", "STRIPE", "AT")]
    rows += [
        tuple(str(extent[key]) for key in ("offset", "length", "stripe", "stripe_offset"))
        for extent in layout.extents
    ]
    yield from table_lines(rows, right=(0, 1, 2, 3))
    yield ""
    rows = [("STRIPE", "STATE", "SHARD", "NODE", "SEGMENT", "OFFSET", "LENGTH")]
    for number, stripe in stripes.items():
        rows += _shard_rows(number, stripe)
    yield from table_lines(rows, right=(0, 2, 5, 6))


def _presence(stripes: dict[str, StripePlace]) -> str:
    states = [stripe["state"] for stripe in stripes.values()]
    waiting = states.count("open")
    bad = [state for state in states if state not in GOOD_STATES]
    text = (
        "All shards are present"
        if not bad
        else f"{counted(len(bad), 'stripe lacks', 'stripes lack')} shards"
    )
    if waiting:
        text += f"; {counted(waiting, 'stripe is', 'stripes are')} still open"
    return text + "."


def _shard_rows(number: str, stripe: StripePlace) -> Iterator[Row]:
    for shard in stripe.get("shards", []):
        yield (
            number,
            shard.get("state", stripe["state"]),
            str(shard["index"]),
            shard["node"],
            shard["segment"],
            str(shard["offset"]),
            str(shard["length"]),
        )
    if not stripe.get("shards"):
        yield (number, stripe["state"], "-", "in memory", "-", "-", "-")
