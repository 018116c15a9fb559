"""The commands `scrub`, `risk` and `drill`: verifying that the data is safe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import bytes_text, counted, speed_text
from .asking import JSON, QUIET, STORE, do, print_lines, print_paths, rate_option

if TYPE_CHECKING:
    from ..serve.messages.safety import DrillResult, LossModel, RiskResult, ScrubAction
    from ..watch.fields import Scrub


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
    action: ScrubAction,
    rate: float | None,
    wait: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Read and verify every shard and journal of STORE, and repair what fails.

    On a mounted store, the scrub runs in the background, gives way to users, and
    continues after a restart.  On an unmounted store, the command returns when the
    scrub is complete.  A mounted store also begins a scrub by itself, `scrub_days`
    (in fusestore.toml) after the last one.

    Exit status 0: nothing was found; 1: something was found, or was not read.
    It is repaired unless the output reports otherwise.

    \b
      fusestore scrub ~/store start --wait
      fusestore scrub ~/store status
    """
    from ..serve.messages.safety import ScrubRequest

    result = do(store, ScrubRequest(action, rate, wait), quiet=quiet, as_json=as_json)
    if not as_json:
        click.echo(scrub_line(result))
    if result.found or result.left or result.unread or result.skipped:
        context.exit(1)


@click.command(short_help="Report how many more losses the data would survive.")
@STORE
@click.option(
    "--if-lost",
    multiple=True,
    metavar="REGION",
    help="Assume that this region is lost, too.  May be repeated.",
)
@click.option("--model", is_flag=True, help="Add the expected losses of data a year.")
@click.option(
    "--disk-failures",
    type=float,
    default=0.015,
    show_default=True,
    help="Failures a disk and year.",
)
@click.option(
    "--region-losses",
    type=float,
    default=0.01,
    show_default=True,
    help="Losses a region and year.",
)
@click.option(
    "--replace-hours",
    type=float,
    default=24.0,
    show_default=True,
    help="Hours from a failure to the beginning of its repair.",
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
    """Report how many more losses each stripe and file of STORE would survive now.

    The report counts losses of shards and of regions.  It is computed from the
    metadata: only `drill` and `scrub` read the shards.

    Exit status 1: files would be lost.  The command names them.

    \b
      fusestore risk ~/store
      fusestore risk ~/store --if-lost us-east-1
    """
    from ..serve.messages.safety import ModelRates, RiskRequest

    rates = ModelRates(disk_failures, region_losses, replace_hours) if model else None
    result = do(store, RiskRequest(if_lost, rates), as_json=as_json)
    if not as_json:
        print_lines(risk_lines(result))
        print_paths("lost", result.lost)
    if result.lost_stripes:
        context.exit(1)


def _share(_: click.Context, __: click.Parameter, value: str) -> float:
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a percentage.") from None
    if not 0 < share <= 1:
        raise click.BadParameter("it must be above 0% and at most 100%.")
    return share


@click.command(short_help="Test whether a region could be lost.")
@STORE
@click.option("--lose", "region", required=True, metavar="REGION", help="Read without this region.")
@click.option(
    "--sample",
    default="10%",
    show_default=True,
    callback=_share,
    metavar="N%",
    help="How much of the data to read.",
)
@click.option("--all", "everything", is_flag=True, help="Read all data.")
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

    The command changes nothing, and the store stays in use.

    Exit status 1: some files could not be read.  The command names them.

    \b
      fusestore drill ~/store --lose us-east-1
      fusestore drill ~/store --lose us-east-1 --all
    """
    from ..serve.messages.safety import DrillRequest

    share = 1.0 if everything else sample
    result = do(store, DrillRequest(region, share, rate), quiet=quiet, as_json=as_json)
    if not as_json:
        click.echo(drill_line(result))
        print_paths("could not be read", result.lost)
    if result.failed_stripes:
        context.exit(1)


def scrub_line(scrub: Scrub) -> str:
    """Report the progress or the result of a scrub."""
    from ..watch.health import finished_text, found_text, left_over_text

    if scrub.state == "never":
        return "This store was never scrubbed."
    read = f"{counted(scrub.shards, 'shard')} read and verified, {bytes_text(scrub.size)}"
    found = found_text(scrub)
    if scrub.state != "done":
        stripes = f"{scrub.stripes:,} of {counted(scrub.total, 'stripe')}"
        return f"{scrub.state}: {stripes}: {read}, {found}."
    speed = speed_text(scrub.size, scrub.finished - scrub.started)
    return f"done {finished_text(scrub)}: {read} in {speed}, {found}{left_over_text(scrub)}."


def risk_lines(risk: RiskResult) -> Iterator[str]:
    """Report how many more losses the data would survive."""
    without = f" without {', '.join(risk.if_lost)}" if risk.if_lost else ""
    if risk.lost_stripes:
        yield f"{counted(len(risk.lost), 'file')} would be lost{without}."
    elif risk.next_region_loses:
        files = counted(len(risk.next_region_loses), "file")
        yield f"Nothing is lost{without}, but one more region would take {files} with it."
    else:
        least = min(map(int, risk.by_regions), default=0)
        more = "any one more region may be lost"
        if least > 1:
            more = f"any {counted(least, 'more region')} may be lost"
        yield (
            f"Nothing is lost{without}, and {more}." if risk.stripes else "There is no data yet."
        )
    for what, counts in (("region", risk.by_regions), ("shard", risk.by_shards)):
        for losses, stripes in counts.items():
            share = f"{stripes:,} of {counted(risk.stripes, 'stripe')}"
            if losses == "0":
                yield f"  {share} would not survive the loss of one more {what}"
            else:
                survive = "survives" if stripes == 1 else "survive"
                more = counted(int(losses), f"more {what}")
                yield f"  {share} {survive} the loss of any {more}"
    yield f"  the metadata is in {counted(risk.metadata_regions, 'region')} besides its own place"
    if risk.model is not None:
        yield from model_lines(risk.model)


def model_lines(model: LossModel) -> Iterator[str]:
    """Report the expected losses of data a year, from disks and regions together."""
    how = "measured here" if model.measured else "assumed: nothing was repaired yet"
    yield (
        f"Expected losses of data a year, with {model.disk_failures_a_year:g} failures a disk, "
        f"{model.region_losses_a_year:g} losses a region, {model.replace_hours:g} h to "
        f"replace and {model.repair_seconds:,.0f} s to repair a node "
        f"({model.repair_bytes_a_second / 1e6:.0f} MB/s, {how}):"
    )
    for code, found in model.codes.items():
        yield (
            f"  {code}: {found.with_regions:.2g} (of disk failures alone "
            f"{found.disks_only:.2g}); regions that may be lost: {found.regions_borne}"
        )


def drill_line(drill: DrillResult) -> str:
    """Report the result of a drill."""
    read = (
        f"{counted(drill.stripes, 'stripe')}, {bytes_text(drill.bytes)}, read without "
        f"{drill.region} in {speed_text(drill.bytes, drill.seconds)}"
    )
    if drill.failed_stripes:
        failed = f"{drill.failed_stripes:,} failed"
        return f"{drill.region} could not be lost now: {read}, {failed}."
    return f"{drill.region} could be lost now: {read}, all verified."
