"""The commands `scrub`, `risk` and `drill`: is the data safe, and is that true?"""

from __future__ import annotations

from pathlib import Path

import click

from .asking import JSON, QUIET, STORE, do, print_lines, print_paths, rate_option


@click.command(short_help="Read and verify everything.")
@STORE
@click.argument("action", type=click.Choice(["start", "pause", "resume", "status"]))
@rate_option
@click.option("--wait", is_flag=True, help="Return when the scrub has ended or is paused.")
@QUIET
@JSON
@click.pass_context
def scrub(
    context: click.Context,
    store: Path,
    action: str,
    rate: float | None,
    wait: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Read and verify every shard and journal of STORE, and repair what fails.

    On a mounted store it runs in the background, gives way to users, and goes on
    where it was after a restart; one that is not mounted is scrubbed to the end
    at once.  It also begins by itself when the last one is older than
    `scrub_days` in fusestore.toml.

    Exit status 0: nothing was found; 1: something was, and is repaired unless
    it says otherwise.

    \b
      fusestore scrub ~/store start --wait
      fusestore scrub ~/store status
    """
    from ..text import scrub_line

    result = do(
        store, "scrub", {"action": action, "rate": rate, "wait": wait}, quiet=quiet, as_json=as_json
    )
    if not as_json:
        click.echo(scrub_line(result))
    if result["found"]:
        context.exit(1)


@click.command(short_help="Say what more losses the data would survive.")
@STORE
@click.option(
    "--if-lost",
    multiple=True,
    metavar="REGION",
    help="Suppose that this region is gone, too.  May be repeated.",
)
@click.option("--model", is_flag=True, help="Add the expected losses of data a year.")
@click.option(
    "--disk-failures", type=float, default=0.015, show_default=True, help="A disk and year."
)
@click.option(
    "--region-losses", type=float, default=0.01, show_default=True, help="A region and year."
)
@click.option(
    "--replace-hours",
    type=float,
    default=24.0,
    show_default=True,
    help="From a failure to the beginning of its repair.",
)
@JSON
@click.pass_context
def risk(
    context: click.Context,
    store: Path,
    if_lost: tuple[str, ...],
    model: bool,
    disk_failures: float,
    region_losses: float,
    replace_hours: float,
    as_json: bool,
) -> None:
    """Say how many more losses each stripe and file of STORE would survive now.

    By shard and by region, from what is known without reading the shards:
    `drill` and `scrub` read them.  Files that would be lost are named, with
    exit status 1.

    \b
      fusestore risk ~/store
      fusestore risk ~/store --if-lost us-east-1
    """
    from ..text import risk_lines

    rates = {
        "disk_failures": disk_failures,
        "region_losses": region_losses,
        "replace_hours": replace_hours,
    }
    arguments = {"if_lost": if_lost, "model": rates if model else None}
    result = do(store, "risk", arguments, as_json=as_json)
    if not as_json:
        print_lines(risk_lines(result))
        print_paths("lost", result["lost"])
    if result["lost_stripes"]:
        context.exit(1)


def _share(_: click.Context, __: click.Parameter, value: str) -> float:
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        raise click.BadParameter(f"{value!r} is no percentage.") from None
    if not 0 < share <= 1:
        raise click.BadParameter("it must be above 0% and at most 100%.")
    return share


@click.command(short_help="Try whether a region could be lost.")
@STORE
@click.option("--lose", "region", required=True, metavar="REGION", help="Read without this one.")
@click.option(
    "--sample",
    default="10%",
    show_default=True,
    callback=_share,
    metavar="N%",
    help="How much of the data to read.",
)
@click.option("--all", "everything", is_flag=True, help="Read all of it.")
@rate_option
@QUIET
@JSON
@click.pass_context
def drill(
    context: click.Context,
    store: Path,
    region: str,
    sample: float,
    everything: bool,
    rate: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Read STORE as if REGION were gone: decode a sample from the others, and verify it.

    Nothing is changed, and a mount goes on.  Files that could not be read are
    named, with exit status 1.

    \b
      fusestore drill ~/store --lose us-east-1
      fusestore drill ~/store --lose us-east-1 --all
    """
    from ..text import drill_line

    share = 1.0 if everything else sample
    arguments = {"region": region, "sample": share, "rate": rate}
    result = do(store, "drill", arguments, quiet=quiet, as_json=as_json)
    if not as_json:
        click.echo(drill_line(result))
        print_paths("could not be read", result["lost"])
    if result["failed_stripes"]:
        context.exit(1)
