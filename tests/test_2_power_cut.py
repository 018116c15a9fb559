"""Wherever the power is cut, the store mounts by itself and is what it was at one instant.

Random work is done on a store in this process; `power_cut` keeps the tape of all that happened
and makes the disks that a cut may leave.  Each such store is mounted: its tree must be, byte
for byte, one that there was, and none older than what had been acknowledged.  Then it is
mounted again, cut again in its first commits, or loses a region.

The work and the cuts come from `--model-seed`; a failure says which work and which cut it was,
and comes again with the same seed and the same test.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from support.cuts import Cut
from support.logs import AS_TOLD, CORRUPT, DROPPED, OUT_OF_USE, UNREAD_FILE
from support.machine import Machine, told
from support.opened_store import make, opened
from support.power_cut import Possible, Promised, write_disks
from support.random_work import CODES, MIB, STEPS, History, illness_of, small_limits, work
from support.tree_model import State, match, observe

pytestmark = pytest.mark.expects_log(AS_TOLD, CORRUPT, DROPPED, OUT_OF_USE, UNREAD_FILE)

CUTS = 20


def campaign(seed: int, number: int, cuts: int, place: Path) -> None:
    """Some work, and many cuts of it."""
    chance = random.Random(f"{seed} {number}")
    with told(f"--model-seed {seed}, work {number}"):
        limits = small_limits(chance)
        config = make(place / "store", chance.choice(CODES), limits)
        history = work(config, chance, STEPS, illness_of(chance))
        for cut in range(cuts):
            chance = random.Random(f"{seed} {number} {cut}")
            at = history.tape.choose(chance)
            Cut(history, at, chance, place / f"cut{cut}").check()


def killed_campaign(seed: int, number: int, kills: int, place: Path) -> None:
    """Some work, kills of it, and cuts of the mounts after them."""
    chance = random.Random(f"killed {seed} {number}")
    with told(f"--model-seed {seed}, killed work {number}"):
        limits = small_limits(chance)
        config = make(place / "store", chance.choice(CODES), limits)
        history = work(config, chance, STEPS // 2, None)
        for kill in range(kills):
            chance = random.Random(f"killed {seed} {number} {kill}")
            at = history.tape.choose(chance)
            cut = Cut(history, at, chance, place / f"kill{kill}")
            with told(f"killed under event {at}:\n{history.tape.around(at)}"):
                cut.check_killed()
            shutil.rmtree(cut.place)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--model-seed"))


@pytest.mark.parametrize("number", range(3))
def test_the_power_is_cut(number: int, seed: int, tmp_path: Path) -> None:
    campaign(seed, number, CUTS, tmp_path)


@pytest.mark.parametrize("number", range(4))
def test_the_process_is_killed_and_then_the_power_is_cut(
    number: int, seed: int, tmp_path: Path
) -> None:
    killed_campaign(seed, number, CUTS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(100, 130))
def test_kills_and_cuts_go_on(number: int, seed: int, tmp_path: Path) -> None:
    killed_campaign(seed, number, 2 * CUTS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(100, 160))
def test_the_power_is_cut_often(number: int, seed: int, tmp_path: Path) -> None:
    campaign(seed, number, 2 * CUTS, tmp_path)


def test_what_a_mount_counts_after_a_kill_is_on_the_disks(seed: int, tmp_path: Path) -> None:
    """One file that replaces another, killed under every event; the mount is cut at its end."""
    chance = random.Random(f"every kill {seed}")
    config = make(tmp_path / "store")
    old, new = chance.randbytes(MIB), chance.randbytes(MIB)
    states: list[State] = []

    async def main() -> None:
        async with opened(config) as one:
            for number, data in enumerate((old, new)):
                await one.put("file", data)
                states.append(await observe(one))
                machine.tape.events.append(Possible(number))
                await one.store.committer.commit()
                machine.tape.events.append(Promised(number))

    with Machine(config, chance) as machine:
        machine.run(main)
    first = next(i for i, event in enumerate(machine.tape.events) if event == Promised(0))
    history = History(machine.tape, states, config)
    for at in range(first, len(machine.tape.events)):
        cut = Cut(history, at, chance, tmp_path / f"kill{at}")
        with told(f"killed under event {at}:\n{machine.tape.around(at)}"):
            disks = machine.tape.kill(at, chance)
            killed = write_disks(disks, config, cut.place / "killed")
            found, tape = cut.mount(killed, kept=disks)
            number = match(found, states, cut.oldest, cut.newest)
            after = write_disks(tape.cut(len(tape.events) - 1, chance), killed, cut.place / "cut")
            found, _ = cut.mount(after)
            match(found, states, number, number)
        shutil.rmtree(cut.place)
