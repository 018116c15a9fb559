"""Threads that the system refuses: work waits for one, and nobody is to blame."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import trio
from outcome import Outcome

from fusestore.errors import UsageError
from fusestore.members.node_calls import NodeCall, NodeCalls
from fusestore.system import threads
from support.processes import in_child

REFUSED = "another thread|can be started again"


@contextmanager
def none_left(error: BaseException) -> Iterator[None]:
    """The system refuses threads, and no worker is idle."""

    def refuse(*_: object) -> threads._Worker:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_worker", refuse)
        patch.setattr(threading.Thread, "start", refuse)
        yield


@pytest.fixture(
    params=[RuntimeError("can't start new thread"), MemoryError()], ids=["no", "memory"]
)
def refusal(request: pytest.FixtureRequest) -> BaseException:
    """What Python raises."""
    threads._is_short = False
    error: BaseException = request.param
    return error


@pytest.mark.expects_log(REFUSED)
def test_a_call_waits_until_a_thread_may_be_started(refusal: BaseException) -> None:
    async def main() -> None:
        began, done = trio.current_time(), list[int]()

        async def one(number: int) -> None:
            done.append(await threads.call(lambda: number))

        async def other() -> None:
            done.append(await threads.run_sync(lambda: 7))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                with none_left(refusal):
                    for number in range(3):
                        nursery.start_soon(one, number)
                    nursery.start_soon(other)
                    await trio.sleep(3 * threads.RETRY_SECONDS)
                    assert not [
                        n for n in done if n != 7
                    ]  # trio may have an idle thread of its own
                    assert threads.short_until() > began + threads.RETRY_SECONDS
        assert sorted(done) == [0, 1, 2, 7]
        assert threads.short_until() < trio.current_time()

    trio.run(main)


@pytest.mark.expects_log(REFUSED)
def test_a_thread_that_becomes_free_serves_those_that_wait(refusal: BaseException) -> None:
    async def main() -> None:
        free, served = threading.Event(), []
        all_served = trio.Event()

        def on_end(result: Outcome[int]) -> None:
            served.append(result.unwrap())
            if len(served) == 5:
                all_served.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.call, free.wait)
            await trio.sleep(0.05)
            with none_left(refusal):
                for number in range(5):
                    threads.start(partial(int, number), on_end)
                await trio.sleep(0.05)
                assert not served
                free.set()
                with trio.fail_after(5):
                    await all_served.wait()
        assert sorted(served) == [0, 1, 2, 3, 4]

    trio.run(main)


@pytest.mark.expects_log(REFUSED)
@pytest.mark.parametrize("is_patient", [True, False])
def test_a_node_is_not_late_while_its_calls_wait_for_a_thread(
    refusal: BaseException, is_patient: bool
) -> None:
    async def main() -> None:
        calls, late = NodeCalls(2), []

        def give_up(call: NodeCall) -> bool:
            late.append(call)
            return True

        outcomes = []

        async def one() -> None:
            outcomes.append(await calls.run(lambda: 1, 0.2, give_up if is_patient else None))

        async with trio.open_nursery() as nursery:
            with none_left(refusal):
                for _ in range(5):  # more than may run at once
                    nursery.start_soon(one)
                await trio.sleep(1)
                assert not outcomes
        assert [outcome and outcome.unwrap() for outcome in outcomes] == [1] * 5
        assert not late
        assert calls.left_behind == 0
        hung = await calls.run(lambda: time.sleep(0.5), 0.2, give_up if is_patient else None)
        assert hung is None  # now it is late
        await trio.sleep(0.5)

    trio.run(main)


@pytest.mark.expects_log(REFUSED)
def test_a_call_that_is_given_up_before_it_has_a_thread_never_runs(refusal: BaseException) -> None:
    async def main() -> None:
        calls, ran = NodeCalls(1), []
        async with trio.open_nursery() as nursery:
            with none_left(refusal):
                nursery.start_soon(calls.run, lambda: ran.append(1), 5.0, lambda call: True)
                await trio.sleep(0.05)
                calls.end_all()  # the node has failed
                await trio.sleep(0.05)
        assert calls.left_behind == 0
        with trio.fail_after(2):
            assert await calls.run(lambda: 2, 5.0, None)  # its place is free
        assert not ran

    trio.run(main)


def test_threads_are_kept_while_a_store_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(threads, "_idle", {})

    async def main() -> None:
        threads.keep()
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(threads.KEPT + 3):
                    nursery.start_soon(threads.call, time.sleep, 0.1)
            await trio.sleep(0.5)
            assert len(threads._idle) == threads.KEPT
        finally:
            threads.let_go()
        await trio.sleep(0.3)
        assert not threads._idle

    trio.run(main)


def test_a_process_that_may_not_start_the_threads_of_a_store_is_told(
    refusal: BaseException,
) -> None:
    with none_left(refusal), pytest.raises(UsageError, match=r"threads only.*TasksMax"):
        threads.keep()
    threads.let_go()


def test_a_forked_process_has_threads_of_its_own() -> None:
    """It does not wait for idle ones that its parent has."""

    async def works() -> None:
        with trio.fail_after(10):
            assert await threads.call(os.getpid) == os.getpid()

    trio.run(works)
    in_child(partial(trio.run, works))
