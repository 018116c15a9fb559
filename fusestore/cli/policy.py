"""The commands `policy`, `recode` and `quota`: settings of directories of a mounted store."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..text import Row, bytes_text, counted, duration_text, table_lines
from .asking import (
    ANY_PATH,
    JSON,
    PATH,
    ProgressBar,
    answering,
    print_json,
    print_lines,
    print_paths,
    rate_option,
)

if TYPE_CHECKING:
    from ..serve.messages.files import QuotaResult, QuotaStatus
    from ..serve.messages.request import Request
    from ..system.mounts import Mount
    from ..watch.fields import Recoding

R = TypeVar("R")

CODE_ATTRIBUTE = "user.fusestore.code"
POLICY_ATTRIBUTE = "user.fusestore.policy"
_UNITS = "KMGTP"

_DIRECTORY = click.argument("directory", type=ANY_PATH)


def _on_mount(path: Path, *, directory: bool = False) -> Mount:
    """Return the mount that contains a path; UsageError if no store is mounted there."""
    from ..errors import UsageError
    from ..system import mounts

    try:
        mount = mounts.containing(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be examined: {error.strerror}.") from error
    if mount is None:
        raise UsageError(f"{path} is not on a mount of a store.")
    if directory and not path.is_dir():
        raise UsageError(f"{path} is not a directory.")
    return mount


def _ask(path: Path, request_of: Callable[[int], Request[R]], *, directory: bool = False) -> R:
    """Send a request about the inode of `path` to the daemon of its mount."""
    from ..serve.control_client import ControlClient

    mount = _on_mount(path, directory=directory)
    with closing(ProgressBar(quiet=False)) as bar:
        return ControlClient(mount.store).ask(request_of(os.stat(path).st_ino), bar.show)


# --- policy ------------------------------------------------------------------


@click.group(short_help="Choose the code of new files.")
def policy() -> None:
    """Choose the code of new files, for each directory.

    A new file gets the code of the nearest directory above it that has one, or
    else the code of the store.  Existing files keep their code until `recode`
    changes it.  The attribute user.fusestore.code sets the same policy.

    \b
      fusestore policy set ~/files/archive 6+3
      fusestore policy get ~/files/archive
      fusestore policy clear ~/files/archive
    """


@policy.command("set")
@_DIRECTORY
@click.argument("code", metavar="K+M")
def policy_set(directory: Path, code: str) -> None:
    """Give new files below DIRECTORY the code K+M."""
    from ..errors import UsageError
    from ..format.erasure import Code
    from ..system.mounts import attribute

    chosen = Code.parse(code)
    mount = _on_mount(directory, directory=True)
    attribute(directory, POLICY_ATTRIBUTE)  # fails if attributes are off
    try:
        os.setxattr(directory, CODE_ATTRIBUTE, str(chosen).encode())
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise UsageError(
            f"{directory} cannot have the code {chosen}: the loss of a region would lose data.  "
            f"Only a store that was made with --allow-unsafe accepts such a code."
        ) from None
    _print_policy(directory, mount)


@policy.command("get")
@PATH
@JSON
def policy_get(path: Path, as_json: bool) -> None:
    """Print the code of new files below PATH, or of the file PATH.

    The command also prints where the code was set, and which losses it survives.
    """
    with answering(as_json):
        _print_policy(path, _on_mount(path), as_json)


@policy.command("clear")
@_DIRECTORY
def policy_clear(directory: Path) -> None:
    """Make DIRECTORY inherit the code of the directory above it again."""
    from ..system.mounts import attribute

    mount = _on_mount(directory, directory=True)
    attribute(directory, POLICY_ATTRIBUTE)
    os.removexattr(directory, CODE_ATTRIBUTE)
    _print_policy(directory, mount)


def _print_policy(path: Path, mount: Mount, as_json: bool = False) -> None:
    from ..system.mounts import attribute

    found = json.loads(attribute(path, POLICY_ATTRIBUTE))
    if as_json:
        print_json(found)
    else:
        print_lines([policy_line(os.fspath(path), found, os.fspath(mount.mountpoint))])


# --- recode ------------------------------------------------------------------


@click.command(short_help="Give existing files another code, or defragment them.")
@PATH
@click.option("--to", metavar="K+M", help="The new code; default: that of each file's directory.")
@click.option("--defragment", is_flag=True, help="Rewrite what lies in many small pieces.")
@rate_option
@click.option("--background", is_flag=True, help="Return at once; `status` shows the progress.")
@click.option("--stop", is_flag=True, help="Stop a running recoding; recoded files stay recoded.")
@JSON
@click.pass_context
def recode(
    context: click.Context,
    path: Path,
    to: str | None,
    defragment: bool,
    rate: float | None,
    background: bool,
    stop: bool,
    as_json: bool,
) -> None:
    """Give the file PATH, or all files below the directory PATH, another code.

    The files stay in use, and every read returns the bytes that were last written.
    Recoding runs in the daemon and gives way to users.  It continues if you
    interrupt this command, and after a restart.  One recoding runs at a time in a
    store.

    With --defragment, those parts of files that lie in many small pieces, as after
    random overwrites, are rewritten, so that they are read as fast as new files.
    Each file keeps its code, unless --to names another one.

    Exit status 1: some bytes could not be read.  The command names their files and
    leaves these bytes as they are.

    \b
      fusestore policy set ~/files/archive 6+3
      fusestore recode ~/files/archive
      fusestore recode ~/files/archive --to 1+2 --rate 20
      fusestore recode ~/files/machine.img --defragment
    """
    from ..serve.messages.files import RecodeRequest
    from ..typed_json import to_json

    with answering(as_json):
        wait = not background and not stop
        request_of = partial(
            RecodeRequest, to=to, defragment=defragment, rate=rate, stop=stop, wait=wait
        )
        result = _ask(path, request_of)
    if as_json:
        print_json(to_json(result))
    else:
        print_lines([recode_line(result)])
        print_paths("could not be read", result.unreadable_files)
    if result.unreadable:
        context.exit(1)


# --- quota -------------------------------------------------------------------


@click.group(short_help="Limit what may lie below a directory.")
def quota() -> None:
    """Limit the bytes and the files (inodes of any kind) below a directory.

    Bytes count as in `du`: holes, parity and copies do not count.  Quotas can be
    nested: everything below an inner quota also counts for the outer ones.  An
    operation that would exceed a quota fails with EDQUOT ("Disk quota exceeded").

    \b
      fusestore quota set ~/files/home/ann --bytes 20G --files 100000
      fusestore quota get ~/files/home/ann
      fusestore quota list ~/files
    """


def _limit(_: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Parse a limit: a number, for bytes with a unit, or `none` for no limit."""
    from ..format.file_rows import NO_LIMIT

    if value is None or value.lower() == "none":
        return None if value is None else NO_LIMIT
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGTP])(?:i?B)?)?", value, re.IGNORECASE)
    if not found or (option.name == "files_max" and not value.isdigit()):
        raise click.BadParameter(f"{value!r} is not {option.metavar}.")
    limit = int(float(found[1]) * 1024 ** (1 + _UNITS.index(found[2].upper()) if found[2] else 0))
    if limit >= NO_LIMIT:
        raise click.BadParameter(f"{value!r} is too large.")
    return limit


