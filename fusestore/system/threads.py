"""The one door to threads: what finds none waits for one.

The system may refuse a process another thread: TasksMax= of a service, `ulimit -u`, `ulimit -v`.
This is no fault of a node, and no reason to end.  A job then waits until a thread of this process
is free, or a new one may be started.  An open store keeps a few threads (`keep`), so that it goes
on even if it never gets another one.

`start` and `call` use the threads that are kept.  `run_sync` is for what reports back to the
event loop from its thread: it waits, too, but no thread is kept for it.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import outcome
import trio
from outcome import Outcome

from ..errors import UsageError

T = TypeVar("T")

logger = logging.getLogger(__name__)

KEPT = 4
"""The threads that an open store keeps."""
IDLE_SECONDS = 10.0
"""How long any other thread waits for another job before it ends."""
RETRY_SECONDS = 0.1
"""The pause between two attempts to start a thread."""
_REFUSED = (RuntimeError, MemoryError)
"""What Python raises if the system refuses a thread."""
_HINT = (
    "raise the limit of tasks ('ulimit -u', or TasksMax= of a service) or of memory ('ulimit -v')"
)


class Job:
    """A call in a thread.  Its attributes change on the event loop only."""

    __slots__ = ("_queue", "begun", "deliver", "function", "got_thread")

    def __init__(
        self, function: Callable[[], Any], deliver: Callable[[Outcome[Any]], object], queue: _Queue
    ) -> None:
        self.function = function
        self.deliver = deliver
        self._queue = queue
        self.got_thread: trio.Event | None = None
        """Only if it has to wait for one, or had to."""
        self.begun: float | None = None
        """When it got a thread, by trio's clock, if it had to wait for one."""

    @property
    def waits(self) -> bool:
        """Whether it has no thread yet."""
        return self.got_thread is not None and self.begun is None

    def withdraw(self) -> bool:
        """Take it back; False if it has a thread already."""
        if self.waits:
            self._queue.jobs.remove(self)
        return self.waits

    def end(self, result: Outcome[Any]) -> None:
        """In the thread: have the outcome delivered on the event loop, if that still runs."""
        while True:
            try:
                self._queue.token.run_sync_soon(self._ended, result)
            except trio.RunFinishedError:
                pass
            except MemoryError:
                time.sleep(RETRY_SECONDS)
                continue
            return

    def _ended(self, result: Outcome[Any]) -> None:
        if self._queue.jobs:
            self._queue.hand_over()
        self.deliver(result)


