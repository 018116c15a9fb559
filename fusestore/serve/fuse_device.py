"""Reading /dev/fuse: soon after a request arrives, and without ever blocking the event loop.

pyfuse3 looks trio up in its own module, where its asyncio mode replaces it, too.  What it gets
from there is replaced for two reasons.

**It must not block.**  If a process is killed, the kernel withdraws its request.  pyfuse3 waits
until /dev/fuse is readable and then reads it, with the interpreter's lock held.  If the only
request is withdrawn in between, that read waits for the next request, and the whole daemon with
it.  So the descriptor is made non-blocking: the read then fails with EAGAIN.  pyfuse3 lets this
error end the task that serves requests, so the task is restarted.  pyfuse3 does not free the
buffer of such a task, of which two pages are in use.  The descriptor is therefore polled
directly before the read: of 100 processes that are killed while they do nothing but look up
names, 4 cause this error.

**It should not sleep between two requests.**  pyfuse3 hands a lock to another task and waits in
epoll before each request, which takes as long as many requests do.  Here the task that has
answered looks first whether there is another request.  If the last ones came soon, it looks for
another SPIN_SECONDS.  It does so only if no request is being served: what that waits for, a disk
or a thread, would be noticed late.  `docs/decisions/kernel.md` has the figures.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from time import perf_counter
from typing import Any

import pyfuse3
import trio

logger = logging.getLogger(__name__)

SPIN_SECONDS = 40e-6
"""How long a task looks for a request before it sleeps."""
SOON_SECONDS = 80e-6
"""A request that came within this time after the last answer would have been found by looking:
to fall asleep and to wake up takes the other half."""
SOON_MIN = 2
"""How many requests in a row must have come soon: not only every other one, as in large writes,
before each of which the kernel asks for an attribute."""
TURN_SECONDS = 500e-6
"""How long requests are served in a row before other tasks run."""


def attend(*, spins: bool) -> None:
    """Let pyfuse3 read /dev/fuse as described above, from the next `pyfuse3.main` on."""
    vars(pyfuse3)["trio"] = _Trio(SPIN_SECONDS if spins else 0.0)


class _Requests:
    """`trio.lowlevel`, as pyfuse3 uses it: waits for requests."""

    def __init__(self, spin_seconds: float) -> None:
        self.tasks = 0
        """The tasks that serve a request or wait for one."""
        self._spin_seconds = spin_seconds
        self._waiting = 0
        self._has_sleeper = False
        """Whether a task waits in epoll: trio permits one."""
        self._others = trio.lowlevel.ParkingLot()
        self._is_closed = False
        self._fd = -1
        self._poll = select.poll().poll
        self._turn_ends = 0.0
        self._idle_since = 0.0
        self._soon = 0
        """How many requests in a row came soon."""

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return when there is a request; trio.ClosedResourceError."""
        if fd != self._fd:
            self._watch(fd)
        self._waiting += 1
        try:
            if self._is_serving or perf_counter() >= self._turn_ends:
                await trio.lowlevel.checkpoint()
                self._turn_ends = perf_counter() + TURN_SECONDS
            if not self._is_readable():
                await self._sleep(fd)
        finally:
            self._waiting -= 1

    def _watch(self, fd: int) -> None:
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        self._fd, self._poll = fd, poll.poll

    @property
    def _is_serving(self) -> bool:
        return self.tasks > self._waiting

    def _is_readable(self) -> bool:
        """Look for a request."""
        if self._poll(0):  # it also reports an end, which the read then finds
            return True
        if self._is_serving:
            return False
        self._idle_since = perf_counter()
        if self._soon >= SOON_MIN:
            until = self._idle_since + self._spin_seconds
            while perf_counter() < until:
                if self._poll(0):
                    return True
        return False

    async def _sleep(self, fd: int) -> None:
        while self._has_sleeper:
            await self._others.park()
        if self._is_closed:
            raise trio.ClosedResourceError
        self._has_sleeper = True
        try:
            await trio.lowlevel.wait_readable(fd)
            while not self._poll(0):
                await trio.lowlevel.wait_readable(fd)
            now = perf_counter()
            self._soon = self._soon + 1 if now - self._idle_since < SOON_SECONDS else 0
            self._turn_ends = now + TURN_SECONDS
        except trio.ClosedResourceError:
            self._is_closed = True
            raise
        finally:
            self._has_sleeper = False
            self._others.unpark_all()


class _Nursery:
    """A nursery whose tasks start again when their read found no request."""

    def __init__(self, nursery: trio.Nursery, requests: _Requests) -> None:
        self._nursery, self._requests = nursery, requests

    def start_soon(self, function: Callable[..., Any], *arguments: Any, name: str) -> None:
        """Start a task that serves requests."""
        self._requests.tasks += 1
        self._nursery.start_soon(self._serve, function, arguments, name=name)

    async def _serve(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            while True:
                try:
                    await function(*arguments)
                    return
                except BlockingIOError:  # handlers raise nothing but FUSEError
                    logger.debug("A request was withdrawn before it was read.")
        finally:
            self._requests.tasks -= 1


class _Trio:
    """`trio`, as pyfuse3 uses it."""

    def __init__(self, spin_seconds: float) -> None:
        self.lowlevel = _Requests(spin_seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)

    @staticmethod
    def Lock() -> nullcontext[None]:  # noqa: N802
        """Return a lock that everybody gets: several tasks may wait for requests."""
        return nullcontext()

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[_Nursery]:
        """Open a nursery for the tasks that serve requests."""
        async with trio.open_nursery() as nursery:
            yield _Nursery(nursery, self.lowlevel)
