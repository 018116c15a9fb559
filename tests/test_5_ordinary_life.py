"""A campaign of ordinary life: disks, daemons, operators, and what must hold all the same.

A seed makes the file systems, the store on them, and what happens.  The short form has few
fixed seeds; `--long` has many, from `--model-seed` on.  A failure prints what happened.  A seed
repeats the events and the operations, but not each race between them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.logs import Recorder
from support.ordinary_events import EVENTS
from support.ordinary_life import Life
from support.ordinary_world import choose_world

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

SHORT_EVENTS, LONG_EVENTS = 20, 40


@pytest.fixture
def live(
    tmp_path: Path, log: Recorder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Life]]:
    """A function that begins a life; it ends with the test."""
    lives: list[Life] = []

    def begin(seed: str) -> Life:
        chance = random.Random(seed)
        lives.append(Life(choose_world(tmp_path / "world", chance), chance))
        print("seed", seed, lives[-1].world, flush=True)
        for name, value in lives[-1].world.surroundings().items():
            monkeypatch.setenv(name, value)
        lives[-1].begin()
        return lives[-1]

    yield begin
    for life in lives:
        try:
            life.abandon()
        finally:
            life.world.end()
        log.lines += life.world.store.logged()


def run(life: Life, events: int) -> None:
    """Let events happen, one to three at a time; each before any happens again."""
    done, deck = 0, list[str]()
    while done < events:
        for _ in range(life.chance.choice([1, 1, 2, 3])):
            deck = deck or life.chance.sample(list(EVENTS), len(EVENTS))
            name = deck.pop()
            life.note(f"{name}:")
            if EVENTS[name](life):
                done += 1
            if not life.world.store.alive():
                break
            life.work(6)
        life.settle()
    life.end()


# What is logged depends on the events: all of it is to be expected.
@pytest.mark.expects_log("")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ordinary_life(live: Callable[[str], Life], seed: int) -> None:
    life = live(str(seed))
    run(life, SHORT_EVENTS)


@pytest.mark.long
@pytest.mark.expects_log("")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(50))
def test_a_long_ordinary_life(
    live: Callable[[str], Life], number: int, pytestconfig: pytest.Config
) -> None:
    seed = f"{pytestconfig.getoption('--model-seed')}/{number}"
    life = live(seed)
    life.patient = True
    run(life, LONG_EVENTS)
