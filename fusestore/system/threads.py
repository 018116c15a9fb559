"""The one door to threads: what finds none waits for one.

The system may refuse a process another thread: TasksMax= of a service, `ulimit -u`, `ulimit -v`.
This is no fault of a node, and no reason to end.  A job then waits until a thread of this process
is free, or a new one may be started.  An open store keeps a few threads (`keep`), so that it goes
on even if it never gets another one.  Then each owner of jobs, as a node, has one of them at a
time: a node that hangs costs one, however many calls it is asked for.

`start` and `call` use the threads that are kept.  `run_sync` is for what calls the event loop from
its thread (`trio.from_thread`): it waits, too, but no thread is kept for it.

Memory may be refused at any moment, too.  A job that was accepted is run once, and its outcome is
delivered once.  A new thread may die before its first step, so nobody waits for it, and no job is
given to it before it has arrived.
"""

from __future__ import annotations

import _thread
import errno
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import outcome
import trio
from outcome import Outcome

from ..errors import UsageError
from . import linux, loop_guard

T = TypeVar("T")

logger = logging.getLogger(__name__)

KEPT = 6
"""The threads that an open store keeps: for nodes that hang, sealing, the metadata, and others."""
IDLE_SECONDS = 10.0
"""How long any other thread waits for another job before it ends."""
RETRY_SECONDS = 0.1
"""The pause between two attempts to start a thread."""
_ARRIVE_SECONDS = 5.0
_LOOK_SECONDS = 30.0
_SHORT = (MemoryError, OSError)
"""What a thread may meet at any time; the socket of the event loop wants memory, too."""
_REFUSED = (RuntimeError, MemoryError)
"""What Python raises if the system refuses a thread."""
_HINT = (
    "raise the limit of tasks ('ulimit -u', or TasksMax= of a service) or of memory ('ulimit -v')"
)


class Job:
    """A call in a thread.  Its attributes change on the event loop, but for its result."""

    __slots__ = (
        *("_error", "_is_delivered", "_is_done", "_queue", "_value"),
        *("begun", "deliver", "function", "got_thread", "has_run", "is_lent", "owner"),
    )

    def __init__(
        self,
        function: Callable[[], Any],
        deliver: Callable[[Outcome[Any]], object],
        queue: _Queue | None,
        owner: object = None,
    ) -> None:
        self.function = function
        self.deliver = deliver
        self.got_thread: trio.Event | None = None
        """Only if it has to wait for one, or had to."""
        self.begun: float | None = None
        """When it got a thread, by trio's clock, if it had to wait for one."""
        self.has_run = False
        """Set before the function is called."""
        self._queue = queue
        self.owner = owner
        self.is_lent = False
        """It has the one thread of its owner."""
        self._value: Any = None
        self._error: BaseException | None = None
        self._is_done = self._is_delivered = False

    @property
    def waits(self) -> bool:
        """Whether it has no thread yet."""
        return self.got_thread is not None and self.begun is None

    def withdraw(self) -> bool:
        """Take it back; False if it has a thread already."""
        if self.waits and self._queue is not None:
            self._queue.jobs.remove(self)
        return self.waits

    def disown(self) -> None:
        """Let its owner have another thread: this one hangs, or has ended."""
        if self.is_lent and self._queue is not None:
            self.is_lent = False
            self._queue.lent.discard(self.owner)
            self._queue.hand_over()

    def run(self) -> None:
        """In the thread: call the function, and keep what it returns or raises."""
        self.has_run = True
        try:
            self._value = self.function()
        except BaseException as error:
            self._error = error
            trace = error.__traceback__
            error.__traceback__ = trace and trace.tb_next  # this frame refers to the error
        else:
            self._is_done = True

    def end(self) -> None:
        """In the thread: have the outcome delivered on the event loop; may be called again."""
        if self._queue is None:
            self.deliver(outcome.Value(None))
            return
        try:
            self._queue.token.run_sync_soon(self._ended)
        except trio.RunFinishedError:
            pass
        except OSError as error:
            if error.errno != errno.EBADF:  # that is how a loop ends in which trio failed
                raise

    def _ended(self) -> None:
        if self._is_delivered or self._queue is None:
            return
        self._is_delivered = True
        error, self._error = self._error, None
        if self._is_done:
            result: Outcome[Any] = outcome.Value(self._value)
        else:
            result = outcome.Error(error or MemoryError())
        del error
        if self._queue.jobs:
            self._queue.hand_over()
        self.disown()
        self.deliver(result)


