"""Work in child processes, so that neither a hanging file system nor a signal blocks the parent.

Children are forked; this is safe because the parent has no threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ..errors import FusestoreError
from .interrupts import deferred

Result = TypeVar("Result")

POLL_SECONDS = 0.05
END_SECONDS = 1.0
"""How long a child may take to exit after its answer."""
_FORK = multiprocessing.get_context("fork")


def isolated(
    work: Callable[[], Result], watch: Callable[[], None], seconds_max: float | None = None
) -> Result:
    """Run `work` in a child, and return its result or raise its error; poll `watch` meanwhile.

    FusestoreError if the child exits without an answer, or takes longer than `seconds_max`.
    """
    with _child(work, leads=True) as receiver:
        deadline = time.monotonic() + (seconds_max or float("inf"))
        while not receiver.poll(POLL_SECONDS):
            watch()
            if time.monotonic() > deadline:
                raise FusestoreError(f"it did not finish within {seconds_max:.0f} seconds.")
        watch()
        return _received(receiver)[1]  # type: ignore[no-any-return]


def together(works: Sequence[Callable[[], Result]]) -> tuple[float, list[Result]]:
    """Run all at the same time, each in a child; return the total seconds and the results."""
    gate, opener = os.pipe()
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open(opener, "wb", buffering=0))
        stack.enter_context(open(gate, "rb", buffering=0))

        def at_the_gate(work: Callable[[], Result]) -> Callable[[], Result]:
            def waiting() -> Result:
                os.close(opener)
                os.read(gate, 1)
                return work()

            return waiting

        receivers = [stack.enter_context(_child(at_the_gate(work))) for work in works]
        start = time.perf_counter()
        opened.close()
        ended = [_received(receiver) for receiver in receivers]
    return max(end for end, _ in ended) - start, [result for _, result in ended]


def _received(receiver: Connection) -> tuple[float, Any]:
    """Return the time at which a child finished, and its result."""
    try:
        end, fine, value = receiver.recv()
    except EOFError:
        raise FusestoreError("the measuring process was killed.") from None
    if not fine:
        raise value
    return end, value


@contextlib.contextmanager
def _child(work: Callable[[], Any], leads: bool = False) -> Iterator[Connection]:
    """Start a child, and yield the connection for its answer; kill the child at the end.

    If it leads a process group, all processes that it started are killed, too.
    """
    receiver, sender = _FORK.Pipe(duplex=False)

    def body() -> None:
        if leads:
            os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        receiver.close()
        try:
            value: tuple[bool, Any] = (True, work())
        except Exception as error:
            value = (False, error)
        sender.send((time.perf_counter(), *value))

    process = _FORK.Process(target=body)
    try:
        with deferred():
            process.start()
            sender.close()
            if leads:
                with contextlib.suppress(OSError):  # either process may do this first
                    os.setpgid(process.pid or 0, process.pid or 0)
        yield receiver
        process.join(END_SECONDS)
    finally:
        with deferred():
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if leads else os.kill)(process.pid, signal.SIGKILL)
                process.join()
            receiver.close()
