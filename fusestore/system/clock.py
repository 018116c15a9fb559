"""The clock of time stamps of files: the coarse clock of the kernel.

The kernel stamps by this clock, too (utimensat, -o writeback), up to 10 ms behind the
fine clock.  If two clocks stamped, what is made later could look older, and make(1)
would build again.
"""

from __future__ import annotations

import time

_CLOCK_REALTIME_COARSE = 5
_TICK_NS = 10_000_000
"""The longest tick of a kernel."""
_latest = 0
"""The latest stamp that came from the kernel, in ns."""


def now() -> int:
    """Return the time in ns since the epoch for a stamp.

    It is never earlier than a stamp that was passed to `came`, unless the clock was set back.
    """
    coarse = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    return _latest if coarse < _latest <= coarse + _TICK_NS else coarse


def came(stamp: int) -> None:
    """Note a stamp that came from the kernel.

    It can be ahead of the coarse clock, within a tick, after another file system needed a
    finer stamp.
    """
    global _latest
    if now() < stamp <= time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) + _TICK_NS:
        _latest = stamp