class _Worker:
    """A thread that runs one job after another."""

    __slots__ = ("_has_job", "_is_listed", "_running", "job")

    def __init__(self, first: Job) -> None:
        """`first` must do nothing: the thread may die before it runs it."""
        self.job: Job | None = first
        self._running: Job | None = None
        self._is_listed = False
        """It is in `_idle`, or has been since the function of `_running` returned."""
        self._has_job = _thread.allocate_lock()
        """Released when it is given a job."""
        # `Thread.start` would wait for the thread, for ever if that dies first.
        _thread.start_new_thread(self._work, ())

    def give(self, job: Job) -> None:
        """Have it run a job; it must not be in `_idle`."""
        self.job = job
        self._has_job.release()

    def _work(self) -> None:
        while True:
            try:
                if self._step():
                    return
            except _SHORT:
                time.sleep(RETRY_SECONDS)

    def _step(self) -> bool:
        """Do what is next; return whether it was the end.  Repeated if there is no memory."""
        job = self._running
        if job is None:
            if self._has_job.acquire(timeout=IDLE_SECONDS):
                self._running, self.job = self.job, None
                return False
            with _guard:  # it may be given a job at this moment, and is not in `_idle` then
                return len(_idle) > _kept and _idle.pop(self, self) is None
        if not job.has_run:
            job.run()
        if not self._is_listed:
            _idle[self] = None  # before the end of the job, which is often followed by another
            self._is_listed = True
        job.end()
        self._running = None
        self._is_listed = False
        return False


_idle: dict[_Worker, None] = {}
"""The workers that wait for a job, the latest at the end."""
_guard = threading.Lock()
_kept = 0
_is_short = False
"""Whether the last attempt to start a thread failed."""


def _after_fork() -> None:
    """Forget the threads of the parent process: a child has none of them."""
    global _guard, _kept, _is_short
    _guard, _kept, _is_short = threading.Lock(), 0, False
    _idle.clear()


os.register_at_fork(after_in_child=_after_fork)


def _begin_shortage(error: Exception) -> None:
    global _is_short
    if _is_short:
        return
    _is_short = True
    with suppress(MemoryError):
        logger.error(
            "The system refuses this process another thread (%s): work waits for the %d that it "
            "has; %s.",
            str(error) or "no memory",
            _count(),
            _HINT,
        )


def _end_shortage() -> None:
    global _is_short
    if _is_short:
        _is_short = False
        with suppress(MemoryError):
            logger.info("Threads can be started again.")


def _count() -> int:
    return _thread._count() + 1  # those of `threading`, too


