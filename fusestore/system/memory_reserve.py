"""Memory kept aside, so that what was accepted can be finished when the system refuses more.

A process whose memory is limited (`ulimit -v`, `ulimit -d`) gets a MemoryError anywhere, also
where nobody can handle it.  So nothing new is accepted once little is left: the reserve is given
back then, and serves what is under way.  It takes address space only, no memory.
"""

from __future__ import annotations

import logging
import mmap
import resource
from contextlib import suppress

from ..errors import NoMemoryLeftError

logger = logging.getLogger(__name__)

RESERVE_BYTES = 64 << 20
AHEAD_BYTES = 8 << 20
"""What must be left besides the reserve: the requests that are received before the next look."""
LOOK_BYTES = 256 << 10
"""How much is accepted between two looks."""
_LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)


def _is_limited() -> bool:
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in _LIMITS)


def _mapped(length: int) -> mmap.mmap | None:
    with suppress(OSError):
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return None


class MemoryReserve:
    """The reserve of an open store."""

    def __init__(self) -> None:
        self._kept = _mapped(RESERVE_BYTES)
        self._is_used = self._kept is not None  # else there is too little for one
        self._unlooked = 0

    def take(self, length: int) -> None:
        """Accept a request of `length` bytes; NoMemoryLeftError if memory is short."""
        self._unlooked -= length
        if self._unlooked > 0 or not self._is_used:
            return
        if self._kept is None:
            self._regain()
        elif not _is_limited():
            pass  # to map takes several microseconds
        elif (ahead := _mapped(AHEAD_BYTES)) is not None:
            ahead.close()
        else:
            self._kept.close()
            self._kept = None
            logger.error(
                "The system refuses this process more memory: writes fail with ENOMEM until it "
                "gets some; raise the limit ('ulimit -v', 'ulimit -d', or LimitAS= and LimitDATA= "
                "of a service)."
            )
        if self._kept is None:
            raise NoMemoryLeftError("The system refuses this process more memory.")
        self._unlooked = LOOK_BYTES

    def _regain(self) -> None:
        whole = _mapped(RESERVE_BYTES + AHEAD_BYTES)
        if whole is not None:
            whole.close()
            self._kept = _mapped(RESERVE_BYTES)
        if self._kept is not None:
            logger.info("There is memory again.")
