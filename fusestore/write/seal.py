"""The state of a stripe that is being sealed, shared by the event loop and the threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import trio

from ..errors import NodeFullError
from ..format.stripe_rows import ShardPlace
from ..members.devices import Device
from ..members.member import Member
from ..members.node_calls import NodeCall
from ..system.threads import Job
from .stripes import UnsealedStripe


@dataclass(slots=True, eq=False)
class Seal:
    """A stripe that is being sealed.

    One thread at a time takes shards from `todo`.  If a node holds it up, another thread goes
    on, and the first one ends with the shard that it is writing.
    """

    stripe: UnsealedStripe
    targets: list[tuple[Member, ShardPlace]]
    parity: bytearray
    charges: list[Device]
    """The devices that count each of its shards as on its way."""
    todo: list[int]
    """The indices of the shards that nobody has begun to write, the next one at the end."""
    checksums: list[bytes] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held to change `writing` and `turn`."""
    writing: int | None = None
    """The shard that the thread is writing."""
    turn: int = 0
    """Threads of earlier turns take no more shards."""
    job: Job | None = None
    """The latest one in a thread."""
    runs: bool = True
    """The thread of this turn has not ended."""
    held: dict[int, NodeCall] = field(default_factory=dict)
    """Shards that are being written by threads of earlier turns."""
    changed: trio.Event = field(default_factory=trio.Event)
    hung: bool = False
    """A thread was given up: it keeps the buffers."""
    failure: BaseException | None = None
    """An unexpected error in a thread."""

    @property
    def is_held(self) -> bool:
        """Whether a shard is being written that was not given up."""
        return any(not call.is_left for call in self.held.values())

    def take(self, turn: int) -> int | None:
        """Return the next shard to write, if a thread of this turn is to write one."""
        with self.lock:
            if self.turn == turn:
                self.writing = self.todo.pop() if self.todo else None
                return self.writing
            return None

    def finished(self, turn: int) -> bool:
        """Return False if another thread has gone on during the write of a shard."""
        with self.lock:
            if self.turn == turn:
                self.writing = None
            return self.turn == turn

    def leave(self, index: int) -> None:
        """Give up a shard, and the thread that is writing it."""
        call = self.held[index]
        if not call.is_left:
            self.hung = True
            self.targets[index][0].calls.leave(call)
            if call.job is not None:
                call.job.disown()

    def returned(self, index: int) -> None:
        """Note that a thread which was held up has ended."""
        member, _ = self.targets[index]
        member.calls.returned(self.held.pop(index))

    @property
    def written(self) -> int:
        """How many shards are on their nodes."""
        return sum(
            place.written and member.writable and index not in self.errors
            for index, (member, place) in enumerate(self.targets)
        )

    @property
    def full(self) -> dict[Member, NodeFullError]:
        """The nodes that had no room for a shard."""
        return {
            self.targets[index][0]: error
            for index, error in self.errors.items()
            if isinstance(error, NodeFullError)
        }

    def again(self) -> None:
        """Write those shards again that found no room."""
        self.todo = [i for i, error in self.errors.items() if isinstance(error, NodeFullError)]
        self.runs = True
        for index in self.todo:
            del self.errors[index]
