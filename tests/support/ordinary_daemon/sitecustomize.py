"""Gives a daemon a clock of its own: Python imports this first, if its folder is in PYTHONPATH.

TEST_CLOCK names a file of 8 bytes: by how many seconds the clock of the day is off, as a
little-endian double.  The test changes it while the daemon runs.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

_DAY_CLOCKS = (time.CLOCK_REALTIME, 5)  # 5: CLOCK_REALTIME_COARSE
with open(os.environ["TEST_CLOCK"], "rb") as _file:
    _map = mmap.mmap(_file.fileno(), 8, access=mmap.ACCESS_READ)
_time, _gettime_ns = time.time, time.clock_gettime_ns


def _off() -> float:
    (seconds,) = struct.unpack("<d", _map[:])
    return float(seconds)


def _clock_gettime_ns(clock: int) -> int:
    return _gettime_ns(clock) + (int(_off() * 1e9) if clock in _DAY_CLOCKS else 0)


time.time = lambda: _time() + _off()
time.time_ns = lambda: _clock_gettime_ns(time.CLOCK_REALTIME)
time.clock_gettime_ns = _clock_gettime_ns
