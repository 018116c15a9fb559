"""Room on the devices of a store, in raw bytes: what a sample found, less what it cannot know of.

Nodes with the same device number share the room.  Whatever gets a place on a device is
counted from then on (`place`).  It leaves the count with the first sample that began after
its write had ended (`landed`): an earlier sample may, or may not, contain it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..nodes.base import Space

INODES_MIN = 64
"""A device with fewer free inodes counts as full: segments are files."""


Begun = tuple[float, dict[int, int]]
"""When a sample began, and what had landed on each device by then."""


@dataclass(slots=True, eq=False)
class Device:
    """One device."""

    free: int = 0
    """Free bytes at the last sample; 0 when it was out of inodes."""
    placed: int = 0
    """Bytes that have got a place here, since the store was opened."""
    landed: int = 0
    """Of these, those whose writes have ended, whatever became of them."""
    counted: int = 0
    """`landed` when the last sample began."""
    began: float = 0.0
    """When that was, by the monotonic clock."""

    @property
    def room(self) -> int:
        """Bytes that are certainly free."""
        return self.free - (self.placed - self.counted)

    def place(self, length: int) -> Device:
        """Count bytes that are going to be written; return the device, on which they land."""
        self.placed += length
        return self

    def land(self, length: int) -> None:
        """Record that a write of placed bytes has ended."""
        self.landed += length


class Devices:
    """The devices of a store, by number."""

    def __init__(self) -> None:
        self._known: dict[int, Device] = {}

    def at(self, number: int) -> Device:
        """Return the device with a number."""
        return self._known.setdefault(number, Device())

    def begin_sample(self) -> Begun:
        """Return what `end_sample` needs; call this before the device is asked."""
        return time.monotonic(), {number: at.landed for number, at in list(self._known.items())}

    def end_sample(self, begun: Begun, space: Space) -> None:
        """Take over what a device answered; runs in any thread."""
        device, (began, landed) = self.at(space.device), begun
        if began < device.began:
            return  # a later sample was faster
        full = space.inodes is not None and space.inodes < INODES_MIN
        device.began, device.free = began, 0 if full else space.free
        device.counted = max(device.counted, landed.get(space.device, 0))
