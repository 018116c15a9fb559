"""The calls of one node that are under way, each in a thread, and those that were given up.

A call that does not return cannot be ended.  It is given up: its thread stays behind until
the medium answers.  Threads come from no pool of fixed size, so a node that hangs holds up
nobody else, and a node that has threads left behind is left alone.  The time for which a call
waits for a thread that the system refuses (`system/threads.py`) is not the node's, unless it is
a thread of the node that hangs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import trio
from outcome import Outcome

from ..system import threads


class NodeCall:
    """One call."""

    __slots__ = (
        "begun",
        "is_left",
        "is_patient",
        "job",
        "outcome",
        "returned",
        "scope",
        "spared_at",
    )

    def __init__(self, begun: float, scope: trio.CancelScope | None, *, is_patient: bool) -> None:
        self.begun = begun
        """By trio's clock."""
        self.scope = scope
        """Of the task that waits; cancelled when the node fails."""
        self.is_patient = is_patient
        """Whether the node fails if it does not answer in time."""
        self.returned = trio.Event()
        self.outcome: Outcome[Any] | None = None
        self.job: threads.Job | None = None
        self.is_left = False
        self.spared_at: float | None = None
        """When the store last decided to wait on although it was late."""

    def begins_now(self) -> bool:
        """Begin again, if until now it waited for a thread because there are too few."""
        if self.job is None:
            waited_until = threads.short_until()  # so may those before it
        elif self.job.waits:
            waited_until = trio.current_time()
        else:
            waited_until = self.job.begun or self.begun
        begun, self.begun = self.begun, max(self.begun, waited_until)
        return self.begun > begun


class NodeCalls:
    """The calls of one node; all methods run on the event loop."""

    def __init__(self, threads_max: int) -> None:
        self._threads = trio.CapacityLimiter(threads_max)
        self._under_way: set[NodeCall] = set()
        self.left_behind = 0
        """Calls that were given up and have not returned."""

    def waiting_since(self) -> float | None:
        """Return when the oldest call began after which the node may fail, or None."""
        return min((call.begun for call in self._under_way if call.is_patient), default=None)

    @property
    def are_spared(self) -> bool:
        """Whether the store waits for a call that is late."""
        return any(call.spared_at is not None for call in self._under_way)

    def begin(
        self, scope: trio.CancelScope | None, *, is_patient: bool, begun: float | None = None
    ) -> NodeCall:
        """Note that a call is under way."""
        begun = trio.current_time() if begun is None else begun
        call = NodeCall(begun, scope, is_patient=is_patient)
        self._under_way.add(call)
        return call

    def end(self, call: NodeCall) -> None:
        """Note that nobody waits for a call any more."""
        self._under_way.discard(call)

    def leave(self, call: NodeCall) -> None:
        """Give up a call whose thread has not returned."""
        self._under_way.discard(call)
        call.is_left = True
        self.left_behind += 1

    def returned(self, call: NodeCall) -> None:
        """Note that the thread of a call has returned."""
        self._under_way.discard(call)
        if call.is_left:
            call.is_left = False
            self.left_behind -= 1

    def end_all(self) -> None:
        """Wake up those who wait for calls: the node has failed."""
        for call in list(self._under_way):
            if call.scope is not None:
                call.scope.cancel()

    async def run(
        self,
        function: Callable[[], Any],
        seconds: float,
        may_give_up: Callable[[NodeCall], bool] | None,
    ) -> Outcome[Any] | None:
        """Call a function in a thread, and return the outcome, or None if it was given up.

        `may_give_up` is asked after `seconds`, and then again and again; None gives up at once.
        """
        scope = trio.CancelScope(shield=True)
        call = self.begin(scope, is_patient=may_give_up is not None)
        pause = seconds
        try:
            with scope:
                while True:
                    with trio.move_on_after(pause):
                        if call.job is None:
                            await self._start(call, function)
                        await call.returned.wait()
                        return call.outcome
                    if not self.left_behind and call.begins_now():
                        pause = call.begun + seconds - trio.current_time()
                        continue
                    if may_give_up is None or may_give_up(call):
                        break
                    pause = seconds / 4
        finally:
            self.end(call)
            if call.job is not None and call.job.withdraw():
                self._threads.release_on_behalf_of(call)
            elif call.job is not None and not call.returned.is_set():
                self.leave(call)
        return None

    async def _start(self, call: NodeCall, function: Callable[[], Any]) -> None:
        try:
            self._threads.acquire_on_behalf_of_nowait(call)
        except trio.WouldBlock:
            await self._threads.acquire_on_behalf_of(call)
        try:
            call.job = threads.start(function, partial(self._deliver, call), owner=self)
        except BaseException:  # MemoryError, for one
            self._threads.release_on_behalf_of(call)
            raise

    def _deliver(self, call: NodeCall, outcome: Outcome[Any]) -> None:
        self._threads.release_on_behalf_of(call)
        self.returned(call)
        call.outcome = outcome
        call.returned.set()