class _Queue:
    """The jobs of one event loop that wait for a thread."""

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.jobs: deque[Job] = deque()
        self.lent: set[object] = set()
        """The owners that have a thread although few are left."""
        self.short_until = -math.inf
        """When a job last waited, by trio's clock."""
        self._wanted = trio.Event()
        """Set when there may be something to watch."""
        trio.lowlevel.spawn_system_task(self._watch)

    def start(self, job: Job) -> None:
        """Give a job to a thread, or let it wait for one; if it raises, the job never runs."""
        if len(_idle) <= _kept:
            self._grow()
        if not self._give(job):
            job.got_thread = trio.Event()
            self.jobs.append(job)

    def hand_over(self) -> None:
        """Give the jobs that wait to idle workers, in order."""
        for job in list(self.jobs):
            if not _idle:
                return
            self._give(job)

    def _give(self, job: Job) -> bool:
        """Give a job to an idle worker, if there is one for it."""
        lends = _is_short and job.owner is not None and len(_idle) <= _kept
        if not _idle or (lends and job.owner in self.lent):
            return False
        now = trio.current_time()
        if lends:
            self.lent.add(job.owner)
        try:
            worker, _ = _idle.popitem()
        except (KeyError, MemoryError):  # it has just ended
            if lends:
                self.lent.discard(job.owner)
            return False
        job.is_lent = lends
        if job.got_thread is not None:
            self.jobs.remove(job)
            job.begun = self.short_until = now
        worker.give(job)
        if job.got_thread is not None:
            job.got_thread.set()
        return True

    def _grow(self) -> None:
        """Start a thread, if that is permitted; this is tried again while it is not."""
        if not _is_short:
            self._start_worker()
        self._wanted.set()

    def _start_worker(self) -> None:
        try:
            _Worker(Job(_nothing, self._arrived, self))
        except _REFUSED as error:
            _begin_shortage(error)

    def _arrived(self, _: Outcome[None]) -> None:
        _end_shortage()
        self.hand_over()

    async def _watch(self) -> None:
        """Start threads for the jobs that wait, as soon as that is permitted."""
        while True:
            with trio.move_on_after(_LOOK_SECONDS):
                await self._wanted.wait()
            self._wanted = trio.Event()
            while self.jobs or _is_short:
                await trio.sleep(RETRY_SECONDS)
                if self.jobs or _is_short:
                    self._start_worker()


_queue: trio.lowlevel.RunVar[_Queue] = trio.lowlevel.RunVar("threads")


def _nothing() -> None:
    """The first job of a thread."""


def _own_queue() -> _Queue:
    try:
        return _queue.get()
    except LookupError:
        queue = _Queue()
        _queue.set(queue)
        return queue


def start(
    function: Callable[[], Any],
    deliver: Callable[[Outcome[Any]], object],
    owner: object = None,
) -> Job:
    """Call a function in a thread; its outcome is delivered on the event loop, if that runs.

    While threads are short, each `owner` has one at a time.  If this raises, it never runs.
    """
    queue = _own_queue()
    job = Job(function, deliver, queue, owner)
    queue.start(job)
    return job


def short_until() -> float:
    """Return until when a job of this event loop waited for a thread: now, if one does."""
    try:
        queue = _queue.get()
    except LookupError:
        return -math.inf
    return trio.current_time() if queue.jobs else queue.short_until


async def call(function: Callable[..., T], *arguments: Any, abandon_on_cancel: bool = False) -> T:
    """Call a function in a thread, and return what it returns.

    This is not cancelled; with `abandon_on_cancel` it is, and the thread is left to itself.
    """
    ended = trio.Event()
    outcomes: list[Outcome[T]] = []

    def on_end(result: Outcome[T]) -> None:
        outcomes.append(result)
        ended.set()

    job = start(partial(function, *arguments), on_end)
    try:
        with trio.CancelScope(shield=not abandon_on_cancel):
            await ended.wait()
    finally:
        if not ended.is_set():
            job.withdraw()
    return outcomes.pop().unwrap()


async def run_sync(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a thread of trio's, once that may be started; see its `to_thread`."""
    begun = False

    def begin() -> T:
        nonlocal begun
        begun = True
        return function(*arguments)

    while True:
        try:
            return await trio.to_thread.run_sync(begin)
        except _REFUSED as error:
            if begun:
                raise
            _begin_shortage(error)
        await trio.sleep(RETRY_SECONDS)


def keep() -> None:
    """Keep KEPT threads until `let_go`; UsageError if this process may not start them."""
    global _kept
    linux.load_unwinder()
    with _guard:
        _kept += KEPT
    arrived = list[object]()
    try:
        loop_guard.begin()
        for _ in range(KEPT):
            _Worker(Job(_nothing, arrived.append, None))
        until = time.monotonic() + _ARRIVE_SECONDS
        while len(arrived) < KEPT:
            if time.monotonic() > until:
                raise RuntimeError("a thread does not begin")
            time.sleep(0.0002)
    except _REFUSED as error:
        raise UsageError(
            f"This process may run {_count()} threads only, and a store needs more: {_HINT}."
        ) from error


def let_go() -> None:
    """Let the threads end that `keep` kept, when they have nothing to do."""
    global _kept
    with _guard:
        _kept -= KEPT