class _Worker:
    """A thread that runs one job after another."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._has_job = threading.Lock()
        """Released when it is given a job."""
        self._has_job.acquire()
        threading.Thread(target=self._work, name="worker", daemon=True).start()
        _end_shortage()

    def give(self, job: Job) -> None:
        """Have it run a job; it must not be in `_idle`."""
        self.job = job
        self._has_job.release()

    def _work(self) -> None:
        while True:
            if self._has_job.acquire(timeout=IDLE_SECONDS):
                self._run()
                continue
            with _guard:  # it may be given a job at this moment, and is not in `_idle` then
                if len(_idle) > _kept and _idle.pop(self, self) is None:
                    return

    def _run(self) -> None:
        job, self.job = self.job, None
        assert job is not None
        result = outcome.capture(job.function)
        _idle[self] = None  # before the end of the job, which is often followed by another
        job.end(result)


_idle: dict[_Worker, None] = {}
"""The workers that wait for a job, the latest at the end."""
_guard = threading.Lock()
_kept = 0
_is_short = False
"""Whether the last attempt to start a thread failed."""


def _after_fork() -> None:
    """Forget the threads of the parent process: a child has none of them."""
    global _guard, _kept
    _guard, _kept = threading.Lock(), 0
    _idle.clear()


os.register_at_fork(after_in_child=_after_fork)


def _begin_shortage(error: Exception) -> None:
    global _is_short
    if not _is_short:
        _is_short = True
        logger.error(
            "The system refuses this process another thread (%s): work waits for the %d that it "
            "has; %s.",
            str(error) or "no memory",
            threading.active_count(),
            _HINT,
        )


def _end_shortage() -> None:
    global _is_short
    if _is_short:
        _is_short = False
        logger.info("Threads can be started again.")


class _Queue:
    """The jobs of one event loop that wait for a thread."""

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.jobs: deque[Job] = deque()
        self.short_until = -math.inf
        """When a job last waited, by trio's clock."""

    def start(self, job: Job) -> None:
        """Give a job to a thread, or let it wait for one."""
        if not self.jobs:
            try:
                _worker().give(job)
            except _REFUSED as error:
                _begin_shortage(error)
            else:
                return
            trio.lowlevel.spawn_system_task(self._retry)
        job.got_thread = trio.Event()
        self.jobs.append(job)

    def hand_over(self) -> None:
        """Give the jobs that wait to idle workers, in order."""
        while self.jobs:
            try:
                worker, _ = _idle.popitem()
            except KeyError:
                return
            self._give(worker)

    async def _retry(self) -> None:
        """Start threads for the jobs that wait, as soon as that is permitted."""
        while self.jobs:
            await trio.sleep(RETRY_SECONDS)
            try:
                while self.jobs:
                    self._give(_worker())
            except _REFUSED:
                continue

    def _give(self, worker: _Worker) -> None:
        job = self.jobs.popleft()
        assert job.got_thread is not None
        job.begun = self.short_until = trio.current_time()
        job.got_thread.set()
        worker.give(job)


_queue: trio.lowlevel.RunVar[_Queue] = trio.lowlevel.RunVar("threads")


def _worker() -> _Worker:
    """Take an idle worker, or start one; RuntimeError or MemoryError if that is refused."""
    try:
        return _idle.popitem()[0]
    except KeyError:
        return _Worker()


def start(function: Callable[[], Any], deliver: Callable[[Outcome[Any]], object]) -> Job:
    """Call a function in a thread; its outcome is delivered on the event loop, if that runs."""
    try:
        queue = _queue.get()
    except LookupError:
        queue = _Queue()
        _queue.set(queue)
    job = Job(function, deliver, queue)
    queue.start(job)
    return job


def short_until() -> float:
    """Return until when a job of this event loop waited for a thread: now, if one does."""
    try:
        queue = _queue.get()
    except LookupError:
        return -math.inf
    return trio.current_time() if queue.jobs else queue.short_until


async def call(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a thread, and return what it returns; not cancelled."""
    ended = trio.Event()
    outcomes: list[Outcome[T]] = []

    def on_end(result: Outcome[T]) -> None:
        outcomes.append(result)
        ended.set()

    start(partial(function, *arguments), on_end)
    with trio.CancelScope(shield=True):
        await ended.wait()
    return outcomes.pop().unwrap()


async def run_sync(
    function: Callable[..., T],
    *arguments: Any,
    limiter: trio.CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """Call a function in a thread of trio's, once that may be started; see its `to_thread`."""
    begun = False

    def begin() -> T:
        nonlocal begun
        begun = True
        return function(*arguments)

    while True:
        try:
            return await trio.to_thread.run_sync(
                begin, limiter=limiter, abandon_on_cancel=abandon_on_cancel
            )
        except _REFUSED:
            if begun:
                raise
        await trio.sleep(RETRY_SECONDS)


def keep() -> None:
    """Keep KEPT threads until `let_go`; UsageError if this process may not start them."""
    global _kept
    with _guard:
        _kept += KEPT
    try:
        for _ in range(KEPT):
            _idle[_Worker()] = None
    except _REFUSED as error:
        raise UsageError(
            f"This process may run {threading.active_count()} threads only, and a store needs "
            f"more: {_HINT}."
        ) from error


def let_go() -> None:
    """Let the threads end that `keep` kept, when they have nothing to do."""
    global _kept
    with _guard:
        _kept -= KEPT