@quota.command("set")
@_DIRECTORY
@click.option(
    "--bytes", "bytes_max", callback=_limit, metavar="N[K|M|G|T|P]|none", help="1K is 1024."
)
@click.option("--files", "files_max", callback=_limit, metavar="N|none", help="Number of inodes.")
def quota_set(directory: Path, bytes_max: int | None, files_max: int | None) -> None:
    """Limit what may lie below DIRECTORY.  A limit that you do not name stays unchanged.

    The daemon first counts the existing files, while they are in use, and enforces
    the limits from then on.  It continues if you interrupt this command.  If a
    limit is below the current use, only operations that add to the use are refused.
    """
    from ..errors import UsageError
    from ..serve.messages.files import QuotaRequest

    if bytes_max is None and files_max is None:
        raise UsageError("Give a limit: --bytes, --files, or both.")
    request_of = partial(QuotaRequest, "set", bytes=bytes_max, files=files_max)
    _print_quotas(directory, _ask(directory, request_of, directory=True))


@quota.command("get")
@PATH
@JSON
def quota_get(path: Path, as_json: bool) -> None:
    """Print the quotas that apply to PATH, the nearest first."""
    from ..serve.messages.files import QuotaRequest

    with answering(as_json):
        result = _ask(path, partial(QuotaRequest, "get"))
    _print_quotas(path, result, as_json)


