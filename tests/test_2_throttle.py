"""Writes are slowed down to what cleaning gives back."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from fusestore.files.throttle import FIRST_RATE, Throttle

MIB = 1 << 20
KIB = 1 << 10


async def writes(throttle: Throttle, count: int, length: int, excess: float) -> float:
    """How many seconds so many writes take, one after the other."""
    began = trio.current_time()
    for _ in range(count):
        await throttle.wait(length, excess)
    return trio.current_time() - began


async def test_writes_are_as_fast_as_cleaning(autojump_clock: MockClock) -> None:
    throttle = Throttle(2.0)
    assert 0.9 < await writes(throttle, 33, MIB, 1.0) * FIRST_RATE / (32 * MIB) < 1.1
    for _ in range(20):
        throttle.gave_back(4 * MIB, 0.5)
    assert 0.9 < await writes(throttle, 17, MIB, 1.0) / 2 < 1.1


async def test_more_garbage_slows_them_down_further(autojump_clock: MockClock) -> None:
    throttle = Throttle(2.0)
    once = await writes(throttle, 100, 8 * KIB, 1.0)
    assert await writes(throttle, 100, 8 * KIB, 1.33) > 8 * once


async def test_a_small_write_waits_for_those_before_it_only(autojump_clock: MockClock) -> None:
    throttle = Throttle(2.0)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(throttle.wait, MIB, 1.0)
        await trio.testing.wait_all_tasks_blocked()
        assert throttle.held == 3
        assert await writes(throttle, 1, 4 * KIB, 1.0) < 5 * MIB / FIRST_RATE
    assert throttle.held == 0


async def test_no_write_waits_longer_than_it_may(autojump_clock: MockClock) -> None:
    throttle = Throttle(2.0)
    assert await writes(throttle, 10, MIB, 100.0) <= 20.0
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        for _ in range(500):
            nursery.start_soon(throttle.wait, MIB, 10.0)
    assert trio.current_time() - began <= 2.0


async def test_all_go_on_when_cleaning_ends(autojump_clock: MockClock) -> None:
    throttle = Throttle(2.0)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(throttle.wait, MIB, 100.0)
        await trio.testing.wait_all_tasks_blocked()
        throttle.release()
    assert trio.current_time() - began < 0.1
