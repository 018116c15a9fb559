"""The command line: `fusestore COMMAND …`.

Commands import what they need when they run, so that `--help` is fast.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..system import logs, process_limits
from .about import completion, version
from .asking import ANY_PATH, STORE, print_lines
from .bench import bench
from .compact import compact
from .errors import EndsInSentences
from .inspect import inspect
from .metrics import metrics
from .mount import mount, umount
from .nodes import node, rebalance
from .operate import config, log_level, service
from .policy import policy, quota, recode
from .repair import repair
from .rescue import fsck, recover
from .safety import drill, risk, scrub
from .status import status

EPILOG = """\b
Exit status:
  0  the command succeeded, and found nothing wrong
  1  the command ran, and found a problem
  2  the arguments or the configuration are wrong; nothing was changed
  3  the command failed
"""


class _Commands(EndsInSentences, click.Group):
    pass


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fusestore", message="%(prog)s %(version)s")
def cli() -> None:
    """A file system that survives the loss of a disk, a site or a cloud region.

    fusestore cuts files into stripes, codes each stripe, and keeps the shards in
    three regions.  You can lose any one region and still read every file.

    \b
      fusestore mkfs ~/store              make a store with three regions
      fusestore mount ~/store ~/files     mount it (~/files: an empty directory)
      fusestore status ~/store            is everything safe?
      fusestore umount ~/files            commit everything and unmount
    """
    logging.basicConfig(format="fusestore: %(message)s", level=logging.WARNING)
    if logs.is_journal():
        logging.getLogger().handlers[0].setFormatter(logs.JournalFormatter())


for _command in (
    *(mount, umount, status, metrics, repair, scrub, risk, drill, fsck, recover, inspect, bench),
    *(policy, recode, compact, quota, config, log_level, service, version, completion),
    *(node, rebalance),
):
    cli.add_command(_command)


# --- mkfs --------------------------------------------------------------------


def _region(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Any:
    regions: list[tuple[str, Path | None]] = []
    for value in values:
        name, equals, path = value.partition("=")
        if equals and not path:
            raise click.BadParameter(f"{value!r} has no path after the equals sign.")
        regions.append((name, Path(path) if equals else None))
    return regions


@cli.command(short_help="Make a store.")
@STORE
@click.option(
    "regions",
    "--region",
    multiple=True,
    metavar="NAME[=PATH]",
    callback=_region,
    help="A region and the directory of its node (default: a directory below STORE).  "
    "Repeat the option for each region; default: us-east-1, us-west-1 and eu-west-1.",
)
@click.option(
    "--code",
    metavar="K+M",
    default="2+1",
    show_default=True,
    help="The code of new files: K data shards and M parity shards per stripe.",
)
@click.option(
    "--metadata",
    type=ANY_PATH,
    metavar="DIR",
    help="The directory of the metadata; default: STORE/metadata.",
)
@click.option(
    "--allow-unsafe", is_flag=True, help="Accept codes that do not survive the loss of a region."
)
def mkfs(
    store: Path,
    regions: list[tuple[str, Path | None]],
    code: str,
    metadata: Path | None,
    allow_unsafe: bool,
) -> None:
    """Make a store in the directory STORE, which must be new or empty.

    \b
      fusestore mkfs ~/store
      fusestore mkfs /srv/store --code 4+2 --metadata /ssd/store
      fusestore mkfs /srv/store --region a=/disk1/a --region b=/disk2/b --region c=/disk3/c

    \b
    With three regions, each of these codes survives the loss of any one region:
      2+1   takes 1.5 times the size of the data
      4+2   the same size, in smaller shards
      6+3   the same size, in even smaller shards
      1+2   three copies
    """
    from ..config.mkfs import make_store
    from ..format.erasure import Code

    config = make_store(store, regions, Code.parse(code), metadata, allow_unsafe)
    places = ", ".join(dict.fromkeys(config.regions))
    place = shlex.quote(os.fspath(config.store if os.fspath(store).startswith("-") else store))
    print_lines(
        [
            f"{config.store} is a store with code {config.code} in {places}.",
            f"Mount it on an empty directory: fusestore mount {place} MOUNTPOINT",
        ]
    )


def main() -> None:
    """Run the command line of this process."""
    process_limits.raise_limits()
    if sys.argv[1:2] and sys.argv[1].startswith("/"):
        # mount.fuse(8), which mount(8) runs for the type fuse.fusestore: STORE MOUNTPOINT -o …
        from .mount_helper import main_mount

        main_mount()
    sys.exit(cli.main(prog_name="fusestore"))