@quota.command("clear")
@_DIRECTORY
def quota_clear(directory: Path) -> None:
    """Remove the quota of DIRECTORY."""
    from ..serve.messages.files import QuotaRequest

    result = _ask(directory, partial(QuotaRequest, "clear"), directory=True)
    _print_quotas(directory, result)


@quota.command("list")
@PATH
@JSON
def quota_list(path: Path, as_json: bool) -> None:
    """Print all quotas of the store that is mounted at or above PATH."""
    from ..serve.messages.files import QuotaRequest

    with answering(as_json):
        result = _ask(path, partial(QuotaRequest, "list"))
    _print_quotas(path, result, as_json)


def _print_quotas(path: Path, result: QuotaResult, as_json: bool = False) -> None:
    from ..typed_json import to_json

    if as_json:
        print_json(to_json(result))
    elif not result.quotas:
        print_lines([f"No quota applies to {path}."])
    else:
        print_lines(quota_lines(result.quotas))


def policy_line(path: str, policy: dict[str, Any], mountpoint: str) -> str:
    """Report a code, where it was set, and which losses it survives."""
    origin = "the default of the store"
    if policy["set_on"] is not None:
        origin = f"set on {mountpoint.rstrip('/')}{policy['set_on']}".rstrip("/")
    shards, borne = policy["shards_borne"], policy["regions_borne"]
    regions = counted(policy["regions"], "region")
    return (
        f"{path}: {policy['code']}, {origin}; survives the loss of any {borne} of {regions}, and "
        f"of any {counted(shards, 'shard')} of a stripe."
    )


def recode_line(job: Recoding) -> str:
    """Report the progress or the result of a recoding."""
    if job.defragment:
        to = f", to {job.to}" if job.to else ""
        what = f"{job.path}, defragmented{to}: {bytes_text(job.recoded)} rewritten"
    else:
        to = job.to or "the policy of each directory"
        what = f"{job.path} to {to}: {bytes_text(job.recoded)} recoded"
    if job.state != "running":
        unreadable = f", {job.unreadable:,} could not be read" if job.unreadable else ""
        return f"{what}, {counted(job.files, 'file')} looked at{unreadable}; {job.state}."
    size = f"{bytes_text(job.size)} of {bytes_text(job.total)}"
    far = f"{job.files:,} of {counted(job.total_files, 'file')}, {size} looked at"
    if job.waits_for:
        return f"{what}, {far}; waiting: {job.waits_for}"
    left = job.seconds_left
    return (
        f"{what}, {far}, {'time left unknown' if left is None else duration_text(left) + ' left'}"
    )


def quota_lines(quotas: Sequence[QuotaStatus]) -> Iterator[str]:
    """Format a table of quotas, with the state of each."""

    def most(limit: int | None, text: Callable[[int], str]) -> str:
        return "no limit" if limit is None else text(limit)

    rows: list[Row] = [("DIRECTORY", "BYTES", "OF", "FILES", "OF", "STATE")]
    states = {
        "counting": "being counted: not enforced yet",
        "active": "enforced",
        "clearing": "being cleared: not enforced",
    }
    for quota in quotas:
        rows.append(
            (
                quota.path,
                bytes_text(quota.bytes_used),
                most(quota.bytes_max, bytes_text),
                f"{quota.files_used:,}",
                most(quota.files_max, "{:,}".format),
                states.get(quota.state, quota.state),
            )
        )
    yield from table_lines(rows, right=(1, 2, 3, 4))
