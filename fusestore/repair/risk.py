"""How safe the data is: the losses that each stripe would survive, with a test of this.

`risk` counts from the metadata; `drill` reads without a region, and verifies; `plan`
reports the cost of repairing a node.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import trio

from ..errors import UsageError
from ..format import store_rows
from ..format.erasure import Code
from ..format.placement import losses, regions_borne
from ..format.stripe_rows import Stripe
from ..log.log import Log
from ..log.pace import Pace
from ..members.member import Member
from ..read.reader import Reader

Progress = Callable[[dict[str, Any]], None]


ASSUMED_REPAIR_RATE = 50e6
"""Bytes a second, for a store without a past repair."""
YEAR_SECONDS = 365.25 * 86_400


@dataclass(frozen=True, slots=True)
class Rates:
    """The assumptions of the model."""

    disk_failures: float = 0.015
    """A disk and year."""
    region_losses: float = 0.01
    """A region and year: fire, theft, a closed account, a mistake."""
    replace_hours: float = 24.0
    """From a failure to the beginning of its repair."""


class Safety:
    """Examines all stripes of an open store."""

    def __init__(self, log: Log, reader: Reader) -> None:
        self._log = log
        self._reader = reader

    async def _stripes(self) -> AsyncIterator[list[tuple[int, Stripe]]]:
        """All sealed stripes, in batches."""
        for batch in self._log.batches():
            yield batch
            await trio.lowlevel.checkpoint()

    def _check_regions(self, regions: Iterable[str]) -> None:
        known = set(self._log.members.regions)
        for region in regions:
            if region not in known:
                raise UsageError(
                    f"There is no region {region!r} in this store; there are "
                    f"{', '.join(sorted(known))}."
                )

    async def _paths(self, stripes: Iterable[int]) -> list[str]:
        inodes = {ino for number in stripes for ino in self._reader.owners(number)}
        return sorted(set((await self._log.paths_of(inodes)).values()))

    # --- risk ----------------------------------------------------------------

    async def risk(self, if_lost: Collection[str]) -> dict[str, Any]:
        """How many more losses each stripe would survive, now or without some regions."""
        self._check_regions(if_lost)
        shards: Counter[int] = Counter()
        regions: Counter[int] = Counter()
        codes: Counter[str] = Counter()
        lost: list[int] = []
        weakest: list[int] = []
        async for batch in self._stripes():
            for number, row in batch:
                good = self._good_by_region(number, row, if_lost)
                spare = sum(good.values()) - row.code.k
                codes[str(row.code)] += 1
                if spare < 0:
                    lost.append(number)
                    continue
                shards[spare] += 1
                more = losses(good, row.code.k)
                regions[more] += 1
                if more == 0:
                    weakest.append(number)
        whole = [m for m in self._log.members.in_sync if m.name not in self._log.unread_journals]
        in_sync = {member.config.region for member in whole} - set(if_lost)
        return {
            "if_lost": sorted(if_lost),
            "stripes": sum(codes.values()),
            "codes": dict(sorted(codes.items())),
            "by_shards": {str(n): shards[n] for n in sorted(shards)},
            "by_regions": {str(n): regions[n] for n in sorted(regions)},
            "metadata_regions": len(in_sync),
            "lost_stripes": len(lost),
            "lost": await self._paths(lost),
            "next_region_loses": await self._paths(weakest),
        }

    def _good_by_region(self, number: int, row: Stripe, without: Collection[str]) -> Counter[str]:
        """The shards that a stripe has, by region."""
        good: Counter[str] = Counter()
        for index, place in enumerate(row.shards):
            if self._log.has_shard(number, index, place):
                region = self._log.members.by_id[place.node].config.region
                if region not in without:
                    good[region] += 1
        return good

    def model(self, codes: Iterable[str], rates: Rates) -> dict[str, Any]:
        """The expected losses of data a year, by code, for stated rates; see docs/recovering.md.

        A node that fails is down for the time to replace it and the time to repair it
        at the rate measured on this store (`measured`), or else at an assumed one.
        """
        members = self._log.members
        value = self._log.engine.get(store_rows.REPAIRS_KEY)
        repairs = json.loads(value) if value else []
        size = sum(repair["bytes"] for repair in repairs)
        seconds = sum(repair["seconds"] for repair in repairs)
        speed = size / seconds if size and seconds else ASSUMED_REPAIR_RATE
        held = max(
            (sum(max(s.live, 0) for s in member.shards.states.values()) for member in members.all),
            default=0,
        )
        down = (rates.replace_hours * 3600 + held / speed) / YEAR_SECONDS
        regions = len(set(members.regions))
        disks = len(members.all) / regions
        found = {}
        for text in codes:
            code = Code.parse(text)
            bears = regions_borne(code, regions)
            disk = _losses_a_year(regions, bears, disks * rates.disk_failures, down)
            every = disks * rates.disk_failures + rates.region_losses
            found[text] = {
                "regions_borne": bears,
                "disks_only": disk,
                "with_regions": _losses_a_year(regions, bears, every, down),
            }
        return {
            "disk_failures_a_year": rates.disk_failures,
            "region_losses_a_year": rates.region_losses,
            "replace_hours": rates.replace_hours,
            "repair_bytes_a_second": speed,
            "measured": bool(size),
            "repair_seconds": held / speed,
            "codes": found,
        }

    # --- drill ---------------------------------------------------------------

    async def drill(
        self, region: str, sample: float, rate: float | None, progress: Progress
    ) -> dict[str, Any]:
        """Decode a share of all stripes without a region, and verify the result."""
        self._check_regions([region])
        gone = {m.id for m in self._log.members.all if m.config.region == region}
        pace = Pace(self._log, rate)
        seed = random.randrange(1 << 32)
        chance = random.Random(seed)
        started = time.monotonic()
        checked = size = 0
        failed: list[int] = []
        total = self._log.counters.file_bytes
        async for batch in self._stripes():
            for number, row in batch:
                if chance.random() >= sample:
                    continue
                await pace.spend(row.code.k * row.shard_length)
                without = [i for i, place in enumerate(row.shards) if place.node in gone]
                good = await self._reader.reads_without(number, row, without)
                if not good and self._log.stripe(number) is not None:
                    failed.append(number)
                checked += 1
                size += row.length
                progress({"phase": f"without {region}", "done": size, "total": total * sample})
        return {
            "region": region,
            "stripes": checked,
            "bytes": size,
            "seconds": time.monotonic() - started,
            "seed": seed,
            "failed_stripes": len(failed),
            "lost": await self._paths(failed),
        }

    # --- the plan of a repair ------------------------------------------------

    async def plan(self, member: Member, *, anew: bool) -> dict[str, Any]:
        """The cost of repairing a node, as far as is known without reading its shards.

        `anew`: the node is filled from nothing.
        """
        stripes = shards = check = rebuild = weak = hopeless = 0
        reads: Counter[str] = Counter()
        anew = anew or not member.is_open
        async for batch in self._stripes():
            for number, row in batch:
                here = [i for i, place in enumerate(row.shards) if place.node == member.id]
                if not here:
                    continue
                stripes += 1
                others = [
                    self._log.members.by_id[place.node].config.region
                    for index, place in enumerate(row.shards)
                    if index not in here and self._log.has_shard(number, index, place)
                ]
                for index in here:
                    if not anew and self._log.has_shard(number, index, row.shards[index]):
                        check += row.shard_length
                        continue
                    shards += 1
                    rebuild += row.shard_length
                    for region in others[: row.code.k]:
                        reads[region] += row.shard_length
                    hopeless += len(others) < row.code.k
                weak += len(others) < row.code.n - len(here)
        return {
            "node": member.name,
            "path": str(member.config.path),
            "stripes": stripes,
            "weak_stripes": weak,
            "shards_to_rebuild": shards,
            "bytes_to_rebuild": rebuild,
            "bytes_to_check": check,
            "hopeless_shards": hopeless,
            "reads": dict(sorted(reads.items())),
        }


def _losses_a_year(regions: int, bears: int, rate: float, down: float) -> float:
    """How often a year more regions are down at once than a code tolerates.

    Independent failures at `rate` a region and year, each down for `down` years: the
    usual first-order term of the Markov model of arrays of disks.
    """
    result = 1.0
    for already in range(bears + 1):
        result *= (regions - already) * rate * (down if already else 1.0)
    return result
