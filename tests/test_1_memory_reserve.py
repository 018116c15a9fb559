"""The reserve of memory: given back when little is left, and taken again."""

from __future__ import annotations

import mmap

import pytest

from fusestore.errors import NoMemoryLeftError
from fusestore.system import memory_reserve
from fusestore.system.memory_reserve import AHEAD_BYTES, LOOK_BYTES, RESERVE_BYTES, MemoryReserve


class System:
    """Grants mappings up to a limit."""

    def __init__(self, free: int) -> None:
        self.free = free

    def mapped(self, length: int) -> mmap.mmap | None:
        return mmap.mmap(-1, length) if length <= self.free else None


@pytest.mark.expects_log("refuses this process more memory", "There is memory again")
def test_requests_are_refused_while_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    system = System(1 << 40)
    monkeypatch.setattr(memory_reserve, "_mapped", system.mapped)
    monkeypatch.setattr(memory_reserve, "_is_limited", lambda: True)
    reserve = MemoryReserve()
    for _ in range(10):
        reserve.take(1 << 20)
    system.free = AHEAD_BYTES - 1
    for _ in range(10):
        with pytest.raises(NoMemoryLeftError):
            reserve.take(1 << 20)
    system.free = RESERVE_BYTES  # which it gave back
    with pytest.raises(NoMemoryLeftError):
        reserve.take(1)
    system.free = RESERVE_BYTES + AHEAD_BYTES
    reserve.take(1)
    system.free = 0
    reserve.take(LOOK_BYTES // 2)  # it looks now and then only
    with pytest.raises(NoMemoryLeftError):
        reserve.take(LOOK_BYTES)


def test_without_a_reserve_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_reserve, "_mapped", System(0).mapped)
    reserve = MemoryReserve()
    for _ in range(10):
        reserve.take(1 << 20)
