"""Threads that the system refuses: work waits for one, and nobody is to blame."""

from __future__ import annotations

import _thread
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import trio
from outcome import Outcome

from fusestore.errors import UsageError
from fusestore.members.node_calls import NodeCall, NodeCalls
from fusestore.system import loop_guard, threads
from support.processes import in_child

REFUSED = "another thread|can be started again"


@contextmanager
def none_left(error: BaseException) -> Iterator[None]:
    """The system refuses threads, and no worker is idle."""
    idle = dict(threads._idle)
    threads._idle.clear()
    with none_started(error):
        yield
    threads._idle.update(idle)


@contextmanager
def none_started(error: BaseException) -> Iterator[None]:
    """The system refuses threads."""

    def refuse(*_: object) -> int:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", refuse)
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

    async def main() -> None:
        with none_left(refusal), pytest.raises(UsageError, match=r"threads only.*TasksMax"):
            threads.keep()
        threads.let_go()

    trio.run(main)


def test_a_forked_process_has_threads_of_its_own() -> None:
    """It does not wait for idle ones that its parent has."""

    async def works() -> None:
        with trio.fail_after(10):
            assert await threads.call(os.getpid) == os.getpid()

    trio.run(works)
    in_child(partial(trio.run, works))


@pytest.fixture
def kept(refusal: BaseException) -> Iterator[BaseException]:
    """A process that has the kept threads and no other; in an event loop."""
    idle = dict(threads._idle)
    threads._idle.clear()
    yield refusal
    threads._idle.update(idle)


@pytest.mark.expects_log(REFUSED)
@pytest.mark.parametrize("hanging", [1, 2, 3])
def test_an_owner_that_hangs_takes_one_of_the_kept_threads(
    kept: BaseException, hanging: int
) -> None:
    async def main() -> None:
        threads.keep()
        awake, nodes = threading.Event(), [NodeCalls(12) for _ in range(hanging + 1)]

        async def one(calls: NodeCalls) -> None:
            await calls.run(awake.wait, 30, lambda call: False)

        with none_started(kept):
            async with trio.open_nursery() as nursery:
                for _ in range(12):
                    for calls in nodes[:-1]:
                        nursery.start_soon(one, calls)
                await trio.sleep(0.05)
                with trio.fail_after(5):
                    for number in range(20):
                        found = await nodes[-1].run(partial(int, number), 30, None)
                        assert (found and found.unwrap()) == number
                        assert await threads.call(int, number) == number
                awake.set()
        threads.let_go()

    trio.run(main)


@pytest.mark.expects_log(REFUSED)
def test_a_call_of_a_node_is_late_if_it_waits_for_one_that_hangs(kept: BaseException) -> None:
    async def main() -> None:
        threads.keep()
        awake, calls = threading.Event(), NodeCalls(12)
        await trio.sleep(0.1)  # until threads of other tests are idle
        for _ in range(len(threads._idle) - threads.KEPT):
            threads.start(awake.wait, lambda _: None)
        with none_started(kept), trio.fail_after(5):
            assert await calls.run(awake.wait, 0.1, None) is None
            assert calls.left_behind == 1
            assert await calls.run(lambda: 1, 0.1, lambda call: True) is None
        awake.set()
        threads.let_go()

    trio.run(main)


@pytest.mark.expects_log(REFUSED)
def test_what_waits_in_a_thread_of_trio_says_so(refusal: BaseException) -> None:
    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:

            async def refuse(*_: object) -> None:
                raise refusal

            patch.setattr(trio.to_thread, "run_sync", refuse)
            with trio.move_on_after(0.2):
                await threads.run_sync(int)
        assert threads._is_short
        await threads.call(int)

    trio.run(main)


