"""The command `bench`."""

from __future__ import annotations

from pathlib import Path

import click

from .asking import ANY_PATH


@click.command(short_help="Measure file systems side by side.")
@click.argument("directory", metavar="[DIR]", type=ANY_PATH, required=False)
@click.option("--against", metavar="DIR", multiple=True, type=ANY_PATH, help="Measure DIR, too.")
@click.option("--null", "null", is_flag=True, help="Measure the null daemon, too.")
@click.option("--disk", metavar="DIR", type=ANY_PATH, help="Make the temporary store in DIR.")
@click.option("--quick", is_flag=True, help="Use little data and one round: takes about a minute.")
@click.option("--rounds", type=click.IntRange(min=1), help="How many rounds count; default: 5.")
@click.option("--only", metavar="NAME[,NAME…]", help="Run only these workloads.")
@click.option(
    "--files-in-store",
    metavar="N",
    type=click.IntRange(min=1),
    help="Also measure a store with 10,000 files and one with N; 1,000,000 take minutes.",
)
@click.option("--json", "json_file", metavar="FILE", type=ANY_PATH, help="Write JSON to FILE.")
@click.option("--csv", "csv_file", metavar="FILE", type=ANY_PATH, help="Write CSV to FILE.")
@click.option("--plot", metavar="FILE", type=ANY_PATH, help="Draw a chart: FILE.png or FILE.svg.")
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
    """Measure the file system of DIR, or a temporary store if DIR is omitted.

    The temporary store is made, mounted and removed.  Two more targets are
    measured with it: the disk that holds it (raw), and a daemon that only answers
    (null).  No file system on pyfuse3 can be faster than null.  The targets take
    turns in each round, the first round does not count, and figures are medians.
    In DIR, bench makes one directory, works in it, and removes it.

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
      objects      latency of put and get of 1-10 KB, with and without fsync
      documents    30 clients, 100 KB to 1.5 MB, 10 % reads and 90 % synced writes
      parallel     1, 2, 4 and 8 readers, and writers, at once
      sizes        files of 1 KB to 1 GB
      checkpoints  latency of 4 KiB writes while the daemon makes checkpoints
      writeback    4 KiB writes, with -o writeback and noxattr (temporary store)
      memory       nodes in /dev/shm (temporary store)
      degraded     a region lost (temporary store)
      repair       how fast a region is rebuilt (temporary store)
      many         with --files-in-store only

    Exit status 3: a workload failed.  The other workloads still run.
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
