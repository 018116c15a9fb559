"""Reading /dev/fuse without ever blocking the event loop.

If a process is killed, the kernel withdraws its request.  pyfuse3 waits until /dev/fuse is
readable and then reads it, with the interpreter's lock held.  If the only request is
withdrawn in between, that read waits for the next request, and the whole daemon with it.

So the descriptor is made non-blocking: the read then fails with EAGAIN.  pyfuse3 lets this
error end the task that serves requests, so the task is restarted.  pyfuse3 does not free the
buffer of such a task, of which two pages are in use.  The descriptor is therefore polled
directly before the read: of 100 processes that are killed while they do nothing but look up
names, 4 cause this error.

pyfuse3 looks trio up in its own module, where its asyncio mode replaces it, too.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pyfuse3
import trio

logger = logging.getLogger(__name__)


def never_block() -> None:
    """Let pyfuse3 read /dev/fuse only without blocking, from the next `pyfuse3.main` on."""
    vars(pyfuse3)["trio"] = _Trio()


class _Lowlevel:
    """`trio.lowlevel`, as pyfuse3 uses it."""

    def __init__(self) -> None:
        self._fd = -1
        self._poll = select.poll()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return when there is a request; trio.ClosedResourceError."""
        if fd != self._fd:
            os.set_blocking(fd, False)
            self._fd, self._poll = fd, select.poll()
            self._poll.register(fd, select.POLLIN)
        ready = self._poll.poll(0)  # it also reports an end, which the read then finds
        if ready:
            await trio.lowlevel.checkpoint()
            ready = self._poll.poll(0)
        while not ready:
            await trio.lowlevel.wait_readable(fd)
            ready = self._poll.poll(0)


class _Nursery:
    """A nursery whose tasks start again when their read found no request."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def start_soon(self, function: Callable[..., Any], *arguments: Any, name: str) -> None:
        """Start a task that serves requests."""
        self._nursery.start_soon(_serving, function, arguments, name=name)


async def _serving(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    while True:
        try:
            await function(*arguments)
            return
        except BlockingIOError:  # handlers raise nothing but FUSEError
            logger.debug("A request was withdrawn before it was read.")


class _Trio:
    """`trio`, as pyfuse3 uses it."""

    def __init__(self) -> None:
        self.lowlevel = _Lowlevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[_Nursery]:
        """Open a nursery for the tasks that serve requests."""
        async with trio.open_nursery() as nursery:
            yield _Nursery(nursery)