def test_a_thread_that_dies_before_its_first_step_costs_no_job(
    monkeypatch: pytest.MonkeyPatch, kept: BaseException
) -> None:
    started = list[int]()

    def start(function: Callable[[], None], arguments: tuple[()]) -> int:
        started.append(len(started))
        return real(function, arguments) if len(started) > 3 else 0

    async def main() -> None:
        with trio.fail_after(5):
            assert await threads.call(int, 7) == 7

    real = _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", start)
    trio.run(main)
    assert len(started) > 3


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOBUFS, "No buffer space")])
@pytest.mark.parametrize("is_posted", [False, True])
def test_an_outcome_is_delivered_once_whatever_its_thread_meets(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_posted: bool
) -> None:
    async def main() -> None:
        token_type, failures = type(trio.lowlevel.current_trio_token()), [1, 2, 3]
        real = token_type.run_sync_soon

        def soon(token: trio.lowlevel.TrioToken, call: Callable[[], object], *a: object) -> None:
            if is_posted or not failures:
                real(token, call, *a)
            if failures:
                failures.pop()
                raise error

        delivered = list[int]()
        await threads.call(int)
        monkeypatch.setattr(token_type, "run_sync_soon", soon)
        ended = trio.Event()

        def on_end(result: Outcome[int]) -> None:
            delivered.append(result.unwrap())
            ended.set()

        threads.start(lambda: 5, on_end)
        with trio.fail_after(5):
            await ended.wait()
            await trio.sleep(0.5)
            for number in range(10):  # its thread lives
                assert await threads.call(int, number) == number
        assert delivered == [5]

    trio.run(main)


def test_a_job_without_memory_for_its_call_fails() -> None:
    def eats() -> None:
        raise MemoryError

    async def main() -> None:
        with pytest.raises(MemoryError):
            await threads.call(eats)
        assert await threads.call(int, 3) == 3

    trio.run(main)


def test_a_call_that_cannot_begin_leaves_its_place_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(queue: threads._Queue, job: threads.Job) -> None:
        raise MemoryError

    async def main() -> None:
        calls = NodeCalls(2)
        with monkeypatch.context() as patch:
            patch.setattr(threads._Queue, "start", refuse)
            for _ in range(5):
                with pytest.raises(MemoryError):
                    await calls.run(int, 5, None)
        with trio.fail_after(2):
            found = await calls.run(int, 5, None)
            assert (found and found.unwrap()) == 0

    trio.run(main)


@pytest.mark.expects_log(REFUSED)
def test_attempts_to_start_a_thread_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch, kept: BaseException
) -> None:
    tries = list[float]()

    def refuse(*_: object) -> int:
        tries.append(time.monotonic())
        raise kept

    async def main() -> None:
        threads.keep()
        monkeypatch.setattr(_thread, "start_new_thread", refuse)

        async def user() -> None:
            while True:
                await threads.call(time.sleep, 0.001)
                await trio.lowlevel.checkpoint()

        with trio.move_on_after(1.5):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(user)
        threads.let_go()

    trio.run(main)
    assert len(tries) <= 1 + 1.5 / threads.RETRY_SECONDS
    threads._is_short = False


@pytest.mark.parametrize("failure", ["takes no results", "fails in a callback", "none"])
def test_a_process_in_which_trio_fails_ends(failure: str) -> None:
    """A task that may not be cancelled waits for a thread whose result nobody takes."""

    async def main() -> None:
        loop_guard.begin()
        await threads.call(int)
        if failure == "takes no results":
            queue = trio._core._run.GLOBAL_RUN_CONTEXT.runner.entry_queue

            class Short(deque[object]):
                def popleft(self) -> object:
                    raise MemoryError

            queue.queue = Short()
            await threads.call(int)
        elif failure == "fails in a callback":

            def deliver(_: Outcome[None]) -> None:
                raise MemoryError

            threads.start(int, deliver)
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()

    def child() -> None:
        loop_guard.END_SECONDS = 0.5
        began = time.monotonic()
        trio.run(main)
        assert time.monotonic() - began < 5

    if failure == "none":
        in_child(child)
        return
    pid = os.fork()
    if not pid:
        try:
            child()
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == loop_guard.STATUS
