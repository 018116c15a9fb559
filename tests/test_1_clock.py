"""The clock of the event loop: what passes while the loop does not run does not count."""

from __future__ import annotations

import math
import time

import pytest
import trio

from fusestore.system.loop_clock import LATE_SECONDS, LoopClock


class Machine:
    """A machine whose time passes as told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.clock = LoopClock(lambda: self.now)
        self.clock.start_clock()

    def sleep(self, deadline: float, seconds: float) -> float:
        """Let the loop sleep until a deadline, and wake up after `seconds`; its time then."""
        self.clock.deadline_to_sleep_time(deadline)
        self.now += seconds
        return self.clock.current_time()


def test_time_passes_as_usual() -> None:
    machine = Machine()
    assert machine.clock.current_time() == 0
    assert machine.sleep(5, 2) == 2
    assert machine.sleep(5, 3.5) == 5.5
    machine.now += 0.9
    assert machine.clock.current_time() == pytest.approx(6.4)
    assert machine.clock.deadline_to_sleep_time(10) == pytest.approx(3.6)
    assert machine.sleep(math.inf, 1000) == pytest.approx(1006.4)


@pytest.mark.parametrize("until", [5, 30, 300])
@pytest.mark.parametrize("pause", [38, 3600, 8 * 3600])
def test_no_deadline_passes_while_the_loop_is_stopped(until: float, pause: float) -> None:
    machine = Machine()
    assert machine.sleep(until, until + pause) <= until - LATE_SECONDS
    machine = Machine()
    machine.now += pause  # while it ran
    assert machine.clock.current_time() <= LATE_SECONDS


def test_a_loop_that_is_always_late_gets_on() -> None:
    machine = Machine()
    for _ in range(10):
        machine.sleep(machine.clock.current_time() + 0.1, 5)
    assert machine.clock.current_time() >= 5


def test_trio_keeps_its_deadlines_when_the_loop_was_blocked() -> None:
    async def main() -> tuple[bool, float]:
        answered = trio.Event()

        async def answer() -> None:
            await trio.sleep(0.1)
            time.sleep(3)
            await trio.sleep(0.5)
            answered.set()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with trio.move_on_after(2):
                await answered.wait()
        return answered.is_set(), trio.current_time() - began

    in_time, took = trio.run(main, clock=LoopClock())
    assert in_time
    assert took < 2
