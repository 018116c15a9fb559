"""The command `bench`."""

from __future__ import annotations

from pathlib import Path

import click

from .asking import ANY_PATH


@click.command(short_help="Measure file systems side by side.")
@click.argument("directory", metavar="[DIR]", type=ANY_PATH, required=False)
@click.option("--against", metavar="DIR", multiple=True, type=ANY_PATH, help="Measure this, too.")
@click.option("--null", "null", is_flag=True, help="Measure the null daemon beside DIR.")
@click.option("--disk", metavar="DIR", type=ANY_PATH, help="Where a store of its own is made.")
@click.option("--quick", is_flag=True, help="Little data, one round: a minute or so.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds that count; default: 5.")
@click.option("--only", metavar="NAME[,NAME…]", help="Only these of the workloads above.")
@click.option(
    "--files-in-store",
    metavar="N",
    type=click.IntRange(min=1),
    help="Measure with 10,000 files in it and with N, too; 1,000,000 take minutes.",
)
@click.option("--json", "json_file", metavar="FILE", type=ANY_PATH, help="Write the figures there.")
@click.option("--csv", "csv_file", metavar="FILE", type=ANY_PATH, help="Write the figures there.")
@click.option("--plot", metavar="FILE", type=ANY_PATH, help="Draw them there: .png or .svg.")
def bench(
    directory: Path | None,
    against: tuple[Path, ...],
    null: bool,
    disk: Path | None,
    quick: bool,
    rounds: int | None,
    only: str | None,
    files_in_store: int | None,
    json_file: Path | None,
    csv_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure what the file system of DIR does; without DIR a store of its own.

    A store of its own is made, mounted and removed; beside it are measured the
    bare disk that it is on (raw), and a daemon that only answers (null), which is
    as fast as anything with pyfuse3 can be.  Targets take turns in every round,
    the first round does not count, and figures are medians.  In DIR nothing is
    touched but a directory that is made for the purpose, and removed.

    \b
      fusestore bench --quick
      fusestore bench --plot figures.svg --json figures.json
      fusestore bench ~/files --against /mnt/nfs --against /tmp --null
      fusestore bench --only large,small --disk /mnt/nvme

    \b
    Workloads:
      large        write a file, fsync; read it cold, in sequence and at random
      overwrite    4 KiB at random, each synced
      small        4 KiB files: create, read cold, ls -lR, delete
      tree         unpack a source tree, search it cold
      objects      latency of 1-10 KB put and got, with and without fsync
      documents    30 clients, 100 KB to 1.5 MB, 10 % reads and 90 % synced writes
      parallel     1, 2, 4 and 8 readers, and writers, at once
      sizes        files of 1 KB to 1 GB
      checkpoints  latency of 4 KiB writes while the daemon makes checkpoints
      writeback    4 KiB writes, with -o writeback and noxattr (own stores)
      memory       nodes in /dev/shm (own stores)
      degraded     a region lost (own stores)
      repair       how fast a region is rebuilt (own stores)
      many         with --files-in-store only

    Exit status 3 when a workload failed; the others go on.
    """
    from ..bench.session import Options, run

    run(
        Options(
            directory=directory,
            against=against,
            null=null,
            disk=disk,
            quick=quick,
            rounds=rounds,
            only=tuple(name.strip() for name in only.split(",")) if only else (),
            files_in_store=files_in_store,
            json_file=json_file,
            csv_file=csv_file,
            plot=plot,
        ),
        click.echo,
    )
