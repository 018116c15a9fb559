"""The commands that use an open store: they end before it is closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from ..errors import UnmountedError
from .messages.files import RecodeRequest
from .messages.mount import CompactRequest, StopRequest
from .messages.nodes import (
    NodeAddRequest,
    NodeDrainRequest,
    NodeRemoveRequest,
    RebalanceRequest,
)
from .messages.request import Request
from .messages.safety import DrillRequest, FsckRequest, RepairRequest, RiskRequest, ScrubRequest

_AGAIN = "Repeat the command; the store need not be mounted."
_GOES_ON = "continues when the store is mounted again."
_THEN: dict[type[Request[Any]], tuple[str, str]] = {
    FsckRequest: ("The check", _AGAIN),
    RepairRequest: ("The repair", f"{_AGAIN} Intact shards are not rebuilt again."),
    RiskRequest: ("The count", _AGAIN),
    DrillRequest: ("The drill", _AGAIN),
    ScrubRequest: ("The scrub", f"It {_GOES_ON}"),
    RebalanceRequest: ("The rebalance", f"It {_GOES_ON}"),
    NodeAddRequest: ("Adding the node", _AGAIN),
    NodeDrainRequest: ("The command", f"A drain that had begun {_GOES_ON}"),
    NodeRemoveRequest: ("Removing the node", _AGAIN),
    RecodeRequest: ("The command", f"A recoding that had begun {_GOES_ON}"),
    CompactRequest: ("The compaction", "Repeat the command when the store is mounted again."),
    StopRequest: ("The wait", "Everything is committed when the daemon has exited."),
}
"""By request: what an unmount interrupts, and a sentence about what becomes of its work."""
_OTHERS = "The command", "Repeat it."


class RunningCommands:
    """The commands of the control socket that run, from the mount of a store to its end."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self._ending = False
        self._none_left = trio.Event()

    @contextmanager
    def command(self, request: type[Request[Any]]) -> Iterator[None]:
        """Run the body, a command; UnmountedError if the store is closed before it has ended."""
        if self._ending:
            raise UnmountedError(
                "The store is being unmounted: repeat the command when this has ended."
            )
        scope = trio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                yield
        finally:
            self._scopes.discard(scope)
            if not self._scopes:
                self._none_left.set()
        if scope.cancelled_caught:
            what, then = _THEN.get(request, _OTHERS)
            raise UnmountedError(f"{what} was interrupted: the store was unmounted. {then}")

    async def end(self, seconds: float) -> None:
        """End all commands, and refuse others; return when none runs, or after so many seconds.

        A command that waits for a node ends when the node has answered.
        """
        self._ending = True
        if not self._scopes:
            return
        self._none_left = trio.Event()
        for scope in self._scopes:
            scope.cancel()
        with trio.CancelScope(shield=True), trio.move_on_after(seconds):
            await self._none_left.wait()
